"""What a source has said and a reader has not taken yet.

The source's side never waits for the reader's: a slow client holds back nobody and finds many tokens in one frame.
It holds at most max_tokens of each completion. Used on the event loop only.
"""

import asyncio

from server.messages import Event, TokenDelta


class Mailbox:
    """A buffer with one writer and one reader, in which deltas of an index melt together."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._is_closed = False
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)
        self._arrived.set()

    def close(self, error: BaseException | None = None) -> None:
        """Say that nothing follows, or what went wrong. The first call counts."""
        if not self._is_closed:
            self._is_closed, self._error = True, error
            self._arrived.set()

    async def take(self) -> list[Event]:
        """Wait for events and take all there are; none at the end.

        Raises:
            BaseException: what the writer closed with, after the events before it were taken.
        """
        while not self._events:
            if self._is_closed:
                if self._error is not None:
                    raise self._error
                return []
            self._arrived.clear()
            await self._arrived.wait()
        events, self._events = self._events, []
        return events if len(events) == 1 else _melt(events)


def _melt(events: list[Event]) -> list[Event]:
    """Join the deltas of each index at the place of its first; an index's end comes after all of them anyway."""
    deltas: dict[int, list[TokenDelta]] = {}
    for event in events:
        if isinstance(event, TokenDelta):
            deltas.setdefault(event.index, []).append(event)
    melted: list[Event] = []
    for event in events:
        if not isinstance(event, TokenDelta):
            melted.append(event)
        elif run := deltas.pop(event.index, None):
            token_ids = tuple(token_id for each in run for token_id in each.token_ids)
            logprobs = tuple(logprob for each in run for logprob in each.logprobs)
            melted.append(TokenDelta(event.index, token_ids, logprobs))
    return melted
