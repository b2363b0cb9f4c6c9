"""What steps take, by how many rows they have: measured, so that it holds on any machine.

Only steps without rows of prompts are told. Every number of running sequences measures one size for nothing; sizes that
were not seen lately are forgotten, for contexts grow and neighbours come and go.
"""

from collections import deque

NUM_KEPT = 7
NUM_TRUSTED = 5
"""Fewer say little: the first two steps of a shape are recorded and checked, another may have met a busy neighbour."""
MEMORY_STEPS = 500
"""What was not seen for so many steps is forgotten, so a step in hundreds tries again."""
FIXED_ROWS = 7
"""What a step takes beside its rows, in rows, until measured: of SmolLM2-135M on 2 cores of
Zen 5 (November 2026), 1 to 64 rows, within 20 %."""


class StepCosts:
    """Remembers the seconds of steps."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}
        self._middle_s: dict[int, float] = {}
        """Of what was seen often enough."""
        self._last_step: dict[int, int] = {}
        self._num_steps = 0

    def note(self, num_rows: int, duration_s: float) -> None:
        """Learn what a step took."""
        self._num_steps += 1
        seen = self._seen.get(num_rows)
        if seen is None or self._is_forgotten(num_rows):
            seen = self._seen[num_rows] = deque(maxlen=NUM_KEPT)
            self._middle_s.pop(num_rows, None)
        seen.append(duration_s)
        self._last_step[num_rows] = self._num_steps
        if len(seen) >= NUM_TRUSTED:
            self._middle_s[num_rows] = sorted(seen)[(len(seen) - 1) // 2]

    def ratio(self, num_plain_rows: int, num_rows: int) -> float | None:
        """Return what a step takes of one with fewer rows; None = of that one nothing is known."""
        plain_s = self._seconds(num_plain_rows)
        if plain_s is None:
            return None
        measured_s = self._seconds(num_rows)
        if measured_s is not None:
            return measured_s / plain_s
        below = max(
            rows for rows in self._middle_s if num_plain_rows <= rows < num_rows and not self._is_forgotten(rows)
        )
        return self._middle_s[below] / plain_s * (num_rows + FIXED_ROWS) / (below + FIXED_ROWS)

    def _seconds(self, num_rows: int) -> float | None:
        return None if self._is_forgotten(num_rows) else self._middle_s.get(num_rows)

    def _is_forgotten(self, num_rows: int) -> bool:
        return self._num_steps - self._last_step.get(num_rows, -MEMORY_STEPS) > MEMORY_STEPS
