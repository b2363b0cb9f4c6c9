"""What a step has to tell, and the stream that carries it to one reader on the event loop.

A step's emissions cross from the compute thread in one call. A stream keeps what its reader has not taken yet and gives
many tokens as one delta, so a slow reader costs nothing but the memory of its token ids.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from server.errors import PathfoxError
from server.messages import Event, Finished, TokenDelta, TokenLogprob


@dataclass(slots=True)
class EmittedToken:
    """One token for the reader."""

    index: int
    token_id: int
    logprob: TokenLogprob | None


Emission = EmittedToken | Event | PathfoxError
"""An error is the last emission of its request."""


class EventStream:
    """One request's emissions, from the loop's side. Used on the event loop only.

    What is pushed after the end is ignored.

    Args:
        num_completions: after so many `Finished` the stream ends.
    """

    def __init__(self, num_completions: int) -> None:
        self._num_open = num_completions
        self._pending: list[Emission] = []
        self._arrived = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether the last emission has been taken by the reader."""
        return self._num_open == 0

    def push(self, emission: Emission) -> None:
        """Add what the reader shall see next."""
        self._pending.append(emission)
        self._arrived.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield events as they come, everything that is ready merged.

        Raises:
            PathfoxError: what ended the request instead of `Finished`.
        """
        while self._num_open:
            await self._arrived.wait()
            self._arrived.clear()
            pending, self._pending = self._pending, []
            tokens: dict[int, list[EmittedToken]] = {}
            for emission in pending:
                if not self._num_open:
                    return
                if isinstance(emission, EmittedToken):
                    tokens.setdefault(emission.index, []).append(emission)
                elif isinstance(emission, PathfoxError):
                    for delta in _merge(tokens):
                        yield delta
                    self._num_open = 0
                    raise emission
                else:
                    if isinstance(emission, Finished):
                        for delta in _merge({emission.index: tokens.pop(emission.index, [])}):
                            yield delta
                        self._num_open -= 1
                    yield emission
            for delta in _merge(tokens):
                yield delta


def _merge(tokens: dict[int, list[EmittedToken]]) -> list[TokenDelta]:
    return [
        TokenDelta(
            index=index,
            token_ids=tuple(each.token_id for each in run),
            logprobs=tuple(each.logprob for each in run if each.logprob is not None),
        )
        for index, run in tokens.items()
        if run
    ]
