"""What can go wrong with a call, as exceptions.

    PathfoxError
    ├── InvalidRequest              a field is wrong; `violations` names each
    │   ├── ContextLengthExceeded   prompt + max_tokens is over the model's context
    │   └── IdempotencyMismatch     the key was used with another request
    ├── NotFound                    no such model, session, request, circuit
    ├── FailedPrecondition          it exists and cannot do that
    ├── Conflict                    somebody else was first; `current_version`
    ├── Unauthenticated             no token, or a bad one
    ├── PermissionDenied            a good token without the right
    ├── Overloaded                  a limit is reached; `retry_after_s` says when to come back
    ├── Unavailable                 nobody to serve it now (or nobody reached); `retry_after_s` if the server said it
    ├── DeadlineExceeded            `timeout_s` has passed
    ├── Cancelled                   the call was cancelled, on this side or the other
    ├── NotSupported                this server does not do that
    └── Internal                    the server's own mistake; quote `request_id` when you report it

Built from the gRPC status and its `google.rpc` details; the status stays at hand in `code` and `details`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DetailT = TypeVar(
    "_DetailT",
    error_details_pb2.ErrorInfo,
    error_details_pb2.RetryInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.ResourceInfo,
)


class Violation(NamedTuple):
    """One wrong field of a request."""

    field: str
    """Path in the contract, for example `sampling_params.top_p`; empty for a note on the others."""
    description: str
    """What was sent, and what would have been right."""


class Failure(NamedTuple):
    """How a call ended, before it is made an exception."""

    code: grpc.StatusCode
    message: str
    trailers: Mapping[str, str | bytes]
    details: status_pb2.Status

    def find(self, kind: type[_DetailT]) -> _DetailT | None:
        """Return the first detail of a kind."""
        for packed in self.details.details:
            detail = kind()
            if packed.Is(detail.DESCRIPTOR) and packed.Unpack(detail):
                return detail
        return None

    @property
    def info(self) -> Mapping[str, str]:
        """Facts of the `google.rpc.ErrorInfo`."""
        found = self.find(error_details_pb2.ErrorInfo)
        return dict(found.metadata) if found else {}

    @property
    def retry_after_s(self) -> float | None:
        """When the server said to come back."""
        found = self.find(error_details_pb2.RetryInfo)
        return found.retry_delay.ToMicroseconds() / 1e6 if found else None


class PathfoxError(Exception):
    """Base of all."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message or failure.code.name)
        info = failure.find(error_details_pb2.ErrorInfo)
        self.code = failure.code
        """The gRPC status code."""
        self.message = failure.message
        self.reason = info.reason if info else ""
        """Stable name for programs."""
        self.info = failure.info
        """Facts by name."""
        self.request_id = str(failure.trailers.get("x-request-id", "")) or self.info.get("request_id", "")
        """Of the call; empty when no Pathfox server answered."""
        self.details = failure.details
        """The whole `google.rpc.Status`."""
        self._failure = failure

    def __reduce__(self) -> tuple[type["PathfoxError"], tuple[Failure]]:
        return type(self), (self._failure,)


class InvalidRequest(PathfoxError):
    """One or more fields of the request are wrong; all of them are named at once."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        found = failure.find(error_details_pb2.BadRequest)
        self.violations = tuple(
            Violation(each.field, each.description) for each in (found.field_violations if found else ())
        )


class ContextLengthExceeded(InvalidRequest):
    """Prompt and max_tokens together do not fit the model's context."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.limit = _integer(self.info, "limit")
        self.prompt_tokens = _integer(self.info, "prompt_tokens")


class IdempotencyMismatch(InvalidRequest):
    """The idempotency key was first used with another request."""


class NotFound(PathfoxError):
    """There is nothing of that name for this caller."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        found = failure.find(error_details_pb2.ResourceInfo)
        self.resource = found.resource_type if found else ""
        self.name = found.resource_name if found else ""


class FailedPrecondition(PathfoxError):
    """The thing exists and is not in a state, or not of a kind, that allows the call."""


class Conflict(PathfoxError):
    """Somebody else was first."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.current_version = _integer(self.info, "current_version")


class Unauthenticated(PathfoxError):
    """The call carries no token, or one that is not known."""


class PermissionDenied(PathfoxError):
    """The token is good and does not allow this."""


class Overloaded(PathfoxError):
    """A limit is reached; nothing was begun."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.retry_after_s = failure.retry_after_s


class Unavailable(PathfoxError):
    """Nobody can serve this now, or nobody was reached."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.retry_after_s = failure.retry_after_s


class DeadlineExceeded(PathfoxError):
    """The time that the caller gave has passed."""


class Cancelled(PathfoxError):
    """The call was cancelled."""


class NotSupported(PathfoxError):
    """The contract has it and this server does not do it."""


class Internal(PathfoxError):
    """The server's own mistake."""


_KINDS: Mapping[grpc.StatusCode, type[PathfoxError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
}
_KINDS_BY_REASON: Mapping[str, type[PathfoxError]] = {
    "CONTEXT_LENGTH": ContextLengthExceeded,
    "IDEMPOTENCY_MISMATCH": IdempotencyMismatch,
}


def read_failure(error: grpc.RpcError) -> Failure:
    """Take apart what grpc raised; the blocking and the asyncio kind have the same methods."""
    code = _ask(error, "code", grpc.StatusCode.UNKNOWN)
    message = _ask(error, "details", None) or ""
    trailers = {str(key): value for key, value in _pairs(_ask(error, "trailing_metadata", None))}
    details = status_pb2.Status()
    packed = trailers.get("grpc-status-details-bin")
    if isinstance(packed, bytes):
        try:
            details.ParseFromString(packed)
        except DecodeError:  # not ours; the plain status says enough
            details.Clear()
    return Failure(code, message, trailers, details)


def error_from(failure: Failure) -> PathfoxError:
    """Choose the exception: by `google.rpc.ErrorInfo.reason` where that says more, else by status code."""
    info = failure.find(error_details_pb2.ErrorInfo)
    kind = _KINDS.get(failure.code, Internal)
    refined = _KINDS_BY_REASON.get(info.reason if info else "", kind)
    return (refined if issubclass(refined, kind) else kind)(failure)


def cancelled() -> PathfoxError:
    """Make the error of a call that was cancelled on this side."""
    return error_from(Failure(grpc.StatusCode.CANCELLED, "closed by the caller", {}, status_pb2.Status()))


_AnswerT = TypeVar("_AnswerT")


def _ask(error: grpc.RpcError, name: str, default: _AnswerT) -> _AnswerT:
    method: Callable[[], _AnswerT] | None = getattr(error, name, None)
    return default if method is None else method()


def _pairs(metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterable[tuple[str, str | bytes]]:
    return metadata or ()


def _integer(info: Mapping[str, str], name: str) -> int | None:
    try:
        return int(info[name])
    except (KeyError, ValueError):
        return None
