"""The one tree of errors that every room may raise and only `server.frontend.status` translates.

    PathfoxError
    ├── InvalidRequest          a field is wrong: which, the value seen, the limit; several at once
    │   ├── ContextLengthExceeded   prompt + max_tokens is over the model's context
    │   └── IdempotencyMismatch     the key was used with another body
    ├── NotFound                no such model, session, request, snapshot
    ├── FailedPrecondition      the thing exists and cannot do that
    ├── Unauthenticated         no credential, or a bad one
    ├── PermissionDenied        a good credential without the right
    ├── Conflict                lost compare-and-set, stale fence
    ├── Overloaded              a limit is reached; says when to come back
    │   └── DeadlineUnmeetable      it could not be begun in time; a new call may be, later
    ├── Unavailable             draining, circuit open, nobody to serve it; says when to come back
    ├── DeadlineExceeded        the caller's time is up
    ├── NotSupported            this server is not set up for that
    ├── SourceLost              a token source broke off; the request can go on elsewhere
    ├── StartupError            the process cannot start: names the file or setting and the reason
    │   ├── ConfigError
    │   └── ModelLoadError
    └── Internal                our own mistake

Every class survives pickle, so that an error keeps its type across processes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Violation(NamedTuple):
    """One wrong field of a request."""

    field: str
    """Path in the public contract, for example `sampling_params.top_p`."""
    seen: str
    """The value that was sent, shortened."""
    limit: str
    """What would have been right."""

    def __str__(self) -> str:
        return f"{self.field}: got {self.seen}, want {self.limit}"


MAX_SEEN_CHARACTERS = 80


def violation(field: str, *, seen: object, limit: str) -> Violation:
    """Describe one wrong field, its value cut to a length that fits a log line."""
    text = repr(seen) if isinstance(seen, str) else str(seen)
    if len(text) > MAX_SEEN_CHARACTERS:
        text = text[: MAX_SEEN_CHARACTERS - 1] + "…"
    return Violation(field, text, limit)


class PathfoxError(Exception):
    """Base of everything that this project raises on purpose."""

    reason = "PATHFOX_ERROR"
    """Stable name for programs, sent as `google.rpc.ErrorInfo.reason`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    def metadata(self) -> dict[str, str]:
        """Return facts for `google.rpc.ErrorInfo.metadata`."""
        return {}


class InvalidRequest(PathfoxError):
    """One or more fields of the request are wrong; all of them are named at once."""

    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(str(each) for each in violations))
        self.violations = tuple(violations)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.violations,)

    @classmethod
    def of(cls, field: str, *, seen: object, limit: str) -> "InvalidRequest":
        """Describe a single wrong field."""
        return cls([violation(field, seen=seen, limit=limit)])


class ContextLengthExceeded(InvalidRequest):
    """Prompt and max_tokens together do not fit the model's context."""

    reason = "CONTEXT_LENGTH"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, limit: int, is_least: bool = False) -> None:
        field = "input" if prompt_tokens >= limit else "sampling_params.max_tokens"
        seen = f"{'at least ' if is_least else ''}{prompt_tokens} prompt tokens + {max_tokens} max_tokens"
        super().__init__([violation(field, seen=seen, limit=f"at most {limit} tokens together")])
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.limit = limit
        self.is_least = is_least
        """The prompt was not tokenised: its length alone says that it has so many tokens or more."""

    def __reduce__(self) -> tuple[object, ...]:
        names = ("prompt_tokens", "max_tokens", "limit", "is_least")
        return _rebuild, (type(self), {name: getattr(self, name) for name in names})

    def metadata(self) -> dict[str, str]:
        """Return the two figures that decided."""
        return {"limit": str(self.limit), "prompt_tokens": str(self.prompt_tokens)}


class IdempotencyMismatch(InvalidRequest):
    """The idempotency key was first used with another request body."""

    reason = "IDEMPOTENCY_MISMATCH"


class NotFound(PathfoxError):
    """There is no resource of that kind and name for this caller."""

    reason = "NOT_FOUND"

    def __init__(self, resource: str, name: str, *, hint: str = "") -> None:
        super().__init__(f"no {resource} {name!r}" + (f"; {hint}" if hint else ""))
        self.resource = resource
        self.name = name
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), {"resource": self.resource, "name": self.name, "hint": self.hint})


class FailedPrecondition(PathfoxError):
    """The resource exists but is not in a state, or not of a kind, that allows the call."""

    reason = "FAILED_PRECONDITION"


class Unauthenticated(PathfoxError):
    """The call carries no credential, or one that is not known."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(PathfoxError):
    """The credential is good and does not allow this."""

    reason = "PERMISSION_DENIED"


class Conflict(PathfoxError):
    """Somebody else was first: a compare-and-set was lost or a fence is stale."""

    reason = "CONFLICT"

    def __init__(self, message: str, *, current_version: int) -> None:
        super().__init__(message)
        self.current_version = current_version

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), {"message": self.message, "current_version": self.current_version})

    def metadata(self) -> dict[str, str]:
        """Return the version that the caller should have named."""
        return {"current_version": str(self.current_version)}


class _ComeBackLater(PathfoxError):
    def __init__(self, message: str, *, retry_after_s: float | None = None, subject: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.subject = subject

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (
            type(self),
            {"message": self.message, "retry_after_s": self.retry_after_s, "subject": self.subject},
        )


class Overloaded(_ComeBackLater):
    """A limit of a tenant, a class or the server is reached; `subject` names it, `retry_after_s` is computed."""

    reason = "OVERLOADED"


class DeadlineUnmeetable(Overloaded):
    """The caller's deadline or budget is shorter than the measured wait; refused at once instead of failing late."""

    reason = "DEADLINE_UNMEETABLE"


class Unavailable(_ComeBackLater):
    """Nobody can serve this now; `subject` is the stable reason, for example `DRAINING`."""

    reason = "UNAVAILABLE"


class DeadlineExceeded(PathfoxError):
    """The caller's deadline has passed."""

    reason = "DEADLINE_EXCEEDED"


class NotSupported(PathfoxError):
    """The contract has it and this server is not set up for it."""

    reason = "NOT_SUPPORTED"


class SourceLost(PathfoxError):
    """A token source broke off in a way that lets the request go on from prompt + emitted tokens elsewhere."""

    reason = "SOURCE_LOST"


class StartupError(PathfoxError):
    """The process cannot start; the message is one line that names the file or setting, and the reason."""

    reason = "STARTUP"


class ConfigError(StartupError):
    """A setting is unknown or has a bad value."""

    reason = "CONFIG"


class ModelLoadError(StartupError):
    """A model's files cannot be read as a model that this server knows."""

    reason = "MODEL_LOAD"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.problem)


class Internal(PathfoxError):
    """Our own mistake. The cause is logged once, at the boundary, and never sent."""

    reason = "INTERNAL"


def _rebuild(make: Callable[..., PathfoxError], arguments: dict[str, object]) -> PathfoxError:
    return make(**arguments)
