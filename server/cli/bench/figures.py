"""From a recording to figures, by the names and formulas of vLLM's `bench serve`; README.md has them as a table."""

import collections
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.cli.bench.drive import OK, Call, Recording
from server.errors import ConfigError

Value = float | int | bool | str | None | dict[str, int]
Figures = dict[str, Value]
METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one completed request, in milliseconds."""

    ttft: float
    tpot: float | None
    """None: one token has no time per token after the first."""
    itl: tuple[float, ...]
    e2el: float


@dataclass(frozen=True, slots=True)
class Goal:
    """What a good request meets; in milliseconds, None = anything."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Goal":
        """Read `ttft:X tpot:Y e2el:Z`, any of them.

        Raises:
            ConfigError: says what is taken.
        """
        wanted: dict[str, float] = {}
        for part in text.replace(",", " ").split():
            name, _, limit = part.partition(":")
            try:
                wanted[name] = float(limit)
            except ValueError:
                name = ""
            if name not in {"ttft", "tpot", "e2el"} or not wanted[name] > 0:
                raise ConfigError(f"--goodput: got {part!r}, want ttft:MS, tpot:MS or e2el:MS")
        return cls(**wanted)

    def is_met(self, seen: Latencies) -> bool:
        """Tell whether one request meets all of it."""
        pairs = ((self.ttft, seen.ttft), (self.tpot, seen.tpot or 0.0), (self.e2el, seen.e2el))
        return all(limit is None or value <= limit for limit, value in pairs)


def latencies(call: Call) -> Latencies | None:
    """Return the latencies of a completed request; None for one that brought no token or no end."""
    if call.status != OK or not call.frames or call.ended_s is None:
        return None
    first_s, tokens = call.frames[0].at_s, call.usage.completion_tokens
    gaps = itertools.pairwise(frame.at_s for frame in call.frames)
    return Latencies(
        ttft=(first_s - call.sent_s) * 1e3,
        tpot=(call.ended_s - first_s) / (tokens - 1) * 1e3 if tokens > 1 else None,
        itl=tuple((later - sooner) * 1e3 for sooner, later in gaps),
        e2el=(call.ended_s - call.sent_s) * 1e3,
    )


def samples(recording: Recording) -> dict[str, list[float]]:
    """Return every latency in milliseconds, by metric."""
    seen = [each for call in recording.calls if (each := latencies(call))]
    return {
        "ttft": [each.ttft for each in seen],
        "tpot": [each.tpot for each in seen if each.tpot is not None],
        "itl": [gap for each in seen for gap in each.itl],
        "e2el": [each.e2el for each in seen],
    }


def figures(recording: Recording, goal: Goal | None = None) -> Figures:
    """Compute all figures of a run; None where there is nothing to compute from."""
    done = [call for call in recording.calls if call.status == OK]
    duration_s = recording.ended_s - recording.begun_s
    input_tokens = sum(call.usage.prompt_tokens for call in done)
    output_tokens = sum(call.usage.completion_tokens for call in done)
    num_frames = sum(len(call.frames) for call in done)
    statuses = collections.Counter(call.status for call in recording.calls)
    delays_ms = [(call.sent_s - call.due_s) * 1e3 for call in recording.calls]
    result: Figures = {
        "duration": duration_s,
        "partial": recording.is_partial,
        "num_prompts": recording.asked,
        "completed": len(done),
        "failed": len(recording.calls) - len(done),
        "statuses": dict(statuses),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": _ratio(len(done), duration_s),
        "output_throughput": _ratio(output_tokens, duration_s),
        "total_token_throughput": _ratio(input_tokens + output_tokens, duration_s),
        "prefix_hit_rate": _ratio(sum(call.usage.cached_tokens for call in done), input_tokens),
        "mean_tokens_per_frame": _ratio(output_tokens, num_frames),
        "p99_send_delay_ms": percentile(delays_ms, 99),
    }
    if goal is not None:
        good = sum(goal.is_met(each) for call in done if (each := latencies(call)))
        result["request_goodput"] = _ratio(good, duration_s)
    for name, values in samples(recording).items():
        result[f"mean_{name}_ms"] = _ratio(math.fsum(values), len(values))
        result[f"median_{name}_ms"] = percentile(values, 50)
        result |= {f"p{percent}_{name}_ms": percentile(values, percent) for percent in PERCENTILES}
    return result


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, between two values in proportion; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def tokens_per_s(recording: Recording, width_s: float) -> list[float]:
    """Return output tokens per second over time, in windows of `width_s` from the run's start."""
    counts: collections.Counter[int] = collections.Counter()
    for call in recording.calls:
        before = 0
        for frame in call.frames:
            counts[int((frame.at_s - recording.begun_s) / width_s)] += frame.sequence - before
            before = frame.sequence
    return [counts[window] / width_s for window in range(max(counts, default=-1) + 1)]


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None
