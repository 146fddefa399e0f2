"""What came of a training: its page `report.html`.

    python -m support.report runs/pusa     writes the page anew from the files of a run, finished or not

The page is one file without links to others: curves are SVG, pictures are inside it.
"""

import base64
import html
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support import cli, cost

COLOURS = ("#1f5fa8", "#e87722", "#2a9d6f", "#8a4fbf")


def write(folder: Path | str) -> Path:
    """Write `report.html` of a run from the other files in its folder, and return its path."""
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder} holds no run: expected the folder of one, with settings.json, such as runs/pusa")
    settings, facts = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (folder / "settings.json", folder / "facts.json")
    )
    metrics = read_metrics(folder)
    title = f"{folder.resolve().name}: {'all weights' if settings.get('full') else 'a Pusa LoRA'}"
    parts = [f"<h1>{html.escape(title)}</h1>"]

    def series(name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in metrics if name in line]

    parts += [
        curve("training loss, and smoothed", {"loss": series("loss"), "smooth": series("smooth")}),
        curve("validation: fixed clips, noise and τ", {name: series(name) for name in ("sync", "async", "clean")}),
        curve("validation: error of the frame next to a clean one", {"copy": series("copy")}),
        curve("learning rate", {"lr": series("lr")}),
    ]
    strips = sorted(folder.glob("step-*.png"))
    strips = [*strips[:: math.ceil(len(strips) / 8) or 1], *folder.glob("filmstrip.png")]  # about 8 tell how it went
    for strip in strips:
        content = base64.b64encode(strip.read_bytes()).decode()
        parts.append(f"<h2>{strip.stem}</h2><img alt='{strip.stem}' src='data:image/png;base64,{content}'>")
    if metrics:
        parts += ["<h2>cost</h2>", _table(_cost(settings, facts, metrics[-1])), f"<p>{_ON_PAPER_HARDWARE}</p>"]
    skipped = facts.pop("skipped", [])
    parts += ["<h2>facts</h2>", _table(facts.items())]
    if skipped:
        parts += ["<h2>clips left out</h2>", _table(skipped)]
    parts += ["<h2>settings</h2>", _table(settings.items())]
    path = folder / "report.html"
    with cli.replacing(path) as temporary:
        temporary.write_text(_PAGE.format(title=html.escape(title), body="\n".join(parts)), encoding="utf-8")
    return path


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; one that was cut off while it was written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100% }} svg {{ width: 100%; height: auto }} h2 {{ margin-top: 2em }}
td {{ padding: 0 2em 0 0; vertical-align: top }} td:first-child {{ color: #777 }}
</style>
<body>
{body}
</body></html>
"""
_ON_PAPER_HARDWARE = (
    "Operations are counted from the model's sizes (cost.window_flops): the transformer's blocks, forward and "
    "backward, without VAE, text encoder, validation and samples. The paper's hardware is 8 GPUs of 80 GB, here taken "
    "as A100s that keep up 40 % of their peak of 312 TFLOP/s in bf16; its training is 900 steps of 8 clips of 81 "
    "frames, 832x480, rank 512, on Wan2.1-T2V-14B with gradient checkpointing."
)


def _cost(settings: dict, facts: dict, last: dict) -> list[tuple[str, str]]:
    """What was spent, and what the same and the paper's training would take here and there."""
    flops, seconds = last["flops"], last["seconds"]
    paper = cost.PAPER_WINDOWS * cost.window_flops(cost.PAPER_MODEL, cost.PAPER_SHAPE, cost.PAPER_RANK, recomputed=True)
    there, here = cost.PAPER_GPUS * cost.PAPER_SPEED, flops / max(seconds, 1e-9)
    return [
        ("steps", f"{last['step']} of {settings['steps']}"),
        ("windows seen", str(last["step"] * settings["batch"])),
        ("operations", f"{flops:.3g} FLOP, {here:.3g} a second"),
        ("time", f"{_duration(seconds)} on {facts.get('device', 'this machine')}"),
        ("the same on the paper's hardware", _duration(flops / there)),
        ("the paper's training", f"{paper:.3g} FLOP, {paper / max(flops, 1):.3g} times this run"),
        ("the paper's training on its hardware", f"{_duration(paper / there)}"),
        ("the paper's training here, at this run's speed", _duration(paper / max(here, 1))),
    ]


def _duration(seconds: float) -> str:
    for name, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} seconds"


def _table(rows: Iterable[tuple[str, object]]) -> str:
    cells = "\n".join(f"<tr><td>{html.escape(str(a))}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


def curve(title: str, series: dict[str, list[tuple[float, float]]], points: int = 400) -> str:
    """A line chart as SVG: for each name its (x, y), of which long series show the means of equal stretches.

    The vertical axis spans what is shown; empty series are left out, and without any the chart is empty text.
    """
    series = {name: _thinned(line, points) for name, line in series.items()}
    series = {name: line for name, line in series.items() if line}
    if not series:
        return ""
    width, height, left, top, bottom = 900, 260, 60, 30, 30
    xs, ys = ([point[axis] for line in series.values() for point in line] for axis in (0, 1))
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    across, up = (width - left - 10) / ((x1 - x0) or 1), (height - top - bottom) / ((y1 - y0) or 1)

    def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "#777") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(words)}</text>'

    drawn, at = [text(left, 16, title, colour="#222")], width - 10
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        y = height - bottom - share * (height - top - bottom)
        drawn.append(f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#ddd"/>')
        drawn.append(text(left - 6, y + 4, f"{y0 + share * (y1 - y0):.3g}", "end"))
        drawn.append(text(left + share * (width - left - 10), height - 10, f"{x0 + share * (x1 - x0):.0f}", anchor))
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        path = "L".join(f"{left + (x - x0) * across:.1f} {height - bottom - (y - y0) * up:.1f}" for x, y in line)
        drawn.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        drawn.append(text(at, 16, name, "end", colour))
        at -= 70
    return f'<svg viewBox="0 0 {width} {height}" font-size="12">{"".join(drawn)}</svg>'


def _thinned(line: list[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    line = [(x, y) for x, y in line if math.isfinite(y)]
    length = math.ceil(len(line) / points) or 1
    stretches = [line[i : i + length] for i in range(0, len(line), length)]
    return [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]


@dataclass(frozen=True)
class ReportConfig:
    run: str = cli.option("runs/pusa", "folder of a run of train.py", positional=True, nargs="?")


def main() -> None:
    print(write(cli.parse(ReportConfig, __doc__).run))


if __name__ == "__main__":
    cli.run(main)
