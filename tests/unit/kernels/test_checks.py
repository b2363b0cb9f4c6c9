"""What an op refuses before anything is computed."""

import pytest
import torch

from kernels.checks import ShapeError, require_floats


def test_takes_contiguous_float32_of_any_shape() -> None:
    """Rank and sizes are other checks' matter."""
    for shape in ((), (0,), (3,), (2, 3, 4)):
        require_floats("x", torch.zeros(shape))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), r"x\.dtype: got torch\.float16, want torch\.float32"),
        (torch.zeros(2, 3).t(), "x in memory: got gaps or another order, want contiguous"),
    ],
    ids=["half", "transposed"],
)
def test_names_what_is_no_plain_float_tensor(tensor: torch.Tensor, said: str) -> None:
    """C++ reads addresses, so another type or order is refused by name."""
    with pytest.raises(ShapeError, match=said):
        require_floats("x", tensor)
