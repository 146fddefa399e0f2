"""Tasks that nothing was trained for: start-end, extension, completion, loops, key frames and text alone.

The paper shows such videos and gives no figure. Its one LoRA has seen clips whose frames are all noisy, each as much
as chance would have it, and no task. Here every task of `tasks.TASKS` that the world's truth can judge is made with
that LoRA and without, told each frame's level both times; and by the base told one level for all, which needs no
training either and confuses it less (see `vector.py`). Two things are asked: are the conditions still there (the last
pixel frame of each condition latent against the true one, in dB; a clean condition never moves, so only the VAE can
lose it), and are the shapes where the conditions say they must be (mean distance in pixels). Text alone is judged by
what the caption says, a loop by whether it ends as it begins. `transition` between the two ends of one clip is
`complete`, to the bit: one row for both.
"""

from functools import cache, partial
from pathlib import Path

from torch import Tensor

from paper.lab import Lab, Row, every, page
from paper.vector import SCALARS
from support import plots
from tasks import TASKS, pixel_frames
from toy import world
from toy.judge import DETERMINED, Judge, as_prompted, centroid_errors, psnr

BASE, PUSA, FLAT = "base", "seed-0", "base, told one τ"
MARKS = {BASE: (plots.COLOURS[1], "base"), PUSA: (plots.COLOURS[0], "with the LoRA"), FLAT: (plots.GREY, FLAT)}
JUDGED = {  # what is measured of each task
    **dict.fromkeys(("i2v", "start-end", "extend", "prepend", "complete", "keyframes"), ("error", "kept")),
    "loop": ("ends alike",), "t2v": ("as prompted",),
}  # fmt: skip
LABELS = {"complete": "complete (transition)"}
LEAST = 28.0  # dB; the VAE alone keeps 32
ACCURACY = 0.98  # share of the clips as prompted that T2V must keep


def measure(lab: Lab) -> None:
    for network in (BASE, PUSA):
        for task, figures in lab.few(tuple(JUDGED.items())):
            judged = cache(partial(_judged, lab, network, task))  # a clip is made once and gives every figure
            same = f"preservation: as prompted, {int(network != BASE)}" if task == "t2v" else ""
            for figure in figures:
                lab.figure(f"{task}, {network}: {figure}", lambda seed, j=judged, f=figure: j(seed)[f], same)
    for task in judged_by_error(lab):
        same = f"vector: {task}, {BASE}: {SCALARS[0]}"
        lab.figure(f"{task}, {FLAT}: error", partial(_told_one, lab, task), same)


def _told_one(lab: Lab, task: str, seed: int) -> Tensor:
    return lab.error(lab.network(BASE), task, seed, context_noise=1.0)


def judged_by_error(lab: Lab) -> list[str]:
    """The tasks whose future is determined."""
    return [task for task, figures in lab.few(tuple(JUDGED.items())) if "error" in figures]


def _judged(lab: Lab, network: str, task: str, seed: int) -> dict[str, Tensor]:
    """The figures of a task, for each scene."""
    videos, truth, scenes = lab.judge.videos(lab.network(network), task, seed), lab.judge.truth, lab.judge.scenes
    if task == "t2v":
        return {"as prompted": 100.0 * as_prompted(scenes, world.measure(videos))}
    if task == "loop":
        return {"ends alike": psnr(videos[:, :, 0], videos[:, :, -1])}
    given = [pixel_frames(position + 1) - 1 for position in given_latents(task)]
    errors = centroid_errors(scenes, world.measure(videos), DETERMINED[task])
    return {"error": errors.mean(1), "kept": psnr(videos[:, :, given], truth[:, :, given])}


def given_latents(task: str) -> list[int]:
    """The latent frames of the conditions."""
    return [position for slot in Judge.plan(task).slots for position in slot.positions]


