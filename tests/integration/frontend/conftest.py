"""A front end on a free port, over a scripted token source and a tokenizer of bytes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import tokenizers
from google.rpc import error_details_pb2, status_pb2

from pathfox.v1 import admin_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2_grpc
from server.config import Config, load_config
from server.engine.scripted import ScriptedSource
from server.frontend.models import Models, ServedModel
from server.frontend.server import FrontEnd
from server.messages import Load, ModelInfo, TokenSource
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT_LENGTH = 4096


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer whose tokens are bytes, and two control tokens."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return Tokenizer(core, special_tokens={"eos_token": SPECIAL[1]}, path="test")


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    """Return a text's token ids: one for each byte."""
    return TOKENIZER.encode(text, allow_special=True)


def saying(text: str, **options: Any) -> ScriptedSource:  # noqa: ANN401 ScriptedSource's own
    """Make a source that says a text and stops."""
    return ScriptedSource(ids(text), vocabulary_size=TOKENIZER.vocabulary_size, **options)


def rambling(**options: Any) -> ScriptedSource:  # noqa: ANN401 ScriptedSource's own
    """Make a source that says abcabc... without an end."""
    letters = ids("abc")
    return ScriptedSource(
        lambda _seed, _index, position: letters[position % 3],
        vocabulary_size=TOKENIZER.vocabulary_size,
        context_length_tokens=CONTEXT_LENGTH,
        **options,
    )


def served(
    source: TokenSource,
    *,
    name: str = "m",
    has_text: bool = True,
    load: Callable[[], Load] = Load,
    template: str = CHATML,
) -> ServedModel:
    """Describe a model over a source."""
    info = ModelInfo(
        name=name,
        version="1",
        family="test",
        mixer="rope",
        context_length_tokens=CONTEXT_LENGTH,
        vocabulary_size=TOKENIZER.vocabulary_size,
        num_layers=1,
        num_parameters=1,
        fingerprint="scripted",
        is_row_invariant=True,
        page_size_tokens=16,
        page_bytes=1,
        eos_token_ids=tuple(ids(SPECIAL[1])),
        aliases=(f"{name}-alias",),
        generation_defaults={"temperature": 0.5, "top_k": 7},
    )
    return ServedModel(
        info,
        source,
        load,
        TOKENIZER if has_text else None,
        ChatTemplate(template, special_tokens=TOKENIZER.special_tokens) if has_text else None,
    )


@dataclass
class Failure:
    """How a call failed."""

    code: grpc.StatusCode
    message: str
    trailers: dict[str, str | bytes]
    details: dict[str, Any] = field(default_factory=dict)
    """By the short name of their type."""

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> "Failure":
        trailers = dict(error.trailing_metadata() or ())
        status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
        failure = cls(error.code(), error.details() or "", trailers)
        for packed in status.details:
            name = packed.type_url.rsplit(".", 1)[1]
            detail = getattr(error_details_pb2, name)()
            packed.Unpack(detail)
            failure.details[name] = detail
        return failure

    @property
    def fields(self) -> list[str]:
        return [each.field for each in self.details["BadRequest"].field_violations]


async def failing(call: Awaitable[object]) -> Failure:
    """Await a call that fails and return how; streams are read to their end."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall | grpc.aio.StreamStreamCall):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return Failure.of(error)
    pytest.fail("the call succeeded")


@dataclass
class World:
    """A running front end and stubs to it."""

    front_end: FrontEnd
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.front_end.port}"

    async def settle(self) -> None:
        """Wait until nothing of any request is left, and check that nothing leaks."""
        generations = self.front_end.generations
        async with asyncio.timeout(10):
            await generations.wait_idle()
            while tasks := generation_tasks():
                await asyncio.wait(tasks)
        assert generations.admission.bulkheads.running_tokens == 0
        assert generations.admission.bulkheads.by_tenant == {}


def generation_tasks() -> list[asyncio.Task[Any]]:
    """Return the tasks of running requests."""
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("generation-")]


@asynccontextmanager
async def serving(
    *models: ServedModel, options: dict[str, Any] | None = None, channel_options: Sequence[tuple[str, Any]] = ()
) -> AsyncIterator[World]:
    """Run a front end for the body; afterwards nothing may be left of any request."""
    config: Config = load_config(
        options={"server.port": 0, "server.drain_grace_s": 0.2, **(options or {})}, environment={}
    )
    front_end = FrontEnd(config, Models(models))
    port = await front_end.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(channel_options)) as channel:
        world = World(front_end, channel)
        try:
            yield world
            await world.settle()
        finally:
            await front_end.stop()


async def read(call: AsyncIterator[generation_pb2.GenerateResponse]) -> list[generation_pb2.GenerateResponse]:
    """Read a stream to its end."""
    return [frame async for frame in call]


def text_of(frames: Sequence[generation_pb2.GenerateResponse], index: int = 0) -> str:
    """Join the text of one completion."""
    return "".join(frame.delta.text for frame in frames if frame.index == index)


def pytest_configure() -> None:
    """Make the helpers importable by the tests beside this file, which are no package."""


@pytest.fixture
def kit() -> Any:  # noqa: ANN401 a module
    """Return this module."""
    import sys  # noqa: PLC0415 a conftest has no name to import it by

    return sys.modules[__name__]
