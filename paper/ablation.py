"""Ablation: how each setting of training and sampling moves the error, one at a time.

The paper finds rank 512 and strength 1.7 best ("alpha" there), says that a higher rank is better, that training is at
its best after about 900 steps, and that 10 steps of sampling suffice; it trains with p_async = 1 and gives its image
with noise 0.2 (m) in its examples. Here each of these is varied while all others stay as they are in `Run`, with rank
32, 800 steps of training and p_async 1. Every point is the error in pixels of image-to-video, where nothing else is
said: how far the shapes are from where the first frame and the prompt put them, in all frames but the given one.

How to read it: the dot is the best value here, the dotted line the paper's. Spreads are those of sampling alone. But
ranks, lengths and p_async were each trained once: where they are compared, it must hold as well if each training has
other luck, as far as three seeds of the usual one are apart. Each length of training is a run of its own, whose
learning rate comes down at its end.
"""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

import tasks
from paper.efficiency import PUSA, SEEDS
from paper.lab import BUDGETS, STEPS, Lab, Row, every, sheet
from paper.vector import SCALARS
from support import plots
from toy import world
from toy.judge import as_prompted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRENGTHS, RANKS = (0.5, 1.0, 1.4, 1.7, 2.5), (4, 128)
TASKS = "i2v", "extend"  # by which trainings are compared
STRENGTH, NOISE = 1.7, 0.2  # the paper's
TITLE = "Lowest error at strength {:g}, noise {:g}, {:g} steps of sampling and {:g} of training"


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
    return {
        "rank 32": {0.0: Run(lora="base", strength=0.0)} | {s: Run(strength=s) for s in STRENGTHS},
        "p_async": {p: Run(lora=asynchronous[p]) for p in few(list(asynchronous))},
        "p_async, extend": {p: Run("extend", asynchronous[p]) for p in few(list(asynchronous))},
        "sampling": {k: Run(steps=k) for k in few((1, 2, 5, 10, 20, 50))},
        "training": {n: Run(lora="seed-0" if n == STEPS else f"steps-{n}") for n in few(BUDGETS)},
        "p_async, t2v": {p: Run("t2v", asynchronous[p]) for p in few(list(asynchronous))},
        "noise": {m: Run(m=m) for m in (0.0, 0.1, NOISE, 0.4)},
        "strength, t2v": {s: Run("t2v", strength=s) for s in (1.0, STRENGTH)},
        "two levels": {n: Run(task, "two-levels") for n, task in enumerate(TASKS)},
        "p_async 0, told one τ": {n: Run(task, "async-0", context_noise=1.0) for n, task in enumerate(TASKS)},
        "p_async 1, told one τ": {n: Run(task, context_noise=1.0) for n, task in enumerate(TASKS)},
        "seeds": {n: Run(lora=f"seed-{n}") for n in few((0, 1, 2))},
        **{f"rank {r}": {s: Run(lora=f"rank-{r}", strength=s) for s in few(STRENGTHS)} for r in few(RANKS)},
    }


def measure(lab: Lab) -> None:
    for curve in curves(lab).values():
        for run in curve.values():
            lab.figure(run.name, partial(evaluate, lab, run), same(run))


def same(run: Run) -> str:
    """The figure of another claim that is the run's, if one is; see `Lab.figure`."""
    name, strength = f"{run.task}, {run.lora}", run.strength
    if run == Run("t2v", strength=strength):
        return f"preservation: as prompted, {strength:g}"
    if run not in (Run(run.task, run.lora, context_noise=run.context_noise), Run(lora="base", strength=0.0)):
        return ""
    if run.context_noise:
        return f"vector: {name}: {SCALARS[0]}"
    budgets = {f"i2v, steps-{n}": f"efficiency: {PUSA}, {n} steps" for n in BUDGETS}
    seeds = {f"i2v, seed-{n}": f"efficiency: {SEEDS[n]}" for n in (1, 2)}
    return (budgets | seeds).get(name, f"zero_shot: {name}: error")


def evaluate(lab: Lab, run: Run, seed: int) -> Tensor:
    """The error of every scene in pixels; of text-to-video, 100 where a clip is just as the prompt says, else 0."""
    network, m = lab.network(run.lora, run.strength), lab.judge.plan(run.task).m
    taus = tasks.tau_schedule(m.clamp(min=run.m), run.steps, lab.judge.preset.shift)
    if run.task != "t2v":
        return lab.error(network, run.task, seed, taus=taus, context_noise=run.context_noise)
    return 100.0 * as_prompted(lab.judge.scenes, world.measure(lab.judge.videos(network, "t2v", seed, taus)))


