"""Faces of the C++ ops on pages of keys and values.

Shapes: R rows, H query heads, G key/value heads, D head dim, P pool pages, B tokens a page.
"""

import ctypes
import struct
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from kernels.checks import refuse, require_floats
from kernels.cpu import tape
from kernels.placement import RowPlacement
from kernels.rope.table import RopeTable

MAX_HEAD_DIM = 256
HEAD_DIM_UNIT = 8
PAGE_SIZE_UNIT = 16


PAGES = "PPqqqq"
pack_placement = struct.Struct("PPPqqq").pack
"""Packs `Placement` of `src/placement.h`."""
pack_rotate_and_store = struct.Struct(f"P{PAGES}qPPPqqqP").pack
"""Packs `RotateAndStoreCall` of `src/rope.cpp`."""
pack_paged_attention = struct.Struct(f"P{PAGES}qPdP").pack
"""Packs `PagedAttentionCall` of `src/attention.cpp`."""


class _Described(NamedTuple):
    """A placement and its description to C++."""

    rows: RowPlacement | None
    packed: ctypes.Array[ctypes.c_char]
    address: int
    """Of the description; good while this object lives."""


def rotate_and_store(
    qkv: Tensor, rows: RowPlacement, table: RopeTable, key_pages: Tensor, value_pages: Tensor
) -> Tensor:
    """See `kernels.rope.rotate_and_store`."""
    num_pages, num_groups, head_dim, page_size = key_pages.shape
    _check_pages(key_pages, value_pages, head_dim, page_size)
    require_floats("qkv", qkv)
    num_rows, num_columns = qkv.shape
    num_heads = num_columns // head_dim - 2 * num_groups
    num_positions, width = table.cos.shape
    query = tape.empty((num_rows, num_heads, head_dim))
    described = _describe(rows)
    call = pack_rotate_and_store(
        described.address,
        key_pages.data_ptr(),
        value_pages.data_ptr(),
        num_pages,
        num_groups,
        head_dim,
        page_size,
        num_heads,
        qkv.data_ptr(),
        table.cos.data_ptr(),
        table.sin.data_ptr(),
        num_positions,
        width,
        table.is_interleaved,
        query.data_ptr(),
    )

    def complain(bad: int) -> NoReturn:
        place = (bad, int(rows.positions[bad]), int(rows.sequences[bad]))
        limits = f"position below {num_positions} and the page table's end, a page of the pool below {num_pages}"
        refuse("(row, position, sequence)", place, limits)

    tape.invoke("pathfox_rotate_and_store", call, complain, keep=described)
    return query


def paged_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, rows: RowPlacement, *, scale: float
) -> Tensor:
    """See `kernels.paged_attention.paged_attention`."""
    num_pages, num_groups, head_dim, page_size = key_pages.shape
    _check_pages(key_pages, value_pages, head_dim, page_size)
    require_floats("query", query)
    num_rows, num_heads, _ = query.shape
    out = tape.empty((num_rows, num_heads * head_dim))
    described = _describe(rows)
    call = pack_paged_attention(
        described.address,
        key_pages.data_ptr(),
        value_pages.data_ptr(),
        num_pages,
        num_groups,
        head_dim,
        page_size,
        num_heads,
        query.data_ptr(),
        scale,
        out.data_ptr(),
    )
    tape.invoke("pathfox_paged_attention", call, keep=described)
    return out


_described = _Described(None, ctypes.create_string_buffer(0), 0)
"""The placement that was described last: a step uses one for all its layers."""


def _describe(rows: RowPlacement) -> _Described:
    """Describe a placement. The caller keeps the result while C++ uses the address."""
    global _described  # noqa: PLW0603 a cache of one; replaced as a whole, so threads need no lock
    described = _described
    if described.rows is rows:
        return described
    packed = ctypes.create_string_buffer(
        pack_placement(
            rows.positions.data_ptr(),
            rows.sequences.data_ptr(),
            rows.page_table.data_ptr(),
            rows.num_rows,
            *rows.page_table.shape,
        )
    )
    _described = described = _Described(rows, packed, ctypes.addressof(packed))
    return described


def _check_pages(key_pages: Tensor, value_pages: Tensor, head_dim: int, page_size: int) -> None:
    """Check that there is a kernel for these pages."""
    if head_dim % HEAD_DIM_UNIT or head_dim > MAX_HEAD_DIM:
        refuse("head dim on a CPU", head_dim, "multiple of", f"{HEAD_DIM_UNIT}, at most {MAX_HEAD_DIM}")
    if page_size % PAGE_SIZE_UNIT:
        refuse("page size on a CPU", page_size, "multiple of", PAGE_SIZE_UNIT)
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.dtype is not torch.float16 or not pages.is_contiguous():
            refuse(name, f"{pages.dtype}, contiguous: {pages.is_contiguous()}", "contiguous float16")
