"""From samples to medians, ratios and verdicts; as a JSON file and as Markdown tables."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ops.bench.compare.goals import BETTER_DTYPE, OURS, TRANSFORMERS, goals
from ops.bench.compare.rounds import MAX_OTHERS_SHARE, Sample

Facts = Mapping[str, object]


class Spread(NamedTuple):
    """Of the rounds' values."""

    median: float
    low: float
    high: float
    is_disturbed: bool
    """No round was clean, so that the disturbed ones are all there is."""


class Ratio(NamedTuple):
    """Ours through theirs."""

    value: float
    """Of the medians."""
    low: float
    high: float
    """Of the ratios within single rounds."""
    least: float | None
    """The goal; None = there is none."""

    @property
    def verdict(self) -> str:
        """Say whether the goal is reached."""
        if self.least is None:
            return ""
        return "pass" if self.value >= self.least else "MISS"


@dataclass(frozen=True, slots=True)
class Result:
    """All that was seen, and what follows from it."""

    facts: Facts
    """Machine, versions, commands, dates."""
    samples: Sequence[Sample]

    @property
    def measures(self) -> list[str]:
        """Return the columns."""
        return list(dict.fromkeys(each.measure for each in self.samples))

    @property
    def contenders(self) -> list[str]:
        """Return the rows."""
        return list(dict.fromkeys(each.contender for each in self.samples))

    def taken(self, contender: str, measure: str) -> list[Sample]:
        """Return the clean samples of one cell; all of them where none is clean."""
        cell = [each for each in self.samples if (each.contender, each.measure) == (contender, measure)]
        return [each for each in cell if not each.is_disturbed] or cell

    def spread(self, contender: str, measure: str) -> Spread:
        """Return one cell of the table of rates."""
        taken = self.taken(contender, measure)
        rates = [each.tokens_per_s for each in taken]
        return Spread(statistics.median(rates), min(rates), max(rates), taken[0].is_disturbed)

    def ratio(self, rival: str, measure: str) -> Ratio:
        """Return one cell of the table of ratios."""
        name = self._fastest(rival, measure)
        ours = {each.round: each.tokens_per_s for each in self.taken(OURS, measure)}
        theirs = {each.round: each.tokens_per_s for each in self.taken(name, measure)}
        value = statistics.median(ours.values()) / statistics.median(theirs.values())
        single = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()] or [value]
        return Ratio(value, min(single), max(single), goals().get(rival, {}).get(measure))

    @property
    def rivals(self) -> list[str]:
        """Return whom we are compared with; the two dtypes of transformers are one."""
        if OURS not in self.contenders:
            return []
        others = [each for each in self.contenders if each != OURS]
        names = [BETTER_DTYPE if each in TRANSFORMERS.values() else each for each in others]
        return list(dict.fromkeys(names))

    def _fastest(self, rival: str, measure: str) -> str:
        if rival != BETTER_DTYPE:
            return rival
        present = [each for each in TRANSFORMERS.values() if each in self.contenders]
        return max(present, key=lambda name: self.spread(name, measure).median)


def as_json(result: Result) -> dict[str, object]:
    """Return everything, figures that follow from the samples included."""
    return {
        **result.facts,
        "medians_tokens_per_s": {
            who: {what: round(result.spread(who, what).median, 1) for what in result.measures}
            for who in result.contenders
        },
        "ratios": {
            who: {what: {**_rounded(result.ratio(who, what))} for what in result.measures} for who in result.rivals
        },
        "samples": [asdict(each) for each in result.samples],
    }


def as_markdown(result: Result, picture: str) -> str:
    """Return a page with both tables."""
    return "\n".join(_page(result, picture)) + "\n"


def _page(result: Result, picture: str) -> Iterator[str]:
    facts = result.facts
    retaken = sum(each.tries - 1 for each in result.samples)
    dropped = sum(each.is_disturbed for each in result.samples)
    yield "# Pathfox next to others on this CPU\n"
    yield f"`{facts['command']}`, {facts['begun']} to {facts['ended']}.\n"
    yield "Ours is measured through everything: gRPC on loopback, scheduler, sampler, detokeniser. Others are bare."
    yield f"All have {facts['threads']} threads, run greedily on random tokens, and cache no prefix; decode is after"
    yield "prompts of 192 tokens. Samples are interleaved; one during which others used more than"
    yield f"{MAX_OTHERS_SHARE:.0%} of the cores was taken again ({retaken} times). {dropped} of {len(result.samples)}"
    yield "stayed disturbed and are left out; * = nothing else was there.\n"
    yield f"![ratios]({picture})\n"
    yield "## How many times as fast as each (least wanted)\n"
    yield from _table(
        result.measures, {who: [_ratio(result.ratio(who, what)) for what in result.measures] for who in result.rivals}
    )
    yield "\n## Tokens per second, median [least-most]\n"
    yield from _table(
        result.measures,
        {who: [_spread(result.spread(who, what)) for what in result.measures] for who in result.contenders},
    )
    yield "\n## Machine and versions\n"
    for name in ("machine", "versions"):
        table = facts[name]
        assert isinstance(table, Mapping)
        yield from (f"- {key}: {_plain(value)}" for key, value in table.items())


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    yield from (f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())


def _ratio(ratio: Ratio) -> str:
    goal = "" if ratio.least is None else f" (>= {ratio.least:g}) {ratio.verdict}"
    return f"{ratio.value:.2f}x{goal}"


def _spread(spread: Spread) -> str:
    mark = "*" if spread.is_disturbed else ""
    return f"{spread.median:.0f}{mark} [{spread.low:.0f}-{spread.high:.0f}]"


def _rounded(ratio: Ratio) -> dict[str, float | str | None]:
    numbers = {"value": round(ratio.value, 3), "low": round(ratio.low, 3), "high": round(ratio.high, 3)}
    return {**numbers, "least": ratio.least, "verdict": ratio.verdict}


def _plain(value: object) -> str:
    match value:
        case Mapping():
            return ", ".join(f"{key} {inner}" for key, inner in value.items()) or "as pathfox"
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)
