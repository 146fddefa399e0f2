"""Ablation: how each setting of training and sampling moves the error, one at a time.

The paper finds rank 512 and strength 1.7 best ("alpha" there), says that a higher rank is better, that training is at
its best after about 900 steps, and that 10 steps of sampling suffice; it trains with p_async = 1 and gives its image
with noise 0.2 (m) in its examples. Here each of these is varied while all others stay: rank 32, strength 1, 800 steps
of training, 10 of sampling, p_async 1, m = 0. Every point is the error in pixels of image-to-video, where nothing else
is said: how far the shapes are from where the first frame and the prompt put them.

How to read it: the dot is the best value here, the dotted line the paper's. Ranks and lengths of training were each
trained once, so their spread is that of sampling alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

import tasks
from paper.lab import BUDGETS, STEPS, Lab, Row
from support import cli, plots
from toy import world
from toy.judge import as_prompted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANKS, STRENGTHS = (2, 8, 32, 128), (0.5, 1.0, 1.4, 1.7, 2.5)
SAMPLING, ASYNC, NOISE = (1, 2, 5, 10, 20, 50), (0, 25, 50, 75, 100), (0.0, 0.1, 0.2, 0.4)
TITLE = "Where the error is lowest, setting by setting (dot), and what the paper chose (dotted)"


def name(rank: int = 32, strength: float = 1.0) -> str:
    return f"i2v: rank {rank}, strength {strength:g}"


def level(task: str, percent: int | str) -> str:
    """The figure of a task with the LoRA that was trained at p_async = percent / 100; what is default has one name."""
    return name() if (task, percent) == ("i2v", 100) else f"{task}: p_async {percent}"


def trained(steps: int) -> str:
    return name() if steps == STEPS else f"i2v: {steps} steps of training"


def sampled(steps: int) -> str:
    return name() if steps == 10 else f"i2v: {steps} steps of sampling"


def noised(m: float) -> str:
    return name() if m == 0 else f"i2v: m = {m:g}"


def measure(lab: Lab) -> None:
    """At most 150 evaluations of all scenes; the most telling come first."""

    def i2v(figure: str, lora: str = "seed-0", strength: float = 1.0, **settings) -> None:
        lab.figure(figure, lambda seed: lab.error(lab.network(lora, strength), "i2v", seed, **settings))

    lab.figure("i2v: base", lambda seed: lab.error(lab.network("base"), "i2v", seed))
    for strength in STRENGTHS:
        i2v(name(32, strength), strength=strength)
    for percent in lab.few(ASYNC):
        for task in ("i2v", "extend"):
            lora = "seed-0" if percent == 100 else f"async-{percent}"
            lab.figure(level(task, percent), lambda seed, t=task, lora=lora: lab.error(lab.network(lora), t, seed))
    for steps in lab.few(SAMPLING[:-1]):
        i2v(sampled(steps), steps=steps)
    for steps in lab.few(BUDGETS):
        i2v(trained(steps), "seed-0" if steps == STEPS else f"steps-{steps}")
    for percent in lab.few((0, 50, 100)):
        lora = "seed-0" if percent == 100 else f"async-{percent}"
        lab.figure(level("t2v", percent), lambda seed, lora=lora: as_told(lab, lora, seed))
    for m in lab.few(NOISE):
        multipliers = lab.judge.plan("i2v").m
        multipliers[0] = m
        i2v(noised(m), taus=tasks.tau_schedule(multipliers, lab.judge.preset.steps, lab.judge.preset.shift))
    for task in ("i2v", "extend"):
        lab.figure(level(task, "two levels"), lambda seed, t=task: lab.error(lab.network("two-levels"), t, seed))
    for rank in lab.few(RANKS):
        for strength in lab.few(STRENGTHS) if rank != 32 else ():
            i2v(name(rank, strength), f"rank-{rank}", strength)
    i2v(sampled(SAMPLING[-1]), steps=SAMPLING[-1])


def as_told(lab: Lab, lora: str, seed: int) -> Tensor:
    """Of every scene, 100 if text-to-video shows just what the prompt says, else 0."""
    return 100.0 * as_prompted(lab.judge.scenes, world.measure(lab.judge.videos(lab.network(lora), "t2v", seed)))


def chosen(lab: Lab, figures: dict[float, str]) -> dict[float, str]:
    """The values of a setting, with the names of their figures, that have been measured."""
    return {value: figure for value, figure in figures.items() if figure in lab.figures}


def best(lab: Lab, figures: dict[float, str]) -> float:
    """The value of a setting that has the lowest error."""
    known = chosen(lab, figures)
    return min(known, key=lambda value: lab.middle(known[value]))


def listed(lab: Lab, figures: dict[float, str]) -> str:
    """The error at every value of a setting, in words."""
    return ", ".join(f"{value:g}: {lab.middle(figure):.2f}" for value, figure in chosen(lab, figures).items()) + " px"


def rows(lab: Lab) -> list[Row]:
    strong, known = {s: name(32, s) for s in STRENGTHS if s > 1}, (0, 50, 100)
    ranks = {rank: name(rank, best(lab, {s: name(rank, s) for s in STRENGTHS})) for rank in RANKS}
    noises = {m: noised(m) for m in NOISE}
    found = [
        Row("10 steps of sampling suffice: the error is within 5 % of that after 50", "10 steps",
            listed(lab, {steps: sampled(steps) for steps in SAMPLING}),
            lab.middle(name()) <= 1.05 * lab.middle(sampled(50)) + lab.spread(sampled(50))),
        Row("a strength above 1 is best", "1.7", listed(lab, {s: name(32, s) for s in STRENGTHS}),
            lab.below(strong[best(lab, strong)], name())),
        Row("a higher rank is better (each at its best strength)", "512, the highest", listed(lab, ranks),
            lab.below(ranks[128], ranks[2])),
        Row("longer training does not help", "best after 900 steps",
            listed(lab, {steps: trained(steps) for steps in BUDGETS}),
            not lab.below(trained(BUDGETS[-1]), trained(STEPS))),
    ]  # fmt: skip
    for task in ("i2v", "extend"):
        levels, two = {p / 100: level(task, p) for p in ASYNC}, lab.middle(level(task, "two levels"))
        found.append(Row(
            f"{task}: a level for each frame trains better than one for all", "p_async = 1",
            f"{listed(lab, levels)}; two levels for the frames of a clip: {two:.2f} px",
            lab.below(level(task, 100), level(task, 0))))  # fmt: skip
    accuracy = [f"{p / 100:g}: {lab.told(level('t2v', p), '%', median=False)}" for p in lab.few(known)]
    found.append(Row("T2V does not suffer from a level for each frame", "kept", ", ".join(accuracy),
                     not lab.below(level("t2v", 100), level("t2v", 0), median=False)))  # fmt: skip
    noisy = noises[best(lab, {m: noised(m) for m in NOISE if m})]
    found.append(Row("noise on the given image helps", "m = 0.2", listed(lab, noises), lab.below(noisy, noised(0))))
    return found


def draw(lab: Lab, path: Path) -> None:
    from matplotlib import figure, style

    panels = [
        ("sampling steps", 10, {"": {steps: sampled(steps) for steps in SAMPLING}}),
        ("steps of training", 900, {"": {steps: trained(steps) for steps in BUDGETS}}),
        ("LoRA strength (0: the base)", 1.7, {
            f"rank {rank}": {0.0: "i2v: base"} | {s: name(rank, s) for s in STRENGTHS} for rank in RANKS}),
        ("p_async", 1, {"": {p / 100: level("i2v", p) for p in ASYNC}}),
        ("p_async, error of extend", 1, {"": {p / 100: level("extend", p) for p in ASYNC}}),
        ("noise m on the given image", 0.2, {"": {m: noised(m) for m in NOISE}}),
    ]  # fmt: skip
    with style.context(plots.STYLE):
        sheet = figure.Figure(figsize=(8, 5.4), dpi=100, layout="constrained")
        sheet.suptitle(TITLE, x=0.01, ha="left", fontsize=12, color="#222222")
        for axes, (label, paper, curves) in zip(sheet.subplots(2, 3).flat, panels, strict=True):
            panel(axes, lab, paper, curves)
            axes.set_xlabel(label)
        sheet.supylabel("error, px", fontsize=9)
        with cli.replacing(path) as temporary:
            sheet.savefig(temporary, metadata={"Software": None})


def panel(axes: "Axes", lab: Lab, paper: float, curves: dict[str, dict[float, str]]) -> None:
    """Curves over the values of one setting, which are evenly spaced, whatever they are."""
    values = sorted({value for curve in curves.values() for value in chosen(lab, curve)})
    for (label, curve), colour in zip(curves.items(), plots.COLOURS, strict=False):
        known = chosen(lab, curve)
        at, errors = [values.index(value) for value in known], [lab.middle(figure) for figure in known.values()]
        spreads = [lab.spread(figure) for figure in known.values()]
        axes.errorbar(at, errors, spreads, color=colour, label=label or None, linewidth=1.5)
        lowest = min(range(len(errors)), key=errors.__getitem__)
        axes.plot(at[lowest], errors[lowest], "o", color=colour, markersize=6)
    axes.axvline(np.interp(paper, values, range(len(values))), color=plots.GREY, linestyle=":")
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    if len(curves) > 1:
        axes.legend()
