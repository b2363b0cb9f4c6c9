"""What a layer keeps of the past: fields of closed pages, of a sequence's open page, and what is rebuilt from them.

A mixer names its fields; the engine owns the tensors (`PagePool`) and hands them to every step. Nothing here knows what
the numbers mean.
"""

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor that a layer keeps per page, or per sequence."""

    name: str
    shape: tuple[int, ...]
    """Of one page, or of one sequence."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one page's, or one sequence's, entry."""
        return prod(self.shape) * self.dtype.itemsize

    def allocate(self, count: int, device: torch.device) -> Tensor:
        """Make a zeroed tensor `[count, *shape]`. On a CPU its memory is taken when it is first written to."""
        shape, num_bytes = (count, *self.shape), count * self.num_bytes
        if device.type != "cpu" or not num_bytes:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        # `torch.zeros` writes its zeros: half a second and all of the memory for a pool of 1 GiB that may stay empty.
        untouched = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(untouched, dtype=self.dtype).view(shape)


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """The tensors of one layer, by field name. Owned by the engine; written by the layer's mixer alone."""

    pages: Mapping[str, Tensor]
    """`[num_pages, *shape]`."""
    tails: Mapping[str, Tensor] = field(default_factory=dict)
    """`[max_num_seqs, *shape]`: the open page, where a mixer keeps it outside the pool."""
    derived: Mapping[str, Tensor] = field(default_factory=dict)
    """Rebuilt from a sequence's page list alone; never stored."""


def allocate(fields: Iterable[Field], count: int, device: torch.device) -> dict[str, Tensor]:
    """Make zeroed tensors `[count, *shape]` for the fields of one layer."""
    return {each.name: each.allocate(count, device) for each in fields}
