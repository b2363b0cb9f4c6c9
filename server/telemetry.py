"""Names of what is observed: metrics and their buckets, log events, span attributes; and how to turn them on.

Metric suffixes are those that vLLM and SGLang dashboards use, under our prefix. Rooms import the names and observe;
only a composition root calls the functions.
"""

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TextIO
from wsgiref.simple_server import WSGIServer

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from server.budget import CpuTimeCollector, PhaseCounter
from server.config import TelemetryConfig
from server.messages import Load

EXPORT_TIMEOUT_S = 2
"""For spans to reach their collector: it also bounds how long a stop waits for one that is gone."""

# Edges of the OpenTelemetry GenAI conventions, with a tail for long contexts and batch work.
TIME_TO_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TIME_PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
STEP_BUCKETS = tuple(0.0005 * 2**step for step in range(16))
STEP_ROWS_BUCKETS = tuple(2**step for step in range(14))
DURATION_BUCKETS = (*(0.01 * 2**step for step in range(14)), 160.0, 640.0, 2560.0)

REGISTRY = CollectorRegistry()
"""Ours alone, so that a test or an embedding program sees no metrics twice."""

ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

TIME_TO_FIRST_TOKEN = Histogram(
    "pathfox_time_to_first_token_seconds",
    "From the arrival of a request to its first token.",
    ["model"],
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
    registry=REGISTRY,
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "pathfox_request_time_per_output_token_seconds",
    "Mean gap between the tokens of a request after its first.",
    ["model"],
    buckets=TIME_PER_TOKEN_BUCKETS,
    registry=REGISTRY,
)
REQUEST_LATENCY = Histogram(
    "pathfox_e2e_request_latency_seconds",
    "From the arrival of a request to its end.",
    ["model"],
    buckets=DURATION_BUCKETS,
    registry=REGISTRY,
)
QUEUE_TIME = Histogram(
    "pathfox_request_queue_time_seconds",
    "Waiting for admission and in the engine.",
    ["model"],
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
    registry=REGISTRY,
)
PREFILL_TIME = Histogram(
    "pathfox_request_prefill_time_seconds",
    "Computing the prompt.",
    ["model"],
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS,
    registry=REGISTRY,
)
DECODE_TIME = Histogram(
    "pathfox_request_decode_time_seconds",
    "From the first token to the last.",
    ["model"],
    buckets=DURATION_BUCKETS,
    registry=REGISTRY,
)
PROMPT_TOKENS = Counter(
    "pathfox_prompt_tokens_total", "Prompt tokens of started requests.", ["model"], registry=REGISTRY
)
CACHED_TOKENS = Counter(
    "pathfox_cached_tokens_total", "Prompt tokens found in the page pool.", ["model"], registry=REGISTRY
)
GENERATION_TOKENS = Counter("pathfox_generation_tokens_total", "Completion tokens sent.", ["model"], registry=REGISTRY)
REQUESTS_FINISHED = Counter(
    "pathfox_request_success_total", "Completions by how they ended.", ["model", "finished_reason"], registry=REGISTRY
)
REJECTIONS = Counter(
    "pathfox_admission_rejections_total", "Requests refused by admission.", ["criticality", "reason"], registry=REGISTRY
)
BULKHEAD_INFLIGHT = Gauge(
    "pathfox_bulkhead_inflight_tokens", "Tokens reserved by running requests.", ["criticality"], registry=REGISTRY
)
BULKHEAD_QUEUED = Gauge(
    "pathfox_bulkhead_queued_requests", "Requests waiting for admission.", ["criticality"], registry=REGISTRY
)
RPC_DURATION = Histogram(
    "pathfox_rpc_duration_seconds",
    "From the arrival of a call to its status.",
    ["method", "code"],
    buckets=DURATION_BUCKETS,
    registry=REGISTRY,
)
RPCS_INFLIGHT = Gauge("pathfox_rpcs_inflight", "Calls that are open.", registry=REGISTRY)
EVENT_LOOP_TASKS = Gauge("pathfox_event_loop_tasks", "Tasks alive on the front end's event loop.", registry=REGISTRY)
FRAMES = Counter("pathfox_stream_frames_total", "Frames written to streams that ended.", ["method"], registry=REGISTRY)
DRAIN_SECONDS = Histogram(
    "pathfox_drain_seconds", "How long a drain took.", buckets=DURATION_BUCKETS, registry=REGISTRY
)

