# mypy: disallow-untyped-decorators=False
# (Triton ships no types.)
"""Rotary positions and the writing of pages in Triton: one program takes one head of one row.

Shapes: R rows, H query heads, G key/value heads, D head dim, P pool pages, B tokens a page, W rotated pairs of a head.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.placement import RowPlacement
from kernels.rope.table import RopeTable


def rotate_and_store(
    qkv: Tensor, rows: RowPlacement, table: RopeTable, key_pages: Tensor, value_pages: Tensor
) -> Tensor:
    """See `kernels.rope.rotate_and_store`. Positions and page ids are not checked."""
    _, num_groups, head_dim, page_size = key_pages.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_groups
    query = qkv.new_empty(rows.num_rows, num_heads, head_dim)
    _rotate_and_store_kernel[(rows.num_rows, num_heads + 2 * num_groups)](
        qkv,
        rows.positions,
        rows.sequences,
        rows.page_table,
        table.cos,
        table.sin,
        key_pages,
        value_pages,
        query,
        qkv.stride(0),
        rows.page_table.shape[1],
        NUM_HEADS=num_heads,
        NUM_GROUPS=num_groups,
        HEAD_DIM=head_dim,
        NUM_PAIRS=table.cos.shape[1],
        IS_INTERLEAVED=table.is_interleaved,
        PAGE_SIZE=page_size,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=1,
        enable_fp_fusion=tiles.MAY_FUSE,
    )
    return query


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr: tl.tensor,
    position_ptr: tl.tensor,
    sequence_ptr: tl.tensor,
    table_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    query_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    table_width: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    is_dim = d < HEAD_DIM
    source = qkv_ptr + row * qkv_stride + head * HEAD_DIM
    x = tl.load(source + d, mask=is_dim, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + row)
    sequence = tl.load(sequence_ptr + row).to(tl.int64)
    page = tl.load(table_ptr + sequence * table_width + position // PAGE_SIZE).to(tl.int64)
    slot = position % PAGE_SIZE

    if head < NUM_HEADS + NUM_GROUPS:
        if IS_INTERLEAVED:
            pair = d // 2
            partner = d ^ 1
            is_first = d % 2 == 0
        else:
            pair = d % NUM_PAIRS
            is_first = d < NUM_PAIRS
            partner = tl.where(is_first, d + NUM_PAIRS, d - NUM_PAIRS)
        is_turning = d < 2 * NUM_PAIRS
        angle = position.to(tl.int64) * NUM_PAIRS + pair
        cos = tl.load(cos_ptr + angle, mask=is_turning, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=is_turning, other=0.0)
        other = tl.load(source + partner, mask=is_turning, other=0.0).to(tl.float32)
        turned = x * cos + tl.where(is_first, -other, other) * sin
        if head < NUM_HEADS:
            to = (row * NUM_HEADS + head) * HEAD_DIM + d
            tl.store(query_ptr + to, turned.to(query_ptr.dtype.element_ty), mask=is_dim)
        else:
            to = ((page * NUM_GROUPS + head - NUM_HEADS) * HEAD_DIM + d) * PAGE_SIZE + slot
            tl.store(key_ptr + to, turned.to(key_ptr.dtype.element_ty), mask=is_dim)
    else:
        to = ((page * NUM_GROUPS + head - NUM_HEADS - NUM_GROUPS) * PAGE_SIZE + slot) * HEAD_DIM + d
        tl.store(value_ptr + to, x.to(value_ptr.dtype.element_ty), mask=is_dim)
