"""Drafts from what stood before, and how good they are."""

import random

import numpy as np
import pytest

from server.engine import drafts
from server.engine.drafts import FIRST_RATES, MAX_MATCH, RATE_WEIGHT, Drafter, Index, Rates


@pytest.mark.parametrize(
    ("tokens", "length", "draft"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2], 2, [3, 4, 5]),
        ([7, 2, 3, 4, 1, 2, 3, 5, 6, 6, 1, 2, 3], 3, [5, 6, 6]),
        ([1, 2, 3, 4, 5, 5, 5, 7, 3, 4, 6, 1, 2, 3, 4], 4, [5, 5, 5]),
        ([1, 2, 3, 7, 8, 1, 2, 4, 7, 8, 1, 2], 4, [4, 7, 8]),
        ([5, 6, 5, 6], 2, [5, 6, 5]),
        ([4, 4, 4], 2, [4, 4, 4]),
    ],
    ids=["what followed", "the latest", "four before two", "the latest of a cycle", "a cycle goes on", "a run goes on"],
)
def test_drafts_what_followed_the_latest_match(tokens: list[int], length: int, draft: list[int]) -> None:
    """A place of four tokens wins over a later one of two; a draft that reaches its own beginning repeats."""
    found = Index().draft(np.array(tokens, dtype=np.int32), 3)

    assert found is not None
    assert (found.match_length, found.position) == (length, len(tokens))
    assert found.token_ids == draft


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [1, 2, 3, 4, 2], [2, 1, 2]])
def test_drafts_nothing_where_fewer_than_two_tokens_match(tokens: list[int]) -> None:
    """One token alone stands everywhere."""
    assert Index().draft(np.array(tokens, dtype=np.int32), 3) is None


def test_a_match_is_measured_up_to_a_bound() -> None:
    """A long repetition is the same as one of `MAX_MATCH` tokens."""
    found = Index().draft(np.array([*range(50), *range(40)], dtype=np.int32), 15)

    assert found is not None
    assert found.match_length == MAX_MATCH
    assert found.token_ids == [*range(40, 50), *range(5)]


def test_an_index_that_grows_finds_the_same() -> None:
    """Token by token or all at once: the drafts are the same, but for what stood too far back at the beginning."""
    dice = random.Random(0)
    tokens = np.array([dice.randrange(6) for _ in range(300)], dtype=np.int32)
    growing = Index()

    for count in range(1, 301):
        if count % 3:  # every third time there are two new tokens
            assert growing.draft(tokens[:count], 5) == Index().draft(tokens[:count], 5)


def test_what_stands_far_back_is_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first draft of a long sequence looks at its last tokens only."""
    tokens = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], dtype=np.int32)
    assert Index().draft(tokens, 3) is not None

    monkeypatch.setattr(drafts, "MAX_INDEXED_TOKENS", 8)

    assert Index().draft(tokens, 3) is None


def test_a_token_that_comes_makes_the_match_longer() -> None:
    """The chance of a draft's tokens is the product of the rates of ever longer matches, up to the longest."""
    length = MAX_MATCH - 1
    near, last = FIRST_RATES[length:]

    assert Rates().chances(length, 4) == pytest.approx([near, near * last, near * last**2, near * last**3])


def test_rates_follow_what_came() -> None:
    """Right tokens raise the rates of the lengths that they came after, a wrong one lowers its own; others stay."""
    rates = Rates()

    rates.learn(4, 2, is_wrong_then=True)

    seen = [rates.chances(length, 1)[0] for length in range(3, 8)]
    goals = (None, 1, 1, 0, None)
    assert seen == pytest.approx(
        [
            first if goal is None else first + RATE_WEIGHT * (goal - first)
            for first, goal in zip(FIRST_RATES[3:8], goals, strict=True)
        ]
    )


def test_learns_from_drafts_that_nobody_computed() -> None:
    """The next call compares the last draft with the tokens that have come, however many these are."""
    drafter = Drafter()
    tokens = np.array([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 7], dtype=np.int32)
    draft = drafter.draft(tokens[:8], 3)
    assert draft is not None
    assert drafter.chances(draft, 3) == Rates().chances(2, 3)

    drafter.draft(tokens, 3)

    taught = Rates()
    taught.learn(2, 2, is_wrong_then=True)
    assert drafter.chances(draft, 3) == taught.chances(2, 3)
