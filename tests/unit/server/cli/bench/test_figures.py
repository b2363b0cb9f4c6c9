import math

import pytest

from server.cli.bench.figures import (
    Goal,
    concurrency,
    figures,
    parse_percentiles,
    per_request,
    percentile,
    tokens_per_s,
)
from server.cli.bench.recording import Call, Frame, Outcome, Recording, Usage
from server.errors import ConfigError

USAGE = Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4)


def recording(*, is_open_loop: bool = False) -> Recording:
    """Of two seconds: one request that ended well, one that was refused, one that failed, one under way at the end."""
    frames = [Frame(1.1, 1), Frame(1.2, 3), Frame(1.4, 5)]
    done = Call(due_s=0.9, sent_s=1.0, outcome=Outcome.COMPLETED, frames=frames, ended_s=1.5, usage=USAGE, text="hello")
    refused = Call(1.0, 1.25, outcome=Outcome.REJECTED, status="RESOURCE_EXHAUSTED", message="full", ended_s=1.253)
    failed = Call(1.0, 1.5, outcome=Outcome.FAILED, status="INTERNAL", frames=[Frame(1.6, 1)], ended_s=1.7)
    under_way = Call(1.0, 2.0, frames=[Frame(2.5, 1)])
    return Recording(
        asked=4,
        is_open_loop=is_open_loop,
        begun_s=1.0,
        ended_s=3.0,
        calls=[done, refused, failed, under_way],
        cpu_s=0.5,
    )


def test_figures_are_those_computed_by_hand() -> None:
    """Latencies are of completed requests; TPOT spreads the time after the first token, ITL is the gaps of messages."""
    seen = figures(recording())

    assert (seen["output_throughput"], seen["total_token_throughput"]) == (2.5, 7.5)
    assert (seen["request_throughput"], seen["request_goodput"]) == (0.5, None)
    assert seen["prefix_hit_rate"] == 0.4
    assert seen["mean_tokens_per_frame"] == pytest.approx(5 / 3)
    assert seen["mean_ttft_ms"] == pytest.approx(100)
    assert seen["mean_tpot_ms"] == pytest.approx(300 / 4)
    assert seen["mean_itl_ms"] == pytest.approx(150)
    assert seen["std_itl_ms"] == pytest.approx(50)
    assert seen["p99_e2el_ms"] == pytest.approx(400)
    assert (seen["client_cpu_s"], seen["client_cpu_share"], seen["client_cpu_us_per_token"]) == (0.5, 0.25, 1e5)


def test_every_request_is_counted_by_how_it_ended() -> None:
    """A refusal is no failure, and what was under way at the end is neither."""
    seen = figures(recording())

    assert [seen[name] for name in ("completed", "rejected", "failed", "incomplete")] == [1, 1, 1, 1]
    assert seen["statuses"] == {"RESOURCE_EXHAUSTED": 1, "INTERNAL": 1}
    assert seen["p99_refusal_ms"] == pytest.approx(3)


def test_only_a_run_that_was_stopped_is_partial() -> None:
    """Failures alone do not make a result partial."""
    stopped = recording()
    stopped.stopped = "interrupted"

    assert (figures(recording())["is_partial"], figures(stopped)["is_partial"]) == (False, True)


def test_only_an_open_loop_has_times_to_keep() -> None:
    """How late a request was sent means nothing where requests wait for each other."""
    seen = figures(recording(is_open_loop=True))

    assert seen["mean_client_queue_time_ms"] == pytest.approx(100)
    assert seen["mean_e2el_including_client_queue_ms"] == pytest.approx(500)
    assert "mean_client_queue_time_ms" not in figures(recording())


def test_a_run_without_a_completed_request_has_no_latencies() -> None:
    """There is nothing to compute from, and no error either."""
    seen = figures(Recording(asked=3))

    assert (seen["completed"], seen["mean_ttft_ms"], seen["p99_itl_ms"]) == (0, None, None)
    assert (seen["output_throughput"], seen["max_output_tokens_per_s"]) == (None, None)


def test_percentiles_are_named_as_vllm_names_them() -> None:
    """Whole numbers without a point, others with it."""
    seen = figures(recording(), percentiles=parse_percentiles("25,99.9"))

    assert {name for name in seen if name.endswith("_ttft_ms")} == {
        f"{kind}_ttft_ms" for kind in ("mean", "median", "std", "p25", "p99.9")
    }


@pytest.mark.parametrize("text", ["", "50;90", "101", "-1", "nan"])
def test_percentiles_that_cannot_be_are_refused(text: str) -> None:
    """The message names the option and the limits."""
    with pytest.raises(ConfigError, match="want numbers from 0 to 100 with commas"):
        parse_percentiles(text)


@pytest.mark.parametrize(("goal", "good"), [("ttft:101 tpot:76", 0.5), ("ttft:99", 0.0), ("e2el:399", 0.0)])
def test_goodput_counts_requests_that_meet_all_of_the_goal(goal: str, good: float) -> None:
    """Requests per second that meet every limit."""
    assert figures(recording(), Goal.parse(goal))["request_goodput"] == good


@pytest.mark.parametrize("text", ["latency:5", "ttft", "ttft:x", "ttft:0", "ttft:nan", "tpot:-3"])
def test_a_goal_that_cannot_be_read_is_named(text: str) -> None:
    """What is no metric and limit is refused with what is."""
    with pytest.raises(ConfigError, match=f"--goodput: got {text!r}, want ttft:MS"):
        Goal.parse(text)


def test_percentiles_lie_between_values_in_proportion() -> None:
    """As numpy's default; nothing has none."""
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([], 50) is None


def test_tokens_are_counted_in_the_window_they_came_in() -> None:
    """Counts of frames are cumulative, windows are not."""
    assert tokens_per_s(recording().calls[:1], 0.25) == [12.0, 8.0]
    assert tokens_per_s([], 0.25) == []


def test_concurrency_is_exact() -> None:
    """A request is under way from sending to its last token; one that ends when another begins does not count twice."""
    calls = [Call(0, sent_s, frames=[Frame(sent_s + 1.0, 1)], outcome=Outcome.COMPLETED) for sent_s in (0.0, 0.5, 1.0)]

    assert concurrency(calls) == [(0.0, 1), (0.5, 2), (1.0, 1), (1.0, 2), (1.5, 1), (2.0, 0)]


def test_lists_have_an_entry_for_every_request() -> None:
    """In the order of sending, whatever became of it; seconds, as in vLLM's detailed results."""
    lists = per_request(recording())

    assert {len(each) for each in lists.values()} == {4}
    assert lists["output_lens"] == [5, 0, 0, 0]
    assert lists["ttfts"] == pytest.approx([0.1, 0.0, 0.1, 0.5])
    assert lists["itls"][0] == pytest.approx([0.1, 0.2])
    assert lists["generated_texts"][0] == "hello"
    assert lists["errors"] == ["", "RESOURCE_EXHAUSTED: full", "INTERNAL", ""]
    assert not any(isinstance(each, float) and math.isnan(each) for each in lists["latencies"])
