"""Tables of noise levels as text and PNG, curves of a training as SVG. Matplotlib loads when one is drawn."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

COLOURS, GREY = ("#1f5fa8", "#e87722", "#2a9d6f", "#8a4fbf"), "#555555"
DATA_TO_NOISE = ("#fff4de", "#e86a5c", "#2c1e54")  # how a noise level is coloured, from 0 to 1
STYLE = [  # the same everywhere, whatever the user's own settings say
    "default",
    {"text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "grid.color": "#dddddd"},
    {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    {"font.size": 9, "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "axes.edgecolor": "white"},
    {"path.simplify": False, "lines.solid_capstyle": "round", "axes.formatter.useoffset": False},
    {"svg.fonttype": "none", "svg.hashsalt": "nanoPusa"},  # text stays text, and equal input gives equal ids
]


def tau_table(path: Path | str, taus: Tensor, given: Sequence[tuple[str, Sequence[int]]] = (), title: str = "") -> None:
    """Write τ (K+1, F) as a PNG heat map, steps down and frames across.

    given: (name, its latent frames, which are neighbours) of each condition, marked under those frames.
    """
    from matplotlib import colors, figure, style

    levels, (K1, F) = taus.cpu().numpy(), taus.shape
    width, height = max(0.18, min(0.6, 9 / F)), max(0.08, min(0.3, 4.8 / K1))  # of a cell, in inches
    data_to_noise = colors.LinearSegmentedColormap.from_list("", DATA_TO_NOISE)
    with style.context(STYLE):
        sheet = figure.Figure(figsize=(F * width, K1 * height), dpi=100)  # of the cells; what lies around is saved too
        axes = sheet.add_axes((0, 0, 1, 1), xlim=(0, F), ylim=(K1, 0), xlabel="latent frame", ylabel="step")
        cells = axes.pcolormesh(levels, cmap=data_to_noise, vmin=0, vmax=1, edgecolors="white", snap=True)
        cells.set_linewidth(min(1, 6 * height))
        if width >= 0.36 and height >= 0.16:
            for (k, i), tau in np.ndenumerate(levels):
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
        bar = axes.inset_axes((1 + 0.3 / (F * width), 0, 0.16 / (F * width), 1))
        sheet.colorbar(cells, bar, ticks=(0, 1), format=lambda tau, _: "1 noise" if tau else "0 data")
        axes.set_title(title, loc="left", fontsize=14, pad=24, color="#222222")
        axes.text(0, -0.1 / height, "noise level of each latent frame, step by step")
        sheet.savefig(path, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def curves(
    title: str, metrics: Sequence[dict], panels: Sequence[Sequence[str]], best: int | None = None, points: int = 400
) -> str:
    """Charts over the steps of a training, side by side as one SVG; empty text if nothing was measured.

    metrics: the figures of each step, by name; panels: the names in each chart, which has a range of its own;
    best: a step to mark; points: a line of more is cut into so many equal stretches, and shows the mean of each.
    """
    from matplotlib import figure, style, ticker

    lines = [{name: line for name in panel if len(line := _line(metrics, name, points))} for panel in panels]
    lines = [panel for panel in lines if panel]
    if not lines:
        return ""
    with style.context(STYLE):
        sheet, svg = figure.Figure(figsize=(9.6, 2.6), layout="constrained"), io.StringIO()
        sheet.suptitle(title, x=0.01, ha="left", fontsize=11, color="#222222")
        for axes, panel in zip(sheet.subplots(1, len(lines), squeeze=False)[0], lines, strict=True):
            for (name, line), colour in zip(panel.items(), COLOURS, strict=False):
                axes.plot(*line.T, color=colour, label=name, gid=name)
            if best is not None:
                axes.axvline(best, color=GREY, linestyle=":", linewidth=1, label=f"best: step {best}")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))
            axes.grid(axis="y")
        sheet.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _line(metrics: Sequence[dict], name: str, points: int) -> np.ndarray:
    """(n, 2): step and figure of at most so many points; a lone one is there twice, so that it shows as a dot."""
    known = [(line["step"], line[name]) for line in metrics if math.isfinite(line.get(name, math.nan))]
    stretches = np.array_split(np.array(known * 2 if len(known) == 1 else known), points)
    return np.array([(stretch[-1, 0], stretch[:, 1].mean()) for stretch in stretches if len(stretch)])


def table(taus: Tensor) -> str:
    """τ (K+1,F) as text, steps down and frames across; a frame that is exactly clean shows a bare 0."""
    rows = [f"{k:>4} |" + "".join(f"{t:5.2f}" if t else "    0" for t in row) for k, row in enumerate(taus.tolist())]
    return "\n".join(["step |" + "".join(f"{i:>5}" for i in range(taus.shape[1])), *rows])
