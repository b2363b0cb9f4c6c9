"""Runs a plan on the model: rows in, logits out. Owns the tensors behind page ids and slots.

Knows neither requests nor sampling. R rows, L logit rows, S slots, P pages, V vocabulary.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import chain, islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.placement import RowPlacement
from server.engine.pages import PageTable
from server.engine.plan import Plan
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


class Runner:
    """Turns plans into rows and rows into logits.

    Args:
        model: what computes.
        table: pages of each slot; kept by the scheduler.
        num_pages: P.
        max_num_seqs: S.
    """

    def __init__(self, model: StepModel, table: PageTable, *, num_pages: int, max_num_seqs: int) -> None:
        self._model = model
        self._table = table
        self.memory = tuple(
            LayerMemory(
                pages=allocate(pages, num_pages, model.device),
                tails=allocate(tails, max_num_seqs, model.device),
            )
            for pages, tails in zip(model.page_fields, model.tail_fields, strict=True)
        )

    def run(self, plan: Plan) -> Tensor:
        """Compute the plan's rows; return logits `[L, V]`: of its samples, then of its scored rows."""
        return self._model.forward(self.rows(plan), self.memory)

    def rows(self, plan: Plan) -> Rows:
        """Lay the plan's rows out: decode rows first, gathered together; each chunk of a prompt as one slice."""
        token_ids, positions, slots = (np.empty(plan.num_rows, dtype=np.int32) for _ in range(3))
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
        scored = (range(span.first_row, span.first_row + span.num_rows) for span in plan.spans)
        placement = RowPlacement(self._tensor(positions), self._tensor(slots), self._table.tensor())
        return Rows(self._tensor(token_ids), placement, self._indices(chain(plan.sample_rows, *scored)))

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

    def _indices(self, values: Iterable[int]) -> Tensor:
        return self._tensor(np.fromiter(values, dtype=np.int32))

    def _tensor(self, array: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Tensor:
        return torch.from_numpy(array).to(self._model.device)
