"""Where the rows of a step stand: the sequence, the position in it, and the pages that hold its past.

Shapes: R rows, S sequence slots.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.checks import require, require_tensor

INT32 = (torch.int32,)


@dataclass(frozen=True, slots=True, eq=False)
class RowPlacement:
    """The places of a step's rows; checked once here, so that ops need not check it at every layer.

    Rows of one sequence stand together, in ascending position.
    """

    positions: Tensor
    """`[R]` int32: the position of each row's token in its sequence."""
    sequences: Tensor
    """`[R]` int32: the slot of each row's sequence, a row of the page table."""
    page_table: Tensor
    """`[S, pages]` int32: the pool pages of each slot's sequence, in order."""

    num_rows: int = field(init=False)
    """R."""

    def __post_init__(self) -> None:
        num_rows = self.positions.shape[0]
        object.__setattr__(self, "num_rows", num_rows)
        require_tensor("positions", self.positions, shape=(num_rows,), dtypes=INT32)
        require_tensor("sequences", self.sequences, shape=(num_rows,), dtypes=INT32)
        require_tensor("page_table", self.page_table, shape=(None, None), dtypes=INT32)
        devices = {self.positions.device, self.sequences.device, self.page_table.device}
        require(len(devices) == 1, "devices of the placement", len(devices), 1)
