"""Steps of a size that came before, without Python: recorded, checked once, replayed from then on.

Knows sizes and recordings; knows neither plans nor what a model computes. R rows, L logit rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.placement import RowPlacement
from kernels.recording import Recording, new_recorder
from server.model.rows import Rows

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

MAX_ROWS = 64
"""A longer step hides its Python. A recording takes about 0.1 MB for 30 layers."""

Int32s = NDArray[np.int32]


class Columns(NamedTuple):
    """What a step's rows are made of, to be filled in."""

    token_ids: Int32s
    """`[R]`"""
    positions: Int32s
    """`[R]`"""
    slots: Int32s
    """`[R]`"""
    logit_rows: Int32s
    """`[L]`"""

    @classmethod
    def empty(cls, num_rows: int, num_logit_rows: int) -> "Columns":
        """Make columns of their own memory."""
        return cls(*(np.empty(size, dtype=np.int32) for size in (num_rows, num_rows, num_rows, num_logit_rows)))

    def rows(self, page_table: Tensor) -> Rows:
        """Return the rows that share the columns' memory where the page table is on the CPU."""
        token_ids, positions, slots, logit_rows = (torch.from_numpy(each).to(page_table.device) for each in self)
        return Rows(token_ids, RowPlacement(positions, slots, page_table), logit_rows)


class Step:
    """A step of one size. Fill in its columns, then compute it."""

    def __init__(self, columns: Columns, page_table: Tensor) -> None:
        self.columns = columns
        self.rows = columns.rows(page_table)
        self.recording: Recording | None = None
        self.is_trusted = False
        """A replay has given the bits of the step itself."""


class Repeats:
    """Computes steps, those of a familiar size by replaying them.

    Only steps whose rows all have logits are worth it, which decode and check drafts: there are few sizes of them, and
    they come again and again. Steps that read prompts are long, and of ever different shapes.

    The first step of a size is recorded. The second is computed both ways, on other numbers than were recorded: only
    if all bits are the same are later ones replayed. So `compute` must bear to be run twice on the same rows, which the
    engine asks of it anyway when a step fails.

    Args:
        compute: makes logits `[L, V]` of rows.
        page_table: that all rows share; stays where it is.
    """

    def __init__(self, compute: Callable[[Rows], Tensor], page_table: Tensor) -> None:
        self._compute = compute
        self._page_table = page_table
        self._recorder = new_recorder(page_table.device)
        self._memory = Columns.empty(MAX_ROWS, MAX_ROWS)
        self._steps: dict[int, Step] = {}
        """By number of rows: never more than `MAX_ROWS`."""
        self.num_replayed = 0
        """Steps that were replayed and not computed."""

    @property
    def num_sizes(self) -> int:
        """Return how many sizes are known."""
        return len(self._steps)

    @property
    def num_bytes(self) -> int:
        """Return the memory that all replays together compute in."""
        return self._recorder.num_bytes if self._recorder else 0

    def find(self, num_rows: int, num_logit_rows: int) -> Step | None:
        """Return the step of a size, or None if such steps are not worth recording or cannot be."""
        if self._recorder is None or num_logit_rows != num_rows or not 0 < num_rows <= MAX_ROWS:
            return None
        step = self._steps.get(num_rows)
        if step is None:
            columns = Columns(*(memory[:num_rows] for memory in self._memory))
            step = self._steps[num_rows] = Step(columns, self._page_table)
        return step

    def run(self, step: Step) -> Tensor:
        """Compute a step whose columns are filled in; the logits are good until the next step is computed."""
        recording = step.recording
        if recording is None or not recording.is_current:
            return self._record(step)
        if step.is_trusted:
            self.num_replayed += 1
            return recording.replay()
        replayed, computed = recording.replay(), self._compute(step.rows)
        step.is_trusted = _have_same_bits(replayed, computed)
        if not step.is_trusted:
            self.stop(f"a replay of {tuple(computed.shape)} logits differs from the step")
        return computed

    def stop(self, reason: str | None) -> None:
        """Compute every step as it is from now on: what is not recordable in one size is in none."""
        log.info("steps_not_recordable", reason=reason)
        self._recorder = None
        self._steps.clear()

    def _record(self, step: Step) -> Tensor:
        if self._recorder is None:
            return self._compute(step.rows)
        logits, step.recording = self._recorder.record(lambda: self._compute(step.rows))
        step.is_trusted = False
        if step.recording is None:
            self.stop(self._recorder.refusal)
        return logits


def _have_same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))
