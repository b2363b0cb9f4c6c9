"""ModelService: what is served, its tokenizer, and its judgement of a text."""

from typing import TypeVar

from pathfox.v1 import model_pb2 as pb
from pathfox.v1 import model_pb2_grpc
from server.errors import Internal, InvalidRequest
from server.frontend import frames, wire
from server.frontend.caller import caller_of
from server.frontend.generations import Generations
from server.frontend.interceptor import Context
from server.frontend.models import Models, ServedModel
from server.frontend.requests import Prompt, StartedEvent
from server.frontend.sampling import resolve_score

Reply = TypeVar("Reply", pb.TokenizeResponse, pb.DetokenizeResponse)

MAX_CONTEXTS = 4
"""Tokenize and Detokenize take so many of the model's contexts: enough to see by how much a text is too long."""
BYTES_PER_TOKEN = 16
"""Of a message: an id, the text, and their frames, as tokens usually are."""


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Public RPCs about models."""

    def __init__(self, models: Models, generations: Generations, *, max_message_bytes: int) -> None:
        self._models = models
        self._generations = generations
        self._max_message_bytes = max_message_bytes

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: ARG002, N802
        """Describe every model."""
        return pb.ListModelsResponse(
            models=[frames.write_model(each, max_message_bytes=self._max_message_bytes) for each in self._models]
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: ARG002, N802
        """Describe one model."""
        model = self._models.resolve(request.model)
        return pb.GetModelResponse(model=frames.write_model(model, max_message_bytes=self._max_message_bytes))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: ARG002, N802
        """Make the token ids that Generate would use."""
        model = self._models.resolve(request.model)
        model.need_tokenizer()
        prompt: Prompt
        match request.WhichOneof("input"):
            case "text":
                prompt = request.text
            case "messages":
                checks = wire.Checks()
                prompt = wire.read_messages(request.messages.messages, "messages.messages", checks)
                checks.raise_if_any()
            case _:
                raise InvalidRequest.of("input", seen="nothing", limit="text or messages")
        prompts = self._generations.prompts

        async def tokenize() -> pb.TokenizeResponse:
            most = MAX_CONTEXTS * model.info.context_length_tokens
            token_ids = await prompts.encode(model, prompt, most_tokens=most)
            self._check_number(len(token_ids), "input", model)
            return pb.TokenizeResponse(token_ids=token_ids, tokens=await prompts.spell(model, token_ids))

        return self._fitting(await self._generations.bounded(tokenize), "input")

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: ARG002, N802
        """Turn token ids into text."""
        model = self._models.resolve(request.model)
        model.need_tokenizer()
        self._check_number(len(request.token_ids), "token_ids", model)
        checks = wire.Checks()
        wire.check_token_ids(request.token_ids, "token_ids", model, checks)
        checks.raise_if_any()
        token_ids, prompts = tuple(request.token_ids), self._generations.prompts
        text = await self._generations.bounded(lambda: prompts.decode(model, token_ids))
        return self._fitting(pb.DetokenizeResponse(text=text), "token_ids")

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # noqa: N802
        """Report how probable the model finds a text: a generation of no tokens."""
        scored = wire.read_score(request, self._models)

        async def encode() -> tuple[int, ...]:
            token_ids = await self._generations.prompts.encode(scored.model, scored.prompt)
            if len(token_ids) < 2:
                seen = f"{len(token_ids)} tokens"
                raise InvalidRequest.of("input", seen=seen, limit="at least 2: the first one has no probability")
            return token_ids

        started: StartedEvent | None = None
        async with self._generations.start(
            scored,
            caller_of(context),
            encode=encode,
            resolve=resolve_score,
        ) as generation:
            async for event in generation:
                if isinstance(event, StartedEvent):
                    started = event
            token_ids = generation.prompt_token_ids
        if started is None or len(started.prompt_logprobs) != len(token_ids) - 1:
            raise Internal("the token source did not score every token")
        return frames.write_score(token_ids, started, num_top=request.top_logprobs)

    def _check_number(self, seen: int, field: str, model: ServedModel) -> None:
        """Bound what the event loop has to write or read for one caller."""
        most = MAX_CONTEXTS * model.info.context_length_tokens
        most = max(1, min(most, self._max_message_bytes // BYTES_PER_TOKEN))
        if seen > most:
            raise InvalidRequest.of(field, seen=f"{seen} tokens", limit=f"at most {most}; send it in parts")

    def _fitting(self, reply: Reply, field: str) -> Reply:
        """Refuse a reply that a client with our own limit could not take."""
        size, limit = reply.ByteSize(), self._max_message_bytes
        if size > limit:
            raise InvalidRequest.of(field, seen=f"a reply of {size} bytes", limit=f"at most {limit}; send it in parts")
        return reply
