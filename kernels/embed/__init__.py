"""Token embedding: rows of a packed weight, so that a model with tied embeddings keeps one matrix.

Shapes: R rows, V tokens (rows of the weight), K columns.
"""

import torch
from torch import Tensor

from kernels.backend import dispatch, gpu_twin
from kernels.checks import require
from kernels.cpu import linear as cpu
from kernels.embed import reference
from kernels.linear.weight import LinearWeight

__all__ = ["embed"]

_gpu_embed = gpu_twin(reference.embed)


def embed(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """Read one row of the weight `[V, K]` per token id `[R]` int32: `[R, K]`, float32 on a CPU.

    Raises:
        ShapeError: `token_ids` is not `[R]` int32; on a CPU also a token id outside the weight.
    """
    require(token_ids.dim() == 1, "token_ids.dim()", token_ids.dim(), 1)
    require(token_ids.dtype is torch.int32, "token_ids.dtype", token_ids.dtype, torch.int32)
    op = dispatch(token_ids.device, cpu=cpu.embed, gpu=_gpu_embed, reference=reference.embed)
    return op(token_ids, weight)
