"""When drafts pay: how many rows of guessed tokens a step of decode rows takes along.

A plain step of B sequences has B rows and gives B tokens. With drafts it has R rows, takes c(R) times as long, and
gives one token more for every draft that is right and behind right ones only. If p is the probability of that, the
R - B drafted rows of the largest p are worth most, and tokens a second change by

    gain(R) = (1 + sum of their p / B) / c(R)

The R of the largest gain is taken if that is more than `MARGIN`, else no draft. Both sides are measured: c by
`StepCosts`, p by `Drafter`: after n tokens that stood before, the next one comes at a rate a(n), so a draft's tokens
have a(n), a(n) a(n + 1), ... With many sequences a row costs more, in a text that does not repeat p is small: one
formula says no. By the prefix law the answer is the same in every case.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

from server.engine.costs import StepCosts
from server.engine.drafts import Drafter
from server.engine.sequence import Sequence

STEP_ROWS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""R: few values, so that each is measured often, and whoever records the shape of a batch records few."""
MAX_DRAFT_TOKENS = 15
MAX_SEQUENCES = 2
"""Steps of more sequences are left alone: their rows keep the cores busy, so a drafted one is no longer nearly free
(0.91x at 8 sequences of code edits; 2 cores of Zen 5, November 2026, `ops.bench.speculation`), and looking every
sequence up takes Python time."""
MARGIN = 1.2
"""A gain is expected, not sure: it is the largest of several that are each known within a tenth."""


class Speculation:
    """Chooses the drafts of a step.

    Args:
        costs: told by the caller what steps took.
        max_sequences: of a step that takes drafts along.
    """

    def __init__(self, costs: StepCosts | None = None, *, max_sequences: int = MAX_SEQUENCES) -> None:
        self.costs = costs or StepCosts()
        self._max_sequences = max_sequences

    def choose(
        self, sequences: Many[Sequence], room: Callable[[Sequence], int], max_rows: int
    ) -> list[tuple[Sequence, int]]:
        """Write drafts behind the tokens of sequences; return which have some, and how many.

        Args:
            sequences: all that have one row in the step.
            room: how many drafted tokens a sequence can take.
            max_rows: of the step.
        """
        chances = self._chances(sequences, room) if len(sequences) <= self._max_sequences else []
        if not chances:
            return []
        num_plain = len(sequences)
        best_gain, num_best = MARGIN, 0
        for num_rows in STEP_ROWS:
            num_drafted = num_rows - num_plain
            if num_drafted > len(chances) or num_rows > max_rows:
                break
            cost = self.costs.ratio(num_plain, num_rows) if num_drafted > 0 else None
            if cost is None:
                continue
            expected = sum(chance for chance, _ in chances[:num_drafted])
            gain = (1 + expected / num_plain) / cost
            if gain > best_gain:
                best_gain, num_best = gain, num_drafted
        counts: dict[Sequence, int] = {}
        for _, sequence in chances[:num_best]:
            counts[sequence] = counts.get(sequence, 0) + 1
        return list(counts.items())

    def _chances(self, sequences: Many[Sequence], room: Callable[[Sequence], int]) -> list[tuple[float, Sequence]]:
        """Look the sequences up; return the probability of each token that could be drafted, best first."""
        chances: list[tuple[float, Sequence]] = []
        for sequence in sequences:
            if sequence.drafter is None:
                sequence.drafter = Drafter()
            draft = sequence.drafter.draft(sequence.known_tokens, MAX_DRAFT_TOKENS)
            if draft is None:
                continue
            count = min(room(sequence), MAX_DRAFT_TOKENS)
            sequence.token_ids[draft.position : draft.position + count] = draft.token_ids[:count]
            chances += [(chance, sequence) for chance in sequence.drafter.chances(draft, count)]
        chances.sort(key=_by_chance)  # stable: a sequence's drafts stay in order
        return chances


def _by_chance(chance: tuple[float, Sequence]) -> float:
    return -chance[0]
