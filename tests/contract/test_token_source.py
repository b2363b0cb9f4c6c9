"""What every token source promises. One suite; engine and script now, link and router when they come."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import pytest

from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.scripted import ScriptedSource
from server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from server.messages import (
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Load,
    SamplingParams,
    Started,
    TokenDelta,
    TokenLogprob,
    TokenSource,
)
from tests.fixtures.fake_model import FakeModel, FakeSpec

VOCABULARY = 64
CONTEXT = 256
PROMPT = tuple(range(3, 20))


class Source(TokenSource, Protocol):
    """A token source that can be asked whether anything is left in it."""

    def load(self) -> Load: ...


@asynccontextmanager
async def engine() -> AsyncIterator[Source]:
    """Make an engine on a model without weights."""
    model = FakeModel(FakeSpec(vocabulary_size=VOCABULARY, context_length_tokens=CONTEXT))
    config = EngineConfig(max_num_seqs=8, max_step_tokens=16, page_pool_bytes=model.page_bytes * 256)
    async with Engine(model, config, fingerprint="fake") as source:
        yield source


@asynccontextmanager
async def script() -> AsyncIterator[Source]:
    """Make a source that computes nothing."""
    yield ScriptedSource(
        lambda seed, index, position: hash((seed, index, position)) % VOCABULARY,
        vocabulary_size=VOCABULARY,
        context_length_tokens=CONTEXT,
    )


@pytest.fixture(params=[engine, script], ids=lambda make: make.__name__)
async def source(request: pytest.FixtureRequest) -> AsyncIterator[Source]:
    """Each implementation; afterwards nothing is left in it."""
    make: Callable[[], AbstractAsyncContextManager[Source]] = request.param
    async with make() as made:
        yield made
        await idle(made)


async def idle(source: Source) -> None:
    """Assert that nothing is running, waiting or held once the source has done what was asked of it before.

    Requests and cancellations are taken in order, so one more request's end comes after all of them.
    """
    await collect(source, ask(max_tokens=1))
    load = source.load()
    assert (load.running_requests, load.waiting_requests, load.used_pages) == (0, 0, 0)


def ask(
    *, emitted: tuple[tuple[int, ...], ...] = (), deadline_s: float | None = None, **sampling: object
) -> GenerateRequest:
    """Make a request on the common prompt."""
    params = replace(SamplingParams(seed=7, max_tokens=24), **sampling)
    return GenerateRequest("r", PROMPT, params, emitted_token_ids=emitted, deadline_s=deadline_s)


@dataclass
class Answer:
    """A whole answer, by index."""

    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    logprobs: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


async def collect(source: TokenSource, request: GenerateRequest) -> Answer:
    """Read a whole answer, checking that nothing follows a Finished."""
    answer = Answer()
    async with aclosing(source.generate(request)) as events:
        async for event in events:
            answer.events.append(event)
            if isinstance(event, TokenDelta):
                assert event.index not in answer.finished
                answer.tokens[event.index] = answer.tokens.get(event.index, ()) + event.token_ids
                answer.logprobs[event.index] = answer.logprobs.get(event.index, ()) + event.logprobs
            elif isinstance(event, Finished):
                assert event.index not in answer.finished
                answer.finished[event.index] = event
    return answer


async def test_starts_then_streams_then_finishes_every_completion(source: Source) -> None:
    """The first event is Started, every completion has one Finished, and the last event is a Finished."""
    answer = await collect(source, ask(n=3))

    assert [i for i, event in enumerate(answer.events) if isinstance(event, Started)] == [0]
    assert sorted(answer.finished) == [0, 1, 2]
    assert isinstance(answer.events[-1], Finished)
    assert all(len(tokens) == 24 for tokens in answer.tokens.values())


async def test_the_same_request_gives_the_same_tokens(source: Source) -> None:
    """Tokens are a function of the request, whatever else is running."""
    alone = await collect(source, ask())

    crowd = await asyncio.gather(*(collect(source, ask(seed=seed)) for seed in (1, 7, 2, 7)))

    assert crowd[1].tokens == crowd[3].tokens == alone.tokens
    assert crowd[0].tokens != alone.tokens


async def test_completions_of_a_request_differ(source: Source) -> None:
    """Each index draws its own tokens, and index 0 those of a request with n = 1."""
    one, three = await collect(source, ask()), await collect(source, ask(n=3))

    assert three.tokens[0] == one.tokens[0]
    assert len(set(three.tokens.values())) == 3


@pytest.mark.parametrize("cut", [0, 1, 5, 15, 16, 23])
async def test_continues_exactly_from_emitted_tokens(source: Source, cut: int) -> None:
    """A request that comes again with what it has emitted gives the rest, and counts the whole."""
    whole = await collect(source, ask(n=2))
    emitted = (whole.tokens[0][:cut], whole.tokens[1][: cut // 2])

    rest = await collect(source, ask(n=2, emitted=emitted))

    assert emitted[0] + rest.tokens[0] == whole.tokens[0]
    assert emitted[1] + rest.tokens[1] == whole.tokens[1]
    assert {i: f.completion_tokens for i, f in rest.finished.items()} == {0: 24, 1: 24}


async def test_a_completion_that_had_ended_is_only_finished(source: Source) -> None:
    """Emitted tokens that reach max_tokens leave nothing but the Finished."""
    whole = await collect(source, ask(n=2))

    rest = await collect(source, ask(n=2, emitted=(whole.tokens[0], ())))
    nothing = await collect(source, ask(n=2, emitted=(whole.tokens[0], whole.tokens[1])))

    assert rest.tokens == {1: whole.tokens[1]}
    assert rest.finished[0].reason is FinishReason.LENGTH
    assert [type(event) for event in nothing.events] == [Started, Finished, Finished]


async def test_end_of_turn_is_counted_but_not_sent(source: Source) -> None:
    """The token that ends the turn is left out of the deltas; the completion counts it."""
    tokens = (await collect(source, ask())).tokens[0]
    eos = tokens[10]
    length = tokens.index(eos)

    answer = await collect(source, ask(eos_token_ids=(eos,)))

    assert answer.tokens.get(0, ()) == tokens[:length]
    assert (answer.finished[0].reason, answer.finished[0].completion_tokens) == (FinishReason.STOP, length + 1)


async def test_a_stop_token_is_sent_and_named(source: Source) -> None:
    """A matched stop token id is the last token sent, and Finished says which it was; coming again it has ended."""
    tokens = (await collect(source, ask())).tokens[0]
    stop = tokens[10]
    length = tokens.index(stop) + 1

    answer = await collect(source, ask(stop_token_ids=(stop,)))
    again = await collect(source, ask(stop_token_ids=(stop,), emitted=(answer.tokens[0],)))

    assert answer.tokens[0] == tokens[:length]
    assert answer.finished[0].reason is FinishReason.STOP_SEQUENCE
    assert answer.finished[0].matched_stop_token_id == again.finished[0].matched_stop_token_id == stop
    assert again.tokens == {}


async def test_no_ending_before_min_tokens(source: Source) -> None:
    """Tokens that would end a completion are not chosen before min_tokens."""
    endings = tuple(range(0, VOCABULARY, 2))

    answer = await collect(source, ask(min_tokens=12, stop_token_ids=endings))

    assert len(answer.tokens[0]) >= 12
    assert not set(answer.tokens[0][:12]) & set(endings)


async def test_one_logprob_a_token_when_asked_for(source: Source) -> None:
    """Deltas carry as many log probabilities as tokens, of the same tokens."""
    answer = await collect(source, ask(logprobs=0))

    assert tuple(each.token_id for each in answer.logprobs[0]) == answer.tokens[0]


async def test_scores_a_prompt_without_generating(source: Source) -> None:
    """max_tokens = 0 with prompt_logprobs gives one score for each prompt token after the first, and no token."""
    answer = await collect(source, ask(max_tokens=0, prompt_logprobs=0))

    started, finished = answer.events
    assert isinstance(started, Started)
    assert tuple(each.token_id for each in started.prompt_logprobs) == PROMPT[1:]
    assert (finished.reason, finished.completion_tokens) == (FinishReason.LENGTH, 0)


async def test_context_full_ends_a_completion(source: Source) -> None:
    """A completion without room left in the context ends with CONTEXT_FULL."""
    answer = await collect(source, ask(max_tokens=10_000))

    assert answer.finished[0].reason is FinishReason.CONTEXT_FULL
    assert len(PROMPT) + answer.finished[0].completion_tokens == CONTEXT


async def test_a_deadline_that_has_passed_is_refused(source: Source) -> None:
    """A request that comes after its deadline ends with DeadlineExceeded."""
    with pytest.raises(DeadlineExceeded):
        await collect(source, ask(deadline_s=time.monotonic() - 1))


async def test_a_deadline_ends_a_stream_in_the_middle(source: Source) -> None:
    """A deadline that passes while tokens flow ends the request with DeadlineExceeded."""
    request = ask(max_tokens=200, n=8, deadline_s=time.monotonic() + 0.01)

    with pytest.raises(DeadlineExceeded):
        await asyncio.gather(*(collect(source, replace(request, request_id=str(i))) for i in range(20)))


@pytest.mark.parametrize("num_events", [0, 1, 2, 4])
async def test_closing_the_generator_cancels(source: Source, num_events: int) -> None:
    """Closing after any number of events frees everything that the request held."""
    events = source.generate(ask(max_tokens=200, n=2))
    for _ in range(num_events):
        await anext(events)
    await events.aclose()

    await idle(source)


async def test_cancelling_the_consumer_cancels(source: Source) -> None:
    """A consumer task that is cancelled frees everything that the request held."""
    task = asyncio.create_task(collect(source, ask(max_tokens=200, n=4)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await idle(source)


async def test_a_slow_reader_misses_nothing(source: Source) -> None:
    """A reader that falls behind gets the same tokens."""
    whole = await collect(source, ask())
    tokens: tuple[int, ...] = ()
    async with aclosing(source.generate(ask())) as events:
        async for event in events:
            await collect(source, ask(seed=8, max_tokens=2))  # the source goes on meanwhile
            if isinstance(event, TokenDelta):
                tokens += event.token_ids

    assert tokens == whole.tokens[0]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_token_ids": ()},
        {"prompt_token_ids": (1, VOCABULARY)},
        {"prompt_token_ids": (-1,)},
        {"emitted_token_ids": ((VOCABULARY,),)},
        {"emitted_token_ids": ((), ())},
        {"sampling": SamplingParams(seed=-1, max_tokens=1)},
        {"sampling": SamplingParams(seed=1, max_tokens=-1)},
        {"sampling": SamplingParams(seed=1, max_tokens=1, n=0)},
        {"sampling": SamplingParams(seed=1, max_tokens=1, logit_bias={VOCABULARY: 1.0})},
        {"sampling": SamplingParams(seed=1, max_tokens=1, stop_token_ids=(VOCABULARY,))},
    ],
)
async def test_a_request_out_of_range_is_refused(source: Source, change: dict[str, object]) -> None:
    """What would read or write outside of arrays is refused by name before it is begun."""
    with pytest.raises(InvalidRequest):
        await collect(source, replace(ask(), **change))


async def test_a_prompt_that_fills_the_context_is_refused(source: Source) -> None:
    """A prompt that leaves no room for a token is refused with both figures."""
    with pytest.raises(ContextLengthExceeded):
        await collect(source, replace(ask(), prompt_token_ids=(1,) * CONTEXT))
