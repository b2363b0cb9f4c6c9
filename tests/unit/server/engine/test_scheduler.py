"""Who computes next, and what becomes of pages and slots."""

import pytest

from server.errors import DeadlineExceeded
from server.messages import Criticality, FinishReason, SamplingParams
from tests.fixtures.fake_model import FakeModel, FakeSpec
from tests.fixtures.guesses import Guesses
from tests.fixtures.stepping import Stepping

GREEDY = SamplingParams(seed=0, max_tokens=8, temperature=0.0)


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    """Make greedy sampling parameters."""
    return SamplingParams(seed=0, max_tokens=max_tokens, temperature=0.0, **more)  # type: ignore[arg-type]


def alone(prompt: list[int], sampling: SamplingParams, spec: FakeSpec | None = None) -> list[int]:
    """Return what a request gives in an engine of its own."""
    stepping = Stepping(FakeModel(spec))
    serial = stepping.submit(prompt, sampling)
    stepping.run()
    return stepping.tokens[serial, 0]


def test_a_step_holds_decode_rows_first_and_keeps_to_the_budget() -> None:
    """A long prompt is read in what the decoding sequences leave of the budget."""
    stepping = Stepping(FakeModel(), max_step_tokens=8)
    stepping.submit([1, 2], greedy(30))
    stepping.submit([3, 4], greedy(30))
    stepping.step()
    stepping.submit(list(range(20)), greedy(1))

    reports = [stepping.step() for _ in range(4)]

    assert [(r.num_decode_tokens, r.num_prefill_tokens) for r in reports] == [(2, 6), (2, 6), (2, 6), (2, 2)]


def test_admits_in_order_of_arrival() -> None:
    """With one slot, requests are answered in the order in which they came."""
    stepping = Stepping(FakeModel(), max_num_seqs=1)
    first = stepping.submit([1], GREEDY)
    stepping.step()
    serials = [first, *(stepping.submit([n], GREEDY) for n in range(2, 5))]
    stepping.run()

    assert [serial for serial, _ in stepping.finished] == serials


def test_criticality_decides_among_those_that_came_together() -> None:
    """Of requests that arrive in the same step, the critical one is first."""
    stepping = Stepping(FakeModel(), max_num_seqs=1)
    batch = stepping.submit([1], GREEDY, criticality=Criticality.BATCH)
    critical = stepping.submit([2], GREEDY, criticality=Criticality.CRITICAL)
    stepping.run()

    assert [serial for serial, _ in stepping.finished] == [critical, batch]


def test_finds_a_prefix_in_the_cache_but_recomputes_the_last_token() -> None:
    """A prompt that was seen before is cached up to the page of its last token, whose logits must exist."""
    stepping = Stepping(FakeModel())
    prompt = list(range(16))
    first = stepping.submit(prompt, GREEDY)
    stepping.run()
    again = stepping.submit(prompt, GREEDY)
    longer = stepping.submit([*prompt, 17], GREEDY)
    stepping.run()

    assert [stepping.started[s].cached_tokens for s in (first, again, longer)] == [0, 12, 16]
    assert stepping.tokens[again, 0] == stepping.tokens[first, 0]


def test_tenants_do_not_share_pages() -> None:
    """Another salt finds nothing."""
    stepping = Stepping(FakeModel())
    stepping.submit(list(range(16)), GREEDY, cache_salt=b"a")
    stepping.run()
    other = stepping.submit(list(range(16)), GREEDY, cache_salt=b"b")
    stepping.run()

    assert stepping.started[other].cached_tokens == 0


def test_a_burst_with_one_prefix_computes_it_once() -> None:
    """Sequences that wait for the budget take over the pages that the first has closed meanwhile."""
    model = FakeModel()
    stepping = Stepping(model, max_step_tokens=16)
    prefix = list(range(32))
    serials = [stepping.submit([*prefix, 40 + n], greedy(2)) for n in range(4)]
    stepping.run()

    assert sum(model.num_rows) < 33 + 4 * 8
    for n, serial in enumerate(serials):
        assert stepping.tokens[serial, 0] == alone([*prefix, 40 + n], greedy(2))


def test_completions_of_a_request_share_the_prompts_pages() -> None:
    """With n > 1 the first sequence reads the prompt and the others start from its pages."""
    model = FakeModel()
    stepping = Stepping(model)
    serial = stepping.submit(list(range(17)), SamplingParams(seed=1, max_tokens=1, n=4))
    stepping.step()
    assert len(stepping.core.scheduler.running) == 0
    assert len(stepping.core.scheduler.waiting) == 3
    report = stepping.step()

    assert model.num_rows == [17, 3]
    assert report.num_cached_tokens == 3 * 16
    assert len({tuple(stepping.tokens[serial, i]) for i in range(4)}) > 1
    stepping.assert_nothing_is_held()


