from pathlib import Path

import pytest
import torch

from server.model.memory import Field, allocate

CPU = torch.device("cpu")
MIB = 1 << 20


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) << 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_entries_begin_as_zeros_and_can_be_written(dtype: torch.dtype) -> None:
    """A field's tensor has one zeroed entry per page, contiguous, of its dtype."""
    (made,) = allocate([Field("keys", (2, 3), dtype)], 5, CPU).values()

    assert (made.shape, made.dtype, made.is_contiguous()) == ((5, 2, 3), dtype, True)
    assert not made.any()
    made[4] = 1
    assert made.sum() == 6


def test_a_pool_takes_memory_as_it_fills() -> None:
    """Pages that no sequence has used cost an address, no memory and no time."""
    before = resident_bytes()
    made = Field("keys", (MIB,), torch.float16).allocate(128, CPU)
    empty = resident_bytes()
    made[:64] = 1
    half = resident_bytes()

    assert empty - before < 8 * MIB
    assert 120 * MIB < half - empty < 160 * MIB


def test_no_entries_are_no_memory() -> None:
    """A layer without slots has an empty tensor."""
    assert Field("keys", (2, 3), torch.float16).allocate(0, CPU).shape == (0, 2, 3)
