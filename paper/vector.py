"""A vector, not a scalar, is what carries it: networks that are told wrong noise levels.

Pusa's one change to Wan is that each frame's noise level reaches the network. If that is what carries the tasks, they
must fail when it is withheld. So the frames walk the task's own table as ever, but the network hears the mean of τ
over all frames: for all of them (a scalar again), for the conditions alone, or for all but the conditions. The base was
trained with one level for all, so a mean is what it knows; the LoRA should want the truth.

The loss says the same without sampling: true clips at (0, t, ..., t) against (t, ..., t), on all frames but the first.
A network that makes use of a clean first frame has the lower loss there.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from paper.lab import Lab, Row, page
from support import plots
from toy.judge import Judge

NETWORKS = {"base": "base", "seed-0": "LoRA", "two-levels": "LoRA, two levels"}
TASKS = ("i2v", "start-end", "extend", "complete")
RIGHT, MEAN, PARTS = "its own", "mean for all", ("mean for conditions", "mean for the others")
DISSECTED = (*(("i2v", network) for network in NETWORKS), ("extend", "seed-0"))  # told the parts' mean, too
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
PATTERNS = ("all at t", "first clean", "first clean, told the mean")


class Told(nn.Module):
    """A network that hears the mean of all frames' levels for some of them."""

    def __init__(self, network: nn.Module, frames: list[int]):
        super().__init__()
        self.network, self.frames = network, frames
        self.prompt_keys = network.prompt_keys

    def forward(self, z: Tensor, tau: Tensor, context: Tensor | list) -> Tensor:
        """As `Wan.forward`: z (B, C, F, H, W), tau (B, F)."""
        heard = tau.clone()
        heard[:, self.frames] = tau.mean(1, keepdim=True)
        return self.network(z, heard, context)


def misled(told: str, task: str) -> list[int]:
    """The latent frames for which the mean is told."""
    m = Judge.plan(task).m
    frames = {RIGHT: m < 0, MEAN: m >= 0, PARTS[0]: m == 0, PARTS[1]: m > 0}
    return frames[told].nonzero()[:, 0].tolist()


def measure(lab: Lab) -> None:
    for task in lab.few(TASKS):
        for network in NETWORKS:
            for told in (RIGHT, MEAN, *(PARTS if (task, network) in DISSECTED else ())):
                same = f"zero_shot: {task}, {network}: error" if told == RIGHT else ""
                lab.figure(f"{task}, {network}: {told}", partial(_error, lab, task, network, told), same)
    for network in NETWORKS:
        for pattern in PATTERNS:
            for t in lab.few(LEVELS):
                lab.figure(f"loss at {t:g}, {network}: {pattern}", partial(_loss, lab, network, pattern, t))


def _error(lab: Lab, task: str, network: str, told: str, seed: int) -> Tensor:
    return lab.error(Told(lab.network(network), misled(told, task)), task, seed)


def _loss(lab: Lab, network: str, pattern: str, t: float, seed: int) -> Tensor:
    """The mean squared error of the velocity for each scene, over all frames but the first."""
    tau = torch.full((lab.latents.shape[2],), t)
    tau[0] = t if pattern == PATTERNS[0] else 0
    frames = range(len(tau)) if pattern == PATTERNS[2] else ()
    predicted, right = lab.velocity(Told(lab.network(network), list(frames)), tau, seed)
    return (predicted - right)[:, :, 1:].square().flatten(1).mean(1)


def draw(lab: Lab, path: Path | str) -> None:
    """The error of each task, told right and told the mean; and the loss beside a clean first frame, by level."""
    tasks, levels = lab.few(TASKS), lab.few(LEVELS)
    needs = [task for task in tasks if lab.below(f"{task}, seed-0: {RIGHT}", f"{task}, seed-0: {MEAN}")]
    title = f"The LoRA does better with each frame's own level in {len(needs)} of {len(tasks)} tasks"
    with page(path, title, (1.5, 1), 4.2) as (errors, losses):
        for n, (network, colour) in enumerate(zip(NETWORKS, (plots.COLOURS[1], *plots.COLOURS[::2]), strict=False)):
            for row, task in enumerate(tasks):
                names = [f"{task}, {network}: {told}" for told in (RIGHT, MEAN)]
                (a, b), y = map(lab.middle, names), row + 0.24 * (n - 1)
                errors.annotate("", (b, y), (a, y), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.5})
                label = None if row else NETWORKS[network]
                errors.errorbar(a, y, 0, lab.spread(names[0]), color=colour, marker="o", label=label)
                errors.errorbar(b, y, 0, lab.spread(names[1]), color=colour)
            for pattern, line in zip(PATTERNS[1:], ("-", ":"), strict=True):
                losses.plot(levels, [_ratio(lab, network, pattern, t) for t in levels], line, color=colour, marker=".")
        errors.set_yticks(range(len(tasks)), tasks)
        errors.set(ylim=(len(tasks) - 0.5, -0.5), xlim=(0, None))
        errors.set_xlabel("error, px\n(dot: told each frame's level; arrow's tip: told the mean)")
        errors.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=3, columnspacing=1)
        errors.grid(axis="x")
        losses.axhline(1, color=plots.GREY, linewidth=0.8)
        losses.set_title("loss beside a clean first frame\nover that with all frames at t")
        losses.set_xlabel("noise level t\n(dotted: told the mean)")
        losses.grid(axis="y")


def _ratio(lab: Lab, network: str, pattern: str, t: float) -> float:
    """The loss with a clean first frame, as a share of that with all at t."""
    some, every = (lab.middle(f"loss at {t:g}, {network}: {name}", median=False) for name in (pattern, PATTERNS[0]))
    return some / every


def rows(lab: Lab) -> list[Row]:
    """One row for all tasks, then one for each."""
    found, parts = [], dict(zip(PARTS, ("conditions", "others"), strict=True))
    for task in lab.few(TASKS):
        both = {name: [lab.told(f"{task}, {name}: {told}") for told in (RIGHT, MEAN)] for name in NETWORKS}
        ours = "; ".join(f"{NETWORKS[name]}: {right}, told the mean {mean}" for name, (right, mean) in both.items())
        if (task, "seed-0") in DISSECTED:
            apart = [f"{parts[told]} {lab.told(f'{task}, seed-0: {told}')}" for told in PARTS]
            ours += f"; LoRA told it for some frames alone: {', '.join(apart)}"
        holds = lab.below(f"{task}, seed-0: {RIGHT}", f"{task}, seed-0: {MEAN}")
        found.append(Row(f"{task} needs each frame's own level", "stated, no figure", ours, holds))
    good = [row.claim.partition(" ")[0] for row in found if row.holds]
    ours = f"the LoRA is worse if told the mean in {len(good)} of {len(found)} tasks ({', '.join(good) or 'none'})"
    return [Row("a vector carries the tasks", "stated, no figure", ours, len(good) == len(found)), *found]
