import json
from pathlib import Path

from ops.bench.overload import REFUSED, SETTLE_S, Loop, logged_refusals_ms, metrics_port
from server.cli.bench.recording import Call, Frame, Outcome, Recording


def loop(*calls: Call) -> Loop:
    """A loop whose counted window is the ten seconds after the settling."""
    return Loop(Recording(len(calls), calls=list(calls)), SETTLE_S + 10.0)


def answered(sent_s: float, first_s: float, ended_s: float, num_tokens: int) -> Call:
    """A call with a first token and the rest at its end."""
    frames = [Frame(first_s, 1), Frame(ended_s, num_tokens)]
    return Call(sent_s, sent_s, frames=frames, ended_s=ended_s, outcome=Outcome.COMPLETED)


def test_goodput_counts_tokens_of_kept_budgets_inside_the_window() -> None:
    """Tokens before the window, and all those of a request whose first token came late, do not count."""
    early = answered(0.0, 1.0, SETTLE_S + 1.0, 51)
    late = answered(0.0, SETTLE_S + 1.0, SETTLE_S + 2.0, 100)
    both = loop(early, late)
    assert both.tokens_per_s(budget_s=5.0) == 5.0
    assert both.tokens_per_s() == 15.0
    assert both.requests_per_s == 0.2


def test_refusals_are_found_by_their_status() -> None:
    """A refusal counts whether or not it said when to come back."""
    refused = Call(0.0, 1.0, status=REFUSED, outcome=Outcome.FAILED, ended_s=1.004)
    seen = loop(refused, answered(0.0, 1.0, 2.0, 5))
    assert [round(each, 3) for each in seen.refusals_ms()] == [4.0]


def test_the_servers_log_tells_its_own_times(tmp_path: Path) -> None:
    """Lines that are no JSON, or of other calls, are passed over."""
    log = tmp_path / "server.log"
    lines = [
        {"event": "metrics_started", "port": 9000},
        {"event": "rpc_finished", "code": "OK", "duration_s": 1.0},
        {"event": "rpc_finished", "code": REFUSED, "duration_s": 0.002},
    ]
    log.write_text("loading\n" + "".join(json.dumps(line) + "\n" for line in lines))
    assert logged_refusals_ms(log) == [2.0]
    assert metrics_port(log) == 9000