def best(lab: Lab, curve: Curve) -> float:
    """The value with the lowest error."""
    return min(curve, key=lambda value: lab.middle(curve[value].name))


def listed(lab: Lab, curve: Curve) -> str:
    """The errors of a curve in words."""
    return ", ".join(f"{value:g}: {lab.middle(run.name):.2f}" for value, run in curve.items()) + " px"


def rows(lab: Lab) -> list[Row]:
    all_curves, usual = curves(lab), Run()
    strengths, sampling, training, noise = (all_curves[name] for name in ("rank 32", "sampling", "training", "noise"))
    enough, strong, longest = sampling[50].name, strengths[STRENGTH].name, training[BUDGETS[-1]].name
    luck = lab.luck(run.name for run in all_curves["seeds"].values())
    texts = ", ".join(lab.told(run.name, "%", median=False) for run in all_curves["strength, t2v"].values())
    by_rank = {rank: all_curves[f"rank {rank}"] for rank in sorted((32, *lab.few(RANKS)))}
    ranks = {rank: curve[best(lab, curve)] for rank, curve in by_rank.items()}
    found = [
        Row("10 steps of sampling suffice: the error is within 5 % of that after 50", "10 steps",
            listed(lab, sampling), lab.below(usual.name, enough, factor=1.05),
            listed(lab, {usual.steps: usual, 50: sampling[50]})),
        Row(f"strength {STRENGTH} is better than 1", f"{STRENGTH}",
            f"{listed(lab, strengths)}; T2V as prompted, at 1 and {STRENGTH}: {texts}", lab.below(strong, usual.name)),
        Row("a higher rank is better (each at its best strength)", "512, the highest", listed(lab, ranks),
            every(lab.below(high.name, low.name, luck=luck) for low, high in pairwise(ranks.values()))),
        Row("twice as long a training is not better by more than 5 %", "best after 900 steps",
            f"{listed(lab, training)}; seeds of {STEPS} steps: {listed(lab, all_curves['seeds'])}",
            lab.below(usual.name, longest, factor=1.05, luck=luck)),
    ]  # fmt: skip
    for n, (task, name) in enumerate(zip(TASKS, ("p_async", "p_async, extend"), strict=True)):
        curve, two = all_curves[name], all_curves["two levels"][n].name
        flat, heard = (all_curves[f"p_async {p}, told one τ"][n].name for p in (0, 1))
        ours = (f"{listed(lab, curve)}; told one τ for all: 0: {lab.told(flat)}, 1: {lab.told(heard)}; two levels for "
                f"a clip's frames: {lab.told(two)}")  # fmt: skip
        better = every(lab.below(curve[1].name, other, luck=luck) for other in (curve[0].name, flat))
        found.append(Row(f"{task}: a level for each frame trains better than one for all", "p_async = 1", ours, better))
    kept = all_curves["p_async, t2v"]
    ours = ", ".join(f"{value:g}: {lab.told(run.name, '%', median=False)}" for value, run in kept.items())
    holds = lab.below(kept[0].name, kept[1].name, median=False, factor=1.02)
    found.append(Row("T2V loses no more than 2 % by a level for each frame", "kept", ours, holds))
    better, what = lab.below(noise[NOISE].name, usual.name), "noise on the given image helps the frames after it"
    return [*found, Row(what, f"m = {NOISE}", listed(lab, noise), better)]


def draw(lab: Lab, path: Path) -> None:
    known = curves(lab)
    ranks = {name: curve for name, curve in known.items() if name.startswith("rank")}
    panels = (
        ("sampling steps", 10, {"": known["sampling"]}), ("steps of training", 900, {"": known["training"]}),
        ("LoRA strength (0: the base)", STRENGTH, dict(sorted(ranks.items(), key=lambda item: int(item[0][5:])))),
        ("p_async", 1, {"": known["p_async"]}), ("p_async, error of extend", 1, {"": known["p_async, extend"]}),
        ("noise m on the given image", NOISE, {"": known["noise"]}),
    )  # fmt: skip
    lowest = [best(lab, known[name]) for name in ("rank 32", "noise", "sampling", "training")]
    with sheet(path, TITLE.format(*lowest), 5.4) as drawn:
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
