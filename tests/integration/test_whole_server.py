"""Front end and engine together, over sockets: what one caller does, or stops doing, changes nobody else's bits."""

import asyncio
import contextlib
import threading
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import model_pb2
from server.cli.serve import describe
from server.config import EngineConfig, ModelConfig
from server.engine.engine import Engine
from server.engine.report import StepReport
from server.frontend.models import ServedModel
from server.messages import Event, GenerateRequest, TokenSource
from server.model.loader import load_model
from tests.fixtures.front_ends import World, failing, read, serving, until
from tests.fixtures.tiny_models import make_tiny_llama

CONTEXT_LENGTH = 512
NEIGHBOUR_TOKENS = 200
PROMPT = tuple(range(20, 90))
STEP_TOKENS = 16
MAX_NUM_SEQS = 8
POOL_TOKENS = 640
"""Little more than one context: many at once must preempt each other."""


class Watch:
    """A token source that hands everything on, and notes how each request ended."""

    def __init__(self, source: TokenSource) -> None:
        self.has_started: dict[tuple[int, ...], bool] = {}
        """By the prompt, of those that ended: whether anything came."""
        self.num_begun: Counter[tuple[int, ...]] = Counter()
        """By the prompt: requests that the engine was given."""
        self._source = source

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        has_started = False
        try:
            self.num_begun[request.prompt_token_ids] += 1
            async with contextlib.aclosing(self._source.generate(request)) as events:
                async for event in events:
                    has_started = True
                    yield event
        finally:
            self.has_started[request.prompt_token_ids] = has_started


