"""GenerationService: check, call, map, answer. Knows proto and generations; nothing of engines, replicas or stores."""

import contextlib
from collections.abc import AsyncIterator

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import generation_pb2_grpc
from server.errors import NotSupported
from server.frontend import frames, wire
from server.frontend.caller import caller_of
from server.frontend.conversation import hold
from server.frontend.generations import Generations
from server.frontend.interceptor import Context, metadata_of
from server.frontend.models import Models
from server.frontend.requests import ClientRequest


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Public generation RPCs. Errors are raised where they are known and become statuses in one layer."""

    def __init__(self, models: Models, generations: Generations) -> None:
        self._models = models
        self._generations = generations

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        """Stream one generation."""
        async with self._generations.start(self._read(request, context), caller_of(context)) as generation:
            async for event in generation:
                yield frames.write_event(event)

    async def GenerateOnce(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateOnceResponse:  # noqa: N802
        """Answer with the whole generation at its end."""
        collected = frames.Collected()
        async with self._generations.start(self._read(request, context), caller_of(context)) as generation:
            async for event in generation:
                collected.add(event)
        return collected.answer()

    async def Chat(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ChatRequest], context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Hold one live conversation."""
        async with (
            hold(self._models, self._generations, caller_of(context), request_iterator) as conversation,
            contextlib.aclosing(conversation.answers()) as events,
        ):
            async for event in events:
                yield frames.write_event(event)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:  # noqa: ARG002, N802
        """Refuse: there is no journal to resume from."""
        raise NotSupported("this server keeps no request journal, so a stream cannot be resumed")
        yield pb.GenerateResponse()  # makes this a stream

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:  # noqa: N802
        """End a request of the caller's tenant."""
        checks = wire.Checks()
        request_id = wire.read_uuid(request.request_id, "request_id", checks)
        checks.raise_if_any()
        return pb.CancelResponse(cancelled=self._generations.cancel(caller_of(context).tenant, request_id))

    def _read(self, request: pb.GenerateRequest, context: Context) -> ClientRequest:
        key = metadata_of(context).get("idempotency-key")
        if key is not None and not request.HasField("idempotency_key"):
            request.idempotency_key = key
        return wire.read_request(request, self._models)
