"""The engine's heart: failures stay where they belong, and the answer does not depend on company."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from server.engine import scheduler as scheduler_module
from server.engine.sequence import Sequence as EngineSequence
from server.errors import Internal
from server.messages import SamplingParams
from server.model.memory import Field, LayerMemory
from server.model.rows import Rows
from tests.fixtures.fake_model import FakeModel, FakeSpec
from tests.fixtures.guesses import Guesses
from tests.fixtures.stepping import Stepping

PLAIN = SamplingParams(seed=3, max_tokens=12, logit_bias={60: -100.0})


def test_poisoned_logits_end_one_request() -> None:
    """A request whose logits are NaN ends with Internal; its neighbours do not differ by a token."""
    stepping = Stepping(FakeModel(poison=frozenset({60})))
    bad = stepping.submit([1, 2, 3, 4, 60, 5, 6, 7, 8], PLAIN)
    good = stepping.submit([1, 2, 3, 4, 5], PLAIN)
    stepping.run()
    reference = Stepping(FakeModel())
    other = reference.submit([1, 2, 3, 4, 5], PLAIN)
    reference.run()

    assert isinstance(stepping.errors[bad], Internal)
    assert stepping.tokens[good, 0] == reference.tokens[other, 0]
    stepping.assert_nothing_is_held()


def test_poisoned_prompt_logprobs_end_one_request() -> None:
    """A prompt that cannot be scored ends with Internal, and its pages are not kept."""
    stepping = Stepping(FakeModel(poison=frozenset({60})))
    bad = stepping.submit([1, 2, 3, 4, 60, 5, 6, 7, 8], replace(PLAIN, prompt_logprobs=0))
    stepping.run()

    assert isinstance(stepping.errors[bad], Internal)
    assert stepping.core.scheduler.pool.num_cached == 0
    stepping.assert_nothing_is_held()


def test_a_row_that_makes_the_step_raise_ends_its_own_request() -> None:
    """A step that raises is run again request by request, so the others get their tokens."""
    stepping = Stepping(FakeModel(explosive=frozenset({60})))
    good = stepping.submit([1, 2, 3], PLAIN)
    stepping.step()
    bad = stepping.submit([4, 60], PLAIN)
    twins = stepping.submit([1, 2, 3, 4, 5], replace(PLAIN, n=2))
    failed = stepping.step()
    stepping.run()
    reference = Stepping(FakeModel())
    serials = reference.submit([1, 2, 3], PLAIN), reference.submit([1, 2, 3, 4, 5], replace(PLAIN, n=2))
    reference.run()

    assert failed.is_failed
    assert isinstance(stepping.errors[bad], Internal)
    assert list(stepping.errors) == [bad]
    assert stepping.tokens[good, 0] == reference.tokens[serials[0], 0]
    assert [stepping.tokens[twins, i] for i in range(2)] == [reference.tokens[serials[1], i] for i in range(2)]
    stepping.assert_nothing_is_held()


def test_params_that_the_sampler_cannot_take_end_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose parameters cannot be loaded ends with Internal in a step that the others do not notice."""
    stepping = Stepping(FakeModel())
    decoding = stepping.submit([1, 2, 3], PLAIN)
    stepping.step()
    load = stepping.core.sampler.load

    def refuse(sequence: EngineSequence) -> None:
        if sequence.submission.serial == bad:
            raise OverflowError
        load(sequence)

    monkeypatch.setattr(stepping.core.sampler, "load", refuse)
    bad = stepping.submit([4, 5, 6, 7, 8], replace(PLAIN, n=2))
    good = stepping.submit([1, 2, 3, 4, 5], PLAIN)
    report = stepping.step()
    stepping.run()
    reference = Stepping(FakeModel())
    serials = reference.submit([1, 2, 3], PLAIN), reference.submit([1, 2, 3, 4, 5], PLAIN)
    reference.run()

    assert not report.is_failed
    assert (report.num_decode_tokens, report.num_prefill_tokens + report.num_cached_tokens) == (1, 5)
    assert list(stepping.errors) == [bad]
    assert isinstance(stepping.errors[bad], Internal)
    assert stepping.tokens[decoding, 0] == reference.tokens[serials[0], 0]
    assert stepping.tokens[good, 0] == reference.tokens[serials[1], 0]
    stepping.assert_nothing_is_held()


def test_recovering_forgets_closed_pages() -> None:
    """Pages that closed in a step that went wrong are not offered: the pool that named them is gone."""
    stepping = Stepping(FakeModel())
    stepping.submit(list(range(20)), PLAIN)
    stepping.step()
    assert stepping.core.closed

    stepping.core.recover(Internal("a mistake"))

    assert stepping.core.closed == []


class BreakingModel(FakeModel):
    """Fails every pass while it is broken."""

    is_broken = False

    def forward(self, rows: Rows, memory: Sequence[LayerMemory]) -> Tensor:
        if self.is_broken:
            raise RuntimeError("device lost")
        return super().forward(rows, memory)


