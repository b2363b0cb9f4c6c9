"""Triton cases run on a GPU, or in Triton's interpreter: `TRITON_INTERPRET=1`, set before Triton is imported.

An ordinary run leaves them out where there is no GPU; `test_interpreted.py`, one folder up, then runs them in a process
of its own, so that no other test meets an interpreted Triton. The interpreter is silently wrong in bfloat16, knows no
races and no limits of registers or shared memory, and runs one program at a time: shapes are small and odd.
"""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, use_backend

Handle = Any
"""The interpreter's tensor; Triton ships no types."""
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")

collect_ignore_glob = [] if IS_INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    """Where the tensors of a case live."""
    return DEVICE


@pytest.fixture(autouse=True)
def _gpu_backend() -> Iterator[None]:
    """Send every op of a case to its Triton kernel, the interpreter's tensors being on the CPU."""
    with use_backend(Backend.GPU):
        yield


@pytest.fixture(autouse=True)
def _poisoned_results(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:  # noqa: ARG001 for its effect
    """Fill with NaN also the results that are made like another tensor."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *shape: int, **options: object) -> Tensor:
        result = new_empty(self, *shape, **options)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def _dot_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's dot sum in one order: numpy's depends on where in the tile a row stands."""
    if not IS_INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")  # only here: Triton is optional

    def create_dot(_builder: object, a: Handle, b: Handle, d: Handle, *_: object) -> Handle:
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(total.dtype) * b.data[None, k].astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
