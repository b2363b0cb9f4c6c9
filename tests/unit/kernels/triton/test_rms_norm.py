"""The Triton RMS norm against its reference."""

import pytest
import torch

from kernels.rms_norm import Norm, reference, rms_norm


@pytest.mark.parametrize("num_columns", [1, 63, 1000, 2050])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_rms_norm_matches_the_reference(
    device: torch.device, num_columns: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Rows narrower and wider than a block, in both precisions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, num_columns, generator=generator).to(device, dtype)
    norm = Norm(torch.randn(num_columns, generator=generator).to(device), 1e-5)

    seen = rms_norm(x, norm)

    assert seen.dtype == dtype
    torch.testing.assert_close(seen, reference.rms_norm(x, norm), rtol=tolerance, atol=tolerance)


def test_rms_norm_of_some_columns_of_a_wider_tensor(device: torch.device) -> None:
    """Rows may lie apart in memory."""
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).to(device)[:, :20]
    norm = Norm(torch.ones(20, device=device), 1e-5)

    torch.testing.assert_close(rms_norm(x, norm), reference.rms_norm(x, norm))
