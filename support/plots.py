"""Plots: tables of noise levels as PNG, curves of a training as SVG. Matplotlib loads when one is drawn."""

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from support import cli

COLOURS = ("#1f5fa8", "#e87722", "#2a9d6f", "#8a4fbf")
Line = Sequence[tuple[float, float]]  # (x, y) of each point


def tau_table(path: Path | str, taus: Tensor, given: Sequence[tuple[str, Sequence[int]]] = (), title: str = "") -> None:
    """Write τ (K+1, F) as a PNG heat map, steps down and frames across.

    given: (what, its latent frames, which are neighbours) of each condition, marked under its frames.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    K1, F = taus.shape
    width, height = max(0.18, min(0.6, 9 / F)), max(0.08, min(0.3, 4.8 / K1))  # of a cell, in inches
    with _style():
        figure = Figure(figsize=(F * width, K1 * height), dpi=100)  # all but the cells lies outside, and is saved too
        axes = figure.add_axes((0, 0, 1, 1), xlabel="latent frame", ylabel="step")
        colours, line = LinearSegmentedColormap.from_list("", ["#fff4de", "#e86a5c", "#2c1e54"]), min(1, 6 * height)
        cells = axes.pcolormesh(taus.numpy(), cmap=colours, vmin=0, vmax=1, edgecolors="white", lw=line, snap=True)
        if width >= 0.36 and height >= 0.16:
            for (k, i), tau in zip(taus.new_ones(K1, F).nonzero().tolist(), taus.flatten().tolist(), strict=True):
                colour = "white" if tau > 0.4 else "#333333"
                axes.text(i + 0.5, k + 0.5, f"{tau:.2f}" if tau else "0", color=colour, ha="center", va="center")
        for ticks, count, every in ((axes.set_xticks, F, 0.2 / width), (axes.set_yticks, K1, 0.16 / height)):
            shown = range(0, count, math.ceil(every))
            ticks([index + 0.5 for index in shown], shown)
        below = K1 + 0.14 / height
        for source, positions in given:
            first, across = positions[0], len(positions)
            axes.barh(below, across, 0.18 / height, first, color="#1b998b", clip_on=False)
            if across * width > 0.09 * len(source):
                axes.text(first + across / 2, below, source, color="white", ha="center", va="center_baseline")
        if given:
            axes.text(-0.1 / width, below, "given", color="#1b998b", ha="right", va="center_baseline")
            axes.tick_params(axis="x", pad=20)
        axes.set(xlim=(0, F), ylim=(K1, 0))
        bar = axes.inset_axes((1 + 0.3 / (F * width), 0, 0.16 / (F * width), 1))
        figure.colorbar(cells, bar, ticks=(0, 1), format=lambda tau, _: "1 noise" if tau else "0 data")
        axes.set_title(title, loc="left", fontsize=14, pad=24, color="#222222")
        axes.text(0, -0.1 / height, "noise level of each latent frame, step by step")
        with cli.replacing(path) as temporary:
            figure.savefig(temporary, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def curves(title: str, panels: Sequence[dict[str, Line]], best: float | None = None, points: int = 400) -> str:
    """Line charts side by side as one SVG, each of named lines on axes of their own range.

    A line of more than `points` shows the means of equal stretches; a dotted line marks x = best. Lines without points
    are left out, and without any the SVG is empty text.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [{name: thin for name, line in panel.items() if (thin := _thinned(line, points))} for panel in panels]
    panels = [panel for panel in panels if panel]
    if not panels:
        return ""
    with _style():
        figure = Figure(figsize=(9.6, 2.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color="#222222")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for (name, line), colour in zip(panel.items(), COLOURS, strict=False):
                axes.plot(*zip(*line, strict=True), color=colour, label=name, gid=name)
            if best is not None:
                axes.axvline(best, color="#777777", linestyle=":", linewidth=1, label=f"best: step {best:g}")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
            axes.grid(axis="y")
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return page.getvalue()[page.getvalue().index("<svg") :]


def _thinned(line: Line, points: int) -> Line:
    line = [(x, y) for x, y in line if math.isfinite(y)]
    length = math.ceil(len(line) / points) or 1
    stretches = [line[i : i + length] for i in range(0, len(line), length)]
    return [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]


def _style() -> AbstractContextManager:
    """Matplotlib's settings for the time of a picture: the same everywhere, whatever the user's own file says."""
    from matplotlib import style

    grey, none = "#555555", {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")}
    ours = {
        "axes.labelcolor": grey, "text.color": grey, "xtick.color": grey, "ytick.color": grey, "font.size": 9,
        "xtick.major.size": 0, "ytick.major.size": 0, "axes.edgecolor": "white", "grid.color": "#dddddd",
        "legend.frameon": False, "axes.formatter.useoffset": False, "path.simplify": False,
        "svg.fonttype": "none", "svg.hashsalt": "nanoPusa",
    }  # fmt: skip
    return style.context(["default", ours | none])
