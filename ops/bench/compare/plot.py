"""The ratios as a picture: one group of bars for each measure, one bar for each rival, a black line at each goal."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ops.bench.compare.report import Ratio, Result

COLOURS = ("#7f7f7f", "#1b6ca8", "#5f9ec9", "#d95f02", "#7570b3", "#1b9e77")
GROUP_WIDTH = 0.86
LOWEST = 0.5
TICKS = (0.5, 1, 2, 4, 8, 16, 32)


def plot(path: Path, result: Result) -> None:
    """Draw it as a PNG."""
    picture = Figure(figsize=(13, 6.2), layout="constrained")
    axes = picture.subplots()
    width = GROUP_WIDTH / max(len(result.rivals), 1)
    colours = dict(zip(result.rivals, COLOURS, strict=False))
    for place, (rival, colour) in enumerate(colours.items()):
        ratios = [result.ratio(rival, measure) for measure in result.measures]
        middles = [group + (place + 0.5) * width - GROUP_WIDTH / 2 for group in range(len(ratios))]
        _draw_bars(axes, middles, ratios, width, colour)
    axes.axhline(1, color="#999999", lw=0.8, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, 40)
    axes.set_yticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.minorticks_off()
    axes.set_xticks(range(len(result.measures)), result.measures)
    axes.set_ylabel("times as fast, log scale")
    machine = result.facts["machine"]
    assert isinstance(machine, dict)
    axes.set_title(
        f"Pathfox through everything next to others, bare: SmolLM2-135M, {result.facts['threads']} threads, "
        f"{machine['processor']}\n"
        "bars: medians; thin lines: single rounds; black lines: the least that is wanted (hatched: missed)"
    )
    axes.legend(
        handles=[Patch(color=colour, label=rival) for rival, colour in colours.items()], loc="upper left", ncols=3
    )
    picture.savefig(path, format="png", dpi=110)


def _draw_bars(axes: Axes, middles: Sequence[float], ratios: Sequence[Ratio], width: float, colour: str) -> None:
    """Draw one rival's bars, with their figures at the foot."""
    values = [each.value for each in ratios]
    reach = [
        [max(0.0, each.value - each.low) for each in ratios],
        [max(0.0, each.high - each.value) for each in ratios],
    ]
    bars = axes.bar(middles, values, width * 0.94, color=colour, yerr=reach, error_kw={"ecolor": "#333333", "lw": 1})
    for middle, each, bar in zip(middles, ratios, bars, strict=True):
        foot = (middle, LOWEST)
        paper = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        axes.annotate(
            f"{each.value:.2f}",
            foot,
            (0, 5),
            textcoords="offset points",
            ha="center",
            color="white",
            size=8,
            bbox=paper,
        )
        if each.least is not None:
            axes.hlines(each.least, middle - width / 2, middle + width / 2, color="black", lw=2)
            bar.set_hatch("" if each.value >= each.least else "//")
            bar.set_edgecolor("white")
