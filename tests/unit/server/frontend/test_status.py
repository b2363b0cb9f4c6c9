import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from server import errors
from server.frontend.status import CODES, Reply, reply_to

EXAMPLES: list[tuple[errors.PathfoxError, grpc.StatusCode, type]] = [
    (
        errors.InvalidRequest.of("a.b", seen=1, limit="0"),
        grpc.StatusCode.INVALID_ARGUMENT,
        error_details_pb2.BadRequest,
    ),
    (
        errors.ContextLengthExceeded(prompt_tokens=9, max_tokens=1, limit=8),
        grpc.StatusCode.INVALID_ARGUMENT,
        error_details_pb2.BadRequest,
    ),
    (
        errors.IdempotencyMismatch([errors.violation("idempotency_key", seen="k", limit="the same body")]),
        grpc.StatusCode.INVALID_ARGUMENT,
        error_details_pb2.BadRequest,
    ),
    (errors.NotFound("model", "m"), grpc.StatusCode.NOT_FOUND, error_details_pb2.ResourceInfo),
    (errors.FailedPrecondition("no"), grpc.StatusCode.FAILED_PRECONDITION, error_details_pb2.ErrorInfo),
    (errors.Unauthenticated("no"), grpc.StatusCode.UNAUTHENTICATED, error_details_pb2.ErrorInfo),
    (errors.PermissionDenied("no"), grpc.StatusCode.PERMISSION_DENIED, error_details_pb2.ErrorInfo),
    (errors.Conflict("late", current_version=3), grpc.StatusCode.ABORTED, error_details_pb2.ErrorInfo),
    (
        errors.Overloaded("full", retry_after_s=2.0, subject="s"),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        error_details_pb2.RetryInfo,
    ),
    (errors.Overloaded("full", subject="s"), grpc.StatusCode.RESOURCE_EXHAUSTED, error_details_pb2.QuotaFailure),
    (
        errors.DeadlineUnmeetable("late", subject="d"),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        error_details_pb2.QuotaFailure,
    ),
    (
        errors.Unavailable("drain", retry_after_s=1.0, subject="DRAINING"),
        grpc.StatusCode.UNAVAILABLE,
        error_details_pb2.RetryInfo,
    ),
    (errors.SourceLost("gone"), grpc.StatusCode.UNAVAILABLE, error_details_pb2.RetryInfo),
    (errors.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED, error_details_pb2.ErrorInfo),
    (errors.NotSupported("no"), grpc.StatusCode.UNIMPLEMENTED, error_details_pb2.ErrorInfo),
    (errors.Internal("secret"), grpc.StatusCode.INTERNAL, error_details_pb2.ErrorInfo),
    (errors.StartupError("late"), grpc.StatusCode.INTERNAL, error_details_pb2.ErrorInfo),
]


def _status(reply: Reply) -> status_pb2.Status:
    return status_pb2.Status.FromString(dict(reply.metadata)["grpc-status-details-bin"])


def _detail(reply: Reply, kind: type) -> object:
    for packed in _status(reply).details:
        message = kind()
        if packed.Unpack(message):
            return message
    pytest.fail(f"no {kind.__name__} among the details")


@pytest.mark.parametrize(("error", "code", "detail"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_each_error_has_its_code_and_details(error: errors.PathfoxError, code: grpc.StatusCode, detail: type) -> None:
    """An error becomes the status of the contract, with details that a program can read."""
    reply = reply_to(error, request_id="r-1")

    assert reply.code is code
    assert _detail(reply, detail)
    assert dict(reply.metadata)["x-request-id"] == "r-1"
    assert _status(reply).message == reply.message


def test_every_class_of_the_tree_has_a_code() -> None:
    """No error that may reach a client is missing in the table (those of start-up never do)."""

    def below(kind: type) -> list[type]:
        return [kind, *(each for child in kind.__subclasses__() for each in below(child))]

    for kind in below(errors.PathfoxError):
        if kind in {errors.PathfoxError, errors._ComeBackLater} or issubclass(kind, errors.StartupError):
            continue
        assert any(each in CODES for each in kind.__mro__), kind


def test_a_wrapped_error_keeps_its_status() -> None:
    """The table looks through `__cause__`, so that a wrapper does not turn a refusal into a bug."""
    error = RuntimeError("while resolving")
    error.__cause__ = errors.NotFound("model", "m")

    assert reply_to(error, request_id="r").code is grpc.StatusCode.NOT_FOUND


def test_an_unknown_exception_tells_nothing() -> None:
    """A bug is INTERNAL with the request's id; what it said stays in the log."""
    reply = reply_to(ValueError("the password is 1234"), request_id="r-9")

    assert reply.code is grpc.StatusCode.INTERNAL
    assert "1234" not in str(reply)
    info = _detail(reply, error_details_pb2.ErrorInfo)
    assert info.metadata["request_id"] == "r-9"


def test_time_to_come_back_is_jittered_upwards() -> None:
    """Pushback and RetryInfo say the computed time, spread over up to half of it, never less."""
    for jitter, milliseconds in ((0.0, 2000), (1.0, 3000)):
        reply = reply_to(
            errors.Overloaded("full", retry_after_s=2.0), request_id="r", jitter=lambda jitter=jitter: jitter
        )

        assert dict(reply.metadata)["grpc-retry-pushback-ms"] == str(milliseconds)
        assert _detail(reply, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == milliseconds


def test_an_unmeetable_deadline_asks_for_a_new_call() -> None:
    """A retry by gRPC itself, under the same deadline, is forbidden; when a new call makes sense is said."""
    reply = reply_to(errors.DeadlineUnmeetable("late", retry_after_s=3, subject="deadline"), request_id="r")

    assert dict(reply.metadata)["grpc-retry-pushback-ms"] == "-1"
    assert _detail(reply, error_details_pb2.RetryInfo).retry_delay.ToSeconds() >= 3


def test_many_violations_fit_the_trailers() -> None:
    """A thousand wrong fields are cut to what grpc lets through, and their number is said."""
    reply = reply_to(
        errors.InvalidRequest([errors.violation(f"f[{i}]", seen="é" * 500, limit="y" * 100) for i in range(1000)]),
        request_id="r",
    )

    size = sum(len(key) + len(value) for key, value in reply.metadata)
    assert size + 3 * len(reply.message.encode()) < 8000
    assert "more" in _detail(reply, error_details_pb2.BadRequest).field_violations[-1].description
