"""Drafts by prompt lookup: where the last tokens of a sequence stood before, what followed them may follow again.

A draft is a guess at the next tokens. Wrong ones cost time and change nothing, so nothing here is exact or worth
keeping. One pass over the tokens in numpy, a thousandth of what attention does with them, is cheaper than an index that
grows with every token.
"""

from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np

from server.engine.chain import TokenArray

MIN_MATCH = 2
"""One token alone stands everywhere and predicts little."""
MAX_MATCH = 8
"""Longer matches predict no better."""
FIRST_RATES = tuple(min(0.9, length / 10) for length in range(MAX_MATCH + 1))
"""Until drafts were seen."""
COMMON_WEIGHT = 1 / 64
OWN_WEIGHT = 1 / 8
"""What one more token changes in the rates of all, and of its sequence."""


class Draft(NamedTuple):
    """What may come next."""

    match_length: int
    """How many last tokens stood before, at most `MAX_MATCH`: the longer, the likelier the draft."""
    position: int
    """Of the first drafted token in its sequence."""
    token_ids: TokenArray


def find_draft(token_ids: TokenArray, max_tokens: int) -> Draft | None:
    """Find the latest of the longest matches of the last tokens.

    Args:
        token_ids: all tokens of a sequence, at least one.
        max_tokens: length of the draft. Where the match is nearer to the end than that, its tokens repeat.

    Returns:
        The draft, or None where fewer than `MIN_MATCH` tokens match.
    """
    last = token_ids.size - 1
    ends = np.flatnonzero(token_ids[:last] == token_ids[last])
    end = length = 0
    while ends.size:
        length += 1
        end = int(ends[-1])
        if length == MAX_MATCH:
            break
        ends = ends[np.searchsorted(ends, length) :]
        ends = ends[token_ids[ends - length] == token_ids[last - length]]
    if length < MIN_MATCH:
        return None
    places = end + 1 + np.arange(max_tokens) % (last - end)
    return Draft(length, last + 1, token_ids[places])


class Rates:
    """How often drafted tokens came, if those before them did, by the length of the match; exponentially weighted."""

    def __init__(self, weight: float = COMMON_WEIGHT, rates: Many[float] = FIRST_RATES) -> None:
        self._weight = weight
        self._rates = list(rates)

    def of(self, match_length: int) -> float:
        """Return the probability that a drafted token comes if those before it did."""
        return self._rates[match_length]

    def learn(self, match_length: int, num_right: int, *, is_wrong_then: bool) -> None:
        """Count drafted tokens that came, and whether another came then."""
        rate = 1 - (1 - self._rates[match_length]) * (1 - self._weight) ** num_right
        self._rates[match_length] = rate * (1 - self._weight) if is_wrong_then else rate

    def own(self) -> "Rates":
        """Return rates of one sequence, which begin with these and learn faster."""
        return Rates(OWN_WEIGHT, self._rates)


class Drafter:
    """Drafts for one sequence and learns how good they are, whether they were computed or not.

    Args:
        common: rates of all sequences: begun with, and taught.
    """

    def __init__(self, common: Rates) -> None:
        self._common = common
        self._own = common.own()
        self._last: Draft | None = None

    def draft(self, token_ids: TokenArray, max_tokens: int) -> Draft | None:
        """Compare the last draft with what came, and make the next one."""
        if self._last is not None:
            self._learn(self._last, token_ids)
        self._last = find_draft(token_ids, max_tokens)
        return self._last

    def rate(self, draft: Draft) -> float:
        """Return the probability that a token of a draft comes if those before it did."""
        return self._own.of(draft.match_length)

    def _learn(self, draft: Draft, token_ids: TokenArray) -> None:
        came = token_ids[draft.position : draft.position + draft.token_ids.size]
        wrong = np.flatnonzero(came != draft.token_ids[: came.size])
        num_right = int(wrong[0]) if wrong.size else came.size
        for rates in (self._common, self._own):
            rates.learn(draft.match_length, num_right, is_wrong_then=bool(wrong.size))
