"""Where packed weights stand: in this process's memory, unless a store is in use that keeps them or wants to.

A store lets a second start map the bytes that the first one packed. Who packs does not know which of both it got.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

PACKED_LAYOUT_VERSION = 1
"""Of `src/weight.h`. Raise it with any change of where a packed number stands: stored weights are then packed anew."""

Fill = Callable[[Tensor], None]
"""Writes every byte of a packed part, given as `[num_bytes]` uint8."""


class PackedStore(Protocol):
    """Keeps packed parts beyond the life of a process."""

    def blocks(self, key: str, num_bytes: int, fill: Fill) -> Tensor:
        """Return the part of this name, `[num_bytes]` uint8, not to be written to: a kept one, or a new, filled one."""
        ...


_used: ContextVar[PackedStore | None] = ContextVar("packed_store", default=None)


@contextlib.contextmanager
def use_store(store: PackedStore | None) -> Iterator[None]:
    """Make all packing of this context (thread or task) go through a store; None = through none."""
    token = _used.set(store)
    try:
        yield
    finally:
        _used.reset(token)


def blocks(key: str, num_bytes: int, fill: Fill) -> Tensor:
    """Return a packed part from the store in use, or fill a new one. A part without a key is always new."""
    store = _used.get()
    return new_blocks(num_bytes, fill) if store is None or not key else store.blocks(key, num_bytes, fill)


def new_blocks(num_bytes: int, fill: Fill) -> Tensor:
    """Make and fill a part in memory."""
    made = torch.empty(num_bytes, dtype=torch.uint8)
    fill(made)
    return made
