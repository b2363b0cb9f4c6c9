"""The one batch that a model knows: rows, whatever request, prompt or draft they come from.

R rows, L rows whose logits are wanted.
"""

from dataclasses import dataclass

from torch import Tensor

from kernels.placement import RowPlacement


@dataclass(frozen=True, slots=True)
class Rows:
    """A ragged batch of (sequence, position, token). Rows of one sequence stand together, positions ascending."""

    token_ids: Tensor
    """`[R]` int32."""
    placement: RowPlacement
    """Where each row stands: its position, its sequence's slot, and the pages of every slot."""
    logit_rows: Tensor
    """`[L]` int32, indices of rows; L may be 0."""
