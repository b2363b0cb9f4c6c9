"""The engine's heart: plan, run, sample, commit, every step. No thread and no event loop is known here.

Owns scheduler, pool, runner and sampler. A request's failure is found here and ends that request alone.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from hashlib import blake2b

import structlog
from torch import Tensor

from server.engine.chain import ChainIds, TokenArray
from server.engine.events import Emission, EmittedToken
from server.engine.pages import PagePool, PageTable
from server.engine.plan import Outcome, Plan, Sample
from server.engine.report import Phase, Rate, StepReport, Stopwatch
from server.engine.runner import Runner, StepModel, can_roll_back
from server.engine.sampler import Sampler
from server.engine.scheduler import Limits, Scheduler
from server.engine.sequence import NO_SLOT, Sequence, Submission
from server.engine.speculation import Speculation
from server.errors import DeadlineExceeded, Internal, PathfoxError
from server.messages import Finished, FinishReason, GenerateRequest, Load, Page, Started

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

LogitsObserver = Callable[[Many[Sample], Tensor], None]
"""Given the tokens that are chosen and their logits, one row each: for tests of the prefix law."""

CHECKSUM_BYTES = 16

ClosedPage = tuple[bytes, int]
"""Chain id and page id."""


@dataclass(frozen=True, slots=True)
class CoreSizes:
    """How much an engine takes on."""

    max_num_seqs: int
    max_step_tokens: int
    num_pages: int
    target_step_s: float | None = None
    """What a step with decode rows may take; None or 0 = any time."""


class Core:
    """An engine without a thread: `submit`, `step` until nothing is left, take the `emissions`.

    Args:
        model: what computes.
        sizes: slots, rows a step, pages.
        fingerprint: the model's compute class.
        clock: seconds, the clock of deadlines and of what steps take.
        speculation: chooses drafts, if the model can take rows back; None = there are none.
        logits_observer: sees the logits of every sampled row.
    """

    def __init__(
        self,
        model: StepModel,
        sizes: CoreSizes,
        *,
        fingerprint: str,
        clock: Callable[[], float],
        speculation: Speculation | None = None,
        logits_observer: LogitsObserver | None = None,
    ) -> None:
        page_size = model.spec.page_size_tokens
        max_tokens = min(model.spec.context_length_tokens, sizes.num_pages * page_size)
        table = PageTable(sizes.max_num_seqs, -(-max_tokens // page_size), model.device)
        self._limits = Limits(sizes.max_num_seqs, sizes.max_step_tokens, max_tokens, sizes.target_step_s)
        self._speculation = speculation if can_roll_back(model) else None
        self._new_scheduler: Callable[[], Scheduler] = lambda: Scheduler(
            PagePool(sizes.num_pages), table, ChainIds(fingerprint, page_size), self._limits, clock, self._speculation
        )
        self.scheduler = self._new_scheduler()
        self.watch = Stopwatch(clock)
        """Times the phases of the thread that calls `step`."""
        self.runner = Runner(model, table, num_pages=sizes.num_pages, max_num_seqs=sizes.max_num_seqs, watch=self.watch)
        self.sampler = Sampler(sizes.max_num_seqs, model.spec.vocabulary_size)
        self.emissions: list[tuple[int, Emission]] = []
        """What readers shall see, by the requests' serial numbers. Taken by whoever calls `step`."""
        self.closed: list[ClosedPage] = []
        """Pages that the last step closed first, for a page store."""
        self._fingerprint = fingerprint
        self._clock = clock
        self._logits_observer = logits_observer
        self._prefill_rate = Rate()
        self._decode_rate = Rate()

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt + output that one sequence may have: the model's context, or the pool where that is smaller."""
        return self._limits.max_sequence_tokens

    def submit(self, request: GenerateRequest, prompt: TokenArray, serial: int) -> None:
        """Take in a request that was checked."""
        try:
            submission = Submission(request, serial, prompt, submitted_s=self._clock())
            self.scheduler.submit(submission)
            if len(submission.ended_before) == len(submission.sequences):
                self._start(submission)
        except Exception:
            log.exception("submit_failed", request_id=request.request_id)
            self.cancel(serial)
            self.emissions.append((serial, Internal("the engine could not take this request in")))

    def cancel(self, serial: int) -> None:
        """Drop a request; one that has ended is not there any more, which is fine."""
        submission = self.scheduler.submissions.get(serial)
        if submission is not None:
            self.scheduler.drop(submission)

    def fail(self, submission: Submission, error: PathfoxError, *, keep_pages: bool = True) -> None:
        """End a request by an error."""
        self.scheduler.drop(submission, keep_pages=keep_pages)
        self.emissions.append((submission.serial, error))

    def fail_all(self, error: PathfoxError) -> None:
        """End every request by an error."""
        for submission in list(self.scheduler.submissions.values()):
            self.fail(submission, error)

    def recover(self, error: PathfoxError) -> None:
        """End every request by an error and begin with an empty pool: after a mistake of our own nothing is trusted."""
        serials = list(self.scheduler.submissions)
        self.scheduler = self._new_scheduler()
        self.closed = []
        self.emissions += [(serial, error) for serial in serials]

    def read_page(self, chain_id: bytes, page_id: int) -> Page:
        """Copy a closed page out of the pool."""
        payload = self.runner.read_page(page_id)
        return Page(chain_id, payload, blake2b(payload, digest_size=CHECKSUM_BYTES).digest())

    def load(self) -> Load:
        """Count what is going on."""
        return replace(
            self.scheduler.load(),
            prefill_tokens_per_s=self._prefill_rate.tokens_per_s,
            decode_tokens_per_s=self._decode_rate.tokens_per_s,
        )

    def step(self) -> StepReport:
        """Advance every scheduled sequence by one batch of rows."""
        started_s = self._clock()
        scheduler = self.scheduler
        preemptions, cached = scheduler.num_preemptions, scheduler.num_cached_tokens
        self.closed = []
        for submission in scheduler.late():
            self.fail(submission, DeadlineExceeded("the request's deadline has passed"))
        plan = self._plan()
        planned_s = self._clock()
        self.watch.lap(Phase.SCHEDULE)
        outcome = self._try_to_execute(plan)
        computed_s = self._clock()
        if outcome is not None:
            self._commit(plan, outcome)
        else:
            self._execute_apart(plan)
        ended_s = self._clock()
        self.watch.lap(Phase.COMMIT)
        return self._report(
            plan,
            duration_s=ended_s - started_s,
            model_s=computed_s - planned_s,
            num_preemptions=scheduler.num_preemptions - preemptions,
            num_cached_tokens=scheduler.num_cached_tokens - cached,
            is_failed=outcome is None,
        )

    def _plan(self) -> Plan:
        """Plan a step. A request whose parameters the sampler cannot take ends before its rows are computed."""
        plan = self.scheduler.plan()
        for sequence in self.scheduler.admitted:
            submission = sequence.submission
            if sequence.slot == NO_SLOT:  # another completion of it has failed just now
                continue
            try:
                self.sampler.load(sequence)
            except Exception:
                log.exception("sampling_params_refused", request_id=submission.request.request_id)
                self.fail(submission, Internal("the engine could not take this request's sampling parameters"))
                plan = plan.without(submission)
        return plan

    def _report(
        self,
        plan: Plan,
        *,
        duration_s: float,
        model_s: float,
        num_preemptions: int,
        num_cached_tokens: int,
        is_failed: bool,
    ) -> StepReport:
        num_drafted = plan.num_drafted_tokens
        num_accepted = len(plan.samples) - len(plan.chunks) if num_drafted and not is_failed else 0
        num_decode = plan.num_rows if num_drafted else plan.num_decode_rows
        num_prefill = plan.num_rows - num_decode
        if num_decode:
            self._decode_rate.add(num_decode - num_drafted + num_accepted, duration_s)
            if self._speculation is not None and not num_prefill and not is_failed:
                self._speculation.costs.note(num_decode, duration_s)
        if num_prefill:
            self._prefill_rate.add(num_prefill, duration_s)
            if not is_failed:  # else its rows were computed twice
                self.scheduler.pace.note(num_prefill, duration_s)
        return StepReport(
            duration_s=duration_s,
            model_s=model_s,
            num_rows=plan.num_rows,
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            num_drafted_tokens=num_drafted,
            num_accepted_tokens=num_accepted,
            num_cached_tokens=num_cached_tokens,
            num_preemptions=num_preemptions,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            used_pages=self.scheduler.pool.num_used,
            cached_pages=self.scheduler.pool.num_cached,
            free_pages=self.scheduler.pool.num_free,
            is_failed=is_failed,
            phases_s=self.watch.take(),
        )

    def _execute(self, plan: Plan) -> Outcome:
        if not plan.chunks:
            return Outcome([], [], [])
        logits = self.runner.run(plan)
        outcome = self.sampler.run(plan, logits)
        self.watch.lap(Phase.SAMPLE)
        kept = plan.settle(outcome)
        if self._logits_observer is not None:
            self._logits_observer(plan.samples, logits[kept])
        return outcome

    def _try_to_execute(self, plan: Plan) -> Outcome | None:
        try:
            return self._execute(plan)
        except Exception:
            log.exception("step_failed", num_rows=plan.num_rows, num_requests=len(plan.split()))
            return None

    def _execute_apart(self, plan: Plan) -> None:
        """Find out whose rows make a step fail, by running each request alone.

        By the prefix law the others see no difference. A request that fails alone ends with `Internal`. If all do, the
        fault is not in them, and nothing in the pool is trusted.
        """
        parts = plan.split()
        survivors = 0
        for submission, part in parts.items():
            outcome = self._try_to_execute(part)
            if outcome is None:
                self.fail(submission, Internal("the step that computed this request failed"), keep_pages=False)
            else:
                survivors += 1
                self._commit(part, outcome)
        if not survivors:
            self.scheduler.pool.forget_cached()

    def _commit(self, plan: Plan, outcome: Outcome) -> None:
        """Write the outcome into the sequences, and tell it."""
        self._drop_poisoned(plan, outcome)
        for span, scores in zip(plan.spans, outcome.scores, strict=True):
            if scores is not None and span.sequence.prompt_logprobs is not None:
                span.sequence.prompt_logprobs += scores
        self._advance(plan)
        self._accept(plan, outcome)

    def _advance(self, plan: Plan) -> None:
        """Count the computed rows, close full pages, and start requests whose prompt is in."""
        closing: list[tuple[int, int]] = []
        for sequence, num_rows in plan.chunks:
            if sequence.slot != NO_SLOT:  # else it was dropped just now
                closing += [(sequence.slot, page_id) for page_id in self.scheduler.advance(sequence, num_rows)]
        if closing:
            self.runner.close(closing)
            self._note_closed(closing)
        for sequence, _ in plan.chunks:
            if sequence.num_remaining == 0 and not (sequence.submission.is_started and sequence.max_tokens):
                self._prompt_is_in(sequence)

    def _accept(self, plan: Plan, outcome: Outcome) -> None:
        """Append the chosen tokens, and finish what they end."""
        now_s = self._clock()
        for (sequence, _), token_id, logprob in zip(plan.samples, outcome.token_ids, outcome.logprobs, strict=True):
            if sequence.slot == NO_SLOT:
                continue
            if sequence.first_token_s is None:
                sequence.first_token_s = now_s
            reason = sequence.accept(token_id)
            if reason is not FinishReason.STOP:
                self.emissions.append((sequence.submission.serial, EmittedToken(sequence.index, token_id, logprob)))
            if reason is not None:
                self._finish(sequence, reason)

    def _drop_poisoned(self, plan: Plan, outcome: Outcome) -> None:
        poisoned = {
            s.sequence.submission for s, token_id in zip(plan.samples, outcome.token_ids, strict=True) if token_id < 0
        }
        poisoned |= {
            s.sequence.submission for s, scores in zip(plan.spans, outcome.scores, strict=True) if scores is None
        }
        for submission in poisoned:
            self.fail(submission, Internal("the model's logits are not finite"), keep_pages=False)

    def _note_closed(self, closing: list[tuple[int, int]]) -> None:
        for _, page_id in closing:
            chain_id = self.scheduler.pool.chain_id_of(page_id)
            assert chain_id is not None
            self.closed.append((chain_id, page_id))

    def _prompt_is_in(self, sequence: Sequence) -> None:
        submission = sequence.submission
        if not submission.is_started:
            self._start(submission, sequence)
            self.scheduler.release_followers(submission)
        if not sequence.max_tokens:
            self._finish(sequence, FinishReason.LENGTH)

    def _start(self, submission: Submission, first: Sequence | None = None) -> None:
        now = self._clock()
        scheduled_s = now if submission.scheduled_s is None else submission.scheduled_s
        submission.is_started = True
        started = Started(
            fingerprint=self._fingerprint,
            cached_tokens=min(first.num_cached_tokens, first.num_prompt_tokens) if first else 0,
            queued_s=scheduled_s - submission.submitted_s,
            prefill_s=now - scheduled_s,
            prompt_logprobs=tuple(first.prompt_logprobs or ()) if first else (),
        )
        self.emissions.append((submission.serial, started))
        for sequence, reason in submission.ended_before:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        submission = sequence.submission
        stopped = reason is FinishReason.STOP_SEQUENCE
        first_token_s = sequence.first_token_s
        finished = Finished(
            index=sequence.index,
            reason=reason,
            completion_tokens=sequence.num_output_tokens,
            matched_stop_token_id=int(sequence.token_ids[sequence.num_tokens - 1]) if stopped else None,
            decode_s=0.0 if first_token_s is None else self._clock() - first_token_s,
        )
        self.scheduler.end(sequence)
        self.emissions.append((submission.serial, finished))
