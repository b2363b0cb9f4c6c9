import pathlib
import struct

import pytest

from server.cli.bench.plot import check_can_draw, draw
from server.cli.bench.recording import Call, Frame, Outcome, Recording
from server.errors import ConfigError

DONE = Call(0.0, 0.1, outcome=Outcome.COMPLETED, frames=[Frame(0.2, 1), Frame(0.4, 3)], ended_s=0.5)
REFUSED = Call(0.2, 0.2, outcome=Outcome.REJECTED, ended_s=0.21)
UNDER_WAY = Call(0.3, 0.3, frames=[Frame(0.6, 1)])


@pytest.mark.parametrize("calls", [[], [REFUSED], [DONE], [DONE, REFUSED, UNDER_WAY]])
@pytest.mark.parametrize("stopped", [None, "interrupted"])
def test_any_run_can_be_drawn(tmp_path: pathlib.Path, calls: list[Call], stopped: str | None) -> None:
    """A picture of 1200 x 900, whatever there is to show: nothing, refusals only, a run that was cut short."""
    path = tmp_path / "run.png"

    draw(path, Recording(9, begun_s=0.0, ended_s=1.0, calls=calls, stopped=stopped), "a run")

    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1200, 900)


def test_what_is_missing_to_draw_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the option that wants it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    with pytest.raises(ConfigError, match="--plot: needs matplotlib: pip install matplotlib"):
        check_can_draw("--plot")