class Gate:
    """Stands behind each step of the engine. While it is held, the compute thread waits there."""

    def __init__(self) -> None:
        self._is_held = False
        self._steps = threading.Semaphore(0)

    def __call__(self, report: StepReport) -> None:
        """Be told of a step; called on the compute thread."""
        del report
        if self._is_held:
            assert self._steps.acquire(timeout=20)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the engine for the body."""
        self._steps = threading.Semaphore(0)
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self._steps.release(1_000)

    def let(self, steps: int) -> None:
        """Let the engine take so many steps."""
        self._steps.release(steps)


@dataclass
class Whole:
    """A running server over a real engine."""

    world: World
    model: ServedModel
    watch: Watch
    gate: Gate

    def generate(
        self, prompt: Sequence[int] = PROMPT, *, timeout_s: float = 30, **sampling: object
    ) -> grpc.aio.UnaryStreamCall:
        """Begin a stream of token ids."""
        return self.world.generation.Generate(ask(prompt, **sampling), timeout=timeout_s)

    async def settle(self) -> None:
        """Wait until the engine has nothing left, and check that it holds no page."""
        await self.world.settle()
        await until(lambda: not self.held)
        assert self.model.load().queued_tokens == 0

    @property
    def held(self) -> int:
        """Count the requests and pages that the engine has."""
        load = self.model.load()
        return load.running_requests + load.waiting_requests + load.used_pages


def ask(prompt: Sequence[int] = PROMPT, **sampling: object) -> pb.GenerateRequest:
    """Make a request for token ids; greedy unless told otherwise."""
    params = pb.SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling})
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params, return_token_ids=True)


def tokens_of(frames: Sequence[pb.GenerateResponse], index: int = 0) -> list[int]:
    """Join the token ids of one completion."""
    return [token_id for frame in frames if frame.index == index for token_id in frame.delta.token_ids]


@pytest.fixture
async def whole(tmp_path: Path) -> AsyncIterator[Whole]:
    """A server over a tiny Llama with a small page pool; nothing may be left of any request afterwards."""
    loaded = load_model(make_tiny_llama(tmp_path / "tiny", config={"max_position_embeddings": CONTEXT_LENGTH}))
    pool_bytes = loaded.page_bytes * (POOL_TOKENS // loaded.spec.page_size_tokens)
    config = EngineConfig(max_num_seqs=MAX_NUM_SEQS, max_step_tokens=STEP_TOKENS, page_pool_bytes=pool_bytes)
    gate = Gate()
    async with Engine(loaded, config, observer=gate) as engine:
        info = describe(loaded, ModelConfig(name="tiny", path=tmp_path), engine)
        watch = Watch(engine)
        model = ServedModel(info, watch, engine.load)
        async with serving(model) as world:
            server = Whole(world, model, watch, gate)
            yield server
            await server.settle()


Disturbance = Callable[[Whole], Awaitable[object]]


async def bad_requests(server: Whole) -> None:
    """Send what is refused."""
    for sampling in ({"max_tokens": 0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"max_tokens": 2**31 - 1}):
        failure = await failing(server.generate(**sampling))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    for prompt in ((), (99_999,), (-1,), range(CONTEXT_LENGTH * 2)):
        failure = await failing(server.generate([token % 300 for token in prompt] if len(prompt) > 1 else prompt))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT


async def cancel_when_queued_in_the_engine(server: Whole) -> None:
    """Cancel calls that wait in the engine, behind others that fill every slot."""
    prompts = [tuple(range(start, start + 60)) for start in range(60, 64)]
    with server.gate.held():
        ahead = [server.generate(range(20, 60), max_tokens=100) for _ in range(MAX_NUM_SEQS)]
        await until(lambda: server.watch.num_begun[tuple(range(20, 60))] == MAX_NUM_SEQS)
        behind = [server.generate(prompt, max_tokens=20) for prompt in prompts]
        await until(lambda: all(server.watch.num_begun[prompt] for prompt in prompts))
        server.gate.let(3)
        await until(lambda: server.model.load().waiting_requests >= len(behind))
        await cancelled(server, behind, prompts)
    assert [len(tokens_of(await read(call))) for call in ahead] == [100] * len(ahead)


async def cancel_in_prefill(server: Whole) -> None:
    """Cancel a long prompt between two of its many steps."""
    prompt = tuple(7 * token % 300 for token in range(400))
    with server.gate.held():
        call = server.generate(prompt)
        await until(lambda: bool(server.watch.num_begun[prompt]))
        before = server.model.load().used_pages
        server.gate.let(4)
        await until(lambda: server.model.load().used_pages >= before + len(prompt) // 16)
        await cancelled(server, [call], [prompt])


async def cancelled(
    server: Whole, calls: Sequence[grpc.aio.UnaryStreamCall], prompts: Sequence[tuple[int, ...]]
) -> None:
    """Cancel calls while the engine stands still, and check that nothing had come of them."""
    for call in calls:
        call.cancel()
    await until(lambda: all(prompt in server.watch.has_started for prompt in prompts))
    assert not any(server.watch.has_started[prompt] for prompt in prompts)


async def cancel_in_decode(server: Whole) -> None:
    """Cancel streams that have sent something."""
    for call in [server.generate([5, 6, 7 + number], max_tokens=400) for number in range(3)]:
        await call.read()
        await call.read()
        call.cancel()


async def cancel_after_the_end(server: Whole) -> None:
    """Cancel what has ended."""
    call = server.generate(max_tokens=2)
    await read(call)
    call.cancel()


async def cancel_by_id(server: Whole) -> None:
    """End a stream from another call; it closes as cancelled, with what it has."""
    request = ask(max_tokens=400)
    request.request_id = str(uuid.uuid4())
    call = server.world.generation.Generate(request)
    first = [await call.read(), await call.read()]
    reply = await server.world.generation.Cancel(pb.CancelRequest(request_id=request.request_id))
    frames = [*first, *await read(call)]

    assert reply.cancelled
    assert frames[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED
    assert frames[-1].finished.usage.completion_tokens == len(tokens_of(frames)) > 0


async def deadline_in_mid_stream(server: Whole) -> None:
    """Let streams run into their deadlines: the engine stands still after their first tokens."""
    prompts = [(9, number) for number in range(3)]
    with server.gate.held():
        calls = [server.generate(prompt, max_tokens=500, timeout_s=1) for prompt in prompts]
        await until(lambda: all(server.watch.num_begun[prompt] for prompt in prompts))
        server.gate.let(20)
        await asyncio.gather(*(call.read() for call in calls))
        failures = await asyncio.gather(*(failing(call) for call in calls))

    assert {failure.code for failure in failures} == {grpc.StatusCode.DEADLINE_EXCEEDED}


async def more_than_the_pool_holds(server: Whole) -> None:
    """Run so many long streams at once that they preempt each other."""
    calls = [
        server.generate([number + 10, 11, 12], max_tokens=150, temperature=1.0, seed=number) for number in range(7)
    ]
    streams = await asyncio.gather(*(read(call) for call in calls))

    assert [len(tokens_of(frames)) for frames in streams] == [150] * 7


async def many_completions_and_reports(server: Whole) -> None:
    """Ask for several completions, log probabilities of them and of the prompt."""
    frames = await read(server.generate(n=3, temperature=1.0, seed=5, logprobs=3, prompt_logprobs=2, max_tokens=20))

    assert [len(tokens_of(frames, index)) for index in range(3)] == [20] * 3
    assert len(frames[0].started.prompt_logprobs) == len(PROMPT) - 1


DISTURBANCES: list[Disturbance] = [
    bad_requests,
    cancel_when_queued_in_the_engine,
    cancel_in_prefill,
    cancel_in_decode,
    cancel_after_the_end,
    cancel_by_id,
    deadline_in_mid_stream,
    more_than_the_pool_holds,
    many_completions_and_reports,
]


@pytest.mark.parametrize("disturb", DISTURBANCES)
async def test_neighbours_change_no_bit(whole: Whole, disturb: Disturbance) -> None:
    """Whatever happens beside it, a stream has the tokens and log probabilities that it has alone."""
    wanted = {"max_tokens": NEIGHBOUR_TOKENS, "logprobs": 1}
    alone = await read(whole.generate(**wanted))

    beside, _ = await asyncio.gather(read(whole.generate(**wanted)), disturb(whole))

    assert tokens_of(beside) == tokens_of(alone)
    assert logprobs_of(beside) == logprobs_of(alone)
    assert len(tokens_of(alone)) == NEIGHBOUR_TOKENS


def logprobs_of(frames: Sequence[pb.GenerateResponse]) -> list[float]:
    """Join the log probabilities of a stream."""
    return [each.logprob for frame in frames for each in frame.delta.logprobs]


async def test_a_reported_seed_gives_the_same_tokens_again(whole: Whole) -> None:
    """An unset seed is drawn and reported; sent again it gives the same tokens, and each index has its own."""
    first = await read(whole.generate(n=2, temperature=1.5, max_tokens=30))
    again = await read(whole.generate(n=2, temperature=1.5, max_tokens=30, seed=first[0].started.seed))

    assert [tokens_of(first, index) for index in range(2)] == [tokens_of(again, index) for index in range(2)]
    assert tokens_of(first, 0) != tokens_of(first, 1)


async def test_score_says_what_generation_says(whole: Whole) -> None:
    """Scoring prompt + completion gives the log probabilities that were reported while it was generated."""
    frames = await read(whole.generate(logprobs=0, max_tokens=20))
    whole_text = [*PROMPT, *tokens_of(frames)]
    score = await whole.world.models.Score(model_pb2.ScoreRequest(token_ids=pb.TokenIds(ids=whole_text)))

    assert list(score.logprobs[-20:]) == logprobs_of(frames)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-30},
        {"temperature": 100.0},
        {"temperature": 1.0, "top_p": 1e-38},
        {"temperature": 1.0, "min_p": 1e-38},
        {"temperature": 1.0, "min_p": 1.0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "logit_bias": {5: 100.0, 6: -100.0}},
        {"temperature": 1e-4, "repetition_penalty": 0.01, "logit_bias": {5: 100.0}},
    ],
)
async def test_extreme_numbers_that_are_allowed_are_served(whole: Whole, sampling: dict[str, object]) -> None:
    """Whatever the contract lets through, the engine can compute."""
    frames = await read(whole.generate(**sampling, seed=7, logprobs=2))

    assert len(tokens_of(frames)) == 8


async def test_a_context_that_is_full_ends_the_stream(whole: Whole) -> None:
    """Prompt + max_tokens may fill the context to the last token, and not one more."""
    prompt = [token % 300 for token in range(CONTEXT_LENGTH - 10)]
    frames = await read(whole.generate(prompt, max_tokens=10))
    failure = await failing(whole.generate(prompt, max_tokens=11))

    assert len(tokens_of(frames)) == 10
    assert failure.details["ErrorInfo"].reason == "CONTEXT_LENGTH"


async def test_cached_pages_are_reported_and_change_nothing(whole: Whole) -> None:
    """The second time a prompt is asked its whole pages are found, and the tokens are the same."""
    first = await read(whole.generate(max_tokens=20))
    second = await read(whole.generate(max_tokens=20))

    assert (first[0].started.cached_tokens, second[0].started.cached_tokens) == (0, len(PROMPT) // 16 * 16)
    assert tokens_of(first) == tokens_of(second)


async def test_a_pool_smaller_than_the_context_is_the_limit(tmp_path: Path) -> None:
    """What the pool cannot hold is refused as too long, and an unset max_tokens fits what it can."""
    loaded = load_model(make_tiny_llama(tmp_path / "tiny", config={"max_position_embeddings": CONTEXT_LENGTH}))
    config = EngineConfig(page_pool_bytes=loaded.page_bytes * 4)
    async with Engine(loaded, config) as engine:
        info = describe(loaded, ModelConfig(name="tiny", path=tmp_path), engine)
        async with serving(ServedModel(info, engine, engine.load)) as world:
            fitting = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=range(20, 40)),
                sampling_params=pb.SamplingParams(temperature=0, ignore_eos=True),
                return_token_ids=True,
            )
            frames = await read(world.generation.Generate(fitting))
            failure = await failing(world.generation.Generate(ask(range(20, 90))))

    assert len(tokens_of(frames)) == 64 - 20
    assert failure.details["ErrorInfo"].reason == "CONTEXT_LENGTH"
