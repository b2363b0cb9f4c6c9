import asyncio
import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from server.frontend.prompts import Prompts
from tests.fixtures.front_ends import TOKENIZER, ids, saying, served

MODEL = served(saying("x"))


@pytest.fixture
def prompts() -> Iterator[Prompts]:
    """Prompts with one thread."""
    prompts = Prompts(1)
    yield prompts
    prompts.close()


async def test_a_long_text_does_not_stall_the_loop(prompts: Prompts) -> None:
    """While half a megabyte is tokenised the loop turns: the thread does not keep the interpreter's lock."""
    began_s = time.monotonic()
    task = asyncio.create_task(prompts.encode(MODEL, "hello wor1d, " * 40_000, most_tokens=10**6))
    turns_s = [began_s]
    while not task.done():
        await asyncio.sleep(0.001)
        turns_s.append(time.monotonic())
    longest_s = max(after - before for before, after in itertools.pairwise(turns_s))

    assert len(await task) == 13 * 40_000
    assert longest_s < (time.monotonic() - began_s) / 2


async def test_many_tokens_are_spelled_in_a_thread(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are spelled at once, many of them off the loop."""
    threads = []

    def spell(_token_id: int) -> str:
        threads.append(threading.current_thread())
        return "a"

    monkeypatch.setattr(TOKENIZER, "token_text", spell)
    assert await prompts.spell(MODEL, ids("a")) == ["a"]
    assert await prompts.spell(MODEL, ids("a" * 5000)) == ["a"] * 5000

    assert threads[0] is threading.current_thread()
    assert threading.current_thread() not in threads[1:]
