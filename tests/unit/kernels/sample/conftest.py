"""What the sampler's tests share."""

import pytest

from kernels.cpu import library


@pytest.fixture
def cpu_ops() -> None:
    """Run only where the C++ ops can be built."""
    if not library.is_available():
        pytest.skip("the C++ ops are not available here")
