"""The asyncio client. What it sends and how it reads answers lies in `_calls.py`; here is only the waiting."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol, Self, Unpack

import grpc
import grpc.aio

from pathfox.client import _calls
from pathfox.client._calls import (
    Call,
    CallOptions,
    ChatMessage,
    GenerateOptions,
    ReplyT,
    ResultT,
    ScoreOptions,
    TokenizeOptions,
)
from pathfox.client._connection import Connection, Tls
from pathfox.client._errors import cancelled, error_from, read_failure
from pathfox.client._events import Completion, Delta, Event, read_event
from pathfox.client._retry import Attempts, Budget, Retry
from pathfox.client._turns import CANCEL_TURN, HANG_UP_S, Turns
from pathfox.v1 import admin_pb2, model_pb2
from pathfox.v1 import generation_pb2 as pb


class _Frames(Protocol):
    """What grpc gives for a call that streams answers."""

    def __aiter__(self) -> AsyncIterator[pb.GenerateResponse]: ...
    def cancel(self) -> bool: ...


class AsyncGeneration(AsyncIterator[Event]):
    """The events of one generation, as they come. The call is sent when the first is asked for.

    Ends after the last `Finished`. Closing it, leaving its `async with`, or cancelling the task that waits in it
    cancels the call.
    """

    def __init__(self, send: Callable[[float | None], _Frames], attempts: Attempts, request_id: str) -> None:
        self.request_id = request_id
        """What `AsyncClient.cancel` wants."""
        self._line = _Line()
        self._is_waited_for = False
        self._events = _run(send, attempts, self._line)

    async def __anext__(self) -> Event:
        self._is_waited_for = True
        try:
            return await anext(self._events)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._line.is_cut and task is not None and not task.cancelling():
                raise cancelled() from None  # another task closed it; this one was not cancelled
            raise
        finally:
            self._is_waited_for = False

    async def texts(self) -> AsyncGenerator[str, None]:
        """Iterate over the new text only. For generations with one completion."""
        async for event in self:
            if isinstance(event, Delta):
                yield event.text

    async def aclose(self) -> None:
        """Cancel the call, if it is still going on."""
        self._line.cut()
        if not self._is_waited_for:
            await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Line:
    """What a generation and the loop that reads it share. The loop holds no more: dropping a generation ends it."""

    def __init__(self) -> None:
        self.frames: _Frames | None = None
        self.is_cut = False

    def cut(self) -> None:
        self.is_cut = True
        if self.frames is not None:
            self.frames.cancel()


async def _run(send: Callable[[float | None], _Frames], attempts: Attempts, line: _Line) -> AsyncGenerator[Event, None]:
    wait_s = 0.0
    while not line.is_cut:
        line.frames = frames = send(attempts.remaining_s())
        try:
            async for frame in frames:
                attempts.begun()
                event = read_event(frame)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            wait_s = attempts.wait_s(error)
        else:
            attempts.succeeded()
            return
        finally:
            frames.cancel()
        await asyncio.sleep(wait_s)


class AsyncChat:
    """One live conversation over one call. Made by `AsyncClient.chat`; use it as an async context manager."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[pb.ChatRequest, pb.GenerateResponse]", turns: Turns) -> None:
        self._turns = turns
        self._call = call

    async def send(self, said: str | Sequence[ChatMessage]) -> AsyncGenerator[Event, None]:
        """Say something, and iterate over the events of the answer.

        Text is a user's message. An answer that is still going on is cancelled first; so is one whose iterator closes.
        """
        if self._turns.is_answering:
            await self.cancel_turn()
            while self._turns.is_answering:
                await self._next_event()
        request = self._turns.next_turn(said)
        number = self._turns.number
        await self._write(request)
        try:
            while self._turns.is_answering and self._turns.number == number:
                event = await self._next_event()
                if event is not None:
                    yield event
        finally:
            if self._turns.number == number:
                await self.cancel_turn()

    async def cancel_turn(self) -> None:
        """End the answer in flight; its events end with `FinishReason.CANCELLED`."""
        if self._turns.cancel():
            await self._write(CANCEL_TURN)

    async def aclose(self) -> None:
        """End the conversation, and the answer in flight."""
        is_answering = self._turns.is_answering
        self._turns.broken()
        if not is_answering and not self._call.done():
            with contextlib.suppress(TimeoutError, grpc.RpcError, asyncio.InvalidStateError):
                async with asyncio.timeout(HANG_UP_S):
                    await self._call.done_writing()
                    await self._call.code()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _write(self, request: pb.ChatRequest) -> None:
        try:
            await self._call.write(request)
        except grpc.RpcError as error:
            self._turns.broken()
            raise error_from(read_failure(error)) from error
        except asyncio.InvalidStateError:  # the server has ended the call; reading tells how
            await self._next_event()

    async def _next_event(self) -> Event | None:
        try:
            frame = await self._call.read()
        except grpc.RpcError as error:
            self._turns.broken()
            raise error_from(read_failure(error)) from error
        if not isinstance(frame, pb.GenerateResponse):  # the end
            self._turns.broken()
            return None
        event = read_event(frame)
        if event is not None:
            self._turns.observe(event)
        return event


