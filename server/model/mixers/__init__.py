"""Sequence mixers: the one abstraction over kinds of attention. Engine, page store and link know none of them."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from server.model.memory import Field, LayerMemory
from server.model.rows import Rows


@dataclass(frozen=True, slots=True)
class ClosingPages:
    """Pages whose last token has been accepted. C of them."""

    slots: Tensor
    """`[C]` int32: whose open page it was."""
    page_ids: Tensor
    """`[C]` int32: where in the pool the closed page goes."""


class Mixer(Protocol):
    """Mixes a row with the earlier tokens of its sequence."""

    kind: str
    """Name in the public contract, for example `rope`."""
    page_fields: tuple[Field, ...]
    """What a closed page holds for this layer. Self-contained: everything that a later row needs of it."""
    tail_fields: tuple[Field, ...]
    """What the open page keeps per sequence, where that differs from a closed page."""
    derived_fields: tuple[Field, ...]
    """Rebuilt from the page list alone when it changes; never stored."""

    def forward(self, x: Tensor, rows: Rows, memory: LayerMemory) -> Tensor:
        """Write the rows' entries into the open pages, then attend.

        Args:
            x: The residual stream, `[R, hidden]` float32. Not changed.
            rows: Which tokens these are.
            memory: This layer's tensors; a row's earlier tokens are in them already or among the rows before.

        Returns:
            The residual stream with this layer's share added: normalisation and addition are fused with the products.
        """
        ...

    def close(self, memory: LayerMemory, pages: ClosingPages) -> None:
        """Turn open pages into closed ones, in the one canonical form."""
        ...
