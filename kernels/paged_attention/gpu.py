# mypy: disallow-untyped-decorators=False
# (Triton ships no types.)
"""Attention over pages in Triton, one kernel for prefill, decode and everything between, and one that joins splits.

A tile is a few neighbouring rows times the query heads that share a key/value head. Its program walks the keys of each
sequence that has rows in the tile, in order, with an online softmax; rows of other sequences, and keys behind a row's
position, weigh exactly 0 and leave a row's bits alone. A long past is split at multiples of `tiles.ATTENTION_SPLIT`
tokens from its start, and a row joins its own splits in order: neither batch nor page table width can change that.

Shapes: R rows, H query heads, G key/value heads, D head dim, P pool pages, B tokens a page, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.placement import RowPlacement


def paged_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, rows: RowPlacement, *, scale: float
) -> Tensor:
    """See `kernels.paged_attention.paged_attention`. Positions and page ids are not checked."""
    num_rows, num_heads, head_dim = query.shape
    page_size = key_pages.shape[3]
    num_splits = triton.cdiv(rows.page_table.shape[1] * page_size, tiles.ATTENTION_SPLIT)
    max_rows = max(1, tiles.ATTENTION_WORKSPACE_BYTES // (4 * num_heads * num_splits * (head_dim + 2)))
    result = query.new_empty(num_rows, num_heads * head_dim)
    for first in range(0, num_rows, max_rows):
        _attend(query, key_pages, value_pages, rows, scale, result, first, min(first + max_rows, num_rows), num_splits)
    return result


def _attend(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    rows: RowPlacement,
    scale: float,
    result: Tensor,
    first: int,
    end: int,
    num_splits: int,
) -> None:
    """Attend rows `first .. end - 1`. The table bounds the splits: to ask how many are used would wait for the GPU."""
    _, num_heads, head_dim = query.shape
    _, num_groups, _, page_size = key_pages.shape
    num_shares = num_heads // num_groups
    block_shares = triton.next_power_of_2(num_shares)
    block_rows = max(1, tiles.ATTENTION_QUERIES // block_shares)
    block_d = max(16, triton.next_power_of_2(head_dim))
    unjoined = (end - first, num_heads, num_splits)
    largest = torch.empty(unjoined, dtype=torch.float32, device=query.device)
    total = torch.empty(unjoined, dtype=torch.float32, device=query.device)
    value = torch.empty((*unjoined, head_dim), dtype=torch.float32, device=query.device)
    _attention_kernel[(triton.cdiv(end - first, block_rows), num_groups, num_splits)](
        query,
        key_pages,
        value_pages,
        rows.positions,
        rows.sequences,
        rows.page_table,
        largest,
        total,
        value,
        first,
        end,
        rows.page_table.shape[1],
        num_splits,
        scale,
        NUM_HEADS=num_heads,
        NUM_GROUPS=num_groups,
        NUM_SHARES=num_shares,
        BLOCK_SHARES=block_shares,
        BLOCK_ROWS=block_rows,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        PAGE_SIZE=page_size,
        BLOCK_T=tiles.ATTENTION_TOKENS,
        SPLIT=tiles.ATTENTION_SPLIT,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=tiles.MAY_FUSE,
    )
    _join_kernel[(end - first, num_heads)](
        rows.positions,
        largest,
        total,
        value,
        result,
        first,
        num_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        SPLIT=tiles.ATTENTION_SPLIT,
        num_warps=1,
        enable_fp_fusion=tiles.MAY_FUSE,
    )


@triton.jit(do_not_specialize=["first_row", "end_row"])
def _attention_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    position_ptr: tl.tensor,
    sequence_ptr: tl.tensor,
    table_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    first_row: tl.tensor,
    end_row: tl.tensor,
    table_width: tl.tensor,
    num_splits: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_SHARES: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """One tile of queries, one key/value head, one split of the past."""
    group = tl.program_id(1)
    split = tl.program_id(2)
    next_row = first_row + tl.program_id(0) * BLOCK_ROWS
    last_row = tl.minimum(next_row + BLOCK_ROWS, end_row)
    m = tl.arange(0, BLOCK_ROWS * BLOCK_SHARES)
    row = next_row + m // BLOCK_SHARES
    head = group * NUM_SHARES + m % BLOCK_SHARES
    is_row = row < end_row
    is_query = is_row & (m % BLOCK_SHARES < NUM_SHARES)
    d = tl.arange(0, BLOCK_D)
    is_dim = d < HEAD_DIM

    position = tl.load(position_ptr + row, mask=is_row, other=-1)
    sequence = tl.load(sequence_ptr + row, mask=is_row, other=-1)
    place = (row.to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    query = tl.load(query_ptr + place, mask=is_query[:, None] & is_dim[None, :], other=0.0)
    # Half-precision queries meet the pages in the pages' own type; float32 ones in float32.
    if query.dtype != tl.float32:
        query = query.to(key_ptr.dtype.element_ty)
    largest = tl.full([BLOCK_ROWS * BLOCK_SHARES], -1e30, tl.float32)  # finite: -inf minus itself is not a number
    total = tl.zeros([BLOCK_ROWS * BLOCK_SHARES], tl.float32)
    result = tl.zeros([BLOCK_ROWS * BLOCK_SHARES, BLOCK_D], tl.float32)

    while next_row < last_row:  # once for each sequence in the tile: its rows stand together
        current = tl.load(sequence_ptr + next_row)
        is_current = sequence == current
        next_row = tl.max(tl.where(is_current, row, 0), axis=0) + 1
        end = tl.minimum(tl.max(tl.where(is_current, position, -1), axis=0) + 1, (split + 1) * SPLIT)
        pages_ptr = table_ptr + current.to(tl.int64) * table_width
        for start in range(split * SPLIT, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            is_token = t < end
            page = tl.load(pages_ptr + t // PAGE_SIZE, mask=is_token, other=0).to(tl.int64) * NUM_GROUPS + group
            slot = t % PAGE_SIZE
            key_place = (page[None, :] * HEAD_DIM + d[:, None]) * PAGE_SIZE + slot[None, :]
            key = tl.load(key_ptr + key_place, mask=is_dim[:, None] & is_token[None, :], other=0.0).to(query.dtype)
            value_place = (page * PAGE_SIZE + slot)[:, None] * HEAD_DIM + d[None, :]
            value = tl.load(value_ptr + value_place, mask=is_token[:, None] & is_dim[None, :], other=0.0).to(
                query.dtype
            )

            score = tl.dot(query, key, input_precision="ieee") * scale
            is_seen = is_current[:, None] & (t[None, :] <= position[:, None])
            score = tl.where(is_seen, score, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(score, axis=1))
            weight = tl.exp(score - new_largest[:, None])
            shrink = tl.exp(largest - new_largest)
            largest = new_largest
            total = total * shrink + tl.sum(weight, axis=1)
            result = tl.dot(weight.to(query.dtype), value, result * shrink[:, None], input_precision="ieee")

    has_part = is_query & (position >= split * SPLIT)
    part = ((row - first_row).to(tl.int64) * NUM_HEADS + head) * num_splits + split
    tl.store(largest_ptr + part, largest, mask=has_part)
    tl.store(total_ptr + part, total, mask=has_part)
    tl.store(sum_ptr + part[:, None] * HEAD_DIM + d[None, :], result, mask=has_part[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["first_row"])
def _join_kernel(
    position_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    result_ptr: tl.tensor,
    first_row: tl.tensor,
    num_splits: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Join the splits of one head of one row, in order."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    is_dim = d < HEAD_DIM
    position = tl.load(position_ptr + first_row + row)
    first_part = (row * NUM_HEADS + head) * num_splits
    largest = -1e30
    total = 0.0
    result = tl.zeros([BLOCK_D], tl.float32)
    for split in range(position // SPLIT + 1):
        part = first_part + split
        part_largest = tl.load(largest_ptr + part)
        new_largest = tl.maximum(largest, part_largest)
        shrink = tl.exp(largest - new_largest)
        grow = tl.exp(part_largest - new_largest)
        largest = new_largest
        total = total * shrink + tl.load(total_ptr + part) * grow
        result = result * shrink + tl.load(sum_ptr + part * HEAD_DIM + d, mask=is_dim, other=0.0) * grow
    to = ((first_row + row) * NUM_HEADS + head) * HEAD_DIM + d
    tl.store(result_ptr + to, (result / total).to(result_ptr.dtype.element_ty), mask=is_dim)
