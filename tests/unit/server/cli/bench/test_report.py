import json
import pathlib

import pytest
from rich.console import Console

from server.cli.bench.figures import figures
from server.cli.bench.recording import Call, Frame, Outcome, Recording, Usage
from server.cli.bench.report import check_writable, tables, write_json
from server.errors import ConfigError


def recording() -> Recording:
    """One answer of two tokens, one refusal, cut short after a second."""
    frames = [Frame(0.25, 1), Frame(0.75, 2)]
    done = Call(0.0, 0.0, outcome=Outcome.COMPLETED, frames=frames, ended_s=0.8, usage=Usage(3, 2))
    refused = Call(0.0, 0.5, outcome=Outcome.REJECTED, status="RESOURCE_EXHAUSTED", ended_s=0.504)
    return Recording(9, begun_s=0.0, ended_s=1.0, calls=[done, refused], stopped="interrupted")


def shown(seen: Recording) -> str:
    """Render the tables as a terminal of 80 columns shows them."""
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(*tables(figures(seen)))
    return capture.get()


def cells(line: str) -> list[str]:
    """Cut a line of a table into its cells."""
    return [each.strip() for each in line.strip("│").split("│")]


def test_tables_fit_a_terminal_and_say_what_is_missing() -> None:
    """Each latency is one line of 80 columns; a run that was cut short is headed so, with the reason."""
    lines = shown(recording()).splitlines()
    rows = {cells(line)[0]: cells(line)[1:] for line in lines if line.startswith("│")}

    assert lines[0].strip() == "partial result"
    assert rows["stopped"] == ["interrupted"]
    assert rows["statuses"] == ["1 RESOURCE_EXHAUSTED"]
    assert rows["TTFT: first token"] == ["250.00", "250.00", "0", "250.00", "250.00"]
    assert rows["E2EL: last token"][0] == "750.00"
    assert rows["refusal"][0] == "4.00"


def test_a_run_without_answers_shows_dashes() -> None:
    """There is nothing to compute a latency from."""
    assert "│ TTFT: first token │    - │      - │   - │   - │   - │" in shown(Recording(1))


def test_a_result_is_json(tmp_path: pathlib.Path) -> None:
    """Nothing in it that JSON does not have."""
    write_json(tmp_path / "x.json", figures(Recording(1)))

    assert json.loads((tmp_path / "x.json").read_text())["mean_ttft_ms"] is None


def test_checking_a_path_leaves_what_is_there(tmp_path: pathlib.Path) -> None:
    """An old file keeps its content, a new one is not left behind, and what cannot be written is named."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")

    check_writable("--json", old)
    check_writable("--json", new)

    assert (old.read_text(), new.exists()) == ("kept", False)
    with pytest.raises(ConfigError, match="Is a directory"):
        check_writable("--json", tmp_path)
