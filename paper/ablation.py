"""Ablation: how each setting of training and sampling moves the error, one at a time.

The paper finds rank 512 and strength 1.7 best ("alpha" there), says that a higher rank is better, that training is at
its best after about 900 steps, and that 10 steps of sampling suffice; it trains with p_async = 1 and gives its image
with noise 0.2 (m) in its examples. Here each of these is varied while all others stay as they are in `Run`, with rank
32, 800 steps of training and p_async 1. Every point is the error in pixels of image-to-video, where nothing else is
said: how far the shapes are from where the first frame and the prompt put them.

How to read it: the dot is the best value here, the dotted line the paper's. Ranks and lengths of training were each
trained once, so their spread is that of sampling alone; how far three seeds of one training are apart is told, too.
"""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

import tasks
from paper.efficiency import PUSA
from paper.lab import BUDGETS, STEPS, Lab, Row, every, sheet
from support import plots
from toy import world
from toy.judge import as_prompted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRENGTHS, RANKS = (0.5, 1.0, 1.4, 1.7, 2.5), (4, 128)
TASKS = "i2v", "extend"  # by which trainings are compared
TITLE = "Where the error is lowest, setting by setting (dot), and what the paper chose (dotted)"


class Run(NamedTuple):
    """How clips are made; what is not varied has the defaults."""

    task: str = "i2v"
    lora: str = "seed-0"
    strength: float = 1.0
    steps: int = 10
    m: float = 0.0  # of the conditions
    context_noise: float = 0.0  # 1: the network is told one τ for all

    @property
    def name(self) -> str:
        told = ", told one τ" if self.context_noise == 1 else ""
        return f"{self.task}, {self.lora}, strength {self.strength:g}, {self.steps} steps, m = {self.m:g}{told}"


Curve = dict[float, Run]  # by the value that is varied


def curves(lab: Lab) -> dict[str, Curve]:
    """All that is measured, the most telling first; curves share what they can."""
    few, asynchronous = lab.few, {p / 100: "seed-0" if p == 100 else f"async-{p}" for p in (0, 50, 100)}
    flat = {"lora": "async-0", "context_noise": 1.0}
    return {
        "rank 32": {0.0: Run(lora="base", strength=0.0)} | {s: Run(strength=s) for s in STRENGTHS},
        "p_async": {p: Run(lora=asynchronous[p]) for p in few(list(asynchronous))},
        "p_async, extend": {p: Run("extend", asynchronous[p]) for p in few(list(asynchronous))},
        "sampling": {k: Run(steps=k) for k in few((1, 2, 5, 10, 20, 50))},
        "training": {n: Run(lora="seed-0" if n == STEPS else f"steps-{n}") for n in few(BUDGETS)},
        "p_async, t2v": {p: Run("t2v", asynchronous[p]) for p in few(list(asynchronous))},
        "noise": {m: Run(m=m) for m in few((0.0, 0.1, 0.2, 0.4))},
        "two levels": {n: Run(task, "two-levels") for n, task in enumerate(TASKS)},
        "p_async 0, told one τ": {n: Run(task, **flat) for n, task in enumerate(TASKS)},
        **{f"seeds, {task}": {n: Run(task, f"seed-{n}") for n in few((0, 1, 2))} for task in TASKS},
        **{f"rank {r}": {s: Run(lora=f"rank-{r}", strength=s) for s in few(STRENGTHS)} for r in few(RANKS)},
    }


def measure(lab: Lab) -> None:
    for curve in curves(lab).values():
        for run in curve.values():
            lab.figure(run.name, partial(evaluate, lab, run), same(run))


def same(run: Run) -> str:
    """The figure of another claim that is the run's, if one is; see `Lab.figure`."""
    if run not in (Run(run.task, run.lora), Run(lora="base", strength=0.0)):
        return ""
    if run.task == "t2v":
        return "preservation: as prompted, 1" if run.lora == "seed-0" else ""
    steps = run.lora.removeprefix("steps-")
    if run.task == "i2v" and run.lora in ("seed-1", "seed-2"):
        return f"efficiency: {PUSA}, {STEPS} steps, {run.lora.replace('-', ' ')}"
    usual = f"zero_shot: {run.task}, {run.lora}: error"
    return usual if steps == run.lora else f"efficiency: {PUSA}, {steps} steps"


def evaluate(lab: Lab, run: Run, seed: int) -> Tensor:
    """The error of every scene in pixels; of text-to-video, 100 where a clip is just as the prompt says, else 0."""
    network, m = lab.network(run.lora, run.strength), lab.judge.plan(run.task).m
    taus = tasks.tau_schedule(m.clamp(min=run.m), run.steps, lab.judge.preset.shift)
    if run.task != "t2v":
        return lab.error(network, run.task, seed, taus=taus, context_noise=run.context_noise)
    return 100.0 * as_prompted(lab.judge.scenes, world.measure(lab.judge.videos(network, "t2v", seed, taus)))


