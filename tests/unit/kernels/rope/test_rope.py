import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, use_backend
from kernels.checks import ShapeError
from kernels.cpu import library
from kernels.placement import RowPlacement
from kernels.rope import RopeTable, rotate_and_store
from tests.fixtures.kernels import other_isas, placement, random_rows, take_rows

pytestmark = pytest.mark.usefixtures("needs_cpu_ops")

NUM_PAGES, HEADS, GROUPS = 24, 6, 2


def table(width: int, *, is_interleaved: bool) -> RopeTable:
    """Angles of 80 positions."""
    angles = torch.outer(torch.arange(80), 100.0 ** (-torch.arange(width) / width))
    return RopeTable(angles.cos(), angles.sin(), is_interleaved)


def unwritten(head_dim: int, page_size: int) -> tuple[Tensor, Tensor]:
    """A pool that holds no numbers."""
    shape = (NUM_PAGES, GROUPS)
    keys = torch.full((*shape, head_dim, page_size), float("nan"), dtype=torch.float16)
    return keys, torch.full((*shape, page_size, head_dim), float("nan"), dtype=torch.float16)


def bits(*pages: Tensor) -> list[Tensor]:
    """Pages as integers, so that NaN equals NaN."""
    return [each.view(torch.int16) for each in pages]


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("head_dim", "width", "page_size"), [(64, 32, 16), (8, 4, 32), (40, 12, 16), (256, 128, 48)])
def test_rotates_and_stores_like_the_reference(head_dim: int, width: int, page_size: int, is_interleaved: bool) -> None:
    """Queries and pages have the bits of the reference, nothing else in the pool changes, on every instruction set."""
    rows = placement([5, 40, 70], [5, 1, 27], page_size=page_size, num_pages=NUM_PAGES)
    qkv = random_rows(rows.num_rows, (HEADS + 2 * GROUPS) * head_dim)
    angles = table(width, is_interleaved=is_interleaved)
    wanted_pages = unwritten(head_dim, page_size)
    with use_backend(Backend.REFERENCE):
        wanted = rotate_and_store(qkv, rows, angles, *wanted_pages)
    for isa in [library.active_isa(), *other_isas()]:
        assert isa is not None
        pages = unwritten(head_dim, page_size)
        with library.use_isa(isa):
            assert torch.equal(wanted, rotate_and_store(qkv, rows, angles, *pages))

        assert all(torch.equal(a, b) for a, b in zip(bits(*wanted_pages), bits(*pages), strict=True))


def test_a_row_does_not_see_its_neighbours() -> None:
    """Rows one by one give the queries and pages that they give together."""
    rows = placement([5, 40, 70], [5, 1, 27], page_size=16, num_pages=NUM_PAGES)
    qkv = random_rows(rows.num_rows, (HEADS + 2 * GROUPS) * 64)
    together, alone = unwritten(64, 16), unwritten(64, 16)
    angles = table(32, is_interleaved=True)
    queries = rotate_and_store(qkv, rows, angles, *together)
    for row in range(rows.num_rows):
        one = take_rows(rows, torch.tensor([row]))

        assert torch.equal(queries[row], rotate_and_store(qkv[row : row + 1], one, angles, *alone)[0])
    assert all(torch.equal(a, b) for a, b in zip(bits(*together), bits(*alone), strict=True))


@pytest.mark.parametrize(
    ("position", "sequence", "page"),
    [(80, 0, 0), (-1, 0, 0), (32, 0, 0), (3, 1, 0), (3, -1, 0), (3, 0, NUM_PAGES), (3, 0, -1)],
)
def test_refuses_places_outside_the_pool(position: int, sequence: int, page: int) -> None:
    """A position, slot or page that does not exist raises before anything is written."""
    rows = RowPlacement(*(torch.tensor(each, dtype=torch.int32) for each in ([position], [sequence], [[page, page]])))
    pages = unwritten(64, 16)

    with pytest.raises(ShapeError, match="position, sequence"):
        rotate_and_store(torch.zeros(1, 10 * 64), rows, table(32, is_interleaved=True), *pages)
    assert all(each.isnan().all() for each in pages)


def test_refuses_shapes_that_do_not_fit() -> None:
    """The errors name the value seen and the value wanted."""
    rows = placement([3], [3], page_size=16, num_pages=NUM_PAGES)
    angles = table(32, is_interleaved=True)
    keys, values = unwritten(64, 16)
    with pytest.raises(ShapeError, match="rows of qkv: got 2, want 3"):
        rotate_and_store(torch.zeros(2, 640), rows, angles, keys, values)
    with pytest.raises(ShapeError, match="query heads: got 3, want multiple of 2"):
        rotate_and_store(torch.zeros(3, 7 * 64), rows, angles, keys, values)
    with pytest.raises(ShapeError, match=r"value_pages\.shape"):
        rotate_and_store(torch.zeros(3, 640), rows, angles, keys, keys)
    with pytest.raises(ShapeError, match="head dim on a CPU: got 12, want multiple of 8"):
        rotate_and_store(torch.zeros(3, 120), rows, table(6, is_interleaved=True), *unwritten(12, 16))
    with pytest.raises(ShapeError, match="page size on a CPU: got 8, want multiple of 16"):
        rotate_and_store(torch.zeros(3, 640), rows, angles, *unwritten(64, 8))
