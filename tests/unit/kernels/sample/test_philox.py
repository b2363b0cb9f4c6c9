"""The generator against the vectors that its authors publish with Random123 (kat_vectors, philox4x32, 10 rounds)."""

import ctypes

import pytest
import torch

from kernels.cpu import library
from kernels.sample import philox

KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

Words = tuple[int, ...]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_reference_gives_the_published_answers(counter: Words, key: Words, answer: Words) -> None:
    """The tensor form of Philox encrypts as published."""
    words = philox.philox4x32(
        tuple(torch.tensor([word]) for word in counter),  # type: ignore[arg-type]
        (torch.tensor([key[0]]), torch.tensor([key[1]])),
    )

    assert tuple(int(word) for word in words) == answer


@pytest.mark.usefixtures("needs_cpu_ops")
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_cpu_gives_the_published_answers(counter: Words, key: Words, answer: Words) -> None:
    """The C++ form of Philox encrypts as published."""
    words = (ctypes.c_uint32 * 4)(*counter)
    library.load().pathfox_philox4x32(words, (ctypes.c_uint32 * 2)(*key))

    assert tuple(words) == answer


def test_scale_is_exact() -> None:
    """Scaling by a random number equals arithmetic on whole numbers of any size."""
    generator = torch.Generator().manual_seed(1)
    total = torch.randint(1, 1 << 60, (1000,), generator=generator)
    high, low = (torch.randint(0, 1 << 31, (1000,), generator=generator) for _ in range(2))
    high[:2], low[:2], total[0] = (1 << 31) - 1, (1 << 31) - 1, (1 << 60) - 1

    exact = [t * ((h << 31) + r) >> 62 for t, h, r in zip(total.tolist(), high.tolist(), low.tolist(), strict=True)]

    assert exact == philox.scale(total, high, low).tolist()
