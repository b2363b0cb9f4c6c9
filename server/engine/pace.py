"""How many rows of prompts a step takes beside decode rows, so that running streams do not wait long for it.

A row's cost grows with the context before it, so rows alone do not bound a step's time. By the prefix law any chunking
of a prompt gives the same bits, so the chunk follows what steps took lately: too slow by half, then half the rows.
"""

from math import inf

MIN_ROWS = 16
"""A prompt advances by at least this many rows a step, a page of most models, however slow steps are."""


class Pace:
    """Follows the number of prompt rows whose step takes the target time. No bound until a step was measured.

    Args:
        target_s: what a step with decode rows may take; None or 0 = no bound, ever.
    """

    def __init__(self, target_s: float | None) -> None:
        self._target_s = target_s
        self._fitting_rows = inf

    def limit(self, num_rows: int) -> int:
        """Return how many of these prompt rows belong into a step that has decode rows too."""
        return int(min(num_rows, max(MIN_ROWS, self._fitting_rows)))

    def note(self, num_rows: int, duration_s: float) -> None:
        """Learn from a step that computed prompt rows, with decode rows or without.

        A step that ended in time with fewer rows than allowed (the end of a prompt) says nothing against more.
        """
        if not self._target_s or not num_rows or duration_s <= 0:
            return
        fitting_rows = num_rows * self._target_s // duration_s
        is_in_time = duration_s <= self._target_s
        if is_in_time and num_rows < self._fitting_rows:
            self._fitting_rows = max(self._fitting_rows, fitting_rows)
        else:
            self._fitting_rows = fitting_rows
