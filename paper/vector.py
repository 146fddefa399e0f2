"""A vector, not a scalar, is what carries it: networks that are told wrong noise levels.

Pusa's one change to Wan is that each frame's noise level reaches the network. If that is what carries the tasks, they
must fail when it is withheld. So the frames walk the task's own table as ever, but the network hears a scalar again:
that of the generated frames, which is wrong for the conditions alone, or the mean of τ, which is wrong for all (and is
told to the conditions or to the others alone, too). The base was trained with one level for all; a LoRA should want the
vector. There are two: the paper's, trained on a level for each frame, and that of the embedded model, trained on two
levels and longer. The base that is told one level for all needs no training: a LoRA is worth what it gains on that, as
it is meant to be used or told one level, too.

The loss says the same without sampling: true clips at (0, t, ..., t) against (t, ..., t), on all frames but the first.
A network that makes use of a clean first frame has the lower loss there.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from paper.lab import Lab, Row, every, page
from support import plots
from toy.judge import Judge

NETWORKS = {"base": "base", "seed-0": "the paper's LoRA", "embedded": "the embedded LoRA"}
TASKS = ("i2v", "start-end", "extend", "complete")
RIGHT, PARTS = "its own", ("mean for conditions", "mean for the others")
SCALARS = "the generated frames' for all", "mean for all"
DISSECTED = (("i2v", "seed-0"), ("i2v", "embedded"))  # told the parts' mean, too
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
PATTERNS = ("all at t", "first clean", "first clean, told t")


class Told(nn.Module):
    """A network that hears one level for some of the frames: the mean of all, or the highest, the generated frames'."""

    def __init__(self, network: nn.Module, frames: list[int], highest: bool = False):
        super().__init__()
        self.network, self.frames, self.highest = network, frames, highest
        self.prompt_keys = network.prompt_keys

    def forward(self, z: Tensor, tau: Tensor, context: Tensor | list) -> Tensor:
        """As `Wan.forward`: z (B, C, F, H, W), tau (B, F)."""
        heard = tau.clone()
        heard[:, self.frames] = tau.amax(1, keepdim=True) if self.highest else tau.mean(1, keepdim=True)
        return self.network(z, heard, context)


def misled(told: str, task: str) -> list[int]:
    """The latent frames for which another level is told."""
    m = Judge.plan(task).m
    frames = {RIGHT: m < 0, PARTS[0]: m == 0, PARTS[1]: m > 0} | dict.fromkeys(SCALARS, m >= 0)
    return frames[told].nonzero()[:, 0].tolist()


def measure(lab: Lab) -> None:
    for task in lab.few(TASKS):
        for network in NETWORKS:
            for told in (RIGHT, *SCALARS, *(PARTS if (task, network) in DISSECTED else ())):
                known = f"history: {task} 3 1" if network == "embedded" else f"zero_shot: {task}, {network}: error"
                measured = partial(_error, lab, task, network, told)
                lab.figure(f"{task}, {network}: {told}", measured, known if told == RIGHT else "")
    for network in NETWORKS:
        for pattern in PATTERNS:
            for t in lab.few(LEVELS):
                lab.figure(f"loss at {t:g}, {network}: {pattern}", partial(_loss, lab, network, pattern, t))


def _error(lab: Lab, task: str, network: str, told: str, seed: int) -> Tensor:
    return lab.error(Told(lab.network(network), misled(told, task), highest=told == SCALARS[0]), task, seed)


def _loss(lab: Lab, network: str, pattern: str, t: float, seed: int) -> Tensor:
    """The mean squared error of the velocity for each scene, over all frames but the first."""
    tau = torch.full((lab.latents.shape[2],), t)
    tau[0] = t if pattern == PATTERNS[0] else 0
    frames = range(len(tau)) if pattern == PATTERNS[2] else ()
    predicted, right = lab.velocity(Told(lab.network(network), list(frames), highest=True), tau, seed)
    return (predicted - right)[:, :, 1:].square().flatten(1).mean(1)


