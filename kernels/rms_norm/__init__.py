"""Root mean square norm of rows.

Shapes: R rows, K columns.
Law: a row's squares are summed in one fixed order.
"""

from torch import Tensor

from kernels.backend import dispatch, gpu_twin
from kernels.checks import require
from kernels.cpu import linear as cpu
from kernels.rms_norm import reference
from kernels.rms_norm.norm import Norm

__all__ = ["Norm", "rms_norm"]

_gpu_rms_norm = gpu_twin(reference.rms_norm)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """Norm each row of `x` `[R, K]`; the result has the shape and dtype of `x`.

    Raises:
        ShapeError: the norm has not K weights.

    Source: Zhang and Sennrich, 2019, equation 4.
    """
    require(x.dim() == 2, "x.dim()", x.dim(), 2)
    require(x.size(1) == norm.weight.size(0), "columns of x", x.size(1), norm.weight.size(0))
    return dispatch(x.device, cpu=cpu.rms_norm, gpu=_gpu_rms_norm, reference=reference.rms_norm)(x, norm)
