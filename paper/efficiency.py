"""The paper: image-to-video at Wan-I2V's quality for 1/2500 of its data and 1/200 of its cost.

Measured: one base becomes an image-to-video model in two ways, from the same clips: by a Pusa LoRA, and by a finetune
of all weights in Wan-I2V's way (`paper/i2v.py`), at the best of three learning rates; the LoRA's is that of `train.py`.
Each budget of either is a training of its own, whose learning rate comes down at its end. Three ways need no training:
the base with the first frame's τ at 0, which it never saw; the same told the other frames' τ for all; and the base with
the known frame put back at every step, as noisy as the others. And last: how much of text-to-video each has lost; the
finetune is told that no frame is given, which its training never told it.

Read: error, the pixels between a shape and where first frame and caption put it, over the clips seen in training,
repeats counted, and over its operations. The ratio compares the budgets at which both reach the same error: two that
the base reaches untrained, and the lowest that both reach, which decides. In brackets, where 95 % of it lie if the
scenes are drawn anew and each training has other luck, as far as three seeds of the LoRA's are apart. The LoRA is used
as it comes: at strength 1 and told each frame's own level. `ablation.py` and `vector.py` try others.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import train
from paper import i2v, vector
from paper.lab import BATCH, BUDGETS, RANK, STEPS, Lab, Row, every, page
from support import cost, plots
from toy import world
from toy.judge import as_prompted

TITLE = "For an error of {:.0f} px {} needs fewer clips, for {:.1f} px {} does"
NEEDS_FEWER = {True: "Pusa's LoRA", False: "the I2V finetune", None: "neither clearly"}
GOALS = 7.0, 5.0  # px; and the lowest error that both reach
PUSA, FINETUNE = "Pusa's LoRA", "I2V finetune"
CLAMPED, HIDDEN = "base, first frame at τ = 0", "base, first frame at τ = 0, told one τ for all"
REPLACED = "base, first frame put back"
UNTRAINED = CLAMPED, HIDDEN, REPLACED
RATE = f"{FINETUNE}: learning rate"
SEEDS = [f"{PUSA}, {STEPS} steps{name}" for name in ("", ", seed 1", ", seed 2")]  # of training
T2V = "base", PUSA, f"{PUSA}, longest", FINETUNE
LATENTS = 16, 9, world.SIDE // 8, world.SIDE // 8


def measure(lab: Lab) -> None:
    """Image-to-video at every budget and without training, and text-to-video of four networks."""

    def error(name: str, make: Callable[[], nn.Module], same: str = "", **settings: float | Tensor) -> None:
        network = cache(make)  # only if something is left to measure
        lab.figure(name, lambda seed: lab.error(network(), "i2v", seed, **settings), same)

    flat = i2v.one_level(lab)
    error(CLAMPED, lab.judge.transformer, same="zero_shot: i2v, base: error")
    error(HIDDEN, lab.judge.transformer, same=f"vector: i2v, base: {vector.SCALARS[0]}", context_noise=1.0)
    error(REPLACED, lambda: i2v.Replacement(lab.judge.transformer()), taus=flat)
    for n, name in enumerate(SEEDS):  # the first is a budget, too
        error(name, partial(lab.pusa, f"seed-{n}"), same="" if n else "zero_shot: i2v, seed-0: error")
    for steps in reversed(lab.few(BUDGETS)):
        error(f"{PUSA}, {steps} steps", partial(lab.pusa, f"steps-{steps}"))
    lab.figure(RATE, lambda seed: torch.tensor([i2v.learning_rate(lab)]))
    for steps in reversed(lab.few(i2v.BUDGETS)):
        error(f"{FINETUNE}, {steps} steps", partial(i2v.finetuned, lab, steps), taus=flat)
    ways = lab.judge.transformer, lab.pusa, partial(lab.pusa, f"steps-{BUDGETS[-1]}"), partial(i2v.finetuned, lab)
    known = "preservation: as prompted, 0", "preservation: as prompted, 1", "", ""
    for name, make, same in zip(T2V, ways, known, strict=True):
        lab.figure(f"T2V: {name}", partial(text_to_video, lab, cache(make)), same)


def text_to_video(lab: Lab, network: Callable[[], nn.Module], seed: int) -> Tensor:
    """100 for each scene whose clip is all as its caption says, else 0."""
    return 100.0 * as_prompted(lab.judge.scenes, world.measure(lab.judge.videos(network(), "t2v", seed)))


def flops(lab: Lab) -> dict[str, int]:
    """Operations to train on one clip, by PyTorch's count of a forward and a backward pass."""
    lora = train.outline(lab.opened, train.TrainConfig(rank=RANK))["transformer"]
    full = i2v.widened(lab.opened.outline()[0])
    return {
        PUSA: cost.window_flops(lora, LATENTS),
        FINETUNE: cost.window_flops(full, (i2v.CHANNELS, *LATENTS[1:])),
    }


def budgets(lab: Lab) -> dict[str, list[int]]:
    """The optimizer steps of each way's trainings, from few to many."""
    return {PUSA: list(lab.few(BUDGETS)), FINETUNE: list(lab.few(i2v.BUDGETS))}


def reached(steps: Sequence[int], errors: Sequence[float], goal: float) -> float:
    """The budget at which an error first is as low as `goal`, between two budgets on logarithmic ones.

    ValueError if no budget gets there. At the first budget it may have been there before.
    """
    for i, error in enumerate(errors):
        if error <= goal:
            share = (errors[i - 1] - goal) / (errors[i - 1] - error) if i else 0.0
            return steps[i - 1] * (steps[i] / steps[i - 1]) ** share if i else float(steps[0])
    raise ValueError(f"got a goal of {goal:g}, expected one that is reached: the lowest error is {min(errors):g}")


