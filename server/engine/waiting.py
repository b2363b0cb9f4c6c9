"""The waiting queue: sequences without a slot, eldest first."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

from server.engine.sequence import Seniority, Sequence


class _Entry(NamedTuple):
    seniority: Seniority
    backlog_tokens: int
    sequence: Sequence


class WaitingQueue:
    """Keeps sequences in order of seniority and knows how much work they are."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self.backlog_tokens = 0
        """Tokens not yet computed or generated, of all that wait and of the followers that wait for them."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (entry.sequence for entry in self._entries)

    @property
    def eldest(self) -> Sequence:
        """Return who is next."""
        return self._entries[0].sequence

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait, at its place."""
        followers = sequence.submission.followers
        backlog = sequence.num_backlog_tokens + sum(each.num_backlog_tokens for each in followers)
        insort(self._entries, _Entry(sequence.seniority, backlog, sequence))
        self.backlog_tokens += backlog

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, if it waits here."""
        place = bisect_left(self._entries, (sequence.seniority,))
        if place < len(self._entries) and self._entries[place].sequence is sequence:
            self.backlog_tokens -= self._entries.pop(place).backlog_tokens
