"""Attention of rows over the paged keys and values of their sequences.

Shapes: R rows, H query heads, G key/value heads, D head dim, P pool pages, B tokens a page.
Law: the result of a row depends on that row's query and pages only. Keys and values are reduced in spans of a fixed
number of tokens, counted from the start of the sequence, and spans are joined in order.
"""

from torch import Tensor

from kernels.backend import dispatch, gpu_twin
from kernels.checks import require
from kernels.cpu import attention as cpu
from kernels.paged_attention import reference
from kernels.placement import RowPlacement

__all__ = ["RowPlacement", "paged_attention"]

_gpu_paged_attention = gpu_twin(reference.paged_attention)


def paged_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, rows: RowPlacement, *, scale: float
) -> Tensor:
    """Attend each row to tokens `0 .. position` of its sequence, which must already be in the pages.

    Args:
        query: `[R, H, D]`.
        key_pages: `[P, G, D, B]` float16.
        value_pages: `[P, G, B, D]` float16.
        rows: where the rows stand.
        scale: factor of the scores, before the softmax.

    Returns:
        `[R, H D]` in the dtype of `query`.

    Raises:
        ShapeError: sizes do not fit, or heads are not a multiple of key/value heads.

    Source: Dao et al., FlashDecoding, 2023, with spans of a fixed number of tokens, so that the batch never changes
        the order.
    """
    pages, groups, head_dim, page_size = key_pages.shape
    values, wanted = value_pages.shape, (pages, groups, page_size, head_dim)
    num_rows, num_heads, query_dim = query.shape
    require(values == wanted, "value_pages.shape", values, wanted)
    require(num_rows == rows.num_rows, "rows of query", num_rows, rows.num_rows)
    require(query_dim == head_dim, "head dim of query", query_dim, head_dim)
    require(num_heads % groups == 0, "query heads", num_heads, "multiple of", groups)
    op = dispatch(query.device, cpu=cpu.paged_attention, gpu=_gpu_paged_attention, reference=reference.paged_attention)
    return op(query, key_pages, value_pages, rows, scale=scale)
