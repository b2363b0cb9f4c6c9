import pytest
import torch

from kernels.backend import Backend, use_backend
from kernels.checks import ShapeError
from kernels.cpu import library
from kernels.rms_norm import Norm, rms_norm
from tests.fixtures.kernels import NUM_ROWS, other_isas, random_rows

pytestmark = pytest.mark.usefixtures("needs_cpu_ops")


@pytest.mark.parametrize("num_columns", [1, 7, 16, 63, 576, 1000])
def test_norms_like_the_reference(num_columns: int) -> None:
    """Rows of any length are normed to float32 accuracy, each as if it were alone, on every instruction set."""
    norm = Norm(random_rows(1, num_columns, seed=5)[0], 1e-5)
    for num_rows in NUM_ROWS:
        x = random_rows(num_rows, num_columns)
        seen = rms_norm(x, norm)
        with use_backend(Backend.REFERENCE):
            torch.testing.assert_close(seen, rms_norm(x, norm), rtol=1e-6, atol=1e-6)

        assert torch.equal(seen, torch.cat([rms_norm(row[None], norm) for row in x]))
        for isa in other_isas():
            with library.use_isa(isa):
                assert torch.equal(seen, rms_norm(x, norm))


def test_refuses_a_norm_of_another_size() -> None:
    """The error names both sizes."""
    with pytest.raises(ShapeError, match="columns of x: got 8, want 7"):
        rms_norm(torch.zeros(1, 8), Norm(torch.ones(7), 1e-5))
