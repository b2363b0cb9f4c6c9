"""The rules of a conversation: what to send for a turn, and when its answer is over. Does no I/O."""

from collections.abc import Sequence
from typing import Final

from pathfox.client._calls import ChatMessage, GenerateOptions, generate_request, write_messages
from pathfox.client._events import Event, Finished
from pathfox.v1 import generation_pb2 as pb

CANCEL_TURN: Final = pb.ChatRequest(cancel_turn=pb.CancelTurn())
HANG_UP_S: Final = 1.0
"""How long a conversation that nobody speaks in waits for the server's goodbye, before it is cancelled instead."""


class Turns:
    """Follows one `Chat` call: its first turn opens it, each further one adds messages."""

    def __init__(self, options: GenerateOptions) -> None:
        if "text" in options or "token_ids" in options:
            raise TypeError("a chat begins with messages, if with anything")
        self.number = 0
        """Of turns so far."""
        self._options = options
        self._num_choices = options.get("n") or 1
        self._unfinished = 0
        self._is_cancelled = False

    @property
    def is_answering(self) -> bool:
        """An answer is in flight."""
        return self._unfinished > 0

    def next_turn(self, said: str | Sequence[ChatMessage]) -> pb.ChatRequest:
        """Write what somebody says; text is a user's message. Only when no answer is in flight."""
        messages: Sequence[ChatMessage] = [("user", said)] if isinstance(said, str) else said
        if self.number:
            request = pb.ChatRequest(turn=write_messages(messages))
        else:
            before = self._options.get("messages", ())
            request = pb.ChatRequest(open=generate_request({**self._options, "messages": [*before, *messages]}))
        self.number += 1
        self._unfinished = self._num_choices
        self._is_cancelled = False
        return request

    def cancel(self) -> bool:
        """Tell whether the server should be asked to end the answer: there is one, and it was not asked yet."""
        should_ask = self.is_answering and not self._is_cancelled
        self._is_cancelled = True
        return should_ask

    def observe(self, event: Event) -> None:
        """Take note of an event of the answer."""
        if isinstance(event, Finished):
            self._unfinished -= 1

    def broken(self) -> None:
        """Note that the call has ended: no answer is in flight any more."""
        self._unfinished = 0
