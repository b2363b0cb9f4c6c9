"""What steps take, by how many sequences and rows they have: measured, so that it holds on any machine.

Only steps without rows of prompts are told. What was not seen lately is forgotten: contexts grow and neighbours come
and go.
"""

from collections import deque
from math import log2

NUM_KEPT = 7
NUM_TRIED = 5
"""Fewer say little: the first two steps of a shape are recorded and checked, another may have met a busy neighbour."""
MEMORY_STEPS = 500
"""What was not seen for so many steps is forgotten, so a step in hundreds tries again."""
EXPECTED_SHARE = 0.25
"""Of a plain step's time, for twice as many rows, until that was tried: cheap, so that it is."""


class StepCosts:
    """Remembers the seconds of steps. A plain step has one row for each sequence."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], deque[float]] = {}
        self._last_step: dict[tuple[int, int], int] = {}
        self._num_steps = 0

    def note(self, num_sequences: int, num_rows: int, duration_s: float) -> None:
        """Learn what a step took."""
        self._num_steps += 1
        key = num_sequences, num_rows
        if self._is_forgotten(key):
            self._seen[key] = deque(maxlen=NUM_KEPT)
        self._seen[key].append(duration_s)
        self._last_step[key] = self._num_steps

    def ratio(self, num_sequences: int, num_rows: int) -> float | None:
        """Return what a step of so many rows takes of a plain step's time; None = plain steps are not known."""
        plain_s = self._middle((num_sequences, num_sequences))
        if not plain_s:
            return None
        expected = 1 + EXPECTED_SHARE * log2(num_rows / num_sequences)
        key = num_sequences, num_rows
        measured = self._middle(key) / plain_s
        if not measured:
            return expected
        return measured if len(self._seen[key]) >= NUM_TRIED else min(measured, expected)

    def _middle(self, key: tuple[int, int]) -> float:
        if self._is_forgotten(key):
            return 0.0
        seen = sorted(self._seen[key])
        return seen[(len(seen) - 1) // 2]

    def _is_forgotten(self, key: tuple[int, int]) -> bool:
        return key not in self._seen or self._num_steps - self._last_step[key] > MEMORY_STEPS
