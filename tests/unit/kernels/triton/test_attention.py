"""The Triton rotation, page writing and attention against their references."""

import math

import pytest
import torch
from torch import Tensor

from kernels import tiles
from kernels.paged_attention import paged_attention
from kernels.paged_attention import reference as attention_reference
from kernels.placement import RowPlacement
from kernels.rope import RopeTable, rotate_and_store
from kernels.rope import reference as rope_reference

PAGE_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


def placement_of(places: list[tuple[int, list[int]]], num_pages: int, device: torch.device) -> RowPlacement:
    """Place rows: (slot, positions) for each sequence; pages are spread over the pool in no order."""
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(7)).int()
    num_slots = 1 + max(slot for slot, _ in places)
    width = num_pages // num_slots
    return RowPlacement(
        positions=torch.tensor([p for _, positions in places for p in positions], dtype=torch.int32, device=device),
        sequences=torch.tensor([s for s, positions in places for _ in positions], dtype=torch.int32, device=device),
        page_table=pages[: num_slots * width].view(num_slots, width).contiguous().to(device),
    )


def table_of(num_positions: int, num_pairs: int, *, is_interleaved: bool, device: torch.device) -> RopeTable:
    """Make the angles of a small model."""
    frequencies = 100.0 ** (-torch.arange(num_pairs) / num_pairs)
    angles = torch.arange(num_positions)[:, None] * frequencies
    return RopeTable(angles.cos().to(device), angles.sin().to(device), is_interleaved)


def pools_of(num_pages: int, num_groups: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make pools full of numbers."""
    generator = torch.Generator().manual_seed(3)
    key_pages = torch.randn(num_pages, num_groups, head_dim, PAGE_SIZE, generator=generator)
    value_pages = torch.randn(num_pages, num_groups, PAGE_SIZE, head_dim, generator=generator)
    return key_pages.to(device, torch.float16), value_pages.to(device, torch.float16)


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("head_dim", "num_pairs"), [(8, 4), (20, 10), (16, 4)])
def test_rotation_and_pages_match_the_reference(
    device: torch.device, head_dim: int, num_pairs: int, is_interleaved: bool
) -> None:
    """Queries turn, keys turn into their page columns, values go to their page rows, and nothing else is touched."""
    num_heads, num_groups = 4, 2
    rows = placement_of([(1, [0, 1]), (0, [31]), (2, [16, 17])], 9, device)
    table = table_of(48, num_pairs, is_interleaved=is_interleaved, device=device)
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(5, (num_heads + 2 * num_groups) * head_dim, generator=generator).to(device)
    mine, theirs = (pools_of(9, num_groups, head_dim, device) for _ in range(2))

    seen = rotate_and_store(qkv, rows, table, *mine)

    expected = rope_reference.rotate_and_store(qkv, rows, table, *theirs)
    torch.testing.assert_close(seen, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_groups", "head_dim"), [(3, 1, 16), (4, 4, 20), (8, 2, 32), (20, 1, 16)])
def test_attention_matches_the_reference(
    device: torch.device, num_heads: int, num_groups: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Decode rows, a chunk of a prompt and a first token in one batch, for every way of sharing keys."""
    rows = placement_of([(2, [90]), (0, [13, 14, 15, 16, 17, 18, 19]), (1, [0]), (3, [64])], 28, device)
    pools = pools_of(28, num_groups, head_dim, device)
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(10, num_heads, head_dim, generator=generator).to(device, dtype)
    scale = 1 / math.sqrt(head_dim)

    seen = paged_attention(query, *pools, rows, scale=scale)

    expected = attention_reference.paged_attention(query, *pools, rows, scale=scale)
    assert seen.dtype == dtype
    torch.testing.assert_close(seen, expected, rtol=0, atol=TOLERANCE[dtype])


def test_attention_joins_splits_in_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A past longer than a split gives what an unsplit one gives, at, before and after the border."""
    monkeypatch.setattr(tiles, "ATTENTION_SPLIT", 64)
    rows = placement_of([(0, [62, 63, 64, 65]), (1, [199]), (2, [127, 128])], 39, device)
    pools = pools_of(39, 1, 16, device)
    query = torch.randn(7, 2, 16, generator=torch.Generator().manual_seed(8)).to(device)

    seen = paged_attention(query, *pools, rows, scale=0.25)

    expected = attention_reference.paged_attention(query, *pools, rows, scale=0.25)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_attention_of_a_row_does_not_depend_on_the_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a chunk, beside others, with a wider page table or in smaller launches, a row gives the same bits."""
    monkeypatch.setattr(tiles, "ATTENTION_SPLIT", 64)
    rows = placement_of([(1, [70, 71, 72, 73, 74]), (0, [9])], 20, device)
    pools = pools_of(20, 1, 16, device)
    query = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(9)).to(device)
    together = paged_attention(query, *pools, rows, scale=0.25)
    narrow = rows.page_table[:, :5].contiguous()

    for row in range(6):
        alone = RowPlacement(rows.positions[row : row + 1], rows.sequences[row : row + 1], narrow)
        seen = paged_attention(query[row : row + 1].contiguous(), *pools, alone, scale=0.25)
        assert torch.equal(seen[0], together[row])

    monkeypatch.setattr(tiles, "ATTENTION_WORKSPACE_BYTES", 2000)
    assert torch.equal(paged_attention(query, *pools, rows, scale=0.25), together)


def test_attention_ignores_what_lies_behind_a_row(device: torch.device) -> None:
    """Unwritten slots of a page and foreign pages may hold anything, even NaN."""
    rows = placement_of([(0, [4]), (1, [20])], 6, device)
    pools = pools_of(6, 1, 16, device)
    query = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(10)).to(device)
    clean = paged_attention(query, *pools, rows, scale=0.25)

    last = int(rows.page_table[0, 0])
    pools[0][last, :, :, 5:] = torch.nan
    pools[1][last, :, 5:] = torch.nan
    pools[0][int(rows.page_table[1, 2])] = torch.nan

    assert torch.equal(paged_attention(query, *pools, rows, scale=0.25), clean)
