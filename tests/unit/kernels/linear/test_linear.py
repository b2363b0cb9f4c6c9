from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from kernels.backend import Backend, use_backend
from kernels.checks import ShapeError
from kernels.cpu import library
from kernels.linear import LinearWeight, gated_linear, linear, pack, pack_gated
from kernels.rms_norm import Norm, rms_norm
from kernels.weights import DTYPES, EncodedMatrix, Encoding, dequantise
from tests.fixtures.kernels import CPU, NUM_ROWS, other_isas, random_matrix, random_rows, relative_error

pytestmark = pytest.mark.usefixtures("needs_cpu_ops")

SHAPES = [(16, 32), (37, 96), (1, 32), (100, 576)]
FLOAT_SHAPES = [*SHAPES, (23, 7), (5, 1)]
CASES = [(encoding, shape) for encoding in Encoding for shape in (FLOAT_SHAPES if encoding in DTYPES else SHAPES)]
MIXED = (Encoding.Q4_1, Encoding.Q8_0, Encoding.F16)


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Round activations as the C++ op does: 8 bits with one scale per 32."""
    groups = x.unflatten(1, (-1, 32))
    scale = groups.abs().amax(dim=-1, keepdim=True)
    whole = torch.round(groups * torch.where(scale > 0, 127 / scale, 0))
    return (whole * scale / 127).flatten(1)


@pytest.mark.parametrize(("encoding", "shape"), CASES)
def test_packs_without_loss(encoding: Encoding, shape: tuple[int, int]) -> None:
    """Unpacking a packed weight gives the numbers of the file, bit for bit."""
    matrix = random_matrix(encoding, *shape)

    assert torch.equal(dequantise(matrix), pack([matrix], device=CPU).dequantised())


@pytest.mark.parametrize(("encoding", "shape"), CASES)
def test_multiplies_like_the_reference(encoding: Encoding, shape: tuple[int, int]) -> None:
    """The product is that of the dequantised weight and, for quantised weights, of activations rounded to 8 bits."""
    weight = pack([random_matrix(encoding, *shape)], device=CPU)
    for num_rows in NUM_ROWS:
        x = random_rows(num_rows, shape[1])
        seen = linear(x, weight)
        rounded = x if encoding in DTYPES else quantised(x)
        with use_backend(Backend.REFERENCE):
            wanted = linear(rounded, weight)

        assert relative_error(seen, wanted) < 2e-6


@pytest.mark.parametrize("encoding", Encoding)
def test_rounding_of_activations_is_small(encoding: Encoding) -> None:
    """Against the unrounded reference the error is below 1 % for quantised weights, and that of float32 for others."""
    weight = pack([random_matrix(encoding, 200, 576)], device=CPU)
    x = random_rows(33, 576)
    seen = linear(x, weight)
    with use_backend(Backend.REFERENCE):
        wanted = linear(x, weight)

    assert relative_error(seen, wanted) < (2e-6 if encoding in DTYPES else 1e-2)


@pytest.mark.parametrize("encoding", Encoding)
def test_fuses_norm_bias_residual_and_selection(encoding: Encoding) -> None:
    """All neighbours together give the bits that they give one after the other."""
    norm = Norm(random_rows(1, 96, seed=5)[0], 1e-5)
    x, residual, bias = random_rows(9, 96), random_rows(3, 37, seed=6), random_rows(1, 37, seed=7)[0]
    select = torch.tensor([8, 0, 8], dtype=torch.int32)
    matrix = random_matrix(encoding, 37, 96)
    apart = linear(rms_norm(x, norm)[select], pack([matrix], device=CPU)) + bias + residual
    together = linear(x, pack([matrix], device=CPU, bias=bias), norm=norm, residual=residual, select=select)

    assert torch.equal(apart, together)


def test_stacks_matrices_of_different_encodings() -> None:
    """Stacked matrices give the outputs of each, side by side, whatever their sizes and encodings."""
    matrices = [random_matrix(encoding, rows, 64, seed=rows) for encoding, rows in zip(MIXED, (33, 7, 18), strict=True)]
    x = random_rows(5, 64)
    alone = torch.cat([linear(x, pack([each], device=CPU)) for each in matrices], dim=1)

    assert torch.equal(alone, linear(x, pack(matrices, device=CPU)))


@pytest.mark.parametrize("encodings", [(Encoding.Q4_1, Encoding.Q4_1), (Encoding.Q8_0, Encoding.BF16)])
def test_gates(encodings: tuple[Encoding, Encoding]) -> None:
    """The gated product is silu(gate) * up of the two products."""
    gate, up = (random_matrix(encoding, 37, 96, seed=seed) for seed, encoding in enumerate(encodings))
    norm = Norm(random_rows(1, 96, seed=5)[0], 1e-5)
    for num_rows in NUM_ROWS:
        x = random_rows(num_rows, 96)
        seen = gated_linear(x, pack_gated(gate, up, device=CPU), norm=norm)
        gates, ups = (linear(x, pack([each], device=CPU), norm=norm) for each in (gate, up))

        torch.testing.assert_close(seen, functional.silu(gates) * ups, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoding", Encoding)
def test_a_row_does_not_see_its_neighbours(encoding: Encoding) -> None:
    """A row has the same bits alone, in a batch, in another order, and with any number of threads."""
    weight = pack([random_matrix(encoding, 100, 288)], device=CPU)
    gated = pack_gated(*(random_matrix(encoding, 40, 288, seed=seed) for seed in (1, 2)), device=CPU)
    x = random_rows(147, 288)
    order = torch.randperm(147, generator=torch.Generator().manual_seed(3))
    num_threads = library.num_threads()
    for op in (lambda rows: linear(rows, weight), lambda rows: gated_linear(rows, gated)):
        together = op(x)
        alone = torch.cat([op(row[None].contiguous()) for row in x])
        library.set_num_threads(1)
        with_one_thread = op(x)
        library.set_num_threads(num_threads)

        assert torch.equal(together, alone)
        assert torch.equal(together[order], op(x[order]))
        assert torch.equal(together, with_one_thread)


@pytest.mark.parametrize("encoding", Encoding)
def test_instruction_sets_agree(encoding: Encoding) -> None:
    """Every instruction set of this machine gives the same bits."""
    weight = pack([random_matrix(encoding, 37, 96)], device=CPU)
    gated = pack_gated(*(random_matrix(encoding, 37, 96, seed=seed) for seed in (1, 2)), device=CPU)
    x = random_rows(13, 96)
    norm = Norm(random_rows(1, 96, seed=5)[0], 1e-5)
    wanted = linear(x, weight, norm=norm), gated_linear(x, gated, norm=norm)
    for isa in other_isas():
        with library.use_isa(isa):
            seen = linear(x, weight, norm=norm), gated_linear(x, gated, norm=norm)

        assert torch.equal(wanted[0], seen[0])
        assert torch.equal(wanted[1], seen[1])


def test_zero_and_huge_rows() -> None:
    """A row of zeros gives zeros, and the largest floats do not spoil the rows beside them."""
    weight = pack([random_matrix(Encoding.Q4_1, 16, 64)], device=CPU)
    x = random_rows(3, 64)
    x[0], x[1] = 0.0, 3e38
    seen = linear(x, weight)

    assert torch.equal(torch.zeros(16), seen[0])
    assert torch.equal(linear(x[2:].contiguous(), weight)[0], seen[2])


def plain() -> LinearWeight:
    """A weight for `linear`."""
    return pack([random_matrix(Encoding.Q4_1, 16, 64)], device=CPU)


def gated() -> LinearWeight:
    """A weight for `gated_linear`."""
    return pack_gated(*(random_matrix(Encoding.Q4_1, 16, 64) for _ in range(2)), device=CPU)


def matrix(encoding: Encoding, num_rows: int, num_columns: int, data: torch.Tensor) -> EncodedMatrix:
    """A matrix whose data may not fit."""
    return EncodedMatrix(encoding, num_rows, num_columns, data)


INPUT = torch.zeros(2, 64)
MISFITS: list[tuple[Callable[[], object], str]] = [
    (lambda: linear(torch.zeros(2, 5), plain()), "columns of x: got 5, want 64"),
    (lambda: linear(INPUT.double(), plain()), "float64"),
    (lambda: linear(torch.zeros(64, 2).T, plain()), "contiguous"),
    (lambda: linear(INPUT, plain(), residual=torch.zeros(3, 16)), r"got \(3, 16\), want \(2, 16\)"),
    (lambda: linear(INPUT, plain(), norm=Norm(torch.ones(3), 1e-5)), "got 3, want 64"),
    (lambda: linear(INPUT, plain(), select=torch.tensor([2], dtype=torch.int32)), "selected rows"),
    (lambda: linear(INPUT, plain(), select=torch.tensor([0])), "got torch.int64, want torch.int32"),
    (lambda: linear(INPUT, gated()), "got gated, want plain"),
    (lambda: gated_linear(INPUT, plain()), "got plain, want gated"),
    (lambda: pack([], device=CPU), "number of matrices: got 0"),
    (lambda: pack([matrix(Encoding.Q4_0, 1, 33, torch.zeros(1, 18))], device=CPU), "got 33, want multiple"),
    (lambda: pack([matrix(Encoding.F32, 2, 3, torch.zeros(3, 2))], device=CPU), r"got \(3, 2\), want \(2, 3\)"),
]


@pytest.mark.parametrize(("call", "message"), MISFITS)
def test_refuses_what_does_not_fit(call: Callable[[], object], message: str) -> None:
    """Tensors that do not fit raise an error that names the value seen and the value wanted."""
    with pytest.raises(ShapeError, match=message):
        call()


def test_refuses_a_weight_of_another_backend() -> None:
    """A weight packed for one backend is not read by another, but the reference reads all."""
    with use_backend(Backend.REFERENCE):
        weight = pack([random_matrix(Encoding.F32, 16, 64)], device=CPU)

    with pytest.raises(ShapeError, match="backend of the weight: got reference, want cpu"):
        linear(torch.zeros(2, 64), weight)
