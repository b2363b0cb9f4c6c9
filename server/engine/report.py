"""What the engine measures of itself: a report per step for whoever counts, and rates for whoever plans."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import exp

RATE_MEMORY_S = 5.0
"""Rates forget with this time constant: long against a step, short against a change of load."""


class Phase(StrEnum):
    """What the compute thread does, in order."""

    INTAKE = "intake"
    """Taking in requests and cancellations."""
    SCHEDULE = "schedule"
    ROWS = "rows"
    """Laying the plan out for the model."""
    KERNELS = "kernels"
    """The model, from rows to logits."""
    SAMPLE = "sample"
    COMMIT = "commit"
    DELIVER = "deliver"
    """Counting the step, and handing its tokens over."""


class Stopwatch:
    """Where a thread's time goes: each lap belongs to one phase. A lap takes 0.2 us (Zen 5, November 2026)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s = clock()
        self._laps_s: dict[str, float] = {}

    def skip(self) -> None:
        """Count the time since the last lap as nobody's: the thread slept."""
        self._last_s = self._clock()

    def lap(self, phase: Phase) -> None:
        """Count the time since the last lap."""
        now_s = self._clock()
        self._laps_s[phase] = self._laps_s.get(phase, 0.0) + now_s - self._last_s
        self._last_s = now_s

    def take(self) -> Mapping[str, float]:
        """Return the laps since the last take, by phase."""
        laps_s, self._laps_s = self._laps_s, {}
        return laps_s


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, seen from outside. Handed to the observer on the compute thread."""

    duration_s: float
    model_s: float
    """Of it, in the model and the sampler."""
    num_rows: int
    num_prefill_tokens: int
    num_decode_tokens: int
    """Rows of growing outputs, those of drafts included."""
    num_cached_tokens: int
    """Found in the pool at admission."""
    num_preemptions: int
    num_running: int
    """Sequences with a slot."""
    num_waiting: int
    used_pages: int
    cached_pages: int
    free_pages: int
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of the drafted ones, those that came."""
    is_failed: bool = False
    phases_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the compute thread since the last report: this step, and what followed the last one."""


class Rate:
    """Tokens a second of compute, exponentially weighted by time. 0 until measured."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step that did some of this work."""
        kept = exp(-seconds / RATE_MEMORY_S)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds

    @property
    def tokens_per_s(self) -> float:
        """Return the present rate."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0
