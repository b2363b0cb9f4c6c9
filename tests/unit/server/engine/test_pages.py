"""The page pool: who holds which page."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from server.engine.pages import PagePool, PageTable


def chain_id(number: int) -> bytes:
    """Make a chain id for a number."""
    return number.to_bytes(4, "little")


def test_an_open_page_is_freed_and_a_closed_one_is_cached() -> None:
    """Releasing keeps what has an address."""
    pool = PagePool(4)
    first, second = pool.allocate(2)
    pool.close(first, chain_id(1))

    pool.release([first, second])

    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 1, 3)
    assert pool.find(chain_id(1)) == first
    pool.check()


def test_evicts_the_least_recently_used_and_the_end_of_a_sequence_first() -> None:
    """A page is found only through those before it, so of one sequence the last goes first."""
    pool = PagePool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for number, page_id in enumerate([*old, *new]):
        pool.close(page_id, chain_id(number))
    pool.release(old)
    pool.release(new)
    order = []
    for _ in range(4):
        before = {number for number in range(4) if pool.find(chain_id(number)) is not None}
        pool.allocate(1)
        order += before - {number for number in range(4) if pool.find(chain_id(number)) is not None}

    assert order == [1, 0, 3, 2]


def test_a_used_page_is_never_evicted() -> None:
    """Only what nobody holds is handed out again."""
    pool = PagePool(2)
    held, other = pool.allocate(2)
    pool.close(held, chain_id(1))
    pool.close(other, chain_id(2))
    pool.release([other])

    assert pool.num_available == 1
    assert pool.allocate(1) == [other]
    assert pool.find(chain_id(1)) == held
    with pytest.raises(AssertionError):
        pool.allocate(1)


def test_a_page_closed_twice_is_kept_once() -> None:
    """The second sequence to close the same page holds the first one's, and its own is free."""
    pool = PagePool(4)
    first, second = pool.allocate(2)
    assert pool.close(first, chain_id(1)) == first

    assert pool.close(second, chain_id(1)) == first

    assert (pool.num_used, pool.num_free) == (1, 3)
    pool.release([first])
    assert pool.is_held(first)
    pool.release([first])
    assert not pool.is_held(first)
    pool.check()


def test_pages_that_are_not_trusted_are_not_cached() -> None:
    """Releasing without keeping forgets the address, unless somebody else holds the page."""
    pool = PagePool(4)
    mine, ours = pool.allocate(2)
    pool.close(mine, chain_id(1))
    pool.close(ours, chain_id(2))
    pool.share(ours)

    pool.release([mine, ours], keep=False)

    assert pool.find(chain_id(1)) is None
    assert pool.find(chain_id(2)) == ours
    pool.check()


def test_forgetting_frees_all_that_nobody_holds() -> None:
    """After forgetting, a prefix is found only if somebody holds it."""
    pool = PagePool(4)
    kept, gone = pool.allocate(2)
    pool.close(kept, chain_id(1))
    pool.close(gone, chain_id(2))
    pool.release([gone])

    pool.forget_cached()

    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 3)
    assert pool.find(chain_id(1)) == kept
    pool.check()


def test_the_table_mirrors_what_was_written() -> None:
    """Entries are written in place; on the CPU the kernels read the same memory."""
    table = PageTable(2, 4, torch.device("cpu"))
    before = table.tensor()
    table.write(1, 1, [7, 8])

    assert table.tensor().tolist() == [[0, 0, 0, 0], [0, 7, 8, 0]]
    assert table.tensor().data_ptr() == before.data_ptr()


class PoolMachine(RuleBasedStateMachine):
    """Whatever sequences do, every page is used, cached or free, and a found page is the one that was closed."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.content: dict[int, int] = {}

    @precondition(lambda self: self.pool.num_available)
    @rule(target=held, close_as=st.none() | st.integers(0, 8))
    def allocate(self, close_as: int | None) -> int:
        (page_id,) = self.pool.allocate(1)
        self.content[page_id] = -1 if close_as is None else close_as
        return page_id if close_as is None else self.pool.close(page_id, chain_id(close_as))

    @rule(target=held, number=st.integers(0, 8))
    def share(self, number: int) -> object:
        page_id = self.pool.find(chain_id(number))
        if page_id is None:
            return multiple()
        assert self.content[page_id] == number
        self.pool.share(page_id)
        return page_id

    @rule(page_id=consumes(held), keep=st.booleans())
    def release(self, page_id: int, keep: bool) -> None:
        self.pool.release([page_id], keep=keep)

    @invariant()
    def accounts(self) -> None:
        self.pool.check()


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase
