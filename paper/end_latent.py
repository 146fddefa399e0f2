"""Beyond the paper: an end image as the last group of still frames, or alone, as the published code encodes it.

The decoder makes four pixel frames of every latent but the first. `group` encodes five still frames and drops the first
latent; `lone` encodes the image by itself, like the first frame of a video, and places that where the decoder expects
four frames. Measured with the embedded LoRA, for `start-end` and `loop`: how well the last frame shows the image, how
far the brightness of the last four frames is from the image's, and where shapes are in the middle of `start-end`.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from torch import Tensor

import tasks
from model import Wan
from paper.lab import Lab, Row, page
from support import plots
from toy import world
from toy.judge import DETERMINED, centroid_errors, psnr

TASKS, ENDS = ("start-end", "loop"), ("group", "lone")
FIGURES = {"kept": "last frame, dB", "flash": "brightness at the end, 0 to 255", "error": "middle, px"}


def measure(lab: Lab) -> None:
    pusa = cache(lab.embedded)
    for task in TASKS:
        for end in ENDS:
            judged = cache(partial(_judged, lab, pusa, task, end))
            for figure in FIGURES if task == "start-end" else ("kept", "flash"):
                lab.figure(f"{task}, {end}: {figure}", lambda seed, j=judged, f=figure: j(seed)[f])


def laid_out(task: str, end: str, lab: Lab) -> tasks.Plan:
    """The task's plan, with images further on encoded in a group, or alone."""
    plan = lab.judge.plan(task)
    return plan if end == "group" else plan._replace(given=[slot._replace(frames=1, drop=0) for slot in plan.given])


def _judged(lab: Lab, network: Callable[[], Wan], task: str, end: str, seed: int) -> dict[str, Tensor]:
    videos = lab.judge.videos(network(), task, seed, plan=laid_out(task, end, lab))
    image = lab.judge.truth[:, :, -1:] if task == "start-end" else lab.judge.truth[:, :, :1]
    flash = 127.5 * (videos[:, :, -4:].mean((1, 3, 4)) - image.mean((1, 3, 4))).abs().amax(1)
    errors = centroid_errors(lab.judge.scenes, world.measure(videos), DETERMINED["start-end"]).mean(1)
    return {"kept": psnr(videos[:, :, -1:], image), "flash": flash, "error": errors}


def draw(lab: Lab, path: Path) -> None:
    with page(path, "An end image encoded in a group, or alone", (1,) * len(FIGURES)) as panels:
        for axes, (figure, label) in zip(panels, FIGURES.items(), strict=True):
            names = [f"{task}, {end}: {figure}" for task in TASKS for end in ENDS]
            names = [name for name in names if name in lab.figures]
            middles, spreads = ([told(name) for name in names] for told in (lab.middle, lab.spread))
            axes.barh(range(len(names)), middles, xerr=spreads, color=plots.COLOURS[0])
            axes.set_yticks(range(len(names)), [name.partition(":")[0] for name in names])
            axes.invert_yaxis()
            axes.set_xlabel(label)


def rows(lab: Lab) -> list[Row]:
    found = []
    for task in TASKS:
        told = []
        for end in ENDS:
            kept, flash = (lab.told(f"{task}, {end}: {f}", unit) for f, unit in (("kept", "dB"), ("flash", "")))
            told.append(f"{end} {kept}, brightness off by {flash.strip()}")
        holds = lab.below(f"{task}, lone: kept", f"{task}, group: kept")
        found.append(Row(f"{task}: a group keeps the end image better", "", "; ".join(told), holds))
    return found
