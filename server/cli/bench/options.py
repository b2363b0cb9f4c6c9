"""The options of `pathfox bench`, one alias each, and the checks that typer has no word for."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from server.cli.bench.arrivals import mean_rate_per_s
from server.cli.bench.target import Codec, ProtocolName
from server.cli.bench.workload import LENGTHS_HELP
from server.errors import ConfigError

MAX_REQUESTS = 100_000
DEFAULT_REQUESTS = 32
DEFAULT_CONCURRENCY = 8
MAX_TEXT_BYTES = 1 << 20
load, content, result, server = (
    functools.partial(typer.Option, rich_help_panel=panel)
    for panel in ("Load", "Content of the requests", "Result", "Server")
)

Requests = Annotated[int | None, load(help=f"How many. Unset: {DEFAULT_REQUESTS}, or what --duration takes.")]
Duration = Annotated[float | None, load(help="Send nothing after so many seconds; what is under way may end.")]
Concurrency = Annotated[
    int | None, load(help=f"At most so many at once. Unset: {DEFAULT_CONCURRENCY}; with --rate no cap.")
]
Rate = Annotated[
    float, load(help="Open loop: requests/s, whatever the server does. inf = closed loop: the next when one ends.")
]
Burstiness = Annotated[
    float, load(help="Of --rate: shape of the gamma distribution of gaps; 1 = Poisson, below 1 in bursts, inf = even.")
]
RampTo = Annotated[float | None, load(help="Let the rate go from --rate to this over the run.")]
Warmup = Annotated[int, load(help="Requests before, of other prompts; not counted.")]
FirstTokenBudget = Annotated[
    float | None, load(help="Let the server refuse at once what it cannot begin within so many seconds (pathfox only).")
]
Timeout = Annotated[float, load(help="Seconds for each request.")]

InputTokens = Annotated[str, content(help=f"Prompt lengths: {LENGTHS_HELP}.")]
OutputTokens = Annotated[str, content(help="Answer lengths, likewise.")]
SharedPrefix = Annotated[int, content(help="Tokens that all prompts begin with, before those.")]
Text = Annotated[Path | None, content(help="Take prompts from this file's text. Unset: random tokens.")]
Temperature = Annotated[float, content(help="0 = always the most probable token.")]
Seed = Annotated[int, content(help="Same seed, same requests and times.")]
StopAtEos = Annotated[bool, content("--stop-at-eos", help="Let the model end its answers.")]

Goodput = Annotated[str | None, result(help="What a good request meets, in ms: 'ttft:X tpot:Y e2el:Z', any of them.")]
Percentiles = Annotated[str, result(help="Of every latency.")]
Json = Annotated[Path | None, result(help="Write figures, settings, machine and versions here.")]
Detailed = Annotated[bool, result("--detailed", help="In the JSON, also lists with an entry for each request.")]
Plot = Annotated[Path | None, result(help="Draw a PNG here (needs matplotlib).")]
Profile = Annotated[
    Path | None,
    result(help="Instead: run it at 1, 8 and 32 at once, print where a token's time goes and draw that here."),
]

MetricsAddress = Annotated[
    str | None, server(help="HOST:PORT of the server's metrics, for --profile (`pathfox serve --metrics-port`).")
]
Protocol = Annotated[
    ProtocolName,
    server(help="What it speaks: Pathfox's own, vLLM's engine service, or the Open Inference Protocol v2 of Triton."),
]
TokenizerFile = Annotated[
    Path | None,
    server("--tokenizer", help="The model's tokenizer.json: for --protocol oip, and for vllm with --text."),
]
Channels = Annotated[int, server(help="Connections.")]
AllowRemote = Annotated[bool, server("--allow-remote", help="Load a server on another machine.")]

LIMITS = {
    "requests": (1, MAX_REQUESTS),
    "duration": (0.001, 1e6),
    "rate": (0.001, math.inf),
    "burstiness": (0.001, math.inf),
    "ramp_to": (0.001, 1e6),
    "concurrency": (1, MAX_REQUESTS),
    "warmup": (0, MAX_REQUESTS),
    "first_token_budget": (0.001, 86_400),
    "timeout": (0.001, 1e6),
    "channels": (1, 256),
    "shared_prefix": (0, 10_000_000),
    "temperature": (0, 100),
}
"""From, to; of every option that is a number."""
NOT_PROFILED = ("concurrency", "rate", "ramp_to", "warmup", "goodput", "json", "plot", "detailed")
"""Options that `--profile` has no use for: it has loads, warm-ups and a picture of its own."""
UNSET = (None, False, 0, math.inf)


def check_numbers(options: Mapping[str, object]) -> None:
    """Refuse a number that is out of bounds; also what is no number, which comparisons alone let through.

    Raises:
        ConfigError: names the option, its value and the limits.
    """
    for name, (low, high) in LIMITS.items():
        value = options[name]
        if isinstance(value, int | float) and not low <= value <= high:
            bounds = f"{low:g} or more" if math.isinf(high) else f"{low:g} .. {high:g}"
            raise ConfigError(f"--{name.replace('_', '-')}: got {value:g}, want {bounds}")
    if options["ramp_to"] is not None and options["rate"] == math.inf:
        raise ConfigError("--ramp-to: got no --rate to begin with, want one")


def check_profile(options: Mapping[str, object]) -> None:
    """Refuse what would be asked for in vain.

    Raises:
        ConfigError: names an option that `--profile` leaves out.
    """
    if options["profile"] is None:
        return
    for name in NOT_PROFILED:
        if options[name] not in UNSET:
            raise ConfigError(f"--{name.replace('_', '-')}: got {options[name]}, want none beside --profile")


def num_requests(requests: int | None, duration_s: float | None, rate_per_s: float, ramp_to_per_s: float | None) -> int:
    """Return how many requests to prepare for."""
    if requests is not None:
        return requests
    if duration_s is None:
        return DEFAULT_REQUESTS
    if math.isinf(rate_per_s):
        return MAX_REQUESTS
    mean_per_s = mean_rate_per_s(rate_per_s, ramp_to_per_s)
    return min(max(math.ceil(duration_s * mean_per_s), 1), MAX_REQUESTS)


def read_text(path: Path) -> str:
    """Read the beginning of a file that prompts are taken from.

    Raises:
        ConfigError: there is no such file, or no text in it.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode(errors="ignore")
    except OSError as error:
        raise ConfigError(f"--text: cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise ConfigError(f"--text: {path} has no text")
    return text


def read_tokenizer(path: Path) -> Codec:
    """Read a tokenizer.json.

    Raises:
        ModelLoadError: it is none.
    """
    from server.text.tokenizer import Tokenizer  # noqa: PLC0415 only other servers' protocols need it

    return Tokenizer.from_file(path)
