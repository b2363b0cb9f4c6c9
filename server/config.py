"""Every setting there is: one frozen tree, read once at the composition root, handed down in parts.

Sources, later ones win: defaults, a TOML file, the environment (`PATHFOX__ENGINE__MAX_NUM_SEQS=8`), the command line.
An unknown name or a bad value stops the process with the name of what set it. `os.environ` is read only here.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import ConfigError

ENVIRONMENT_PREFIX = "PATHFOX__"
ENVIRONMENT_HOME = "PATHFOX_HOME"

Setting = str | int | float | bool | None | list["Setting"] | dict[str, "Setting"]
"""A value as a TOML file, an environment variable or a command line gives it."""


GenerationDefault = Literal["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]


class Section(BaseModel):
    """One table of the tree: frozen, typed, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ServerConfig(Section):
    """The gRPC server: where it listens, whom it trusts, how long it waits."""

    host: str = "127.0.0.1"
    """Loopback, so that nothing is exposed by accident."""
    port: int = Field(50051, ge=0, le=65535)
    """gRPC's customary port; 0 takes a free one."""
    insecure: bool = False
    """Listen beyond loopback without TLS and credentials. Off: an open model server is somebody else's computer."""
    tls_certificate_file: Path | None = None
    """PEM chain; TLS is on when this and the key are set."""
    tls_key_file: Path | None = None
    """PEM private key of the certificate."""
    tls_client_ca_file: Path | None = None
    """PEM authorities; set, every client must show a certificate of theirs."""
    credentials_file: Path | None = None
    """Hashed bearer tokens with tenant and role (TOML or JSON lines). Unset: loopback is `default`, admin."""
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """gRPC's own default: a million tokens of text fit, an accidental upload does not."""
    compression: Literal["none", "deflate", "gzip"] = "none"
    """Of answers. Off: a frame of one token grows when it is compressed."""
    keepalive_time_s: float = Field(60.0, gt=0)
    """Ping an idle client this often, so that a dead one holds no request. Below usual NAT timeouts (120 s)."""
    keepalive_timeout_s: float = Field(20.0, gt=0)
    """gRPC's own default wait for the answer to a ping."""
    min_client_ping_interval_s: float = Field(10.0, gt=0)
    """Clients may ping this often; less would end long silent calls with GOAWAY too_many_pings."""
    stream_window_bytes: int = Field(1024 * 1024, ge=65535)
    """HTTP/2 look-ahead of one stream: a prompt of 15,000 tokens arrives without a round trip (64 KiB does not)."""
    max_concurrent_rpcs: int = Field(4096, ge=1)
    """Calls open at once, watchers included; gRPC itself refuses more. Far above what admission lets run."""
    max_preparing_requests: int = Field(256, ge=1)
    """Requests between arrival and admission (tokenising); bounds the memory of a flood of long prompts."""
    default_deadline_s: float = Field(600.0, gt=0)
    """For a call that brings none: an abandoned request must end. 1,024 tokens at 2 tokens/s fit."""
    drain_grace_s: float = Field(30.0, ge=0)
    """How long running streams may go on after a stop; equals the usual termination grace of orchestrators."""
    num_text_threads: int = Field(2, ge=1)
    """Threads that tokenise and render long prompts, so that the event loop never stalls on one."""
    enable_reflection: bool = True
    """So that grpcurl works at once; it shows the contract, which is public, and nothing else."""


class AdmissionConfig(Section):
    """How much may run and wait at once, in tokens: uncached prompt + max_tokens x n."""

    max_running_tokens: int = Field(131_072, ge=1)
    """64 sequences x 2,048 tokens: what one engine runs at once by default. What exceeds it waits here, fairly."""
    max_tenant_share: float = Field(1.0, gt=0, le=1)
    """Of max_running_tokens, what one tenant may hold. 1 = all: with one tenant nothing else makes sense."""
    default_share: float = Field(0.9, gt=0, le=1)
    """DEFAULT requests start only below this use; the rest is kept for CRITICAL ones."""
    batch_share: float = Field(0.7, gt=0, le=1)
    """BATCH requests start only below this use."""
    sheddable_share: float = Field(0.5, gt=0, le=1)
    """SHEDDABLE requests start only below this use: first to be refused."""
    max_queued_requests: int = Field(256, ge=0)
    """Of one class. A longer queue only turns refusals into timeouts."""
    max_wait_s: float = Field(30.0, ge=0)
    """The longest anybody waits in a queue; a request's deadline and time_to_first_token_budget shorten it."""


