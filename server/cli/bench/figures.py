"""From a recording to figures, by the names and formulas of vLLM's `bench serve`.

Source: vllm-project/vllm, vllm/benchmarks/serve.py at 009e6d4 and lib/endpoint_request_func.py at 02cfb53. Where one
message brings several tokens it is one gap of ITL, as there; `mean_tokens_per_frame` says how many that were. AIPerf
(once GenAI-Perf) calls our TPOT "inter token latency" and our ITL "inter chunk latency".
"""

import collections
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.cli.bench.recording import Call, Outcome, Recording
from server.errors import ConfigError

Value = float | int | bool | str | None | dict[str, int]
Figures = dict[str, Value]
GOALS = ("ttft", "tpot", "e2el")
DEFAULT_PERCENTILES = (50.0, 90.0, 99.0)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one completed request, in milliseconds."""

    ttft: float
    """From sending to the first message with tokens."""
    tpot: float | None
    """Mean time of a token after the first; None: there was one."""
    itl: tuple[float, ...]
    """Every gap between messages with tokens."""
    e2el: float
    """From sending to the last message with tokens."""


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
            if name not in GOALS or not wanted[name] > 0:
                raise ConfigError(f"--goodput: got {part!r}, want ttft:MS, tpot:MS or e2el:MS, each above 0")
        if not wanted:
            raise ConfigError(f"--goodput: got {text!r}, want ttft:MS, tpot:MS or e2el:MS")
        return cls(**wanted)

    def is_met(self, seen: Latencies) -> bool:
        """Tell whether one request meets all of it; an answer of one token meets any TPOT."""
        pairs = ((self.ttft, seen.ttft), (self.tpot, seen.tpot or 0.0), (self.e2el, seen.e2el))
        return all(limit is None or value <= limit for limit, value in pairs)


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Read `50,90,99.9`.

    Raises:
        ConfigError: says what is taken.
    """
    try:
        percentiles = tuple(float(part) for part in text.split(","))
    except ValueError:
        percentiles = (math.nan,)
    if not all(0 <= each <= 100 for each in percentiles):
        raise ConfigError(f"--percentiles: got {text!r}, want numbers from 0 to 100 with commas between")
    return percentiles


def latencies(call: Call) -> Latencies:
    """Return the latencies of a completed request."""
    first_s, last_s = call.frames[0].at_s, call.frames[-1].at_s
    gaps = itertools.pairwise(frame.at_s for frame in call.frames)
    tokens = output_tokens(call)
    return Latencies(
        ttft=(first_s - call.sent_s) * 1e3,
        tpot=(last_s - first_s) / (tokens - 1) * 1e3 if tokens > 1 else None,
        itl=tuple((later - sooner) * 1e3 for sooner, later in gaps),
        e2el=(last_s - call.sent_s) * 1e3,
    )


def completed(recording: Recording) -> list[Call]:
    """Return the requests that were answered to their end."""
    return [call for call in recording.calls if call.outcome is Outcome.COMPLETED]


def input_tokens(call: Call) -> int:
    """Return a prompt's length: by the server's count, where it counts."""
    return call.usage.prompt_tokens or call.prompt_tokens


def output_tokens(call: Call) -> int:
    """Return an answer's length: by the server's count, where it counts."""
    return call.usage.completion_tokens or (call.frames[-1].num_tokens if call.frames else 0)


def samples(recording: Recording) -> dict[str, list[float]]:
    """Return every latency in milliseconds, by metric; only metrics that this kind of run has."""
    done = completed(recording)
    seen = [latencies(call) for call in done]
    metrics = {
        "ttft": [each.ttft for each in seen],
        "tpot": [each.tpot for each in seen if each.tpot is not None],
        "itl": [gap for each in seen for gap in each.itl],
        "e2el": [each.e2el for each in seen],
    }
    if recording.is_open_loop:  # a closed loop has no times to keep
        queued = [(call.sent_s - call.due_s) * 1e3 for call in done]
        metrics["client_queue_time"] = queued
        metrics["e2el_including_client_queue"] = [a + b for a, b in zip(metrics["e2el"], queued, strict=True)]
    refusals = [call for call in recording.calls if call.outcome is Outcome.REJECTED and call.ended_s is not None]
    if refusals:
        metrics["refusal"] = [((call.ended_s or 0.0) - call.sent_s) * 1e3 for call in refusals]
    return metrics


