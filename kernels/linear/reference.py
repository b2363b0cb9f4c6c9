"""Matrix products in plain PyTorch on dequantised weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import Backend
from kernels.linear.weight import LinearWeight
from kernels.rms_norm.norm import Norm
from kernels.rms_norm.reference import rms_norm
from kernels.weights import EncodedMatrix, dequantise


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DenseWeight(LinearWeight):
    """A matrix as float32 numbers."""

    matrix: Tensor
    """`[N, K]` float32."""

    def dequantised(self) -> Tensor:
        """Return the matrix itself."""
        return self.matrix


def pack(matrices: Sequence[EncodedMatrix], *, device: torch.device, bias: Tensor | None = None) -> LinearWeight:
    """See `kernels.linear.pack`."""
    matrix = torch.cat([dequantise(each) for each in matrices]).to(device)
    return DenseWeight(
        num_rows=matrix.shape[0],
        num_columns=matrix.shape[1],
        num_bytes=matrix.nbytes,
        backend=Backend.REFERENCE,
        bias=None if bias is None else bias.to(device),
        matrix=matrix,
    )


def pack_gated(gate: EncodedMatrix, up: EncodedMatrix, *, device: torch.device) -> LinearWeight:
    """See `kernels.linear.pack_gated`."""
    matrix = torch.cat([dequantise(gate), dequantise(up)]).to(device)
    return DenseWeight(
        num_rows=matrix.shape[0],
        num_columns=matrix.shape[1],
        num_bytes=matrix.nbytes,
        backend=Backend.REFERENCE,
        is_gated=True,
        matrix=matrix,
    )


def linear(
    x: Tensor,
    weight: LinearWeight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    select: Tensor | None = None,
) -> Tensor:
    """See `kernels.linear.linear`."""
    rows = x if select is None else x[select.long()]
    normed = rows if norm is None else rms_norm(rows, norm)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    result = functional.linear(normed, weight.dequantised().to(x.dtype), bias)
    return result if residual is None else result + residual


def gated_linear(x: Tensor, weight: LinearWeight, *, norm: Norm | None = None) -> Tensor:
    """See `kernels.linear.gated_linear`."""
    gate, up = linear(x, weight, norm=norm).chunk(2, dim=1)
    return functional.silu(gate) * up
