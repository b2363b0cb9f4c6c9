"""Speculation changes when tokens come, and nothing else: not a bit of tokens, logits, log probabilities, endings."""

import random
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
from torch import Tensor

from server.engine.plan import Sample
from server.engine.speculation import Speculation
from server.messages import SamplingParams
from server.model.loader import load_model
from server.model.loader.bundled import find_bundled_model
from server.model.model import Model
from tests.fixtures.guesses import FreeRows
from tests.fixtures.stepping import Stepping
from tests.fixtures.tiny_models import make_tiny_gguf

Asked = list[tuple[list[int], SamplingParams]]


def run(model: Model, asked: Asked, *, has_drafts: bool, num_pages: int) -> tuple[Stepping, dict[object, bytes]]:
    """Answer requests that come one step after another; return what came and digests of all logits."""
    digests: dict[object, bytes] = {}

    def observe(samples: Sequence[Sample], logits: Tensor) -> None:
        for (sequence, position), row in zip(samples, logits.numpy(), strict=True):
            place = sequence.submission.serial, sequence.index, position
            digests[place] = blake2b(row.tobytes(), digest_size=16).digest()

    stepping = Stepping(
        model,
        num_pages=num_pages,
        max_num_seqs=4,
        max_step_tokens=64,
        speculation=Speculation(FreeRows(), max_sequences=4) if has_drafts else None,
        logits_observer=observe,
    )
    for prompt, sampling in asked:
        stepping.submit(prompt, sampling)
        stepping.step()
    stepping.run()
    stepping.assert_nothing_is_held()
    return stepping, digests


def compare(model: Model, asked: Asked, *, num_pages: int) -> tuple[int, int]:
    """Assert that drafts change nothing; return how many were made and how many were right."""
    plain, plain_digests = run(model, asked, has_drafts=False, num_pages=num_pages)
    drafted, drafted_digests = run(model, asked, has_drafts=True, num_pages=num_pages)
    assert drafted.tokens == plain.tokens
    assert drafted.logprobs == plain.logprobs
    assert drafted.finished == plain.finished
    assert drafted.errors == plain.errors == {}
    assert drafted_digests == plain_digests
    return (
        sum(report.num_drafted_tokens for report in drafted.reports),
        sum(report.num_accepted_tokens for report in drafted.reports),
    )


def some_sampling(dice: random.Random, number: int) -> SamplingParams:
    """Draw parameters of every kind; few token ids are so frequent that they end a text."""
    return SamplingParams(
        seed=number,
        max_tokens=dice.randint(20, 90),
        temperature=dice.choice([0.0, 0.0, 0.3]),
        repetition_penalty=dice.choice([1.0, 1.0, 1.1]),
        presence_penalty=dice.choice([0.0, 0.0, 0.2]),
        logit_bias=dice.choice([{}, {7: 2.0}]),
        min_tokens=dice.choice([0, 12]),
        eos_token_ids=tuple(dice.sample(range(320), dice.choice([0, 6]))),
        stop_token_ids=tuple(dice.sample(range(320), dice.choice([0, 6]))),
        n=dice.choice([1, 1, 2]),
        logprobs=dice.choice([None, 2]),
    )


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("needs_compiler")
def test_nothing_differs_on_a_tiny_model(tmp_path: Path) -> None:
    """Random and repetitive prompts, shared beginnings, all parameters, few pages: only the number of steps differs."""
    model = load_model(make_tiny_gguf(tmp_path / "tiny.gguf"))
    dice = random.Random(5)
    num_drafted = num_accepted = 0
    for _ in range(30):
        phrase = [dice.randrange(320) for _ in range(dice.randint(2, 9))]
        asked: Asked = [
            (
                (phrase * 12)[:50]
                if dice.random() < 0.6
                else [dice.randrange(320) for _ in range(dice.randint(1, 50))],
                some_sampling(dice, number),
            )
            for number in range(5)
        ]
        drafted, accepted = compare(model, asked, num_pages=dice.choice([12, 16, 64]))
        num_drafted += drafted
        num_accepted += accepted

    assert 500 < num_accepted < num_drafted


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("needs_smollm2", "needs_compiler")
def test_nothing_differs_on_a_text_that_repeats() -> None:
    """With the weights that `make run` serves and a text that goes round in a circle, most drafts are right."""
    model = load_model(find_bundled_model())
    text = [dice_id % 40_000 + 100 for dice_id in range(7_000, 7_900, 45)] * 4
    asked: Asked = [
        (text[: 60 + number], SamplingParams(seed=number, max_tokens=40, temperature=temperature, logprobs=1))
        for number, temperature in enumerate([0.0, 0.0, 0.2])
    ]

    drafted, accepted = compare(model, asked, num_pages=64)

    assert accepted > drafted // 4 > 0
