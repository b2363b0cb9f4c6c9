"""What one step computes (a plan) and what came of it (an outcome). From scheduler to runner and sampler and back."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from server.engine.chain import TokenArray
from server.engine.sequence import Sequence, Submission
from server.messages import TokenLogprob


class Chunk(NamedTuple):
    """The next rows of a sequence, from its first uncomputed token on; those behind its tokens are of its draft."""

    sequence: Sequence
    num_rows: int


class Sample(NamedTuple):
    """A token to be chosen, from the logits of the row before it."""

    sequence: Sequence
    position: int

    @property
    def output(self) -> TokenArray:
        """Return a view of the generated tokens before it, drafted ones included: it counts only if they were right."""
        return self.sequence.token_ids[self.sequence.num_prompt_tokens : self.position]


class ScoredSpan(NamedTuple):
    """Rows of a prompt whose next token's log probability is reported."""

    sequence: Sequence
    first_row: int
    first_position: int
    num_rows: int


@dataclass(slots=True)
class Plan:
    """One batch of rows. Logits are wanted of `sample_rows`, then of the spans' rows, in this order."""

    chunks: list[Chunk] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    """Behind the last token of a sequence, and behind every token of its draft."""
    sample_rows: list[int] = field(default_factory=list)
    spans: list[ScoredSpan] = field(default_factory=list)
    num_rows: int = 0
    num_decode_rows: int = 0
    """Of sequences that have one row. They come first."""
    num_drafted_tokens: int = 0

    def add(self, sequence: Sequence, count: int) -> None:
        """Plan the next `count` rows of a sequence. Where they are more than it has tokens, its draft follows."""
        start, end = sequence.num_computed, sequence.num_computed + count
        reported = sequence.prompt_logprobs
        if reported is not None:
            first = max(start, len(reported))
            last = min(end, sequence.num_prompt_tokens - 1)
            if first < last:
                self.spans.append(ScoredSpan(sequence, self.num_rows + first - start, first, last - first))
        if end >= sequence.num_tokens and sequence.max_tokens:
            for position in range(sequence.num_tokens, end + 1):
                self.samples.append(Sample(sequence, position))
                self.sample_rows.append(self.num_rows + position - 1 - start)
            self.num_drafted_tokens += end - sequence.num_tokens
        self.chunks.append(Chunk(sequence, count))
        self.num_rows += count

    def without(self, submission: Submission) -> "Plan":
        """Return a plan of the other requests' rows."""
        plan = Plan()
        for place, (sequence, count) in enumerate(self.chunks):
            if sequence.submission is not submission:
                plan.add(sequence, count)
                plan.num_decode_rows += place < self.num_decode_rows
        return plan

    def split(self) -> dict[Submission, "Plan"]:
        """Return one plan per request, without drafts: by the prefix law they give the same bits as the whole."""
        parts: dict[Submission, Plan] = {}
        for sequence, count in self.chunks:
            parts.setdefault(sequence.submission, Plan()).add(sequence, min(count, sequence.num_remaining))
        return parts

    def with_drafts(self, drafts: Iterable[tuple[Sequence, int]]) -> "Plan":
        """Return a plan of the same decode rows, where these sequences have so many drafted tokens too."""
        counts = dict(drafts)
        plan = Plan(num_decode_rows=len(self.chunks) - len(counts))
        for sequence, count in self.chunks:
            if sequence not in counts:
                plan.add(sequence, count)
        for sequence, count in counts.items():
            plan.add(sequence, 1 + count)
        return plan

    def settle(self, outcome: "Outcome") -> list[int]:
        """Leave of plan and outcome what would have been without drafts: several steps of their sequences in one.

        A row counts if the tokens before it in the draft are those that were chosen, and none of them ended the
        sequence.

        Returns:
            The places of the kept samples.
        """
        if not self.num_drafted_tokens:
            return list(range(len(self.samples)))
        kept: list[int] = []
        num_wrong: dict[Sequence, int] = {}
        for place, (sequence, position) in enumerate(self.samples):
            if sequence in num_wrong:
                num_wrong[sequence] += 1
                continue
            kept.append(place)
            token_id = outcome.token_ids[place]
            is_drafted = place + 1 < len(self.samples) and self.samples[place + 1].sequence is sequence
            if is_drafted and (token_id != sequence.token_ids[position] or sequence.ends_with(token_id)):
                num_wrong[sequence] = 0
        self.chunks = [Chunk(sequence, count - num_wrong.get(sequence, 0)) for sequence, count in self.chunks]
        self.samples = [self.samples[place] for place in kept]
        outcome.token_ids = [outcome.token_ids[place] for place in kept]
        outcome.logprobs = [outcome.logprobs[place] for place in kept]
        return kept


@dataclass(slots=True)
class Outcome:
    """What was sampled and scored, in the plan's order."""

    token_ids: list[int]
    """-1 = the row's logits hold no distribution."""
    logprobs: list[TokenLogprob | None]
    scores: list[list[TokenLogprob] | None]
    """One list per span; None = as -1 above."""