STEP_DURATION = Histogram(
    "pathfox_step_duration_seconds",
    "One step of the engine, planning to commit.",
    ["model"],
    buckets=STEP_BUCKETS,
    registry=REGISTRY,
)
STEP_ROWS = Histogram(
    "pathfox_step_rows", "Rows computed by one step.", ["model"], buckets=STEP_ROWS_BUCKETS, registry=REGISTRY
)
STEPS_FAILED = Counter(
    "pathfox_engine_steps_failed_total", "Steps that raised and were run again.", ["model"], registry=REGISTRY
)
PREFILL_ROWS = Counter(
    "pathfox_step_prefill_rows_total", "Rows of prompts that steps have computed.", ["model"], registry=REGISTRY
)
DECODE_ROWS = Counter(
    "pathfox_step_decode_rows_total", "Rows of growing outputs that steps have computed.", ["model"], registry=REGISTRY
)
DRAFT_TOKENS = Counter(
    "pathfox_spec_decode_num_draft_tokens_total", "Tokens that were guessed and computed.", ["model"], registry=REGISTRY
)
ACCEPTED_TOKENS = Counter(
    "pathfox_spec_decode_num_accepted_tokens_total", "Guessed tokens that came.", ["model"], registry=REGISTRY
)

PHASES = PhaseCounter()
"""The engine's, one after the other on its thread, as `StepFacts.phases_s` says; the event loop's as in `budget.py`."""
REGISTRY.register(PHASES)
REGISTRY.register(CpuTimeCollector())

RPC_FINISHED = "rpc_finished"
RPC_CRASHED = "rpc_crashed"
DETAILS_NOT_SENT = "details_not_sent"
SERVER_STARTED = "server_started"
SERVER_STOPPED = "server_stopped"
DRAIN_STARTED = "drain_started"
DRAIN_FINISHED = "drain_finished"
METRICS_STARTED = "metrics_started"
EVENTS = frozenset(
    {
        RPC_FINISHED,
        RPC_CRASHED,
        DETAILS_NOT_SENT,
        SERVER_STARTED,
        SERVER_STOPPED,
        DRAIN_STARTED,
        DRAIN_FINISHED,
        METRICS_STARTED,
    }
)
"""Log events of the front end: constants, past tense. Facts are keywords with units; never prompt text."""

GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_RESPONSE_ID = "gen_ai.response.id"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_TEMPERATURE = "gen_ai.request.temperature"
GEN_AI_TOP_P = "gen_ai.request.top_p"
GEN_AI_TOP_K = "gen_ai.request.top_k"
GEN_AI_SEED = "gen_ai.request.seed"
GEN_AI_CHOICES = "gen_ai.request.choice.count"
GEN_AI_LEGACY_QUEUE = "gen_ai.latency.time_in_queue"
GEN_AI_LEGACY_FIRST_TOKEN = "gen_ai.latency.time_to_first_token"  # noqa: S105 an attribute's name
GEN_AI_LEGACY_TOTAL = "gen_ai.latency.e2e"
RPC_SYSTEM = "rpc.system"
RPC_METHOD = "rpc.method"
RPC_CODE = "rpc.grpc.status_code"
ERROR_TYPE = "error.type"


class StepFacts(Protocol):
    """What is counted of one step of an engine."""

    @property
    def duration_s(self) -> float:
        """Return how long it took."""
        ...

    @property
    def num_rows(self) -> int:
        """Return how many rows it computed."""
        ...

    @property
    def num_prefill_tokens(self) -> int:
        """Return how many of the rows belong to prompts."""
        ...

    @property
    def num_decode_tokens(self) -> int:
        """Return how many of the rows belong to outputs."""
        ...

    @property
    def num_drafted_tokens(self) -> int:
        """Return how many rows were of guessed tokens."""
        ...

    @property
    def num_accepted_tokens(self) -> int:
        """Return how many of these came."""
        ...

    @property
    def is_failed(self) -> bool:
        """Return whether computing it all at once raised."""
        ...

    @property
    def phases_s(self) -> Mapping[str, float]:
        """Return the seconds of the engine's thread since the last step, by what it did."""
        ...


