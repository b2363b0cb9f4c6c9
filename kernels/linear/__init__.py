"""Matrix products with a model's weights: `y = W x`, with the neighbours that cost a pass over memory fused in.

Shapes: R rows, L selected rows, K inputs, N outputs.
Law: each output of a row is one sum over K in a fixed order, whatever R is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import Backend, backend_of, dispatch, gpu_twin
from kernels.checks import require, require_tensor
from kernels.cpu import linear as cpu
from kernels.linear import reference
from kernels.linear.weight import LinearWeight
from kernels.rms_norm.norm import Norm
from kernels.weights import EncodedMatrix

__all__ = ["LinearWeight", "gated_linear", "linear", "pack", "pack_gated"]

_gpu_pack = gpu_twin(reference.pack)
_gpu_pack_gated = gpu_twin(reference.pack_gated)
_gpu_linear = gpu_twin(reference.linear)
_gpu_gated_linear = gpu_twin(reference.gated_linear)


def pack(matrices: Sequence[EncodedMatrix], *, device: torch.device, bias: Tensor | None = None) -> LinearWeight:
    """Pack matrices, stacked along their outputs, for the backend of a device. They may differ in encoding.

    Args:
        matrices: each `[N_i, K]`; N is the sum of their rows.
        device: where the weight will live.
        bias: `[N]` float32.

    Raises:
        ShapeError: no matrix, columns that differ, or data that does not fit its encoding.
    """
    require(len(matrices) > 0, "number of matrices", len(matrices), "at least", 1)
    columns = {each.num_columns for each in matrices}
    require(len(columns) == 1, "columns of the stacked matrices", sorted(columns), "one size")
    if bias is not None:
        require_tensor("bias", bias, shape=(sum(each.num_rows for each in matrices),), dtypes=(torch.float32,))
    op = dispatch(device, cpu=cpu.pack, gpu=_gpu_pack, reference=reference.pack)
    return op(matrices, device=device, bias=bias)


def pack_gated(gate: EncodedMatrix, up: EncodedMatrix, *, device: torch.device) -> LinearWeight:
    """Pack the two matrices of a gated layer, each `[N / 2, K]`, for `gated_linear`.

    Raises:
        ShapeError: the two differ in shape, or data does not fit its encoding.
    """
    shapes = [(each.num_rows, each.num_columns) for each in (gate, up)]
    require(shapes[0] == shapes[1], "shape of gate", shapes[0], "that of up,", shapes[1])
    op = dispatch(device, cpu=cpu.pack_gated, gpu=_gpu_pack_gated, reference=reference.pack_gated)
    return op(gate, up, device=device)


def linear(
    x: Tensor,
    weight: LinearWeight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    select: Tensor | None = None,
) -> Tensor:
    """Multiply rows by a weight: `W norm(x) + bias + residual`, `[R, N]`, or `[L, N]` with `select`.

    Args:
        x: `[R, K]`.
        weight: `[N, K]`, packed for the backend of `x`.
        norm: RMS norm of each row before the product.
        residual: `[R, N]` (`[L, N]` with `select`), added last.
        select: `[L]` int32: take only these rows of `x`.

    Raises:
        ShapeError: sizes do not fit, or the weight is gated or was packed for another backend.
    """
    num_rows = _check(x, weight, norm)
    require(not weight.is_gated, "kind of weight", "gated", "plain")
    if select is not None:
        num_rows = select.size(0)
        require(select.dtype is torch.int32, "select.dtype", select.dtype, torch.int32)
    if residual is not None:
        shape = residual.shape
        require(shape == (num_rows, weight.num_rows), "residual.shape", tuple(shape), (num_rows, weight.num_rows))
    op = dispatch(x.device, cpu=cpu.linear, gpu=_gpu_linear, reference=reference.linear)
    return op(x, weight, norm=norm, residual=residual, select=select)


def gated_linear(x: Tensor, weight: LinearWeight, *, norm: Norm | None = None) -> Tensor:
    """Multiply rows by a gated weight: `silu(gate norm(x)) * (up norm(x))`, `[R, N / 2]`.

    Raises:
        ShapeError: sizes do not fit, or the weight is not gated or was packed for another backend.

    Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 6.
    """
    _check(x, weight, norm)
    require(weight.is_gated, "kind of weight", "plain", "gated")
    op = dispatch(x.device, cpu=cpu.gated_linear, gpu=_gpu_gated_linear, reference=reference.gated_linear)
    return op(x, weight, norm=norm)


def _check(x: Tensor, weight: LinearWeight, norm: Norm | None) -> int:
    """Check what both products ask of their arguments; return R."""
    require(x.dim() == 2, "x.dim()", x.dim(), 2)
    num_rows, num_columns = x.shape
    wanted = weight.num_columns
    require(num_columns == wanted, "columns of x", num_columns, wanted)
    require(norm is None or norm.num_columns == wanted, "columns of the norm", norm and norm.num_columns, wanted)
    backend = backend_of(x.device)
    fits = backend is weight.backend or backend is Backend.REFERENCE
    require(fits, "backend of the weight", weight.backend, backend)
    return num_rows
