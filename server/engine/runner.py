"""Runs a plan on the model: rows in, logits out. Owns the tensors behind page ids and slots.

Knows neither requests nor sampling. R rows, L logit rows, S slots, P pages, V vocabulary.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from server.engine.pages import PageTable
from server.engine.plan import Plan
from server.engine.repeats import Columns, Repeats
from server.engine.report import Phase, Stopwatch
from server.model.memory import Field, LayerMemory, allocate
from server.model.mixers import ClosingPages
from server.model.rows import Rows


class Sizes(Protocol):
    """What the engine reads of a model's spec."""

    @property
    def vocabulary_size(self) -> int:
        """Return how many token ids there are."""
        ...

    @property
    def context_length_tokens(self) -> int:
        """Return how many tokens a sequence may have."""
        ...

    @property
    def page_size_tokens(self) -> int:
        """Return how many tokens a page holds."""
        ...


class StepModel(Protocol):
    """A model as the engine sees it."""

    @property
    def spec(self) -> Sizes:
        """Return the sizes."""
        ...

    @property
    def device(self) -> torch.device:
        """Return where the model's tensors live."""
        ...

    @property
    def page_fields(self) -> tuple[tuple[Field, ...], ...]:
        """Return what a page holds, per layer."""
        ...

    @property
    def tail_fields(self) -> tuple[tuple[Field, ...], ...]:
        """Return what an open page keeps outside the pool, per layer."""
        ...

    def forward(self, rows: Rows, memory: Many[LayerMemory]) -> Tensor:
        """Advance the rows' sequences; return logits `[L, V]` float32."""
        ...

    def close(self, memory: Many[LayerMemory], pages: ClosingPages) -> None:
        """Turn open pages into closed ones."""
        ...


def page_bytes(model: StepModel) -> int:
    """Return the size of a page over all layers."""
    return sum(field.num_bytes for fields in model.page_fields for field in fields)


def can_roll_back(model: StepModel) -> bool:
    """Whether a row may be computed again with another token: not if its sequence has moved a tail on."""
    return not any(model.tail_fields)


class Runner:
    """Turns plans into rows and rows into logits.

    Args:
        model: what computes.
        table: pages of each slot; kept by the scheduler.
        num_pages: P.
        max_num_seqs: S.
        watch: told when the rows are laid out and when they are computed.
    """

    def __init__(
        self, model: StepModel, table: PageTable, *, num_pages: int, max_num_seqs: int, watch: Stopwatch
    ) -> None:
        self._watch = watch
        self._model = model
        self._table = table
        self.memory = tuple(
            LayerMemory(
                pages=allocate(pages, num_pages, model.device),
                tails=allocate(tails, max_num_seqs, model.device),
            )
            for pages, tails in zip(model.page_fields, model.tail_fields, strict=True)
        )
        self.repeats = Repeats(self._compute, table.tensor())

    def run(self, plan: Plan) -> Tensor:
        """Compute the plan's rows; return logits `[L, V]`: of its samples, then of its scored rows.

        The logits are good until the next run.
        """
        step = self.repeats.find(plan.num_rows, _num_logit_rows(plan))
        if step is None:
            rows = self.rows(plan)
            self._watch.lap(Phase.ROWS)
            logits = self._compute(rows)
        else:
            _fill(step.columns, plan)
            self._watch.lap(Phase.ROWS)
            logits = self.repeats.run(step)
        self._watch.lap(Phase.KERNELS)
        return logits

    def rows(self, plan: Plan) -> Rows:
        """Lay the plan's rows out in memory of their own."""
        columns = Columns.empty(plan.num_rows, _num_logit_rows(plan))
        _fill(columns, plan)
        return columns.rows(self._table.tensor())

    def close(self, closing: Many[tuple[int, int]]) -> None:
        """Close pages of the last run, given as (slot, page id)."""
        slots, page_ids = zip(*closing, strict=True)
        self._model.close(self.memory, ClosingPages(self._indices(slots), self._indices(page_ids)))

    def read_page(self, page_id: int) -> bytes:
        """Return a page's bytes: its fields in the order of layers and names. The same bytes in a store."""
        fields = (
            layer.pages[field.name]
            for layer, names in zip(self.memory, self._model.page_fields, strict=True)
            for field in names
        )
        return b"".join(
            field[page_id].contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for field in fields
        )

    def _compute(self, rows: Rows) -> Tensor:
        return self._model.forward(rows, self.memory)

    def _indices(self, values: Iterable[int]) -> Tensor:
        return torch.from_numpy(np.fromiter(values, dtype=np.int32)).to(self._model.device)


def _num_logit_rows(plan: Plan) -> int:
    return len(plan.sample_rows) + sum(span.num_rows for span in plan.spans)


def _fill(columns: Columns, plan: Plan) -> None:
    """Lay the plan's rows out: decode rows first, gathered together; each chunk of a prompt as one slice."""
    token_ids, positions, slots, logit_rows = columns
    row = plan.num_decode_rows
    decoding = [chunk.sequence for chunk in islice(plan.chunks, row)]
    token_ids[:row] = [each.token_ids[each.num_computed] for each in decoding]
    positions[:row] = [each.num_computed for each in decoding]
    slots[:row] = [each.slot for each in decoding]
    for sequence, count in islice(plan.chunks, row, None):
        start = sequence.num_computed
        token_ids[row : row + count] = sequence.token_ids[start : start + count]
        positions[row : row + count] = np.arange(start, start + count, dtype=np.int32)
        slots[row : row + count] = sequence.slot
        row += count
    row = len(plan.sample_rows)
    logit_rows[:row] = plan.sample_rows
    for span in plan.spans:
        logit_rows[row : row + span.num_rows] = range(span.first_row, span.first_row + span.num_rows)
        row += span.num_rows