def test_preempts_the_youngest_when_pages_run_out() -> None:
    """The youngest gives up its pages, waits with prompt + output, and gives the same tokens in the end."""
    stepping = Stepping(FakeModel(), num_pages=12)
    old = stepping.submit([1, 2, 3], greedy(36))
    young = stepping.submit([4, 5, 6], greedy(36))
    while not stepping.core.scheduler.num_preemptions:
        stepping.step()

    assert [each.submission.serial for each in stepping.core.scheduler.waiting] == [young]
    stepping.run()
    assert stepping.tokens[old, 0] == alone([1, 2, 3], greedy(36))
    assert stepping.tokens[young, 0] == alone([4, 5, 6], greedy(36))
    assert list(stepping.finished) == [(old, 0), (young, 0)]
    stepping.assert_nothing_is_held()


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    """What was not evicted meanwhile is not recomputed, and is not counted as a gift of the cache to the caller."""
    stepping = Stepping(FakeModel(), num_pages=12)
    stepping.submit([1, 2, 3], greedy(36))
    young = stepping.submit([4, 5, 6], greedy(36))
    stepping.run()

    assert stepping.core.scheduler.num_cached_tokens > 0
    assert stepping.started[young].cached_tokens == 0


def test_one_sequence_may_use_the_whole_pool() -> None:
    """A completion that fills the pool ends with CONTEXT_FULL, as if that were the model's context."""
    stepping = Stepping(FakeModel(), num_pages=4)
    assert stepping.core.max_sequence_tokens == 16
    first = stepping.submit([1, 2, 3], greedy(1000))
    second = stepping.submit([4, 5, 6], greedy(1000))
    stepping.run()

    for serial in (first, second):
        assert stepping.finished[serial, 0].reason is FinishReason.CONTEXT_FULL
        assert len(stepping.tokens[serial, 0]) == 13
    stepping.assert_nothing_is_held()


def test_a_prompt_waits_for_all_its_pages() -> None:
    """Nothing is admitted that would only be preempted in the middle of its prompt."""
    stepping = Stepping(FakeModel(), num_pages=8, max_step_tokens=64)
    stepping.submit(list(range(16)), greedy(9))
    big = stepping.submit(list(range(20, 40)), greedy(2))
    stepping.step()

    assert [each.submission.serial for each in stepping.core.scheduler.waiting] == [big]
    stepping.run()
    assert stepping.core.scheduler.num_preemptions == 0


def test_prompt_logprobs_are_computed_not_found() -> None:
    """A request that reports its prompt takes no pages whose logits it must see; afterwards it does."""
    stepping = Stepping(FakeModel(), max_step_tokens=6)
    prompt = list(range(16))
    stepping.submit(prompt, greedy(1))
    stepping.run()
    serial = stepping.submit(prompt, greedy(1, prompt_logprobs=3))
    stepping.run()

    started = stepping.started[serial]
    assert started.cached_tokens == 0
    assert [each.token_id for each in started.prompt_logprobs] == prompt[1:]
    assert all(len(each.top) == 3 for each in started.prompt_logprobs)


def test_prompt_logprobs_survive_a_preemption() -> None:
    """What was reported before a preemption is neither lost nor reported twice."""
    stepping = Stepping(FakeModel(), num_pages=11, max_step_tokens=2)
    stepping.submit([1, 2, 3], greedy(40))
    stepping.step()
    prompt = list(range(20, 44))
    serial = stepping.submit(prompt, greedy(4, prompt_logprobs=0))
    stepping.run()
    reference = Stepping(FakeModel())
    other = reference.submit(prompt, greedy(4, prompt_logprobs=0))
    reference.run()

    assert stepping.core.scheduler.num_preemptions > 0
    assert stepping.started[serial].prompt_logprobs == reference.started[other].prompt_logprobs


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4, 30])
def test_cancelling_frees_everything_in_every_phase(num_steps: int) -> None:
    """Queued, in the prompt, with followers waiting, decoding or ended: cancelling leaves nothing behind."""
    stepping = Stepping(FakeModel(), max_step_tokens=16)
    serial = stepping.submit(list(range(40)), SamplingParams(seed=1, max_tokens=8, n=3))
    for _ in range(num_steps):
        stepping.step()

    stepping.core.cancel(serial)
    stepping.core.cancel(serial)

    stepping.assert_nothing_is_held()
    assert not stepping.core.scheduler.has_work


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_a_deadline_ends_a_request_in_every_phase(num_steps: int) -> None:
    """Queued, in the prompt or decoding: when the deadline has passed the next step ends the request, and only it."""
    stepping = Stepping(FakeModel(), max_step_tokens=16)
    late = stepping.submit(list(range(40)), greedy(60), deadline_s=10.0)
    other = stepping.submit(list(range(40, 60)), greedy(8), deadline_s=100.0)
    for _ in range(num_steps):
        stepping.step()
    stepping.now_s = 10.0
    stepping.step()

    assert isinstance(stepping.errors[late], DeadlineExceeded)
    stepping.run()
    assert stepping.tokens[other, 0] == alone(list(range(40, 60)), greedy(8))
    stepping.assert_nothing_is_held()


