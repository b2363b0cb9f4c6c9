import pytest

from pathfox.v1 import generation_pb2 as pb
from server.cli.bench.drive import OK, Call, Frame, Recording
from server.cli.bench.figures import Goal, figures, percentile, tokens_per_s
from server.errors import ConfigError

USAGE = pb.Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4)


def recording() -> Recording:
    """One request that ended well, and one that was refused."""
    frames = [Frame(1.1, 1), Frame(1.2, 3), Frame(1.4, 5)]
    done = Call(due_s=1.0, sent_s=1.0, status=OK, frames=frames, ended_s=1.5, usage=USAGE)
    refused = Call(due_s=1.0, sent_s=1.25, status="RESOURCE_EXHAUSTED", ended_s=1.3)
    return Recording(asked=2, begun_s=1.0, ended_s=3.0, calls=[done, refused])


def test_figures_are_those_computed_by_hand() -> None:
    """Latencies are of completed requests; TPOT spreads the time after the first token, ITL is the gaps of frames."""
    seen = figures(recording())

    assert (seen["completed"], seen["failed"], seen["partial"]) == (1, 1, True)
    assert (seen["output_throughput"], seen["total_token_throughput"]) == (2.5, 7.5)
    assert seen["prefix_hit_rate"] == 0.4
    assert seen["mean_ttft_ms"] == pytest.approx(100)
    assert seen["mean_tpot_ms"] == pytest.approx(400 / 4)
    assert seen["mean_itl_ms"] == pytest.approx(150)
    assert seen["p99_e2el_ms"] == pytest.approx(500)


@pytest.mark.parametrize(("goal", "good"), [("ttft:101 tpot:101", 0.5), ("ttft:99", 0.0), ("e2el:499", 0.0)])
def test_goodput_counts_requests_that_meet_all_of_the_goal(goal: str, good: float) -> None:
    """Requests per second that meet every limit."""
    assert figures(recording(), Goal.parse(goal))["request_goodput"] == good


def test_a_goal_that_cannot_be_read_is_named() -> None:
    """What is no metric and limit is refused with what is."""
    with pytest.raises(ConfigError, match="got 'latency:5'"):
        Goal.parse("latency:5")


def test_percentiles_lie_between_values_in_proportion() -> None:
    """As numpy's default; nothing has none."""
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([], 50) is None


def test_tokens_are_counted_in_the_window_they_came_in() -> None:
    """Sequences are cumulative, windows are not."""
    assert tokens_per_s(recording(), 0.25) == [12.0, 8.0]
