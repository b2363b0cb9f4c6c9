"""`pathfox bench --profile`: the same load at three concurrencies, and where the time of a token went at each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from server.cli.bench.recording import Recording
from server.cli.bench.run import Plan, run
from server.cli.bench.scrape import Budget, budget, scrape
from server.errors import StartupError

if TYPE_CHECKING:  # optional, as in draw
    from matplotlib.axes import Axes

STREAMS = (1, 8, 32)
WALL_TITLE = "Time of the engine's thread"
CPU_TITLE = "CPU time of all threads"
SIZE_INCHES = (12.0, 7.0)
DOTS_PER_INCH = 100
SMALLEST_LABEL = 0.03
"""Of a bar's height: what is lower has no room for its number."""


def profile(plan: Plan, path: Path, metrics_address: str | None) -> None:
    """Run the plan's load at each concurrency; print the budget of a token and draw it.

    Raises:
        ConfigError, StartupError: the server, or its metrics, cannot be reached, or it died.
    """
    scrape(metrics_address)  # before the load: it may not be there
    budgets = [measure(plan, streams, metrics_address) for streams in STREAMS]
    Console().print(*tables(budgets))
    draw(path, budgets)


def measure(plan: Plan, streams: int, metrics_address: str | None) -> Budget:
    """Warm up, and run the load between two scrapes."""
    level = replace(plan, limits=replace(plan.limits, concurrency=streams))
    _load(level, streams, seed=f"{plan.seed} warm-up {streams}")
    before = scrape(metrics_address)
    recording = _load(level, max(len(plan.due_s), streams), seed=f"{plan.seed} {streams}")
    after = scrape(metrics_address)
    return budget(
        before,
        after,
        streams=streams,
        tokens=sum(call.frames[-1].num_tokens for call in recording.calls if call.frames),
        elapsed_s=recording.duration_s,
        client_cpu_s=recording.cpu_s,
    )


def _load(plan: Plan, count: int, *, seed: str) -> Recording:
    """Run so many requests of their own: no prompt that another run has sent, lest it be cached."""
    recording = Recording(count)
    is_interrupted = run(replace(plan, due_s=[0.0] * count, num_warmups=0, seed=seed), recording)
    if is_interrupted:
        raise KeyboardInterrupt
    if recording.stopped or not any(call.frames for call in recording.calls):
        raise StartupError(f"cannot profile {plan.address}: {recording.stopped or 'no request brought a token'}")
    return recording


def tables(budgets: Sequence[Budget]) -> tuple[Table, Table]:
    """Show microseconds for each token and their shares, one column for each concurrency."""
    elapsed = {each.streams: each.elapsed_us for each in budgets}
    used = {each.streams: sum(each.cpu_us.values()) for each in budgets}
    wall = _table(WALL_TITLE, {each.streams: each.wall_us for each in budgets}, elapsed)
    wall.add_section()
    wall.add_row("writes, overlapping", *(f"{each.write_us:,.0f}" for each in budgets))
    return wall, _table(CPU_TITLE, {each.streams: each.cpu_us for each in budgets}, used)


def _table(title: str, parts: Mapping[int, Mapping[str, float]], totals: Mapping[int, float]) -> Table:
    table = Table(f"us per token ({title.lower()})", *(_level(streams) for streams in totals))
    for column in table.columns[1:]:
        column.justify = "right"
    for name in next(iter(parts.values())):
        cells = (f"{parts[streams][name]:,.1f} {parts[streams][name] / totals[streams]:7.1%}" for streams in totals)
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("all", *(f"{total:,.1f} {1:7.1%}" for total in totals.values()))
    return table


def _level(streams: int) -> str:
    return "1 stream" if streams == 1 else f"{streams} streams"


def draw(path: Path, budgets: Sequence[Budget]) -> None:
    """Write a PNG: the two tables as stacked bars."""
    from matplotlib.figure import Figure  # noqa: PLC0415 optional: not needed to serve or to measure

    picture = Figure(figsize=SIZE_INCHES, layout="constrained")
    wall, cpu = picture.subplots(1, 2)
    _stack(wall, WALL_TITLE, [each.wall_us for each in budgets], [each.streams for each in budgets])
    _stack(cpu, CPU_TITLE, [each.cpu_us for each in budgets], [each.streams for each in budgets])
    picture.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _stack(panel: "Axes", title: str, parts: Sequence[Mapping[str, float]], streams: Sequence[int]) -> None:
    """Draw shares, so that one stream and many compare; the totals stand above."""
    from matplotlib import colormaps  # noqa: PLC0415 as above

    colours = colormaps["tab20"].colors  # type: ignore[attr-defined] # a list of colours, not in the stubs
    totals = [sum(max(value, 0.0) for value in each.values()) for each in parts]
    bottoms = [0.0] * len(parts)
    for name, colour in zip(parts[0], colours, strict=False):
        heights = [max(each[name], 0.0) / total for each, total in zip(parts, totals, strict=True)]
        bars = panel.bar(range(len(parts)), heights, bottom=bottoms, label=name, color=colour, width=0.7)
        shown = [
            f"{each[name]:,.0f}" if height >= SMALLEST_LABEL else ""
            for each, height in zip(parts, heights, strict=True)
        ]
        panel.bar_label(bars, shown, label_type="center", fontsize=8)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    names = [f"{_level(count)}\n{total:,.0f} us" for count, total in zip(streams, totals, strict=True)]
    panel.set(title=f"{title}, us per token", ylim=(0, 1), yticks=[])
    panel.set_xticks(range(len(parts)), names)
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, reverse=True, fontsize=9)
    panel.spines[:].set_visible(False)