def draw(lab: Lab, path: Path | str) -> None:
    """The error of each task, told a vector and a scalar; and the loss beside a clean first frame, by level."""
    tasks, levels = lab.few(TASKS), lab.few(LEVELS)
    gains = [task for task in tasks if gains_on_the_base(lab, task, "seed-0")]
    title = f"The paper's LoRA beats the base that is told one level for all in {len(gains)} of {len(tasks)} tasks"
    with page(path, title, (1.5, 1), 4.2) as (errors, losses):
        for n, (network, colour) in enumerate(zip(NETWORKS, (plots.COLOURS[1], *plots.COLOURS[::2]), strict=False)):
            for row, task in enumerate(tasks):
                names = [f"{task}, {network}: {told}" for told in (RIGHT, scalar(lab, task, network))]
                y, label = row + 0.24 * (n - 1), None if row else NETWORKS[network]
                middles, spreads = [*map(lab.middle, names)], [*map(lab.spread, names)]
                errors.errorbar(middles, [y, y], xerr=spreads, color=colour, alpha=0.4, zorder=1)
                for at, inside in zip(middles, (colour, "white"), strict=True):
                    errors.scatter(at, y, color=inside, edgecolor=colour, linewidth=1.5, label=label, zorder=2)
                    label = None
            for pattern, line in zip(PATTERNS[1:], ("-", ":"), strict=True):
                losses.plot(levels, [_ratio(lab, network, pattern, t) for t in levels], line, color=colour, marker=".")
        errors.set_yticks(range(len(tasks)), tasks)
        errors.set(ylim=(len(tasks) - 0.5, -0.5), xlim=(0, None))
        errors.set_xlabel("error, px\n(full: told each frame's level; empty: one for all)")
        errors.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=3, columnspacing=1)
        errors.grid(axis="x")
        losses.axhline(1, color=plots.GREY, linewidth=0.8)
        losses.set_title("loss beside a clean first frame\nover that with all frames at t")
        losses.set_xlabel("noise level t\n(dotted: told t for all)")
        losses.grid(axis="y")


def _ratio(lab: Lab, network: str, pattern: str, t: float) -> float:
    """The loss with a clean first frame, as a share of that with all at t."""
    some, all_at_t = (lab.middle(f"loss at {t:g}, {network}: {name}", median=False) for name in (pattern, PATTERNS[0]))
    return some / all_at_t


def scalar(lab: Lab, task: str, network: str) -> str:
    """Which of the scalars is better for a network."""
    return min(SCALARS, key=lambda told: lab.middle(f"{task}, {network}: {told}"))


def needs_its_own(lab: Lab, task: str, network: str) -> bool | None:
    """Whether a network's error is higher by either scalar; None if it cannot be told."""
    return every(lab.below(f"{task}, {network}: {RIGHT}", f"{task}, {network}: {told}") for told in SCALARS)


def gains_on_the_base(lab: Lab, task: str, network: str, told: str = RIGHT) -> bool | None:
    """Whether a network, told this, does better than the base told one level for all; None if it cannot be told."""
    return lab.below(f"{task}, {network}: {told}", f"{task}, base: {SCALARS[0]}")


def rows(lab: Lab) -> list[Row]:
    """Three rows for all tasks, then one for each: whether each is so for the paper's LoRA."""
    tasks, found, worse = lab.few(TASKS), [], {}
    for name in ("seed-0", "embedded"):
        good = [task for task in tasks if needs_its_own(lab, task, name)]
        worse[name] = f"{NETWORKS[name]} {len(good)} of {len(tasks)}", f" ({', '.join(good) or 'none'})"
    for task in tasks:
        ours = []
        for name, label in NETWORKS.items():
            parts = PARTS if (task, name) in DISSECTED else ()
            each = (f"{told} {lab.told(f'{task}, {name}: {told}')}" for told in (RIGHT, *SCALARS, *parts))
            ours.append(f"{label}: {', '.join(each)}")
        holds = needs_its_own(lab, task, "seed-0")
        found.append(Row(f"{task} needs each frame's own level", "stated, no figure", "; ".join(ours), holds))
    ours = f"tasks that get worse by one level for all: {'; '.join(map(''.join, worse.values()))}"
    holds, short = every(row.holds for row in found), f"worse told one level: {', '.join(n for n, _ in worse.values())}"
    whole = [Row("a vector carries the tasks", "stated, no figure", ours, holds, short)]
    asked = {"base": SCALARS[0], "seed-0": RIGHT, "embedded": RIGHT}
    ours = "; ".join(
        f"{task}: " + ", ".join(f"{NETWORKS[n]} {lab.told(f'{task}, {n}: {told}')}" for n, told in asked.items())
        for task in tasks
    )
    holds = every(gains_on_the_base(lab, task, "seed-0") for task in tasks)
    whole.append(Row("a LoRA beats the base that is told one level for all", "stated, no figure", ours, holds))
    names = {task: [f"{task}, {network}: {SCALARS[0]}" for network in ("base", "seed-0")] for task in tasks}
    ours = "; ".join(f"{task}: base {lab.told(base)}, {NETWORKS['seed-0']} {lab.told(pusa)}"
                     for task, (base, pusa) in names.items())  # fmt: skip
    holds = every(gains_on_the_base(lab, task, "seed-0", SCALARS[0]) for task in tasks)
    whole.append(Row("the paper's LoRA does so told one level, too", "not asked", ours, holds))
    return [*whole, *found]
