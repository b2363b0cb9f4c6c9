import pytest
import torch

from kernels.checks import ShapeError
from kernels.cpu import library
from kernels.embed import embed
from kernels.linear import pack
from kernels.weights import Encoding, dequantise
from tests.fixtures.kernels import CPU, other_isas, random_matrix

pytestmark = pytest.mark.usefixtures("needs_cpu_ops")

IDS = torch.tensor([3, 0, 36, 3, 17], dtype=torch.int32)


@pytest.mark.parametrize("encoding", Encoding)
def test_reads_rows(encoding: Encoding) -> None:
    """Each token gets the numbers of its row, bit for bit, on every instruction set."""
    matrix = random_matrix(encoding, 37, 96)
    weight = pack([matrix], device=CPU)
    wanted = dequantise(matrix)[IDS.long()]

    assert torch.equal(wanted, embed(IDS, weight))
    for isa in other_isas():
        with library.use_isa(isa):
            assert torch.equal(wanted, embed(IDS, weight))


@pytest.mark.parametrize("token_id", [-1, 37])
def test_refuses_a_token_outside_the_weight(token_id: int) -> None:
    """A token id without a row raises, and names the id and the last row."""
    weight = pack([random_matrix(Encoding.F32, 37, 8)], device=CPU)

    with pytest.raises(ShapeError, match=f"token id: got {token_id}, want 0 .. 36"):
        embed(torch.tensor([0, token_id], dtype=torch.int32), weight)
