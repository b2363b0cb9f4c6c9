"""Who computes next: continuous batching under a token budget, in order of seniority.

Owns the waiting queue, the running set, slots, and every change of a sequence's pages. Knows no tensors: it reads
token ids and moves page ids. Called only from the compute thread.

Order of a step: decode rows first, then prompts that are being read, then admission; beside decode rows, prompts get
only what `Pace` says fits into the step's time. Seniority is arrival; criticality
and then the serial number decide among those that came in the same step. A sequence is admitted only if its whole
prompt fits into the pool, and then holds all these pages, so pages run out only when outputs grow. Then the youngest
gives its pages up and waits again with prompt + output as its prompt (law 3). The eldest is never preempted and a
request that cannot fit into the pool alone is never accepted, so somebody always advances.
"""

import heapq
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.chain import ChainIds
from server.engine.pace import Pace
from server.engine.pages import PagePool, PageTable
from server.engine.plan import Plan
from server.engine.sequence import NO_SLOT, Seniority, Sequence, Submission
from server.engine.speculation import Speculation
from server.engine.waiting import WaitingQueue
from server.messages import Load

MIN_DEADLINES_KEPT = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler keeps to."""

    max_num_seqs: int
    """Slots."""
    max_step_tokens: int
    """Rows of a step."""
    max_sequence_tokens: int
    """Prompt + output of one sequence: the model's context, or the pool where that is smaller."""
    target_step_s: float | None = None
    """What a step with decode rows may take; None or 0 = any time."""


def _by_seniority(sequence: Sequence) -> Seniority:
    return sequence.seniority