class EngineConfig(Section):
    """One engine: how many sequences, how many rows a step, how much positional memory."""

    max_num_seqs: int = Field(64, ge=1)
    """Sequences running at once; decode throughput of small models on CPUs is flat beyond."""
    max_step_tokens: int = Field(256, ge=1)
    """Rows of one step: longer steps delay every running stream, shorter ones waste weight reads."""
    target_step_s: float | None = Field(0.1, ge=0)
    """What a step with running streams may take: long prompts are read in as many rows a step as fit, at least 16. Ten
    tokens a second still read as a flow, and shorter steps would read prompts more slowly. 0 = only rows count."""
    max_delivery_delay_s: float = Field(1 / 30, ge=0)
    """What a token of several steady streams waits at most, so that a frame carries more of them: at 30 frames a second
    text still flows. 5 ms with one or two streams; a first token and an end never wait. 0 = every step delivers."""
    speculation: bool = True
    """Guess tokens of texts that repeat and check several in one step: the same tokens, sooner. With one or two streams
    code edits and extraction are 1.5 to 1.9 times as fast, other texts as fast as without (SmolLM2-135M on 2 cores of
    Zen 5, November 2026: ops/bench/results/speculation.json)."""
    page_pool_bytes: int = Field(1024 * 1024 * 1024, ge=1)
    """Positional memory; 1 GiB holds 46,000 tokens of a 135M model and fits any laptop. On CPUs taken as it fills."""
    device: str = "cpu"
    """Where weights and pages live, as torch names it: `cpu`, `cuda`, `cuda:1`."""
    num_threads: int | None = Field(None, ge=1)
    """Threads of the CPU ops, at most the processors that this process may use. Unset: the cores among them."""
    use_weight_cache: bool = True
    """Keep packed weights and digests of model files for the next start, which maps them instead of making them."""
    weight_cache_folder: Path = Field(default_factory=lambda: platformdirs.user_cache_path("pathfox") / "weights")
    """Where they are kept, one file per model and about as large. May be deleted at any time."""


class TelemetryConfig(Section):
    """Logs, metrics and traces."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """INFO is one line a request."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto = console on a terminal, JSON elsewhere."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Prometheus endpoint on its own port; off unless set, 0 takes a free one."""
    metrics_host: str = "127.0.0.1"
    """Metrics name tenants and models: loopback unless somebody decides otherwise."""
    otlp_endpoint: str | None = None
    """Where spans go, for example `http://127.0.0.1:4317`; off unless set, and costs nothing then."""
    trace_sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of requests without a parent that are traced; a caller's own decision wins."""
    emit_legacy_latency_attributes: bool = False
    """Add the `gen_ai.latency.*` attributes that dashboards made for other servers read."""


class ModelConfig(Section):
    """One model to serve."""

    name: str = Field(min_length=1, pattern=r"^[^@\s]+$")
    """What clients call it; `@` separates a version and is not allowed in it."""
    path: Path
    """A .gguf file, or a folder with config.json and safetensors."""
    version: str = Field("1", min_length=1, pattern=r"^[^@\s]+$")
    """Clients pin it as `name@version`."""
    aliases: tuple[str, ...] = ()
    """Other names that it answers to."""
    generation_defaults: dict[GenerationDefault, float] = {}
    """Instead of what the model's files say of unset sampling parameters."""


class Config(Section):
    """The whole tree. Layers receive their part, never this."""

    home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("pathfox")))
    """State lives under it; `PATHFOX_HOME` sets it."""
    server: ServerConfig = ServerConfig()
    admission: AdmissionConfig = AdmissionConfig()
    engine: EngineConfig = EngineConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    models: tuple[ModelConfig, ...] = ()
    """The first one is the default."""


def load_config(
    path: Path | None = None,
    *,
    options: Mapping[str, Setting] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Read the tree from its sources.

    Args:
        path: a TOML file with the tree's tables, or none.
        options: what the command line set, by dotted name (`server.port`).
        environment: instead of the process's own.

    Raises:
        ConfigError: names the file, variable or option, and what is wrong with it.
    """
    tree: dict[str, Setting] = {}
    origins: dict[tuple[str, ...], str] = {}
    if path is not None:
        tree = _read_file(path)
    for names, value, origin in (
        *_from_environment(os.environ if environment is None else environment),
        *((tuple(name.split(".")), value, f"option {name}") for name, value in (options or {}).items()),
    ):
        _put(tree, names, value, origin)
        origins[names] = origin
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error, origins, str(path) if path else "configuration")) from None


def _read_file(path: Path) -> dict[str, Setting]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _from_environment(environment: Mapping[str, str]) -> list[tuple[tuple[str, ...], Setting, str]]:
    found: list[tuple[tuple[str, ...], Setting, str]] = []
    if home := environment.get(ENVIRONMENT_HOME):
        found.append((("home",), home, ENVIRONMENT_HOME))
    for variable in sorted(environment):
        if variable.startswith(ENVIRONMENT_PREFIX):
            names = tuple(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
            found.append((names, _parse(variable, environment[variable]), variable))
    return found


def _parse(variable: str, text: str) -> Setting:
    """Read lists and tables as TOML; leave scalars to the field's own type."""
    if not text.startswith(("[", "{")):
        return text
    try:
        value: Setting = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{variable}: {error}") from None
    return value


def _put(tree: dict[str, Setting], names: tuple[str, ...], value: Setting, origin: str) -> None:
    table = tree
    for name in names[:-1]:
        below = table.setdefault(name, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{origin}: {name} is not a table")
        table = below
    table[names[-1]] = value


def _describe(error: ValidationError, origins: Mapping[tuple[str, ...], str], file: str) -> str:
    """Say in one line what set each bad value, and why it is bad."""
    complaints = []
    for problem in error.errors(include_url=False):
        place = tuple(str(part) for part in problem["loc"])
        origin = next((origins[place[:end]] for end in range(len(place), 0, -1) if place[:end] in origins), file)
        why = "unknown setting" if problem["type"] == "extra_forbidden" else problem["msg"]
        seen = problem.get("input")
        shown = f" (got {seen!r})" if isinstance(seen, str | int | float) and problem["type"] != "missing" else ""
        complaints.append(f"{origin}: {'.'.join(place)}: {why}{shown}")
    return "; ".join(complaints)
