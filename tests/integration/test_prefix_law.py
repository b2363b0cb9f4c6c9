"""Law 1 on the real kernels: a token's bits depend on its prefix and on nothing else.

Each case runs a few requests together: random arrivals, budgets that change every step (so chunks of any size), few
pages (so preemptions), shared beginnings (so prefix-cache hits), drafts right and wrong, interruptions and
cancellations. Every logit row and every token must have the bits that the same request gives alone, one token a step,
in an engine with nothing else in it.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.plan import Sample
from server.messages import SamplingParams, TokenLogprob
from server.model.loader import load_model
from server.model.loader.bundled import find_bundled_model
from server.model.model import Model
from tests.fixtures.guesses import Guesses
from tests.fixtures.stepping import Stepping
from tests.fixtures.tiny_models import make_tiny_gguf, make_tiny_llama

log = logging.getLogger(__name__)

NUM_TINY_CASES = 500
NUM_REAL_CASES = 40

Place = tuple[int, int, int]
"""(serial, index, position of the token that the logits choose)."""


class Digests:
    """Remembers a digest of every logit row that a token is chosen from."""

    def __init__(self) -> None:
        self.seen: dict[Place, bytes] = {}
        self.num_rows = 0

    def __call__(self, samples: Sequence[Sample], logits: Tensor) -> None:
        for (sequence, position), row in zip(samples, logits.numpy(), strict=True):
            place = (sequence.submission.serial, sequence.index, position)
            digest = blake2b(row.tobytes(), digest_size=16).digest()
            assert self.seen.setdefault(place, digest) == digest
            self.num_rows += 1


@dataclass(frozen=True)
class Answer:
    """What a request gives alone."""

    tokens: dict[int, list[int]]
    digests: dict[tuple[int, int], bytes]
    """By (index, position)."""
    prompt_logprobs: tuple[TokenLogprob, ...]


Ask = tuple[tuple[int, ...], SamplingParams]


@dataclass
class Coverage:
    """That the cases did what they are for."""

    num_cases: int = 0
    num_rows: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_continued: int = 0
    num_cancelled: int = 0
    num_replayed: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class Law:
    """A model, a catalogue of requests, and what each gives alone."""

    def __init__(self, model: Model, *, seed: int, num_requests: int, max_prompt_tokens: int, max_tokens: int) -> None:
        self.model = model
        self.coverage = Coverage()
        dice = random.Random(seed)
        vocabulary = model.spec.vocabulary_size
        prefixes = [[dice.randrange(vocabulary) for _ in range(length)] for length in (0, 16, 37)]
        self.catalogue: list[Ask] = []
        for number in range(num_requests):
            suffix = [dice.randrange(vocabulary) for _ in range(dice.randint(1, max_prompt_tokens - 37))]
            sampling = SamplingParams(
                seed=number,
                max_tokens=dice.randint(1, max_tokens),
                temperature=dice.choice([0.0, 0.7, 1.0]),
                top_p=dice.choice([1.0, 0.9]),
                top_k=dice.choice([0, 40]),
                repetition_penalty=dice.choice([1.0, 1.2]),
                frequency_penalty=dice.choice([0.0, 0.3]),
                n=dice.choice([1, 1, 1, 2, 3]),
                logprobs=dice.choice([None, 2]),
                prompt_logprobs=dice.choice([None, None, None, 1]),
            )
            self.catalogue.append(((*dice.choice(prefixes), *suffix), sampling))
        self.alone = cache(self._alone)

    def _alone(self, number: int) -> Answer:
        prompt, sampling = self.catalogue[number]
        digests = Digests()
        stepping = Stepping(self.model, max_step_tokens=1, logits_observer=digests)
        serial = stepping.submit(prompt, sampling)
        stepping.run()
        return Answer(
            tokens={index: stepping.tokens[serial, index] for index in range(sampling.n)},
            digests={(index, position): digest for (_, index, position), digest in digests.seen.items()},
            prompt_logprobs=stepping.started[serial].prompt_logprobs,
        )

    def check(self, case: "Case") -> None:
        """Run a case and compare every bit."""
        digests = Digests()
        asked: dict[int, tuple[int, int]] = {}
        guesses = Guesses(lambda s: self.alone(asked[s.submission.serial][0]).tokens[s.index], seed=case.num_pages)
        stepping = Stepping(
            self.model,
            num_pages=case.num_pages,
            max_num_seqs=case.max_num_seqs,
            max_step_tokens=1,
            speculation=guesses if case.has_drafts else None,
            logits_observer=digests,
        )
        budgets = iter(case.budgets * 1000)
        cancelled: set[int] = set()
        for number, steps_before, cut in case.arrivals:
            self._step(stepping, budgets, steps_before)
            prompt, sampling = self.catalogue[number]
            emitted = tuple(tuple(self.alone(number).tokens[i][:cut]) for i in range(sampling.n)) if cut else ()
            asked[stepping.submit(prompt, sampling, emitted=emitted)] = (number, cut)
            self.coverage.num_continued += bool(cut)
        if case.is_first_cancelled:
            self._step(stepping, budgets, 2)
            stepping.core.cancel(1)
            cancelled.add(1)
        while stepping.core.scheduler.has_work:
            self._step(stepping, budgets, 1)
        stepping.assert_nothing_is_held()
        self._compare(stepping, digests, asked, cancelled)
        self.coverage.num_cases += 1
        self.coverage.num_rows += digests.num_rows
        self.coverage.num_preemptions += stepping.core.scheduler.num_preemptions
        self.coverage.num_cached_tokens += stepping.core.scheduler.num_cached_tokens
        self.coverage.num_cancelled += len(cancelled)
        self.coverage.num_replayed += stepping.core.runner.repeats.num_replayed
        self.coverage.num_drafted += sum(report.num_drafted_tokens for report in stepping.reports)
        self.coverage.num_accepted += sum(report.num_accepted_tokens for report in stepping.reports)

    def _step(self, stepping: Stepping, budgets: Iterator[int], count: int) -> None:
        for _ in range(count):
            scheduler = stepping.core.scheduler
            scheduler.limits = replace(scheduler.limits, max_step_tokens=next(budgets))
            stepping.step()

    def _compare(
        self, stepping: Stepping, digests: Digests, asked: dict[int, tuple[int, int]], cancelled: set[int]
    ) -> None:
        assert not stepping.errors
        for (serial, index, position), digest in digests.seen.items():
            assert digest == self.alone(asked[serial][0]).digests[index, position], (serial, index, position)
        for serial, (number, cut) in asked.items():
            if serial in cancelled:
                continue
            answer = self.alone(number)
            for index, tokens in answer.tokens.items():
                assert stepping.tokens[serial, index] == tokens[cut:]
            if not cut:
                assert stepping.started[serial].prompt_logprobs == answer.prompt_logprobs


@dataclass(frozen=True)
class Case:
    """A few requests in one engine."""

    arrivals: list[tuple[int, int, int]]
    """(number in the catalogue, steps before it comes, tokens of it that were emitted before an interruption)."""
    budgets: list[int]
    """Rows of one step after the other, again and again."""
    num_pages: int
    max_num_seqs: int
    is_first_cancelled: bool
    has_drafts: bool


def cases(num_requests: int) -> st.SearchStrategy[Case]:
    """Draw cases; fewer pages than the longest requests of a catalogue need together."""
    arrivals = st.tuples(
        st.integers(0, num_requests - 1), st.integers(0, 6), st.sampled_from([0, 0, 0, 1, 3]) | st.integers(0, 20)
    )
    return st.builds(
        Case,
        arrivals=st.lists(arrivals, min_size=2, max_size=7),
        budgets=st.lists(st.integers(1, 64), min_size=1, max_size=6),
        num_pages=st.integers(8, 9),
        max_num_seqs=st.integers(1, 8),
        is_first_cancelled=st.booleans(),
        has_drafts=st.booleans(),
    )


def hold(law: Law, *, num_cases: int) -> None:
    """Check that the law holds in `num_cases` drawn cases."""
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=num_cases, suppress_health_check=unhurried)
    @given(case=cases(len(law.catalogue)))
    def check(case: Case) -> None:
        law.check(case)

    check()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.parametrize("weights", ["gguf q4_1", "safetensors float32"])
def test_no_bit_differs_on_a_tiny_model(weights: str, tmp_path: Path) -> None:
    """Whatever runs beside it and however it is cut into steps, a request gives the bits that it gives alone."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf") if weights.startswith("gguf") else make_tiny_llama(tmp_path / "tiny")
    law = Law(load_model(path), seed=len(weights), num_requests=40, max_prompt_tokens=60, max_tokens=60)
    assert law.model.is_row_invariant

    hold(law, num_cases=NUM_TINY_CASES // 2)

    log.info("%s", law.coverage)
    assert law.coverage.num_cases >= NUM_TINY_CASES // 2
    assert law.coverage.num_preemptions > 50
    assert law.coverage.num_cached_tokens > 1000
    assert law.coverage.num_continued > 50
    assert law.coverage.num_cancelled > 20
    assert law.coverage.num_replayed > 1000
    assert 1000 < law.coverage.num_accepted < law.coverage.num_drafted


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("needs_smollm2", "needs_compiler")
def test_no_bit_differs_on_a_real_model() -> None:
    """The same, with the weights that `make run` serves."""
    law = Law(load_model(find_bundled_model()), seed=1, num_requests=12, max_prompt_tokens=64, max_tokens=32)
    assert law.model.is_row_invariant

    hold(law, num_cases=NUM_REAL_CASES)

    log.info("%s", law.coverage)
    assert law.coverage.num_cases >= NUM_REAL_CASES
    assert law.coverage.num_cached_tokens > 1000
    assert law.coverage.num_replayed > 100
    assert 100 < law.coverage.num_accepted < law.coverage.num_drafted