class Scheduler:
    """Decides which rows a step computes, and keeps pages and slots.

    Args:
        pool: whose pages are handed out.
        table: mirror of the page lists of running sequences.
        chain: makes the addresses of pages.
        limits: budget and sizes.
        clock: seconds, the clock of `GenerateRequest.deadline_s`.
        speculation: chooses drafts for steps that have decode rows alone; None = there are none.
    """

    def __init__(
        self,
        pool: PagePool,
        table: PageTable,
        chain: ChainIds,
        limits: Limits,
        clock: Callable[[], float],
        speculation: Speculation | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.clock = clock
        self.running: list[Sequence] = []
        """Have a slot; eldest first."""
        self.waiting = WaitingQueue()
        """Hold neither slot nor pages."""
        self.submissions: dict[int, Submission] = {}
        """Not ended, by serial number."""
        self.admitted: list[Sequence] = []
        """Given a slot by the last plan."""
        self.pace = Pace(limits.target_step_s)
        """Told by the caller what steps took."""
        self.speculation = speculation
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._table = table
        self._chain = chain
        self._page_size = chain.page_size_tokens
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._deadlines: list[tuple[float, int]] = []
        self._step = 0

    @property
    def has_work(self) -> bool:
        """Whether anything is left to compute."""
        return bool(self.running or self.waiting)

    @property
    def num_free_slots(self) -> int:
        """Slots that no sequence has."""
        return len(self._free_slots)

    def submit(self, submission: Submission) -> None:
        """Take a request in: its first sequence waits for a slot, the others for the first."""
        request = submission.request
        submission.chain_root = self._chain.root(request.cache_salt)
        self.submissions[submission.serial] = submission
        if request.deadline_s is not None:
            self._watch(request.deadline_s, submission.serial)
        for index in range(request.sampling.n):
            seniority = Seniority(self._step, request.criticality, submission.serial, index)
            sequence = Sequence(
                submission, index, seniority=seniority, max_sequence_tokens=self.limits.max_sequence_tokens
            )
            submission.sequences.append(sequence)
            reason = sequence.finished_before()
            if reason is None:
                submission.followers.append(sequence)
            else:
                submission.ended_before.append((sequence, reason))
        if submission.followers:
            self.waiting.add(submission.followers.pop(0))

    def release_followers(self, submission: Submission) -> None:
        """Let the other sequences of a request wait for slots: the first has closed the prompt's pages."""
        followers, submission.followers = submission.followers, []
        for each in followers:
            self.waiting.add(each)

    def late(self) -> list[Submission]:
        """Return the requests whose deadline has passed, each once."""
        now = self.clock()
        late: list[Submission] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, serial = heapq.heappop(self._deadlines)
            if serial in self.submissions:
                late.append(self.submissions[serial])
        return late

    def plan(self) -> Plan:
        """Choose the rows of the next step and give them their pages.

        The caller computes them all, or drops the requests whose rows it could not compute.
        """
        self._step += 1
        self.admitted = []
        plan = Plan()
        preemptions = self.num_preemptions
        for sequence in list(self.running):
            if plan.num_rows == self.limits.max_step_tokens:
                break
            if sequence.slot != NO_SLOT and sequence.num_remaining == 1 and self._make_room(sequence):
                plan.add(sequence, 1)
        plan.num_decode_rows = plan.num_rows
        budget = self.limits.max_step_tokens - plan.num_rows
        if plan.num_decode_rows:  # somebody waits for this step's end
            budget = self.pace.limit(budget)
        for sequence in self.running:
            if sequence.num_remaining > 1 and budget > 0:
                self._find_pages(sequence)
                budget -= self._plan_chunk(plan, sequence, budget)
        while self.waiting and budget > 0 and self.num_free_slots and self.num_preemptions == preemptions:
            sequence = self.waiting.eldest
            if not self._admit(sequence):
                break
            budget -= self._plan_chunk(plan, sequence, budget)
        if self.speculation is not None and plan.chunks and plan.num_rows == plan.num_decode_rows:
            plan = self._speculate(plan, self.speculation)
        return plan

    def advance(self, sequence: Sequence, count: int) -> list[int]:
        """Count computed rows and close the pages that they fill.

        Returns:
            Page ids that are closed now and were not known before, in order.
        """
        sequence.num_computed += count
        closed: list[int] = []
        while (sequence.num_closed_pages + 1) * self._page_size <= sequence.num_computed:
            place = sequence.num_closed_pages
            page_id = sequence.page_ids[place]
            kept = self.pool.close(page_id, self._chain_id(sequence, place))
            if kept == page_id:
                closed.append(page_id)
            else:
                self._put(sequence, place, kept)
            sequence.num_closed_pages += 1
        return closed

    def end(self, sequence: Sequence, *, keep_pages: bool = True) -> None:
        """Take a sequence out, wherever it is. Ending its last sequence ends the request."""
        submission = sequence.submission
        if sequence.slot != NO_SLOT:
            self._leave(sequence, keep_pages=keep_pages)
        elif sequence in submission.followers:
            submission.followers.remove(sequence)
        else:
            self.waiting.remove(sequence)
        submission.sequences.remove(sequence)
        if not submission.sequences:
            self.submissions.pop(submission.serial, None)

    def drop(self, submission: Submission, *, keep_pages: bool = True) -> None:
        """Take a whole request out, in any phase. Dropping it again does nothing."""
        for sequence in reversed(list(submission.sequences)):
            self.end(sequence, keep_pages=keep_pages)
        self.submissions.pop(submission.serial, None)

    def load(self) -> Load:
        """Count what is going on. Rates are the caller's."""
        running = {sequence.seniority.serial for sequence in self.running}
        return Load(
            running_requests=len(running),
            waiting_requests=len(self.submissions) - len(running),
            queued_tokens=self.waiting.backlog_tokens + sum(self._backlog(sequence) for sequence in self.running),
            used_pages=self.pool.num_used,
            cached_pages=self.pool.num_cached,
            total_pages=self.pool.num_pages,
            preemptions=self.num_preemptions,
        )

    def _backlog(self, sequence: Sequence) -> int:
        return sequence.num_backlog_tokens + sum(each.num_backlog_tokens for each in sequence.submission.followers)

    def _watch(self, deadline_s: float, serial: int) -> None:
        heapq.heappush(self._deadlines, (deadline_s, serial))
        if len(self._deadlines) > 2 * len(self.submissions) + MIN_DEADLINES_KEPT:  # most are of requests long ended
            self._deadlines = [each for each in self._deadlines if each[1] in self.submissions]
            heapq.heapify(self._deadlines)

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        count = min(budget, sequence.num_remaining)
        plan.add(sequence, count)
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the pages of all its tokens, found or new, if the pool has room.

        Every running sequence may need one more page soon; without room for these an admission would end in a
        preemption.
        """
        found = self._count_cached(sequence)
        num_pages = -(-sequence.num_tokens // self._page_size)
        num_taken = sum(1 for page_id in found if not self.pool.is_held(page_id))
        if num_pages - len(found) + len(self.running) > self.pool.num_available - num_taken:
            return False
        self.waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        insort(self.running, sequence, key=_by_seniority)
        self.admitted.append(sequence)
        if sequence.submission.scheduled_s is None:
            sequence.submission.scheduled_s = self.clock()
        for page_id in found:
            self.pool.share(page_id)
        sequence.page_ids = found + self.pool.allocate(num_pages - len(found))
        self._table.write(sequence.slot, 0, sequence.page_ids)
        self._count_found(sequence, len(found))
        return True

    def _count_cached(self, sequence: Sequence) -> list[int]:
        """Return the closed pages in the pool that hold the beginning of a sequence, up to where logits are needed."""
        found: list[int] = []
        for place in range(sequence.first_needed_position // self._page_size):
            page_id = self.pool.find(self._chain_id(sequence, place))
            if page_id is None:
                break
            found.append(page_id)
        return found

    def _find_pages(self, sequence: Sequence) -> None:
        """Skip what others have computed since this one was admitted: bursts often share a prompt's beginning."""
        place = sequence.num_closed_pages
        while (place + 1) * self._page_size <= sequence.first_needed_position:
            page_id = self.pool.find(self._chain_id(sequence, place))
            if page_id is None:
                break
            self.pool.share(page_id)
            self.pool.release([sequence.page_ids[place]])
            self._put(sequence, place, page_id)
            place += 1
        self._count_found(sequence, place)

    def _count_found(self, sequence: Sequence, num_closed_pages: int) -> None:
        if num_closed_pages == sequence.num_closed_pages:
            return
        computed = num_closed_pages * self._page_size
        if not sequence.num_preemptions:  # its own pages, found again, are no gift of the cache
            sequence.num_cached_tokens += computed - sequence.num_computed
        self.num_cached_tokens += computed - sequence.num_computed
        sequence.num_closed_pages = num_closed_pages
        sequence.num_computed = computed

    def _make_room(self, sequence: Sequence) -> bool:
        """Make sure that a decoding sequence has a page for its next row; False = it was the youngest and waits."""
        if sequence.num_computed < len(sequence.page_ids) * self._page_size:
            return True
        while not self.pool.num_available:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._add_pages(sequence, 1)
        return True

    def _add_pages(self, sequence: Sequence, count: int) -> None:
        page_ids = self.pool.allocate(count)
        self._table.write(sequence.slot, len(sequence.page_ids), page_ids)
        sequence.page_ids += page_ids

    def _speculate(self, plan: Plan, speculation: Speculation) -> Plan:
        """Add drafts to a plan of decode rows, and the pages that they reach into."""
        decoding = [sequence for sequence, _ in plan.chunks]
        drafts = speculation.choose(decoding, self._room_for_drafts, self.limits.max_step_tokens)
        if not drafts:
            return plan
        for sequence, count in drafts:
            num_pages = -(-(sequence.num_tokens + count) // self._page_size) - len(sequence.page_ids)
            if num_pages > 0:
                self._add_pages(sequence, num_pages)
        return plan.with_drafts(drafts)

    def _room_for_drafts(self, sequence: Sequence) -> int:
        """Count the drafted tokens that a sequence can take: what it has pages for, or may have without harm.

        After all its drafts it chooses one more token. Every running sequence may need a page soon, so a draft takes
        none from the last ones.
        """
        if not sequence.submission.is_started:
            return 0
        num_spare = (self.pool.num_available - len(self.running)) // len(self.running)
        num_rows = (len(sequence.page_ids) + max(num_spare, 0)) * self._page_size - sequence.num_tokens
        return max(0, min(num_rows, sequence.num_free_tokens - 1))

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self.waiting.add(sequence)

    def _leave(self, sequence: Sequence, *, keep_pages: bool = True) -> None:
        """Give back slot and pages."""
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.pool.release(sequence.page_ids, keep=keep_pages)
        sequence.slot = NO_SLOT
        sequence.page_ids = []
        sequence.num_computed = 0
        sequence.num_closed_pages = 0

    def _put(self, sequence: Sequence, place: int, page_id: int) -> None:
        sequence.page_ids[place] = page_id
        self._table.write(sequence.slot, place, [page_id])

    def _chain_id(self, sequence: Sequence, place: int) -> bytes:
        if place >= len(sequence.chain_ids):
            self._chain.extend(sequence.chain_ids, sequence.submission.chain_root, sequence.token_ids, place + 1)
        return sequence.chain_ids[place]
