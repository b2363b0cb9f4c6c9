"""`pathfox bench`: reads the options, runs the load and shows what came of it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc.aio
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pathfox.v1 import generation_pb2 as pb
from server.cli.bench.arrivals import Process, due_times_s
from server.cli.bench.drive import OK, Call, Limits, Recording, SystemClock, drive
from server.cli.bench.figures import Goal, figures
from server.cli.bench.report import check_plot, plot, tables, write_json
from server.cli.bench.target import Target, stubs
from server.cli.bench.workload import LENGTHS_HELP, Lengths, Workload
from server.cli.generate import DEFAULT_ADDRESS, AddressOption, ModelOption, TlsOption, TokenOption
from server.errors import ConfigError

EXAMPLES = (
    "Examples:\n\n  pathfox bench --requests 32 --concurrency 8\n\n"
    "  pathfox bench --rate 4 --arrivals gamma --burstiness 0.5 --goodput 'ttft:500 tpot:50'\n\n"
    "  pathfox bench --input-tokens normal:192:64 --output-tokens uniform:16:128 --json run.json --plot run.png"
)
EXIT_FAILED = 1
MAX_REQUESTS = 100_000
MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """One run, all of it decided."""

    target: Target
    workload: Workload
    due_s: list[float]
    limits: Limits
    channels: int
    seed: int
    text: str | None


def bench(
    address: AddressOption = DEFAULT_ADDRESS,
    model: ModelOption = None,
    requests: Annotated[int, typer.Option(min=1, max=MAX_REQUESTS, help="How many.")] = 32,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests/s. Unset: closed loop.")] = None,
    arrivals: Annotated[Process, typer.Option(help="Gaps of the open loop.")] = Process.POISSON,
    burstiness: Annotated[float, typer.Option(help="Of gamma: below 1 in bursts, 1 = poisson.")] = 1.0,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many at once. Unset: 8 in a closed loop, no cap in an open one."),
    ] = None,
    input_tokens: Annotated[str, typer.Option(help=f"Prompt lengths: {LENGTHS_HELP}.")] = "192",
    output_tokens: Annotated[str, typer.Option(help="Answer lengths, likewise.")] = "64",
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with, besides.")] = 0,
    text: Annotated[Path | None, typer.Option(help="Take prompts from this file. Unset: random tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 = always the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same requests and times.")] = 0,
    duration: Annotated[float | None, typer.Option(min=0.001, help="Stop after so many seconds.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for each request.")] = 600.0,
    channels: Annotated[int, typer.Option(min=1, max=256, help="Connections.")] = 4,
    goodput: Annotated[str | None, typer.Option(help="What is good, in ms: 'ttft:X tpot:Y e2el:Z'.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write figures and settings here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a PNG here (needs matplotlib).")] = None,
    token: TokenOption = None,
    *,
    tls: TlsOption = False,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Let the model end its answers.")] = False,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Load a server on another machine.")] = False,
) -> None:
    """Put load on a server over gRPC and measure it; fields and formulas are those of vLLM's `bench serve`."""
    target = Target(address, token, tls)
    if not allow_remote:
        target.check_loopback()
    goal = Goal.parse(goodput) if goodput is not None else None
    if plot_file is not None:
        check_plot()
    isl, osl = Lengths.parse("--input-tokens", input_tokens), Lengths.parse("--output-tokens", output_tokens)
    cap = concurrency or (8 if rate is None else requests)
    run = Run(
        target,
        Workload(isl, osl, shared_prefix, temperature, ignore_eos=not stop_at_eos, model=model),
        due_times_s(requests, rate_per_s=rate, process=arrivals, burstiness=burstiness, seed=seed),
        Limits(cap, duration, timeout),
        channels,
        seed,
        _read(text) if text is not None else None,
    )
    recording = Recording(requests)
    cpu_s = time.process_time()
    is_interrupted = _watch(run, recording)
    found = figures(recording, goal)
    elapsed_s = recording.ended_s - recording.begun_s
    found["client_cpu_share"] = (time.process_time() - cpu_s) / elapsed_s if elapsed_s > 0 else None
    console = Console()
    console.print(*tables(found))
    if json is not None:
        settings = {
            "date": time.strftime("%Y%m%d-%H%M%S"),
            "backend": "pathfox-grpc",
            "model_id": model,
            "request_rate": rate if rate is not None else "inf",
            "arrivals": str(arrivals),
            "burstiness": burstiness,
            "max_concurrency": cap,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "shared_prefix_tokens": shared_prefix,
            "temperature": temperature,
            "seed": seed,
            "channels": channels,
            "goodput": goodput,
        }
        write_json(json, found, settings)
    if plot_file is not None:
        plot(plot_file, recording, f"pathfox bench: {requests} requests, {input_tokens} + {output_tokens} tokens")
    if is_interrupted or not found["completed"]:
        raise typer.Exit(EXIT_FAILED)


def _watch(run: Run, recording: Recording) -> bool:
    """Run it under a progress bar; return whether it was interrupted."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("requests", total=recording.asked)
        failed = 0

        def on_end(call: Call) -> None:
            nonlocal failed
            failed += call.status != OK
            progress.update(bar, advance=1, description=f"requests ({failed} failed)" if failed else "requests")

        try:
            asyncio.run(_run(run, recording, on_end))
        except KeyboardInterrupt:
            if not recording.calls:
                raise
            return True
    return False


async def _run(run: Run, recording: Recording, on_end: Callable[[Call], None]) -> None:
    async with run.target.open(run.channels) as channels:
        requests = await _requests(run, channels[0], recording.asked)
        await drive(
            requests,
            run.due_s,
            stubs=stubs(channels),
            metadata=run.target.metadata,
            limits=run.limits,
            recording=recording,
            clock=SystemClock(),
            on_end=on_end,
        )


async def _requests(run: Run, channel: grpc.aio.Channel, count: int) -> list[pb.GenerateRequest]:
    model = await run.target.model(channel, run.workload.model)
    run.workload.check(model.context_length_tokens)
    if run.text is None:
        size = model.tokenizer.vocabulary_size
        vocabulary = range(size // 10, size * 9 // 10 or 1)  # control tokens stand at the ends
        return run.workload.requests(count, seed=run.seed, vocabulary=vocabulary)
    tokens = await run.target.tokens_of(channel, run.workload.model, run.text)
    if not tokens:
        raise ConfigError("--text: the file has no text")
    return run.workload.requests_from(tokens, count, seed=run.seed)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TEXT_BYTES).decode(errors="ignore")
    except OSError as error:
        raise ConfigError(f"--text: cannot read {path}: {error.strerror}") from None
