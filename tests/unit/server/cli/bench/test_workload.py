import itertools
import random

import pytest

from server.cli.bench.workload import Lengths, Workload, pieces_of, random_tokens
from server.errors import ConfigError

FIXED = Lengths(8, 8)


@pytest.mark.parametrize(
    ("text", "bounds"),
    [("64", (64, 64)), ("uniform:2:9", (2, 9)), ("normal:100:20", (40, 160)), ("normal:100:20:90:95", (90, 95))],
)
def test_lengths_stay_within_their_bounds(text: str, bounds: tuple[int, int]) -> None:
    """Every form has bounds, and draws reach both of them and nothing beyond."""
    lengths = Lengths.parse("--input-tokens", text)
    drawn = [lengths.draw(source) for source in [random.Random(0)] for _ in range(5000)]

    assert (lengths.low, lengths.high) == bounds
    assert bounds[0] <= min(drawn) <= max(drawn) <= bounds[1]
    assert max(drawn) - min(drawn) >= 0.8 * (bounds[1] - bounds[0])


@pytest.mark.parametrize(
    "text", ["", "-3", "0", "1.5", "uniform:9:2", "uniform:1", "normal:nan:3", "normal:5:inf", "normal:5:-1", "zipf:3"]
)
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    """The message names the option and what was given."""
    with pytest.raises(ConfigError, match=f"--output-tokens: got {text!r}"):
        Lengths.parse("--output-tokens", text)


def test_the_same_seed_gives_the_same_requests() -> None:
    """Requests are a function of the seed."""
    workload = Workload(Lengths(4, 40), Lengths(1, 9))
    first, again, other = (
        list(itertools.islice(workload.asks(random_tokens(1000), seed=seed), 5)) for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other


def test_prompts_begin_with_the_shared_prefix() -> None:
    """The prefix is common to all, what follows is each one's own."""
    workload = Workload(FIXED, FIXED, shared_prefix_tokens=16)
    one, two = itertools.islice(workload.asks(random_tokens(1000), seed=0), 2)

    assert (len(one.prompt), len(two.prompt)) == (24, 24)
    assert one.prompt[:16] == two.prompt[:16]
    assert one.prompt[16:] != two.prompt[16:]


def test_random_tokens_keep_away_from_the_ends_of_the_vocabulary() -> None:
    """Control tokens stand there; a vocabulary of one still has a token."""
    drawn = random_tokens(100)(random.Random(0), 2000)

    assert (min(drawn), max(drawn)) == (10, 89)
    assert random_tokens(1)(random.Random(0), 2) == [0, 0]


def test_pieces_of_a_text_run_round_its_end() -> None:
    """A piece may be longer than the text: it begins anew."""
    piece = pieces_of([1, 2, 3])(random.Random(0), 7)

    assert any(([1, 2, 3] * 4)[begin : begin + 7] == piece for begin in range(3))


def test_lengths_beyond_the_context_are_named_with_the_limit() -> None:
    """The longest request is what counts."""
    workload = Workload(Lengths(1, 100), Lengths(1, 30), shared_prefix_tokens=10)

    workload.check(140)
    with pytest.raises(ConfigError, match=r"--output-tokens: got up to 140 tokens, want at most the model's 139"):
        workload.check(139)


def test_all_requests_ask_for_what_the_workload_says() -> None:
    """Temperature and the end of the answer are those of the workload."""
    workload = Workload(FIXED, FIXED, temperature=0.5, ignore_eos=False)
    ask = next(workload.asks(random_tokens(100), seed=0))

    assert (ask.temperature, ask.ignore_eos, ask.max_tokens) == (0.5, False, 8)
