"""What came of a training: its page `report.html`.

    python -m support.report runs/pusa-001     writes the page anew from the files of a run, finished or not

The page is one file without links to others: curves are SVG, pictures are inside it.
"""

import base64
import html
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support import cli, plots

_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ max-width: 100% }} svg {{ width: 100%; height: auto; overflow: visible }} h2 {{ margin-top: 2em }}
td {{ padding: 0 2em 0 0; vertical-align: top }} td:first-child {{ color: #777 }}
</style>
<body>
{body}
</body></html>
"""
# The paper's training (arXiv 2507.16116 and its published scripts). `cost.window_flops` counts 6.45e15 for a clip.
PAPER_GPUS = 8
PAPER_FLOPS = 900 * PAPER_GPUS * 6.45e15
PAPER_SPEED = 312e12 * 0.4  # FLOP/s of a GPU: an A100's peak in bf16, times the share that good trainers reach
_ON_PAPER_HARDWARE = (
    "Operations are those that PyTorch counts (support/cost.py): the transformer, forward and "
    "backward, without VAE, text encoder, validation and samples. The paper's hardware is 8 GPUs of 80 GB, here taken "
    "as A100s that keep up 40 % of their peak of 312 TFLOP/s in bf16; its training is 900 steps of 8 clips of 81 "
    "frames, 832x480, rank 512, on Wan2.1-T2V-14B with gradient checkpointing."
)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; one that was cut off while it was written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write(folder: Path | str) -> Path:
    """Write `report.html` from the other files in the folder of a run → its path. ValueError if there is no run."""
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder} holds no run: expected a folder with settings.json, such as runs/pusa-001")
    paths = (folder / "settings.json", folder / "facts.json")
    settings, facts = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {} for path in paths)
    metrics, skipped = read_metrics(folder), facts.pop("skipped", [])
    title = html.escape(f"{folder.resolve().name}: {'all weights' if settings.get('full') else 'a Pusa LoRA'}")
    parts = [f"<h1>{title}</h1>", *_curves(metrics)]
    strips = sorted(folder.glob("step-*.png"))
    strips = [*strips[:: math.ceil(len(strips) / 8) or 1], *folder.glob("filmstrip.png")]  # about 8 tell how it went
    for strip in strips:
        content = base64.b64encode(strip.read_bytes()).decode()
        parts.append(f"<h2>{strip.stem}</h2><img alt='{strip.stem}' src='data:image/png;base64,{content}'>")
    if metrics:
        parts += [_table("cost", _cost(settings, facts, metrics[-1])), f"<p>{_ON_PAPER_HARDWARE}</p>"]
    parts += [_table("facts", facts.items()), _table("clips left out", skipped), _table("settings", settings.items())]
    with cli.replacing(folder / "report.html") as temporary:
        temporary.write_text(_PAGE.format(title=title, body="\n".join(parts)), encoding="utf-8")
    return folder / "report.html"


def _curves(metrics: list[dict[str, float]]) -> list[str]:
    best = metrics[-1].get("best") if metrics else None
    return [
        plots.curves("training loss, and smoothed", metrics, [("loss", "smooth")]),
        plots.curves("validation: fixed clips, noise and τ", metrics, [("sync",), ("async",), ("clean",)], best),
        plots.curves("validation: error of the frame next to a clean one", metrics, [("copy",)]),
        plots.curves("learning rate", metrics, [("lr",)]),
    ]


def _cost(settings: dict, facts: dict, last: dict) -> list[tuple[str, str]]:
    """What this run took, and what it and the paper's training would take here and on the paper's hardware."""
    flops, seconds, paper = last["flops"], last["seconds"], PAPER_FLOPS
    there, here = PAPER_GPUS * PAPER_SPEED, flops / max(seconds, 1e-9)
    return [
        ("steps", f"{last['step']} of {settings['steps']}"),
        ("windows seen", str(last["step"] * settings["batch"])),
        ("operations", f"{flops:.3g} FLOP, {here:.3g} a second"),
        ("time", f"{cli.duration(seconds)} on {facts.get('device', 'this machine')}"),
        ("the same on the paper's hardware", cli.duration(flops / there)),
        ("the paper's training", f"{paper:.3g} FLOP, {paper / max(flops, 1):.3g} times this run"),
        ("the paper's training on its hardware", cli.duration(paper / there)),
        ("the paper's training here, at this run's speed", cli.duration(paper / max(here, 1))),
    ]


def _table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    cells = "\n".join(f"<tr><td>{html.escape(str(a))}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<h2>{title}</h2><table>{cells}</table>" if cells else ""


@dataclass(frozen=True)
class ReportConfig:
    run: str = cli.option("", "folder of a run of train.py", positional=True)


def main() -> None:
    print(write(cli.parse(ReportConfig, __doc__).run))


if __name__ == "__main__":
    cli.run(main)
