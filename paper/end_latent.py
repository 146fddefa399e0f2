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
FIGURES = {"kept": "last frame, dB", "flash": "brightness off at the end,\nof 255", "error": "error in the middle, px"}


def measure(lab: Lab) -> None:
    pusa = partial(lab.network, "embedded")
    for task in TASKS:
        for end in ENDS:
            judged = cache(partial(_judged, lab, pusa, task, end))
            for figure in FIGURES if task == "start-end" else ("kept", "flash"):
                lab.figure(f"{task}, {end}: {figure}", lambda seed, j=judged, f=figure: j(seed)[f])


def laid_out(task: str, end: str, lab: Lab) -> tasks.Plan:
    """The task's plan, with images further on encoded in a group, or alone."""
    plan = lab.judge.plan(task)
    return plan if end == "group" else plan._replace(slots=[slot._replace(frames=1, drop=0) for slot in plan.slots])


def _judged(lab: Lab, network: Callable[[], Wan], task: str, end: str, seed: int) -> dict[str, Tensor]:
    videos = lab.judge.videos(network(), task, seed, plan=laid_out(task, end, lab))
    image = lab.judge.truth[:, :, -1:] if task == "start-end" else lab.judge.truth[:, :, :1]
    flash = 127.5 * (videos[:, :, -4:].mean((1, 3, 4)) - image.mean((1, 3, 4))).abs().amax(1)
    errors = centroid_errors(lab.judge.scenes, world.measure(videos), DETERMINED["start-end"]).mean(1)
    return {"kept": psnr(videos[:, :, -1:], image), "flash": flash, "error": errors}


def better_in_a_group(lab: Lab, task: str) -> bool | None:
    """Whether the task's end image is kept better in a group."""
    return lab.below(f"{task}, lone: kept", f"{task}, group: kept")


def draw(lab: Lab, path: Path) -> None:
    kept = [better_in_a_group(lab, task) for task in TASKS]
    title = f"An end image {'is' if all(kept) else 'is not always'} kept better in a group of still frames than alone"
    cases = [f"{task}, {end}" for task in TASKS for end in ENDS]
    with page(path, title, (1,) * len(FIGURES), 2.6) as panels:
        for axes, (figure, label) in zip(panels, FIGURES.items(), strict=True):
            for row, case in enumerate(cases):
                if (name := f"{case}: {figure}") in lab.figures:
                    colour = plots.COLOURS[row % len(ENDS)]
                    axes.barh(row, lab.middle(name), xerr=lab.spread(name), color=colour)
            axes.set_yticks(range(len(cases)), cases if axes is panels[0] else [])
            axes.set(ylim=(len(cases) - 0.5, -0.5), xlabel=label)


def rows(lab: Lab) -> list[Row]:
    found = []
    for task in TASKS:
        told = []
        for end in ENDS:
            kept, flash = (lab.told(f"{task}, {end}: {f}", unit) for f, unit in (("kept", "dB"), ("flash", "")))
            told.append(f"{end} {kept}, brightness off by {flash.strip()}")
        claim, short = f"{task}: a group keeps the end image better", [told[1].split(",")[0], told[0].split(",")[0]]
        found.append(Row(claim, "", "; ".join(told), better_in_a_group(lab, task), ", ".join(short)))
    return found
