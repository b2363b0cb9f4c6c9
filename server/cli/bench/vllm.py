"""A target that speaks vLLM's engine service (`vllm serve --grpc`): token ids in, token ids out."""

import itertools
import uuid
from collections.abc import AsyncIterator

from pathfox.foreign import vllm_engine_pb2 as pb
from pathfox.foreign import vllm_engine_pb2_grpc
from server.cli.bench.connection import ASK_TIMEOUT_S, Connection, grpc_errors_as_failures
from server.cli.bench.recording import Usage
from server.cli.bench.target import Ask, Codec, Heard, Served
from server.errors import ConfigError

SEED_MASK = (1 << 31) - 1


class VllmTarget:
    """Calls `vllm.grpc.engine.VllmEngine`. It serves one model, and has no call to tokenise."""

    def __init__(self, connection: Connection, *, tokenizer: Codec | None = None) -> None:
        self._metadata = connection.metadata
        self._tokenizer = tokenizer
        self._stubs = [vllm_engine_pb2_grpc.VllmEngineStub(channel) for channel in connection.channels]
        self._next_stub = itertools.cycle(self._stubs)

    async def served(self) -> Served:
        """Ask for the model's card."""
        request = pb.GetModelInfoRequest()
        with grpc_errors_as_failures():
            model = await self._stubs[0].GetModelInfo(request, timeout=ASK_TIMEOUT_S, metadata=self._metadata)
        return Served(model.served_model_name or model.model_path, model.vocab_size, model.max_context_length)

    async def tokens_of(self, text: str) -> list[int]:
        """Tokenise here."""
        if self._tokenizer is None:
            raise ConfigError("--tokenizer: got none, want the model's tokenizer.json: this server tokenises no --text")
        return self._tokenizer.encode(text, allow_special=False)

    async def answer(self, ask: Ask, *, timeout_s: float) -> AsyncIterator[Heard]:
        """Stream one generation."""
        request = pb.GenerateRequest(
            request_id=uuid.uuid4().hex,
            tokenized=pb.TokenizedInput(input_ids=ask.prompt),
            sampling_params=pb.SamplingParams(
                temperature=ask.temperature,
                max_tokens=ask.max_tokens,
                ignore_eos=ask.ignore_eos,
                seed=ask.seed & SEED_MASK,
            ),
            stream=True,
        )
        num_tokens = 0
        stream = next(self._next_stub).Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            with grpc_errors_as_failures():
                async for message in stream:
                    match message.WhichOneof("response"):
                        case "chunk":
                            num_tokens += len(message.chunk.token_ids)
                            yield Heard(num_tokens)
                        case "complete":
                            seen = message.complete
                            usage = Usage(seen.prompt_tokens, seen.completion_tokens, seen.cached_tokens)
                            yield Heard(num_tokens, usage=usage)
        finally:
            stream.cancel()
