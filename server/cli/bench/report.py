"""Show figures: tables for a terminal, a JSON file for programs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from server.cli.bench.figures import Figures, Value
from server.errors import ConfigError

TITLES = {
    "ttft": "TTFT: first token",
    "tpot": "TPOT: per token",
    "itl": "ITL: gap",
    "e2el": "E2EL: last token",
    "client_queue_time": "sent late",
    "e2el_including_client_queue": "E2EL + sent late",
    "refusal": "refusal",
}
LATENCY = re.compile(rf"(mean|median|std|p[\d.]+)_({'|'.join(TITLES)})_ms")


def tables(figures: Figures) -> tuple[Table, Table]:
    """Draw what the run did, and its latencies."""
    counts = Table("figure", "value", title="partial result" if figures["is_partial"] else "result")
    counts.columns[1].justify = "right"
    latencies: dict[str, dict[str, str]] = {}
    for name, value in figures.items():
        if match := LATENCY.fullmatch(name):
            latencies.setdefault(match[2], {})[match[1]] = _shown(value)
        elif value is not None and value != {}:
            counts.add_row(name, _shown(value))
    columns = [each for each in next(iter(latencies.values())) if each != "p50"]  # is the median
    times = Table("ms", *columns)
    for metric, row in latencies.items():
        times.add_row(TITLES[metric], *(row[column] for column in columns))
    for column in times.columns[1:]:
        column.justify = "right"
    return counts, times


def write_json(path: Path, result: Mapping[str, object]) -> None:
    """Write a result, and the settings that it belongs to, as one object."""
    path.write_text(json.dumps(result, indent=2) + "\n")


def check_writable(option: str, path: Path) -> None:
    """Find out before the load whether its result can be kept; leaves no file behind.

    Raises:
        ConfigError: says why not.
    """
    is_new = not path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path}: {error.strerror}") from None
    if is_new:
        path.unlink()


def _shown(value: Value) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
        case dict():
            return ", ".join(f"{count} {name}" for name, count in value.items())
        case _:
            return str(value)
