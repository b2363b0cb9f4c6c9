"""Drafts from what stood before, and how good they are."""

import numpy as np
import pytest

from server.engine.drafts import COMMON_WEIGHT, FIRST_RATES, MAX_MATCH, OWN_WEIGHT, Drafter, Rates, find_draft


@pytest.mark.parametrize(
    ("tokens", "length", "draft"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2], 2, [3, 4, 5]),
        ([7, 2, 3, 4, 1, 2, 3, 5, 6, 6, 1, 2, 3], 3, [5, 6, 6]),
        ([1, 2, 3, 7, 8, 1, 2, 4, 7, 8, 1, 2], 4, [4, 7, 8]),
        ([0, 1, 2, 8, 0, 0, 3, 1, 2, 9, 9, 9, 0, 1, 2], 3, [8, 0, 0]),
        ([5, 6, 5, 6], 2, [5, 6, 5]),
        ([4, 4, 4], 2, [4, 4, 4]),
    ],
    ids=["what followed", "the latest", "the latest of a cycle", "the longest", "a cycle goes on", "a run goes on"],
)
def test_drafts_what_followed_the_latest_of_the_longest_matches(
    tokens: list[int], length: int, draft: list[int]
) -> None:
    """A longer match wins over a later one; a draft that reaches its own beginning repeats."""
    found = find_draft(np.array(tokens, dtype=np.int32), 3)

    assert found is not None
    assert (found.match_length, found.position) == (length, len(tokens))
    assert found.token_ids.tolist() == draft


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [1, 2, 3, 4, 2], [2, 1, 2]])
def test_drafts_nothing_where_fewer_than_two_tokens_match(tokens: list[int]) -> None:
    """One token alone stands everywhere."""
    assert find_draft(np.array(tokens, dtype=np.int32), 3) is None


def test_a_match_is_measured_up_to_a_bound() -> None:
    """A long repetition is the same as one of `MAX_MATCH` tokens."""
    found = find_draft(np.array([*range(50), *range(40)], dtype=np.int32), 15)

    assert found is not None
    assert found.match_length == MAX_MATCH
    assert found.token_ids.tolist() == [*range(40, 50), *range(5)]


def test_rates_follow_what_came() -> None:
    """Right tokens raise the rate of their match length towards one, a wrong one lowers it; others stay."""
    rates = Rates(weight=0.5)

    rates.learn(4, 2, is_wrong_then=False)
    assert rates.of(4) == pytest.approx(1 - (1 - FIRST_RATES[4]) / 4)
    before = rates.of(4)
    rates.learn(4, 0, is_wrong_then=True)

    assert rates.of(4) == pytest.approx(before / 2)
    assert rates.of(3) == FIRST_RATES[3]


def test_learns_from_drafts_that_nobody_computed() -> None:
    """The next call compares the last draft with the tokens that have come, however many these are."""
    common = Rates()
    drafter = Drafter(common)
    tokens = np.array([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 7], dtype=np.int32)
    draft = drafter.draft(tokens[:8], 3)
    assert draft is not None
    assert drafter.rate(draft) == FIRST_RATES[2]

    drafter.draft(tokens, 3)

    own = (1 - (1 - FIRST_RATES[2]) * (1 - OWN_WEIGHT) ** 2) * (1 - OWN_WEIGHT)
    assert drafter.rate(draft) == pytest.approx(own)
    all_of_them = (1 - (1 - FIRST_RATES[2]) * (1 - COMMON_WEIGHT) ** 2) * (1 - COMMON_WEIGHT)
    assert common.of(2) == pytest.approx(all_of_them)
    later = Drafter(common).draft(tokens[:8], 3)
    assert later is not None
    assert Drafter(common).rate(later) == pytest.approx(all_of_them)
