"""What only a GPU can show: bfloat16, real sizes, and that a row's bits do not depend on the batch there."""

import math

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, use_backend
from kernels.linear import gated_linear, linear, pack, pack_gated
from kernels.paged_attention import paged_attention
from kernels.placement import RowPlacement
from kernels.rms_norm import Norm
from kernels.sample import SamplingRow, SamplingRows, sample
from kernels.weights import BLOCK, BLOCK_BYTES, DTYPES, EncodedMatrix, Encoding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]

CUDA = torch.device("cuda")
ENCODINGS = [Encoding.BF16, Encoding.Q4_0, Encoding.Q4_1, Encoding.Q8_0]
BATCH_SIZES = (1, 2, 15, 16, 17, 33, 64, 65, 300)
NUM_INPUTS = 1536


def matrix_of(encoding: Encoding, num_rows: int, num_columns: int) -> EncodedMatrix:
    """Make a random matrix as a file would hold it."""
    generator = torch.Generator().manual_seed(num_rows)
    if encoding in DTYPES:
        data = torch.randn(num_rows, num_columns, generator=generator) * 0.05
        return EncodedMatrix(encoding, num_rows, num_columns, data.to(DTYPES[encoding]))
    num_halves = 2 if encoding is Encoding.Q4_1 else 1
    shape = (num_rows, num_columns // BLOCK, BLOCK_BYTES[encoding])
    data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    halves = (torch.randn(*shape[:2], num_halves, generator=generator) * 0.01).half()
    data[..., : 2 * num_halves] = halves.view(torch.uint8)
    return EncodedMatrix(encoding, num_rows, num_columns, data.flatten(1))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    """Make a random tensor on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_linear_in_bfloat16_matches_float32(encoding: Encoding) -> None:
    """With norm, bias and residual, the result is float32's to bfloat16's precision."""
    matrix = matrix_of(encoding, 700, NUM_INPUTS)
    bias = random(700, dtype=torch.float32)
    weight = pack([matrix], device=CUDA, bias=bias)
    norm = Norm(random(NUM_INPUTS, dtype=torch.float32), 1e-5)
    x, residual = random(40, NUM_INPUTS), random(40, 700, seed=2)

    seen = linear(x, weight, norm=norm, residual=residual).float()

    with use_backend(Backend.REFERENCE):
        reference = pack([matrix], device=CUDA, bias=bias)
        expected = linear(x.float(), reference, norm=norm, residual=residual.float())
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_products_of_a_row_do_not_depend_on_the_batch(encoding: Encoding) -> None:
    """In batches of any size a row's outputs have the same bits, with and without a gate."""
    weight = pack([matrix_of(encoding, 200, NUM_INPUTS)], device=CUDA)
    half = matrix_of(encoding, 100, NUM_INPUTS)
    gated = pack_gated(half, half, device=CUDA)
    norm = Norm(random(NUM_INPUTS, dtype=torch.float32), 1e-5)
    x = random(max(BATCH_SIZES), NUM_INPUTS)
    together, together_gated = linear(x, weight, norm=norm), gated_linear(x, gated)

    for size in BATCH_SIZES:
        last = x[-size:].clone()
        assert torch.equal(linear(last, weight, norm=norm), together[-size:])
        assert torch.equal(gated_linear(last, gated), together_gated[-size:])


@pytest.mark.parametrize(("num_heads", "num_groups", "head_dim"), [(9, 3, 64), (32, 8, 128), (8, 8, 64)])
def test_attention_of_a_row_does_not_depend_on_the_batch(num_heads: int, num_groups: int, head_dim: int) -> None:
    """A prompt in one chunk gives the bits of its tokens one by one, across pages and splits."""
    num_tokens = 1100
    num_pages = math.ceil(num_tokens / 16)
    key_pages = random(num_pages, num_groups, head_dim, 16, dtype=torch.float16)
    value_pages = random(num_pages, num_groups, 16, head_dim, dtype=torch.float16, seed=2)
    query = random(num_tokens, num_heads, head_dim, seed=3)
    table = torch.randperm(num_pages, generator=torch.Generator().manual_seed(4)).int()[None].to(CUDA)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=CUDA)
    sequences = torch.zeros_like(positions)
    together = paged_attention(query, key_pages, value_pages, RowPlacement(positions, sequences, table), scale=0.1)

    for position in (0, 1, 15, 16, 63, 64, 511, 512, 513, 1023, 1024, num_tokens - 1):
        here = slice(position, position + 1)
        rows = RowPlacement(positions[here], sequences[here], table)
        alone = paged_attention(query[here].clone(), key_pages, value_pages, rows, scale=0.1)
        assert torch.equal(alone, together[here])

    with use_backend(Backend.REFERENCE):
        rows = RowPlacement(positions, sequences, table)
        expected = paged_attention(query.float(), key_pages, value_pages, rows, scale=0.1)
    torch.testing.assert_close(together.float(), expected, rtol=0, atol=0.02)


def test_sampling_of_a_row_does_not_depend_on_the_batch() -> None:
    """Alone and among others a row's token and log probability are the same."""
    logits = random(40, 49152, dtype=torch.float32) * 3
    parameters = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.01}]
    rows = [SamplingRow(seed=i, logprobs=3, **parameters[i % 4]) for i in range(40)]  # type: ignore[arg-type]
    together = sample(logits, SamplingRows.stack(rows).to(CUDA))

    for i in range(8):
        alone = sample(logits[i : i + 1].clone(), SamplingRows.stack(rows[i : i + 1]).to(CUDA))
        assert torch.equal(alone.token_ids[0], together.token_ids[i])
        assert torch.equal(alone.logprobs[0], together.logprobs[i])
