"""What a run saw: every request and every frame of its answer. Nothing here is computed."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Outcome(enum.StrEnum):
    """How one request ended."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    """The server had no room: refused before the first token, with the time to come back (RetryInfo)."""
    FAILED = "failed"
    INCOMPLETE = "incomplete"
    """The run ended before the request did."""


class Frame(NamedTuple):
    """One message that brought tokens."""

    at_s: float
    num_tokens: int
    """Output tokens up to its end."""


class Usage(NamedTuple):
    """What a server counted for one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Call:
    """One request, as its client saw it. Times are the clock's."""

    due_s: float
    sent_s: float
    prompt_tokens: int = 0
    """As sent; the server's own count is in `usage`."""
    outcome: Outcome = Outcome.INCOMPLETE
    status: str = ""
    """Name of the gRPC status of a request that was rejected or failed."""
    message: str = ""
    frames: list[Frame] = field(default_factory=list)
    ended_s: float | None = None
    """When the stream ended, well or not."""
    usage: Usage = field(default_factory=Usage)
    """All zeros before the end."""
    text: str = ""
    """Kept only where the recording says so."""


@dataclass(slots=True)
class Recording:
    """All that a run saw so far: true at every moment, so that a run which is cut short keeps what it has."""

    asked: int
    """Requests that the run is to send; once it is over, those that it sent."""
    model_id: str | None = None
    """Whom it asked, once that is known."""
    is_open_loop: bool = False
    keeps_text: bool = False
    begun_s: float = 0.0
    ended_s: float = 0.0
    calls: list[Call] = field(default_factory=list)
    """In the order of sending."""
    stopped: str | None = None
    """Why the run ended before it was over; None: it did not."""
    cpu_s: float = 0.0
    """Processor time of this client between begin and end."""

    @property
    def duration_s(self) -> float:
        """How long the run took."""
        return self.ended_s - self.begun_s


OnEnd = Callable[[Call], None]
"""Told of every request that ended by itself."""