def test_a_step_that_fails_for_all_ends_the_running_and_serves_on() -> None:
    """Nobody is to blame: all running requests end with Internal, the pool is emptied, those who wait are served."""
    model = BreakingModel()
    stepping = Stepping(model, max_num_seqs=2)
    first, second = stepping.submit([1, 2, 3, 4, 5], PLAIN), stepping.submit([6, 7], PLAIN)
    stepping.step()
    waiting = stepping.submit([8, 9], PLAIN)
    model.is_broken = True
    stepping.step()
    model.is_broken = False

    assert sorted(stepping.errors) == [first, second]
    assert stepping.core.scheduler.pool.num_free == 64
    stepping.run()
    assert len(stepping.tokens[waiting, 0]) == 12
    stepping.assert_nothing_is_held()


def test_recovers_from_its_own_mistake_with_an_empty_pool() -> None:
    """After an error outside of model and sampler every request is ended and new ones are served."""
    stepping = Stepping(FakeModel())
    serials = [stepping.submit([1, 2, 3, 4, 5, n], PLAIN) for n in range(20)]
    stepping.step()

    stepping.core.recover(Internal("ours"))
    stepping.run()

    late = stepping.submit([1, 2, 3, 4, 5, 6], PLAIN)
    stepping.run()
    assert sorted(stepping.errors) == serials
    assert stepping.started[late].cached_tokens == 0
    stepping.assert_nothing_is_held()


def test_a_request_that_cannot_be_taken_in_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake while a request is taken in is answered, and harms nobody else."""
    stepping = Stepping(FakeModel())
    good = stepping.submit([1, 2], PLAIN)

    def explode(*_: object, **__: object) -> EngineSequence:
        raise MemoryError

    monkeypatch.setattr(scheduler_module, "Sequence", explode)
    bad = stepping.submit([3], PLAIN)
    monkeypatch.undo()
    stepping.run()

    assert isinstance(stepping.errors[bad], Internal)
    assert len(stepping.tokens[good, 0]) == 12
    stepping.assert_nothing_is_held()


def test_closes_a_page_once_when_its_last_token_is_computed() -> None:
    """The model is told of each new full page, in order, and of no page twice."""
    model = FakeModel()
    stepping = Stepping(model)
    stepping.submit(list(range(9)), PLAIN)
    stepping.submit(list(range(9)), PLAIN)
    stepping.run()

    assert len(model.closed) == len({page for _, page in model.closed}) == 5  # 20 tokens are computed, twice the same


def test_reads_a_pages_bytes_in_the_order_of_its_fields() -> None:
    """A page's payload is what the model wrote, and its checksum is of these bytes."""
    stepping = Stepping(FakeModel())
    stepping.submit([5, 6, 7, 8, 9], PLAIN)
    stepping.step()
    ((chain_id, page_id),) = stepping.core.closed

    page = stepping.core.read_page(chain_id, page_id)

    assert page.payload == b"".join(token.to_bytes(4, "little") for token in (5, 6, 7, 8))
    assert len(page.checksum) == 16


def guess(*token_ids: int) -> Guesses:
    """Make a speculation that takes an output for known."""
    return Guesses(lambda _: token_ids, seed=0, num_wrong_of_ten=0)


def test_several_tokens_of_a_step_are_told_in_order() -> None:
    """A step whose drafts are right gives many tokens, and the report says how many rows of it were guessed."""
    reference = Stepping(FakeModel())
    wanted = reference.submit([1, 2, 3], replace(PLAIN, logprobs=2))
    reference.run()
    answer = reference.tokens[wanted, 0]
    stepping = Stepping(FakeModel(), speculation=guess(*answer))
    serial = stepping.submit([1, 2, 3], replace(PLAIN, logprobs=2))
    stepping.run()

    assert stepping.tokens[serial, 0] == answer
    assert stepping.logprobs[serial, 0] == reference.logprobs[wanted, 0]
    assert stepping.finished[serial, 0] == reference.finished[wanted, 0]
    drafted = sum(report.num_drafted_tokens for report in stepping.reports)
    assert drafted == sum(report.num_accepted_tokens for report in stepping.reports) > 0
    assert len(reference.reports) - len(stepping.reports) == drafted


@pytest.mark.parametrize("model", [FakeModel(poison=frozenset({60})), FakeModel(explosive=frozenset({60}))])
def test_a_wrong_draft_harms_nobody(model: FakeModel) -> None:
    """Logits that are NaN, or a step that raises, only because of a guessed token end no request."""
    stepping = Stepping(model, speculation=guess(*[60] * 12))
    serials = stepping.submit([1, 2, 3], PLAIN), stepping.submit([4, 5], PLAIN)
    stepping.run()
    reference = Stepping(FakeModel())
    wanted = reference.submit([1, 2, 3], PLAIN), reference.submit([4, 5], PLAIN)
    reference.run()

    assert sum(report.num_drafted_tokens for report in stepping.reports) > 0
    assert not stepping.errors
    assert [stepping.tokens[each, 0] for each in serials] == [reference.tokens[each, 0] for each in wanted]
    stepping.assert_nothing_is_held()


