"""Show figures: a table, a JSON file, a picture."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from server.cli.bench.drive import Recording
from server.cli.bench.figures import METRICS, PERCENTILES, Figures, Value, samples, tokens_per_s
from server.errors import ConfigError

NUM_WINDOWS = 60
COLUMNS = ("mean", "median", *(f"p{percent}" for percent in PERCENTILES if percent != 50))


def tables(figures: Figures) -> tuple[Table, Table]:
    """Draw what the run did, and its latencies."""
    counts = Table("figure", "value", title="partial result" if figures["partial"] else "result")
    counts.columns[1].justify = "right"
    for name, value in figures.items():
        if not name.endswith(tuple(f"_{metric}_ms" for metric in METRICS)):
            counts.add_row(name, _shown(value))
    times = Table("ms", *COLUMNS)
    for metric in METRICS:
        times.add_row(metric.upper(), *(_shown(figures[f"{column}_{metric}_ms"]) for column in COLUMNS))
    for column in times.columns[1:]:
        column.justify = "right"
    return counts, times


def write_json(path: Path, figures: Figures, settings: Mapping[str, Value]) -> None:
    """Write figures, and the settings that they belong to, as one flat object."""
    path.write_text(json.dumps({**settings, **figures}, indent=2) + "\n")


def check_plot() -> None:
    """Find out before the run whether it can be drawn.

    Raises:
        ConfigError: says what to install.
    """
    try:
        import matplotlib.figure  # noqa: PLC0415 optional: not needed to serve
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    del matplotlib


def plot(path: Path, recording: Recording, title: str) -> None:
    """Draw the distributions of latencies, and tokens per second over time, as a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 as in check_plot

    picture = Figure(figsize=(12, 7), layout="constrained")
    picture.suptitle(title)
    rows = picture.subplot_mosaic([["ttft", "tpot"], ["itl", "e2el"], ["rate", "rate"]])
    for metric, values in samples(recording).items():
        rows[metric].hist(values, bins=40, color="#d95f02")
        rows[metric].set(xlabel=f"{metric.upper()} (ms)", ylabel="count")
    width_s = max((recording.ended_s - recording.begun_s) / NUM_WINDOWS, 1e-3)
    rates = tokens_per_s(recording, width_s)
    rows["rate"].step([window * width_s for window in range(len(rates))], rates, where="post", color="#1b6ca8")
    rows["rate"].set(xlabel="time (s)", ylabel="output tokens/s", ylim=(0, None))
    picture.savefig(path, format="png", dpi=120)


def _shown(value: Value) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.2f}"
        case dict():
            return ", ".join(f"{count} {name}" for name, count in value.items()) or "-"
        case _:
            return str(value)
