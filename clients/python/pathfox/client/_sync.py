"""The blocking client. What it sends and how it reads answers lies in `_calls.py`; here is only the waiting."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Protocol, Self, Unpack

import grpc

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
from pathfox.client._errors import error_from, read_failure
from pathfox.client._events import Completion, Delta, Event, read_event
from pathfox.client._retry import Attempts, Budget, Retry
from pathfox.client._turns import CANCEL_TURN, HANG_UP_S, Turns
from pathfox.v1 import admin_pb2, model_pb2
from pathfox.v1 import generation_pb2 as pb


class _Frames(Protocol):
    """What grpc gives for a call that streams answers."""

    def __iter__(self) -> Iterator[pb.GenerateResponse]: ...
    def cancel(self) -> bool: ...
    def add_callback(self, callback: Callable[[], None]) -> bool: ...


class Generation(Iterator[Event]):
    """The events of one generation, as they come. The call is sent when the first is asked for.

    Ends after the last `Finished`. Closing it (or leaving its `with`, or dropping it) cancels the call; another thread
    may close it too. A call that was not closed has no other time limit than `timeout_s`.
    """

    def __init__(self, send: Callable[[float | None], _Frames], attempts: Attempts, request_id: str) -> None:
        self.request_id = request_id
        """What `Client.cancel` wants."""
        self._line = _Line()
        self._events = _run(send, attempts, self._line)

    def __next__(self) -> Event:
        return next(self._events)

    def texts(self) -> Iterator[str]:
        """Iterate over the new text only. For generations with one completion."""
        return (event.text for event in self if isinstance(event, Delta))

    def close(self) -> None:
        """Cancel the call, if it is still going on."""
        self._line.cut()
        with contextlib.suppress(ValueError):  # another thread is waiting in it, and is woken by the cancellation
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Line:
    """What a generation and the loop that reads it share. The loop holds no more: dropping a generation ends it."""

    def __init__(self) -> None:
        self.frames: _Frames | None = None
        self.is_cut = threading.Event()

    def cut(self) -> None:
        self.is_cut.set()
        if self.frames is not None:
            self.frames.cancel()


def _run(send: Callable[[float | None], _Frames], attempts: Attempts, line: _Line) -> Generator[Event, None, None]:
    wait_s = 0.0
    while not line.is_cut.wait(wait_s):
        line.frames = frames = send(attempts.remaining_s())
        try:
            for frame in frames:
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


class Chat:
    """One live conversation over one call. Made by `Client.chat`; use it as a context manager."""

    def __init__(self, open_call: Callable[[Iterator[pb.ChatRequest]], _Frames], turns: Turns) -> None:
        self._turns = turns
        self._outgoing: queue.SimpleQueue[pb.ChatRequest | None] = queue.SimpleQueue()
        self._call = open_call(iter(self._outgoing.get, None))
        self._frames = iter(self._call)

    def send(self, said: str | Sequence[ChatMessage]) -> Iterator[Event]:
        """Say something, and iterate over the events of the answer.

        Text is a user's message. An answer that is still going on is cancelled first; so is one whose iterator closes.
        """
        if self._turns.is_answering:
            self.cancel_turn()
            while self._turns.is_answering:
                self._next_event()
        self._outgoing.put(self._turns.next_turn(said))
        return self._answer(self._turns.number)

    def cancel_turn(self) -> None:
        """End the answer in flight; its events end with `FinishReason.CANCELLED`."""
        if self._turns.cancel():
            self._outgoing.put(CANCEL_TURN)

    def close(self) -> None:
        """End the conversation, and the answer in flight."""
        self._outgoing.put(None)
        ended = threading.Event()
        if not self._turns.is_answering and self._call.add_callback(ended.set):
            ended.wait(HANG_UP_S)
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, number: int) -> Generator[Event, None, None]:
        try:
            while self._turns.is_answering and self._turns.number == number:
                event = self._next_event()
                if event is not None:
                    yield event
        finally:
            if self._turns.number == number:
                self.cancel_turn()

    def _next_event(self) -> Event | None:
        try:
            event = read_event(next(self._frames))
        except grpc.RpcError as error:
            self._turns.broken()
            raise error_from(read_failure(error)) from error
        except StopIteration:
            self._turns.broken()
            return None
        if event is not None:
            self._turns.observe(event)
        return event


class Client:
    """A connection to a Pathfox server, for code that waits. May be shared by threads.

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
        self._channel = connection.open()
        self._metadata = connection.metadata
        self._retry = retry or Retry()
        self._budget = Budget()

    def close(self) -> None:
        """Cancel what is going on, and hang up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """Stream one generation."""
        return self._stream(_calls.generate(options))

    def generate_once(self, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate, and return the whole at the end."""
        return self._call(_calls.generate_once(options))

    def chat(self, **options: Unpack[GenerateOptions]) -> Chat:
        """Hold one live conversation; `messages` come before its first turn (a system message, say)."""
        turns = Turns(options)
        method = self._channel.stream_stream(
            _calls.CHAT,
            request_serializer=pb.ChatRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        timeout_s = options.get("timeout_s")
        return Chat(lambda outgoing: method(outgoing, timeout=timeout_s, metadata=self._metadata), turns)

    def resume(
        self, request_id: str, *, after: Mapping[int, int] | None = None, **options: Unpack[CallOptions]
    ) -> Generation:
        """Go on with a durable stream; `after` is the last `sequence` seen, by index."""
        return self._stream(_calls.resume(request_id, after or {}, options))

    def cancel(self, request_id: str, **options: Unpack[CallOptions]) -> bool:
        """End a request. False = nothing of that id was running."""
        return self._call(_calls.cancel(request_id, options))

    def models(self, **options: Unpack[CallOptions]) -> tuple[model_pb2.Model, ...]:
        """List the models that the server answers for."""
        return self._call(_calls.models(options))

    def model(self, name: str | None = None, **options: Unpack[CallOptions]) -> model_pb2.Model:
        """Describe one model; unnamed, the only or the default one."""
        return self._call(_calls.model(name, options))

    def tokenize(self, **options: Unpack[TokenizeOptions]) -> model_pb2.TokenizeResponse:
        """Turn text or messages into the token ids that `generate` would use."""
        return self._call(_calls.tokenize(options))

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None, **options: Unpack[CallOptions]) -> str:
        """Turn token ids into text."""
        return self._call(_calls.detokenize(token_ids, model, options))

    def score(self, **options: Unpack[ScoreOptions]) -> model_pb2.ScoreResponse:
        """Ask how probable the model finds a text."""
        return self._call(_calls.score(options))

    def status(self, **options: Unpack[CallOptions]) -> admin_pb2.GetStatusResponse:
        """Ask for load, limits and health. Admins only, as all that follows."""
        return self._call(_calls.status(options))

    def drain(self, *, grace_s: float | None = None, **options: Unpack[CallOptions]) -> admin_pb2.DrainResponse:
        """Make the server stop accepting and finish what it has; returns when that is done."""
        return self._call(_calls.drain(grace_s, options))

    def set_traffic(
        self, model: str, weights_percent: Mapping[str, int], **options: Unpack[CallOptions]
    ) -> dict[str, int]:
        """Set how new requests are spread over the versions of a model."""
        return self._call(_calls.set_traffic(model, weights_percent, options))

    def replicas(self, **options: Unpack[CallOptions]) -> tuple[admin_pb2.Replica, ...]:
        """List the replicas behind the front end."""
        return self._call(_calls.replicas(options))

    def circuits(self, **options: Unpack[CallOptions]) -> tuple[admin_pb2.Circuit, ...]:
        """List the circuit breakers of the front end."""
        return self._call(_calls.circuits(options))

    def reset_circuit(self, name: str, **options: Unpack[CallOptions]) -> admin_pb2.Circuit:
        """Close a circuit breaker by hand."""
        return self._call(_calls.reset_circuit(name, options))

    def _call(self, call: Call[ReplyT, ResultT]) -> ResultT:
        method = self._channel.unary_unary(
            call.method,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply.FromString,
        )
        attempts = Attempts(self._retry, self._budget, call.repeat, call.timeout_s)
        while True:
            try:
                reply = method(call.request, timeout=attempts.remaining_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.wait_s(error))
            else:
                attempts.succeeded()
                return call.read(reply)

    def _stream(self, call: Call[pb.GenerateResponse, Event | None]) -> Generation:
        method = self._channel.unary_stream(
            call.method,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply.FromString,
        )
        attempts = Attempts(self._retry, self._budget, call.repeat, call.timeout_s)
        return Generation(
            lambda timeout_s: method(call.request, timeout=timeout_s, metadata=self._metadata),
            attempts,
            call.request_id,
        )
