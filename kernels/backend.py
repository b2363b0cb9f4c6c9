"""Which implementation of an op runs: chosen by where the tensors live, unless the caller asks for another.

Every op has three, with one signature: C++ (`kernels.cpu`), Triton (`gpu.py`) and plain PyTorch (`reference.py`).
"""

import contextlib
import enum
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec, TypeVar, cast

import torch

from kernels import cpu, tiles
from kernels.cpu import library


class Backend(enum.StrEnum):
    """An implementation that every op has."""

    CPU = "cpu"
    """C++ ops of `kernels.cpu`; row-invariant."""
    GPU = "gpu"
    """Triton kernels; row-invariant."""
    REFERENCE = "reference"
    """Plain PyTorch, on any device; not row-invariant."""


P = ParamSpec("P")
T = TypeVar("T")
Op = TypeVar("Op", bound=Callable[..., object])

_asked: ContextVar[Backend | None] = ContextVar("backend", default=None)


def backend_of(device: torch.device) -> Backend:
    """Return the backend that ops use for tensors on this device in this context."""
    asked = _asked.get()
    if asked is not None:
        return asked
    if device.type == "cuda":
        return Backend.GPU
    return Backend.CPU if library.is_available() else Backend.REFERENCE


def numerics_version(backend: Backend) -> int:
    """Return the version of a backend's arithmetic, part of every fingerprint."""
    return tiles.NUMERICS_VERSION if backend is Backend.GPU else cpu.NUMERICS_VERSION


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Make every op called in this context (thread or task) run on one backend."""
    token = _asked.set(backend)
    try:
        yield
    finally:
        _asked.reset(token)


def dispatch(device: torch.device, *, cpu: Op, gpu: Op, reference: Op) -> Op:
    """Pick the implementation of an op for tensors on this device."""
    backend = backend_of(device)
    if backend is Backend.CPU:
        return cpu
    return gpu if backend is Backend.GPU else reference


def gpu_twin(reference: Callable[P, T]) -> Callable[P, T]:
    """Return the op of the same name in the `gpu` module beside a reference.

    It is imported at the first call: Triton is an optional dependency.
    """
    module_name = reference.__module__.rpartition(".")[0] + ".gpu"

    @functools.wraps(reference)
    def op(*args: P.args, **kwargs: P.kwargs) -> T:
        twin = cast("Callable[P, T]", getattr(importlib.import_module(module_name), reference.__name__))
        return twin(*args, **kwargs)

    return op