def test_a_model_with_tails_gets_no_drafts() -> None:
    """A row of a model that moves a tail on cannot be taken back."""
    model = FakeModel()
    model.tail_fields = ((Field("tail", (1,), torch.int32),),)
    stepping = Stepping(model, speculation=guess(*[5] * 12))
    stepping.submit([1, 2, 3], PLAIN)
    stepping.run()

    assert sum(report.num_drafted_tokens for report in stepping.reports) == 0


MACHINE_SPEC = FakeSpec(vocabulary_size=32, context_length_tokens=48)
_answers: dict[object, dict[int, list[int]]] = {}


def answer_alone(prompt: tuple[int, ...], sampling: SamplingParams) -> dict[int, list[int]]:
    """Return what a request gives in a big engine of its own, one token at a time."""
    key = (prompt, repr(sampling))
    if key not in _answers:
        stepping = Stepping(FakeModel(MACHINE_SPEC), max_step_tokens=1)
        serial = stepping.submit(prompt, sampling)
        stepping.run()
        _answers[key] = {i: stepping.tokens[serial, i] for i in range(sampling.n)}
    return _answers[key]


PREFIXES = [(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8), (9, 8, 7, 6, 5)]
PROMPTS = st.tuples(st.sampled_from(PREFIXES), st.lists(st.integers(0, 31), min_size=1, max_size=12)).map(
    lambda parts: (*parts[0], *parts[1])
)
SAMPLINGS = st.builds(
    SamplingParams,
    seed=st.integers(0, 3),
    max_tokens=st.integers(0, 24),
    temperature=st.sampled_from([0.0, 1.0]),
    n=st.integers(1, 3),
    min_tokens=st.integers(0, 3),
    eos_token_ids=st.sampled_from([(), (3,), (3, 5)]),
    stop_token_ids=st.sampled_from([(), (7,)]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
)


class CoreMachine(RuleBasedStateMachine):
    """Under arrivals, cancellations, deadlines, drafts and page pressure, every answer is that of the request alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stepping = Stepping(
            FakeModel(MACHINE_SPEC),
            num_pages=14,
            max_num_seqs=4,
            max_step_tokens=9,
            speculation=Guesses(self._foresee, seed=0),
        )
        self.whole: dict[int, dict[int, list[int]]] = {}
        self.expected: dict[int, dict[int, list[int]]] = {}
        self.gone: set[int] = set()

    @rule(prompt=PROMPTS, sampling=SAMPLINGS, cut=st.integers(0, 30), deadline=st.sampled_from([None, None, 30.0]))
    def arrive(self, prompt: tuple[int, ...], sampling: SamplingParams, cut: int, deadline: float | None) -> None:
        answer = answer_alone(prompt, sampling)
        emitted = tuple(tuple(answer[i][: cut - i]) if cut > i else () for i in range(sampling.n))
        late = None if deadline is None else self.stepping.now_s + deadline
        serial = self.stepping.submit(prompt, sampling, emitted=emitted, deadline_s=late)
        self.whole[serial] = answer
        self.expected[serial] = {i: answer[i][len(emitted[i]) :] for i in range(sampling.n)}

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.stepping.now_s += 1.0
            self.stepping.step()

    @precondition(lambda self: self.stepping.core.scheduler.submissions)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        serial = data.draw(st.sampled_from(sorted(self.stepping.core.scheduler.submissions)))
        self.stepping.core.cancel(serial)
        self.gone.add(serial)

    @invariant()
    def holds_what_it_says(self) -> None:
        scheduler = self.stepping.core.scheduler
        scheduler.pool.check()
        held = {page for sequence in scheduler.running for page in sequence.page_ids}
        assert len(held) == scheduler.pool.num_used
        assert all(sequence.slot >= 0 for sequence in scheduler.running)
        assert len(scheduler.running) + scheduler.num_free_slots == scheduler.limits.max_num_seqs
        assert all(report.num_rows <= 9 for report in self.stepping.reports[-12:])

    @invariant()
    def says_what_the_request_alone_says(self) -> None:
        for (serial, index), tokens in self.stepping.tokens.items():
            whole = self.expected[serial][index]
            assert tokens == whole[: len(tokens)]

    def _foresee(self, sequence: EngineSequence) -> list[int]:
        """Return the answer, and a guess at what ends it with more behind."""
        return [*self.whole[sequence.submission.serial][sequence.index], 3, 7, 1]

    def teardown(self) -> None:
        self.stepping.run()
        self.stepping.assert_nothing_is_held()
        for serial, answer in self.expected.items():
            if serial in self.gone or serial in self.stepping.errors:
                continue
            for index, tokens in answer.items():
                assert self.stepping.tokens[serial, index] == tokens
                assert (serial, index) in self.stepping.finished


CoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCoreMachine = CoreMachine.TestCase
