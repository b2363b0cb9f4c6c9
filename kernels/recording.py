"""Computing something once and doing it again without Python: what backends offer to whoever repeats a computation.

On CPUs it is a tape of C++ calls (`kernels.cpu.tape`). On GPUs there is none yet; a CUDA graph has the same face.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels.backend import Backend, backend_of
from kernels.cpu.tape import TapeRecorder


class Recording(Protocol):
    """A computation of one shape."""

    @property
    def is_current(self) -> bool:
        """Say whether computing it here and now would still do the same: the backend and its instruction set."""
        ...

    def replay(self) -> Tensor:
        """Compute again from what now lies in the memory that the inputs had; the result lies where the next one will.

        Raises:
            ShapeError: as the recorded ops do.
        """
        ...


class Recorder(Protocol):
    """Makes recordings that share memory: one thread at a time uses them."""

    @property
    def refusal(self) -> str | None:
        """Return why what was recorded last is not recordable."""
        ...

    @property
    def num_bytes(self) -> int:
        """Return the memory that all its recordings together compute in."""
        ...

    def record(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Recording | None]:
        """Compute something, and return the result with a recording of it, or None where it is not recordable."""
        ...


def new_recorder(device: torch.device) -> Recorder | None:
    """Return a recorder for computations on a device, or None where there is none yet."""
    return TapeRecorder() if device.type == "cpu" and backend_of(device) is Backend.CPU else None
