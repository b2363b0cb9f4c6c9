"""What the engine measures of itself: a report per step for whoever counts, and rates for whoever plans."""

from dataclasses import dataclass
from math import exp

RATE_MEMORY_S = 5.0
"""Rates forget with this time constant: long against a step, short against a change of load."""


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
