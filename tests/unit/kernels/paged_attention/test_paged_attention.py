import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, use_backend
from kernels.checks import ShapeError
from kernels.cpu import library
from kernels.paged_attention import paged_attention
from kernels.placement import RowPlacement
from tests.fixtures.kernels import other_isas, placement, take_rows

pytestmark = pytest.mark.usefixtures("needs_cpu_ops")

NUM_PAGES = 64


class Case:
    """Sequences in a pool whose unwritten places hold no numbers."""

    def __init__(
        self, *, heads: int, groups: int, head_dim: int, page_size: int, lengths: list[int], num_new: list[int]
    ) -> None:
        generator = torch.Generator().manual_seed(4)
        self.rows = placement(lengths, num_new, page_size=page_size, num_pages=NUM_PAGES)
        keys = torch.full((NUM_PAGES, groups, head_dim, page_size), float("nan"))
        values = torch.full((NUM_PAGES, groups, page_size, head_dim), float("nan"))
        for pages, length in zip(self.rows.page_table.tolist(), lengths, strict=True):
            for token in range(length):
                page, slot = pages[token // page_size], token % page_size
                keys[page, :, :, slot] = torch.randn(groups, head_dim, generator=generator)
                values[page, :, slot] = torch.randn(groups, head_dim, generator=generator)
        self.pages = keys.half(), values.half()
        self.query = torch.randn(self.rows.num_rows, heads, head_dim, generator=generator) * 2
        self.scale = head_dim**-0.5

    def attend(self, chosen: Tensor | None = None) -> Tensor:
        rows = self.rows if chosen is None else take_rows(self.rows, chosen)
        query = self.query if chosen is None else self.query[chosen]
        return paged_attention(query, *self.pages, rows, scale=self.scale)


CASES = {
    "smollm2": Case(heads=9, groups=3, head_dim=64, page_size=16, lengths=[5, 300, 140], num_new=[5, 70, 1]),
    "one head": Case(heads=1, groups=1, head_dim=8, page_size=16, lengths=[400], num_new=[200]),
    "larger pages": Case(heads=6, groups=2, head_dim=40, page_size=32, lengths=[129, 128, 33], num_new=[20, 30, 33]),
    "eight to one": Case(heads=32, groups=4, head_dim=128, page_size=16, lengths=[257], num_new=[40]),
    "wide head": Case(heads=3, groups=1, head_dim=256, page_size=48, lengths=[17, 16, 300], num_new=[17, 1, 1]),
    "long": Case(heads=6, groups=2, head_dim=16, page_size=16, lengths=[1000], num_new=[3]),
    "seven to one": Case(heads=14, groups=2, head_dim=64, page_size=16, lengths=[20, 300], num_new=[1, 2]),
    "many to one": Case(heads=71, groups=1, head_dim=16, page_size=16, lengths=[40], num_new=[3]),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each of the cases."""
    return CASES[request.param]


def test_attends_like_the_reference(case: Case) -> None:
    """Each row gets the softmax-weighted values of tokens up to its own, and nothing of unwritten places."""
    seen = case.attend()
    with use_backend(Backend.REFERENCE):
        wanted = case.attend()

    torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=2e-5)


def test_a_row_does_not_see_its_neighbours(case: Case) -> None:
    """A row has the same bits alone and in any chunk of its sequence."""
    together = case.attend()
    num_rows = case.rows.num_rows
    for size in (1, 2, 5, 33):
        chunks = [case.attend(torch.arange(first, min(first + size, num_rows))) for first in range(0, num_rows, size)]

        assert torch.equal(together, torch.cat(chunks))


def test_rows_may_come_in_any_order(case: Case) -> None:
    """Shuffled rows have the bits of ordered ones, with any number of threads."""
    together = case.attend()
    order = torch.randperm(case.rows.num_rows, generator=torch.Generator().manual_seed(3))
    num_threads = library.num_threads()
    for threads in (1, 2, 5):
        library.set_num_threads(threads)
        shuffled = case.attend(order)
        library.set_num_threads(num_threads)

        assert torch.equal(together[order], shuffled)


def test_instruction_sets_agree(case: Case) -> None:
    """Every instruction set of this machine gives the same bits."""
    wanted = case.attend()
    for isa in other_isas():
        with library.use_isa(isa):
            assert torch.equal(wanted, case.attend())


def test_large_scores_do_not_overflow() -> None:
    """Scores of thousands leave the one largest value."""
    case = Case(heads=1, groups=1, head_dim=16, page_size=16, lengths=[200], num_new=[1])
    case.query *= 1e4
    with use_backend(Backend.REFERENCE):
        wanted = case.attend()

    torch.testing.assert_close(case.attend(), wanted)


def test_refuses_shapes_that_do_not_fit() -> None:
    """The errors name the value seen and the value wanted."""
    case = CASES["smollm2"]
    keys, values = case.pages
    rows = case.rows
    with pytest.raises(ShapeError, match="rows of query: got 1, want 76"):
        paged_attention(case.query[:1], keys, values, rows, scale=1.0)
    with pytest.raises(ShapeError, match="query heads: got 8, want multiple of 3"):
        paged_attention(case.query[:, :8].contiguous(), keys, values, rows, scale=1.0)
    with pytest.raises(ShapeError, match="head dim of query: got 32, want 64"):
        paged_attention(case.query[..., :32].contiguous(), keys, values, rows, scale=1.0)
    with pytest.raises(ShapeError, match="key_pages"):
        paged_attention(case.query, keys.float(), values, rows, scale=1.0)


def test_refuses_a_placement_that_does_not_fit_itself() -> None:
    """Positions and sequences are of one length and of 32 bits."""
    one, two = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"sequences.shape: got \(2,\), want \(1,\)"):
        RowPlacement(one, two, one[None])
    with pytest.raises(ShapeError, match=r"positions\.dtype"):
        RowPlacement(one.long(), one, one[None])
