"""The one table from errors to gRPC statuses, with their `google.rpc` details.

Errors are raised where they are known; this is the only place that translates them. Knows no RPC and no context.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from server import errors

DOMAIN = "pathfox"
"""`google.rpc.ErrorInfo.domain`."""

MAX_MESSAGE_CHARACTERS = 512
MAX_DETAILS_BYTES = 4096
"""grpc drops answers whose metadata pass 8 KiB; message (percent-encoded) and details together stay below."""

CODES: Mapping[type[BaseException], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.NotSupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.SourceLost: grpc.StatusCode.UNAVAILABLE,
    errors.Internal: grpc.StatusCode.INTERNAL,
    TimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By class; a subclass has its nearest ancestor's code."""

DEFAULT_RETRY_S = 1.0
"""For an error that says "later" and was not told when."""

MAX_JITTER = 1.5
"""A herd that was refused at once must not come back at once."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What ends a failed RPC."""

    code: grpc.StatusCode
    reason: str
    """`google.rpc.ErrorInfo.reason`."""
    message: str
    metadata: tuple[tuple[str, str | bytes], ...]
    """Trailing: `grpc-status-details-bin`, `grpc-retry-pushback-ms`, `x-request-id`."""


def is_known(error: BaseException) -> bool:
    """Tell whether the table has the error or what caused it; what it does not have is our bug, to be logged."""
    found = _known(error)
    return found is not None and not isinstance(found, errors.Internal)


def reply_to(error: BaseException, *, request_id: str, jitter: Callable[[], float] = random.random) -> Reply:
    """Translate any exception into the status that ends its RPC.

    Args:
        error: what was raised; if the table has neither it nor a cause of it, the reply says INTERNAL and no more.
        request_id: goes into the trailers, and into the details of INTERNAL.
        jitter: 0..1; spreads the time to come back over 1 to 1.5 times the computed one.
    """
    known = _known(error)
    if known is None or isinstance(known, errors.Internal):
        known = errors.Internal(f"internal error; quote request {request_id}")
    elif isinstance(known, TimeoutError):
        known = errors.DeadlineExceeded("the deadline has passed")
    code = next(CODES[kind] for kind in type(known).__mro__ if kind in CODES)
    message = _shorten(str(known))
    metadata: list[tuple[str, str | bytes]] = [("x-request-id", request_id)]
    info = _error_info(known, request_id)
    details: list[Message] = [info, *_details(known)]
    if (retry_s := _retry_after_s(known)) is not None:
        # The spread is upwards only: earlier than computed is too early.
        retry_s *= 1 + jitter() * (MAX_JITTER - 1)
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(retry_s)))
        # gRPC's own retry keeps the call's deadline, which cannot be met: only a new call makes sense.
        pushback_ms = -1 if isinstance(known, errors.DeadlineUnmeetable) else round(retry_s * 1000)
        metadata.append(("grpc-retry-pushback-ms", str(pushback_ms)))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    metadata.extend(rpc_status.to_status(status).trailing_metadata)
    return Reply(code, info.reason, message, tuple(metadata))


def _known(error: BaseException) -> BaseException | None:
    """Find the error itself, or the nearest cause, that the table has."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if any(kind in CODES for kind in type(current).__mro__):
            return current
        seen.add(id(current))
        current = current.__cause__
    return None


def _error_info(error: BaseException, request_id: str) -> error_details_pb2.ErrorInfo:
    """Say in a word that programs can rely on what happened, with the figures that decided."""
    assert isinstance(error, errors.PathfoxError), "the table holds our errors only"
    reason, metadata = error.reason, error.metadata()
    if isinstance(error, errors.Internal):
        metadata = {"request_id": request_id}
    elif isinstance(error, errors.Unavailable) and error.subject:
        reason = error.subject
    elif isinstance(error, errors.Overloaded) and error.subject:
        metadata = {**metadata, "subject": error.subject}
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _details(error: BaseException) -> list[Message]:
    details: list[Message] = []
    match error:
        case errors.InvalidRequest():
            details.append(_bad_request(error))
        case errors.NotFound():
            details.append(
                error_details_pb2.ResourceInfo(
                    resource_type=error.resource, resource_name=_shorten(error.name), description=error.hint
                )
            )
        case errors.Overloaded():
            details.append(
                error_details_pb2.QuotaFailure(
                    violations=[
                        error_details_pb2.QuotaFailure.Violation(
                            subject=error.subject, description=_shorten(error.message)
                        )
                    ]
                )
            )
    return details


def _bad_request(error: errors.InvalidRequest) -> error_details_pb2.BadRequest:
    """Name every wrong field, as far as the trailers have room; the last entry says how many had none."""
    found = error_details_pb2.BadRequest()
    for place, each in enumerate(error.violations):
        found.field_violations.add(field=each.field, description=f"got {each.seen}, want {each.limit}")
        if found.ByteSize() > MAX_DETAILS_BYTES - 512:
            del found.field_violations[-1]
            found.field_violations.add(description=f"and {len(error.violations) - place} more")
            break
    return found


def _retry_after_s(error: BaseException) -> float | None:
    match error:
        case errors.Overloaded() | errors.Unavailable():
            return DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s
        case errors.SourceLost():
            return DEFAULT_RETRY_S
    return None


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 1] + "…"