def best(lab: Lab, curve: Curve) -> Run:
    """The run with the lowest error."""
    return min(curve.values(), key=lambda run: lab.middle(run.name))


def listed(lab: Lab, curve: Curve) -> str:
    """The errors of a curve in words."""
    return ", ".join(f"{value:g}: {lab.middle(run.name):.2f}" for value, run in curve.items()) + " px"


def rows(lab: Lab) -> list[Row]:
    all_curves, usual = curves(lab), Run()
    strengths, sampling, training, noise = (all_curves[name] for name in ("rank 32", "sampling", "training", "noise"))
    enough, strong = sampling[50].name, best(lab, {s: run for s, run in strengths.items() if s > 1})
    by_rank = {rank: all_curves[f"rank {rank}"] for rank in sorted((32, *lab.few(RANKS)))}
    ranks = {rank: best(lab, {s: run for s, run in curve.items() if s}) for rank, curve in by_rank.items()}
    found = [
        Row("10 steps of sampling suffice: the error is within 5 % of that after 50", "10 steps",
            listed(lab, sampling), lab.below(usual.name, enough, factor=1.05)),
        Row("a strength above 1 is better than 1", "1.7", listed(lab, strengths), lab.below(strong.name, usual.name)),
        Row("a higher rank is better (each at its best strength)", "512, the highest", listed(lab, ranks),
            every(lab.below(high.name, low.name) for low, high in pairwise(ranks.values()))),
        Row("twice as long a training is not better by more than 5 %", "best after 900 steps", listed(lab, training),
            lab.below(usual.name, training[BUDGETS[-1]].name, factor=1.05)),
    ]  # fmt: skip
    for n, (task, name) in enumerate(zip(TASKS, ("p_async", "p_async, extend"), strict=True)):
        curve, two = all_curves[name], all_curves["two levels"][n].name
        flat = all_curves["p_async 0, told one τ"][n].name
        seeds = ", ".join(f"{lab.middle(run.name):.2f}" for run in all_curves[f"seeds, {task}"].values())
        ours = (f"{listed(lab, curve)}; 0 told one τ for all: {lab.told(flat)}; two levels for a clip's frames: "
                f"{lab.told(two)}; p_async 1 by seed: {seeds} px")  # fmt: skip
        better = every(lab.below(curve[1].name, other) for other in (curve[0].name, flat))
        found.append(Row(f"{task}: a level for each frame trains better than one for all", "p_async = 1", ours, better))
    kept = all_curves["p_async, t2v"]
    ours = ", ".join(f"{value:g}: {lab.told(run.name, '%', median=False)}" for value, run in kept.items())
    holds = lab.below(kept[0].name, kept[1].name, median=False, factor=1.02)
    found.append(Row("T2V loses no more than 2 % by a level for each frame", "kept", ours, holds))
    noisy = best(lab, {m: run for m, run in noise.items() if m > 0})
    better = lab.below(noisy.name, usual.name)
    return [*found, Row("noise on the given image helps", "m = 0.2", listed(lab, noise), better)]


def draw(lab: Lab, path: Path) -> None:
    known = curves(lab)
    ranks = {name: curve for name, curve in known.items() if name.startswith("rank")}
    panels = (
        ("sampling steps", 10, {"": known["sampling"]}), ("steps of training", 900, {"": known["training"]}),
        ("LoRA strength (0: the base)", 1.7, dict(sorted(ranks.items(), key=lambda item: int(item[0][5:])))),
        ("p_async", 1, {"": known["p_async"]}), ("p_async, error of extend", 1, {"": known["p_async, extend"]}),
        ("noise m on the given image", 0.2, {"": known["noise"]}),
    )  # fmt: skip
    with sheet(path, TITLE, 5.4) as drawn:
        grid = drawn.subplots(2, 3)
        for axes, (label, paper, shown) in zip(grid.flat, panels, strict=True):
            panel(axes, lab, paper, shown)
            axes.set_xlabel(label)
        for axes in grid[:, 0]:
            axes.set_ylabel("error, px")


def panel(axes: "Axes", lab: Lab, paper: float, shown: dict[str, Curve]) -> None:
    """Curves over the values of one setting, which are evenly spaced, whatever they are, and the paper's value."""
    values = sorted({value for curve in shown.values() for value in curve})
    for (label, curve), colour in zip(shown.items(), plots.COLOURS, strict=False):
        errors, spreads = ([of(run.name) for run in curve.values()] for of in (lab.middle, lab.spread))
        at, lowest = [values.index(value) for value in curve], errors.index(min(errors))
        axes.errorbar(at, errors, spreads, color=colour, label=label or None)
        axes.plot(at[lowest], errors[lowest], "o", color=colour)
    axes.axvline(np.interp(paper, values, range(len(values))), color=plots.GREY, linestyle=":")
    ticks = [f"{value:g}" if value < 1000 else f"{value / 1000:g}k" for value in values]
    axes.set_xticks(range(len(values)), ticks, fontsize=10 if len(values) < 8 else 7)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    if len(shown) > 1:
        axes.legend()
