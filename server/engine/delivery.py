"""When a step's tokens go to their readers: at once, or together with the next step's.

Every frame takes time from the kernels, on both ends of a loopback connection and whatever its length. So where steps
are short or many streams decode side by side, tokens wait a few milliseconds for their successors. Nothing else ever
waits: not a first token, not an end, and no token for a step that may be a long one.
"""

from dataclasses import dataclass, field
from math import inf

from server.engine.events import Emission, EmittedToken
from server.engine.report import StepReport

PATIENCE_PER_STREAM_S = 0.005
"""A frame costs some 0.2 ms of a core, server and client together (2 cores of Zen 5, November 2026: ops/bench/results/
profile.md), and whoever computes on the others waits for it: of two cores that is to be a twentieth of the time. With
one or two streams a token waits for a step that takes less, which no reader can see."""


@dataclass(slots=True)
class Delivery:
    """Decides after every step.

    Args:
        max_delay_s: what a token waits for others at most; 0 = never.
    """

    max_delay_s: float
    _held_since_s: float = field(default=inf, init=False)

    def may_wait(self, emissions: list[tuple[int, Emission]], report: StepReport, now_s: float) -> bool:
        """Say whether what was emitted since the last delivery may wait for the next step.

        Args:
            emissions: what was emitted.
            report: of the last step. The next one will last as long, if neither reads a prompt.
            now_s: on the clock of the report.
        """
        self._held_since_s = min(self._held_since_s, now_s)
        patience_s = min(self.max_delay_s, PATIENCE_PER_STREAM_S * max(1, report.num_running - 1))
        return (
            now_s + report.duration_s - self._held_since_s < patience_s
            and not report.num_prefill_tokens
            and not report.num_waiting
            and all(isinstance(each, EmittedToken) for _, each in emissions)
        )

    def delivered(self) -> None:
        """Note that nothing waits any more."""
        self._held_since_s = inf