def observe_step(model: str) -> Callable[[StepFacts], None]:
    """Return what counts the steps of a model's engine: a few microseconds a step, on the engine's thread."""
    duration, rows = STEP_DURATION.labels(model), STEP_ROWS.labels(model)
    failed, prefill, decode = STEPS_FAILED.labels(model), PREFILL_ROWS.labels(model), DECODE_ROWS.labels(model)
    drafted, accepted = DRAFT_TOKENS.labels(model), ACCEPTED_TOKENS.labels(model)

    def observe(step: StepFacts) -> None:
        duration.observe(step.duration_s)
        rows.observe(step.num_rows)
        if step.num_prefill_tokens:
            prefill.inc(step.num_prefill_tokens)
        if step.num_decode_tokens:
            decode.inc(step.num_decode_tokens)
        if step.num_drafted_tokens:
            drafted.inc(step.num_drafted_tokens)
            accepted.inc(step.num_accepted_tokens)
        if step.is_failed:
            failed.inc()
        for phase, seconds in step.phases_s.items():
            PHASES.add(phase, model, seconds)

    return observe


class LoadCollector(Collector):
    """Reads the load of token sources when Prometheus asks, so that no step pays for a gauge."""

    def __init__(self, loads: Callable[[], Iterable[tuple[str, Load]]]) -> None:
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each figure, one sample for each model."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            "running_requests": GaugeMetricFamily("pathfox_num_requests_running", "Running.", labels=["model"]),
            "waiting_requests": GaugeMetricFamily("pathfox_num_requests_waiting", "Waiting.", labels=["model"]),
            "queued_tokens": GaugeMetricFamily("pathfox_queued_tokens", "Tokens to compute.", labels=["model"]),
            "cached_pages": GaugeMetricFamily("pathfox_cached_pages", "Pages for reuse.", labels=["model"]),
            "total_pages": GaugeMetricFamily("pathfox_total_pages", "Pages in the pool.", labels=["model"]),
            "preemptions": CounterMetricFamily("pathfox_num_preemptions", "Preempted.", labels=["model"]),
        }
        usage = GaugeMetricFamily("pathfox_kv_cache_usage_perc", "Pages in use, 0 to 1.", labels=["model"])
        for model, load in self._loads():
            for name, family in families.items():
                family.add_metric([model], getattr(load, name))
            usage.add_metric([model], load.used_pages / load.total_pages if load.total_pages else 0.0)
        yield from families.values()
        yield usage


class MetricsServer:
    """The Prometheus endpoint: one small thread beside the event loop."""

    def __init__(self, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host, registry=REGISTRY)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Tracing:
    """Spans, or nothing at almost no cost when no endpoint is configured."""

    def __init__(self, config: TelemetryConfig, *, version: str) -> None:
        self.emits_legacy = config.emit_legacy_latency_attributes
        self._provider: TracerProvider | None = None
        self.tracer: trace.Tracer = trace.NoOpTracer()
        if config.otlp_endpoint is not None:
            self._provider = TracerProvider(
                resource=Resource.create({"service.name": "pathfox", "service.version": version}),
                sampler=ParentBasedTraceIdRatio(config.trace_sample_ratio),
            )
            is_plain = config.otlp_endpoint.startswith("http://")
            exporter = OTLPSpanExporter(config.otlp_endpoint, insecure=is_plain, timeout=EXPORT_TIMEOUT_S)
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
            self.tracer = self._provider.get_tracer("pathfox", version)

    def close(self) -> None:
        """Send what is left; waits a few seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


def configure_logging(config: TelemetryConfig, stream: TextIO = sys.stderr) -> None:
    """Send structlog and the standard library's loggers through one renderer to a stream."""
    is_console = config.log_format == "console" or (config.log_format == "auto" and stream.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Plain tracebacks: the structured and the rich ones show local variables, and those hold prompts.
    last: list[structlog.types.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if is_console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=json.dumps)]
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.log_level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
