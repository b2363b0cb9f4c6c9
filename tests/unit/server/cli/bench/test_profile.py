"""The budget of a token as tables and as a picture."""

from pathlib import Path

import pytest
from rich.console import Console

from server.cli.bench.profile import draw, tables
from server.cli.bench.scrape import Budget

BUDGETS = [
    Budget(1, 2048, 2500.0, {"kernels": 2000.0, "sample": 400.0, "unaccounted": 100.0}, {"engine": 3000.0}, 600.0),
    Budget(8, 8192, 640.0, {"kernels": 600.0, "sample": 45.0, "unaccounted": -5.0}, {"engine": 900.0}, 200.0),
]


def test_shows_microseconds_and_shares() -> None:
    """One column for each concurrency; the last line is the whole."""
    console = Console(width=120)
    with console.capture() as captured:
        console.print(*tables(BUDGETS))
    lines = [[cell.split() for cell in line.split("│")] for line in captured.get().splitlines()]

    assert [[], ["kernels"], ["2,000.0", "80.0%"], ["600.0", "93.8%"], []] in lines
    assert [[], ["all"], ["2,500.0", "100.0%"], ["640.0", "100.0%"], []] in lines


def test_draws_a_picture(tmp_path: Path) -> None:
    """A PNG of the promised size, even where a part came out negative."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "profile.png"
    draw(path, BUDGETS)
    data = path.read_bytes()

    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 700)
