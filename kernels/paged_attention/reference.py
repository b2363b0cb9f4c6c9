"""Attention over pages in plain PyTorch, one row at a time."""

import torch
from torch import Tensor

from kernels.placement import RowPlacement


def paged_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, rows: RowPlacement, *, scale: float
) -> Tensor:
    """See `kernels.paged_attention.paged_attention`."""
    _, num_groups, head_dim, page_size = key_pages.shape
    grouped = query.view(rows.num_rows, num_groups, -1, head_dim).to(torch.float32)
    result = torch.empty_like(grouped)
    places = zip(rows.positions.tolist(), rows.sequences.tolist(), strict=True)
    for row, (position, sequence) in enumerate(places):
        pages = rows.page_table[sequence, : position // page_size + 1].long()
        keys = key_pages[pages].permute(1, 2, 0, 3).flatten(2)[:, :, : position + 1].to(torch.float32)
        values = value_pages[pages].permute(1, 0, 2, 3).flatten(1, 2)[:, : position + 1].to(torch.float32)
        scores = torch.softmax(grouped[row] @ keys * scale, dim=-1)
        result[row] = scores @ values
    return result.view(rows.num_rows, -1).to(query.dtype)
