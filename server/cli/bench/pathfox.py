"""A target that speaks `pathfox.v1`: token ids in, frames with a running count out."""

import itertools
from collections.abc import AsyncGenerator

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from server.cli.bench.connection import ASK_TIMEOUT_S, Connection, grpc_errors_as_failures
from server.cli.bench.recording import Usage
from server.cli.bench.target import Ask, Heard, Served

TOKENIZE_TIMEOUT_S = 60.0


class PathfoxTarget:
    """Calls `GenerationService` and `ModelService`.

    Args:
        connection: to the server.
        model: its name; None = the server's default.
        first_token_budget_s: within which each request wants its first token, or a refusal; None = whenever it comes.
    """

    def __init__(
        self, connection: Connection, *, model: str | None = None, first_token_budget_s: float | None = None
    ) -> None:
        self._metadata = connection.metadata
        self._budget_ms = None if first_token_budget_s is None else round(first_token_budget_s * 1e3)
        self._model = model
        stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in connection.channels]
        self._next_stub = itertools.cycle(stubs)
        self._models = model_pb2_grpc.ModelServiceStub(connection.channels[0])

    async def served(self) -> Served:
        """Ask for the model's card."""
        request = model_pb2.GetModelRequest(model=self._model)
        with grpc_errors_as_failures():
            reply = await self._models.GetModel(request, timeout=ASK_TIMEOUT_S, metadata=self._metadata)
        model = reply.model
        return Served(model.name, model.tokenizer.vocabulary_size, model.context_length_tokens)

    async def tokens_of(self, text: str) -> list[int]:
        """Let the server tokenise."""
        request = model_pb2.TokenizeRequest(model=self._model, text=text)
        with grpc_errors_as_failures():
            reply = await self._models.Tokenize(request, timeout=TOKENIZE_TIMEOUT_S, metadata=self._metadata)
        return list(reply.token_ids)

    async def answer(self, ask: Ask, *, timeout_s: float) -> AsyncGenerator[Heard, None]:
        """Stream one generation."""
        sampling = pb.SamplingParams(
            temperature=ask.temperature, max_tokens=ask.max_tokens, ignore_eos=ask.ignore_eos, seed=ask.seed
        )
        request = pb.GenerateRequest(
            model=self._model,
            token_ids=pb.TokenIds(ids=ask.prompt),
            sampling_params=sampling,
            time_to_first_token_budget_ms=self._budget_ms,
        )
        stream = next(self._next_stub).Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            with grpc_errors_as_failures():
                async for frame in stream:
                    match frame.WhichOneof("event"):
                        case "delta":
                            yield Heard(frame.sequence, frame.delta.text)
                        case "finished":
                            yield Heard(frame.sequence, usage=_usage(frame.finished.usage))
        finally:
            stream.cancel()


def _usage(seen: pb.Usage) -> Usage:
    return Usage(seen.prompt_tokens, seen.completion_tokens, seen.cached_tokens)