class Ratio(NamedTuple):
    """How many times the LoRA's clips the finetune needs for the same error."""

    told: float
    low: float  # 95 % of the draws lie between these
    high: float
    goal: float  # the error
    bound: str  # "at least " if the LoRA is there at its first budget, "at most " if the finetune is, else ""

    @property
    def more(self) -> bool | None:
        """Whether the finetune needs more; None if it cannot be told, as where only the other bound is known."""
        if self.low > 1:
            return True if self.bound in ("", "at least ") else None
        return False if self.high < 1 and self.bound in ("", "at most ") else None


def ratio(lab: Lab, goal: float = 0.0) -> Ratio:
    """The ratio over all scenes, and over 500 draws of as many of them and of each training's luck.

    goal: the error, if both reach it; else the lowest that both do.
    """
    steps, random = budgets(lab), np.random.default_rng(0)
    curves = {way: np.array([np.concatenate(lab.values(f"{way}, {n} steps")) for n in steps[way]]) for way in steps}
    count, each, luck = curves[PUSA].shape[1], [], lab.luck(SEEDS)
    for draw in (np.arange(count), *random.integers(count, size=(500, count))):
        errors = {way: np.median(curve[:, draw], axis=1) for way, curve in curves.items()}
        if each:  # the first is what was measured
            errors = {way: error * np.exp(random.normal(0, luck, len(error))) for way, error in errors.items()}
        common = max(goal, *map(min, errors.values()))
        needed = {way: reached(steps[way], errors[way], common) for way in steps}
        each.append((needed[FINETUNE] / needed[PUSA], common, {way for way in steps if errors[way][0] <= common}))
    (told, common, first), *drawn = each
    bound = {(PUSA,): "at least ", (FINETUNE,): "at most "}.get(tuple(first), "about " if first else "")
    return Ratio(told, *np.quantile([ratio for ratio, *_ in drawn], (0.025, 0.975)), common, bound)


def draw(lab: Lab, path: Path) -> None:
    """Error over clips seen and over operations, both ways, with those that need no training as lines."""
    first, last, operations = ratio(lab, GOALS[0]), ratio(lab), flops(lab)
    title = TITLE.format(first.goal, NEEDS_FEWER[first.more], last.goal, NEEDS_FEWER[last.more])
    with page(path, title, (1, 1), height=4.2) as (seen, spent):
        for (way, steps), colour in zip(budgets(lab).items(), plots.COLOURS, strict=False):
            names, clips = [f"{way}, {n} steps" for n in steps], [n * BATCH for n in steps]
            errors, spreads = [lab.middle(name) for name in names], [lab.spread(name) for name in names]
            for axes, x in ((seen, clips), (spent, [n * operations[way] for n in clips])):
                axes.errorbar(x, errors, spreads, color=colour, marker="o", markersize=4, capsize=2, label=way)
        for axes, label in ((seen, "clips seen in training, repeats counted"), (spent, "operations of training, FLOP")):
            for name, line in zip(UNTRAINED, ("--", "-.", ":"), strict=True):
                axes.axhline(lab.middle(name), color=plots.GREY, linestyle=line, linewidth=1.2, label=name)
            axes.set(xscale="log", xlabel=label)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(axis="y")
        seen.set_ylabel("I2V error, px (median of scenes)")
        seen.figure.legend(*seen.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def rows(lab: Lab) -> list[Row]:
    """What is claimed of efficiency, the paper's figures, ours, and whether ours agree."""
    found, operations = [ratio(lab, goal) for goal in (*GOALS, 0.0)], flops(lab)
    pusa, finetune = (f"{way}, {steps[-1]} steps" for way, steps in budgets(lab).items())

    def compared(what: str, factor: float) -> tuple[str, bool | None, str]:
        told, untrained = [], min(map(lab.middle, UNTRAINED))
        for at in found:
            times = at._replace(told=factor * at.told, low=factor * at.low, high=factor * at.high)
            ratio, low, high = (f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in times[:3])
            told.append(f"{times.bound}{ratio} ({low} to {high}) at {at.goal:.1f} px")
        start = f"{what} that the {FINETUNE} needs, over the LoRA's: "
        return f"{start}{', '.join(told)}; untrained: {untrained:.1f} px", times.more, start + told[-1]

    texts = [f"T2V: {name}" for name in T2V]
    kept = ", ".join(f"{name} {lab.told(text, '%', median=False)}" for name, text in zip(T2V, texts, strict=True))
    base, _, longest, finetuned = texts
    lost = lab.below(finetuned, base, median=False, factor=0.98)
    better = lost, lab.below(base, longest, median=False, factor=1.02)
    return [
        Row("I2V quality for fewer clips", "at most 1/2500 of them", *compared("clips", 1.0)),
        Row("I2V quality at less cost", "at most 1/200 of it",
            *compared("operations", operations[FINETUNE] / operations[PUSA])),
        Row("better than a finetune for I2V alone", "87.32 to 86.86 (VBench-I2V)",
            f"{PUSA} {lab.told(pusa)}, {FINETUNE} {lab.told(finetune)}, at its best learning rate, "
            f"{lab.middle(RATE):g}", lab.below(pusa, finetune)),
        Row("the LoRA beats what needs no training", "none",
            ", ".join(f"{name} {lab.told(name)}" for name in (pusa, *UNTRAINED)),
            every(lab.below(pusa, name) for name in UNTRAINED)),
        Row("T2V is kept to 2 %, where a finetune of as many steps loses it", "kept", kept, every(better)),
    ]  # fmt: skip