class AsyncClient:
    """A connection to a Pathfox server, for asyncio. Make it where the event loop runs.

    Args:
        address: `host:port`.
        token: Bearer token, where the server wants one. It travels in the clear unless there is `tls`.
        tls: True = encrypted, trusting the usual authorities; a `Tls` for anything more particular.
        retry: How patient to be; when a call is sent again is told in the package's README.
    """

    def __init__(
        self, address: str, *, token: str | None = None, tls: Tls | bool = False, retry: Retry | None = None
    ) -> None:
        connection = Connection(address, token, tls)
        self._channel = connection.open_async()
        self._metadata = connection.metadata
        self._retry = retry or Retry()
        self._budget = Budget()

    async def close(self) -> None:
        """Cancel what is going on, and hang up."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def generate(self, **options: Unpack[GenerateOptions]) -> AsyncGeneration:
        """Stream one generation."""
        return self._stream(_calls.generate(options))

    async def generate_once(self, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate, and return the whole at the end."""
        return await self._call(_calls.generate_once(options))

    def chat(self, **options: Unpack[GenerateOptions]) -> AsyncChat:
        """Hold one live conversation; `messages` come before its first turn (a system message, say)."""
        turns = Turns(options)
        method = self._channel.stream_stream(
            _calls.CHAT,
            request_serializer=pb.ChatRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        timeout_s = options.get("timeout_s")
        return AsyncChat(method(None, timeout=timeout_s, metadata=self._metadata), turns)

    def resume(
        self, request_id: str, *, after: Mapping[int, int] | None = None, **options: Unpack[CallOptions]
    ) -> AsyncGeneration:
        """Go on with a durable stream; `after` is the last `sequence` seen, by index."""
        return self._stream(_calls.resume(request_id, after or {}, options))

    async def cancel(self, request_id: str, **options: Unpack[CallOptions]) -> bool:
        """End a request. False = nothing of that id was running."""
        return await self._call(_calls.cancel(request_id, options))

    async def models(self, **options: Unpack[CallOptions]) -> tuple[model_pb2.Model, ...]:
        """List the models that the server answers for."""
        return await self._call(_calls.models(options))

    async def model(self, name: str | None = None, **options: Unpack[CallOptions]) -> model_pb2.Model:
        """Describe one model; unnamed, the only or the default one."""
        return await self._call(_calls.model(name, options))

    async def tokenize(self, **options: Unpack[TokenizeOptions]) -> model_pb2.TokenizeResponse:
        """Turn text or messages into the token ids that `generate` would use."""
        return await self._call(_calls.tokenize(options))

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str | None = None, **options: Unpack[CallOptions]
    ) -> str:
        """Turn token ids into text."""
        return await self._call(_calls.detokenize(token_ids, model, options))

    async def score(self, **options: Unpack[ScoreOptions]) -> model_pb2.ScoreResponse:
        """Ask how probable the model finds a text."""
        return await self._call(_calls.score(options))

    async def status(self, **options: Unpack[CallOptions]) -> admin_pb2.GetStatusResponse:
        """Ask for load, limits and health. Admins only, as all that follows."""
        return await self._call(_calls.status(options))

    async def drain(self, *, grace_s: float | None = None, **options: Unpack[CallOptions]) -> admin_pb2.DrainResponse:
        """Make the server stop accepting and finish what it has; returns when that is done."""
        return await self._call(_calls.drain(grace_s, options))

    async def set_traffic(
        self, model: str, weights_percent: Mapping[str, int], **options: Unpack[CallOptions]
    ) -> dict[str, int]:
        """Set how new requests are spread over the versions of a model."""
        return await self._call(_calls.set_traffic(model, weights_percent, options))

    async def replicas(self, **options: Unpack[CallOptions]) -> tuple[admin_pb2.Replica, ...]:
        """List the replicas behind the front end."""
        return await self._call(_calls.replicas(options))

    async def circuits(self, **options: Unpack[CallOptions]) -> tuple[admin_pb2.Circuit, ...]:
        """List the circuit breakers of the front end."""
        return await self._call(_calls.circuits(options))

    async def reset_circuit(self, name: str, **options: Unpack[CallOptions]) -> admin_pb2.Circuit:
        """Close a circuit breaker by hand."""
        return await self._call(_calls.reset_circuit(name, options))

    async def _call(self, call: Call[ReplyT, ResultT]) -> ResultT:
        method = self._channel.unary_unary(
            call.method,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply.FromString,
        )
        attempts = Attempts(self._retry, self._budget, call.repeat, call.timeout_s)
        while True:
            try:
                reply = await method(call.request, timeout=attempts.remaining_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.wait_s(error))
            else:
                attempts.succeeded()
                return call.read(reply)

    def _stream(self, call: Call[pb.GenerateResponse, Event | None]) -> AsyncGeneration:
        method = self._channel.unary_stream(
            call.method,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply.FromString,
        )
        attempts = Attempts(self._retry, self._budget, call.repeat, call.timeout_s)
        return AsyncGeneration(
            lambda timeout_s: method(call.request, timeout=timeout_s, metadata=self._metadata),
            attempts,
            call.request_id,
        )