def test_forgets_deadlines_of_requests_that_ended() -> None:
    """Far deadlines of many short requests do not pile up."""
    stepping = Stepping(FakeModel())
    for _ in range(300):
        stepping.submit([1], greedy(1), deadline_s=1e9)
        stepping.run()

    assert len(stepping.core.scheduler._deadlines) < 100


def test_load_counts_what_is_left_to_do() -> None:
    """Queued tokens are prompt rows not computed and completion tokens not generated, followers included."""
    stepping = Stepping(FakeModel(), max_step_tokens=8, max_num_seqs=1)
    stepping.submit(list(range(10)), greedy(5, n=2))
    stepping.submit(list(range(3)), greedy(4))
    assert stepping.core.load().queued_tokens == 2 * 15 + 7
    assert (stepping.core.load().running_requests, stepping.core.load().waiting_requests) == (0, 2)

    stepping.step()

    assert stepping.core.load().queued_tokens == 2 * 15 + 7 - 8
    assert (stepping.core.load().running_requests, stepping.core.load().waiting_requests) == (1, 1)
    stepping.run()
    assert stepping.core.load().queued_tokens == 0


def test_keeps_a_page_for_each_running_sequence() -> None:
    """A prompt is not admitted into pages that running sequences will need next: it would be preempted at once."""
    stepping = Stepping(FakeModel(), num_pages=7, max_step_tokens=64)
    stepping.submit([1, 2, 3, 4], greedy(9))
    stepping.step()
    big = stepping.submit(list(range(20, 40)), greedy(1))
    stepping.step()

    assert [each.submission.serial for each in stepping.core.scheduler.waiting] == [big]
    stepping.run()
    assert stepping.core.scheduler.num_preemptions == 0


def sevens() -> Guesses:
    """Make a speculation that drafts as much as there is room for, and is wrong."""
    return Guesses(lambda _: [7] * 40, seed=0, min_length=9, num_wrong_of_ten=0)


@pytest.mark.parametrize(("num_pages", "num_rows"), [(6, 3), (7, 3), (8, 7)])
def test_a_draft_takes_no_page_that_others_may_need(num_pages: int, num_rows: int) -> None:
    """Drafts reach into new pages only while every running sequence could have one more; nobody is preempted."""
    stepping = Stepping(FakeModel(), num_pages=num_pages, speculation=sevens())
    stepping.submit([1, 2, 3, 4, 5], greedy(30))
    stepping.submit([6, 7, 8, 9, 10], greedy(30))
    stepping.step()

    plan = stepping.core.scheduler.plan()

    assert [count for _, count in plan.chunks] == [num_rows] * 2
    assert all(sequence.num_computed + count <= 4 * len(sequence.page_ids) for sequence, count in plan.chunks)
    assert stepping.core.scheduler.num_preemptions == 0


def test_drafts_leave_room_for_the_token_that_follows_them() -> None:
    """A completion of n tokens is never computed beyond its n-th."""
    stepping = Stepping(FakeModel(), speculation=sevens())
    stepping.submit([1, 2, 3], greedy(3))
    stepping.step()

    plan = stepping.core.scheduler.plan()

    assert [count for _, count in plan.chunks] == [2]


def test_drafts_only_where_no_prompt_is_read() -> None:
    """Beside rows of prompts a step has one row for each decoding sequence."""
    stepping = Stepping(FakeModel(), max_step_tokens=8, speculation=sevens())
    stepping.submit([1, 2, 3], greedy(30))
    stepping.step()
    stepping.submit(list(range(20)), greedy(1))

    reports = [stepping.step() for _ in range(3)]

    assert [report.num_drafted_tokens for report in reports] == [0, 0, 0]
