"""The budget of a token, from two scrapes."""

import http.server
import threading

import pytest

from server.budget import ENGINE, GRPC, KERNELS, LOOP, CpuTimeCollector, PhaseCounter
from server.cli.bench.scrape import CLIENT, ENGINE_PHASES, LOOP_REST, REST, Scrape, budget, parse, scrape
from server.engine.report import Phase
from server.errors import ConfigError, StartupError

METRICS = """
# HELP pathfox_phase_seconds_total Where the way of a token takes its time.
# TYPE pathfox_phase_seconds_total counter
pathfox_phase_seconds_total{model="a",phase="kernels"} 2.5
pathfox_phase_seconds_total{model="b",phase="kernels"} 0.5
pathfox_phase_seconds_total{model="",phase="frame"} 0.25
# HELP pathfox_thread_cpu_seconds_total CPU time by what threads do.
# TYPE pathfox_thread_cpu_seconds_total counter
pathfox_thread_cpu_seconds_total{threads="engine"} 3.0
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 4.0
"""


def test_reads_what_a_server_exposes() -> None:
    """Phases of all models add up; threads and the process stand beside them."""
    assert parse(METRICS) == Scrape({"kernels": 3.0, "frame": 0.25}, {"engine": 3.0}, 4.0)


def test_its_names_are_those_of_the_server() -> None:
    """What the server's collectors are called is what is looked for."""
    counter = PhaseCounter()
    counter.add("kernels", "m", 1.0)
    names = {s.name for each in (counter, CpuTimeCollector()) for m in each.collect() for s in m.samples}

    assert names <= {line.partition("{")[0] for line in METRICS.splitlines() if not line.startswith("#")}
    assert tuple(Phase) == ENGINE_PHASES


def test_divides_what_passed_by_the_tokens() -> None:
    """Both columns add up: to the elapsed time, and to what server and client used; what nobody counted is a line."""
    before = Scrape({"kernels": 1.0, "text": 0.5}, {ENGINE: 1.0, LOOP: 1.0}, 10.0)
    after = Scrape(
        {"kernels": 3.0, "sample": 0.5, "text": 0.75, "frame": 0.125, "write": 9.0},
        {ENGINE: 4.0, KERNELS: 2.0, LOOP: 2.0, GRPC: 0.25},
        17.0,
    )
    result = budget(before, after, streams=8, tokens=1000, elapsed_s=4.0, client_cpu_s=0.75)

    assert result.elapsed_us == sum(result.wall_us.values()) == pytest.approx(4000)
    assert result.wall_us["kernels"] == pytest.approx(2000)
    assert result.wall_us["sample"] == pytest.approx(500)
    assert result.wall_us[REST] == pytest.approx(1500)
    assert sum(result.cpu_us.values()) == pytest.approx(7000 + 750)
    assert result.cpu_us[CLIENT] == pytest.approx(750)
    assert result.cpu_us["event loop: text"] == pytest.approx(250)
    assert result.cpu_us[LOOP_REST] == pytest.approx(1000 - 250 - 125)
    assert result.cpu_us[REST] == pytest.approx(7000 - 3000 - 2000 - 1000 - 250)
    assert result.write_us == pytest.approx(9000)


def test_says_how_to_turn_metrics_on() -> None:
    """Without an address, and where nobody answers, the one line says what to do."""
    with pytest.raises(ConfigError, match="serve --metrics-port"):
        scrape(None)
    with pytest.raises(StartupError, match="serve --metrics-port"):
        scrape("127.0.0.1:1")


def test_refuses_the_metrics_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint without our counters is named as what it is not; no proxy stands between."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"# TYPE up gauge\nup 1\n")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(StartupError, match="no metrics of a Pathfox server"):
            scrape(f"127.0.0.1:{server.server_port}")
        thread.join()
