from hashlib import blake2b

import pytest
import torch

from kernels.cpu import library
from kernels.cpu.packed import PACKED_LAYOUT_VERSION, Fill, new_blocks, use_store
from kernels.linear import pack
from kernels.weights import BLOCK, BLOCK_BYTES, DTYPES, EncodedMatrix, Encoding
from tests.fixtures.kernels import CPU, other_isas

pytestmark = pytest.mark.usefixtures("needs_cpu_ops")

KNOWN_LAYOUTS = {1: "290a821e7452b7de"}
"""A digest of packed bytes for each version of the layout."""


class Recording:
    """A store that keeps what it is asked for."""

    def __init__(self) -> None:
        self.parts: dict[str, torch.Tensor] = {}

    def blocks(self, key: str, num_bytes: int, fill: Fill) -> torch.Tensor:
        if key not in self.parts:
            self.parts[key] = new_blocks(num_bytes, fill)
        return self.parts[key]


def counted(encoding: Encoding, num_rows: int = 20, num_columns: int = 96) -> EncodedMatrix:
    """Make a matrix whose bytes count up, so that each of them shows where it was put."""
    row_bytes = num_columns // BLOCK * BLOCK_BYTES[encoding] if encoding in BLOCK_BYTES else num_columns * 4
    data = (torch.arange(num_rows * row_bytes) % 251).to(torch.uint8).view(num_rows, -1)
    if encoding in DTYPES:
        data = data.view(DTYPES[encoding])[:, :num_columns].contiguous()
    return EncodedMatrix(encoding, num_rows, num_columns, data, f"counted {encoding}")


def packed_digest() -> str:
    """Digest the packed bytes of a matrix in every encoding."""
    store = Recording()
    with use_store(store):
        for encoding in Encoding:
            pack([counted(encoding)], device=CPU)
    return blake2b(b"".join(each.numpy().tobytes() for each in store.parts.values()), digest_size=8).hexdigest()


def test_the_layout_is_that_of_its_version() -> None:
    """A change of packed bytes raises PACKED_LAYOUT_VERSION, else stored weights would be read as the new layout."""
    assert KNOWN_LAYOUTS[PACKED_LAYOUT_VERSION] == packed_digest()


@pytest.mark.parametrize("isa", other_isas())
def test_instruction_sets_pack_alike(isa: library.Isa) -> None:
    """What one object packed, another may read."""
    wanted = packed_digest()
    with library.use_isa(isa):
        assert wanted == packed_digest()


def test_a_store_is_asked_by_name_encoding_and_shape() -> None:
    """A part that is there is used as it is; matrices of another name, encoding or shape are other parts."""
    store = Recording()
    with use_store(store):
        first, again = (pack([counted(Encoding.Q4_1)], device=CPU) for _ in range(2))
        pack([counted(Encoding.Q8_0)], device=CPU)
        pack([counted(Encoding.Q4_1, num_rows=7)], device=CPU)
    apart = pack([counted(Encoding.Q4_1)], device=CPU)

    assert list(store.parts) == ["counted q4_1:q4_1:20x96", "counted q8_0:q8_0:20x96", "counted q4_1:q4_1:7x96"]
    assert torch.equal(first.dequantised(), again.dequantised())
    assert torch.equal(first.dequantised(), apart.dequantised())


def test_a_matrix_without_a_name_is_not_stored() -> None:
    """Nobody could find it again."""
    store = Recording()
    named = counted(Encoding.F16)
    with use_store(store):
        pack([EncodedMatrix(named.encoding, named.num_rows, named.num_columns, named.data)], device=CPU)

    assert store.parts == {}
