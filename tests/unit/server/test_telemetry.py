import ast
import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from server import budget, telemetry
from server.config import TelemetryConfig
from server.engine.report import Phase, StepReport
from server.messages import Load

STEP = StepReport(
    duration_s=0.004,
    model_s=0.003,
    num_rows=0,
    num_prefill_tokens=0,
    num_decode_tokens=0,
    num_cached_tokens=0,
    num_preemptions=0,
    num_running=0,
    num_waiting=0,
    used_pages=0,
    cached_pages=0,
    free_pages=0,
)


@pytest.fixture
def _restored_logging() -> object:
    """Put the loggers back as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def test_metric_names_follow_the_rules() -> None:
    """Our prefix, base units, and suffixes that dashboards know."""
    names = {metric.name for metric in telemetry.REGISTRY.collect() if metric.name.startswith("pathfox")}

    assert {
        "pathfox_time_to_first_token_seconds",
        "pathfox_generation_tokens",
        "pathfox_e2e_request_latency_seconds",
    } <= names
    assert not any(name.endswith(("_ms", "_size", "_time")) for name in names)


def test_counts_the_steps_of_an_engine() -> None:
    """Steps, their rows by kind and their failures are counted for each model, under these names."""
    steps = [
        *(replace(STEP, num_rows=3, num_decode_tokens=3) for _ in range(2)),
        replace(STEP, num_rows=8, num_decode_tokens=8, num_drafted_tokens=7, num_accepted_tokens=5),
        replace(STEP, num_rows=20, num_prefill_tokens=16, num_decode_tokens=4, is_failed=True),
    ]
    observe, other = telemetry.observe_step("stepping"), telemetry.observe_step("resting")
    for step in steps:
        observe(step)
    other(STEP)

    def value(name: str, model: str = "stepping") -> float | None:
        return telemetry.REGISTRY.get_sample_value(name, {"model": model})

    assert value("pathfox_step_duration_seconds_count") == 4
    assert value("pathfox_step_duration_seconds_sum") == pytest.approx(4 * STEP.duration_s)
    assert value("pathfox_step_rows_count") == 4
    assert value("pathfox_step_rows_sum") == 34
    assert value("pathfox_step_prefill_rows_total") == 16
    assert value("pathfox_step_decode_rows_total") == 18
    assert value("pathfox_spec_decode_num_draft_tokens_total") == 7
    assert value("pathfox_spec_decode_num_accepted_tokens_total") == 5
    assert value("pathfox_engine_steps_failed_total") == 1
    assert value("pathfox_engine_steps_failed_total", "resting") == 0
    assert value("pathfox_step_rows_sum", "resting") == 0


def test_counts_where_the_time_of_steps_goes() -> None:
    """Phases of steps add up for each model under one name, beside what the event loop spends."""
    observe = telemetry.observe_step("timed")
    observe(replace(STEP, phases_s={Phase.KERNELS: 0.5}))
    observe(replace(STEP, phases_s={Phase.KERNELS: 0.25, Phase.SAMPLE: 0.125}))
    telemetry.PHASES.add(budget.TEXT, "timed", 0.0625)

    def value(phase: str) -> float | None:
        return telemetry.REGISTRY.get_sample_value("pathfox_phase_seconds_total", {"phase": phase, "model": "timed"})

    assert [value(phase) for phase in ("kernels", "sample", "text")] == [0.75, 0.125, 0.0625]


def test_every_log_event_of_the_front_end_is_a_known_name() -> None:
    """Events are constants of this module, so that what reads logs can rely on them."""
    for path in Path(telemetry.__file__).with_name("frontend").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
                first = ast.unparse(node.args[0])
                assert first.startswith("telemetry."), f"{path}:{node.lineno}"
                assert getattr(telemetry, first.removeprefix("telemetry.")) in telemetry.EVENTS


@pytest.mark.usefixtures("_restored_logging")
def test_logs_are_json_lines_without_local_variables() -> None:
    """Ours and the libraries' lines have one shape; a traceback shows no variable, for those hold prompts."""
    stream = io.StringIO()
    telemetry.configure_logging(TelemetryConfig(), stream)
    structlog.get_logger("ours").info("thing_happened", count=1)
    logging.getLogger("theirs").warning("hm %s", "x")

    def fail() -> None:
        prompt = "the secret of " + "the prompt"
        raise ValueError(len(prompt))

    try:
        fail()
    except ValueError:
        structlog.get_logger("ours").exception("thing_failed")

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["thing_happened", "hm x", "thing_failed"]
    assert lines[0]["count"] == 1
    assert "ValueError" in lines[2]["exception"]
    assert "the secret of the prompt" not in stream.getvalue()


@pytest.mark.usefixtures("_restored_logging")
def test_the_level_holds() -> None:
    """What is below the level is not written."""
    stream = io.StringIO()
    telemetry.configure_logging(TelemetryConfig(log_level="warning", log_format="console"), stream)
    structlog.get_logger("ours").info("thing_happened")

    assert stream.getvalue() == ""


def test_loads_are_read_when_asked() -> None:
    """A scrape shows each model's load as it is then."""
    collector = telemetry.LoadCollector(lambda: [("m", Load(used_pages=1, total_pages=4, preemptions=2))])
    samples = {sample.name: sample.value for metric in collector.collect() for sample in metric.samples}

    assert samples["pathfox_kv_cache_usage_perc"] == 0.25
    assert samples["pathfox_num_preemptions_total"] == 2


def test_tracing_is_off_unless_configured() -> None:
    """Without an endpoint a span is a no-op."""
    tracing = telemetry.Tracing(TelemetryConfig(), version="0")

    assert not tracing.tracer.start_span("x").is_recording()
    tracing.close()
