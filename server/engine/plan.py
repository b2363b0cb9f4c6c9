"""What one step computes (a plan) and what came of it (an outcome). From scheduler to runner and sampler and back."""

from dataclasses import dataclass, field
from typing import NamedTuple

from server.engine.sequence import Sequence, Submission
from server.messages import TokenLogprob


class Chunk(NamedTuple):
    """The next rows of a sequence, from its first uncomputed token on."""

    sequence: Sequence
    num_rows: int


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
    samples: list[Sequence] = field(default_factory=list)
    """Whose next token is chosen in this step."""
    sample_rows: list[int] = field(default_factory=list)
    spans: list[ScoredSpan] = field(default_factory=list)
    num_rows: int = 0
    num_decode_rows: int = 0

    def add(self, sequence: Sequence, count: int) -> None:
        """Plan the next `count` rows of a sequence."""
        start, end = sequence.num_computed, sequence.num_computed + count
        reported = sequence.prompt_logprobs
        if reported is not None:
            first = max(start, len(reported))
            last = min(end, sequence.num_prompt_tokens - 1)
            if first < last:
                self.spans.append(ScoredSpan(sequence, self.num_rows + first - start, first, last - first))
        if end == sequence.num_tokens and sequence.max_tokens:
            self.samples.append(sequence)
            self.sample_rows.append(self.num_rows + count - 1)
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
        """Return one plan per request: by the prefix law they give the same bits as the whole."""
        parts: dict[Submission, Plan] = {}
        for sequence, count in self.chunks:
            parts.setdefault(sequence.submission, Plan()).add(sequence, count)
        return parts


@dataclass(slots=True)
class Outcome:
    """What was sampled and scored, in the plan's order."""

    token_ids: list[int]
    """-1 = the row's logits hold no distribution."""
    logprobs: list[TokenLogprob | None]
    scores: list[list[TokenLogprob] | None]
    """One list per span; None = as -1 above."""