def draw(lab: Lab, path: Path | str) -> None:
    """What is given of each task, and how far its shapes are from where they must be, without the LoRA and with it."""
    shown = judged_by_error(lab)
    told, flat = (sum(map(bool, nearer(lab, other).values())) for other in (BASE, FLAT))
    title = f"One LoRA beats the base in {told} of {len(shown)} tasks, in {flat} if that is told one τ for all frames"
    with page(path, title, (1, 2.4), 3.8) as (given, errors):
        for row, task in enumerate(shown):
            filled, F = given_latents(task), len(Judge.plan(task).m)
            given.barh(
                [row] * F, 0.86, 0.6, range(F), color=["#1b998b" if i in filled else "#e4e4ea" for i in range(F)]
            )
            for network, y in ((BASE, row), (PUSA, row), (FLAT, row + 0.3)):
                (colour, label), name = MARKS[network], f"{task}, {network}: error"
                each, (edge, side, where) = lab.each(name), (min, -8, "right") if network == PUSA else (max, 8, "left")
                errors.scatter(each, [y] * len(each), s=28, color=colour, label=None if row else label, zorder=2)
                at, beside = (edge(each), y), {"textcoords": "offset points", "ha": where, "va": "center_baseline"}
                errors.annotate(f"{lab.middle(name):.1f}", at, (side, 0), color=colour, **beside)
            ends = [lab.middle(f"{task}, {network}: error") for network in (BASE, PUSA)]
            errors.plot(ends, [row, row], color="#cccccc", linewidth=3, zorder=1)
        given.set_yticks(range(len(shown)), [LABELS.get(task, task) for task in shown])
        given.set(xticks=[], xlabel="latent frames:\ngreen given, grey made")
        errors.set(yticks=[], xlabel="distance of the shapes from where they must be, px\n(a dot for each seed)")
        far = errors.get_xlim()[1]
        errors.set_xlim(-0.08 * far, 1.1 * far)
        errors.grid(axis="x")
        errors.legend(loc="lower right")
        for axes in (given, errors):
            axes.set_ylim(len(shown) - 0.5, -0.5)


def nearer(lab: Lab, other: str) -> dict[str, bool | None]:
    """For each task whether its shapes are nearer to their places with the LoRA than by another network."""
    return {t: lab.below(f"{t}, {PUSA}: error", f"{t}, {other}: error") for t in judged_by_error(lab)}


def rows(lab: Lab) -> list[Row]:
    """Two rows for all tasks, then one for each task."""
    found = []
    for task, figures in lab.few(tuple(JUDGED.items())):
        before, after = (f"{task}, {network}: {figures[0]}" for network in (BASE, PUSA))
        if "error" in figures:
            kept = f"{task}, {PUSA}: kept"
            ours = f"{lab.told(before)} → {lab.told(after)}; conditions kept at {lab.told(kept, 'dB')}"
            holds = lab.below(after, before) if lab.middle(kept) > LEAST else False
        elif task == "loop":
            ours = f"ends alike at {lab.told(before, 'dB')} → {lab.told(after, 'dB')}"
            holds = lab.middle(after) > LEAST
        else:
            ours = f"{lab.told(before, '%', median=False)} → {lab.told(after, '%', median=False)} as prompted"
            holds = lab.below(before, after, median=False, factor=1 / ACCURACY)
        found.append(Row(f"{LABELS.get(task, task)}: given {TASKS[task].given}", "examples, no figure", ours, holds))
    good = [row.claim.partition(":")[0] for row in found if row.holds]
    ours = f"good in {len(good)} of {len(found)}: {', '.join(good) or 'none'}"
    whole = [Row("tasks that nothing was trained for", "examples, no figure", ours, every(row.holds for row in found))]
    told = (f"{task} {lab.told(f'{task}, {FLAT}: error')}" for task in judged_by_error(lab))
    ours, holds = f"{FLAT} for all: {', '.join(told)}", every(nearer(lab, FLAT).values())
    whole.append(Row("the LoRA is nearer than the base that is told one level for all", "not asked", ours, holds))
    return [*whole, *found]
