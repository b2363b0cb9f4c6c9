import pytest

from server.cli.bench.connection import connect
from server.cli.bench.pathfox import PathfoxTarget
from server.cli.bench.recording import Outcome, Usage
from server.cli.bench.target import Ask, CallFailed, Heard, Served
from server.messages import Load
from tests.fixtures.front_ends import CONTEXT_LENGTH, TOKENIZER, ids, rambling, served, serving

ASK = Ask(prompt=ids("hello"), max_tokens=3, temperature=0.5, seed=9, ignore_eos=True)


async def test_frames_are_counted_by_the_servers_cursor() -> None:
    """Text as it comes, the usage with the last message; everything that was asked reaches the source."""
    source = rambling()
    async with serving(served(source)) as world, connect(world.address) as connection:
        target = PathfoxTarget(connection, model="m-alias")
        about = await target.served()
        heard = [each async for each in target.answer(ASK, timeout_s=10)]
        tokens = await target.tokens_of("ab")

    assert about == Served("m", TOKENIZER.vocabulary_size, CONTEXT_LENGTH)
    assert "".join(each.text for each in heard) == "abc"
    assert heard[-1] == Heard(3, usage=Usage(5, 3, 0))
    assert tokens == ids("ab")
    (request,) = source.requests
    assert request.prompt_token_ids == tuple(ids("hello"))
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (3, 0.5, 9)


async def test_the_budget_to_the_first_token_is_the_servers_to_keep() -> None:
    """A server that cannot begin in time refuses, and says when to come back."""
    source = rambling()
    slow = served(source, load=lambda: Load(prefill_tokens_per_s=10, decode_tokens_per_s=10))
    async with serving(slow) as world, connect(world.address) as connection:
        target = PathfoxTarget(connection, first_token_budget_s=0.001)
        with pytest.raises(CallFailed) as refused:
            await anext(target.answer(ASK, timeout_s=10))

    assert (refused.value.status, refused.value.outcome) == ("RESOURCE_EXHAUSTED", Outcome.REJECTED)
    assert source.requests == []


async def test_an_answer_that_is_not_read_to_its_end_is_cancelled() -> None:
    """Nothing goes on at the server for a client that has gone."""
    source = rambling()
    async with serving(served(source)) as world, connect(world.address) as connection:
        stream = PathfoxTarget(connection).answer(Ask(ids("x"), 4000, 0.0, 1, ignore_eos=True), timeout_s=10)
        await anext(stream)
        await stream.aclose()
        await world.settle()

    assert source.num_cancelled == 1
