"""Who calls, and what is known of this one call. Interceptors fill it, handlers read it."""

import contextvars
import enum
from dataclasses import dataclass, field

import grpc
from opentelemetry import trace

LogFact = str | int | float | bool | list[str] | None


class Role(enum.StrEnum):
    """What a credential allows."""

    USER = "user"
    ADMIN = "admin"
    """Everything that USER may, and AdminService."""


@dataclass(slots=True)
class Caller:
    """One call on its way through the front end."""

    method: str
    """Full name, `/pathfox.v1.GenerationService/Generate`."""
    received_s: float
    """On `time.monotonic()`."""
    request_id: str
    """Of the call, from `x-request-id` or made; sent back in the trailers."""
    peer: str = ""
    tenant: str = ""
    role: Role = Role.USER
    deadline_s: float | None = None
    """On `time.monotonic()`; None only for calls that may last for ever (Chat, Watch, reflection)."""
    trace_parent: str | None = None
    """W3C traceparent for the next hop."""
    span: trace.Span = trace.INVALID_SPAN
    code: grpc.StatusCode = grpc.StatusCode.OK
    """How the call ended, once it has."""
    num_frames: int = 0
    facts: dict[str, LogFact] = field(default_factory=dict)
    """For the one log line of this call: names with units, never prompt text."""
    is_request_id_ours: bool = True
    """The client sent no `x-request-id`, so the id of its request may stand for it."""

    def adopt(self, request_id: str) -> None:
        """Go by the id that the request itself carries, unless the client named the call."""
        if self.is_request_id_ours:
            self.request_id = request_id


_CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("pathfox_caller")


def set_caller(caller: Caller) -> None:
    """Make the call known to its handler; a call has a task, and with it a context, of its own."""
    _CALLER.set(caller)


def caller_of(context: object) -> Caller:  # noqa: ARG001 says where it belongs
    """Return what the interceptors know of the call that is being handled."""
    return _CALLER.get()