def figures(
    recording: Recording, goal: Goal | None = None, percentiles: Sequence[float] = DEFAULT_PERCENTILES
) -> Figures:
    """Compute all figures of a run; None where there is nothing to compute from."""
    done, duration_s = completed(recording), recording.duration_s
    outcomes = collections.Counter(call.outcome for call in recording.calls)
    num_input, num_output = sum(map(input_tokens, done)), sum(map(output_tokens, done))
    good = None if goal is None else sum(goal.is_met(latencies(call)) for call in done)
    result: Figures = {
        "is_partial": recording.stopped is not None,
        "stopped": recording.stopped,
        "duration": duration_s,
        "num_prompts": recording.asked,
        **{str(outcome): outcomes[outcome] for outcome in Outcome},
        "statuses": dict(collections.Counter(call.status for call in recording.calls if call.status)),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": _ratio(len(done), duration_s),
        "request_goodput": None if good is None else _ratio(good, duration_s),
        "output_throughput": _ratio(num_output, duration_s),
        "total_token_throughput": _ratio(num_input + num_output, duration_s),
        "max_output_tokens_per_s": max(tokens_per_s(done, 1.0), default=None),
        "max_concurrent_requests": max((count for _, count in concurrency(done)), default=0),
        "prefix_hit_rate": _ratio(sum(call.usage.cached_tokens for call in done), num_input),
        "mean_tokens_per_frame": _ratio(num_output, sum(len(call.frames) for call in done)),
        "client_cpu_s": recording.cpu_s,
        "client_cpu_share": _ratio(recording.cpu_s, duration_s),
        "client_cpu_us_per_token": _ratio(recording.cpu_s * 1e6, num_output),
    }
    for name, values in samples(recording).items():
        result |= _statistics(name, values, percentiles)
    return result


def _statistics(name: str, values: Sequence[float], percentiles: Sequence[float]) -> Figures:
    mean = _ratio(math.fsum(values), len(values))
    variance = None if mean is None else math.fsum((value - mean) ** 2 for value in values) / len(values)
    return {
        f"mean_{name}_ms": mean,
        f"median_{name}_ms": percentile(values, 50),
        f"std_{name}_ms": None if variance is None else math.sqrt(variance),
        **{f"p{percent:g}_{name}_ms": percentile(values, percent) for percent in percentiles},
    }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, between two values in proportion; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def tokens_per_s(calls: Sequence[Call], width_s: float, *, begun_s: float | None = None) -> list[float]:
    """Return output tokens per second over time, in windows of `width_s` from `begun_s` (None: the first sending)."""
    if not calls:
        return []
    start_s = min(call.sent_s for call in calls) if begun_s is None else begun_s
    counts: collections.Counter[int] = collections.Counter()
    for call in calls:
        before = 0
        for frame in call.frames:
            counts[int((frame.at_s - start_s) / width_s)] += frame.num_tokens - before
            before = frame.num_tokens
    return [counts[window] / width_s for window in range(max(counts, default=-1) + 1)]


def concurrency(calls: Sequence[Call]) -> list[tuple[float, int]]:
    """Return how many requests were under way from which time on; a request ends with its last token, or its status."""
    changes = []
    for call in calls:
        end_s = call.frames[-1].at_s if call.frames else call.ended_s
        if end_s is not None:
            changes += [(call.sent_s, 1), (end_s, -1)]
    changes.sort()  # at equal times the one that ends goes first
    return list(zip((at for at, _ in changes), itertools.accumulate(change for _, change in changes), strict=True))


def per_request(recording: Recording) -> dict[str, list[object]]:
    """Return one entry for each request in the order of sending; names and units (s) as of vLLM's `--save-detailed`."""
    calls = recording.calls
    lists: dict[str, list[object]] = {
        "input_lens": [input_tokens(call) for call in calls],
        "output_lens": [output_tokens(call) if call.outcome is Outcome.COMPLETED else 0 for call in calls],
        "ttfts": [call.frames[0].at_s - call.sent_s if call.frames else 0.0 for call in calls],
        "itls": [[b.at_s - a.at_s for a, b in itertools.pairwise(call.frames)] for call in calls],
        "latencies": [call.frames[-1].at_s - call.sent_s if call.frames else 0.0 for call in calls],
        "start_times": [call.sent_s - recording.begun_s for call in calls],
        "queue_times": [call.sent_s - call.due_s for call in calls],
        "generated_texts": [call.text for call in calls],
        "errors": [f"{call.status}: {call.message}".strip(": ") for call in calls],
        "outcomes": [str(call.outcome) for call in calls],
    }
    return lists


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None
