"""What happens around every call, whatever its kind: one grpc interceptor that runs layers around the handler.

A layer is an async context manager over the call (`layers.py`). The handler of a stream runs as a coroutine that
writes, not as a generator that grpc pulls: so a cancellation is always raised inside the layers, which then clean up in
order and in their own task. It also costs one hop per frame instead of one for each layer.
"""

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from server import budget, telemetry
from server.errors import InvalidRequest
from server.frontend.caller import Caller, set_caller

# In quotes: grpc's classes take type arguments in their stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Deserializer = Callable[[bytes], Message]
Behaviour = Callable[[Any, Context], Awaitable[Message | None]]

MAX_REQUEST_ID_CHARACTERS = 128


class Layer(Protocol):
    """Something that happens around a call."""

    def __call__(self, caller: Caller, context: Context, /) -> contextlib.AbstractAsyncContextManager[None]:
        """Return what to enter before the handler and to leave after it."""
        ...


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # as above
    """Runs the layers, the first one outermost."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler of a method; an unknown method is left to grpc, which answers UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        # Messages are parsed inside the layers: grpc would call one that cannot be parsed UNKNOWN, and tell nobody why.
        wrap = _MAKERS[handler.request_streaming, handler.response_streaming]
        return wrap(self._around(handler, handler_call_details.method), None, handler.response_serializer)

    def _around(self, handler: Handler, method: str) -> Behaviour:
        parse: Deserializer = handler.request_deserializer or _unparsed
        read = _parse_each if handler.request_streaming else _parse
        # One of the four is set, by the kind of the method.
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def once(raw: Any, context: Context) -> Message:  # noqa: ANN401 bytes, or an iterator of them
            async with self._enter(method, context):
                response: Message = await behaviour(read(raw, parse), context)
            return response

        frames = telemetry.FRAMES.labels(method)

        async def stream(raw: Any, context: Context) -> None:  # noqa: ANN401 as above
            async with self._enter(method, context) as caller:
                responses: AsyncGenerator[Message, None] = behaviour(read(raw, parse), context)
                try:
                    async with contextlib.aclosing(responses):
                        async for response in responses:
                            begun_s = time.perf_counter()
                            await context.write(response)
                            telemetry.PHASES.add(budget.WRITE, "", time.perf_counter() - begun_s)
                            caller.num_frames += 1
                finally:
                    frames.inc(caller.num_frames)

        return stream if handler.response_streaming else once

    @contextlib.asynccontextmanager
    async def _enter(self, method: str, context: Context) -> AsyncIterator[Caller]:
        caller = _recognise(method, context)
        set_caller(caller)
        async with contextlib.AsyncExitStack() as stack:
            for layer in self._layers:
                await stack.enter_async_context(layer(caller, context))
            yield caller


_MAKERS: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def metadata_of(context: Context) -> dict[str, str]:
    """Return the text metadata of a call; of a key that came twice, the last."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _recognise(method: str, context: Context) -> Caller:
    named = metadata_of(context).get("x-request-id", "")
    is_usable = 0 < len(named) <= MAX_REQUEST_ID_CHARACTERS and named.isascii() and named.isprintable()
    return Caller(
        method=method,
        received_s=time.monotonic(),
        request_id=named if is_usable else str(uuid.uuid4()),
        is_request_id_ours=not is_usable,
        peer=context.peer(),
    )


def _unparsed(raw: bytes) -> Message:
    raise AssertionError(f"every method has messages; got {len(raw)} bytes")


def _parse(raw: bytes, parse: Deserializer) -> Message:
    try:
        return parse(raw)
    except DecodeError:
        raise InvalidRequest.of("", seen=f"{len(raw)} bytes", limit="a message of the method's request type") from None


async def _parse_each(messages: AsyncIterator[bytes], parse: Deserializer) -> AsyncIterator[Message]:
    async for raw in messages:
        yield _parse(raw, parse)
