"""Draw a run: how latencies are distributed, and what went on over time."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.bench.figures import concurrency, percentile, samples, tokens_per_s
from server.cli.bench.recording import Outcome, Recording
from server.errors import ConfigError

if TYPE_CHECKING:  # optional, as in draw
    from matplotlib.axes import Axes

SIZE_INCHES = (12.0, 9.0)
DOTS_PER_INCH = 100
MAX_BINS = 50
NUM_WINDOWS = 80
DISTRIBUTIONS = {"ttft": "Time to first token", "itl": "Gap between messages (ITL)", "e2el": "End to end"}
BAR, LINE, MARK, FAULT = "#4c8dae", "#1f4e68", "#d1495b", "#e9b44c"


def check_can_draw(option: str) -> None:
    """Find out before the load whether it can be drawn.

    Raises:
        ConfigError: says what to install.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{option}: needs matplotlib: pip install matplotlib")


def draw(path: Path, recording: Recording, title: str) -> None:
    """Write a PNG of 1200 x 900 pixels."""
    from matplotlib.figure import Figure  # noqa: PLC0415 optional: not needed to serve or to measure

    picture = Figure(figsize=SIZE_INCHES, layout="constrained")
    picture.suptitle(f"{title}\npartial: {recording.stopped}" if recording.stopped else title, fontsize=13)
    panels = picture.subplot_mosaic([["ttft", "itl", "e2el"], ["rate"] * 3, ["load"] * 3])
    seen = samples(recording)
    for metric, name in DISTRIBUTIONS.items():
        _draw_distribution(panels[metric], seen[metric], name)
    _draw_rate(panels["rate"], recording)
    _draw_load(panels["load"], recording)
    picture.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _draw_distribution(panel: "Axes", values: Sequence[float], name: str) -> None:
    panel.set(title=name, xlabel="ms", ylabel="count")
    if not values:
        panel.text(0.5, 0.5, "nothing completed", ha="center", transform=panel.transAxes)
        return
    panel.hist(values, bins=min(MAX_BINS, 10 + len(values) // 10), color=BAR)
    for percent, style in ((50, "-"), (99, "--")):
        at_ms = percentile(values, percent) or 0.0
        shown = f"{at_ms:,.0f}" if at_ms >= 100 else f"{at_ms:.3g}"
        panel.axvline(at_ms, color=MARK, linestyle=style, label=f"p{percent} {shown} ms")
    panel.legend(edgecolor="none", framealpha=0.85)


def _draw_rate(panel: "Axes", recording: Recording) -> None:
    width_s = max(recording.duration_s / NUM_WINDOWS, 1e-3)
    rates = tokens_per_s(recording.calls, width_s, begun_s=recording.begun_s)
    panel.stairs(rates, [place * width_s for place in range(len(rates) + 1)], fill=True, color=BAR)
    panel.set(title="Output tokens per second", ylabel="tokens/s", xlim=(0, recording.duration_s), ylim=(0, None))


def _draw_load(panel: "Axes", recording: Recording) -> None:
    steps = concurrency([call for call in recording.calls if call.outcome is not Outcome.REJECTED])
    times = [at - recording.begun_s for at, _ in steps]
    panel.step(times, [count for _, count in steps], where="post", color=LINE)
    for outcome, colour in ((Outcome.REJECTED, FAULT), (Outcome.FAILED, MARK)):
        at = [(call.ended_s or call.sent_s) - recording.begun_s for call in recording.calls if call.outcome is outcome]
        if at:
            panel.plot(at, [0] * len(at), "|", color=colour, markersize=14, clip_on=False, label=f"{len(at)} {outcome}")
    panel.set(title="Requests under way", xlabel="s", ylabel="requests", xlim=(0, recording.duration_s), ylim=(0, None))
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, loc="upper right")
