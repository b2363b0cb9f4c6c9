"""Attention with rotary positions and grouped key/value heads.

R rows, H query heads, G key/value heads, D head size, B tokens a page.
An open page has the form of a closed one from its first token on, so closing changes nothing.
"""

import torch
from torch import Tensor

from kernels.linear import LinearWeight, linear
from kernels.paged_attention import paged_attention
from kernels.rms_norm import Norm
from kernels.rope import RopeTable, rotate_and_store
from server.model.memory import Field, LayerMemory
from server.model.mixers import ClosingPages
from server.model.rows import Rows
from server.model.spec import AttentionSpec, RopeSpec


def tabulate(spec: RopeSpec, frequencies: Tensor, num_positions: int, device: torch.device) -> RopeTable:
    """Tabulate the rotations of every position, in float64 and rounded once, so that machines agree.

    Args:
        spec: How pairs of channels are made.
        frequencies: Radians a token for each pair, `[D / 2]` float64.
        num_positions: Longest sequence.
        device: Where the table goes. One table serves all layers.
    """
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
    return RopeTable(cos=cos, sin=sin, is_interleaved=spec.is_interleaved)


class RopeAttention:
    """`x + output(attention(rotate(qkv(norm(x)))))`."""

    kind = "rope"
    tail_fields: tuple[Field, ...] = ()
    derived_fields: tuple[Field, ...] = ()

    def __init__(
        self,
        spec: AttentionSpec,
        page_size_tokens: int,
        *,
        norm: Norm,
        qkv: LinearWeight,
        output: LinearWeight,
        table: RopeTable,
    ) -> None:
        self.norm = norm
        self.qkv = qkv
        self.output = output
        self.table = table
        self.scale = spec.head_size**-0.5
        # Keys stand transposed: a query meets B of them at once, channel by channel.
        self.page_fields: tuple[Field, ...] = (
            Field("keys", (spec.num_kv_heads, spec.head_size, page_size_tokens), torch.float16),
            Field("values", (spec.num_kv_heads, page_size_tokens, spec.head_size), torch.float16),
        )

    def forward(self, x: Tensor, rows: Rows, memory: LayerMemory) -> Tensor:
        """See `Mixer.forward`."""
        keys, values = memory.pages["keys"], memory.pages["values"]
        qkv = linear(x, self.qkv, norm=self.norm)  # [R, (H + 2 G) D]
        query = rotate_and_store(qkv, rows.placement, self.table, keys, values)  # [R, H, D]
        mixed = paged_attention(query, keys, values, rows.placement, scale=self.scale)  # [R, H D]
        return linear(mixed, self.output, residual=x)

    def close(self, memory: LayerMemory, pages: ClosingPages) -> None:
        """Do nothing: the open page is the closed page."""
