"""`pathfox bench`: reads the options, runs the load and shows what came of it."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from server.cli.bench import options
from server.cli.bench.arrivals import due_times_s
from server.cli.bench.connection import check_loopback
from server.cli.bench.drive import Limits
from server.cli.bench.figures import Goal, completed, figures, parse_percentiles, per_request
from server.cli.bench.plot import check_can_draw, draw
from server.cli.bench.profile import profile as run_profile
from server.cli.bench.provenance import provenance
from server.cli.bench.recording import Recording
from server.cli.bench.report import check_writable, tables, write_json
from server.cli.bench.run import Plan, run
from server.cli.bench.target import ProtocolName
from server.cli.bench.workload import Lengths, Workload
from server.cli.generate import DEFAULT_ADDRESS, AddressOption, ModelOption, TlsOption, TokenOption

EXAMPLES = (
    "Examples:\n\n  pathfox bench --requests 32 --concurrency 8\n\n"
    "  pathfox bench --rate 4 --duration 60 --burstiness 0.5 --goodput 'ttft:500 tpot:50'\n\n"
    "  pathfox bench --input-tokens normal:192:64 --output-tokens uniform:16:128 --json run.json --plot run.png\n\n"
    "TTFT is the time from sending to the first message with tokens, E2EL to the last one. TPOT is their difference "
    "by the tokens after the first, one figure for each request. ITL is every gap between messages: one that brings "
    "several tokens is one gap, and mean_tokens_per_frame says how many that were. All as in vLLM's bench serve."
)
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Output:
    """What is wanted of a run besides the tables."""

    goal: Goal | None
    percentiles: tuple[float, ...]
    json: Path | None
    plot: Path | None
    is_detailed: bool


def bench(
    context: typer.Context,
    address: AddressOption = DEFAULT_ADDRESS,
    model: ModelOption = None,
    requests: options.Requests = None,
    duration: options.Duration = None,
    concurrency: options.Concurrency = None,
    rate: options.Rate = math.inf,
    burstiness: options.Burstiness = 1.0,
    ramp_to: options.RampTo = None,
    warmup: options.Warmup = 0,
    first_token_budget: options.FirstTokenBudget = None,
    timeout: options.Timeout = 600.0,
    protocol: options.Protocol = ProtocolName.PATHFOX,
    tokenizer: options.TokenizerFile = None,
    channels: options.Channels = 4,
    input_tokens: options.InputTokens = "192",
    output_tokens: options.OutputTokens = "64",
    shared_prefix: options.SharedPrefix = 0,
    text: options.Text = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    goodput: options.Goodput = None,
    percentiles: options.Percentiles = "50,90,99",
    json: options.Json = None,
    plot: options.Plot = None,
    profile: options.Profile = None,
    metrics_address: options.MetricsAddress = None,
    token: TokenOption = None,
    *,
    stop_at_eos: options.StopAtEos = False,
    detailed: options.Detailed = False,
    tls: TlsOption = False,
    allow_remote: options.AllowRemote = False,
) -> None:
    """Put load on a server over gRPC and measure it; fields and formulas are those of vLLM's `bench serve`."""
    if not allow_remote:
        check_loopback(address)
    options.check_numbers(context.params)
    options.check_profile(context.params)
    lengths = (Lengths.parse("--input-tokens", input_tokens), Lengths.parse("--output-tokens", output_tokens))
    count = options.num_requests(requests, duration, rate, ramp_to)
    default_cap = count if math.isfinite(rate) else options.DEFAULT_CONCURRENCY
    plan = Plan(
        address=address,
        token=token,
        tls=tls,
        channels=channels,
        protocol=protocol,
        model=model,
        tokenizer=options.read_tokenizer(tokenizer) if tokenizer is not None else None,
        workload=Workload(*lengths, shared_prefix, temperature, ignore_eos=not stop_at_eos),
        text=options.read_text(text) if text is not None else None,
        first_token_budget_s=first_token_budget,
        due_s=due_times_s(count, rate_per_s=rate, burstiness=burstiness, ramp_to_per_s=ramp_to, seed=seed),
        limits=Limits(concurrency or default_cap, duration, timeout),
        num_warmups=warmup,
        seed=seed,
    )
    if profile is not None:
        check_writable("--profile", profile)
        check_can_draw("--profile")
        run_profile(plan, profile, metrics_address)
        return
    goal = Goal.parse(goodput) if goodput is not None else None
    output = Output(goal, parse_percentiles(percentiles), json, plot, is_detailed=detailed)
    _check_output(output)
    recording = Recording(count, is_open_loop=math.isfinite(rate), keeps_text=detailed)
    settings = _settings(context.params, plan, recording)
    is_interrupted = run(plan, recording)
    _show(recording, output, settings)
    if is_interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if recording.stopped or not completed(recording):
        raise typer.Exit(EXIT_FAILED)


def _settings(options: Mapping[str, object], plan: Plan, recording: Recording) -> dict[str, object]:
    """Return what the run was asked for, by vLLM's names and by our own; and where it ran."""
    is_capped = not recording.is_open_loop or options["concurrency"] is not None
    return {
        "backend": f"{plan.protocol}-grpc",
        "request_rate": options["rate"] if recording.is_open_loop else "inf",
        "burstiness": _plain(options["burstiness"]),
        "max_concurrency": plan.limits.concurrency if is_capped else None,
        "options": {name: _plain(value) for name, value in options.items() if name != "token"},
        **provenance(sys.argv[1:]),
    }


def _check_output(output: Output) -> None:
    """Find out before the load whether its result can be kept."""
    for option, path in (("--json", output.json), ("--plot", output.plot)):
        if path is not None:
            check_writable(option, path)
    if output.plot is not None:
        check_can_draw("--plot")


def _show(recording: Recording, output: Output, settings: Mapping[str, Any]) -> None:
    found = figures(recording, output.goal, output.percentiles)
    Console().print(*tables(found))
    if output.json is not None:
        lists = per_request(recording) if output.is_detailed else {}
        write_json(output.json, {**settings, "model_id": recording.model_id, **found, **lists})
    if output.plot is not None:
        asked = settings["options"]
        pace = f"{asked['rate']} requests/s" if recording.is_open_loop else f"{settings['max_concurrency']} at once"
        lengths = f"prompts of {asked['input_tokens']} and answers of {asked['output_tokens']} tokens"
        draw(output.plot, recording, f"{recording.model_id}: {recording.asked} requests, {pace}, {lengths}")


def _plain(value: object) -> object:
    """Return an option's value as JSON has it."""
    is_plain = value is None or isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else str(value)
