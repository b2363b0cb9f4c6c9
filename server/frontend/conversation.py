"""One live conversation of the `Chat` call: its token ids, its messages, and the answer in flight.

The exact ids of everything said are kept: an answer's own ids are never tokenised again. Two tasks share it: one reads
what the client sends, the handler answers.

A turn that is cancelled stays said, with as much of an answer as there was. When that happens before its prompt was
encoded, its messages and an empty answer are encoded with the next turn: the conversation goes on as it would if the
cancellation had come a moment later, and messages still take turns, as some templates insist.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from pathfox.v1 import generation_pb2 as pb
from server.errors import InvalidRequest
from server.frontend import wire
from server.frontend.caller import Caller
from server.frontend.generation import Generation
from server.frontend.generations import Encode, Generations, draining
from server.frontend.models import Models
from server.frontend.requests import ClientRequest, DeltaEvent, FinishedEvent, GenerationEvent
from server.text.template import ChatMessage

Turn = tuple[ChatMessage, ...]


class Conversation:
    """Opened by the first action; each turn adds messages, and an answer."""

    def __init__(self, models: Models, generations: Generations, caller: Caller) -> None:
        self._models = models
        self._generations = generations
        self._caller = caller
        self._request: ClientRequest | None = None
        self._messages: Turn = ()
        self._token_ids: tuple[int, ...] = ()
        """Exact, of the first `_num_encoded` messages, of which the last is an answer; empty before the first one."""
        self._num_encoded = 0
        self._turns: asyncio.Queue[Turn | BaseException | None] = asyncio.Queue()
        self._generation: Generation | None = None
        self._is_busy = False
        """From a turn's arrival to its answer's end; the generation begins a little later."""
        self._is_cancel_pending = False
        self._error: Exception | None = None

    async def read(self, actions: AsyncIterator[pb.ChatRequest]) -> None:
        """Follow what the client sends, until it sends no more. What is wrong ends the conversation."""
        try:
            async for action in actions:
                self._take(action)
        except Exception as error:  # noqa: BLE001 raised again by the handler, in the task that can answer for it
            self._error = error
            if self._generation is not None:
                self._generation.fail(error)
            self._turns.put_nowait(error)
        else:
            self._turns.put_nowait(None)

    async def follow_drain(self) -> None:
        """End the conversation between two turns when the front end drains."""
        await self._generations.draining()
        self._turns.put_nowait(draining())

    async def answers(self) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events of every answer."""
        while (turn := await self._turns.get()) is not None:
            if isinstance(turn, BaseException):
                raise turn
            if self._error is not None:
                # Came after the turn, and before it began.
                raise self._error
            async with contextlib.aclosing(self._answer(turn)) as events:
                async for event in events:
                    yield event

    def _take(self, action: pb.ChatRequest) -> None:
        kind = action.WhichOneof("action")
        if self._request is None:
            if kind != "open":
                raise InvalidRequest.of("action", seen=kind or "nothing", limit="open, as the first action of a Chat")
            self._open(action.open)
            return
        match kind:
            case "turn":
                if self._is_busy:
                    raise InvalidRequest.of("turn", seen="a turn", limit="a turn after the answer before has ended")
                checks = wire.Checks()
                messages = wire.read_messages(action.turn.messages, "turn.messages", checks)
                checks.raise_if_any()
                self._add(messages)
            case "cancel_turn":
                # The answer may just have ended: then there is nothing to cancel. Or it is still to begin.
                if self._generation is not None:
                    self._generation.cancel()
                else:
                    self._is_cancel_pending = self._is_busy
            case _:
                raise InvalidRequest.of("action", seen=kind or "nothing", limit="turn or cancel_turn, once it is open")

    def _open(self, message: pb.GenerateRequest) -> None:
        request = wire.read_request(message, self._models, is_chat=True)
        request.model.need_template()
        self._request = request
        if isinstance(request.prompt, str):
            self._add((ChatMessage("user", request.prompt),))
            return
        messages = tuple(each for each in request.prompt or () if isinstance(each, ChatMessage))
        if any(each.role == "user" for each in messages):
            self._add(messages)
        else:
            self._messages = messages

    def _add(self, messages: Turn) -> None:
        self._is_busy = True
        self._turns.put_nowait(messages)

    async def _answer(self, turn: Turn) -> AsyncGenerator[GenerationEvent, None]:
        assert self._request is not None, "opened before the first turn"
        texts: list[str] = []
        token_ids: list[int] = []
        wants_ids = self._request.return_token_ids
        # The ids are needed to go on, whether the client wants them or not.
        request = replace(self._request, return_token_ids=True)
        async with self._generations.start(
            request, self._caller, encode=self._encoding(turn), received_s=time.monotonic()
        ) as generation:
            self._generation = generation
            if self._is_cancel_pending:
                self._is_cancel_pending = False
                generation.cancel()
            async for event in generation:
                if isinstance(event, DeltaEvent):
                    texts.append(event.text)
                    token_ids.extend(event.token_ids)
                    yield event if wants_ids else replace(event, token_ids=())
                    continue
                if isinstance(event, FinishedEvent):
                    # Before the client can know: it may send its next turn at once.
                    self._generation = None
                    self._messages = (*self._messages, *turn, ChatMessage("assistant", "".join(texts)))
                    if generation.prompt_token_ids:
                        self._token_ids = (*generation.prompt_token_ids, *token_ids)
                        self._num_encoded = len(self._messages)
                    self._is_busy = False
                yield event

    def _encoding(self, turn: Turn) -> Encode:
        assert self._request is not None, "opened before the first turn"
        model, prompts, said = self._request.model, self._generations.prompts, self._token_ids
        known, new = self._messages[: self._num_encoded], (*self._messages[self._num_encoded :], *turn)

        async def encode() -> tuple[int, ...]:
            if not said:
                return await prompts.encode(model, new)
            # The answer is the last message; what the template writes for it is in `said` already.
            return said + await prompts.encode_turn(model, known[:-1], new)

        return encode


@contextlib.asynccontextmanager
async def hold(
    models: Models, generations: Generations, caller: Caller, actions: AsyncIterator[pb.ChatRequest]
) -> AsyncIterator[Conversation]:
    """Hold a conversation for as long as the body answers it."""
    conversation = Conversation(models, generations, caller)
    tasks = [asyncio.create_task(conversation.read(actions)), asyncio.create_task(conversation.follow_drain())]
    try:
        yield conversation
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
