"""Rotary positions, and the writing of keys and values to their pages.

Shapes: R rows, H query heads, G key/value heads, D head dim, P pool pages, B tokens a page.
"""

from torch import Tensor

from kernels.backend import dispatch, gpu_twin
from kernels.checks import require
from kernels.cpu import attention as cpu
from kernels.placement import RowPlacement
from kernels.rope import reference
from kernels.rope.table import RopeTable

__all__ = ["RopeTable", "rotate_and_store"]

_gpu_rotate_and_store = gpu_twin(reference.rotate_and_store)


def rotate_and_store(
    qkv: Tensor, rows: RowPlacement, table: RopeTable, key_pages: Tensor, value_pages: Tensor
) -> Tensor:
    """Rotate the queries and keys of rows; write the keys and the values to the rows' pages.

    Args:
        qkv: `[R, (H + 2 G) D]`: the query heads, then the keys, then the values.
        rows: where the rows stand.
        table: the angles of at least every position in `rows`.
        key_pages: `[P, G, D, B]` float16, written.
        value_pages: `[P, G, B, D]` float16, written.

    Returns:
        The rotated queries `[R, H, D]`, in the dtype of `qkv`.

    Raises:
        ShapeError: sizes do not fit; on a CPU also a position or a page id that lies outside its table or pool.

    Source: Su et al., RoFormer, 2021, equation 34.
    """
    pages, groups, head_dim, page_size = key_pages.shape
    values, wanted = value_pages.shape, (pages, groups, page_size, head_dim)
    num_rows, num_columns = qkv.shape
    heads = num_columns // head_dim - 2 * groups
    width = 2 * table.cos.size(1)
    require(values == wanted, "value_pages.shape", values, wanted)
    require(num_rows == rows.num_rows, "rows of qkv", num_rows, rows.num_rows)
    require(num_columns % head_dim == 0, "columns of qkv", num_columns, "multiple of", head_dim)
    require(heads > 0 and heads % groups == 0, "query heads", heads, "multiple of", groups)
    require(width <= head_dim, "rotated numbers of a head", width, "at most", head_dim)
    op = dispatch(qkv.device, cpu=cpu.rotate_and_store, gpu=_gpu_rotate_and_store, reference=reference.rotate_and_store)
    return op(qkv, rows, table, key_pages, value_pages)
