"""Rotary positions in plain PyTorch."""

import torch
from torch import Tensor

from kernels.placement import RowPlacement
from kernels.rope.table import RopeTable


def rotate_and_store(
    qkv: Tensor, rows: RowPlacement, table: RopeTable, key_pages: Tensor, value_pages: Tensor
) -> Tensor:
    """See `kernels.rope.rotate_and_store`."""
    _, num_groups, head_dim, page_size = key_pages.shape
    heads = qkv.view(rows.num_rows, -1, head_dim)
    num_query_heads = heads.shape[1] - 2 * num_groups
    query, key, value = torch.split(heads, [num_query_heads, num_groups, num_groups], dim=1)
    positions = rows.positions.long()
    pages = rows.page_table[rows.sequences.long(), positions // page_size].long()
    slots = positions % page_size
    key_pages[pages, :, :, slots] = rotate(key, table, positions).to(key_pages.dtype)
    value_pages[pages, :, slots, :] = value.to(value_pages.dtype)
    return rotate(query, table, positions)


def rotate(heads: Tensor, table: RopeTable, positions: Tensor) -> Tensor:
    """Rotate `[R, heads, D]` by the angles of `positions` `[R]`."""
    cos, sin = (each[positions].unsqueeze(1).to(heads.dtype) for each in (table.cos, table.sin))
    width = 2 * cos.shape[-1]
    turning, still = heads[..., :width], heads[..., width:]
    if table.is_interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([turned, still], dim=-1)
