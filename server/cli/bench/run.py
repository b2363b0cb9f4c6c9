"""One run from the first connection to the last frame: asks what is served, warms up, drives the load."""

import asyncio
import itertools
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.cli.bench.connection import Connection, connect
from server.cli.bench.drive import Limits, SystemClock, drive
from server.cli.bench.oip import OipTarget
from server.cli.bench.pathfox import PathfoxTarget
from server.cli.bench.recording import Call, OnEnd, Outcome, Recording
from server.cli.bench.target import CallFailed, Codec, ProtocolName, Target
from server.cli.bench.vllm import VllmTarget
from server.cli.bench.workload import Draw, Workload, pieces_of, random_tokens
from server.errors import ConfigError, StartupError

REFRESH_PER_S = 4  # the bar shares the cores with the server


@dataclass(frozen=True, slots=True)
class Plan:
    """One run, all of it decided."""

    address: str
    token: str | None
    tls: bool
    channels: int
    protocol: ProtocolName
    model: str | None
    tokenizer: Codec | None
    """The model's, where its server does not tokenise."""
    workload: Workload
    text: str | None
    """What prompts are pieces of; None = random tokens."""
    first_token_budget_s: float | None
    due_s: list[float]
    limits: Limits
    num_warmups: int
    seed: int | str


def run(plan: Plan, recording: Recording) -> bool:
    """Run under a progress bar; return whether it was interrupted when it had begun.

    Raises:
        StartupError: nobody answers there, or not to this.
        KeyboardInterrupt: there is nothing yet that could be kept.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True, refresh_per_second=REFRESH_PER_S
    ) as progress:
        bar = progress.add_task("requests", total=recording.asked if plan.limits.run_s is None else None)
        num_bad = 0

        def on_end(call: Call) -> None:
            nonlocal num_bad
            num_bad += call.outcome is not Outcome.COMPLETED
            progress.update(bar, advance=1, description=f"requests ({num_bad} not well)" if num_bad else "requests")

        try:
            asyncio.run(_run(plan, recording, on_end))
        except KeyboardInterrupt:
            if not recording.calls:
                raise
            return True
    return False


async def _run(plan: Plan, recording: Recording, on_end: OnEnd) -> None:
    async with connect(plan.address, token=plan.token, tls=plan.tls, count=plan.channels) as connection:
        target = _target(plan, connection)
        try:
            draw = await _prepare(plan, target, recording)
        except CallFailed as failure:
            raise StartupError(f"cannot bench {plan.address}: {failure}") from None
        asks = plan.workload.asks(draw, seed=plan.seed)
        await drive(
            target,
            asks,
            plan.due_s,
            limits=plan.limits,
            recording=recording,
            clock=SystemClock(),
            on_end=on_end,
        )


def _target(plan: Plan, connection: Connection) -> Target:
    match plan.protocol:
        case ProtocolName.PATHFOX:
            return PathfoxTarget(connection, model=plan.model, first_token_budget_s=plan.first_token_budget_s)
        case ProtocolName.VLLM:
            return VllmTarget(connection, tokenizer=plan.tokenizer)
        case ProtocolName.OIP if plan.tokenizer is not None:
            return OipTarget(connection, tokenizer=plan.tokenizer, model=plan.model)
    raise ConfigError("--tokenizer: got none, want the model's tokenizer.json: --protocol oip takes text, not tokens")


async def _prepare(plan: Plan, target: Target, recording: Recording) -> Draw:
    """Learn what prompts can be, and warm up."""
    served = await target.served()
    recording.model_id = served.name
    if served.context_length_tokens:
        plan.workload.check(served.context_length_tokens)
    if plan.text is not None:
        draw = pieces_of(await target.tokens_of(plan.text))
    elif served.vocabulary_size:
        draw = random_tokens(served.vocabulary_size)
    else:
        raise ConfigError("--text: got none, want one: this server does not say which tokens there are")
    warmup = Recording(plan.num_warmups)
    asks = plan.workload.asks(draw, seed=f"{plan.seed} warm-up")  # other prompts, lest they be cached
    await drive(
        target,
        itertools.islice(asks, plan.num_warmups),
        [0.0] * plan.num_warmups,
        limits=Limits(plan.limits.concurrency, call_s=plan.limits.call_s),
        recording=warmup,
        clock=SystemClock(),
    )
    if warmup.stopped:
        raise StartupError(f"cannot bench {plan.address}: {warmup.stopped} during warm-up")
    return draw
