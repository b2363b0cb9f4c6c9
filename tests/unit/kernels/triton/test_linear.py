"""The Triton matrix products and the embedding against their references."""

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, use_backend
from kernels.embed import embed
from kernels.embed import gpu as embed_gpu
from kernels.linear import LinearWeight, gated_linear, linear, pack, pack_gated
from kernels.rms_norm import Norm
from kernels.weights import BLOCK, BLOCK_BYTES, DTYPES, EncodedMatrix, Encoding

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
"""Relative to the largest output."""
ENCODINGS = [Encoding.F32, Encoding.F16, Encoding.Q4_0, Encoding.Q4_1, Encoding.Q8_0]


def matrix_of(encoding: Encoding, num_rows: int, num_columns: int, seed: int = 1) -> EncodedMatrix:
    """Make a random matrix as a file would hold it."""
    generator = torch.Generator().manual_seed(seed)
    if encoding in DTYPES:
        data = torch.randn(num_rows, num_columns, generator=generator) * 0.1
        return EncodedMatrix(encoding, num_rows, num_columns, data.to(DTYPES[encoding]))
    num_blocks, num_bytes = num_columns // BLOCK, BLOCK_BYTES[encoding]
    data = torch.randint(0, 256, (num_rows, num_blocks, num_bytes), dtype=torch.uint8, generator=generator)
    num_halves = 2 if encoding is Encoding.Q4_1 else 1
    halves = (torch.randn(num_rows, num_blocks, num_halves, generator=generator) * 0.02).half()
    data[..., : 2 * num_halves] = halves.view(torch.uint8)
    return EncodedMatrix(encoding, num_rows, num_columns, data.flatten(1))


def packed_twice(matrices: list[EncodedMatrix], device: torch.device, bias: Tensor | None = None) -> list[LinearWeight]:
    """Pack for Triton and for the reference."""
    mine = pack(matrices, device=device, bias=bias)
    with use_backend(Backend.REFERENCE):
        return [mine, pack(matrices, device=device, bias=bias)]


def random(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 2) -> Tensor:
    """Make a random tensor, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(seen: Tensor, expected: Tensor) -> None:
    """Compare within the tolerance of the dtype."""
    assert seen.dtype == expected.dtype
    largest = expected.abs().max().item()
    tolerance = TOLERANCE[seen.dtype] * largest
    torch.testing.assert_close(seen, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_linear_matches_the_reference(device: torch.device, encoding: Encoding, dtype: torch.dtype) -> None:
    """Odd sizes, with norm, bias, residual and selected rows, in every encoding."""
    num_rows, num_outputs, num_inputs = 5, 67, 96
    mine, theirs = packed_twice(
        [matrix_of(encoding, num_outputs, num_inputs)],
        device,
        random(num_outputs, device=device, dtype=torch.float32),
    )
    x = random(num_rows, num_inputs, device=device, dtype=dtype)
    norm = Norm(random(num_inputs, device=device, dtype=torch.float32, seed=3), 1e-5)
    select = torch.tensor([4, 0, 3], dtype=torch.int32, device=device)
    residual = random(3, num_outputs, device=device, dtype=dtype, seed=4)

    seen = linear(x, mine, norm=norm, residual=residual, select=select)

    with use_backend(Backend.REFERENCE):
        assert_near(seen, linear(x, theirs, norm=norm, residual=residual, select=select))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_packing_keeps_the_numbers(device: torch.device, encoding: Encoding) -> None:
    """The packed weight dequantises to what the file says."""
    mine, theirs = packed_twice([matrix_of(encoding, 7, 64)], device)

    torch.testing.assert_close(mine.dequantised(), theirs.dequantised(), rtol=0, atol=0)
    if encoding not in DTYPES:
        assert mine.num_bytes < 7 * 64 * 2


def test_linear_of_inputs_that_fill_no_tile(device: torch.device) -> None:
    """An unquantised weight may have any number of inputs."""
    mine, theirs = packed_twice([matrix_of(Encoding.F32, 33, 41)], device)
    x = random(2, 41, device=device, dtype=torch.float32)

    seen = linear(x, mine)

    with use_backend(Backend.REFERENCE):
        assert_near(seen, linear(x, theirs))


def test_stacked_matrices_may_differ_in_encoding(device: torch.device) -> None:
    """Queries, keys and values of three encodings give one result; neighbours of one encoding share a launch."""
    encodings = [Encoding.Q4_0, Encoding.Q4_1, Encoding.Q8_0, Encoding.F16]
    matrices = [matrix_of(encoding, 20, 64, seed) for seed, encoding in enumerate(encodings)]
    bias = random(80, device=device, dtype=torch.float32)
    mine, theirs = packed_twice(matrices, device, bias)
    x = random(3, 64, device=device, dtype=torch.float32)
    residual = random(3, 80, device=device, dtype=torch.float32, seed=5)

    seen = linear(x, mine, residual=residual)

    with use_backend(Backend.REFERENCE):
        assert_near(seen, linear(x, theirs, residual=residual))
    assert len(mine.parts) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("encodings", [(e, e) for e in ENCODINGS] + [(Encoding.Q4_1, Encoding.Q8_0)])
def test_gated_linear_matches_the_reference(device: torch.device, encodings: tuple[Encoding, Encoding]) -> None:
    """silu(gate) * up, with a norm, whether or not the two are written in one way."""
    gate, up = (matrix_of(encoding, 35, 64, seed) for seed, encoding in enumerate(encodings))
    mine = pack_gated(gate, up, device=device)
    x = random(4, 64, device=device, dtype=torch.float32)
    norm = Norm(random(64, device=device, dtype=torch.float32, seed=3), 1e-6)

    seen = gated_linear(x, mine, norm=norm)

    with use_backend(Backend.REFERENCE):
        assert_near(seen, gated_linear(x, pack_gated(gate, up, device=device), norm=norm))


@pytest.mark.parametrize("encoding", [Encoding.F16, Encoding.Q4_1, Encoding.Q8_0])
def test_a_row_does_not_depend_on_its_neighbours(device: torch.device, encoding: Encoding) -> None:
    """Alone, and at any place in a batch that spans tiles, a row gives the same bits."""
    weight = pack([matrix_of(encoding, 40, 64)], device=device)
    dtype = torch.float16 if encoding is Encoding.F16 else torch.float32
    x = random(70, 64, device=device, dtype=dtype)
    norm = Norm(random(64, device=device, dtype=torch.float32, seed=3), 1e-5)

    together = linear(x, weight, norm=norm)

    for row in (0, 31, 69):
        assert torch.equal(linear(x[row : row + 1].contiguous(), weight, norm=norm)[0], together[row])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_embed_reads_rows_of_the_packed_matrix(
    device: torch.device, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's row comes out as the file says it, rounded to the activations' dtype."""
    monkeypatch.setattr(embed_gpu, "QUANTISED_DTYPE", torch.float32)  # the interpreter has no bfloat16
    mine, theirs = packed_twice([matrix_of(encoding, 11, 96)], device)
    token_ids = torch.tensor([10, 0, 3, 3], dtype=torch.int32, device=device)

    seen = embed(token_ids, mine)

    with use_backend(Backend.REFERENCE):
        torch.testing.assert_close(seen.float(), embed(token_ids, theirs), rtol=0, atol=0)


def test_embed_of_an_unknown_token_reads_nothing(device: torch.device) -> None:
    """An id outside the matrix gives zeros, not another's memory."""
    weight = pack([matrix_of(Encoding.F32, 4, 32)], device=device)

    seen = embed(torch.tensor([4, -1], dtype=torch.int32, device=device), weight)

    assert seen.abs().max() == 0
