"""Drafts by prompt lookup: where the last tokens of a sequence stood before, what followed them may follow again.

A draft is a guess at the next tokens. Wrong ones cost time and change nothing, so nothing here needs to be exact or
kept. Plain dicts and bytes: right after a step every cache is cold, and the first few numpy calls cost more than all
of this.
"""

from itertools import accumulate
from operator import eq, mul
from typing import NamedTuple

from server.engine.chain import TokenArray

WIDTHS = (4, 2)
"""Tokens that are looked up: the latest place of four decides more than that of two. One stands everywhere."""
MAX_MATCH = 16
"""Longer matches predict no better."""
MAX_INDEXED_TOKENS = 16_384
"""Of what a sequence has when its first draft is made, the last ones: 10 ms (Zen 5, November 2026). A token takes
0.3 KB, its pages 23 KB."""
FIRST_RATES = (0.0, 0.0, *(1 - 2 / length for length in range(2, MAX_MATCH + 1)))
"""Of matches of 0, 1, 2, ... tokens, until drafts were seen: low, for learning is free."""
RATE_WEIGHT = 1 / 5
"""What one more token changes in its rate: a text is short, and changes from one passage to the next."""
TOKEN_BYTES = 4


class Draft(NamedTuple):
    """What may come next."""

    match_length: int
    """How many last tokens stood before, at most `MAX_MATCH`: the longer, the likelier the draft."""
    position: int
    """Of the first drafted token in its sequence."""
    token_ids: list[int]


class Index:
    """Where the last few tokens of a sequence stood before. Grows with it."""

    def __init__(self) -> None:
        self._position_after: dict[bytes, int] = {}
        self._num_indexed: int | None = None
        """Runs that end within so many first tokens were noted."""

    def draft(self, token_ids: TokenArray, max_tokens: int) -> Draft | None:
        """Note the tokens that are new, and repeat what followed the last ones.

        Args:
            token_ids: all tokens of the sequence.
            max_tokens: length of the draft. Where less than that has followed, it repeats.
        """
        num_tokens = token_ids.size
        place = self._find(token_ids)
        if place is None:
            return None
        last = token_ids[max(0, num_tokens - MAX_MATCH) :].tolist()
        before = token_ids[max(0, place - MAX_MATCH) : place].tolist()
        length = 0
        while length < len(before) and before[-1 - length] == last[-1 - length]:
            length += 1
        followed = token_ids[place : place + max_tokens].tolist()
        while len(followed) < max_tokens:
            followed += followed
        return Draft(length, num_tokens, followed[:max_tokens])

    def _find(self, token_ids: TokenArray) -> int | None:
        num_tokens = token_ids.size
        num_indexed = self._num_indexed
        if num_indexed is None:
            num_indexed = max(0, num_tokens - MAX_INDEXED_TOKENS)
        first = max(0, num_indexed - max(WIDTHS))
        data = token_ids[first:].tobytes()
        positions = self._position_after
        for width in WIDTHS:
            size = width * TOKEN_BYTES
            for position in range(max(num_indexed, width - 1) + 1, num_tokens):
                end = (position - first) * TOKEN_BYTES
                positions[data[end - size : end]] = position
        self._num_indexed = num_tokens - 1
        found = (positions.get(data[-width * TOKEN_BYTES :]) for width in WIDTHS if num_tokens > width)
        return next((position for position in found if position is not None), None)


class Rates:
    """How often the next token after a match was the one that came, by the match's length; exponentially weighted."""

    def __init__(self) -> None:
        self._rates = list(FIRST_RATES)

    def chances(self, match_length: int, count: int) -> list[float]:
        """Return the probabilities that all of the first 1, 2, ... `count` tokens of a draft come.

        Each token that comes makes the match longer by one.
        """
        first = self._rates[match_length : match_length + count]
        return list(accumulate(first + [self._rates[MAX_MATCH]] * (count - len(first)), mul))

    def learn(self, match_length: int, num_right: int, *, is_wrong_then: bool) -> None:
        """Count drafted tokens that came, and whether another came then."""
        for place in range(num_right + is_wrong_then):
            length = min(match_length + place, MAX_MATCH)
            self._rates[length] += RATE_WEIGHT * ((place < num_right) - self._rates[length])


class Drafter:
    """Drafts for one sequence and learns how good they are, whether they were computed or not."""

    def __init__(self) -> None:
        self._rates = Rates()
        self._index = Index()
        self._last: Draft | None = None

    def draft(self, token_ids: TokenArray, max_tokens: int) -> Draft | None:
        """Compare the last draft with what came, and make the next one."""
        if self._last is not None:
            self._learn(self._last, token_ids)
        self._last = self._index.draft(token_ids, max_tokens)
        return self._last

    def chances(self, draft: Draft, count: int) -> list[float]:
        """Return the probabilities that all of the first 1, 2, ... `count` tokens of a draft come."""
        return self._rates.chances(draft.match_length, count)

    def _learn(self, draft: Draft, token_ids: TokenArray) -> None:
        came = token_ids[draft.position : draft.position + len(draft.token_ids)].tolist()
        is_right = [*map(eq, came, draft.token_ids), False]
        num_right = is_right.index(False)
        self._rates.learn(draft.match_length, num_right, is_wrong_then=num_right < len(came))
