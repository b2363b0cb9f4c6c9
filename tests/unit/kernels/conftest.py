import pytest
import torch

from kernels.cpu import library


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold no number until one is written: what an op forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))


@pytest.fixture
def needs_cpu_ops(needs_compiler: None) -> None:  # noqa: ARG001 a fixture for its effect
    """Run only where the C++ ops can be built."""
    assert library.is_available()
