"""Any order of denoising, from one training: a vector of timesteps need not be seen in all its combinations.

A table of noise levels has a level for each frame at each step, far more combinations than a training can see. The
paper says that its finetuning on independent random levels avoids that explosion. So here frames go their own ways:
one runs late, early or backwards for a while, all follow each other as a staircase, each keeps a random pace, or all
take levels that are drawn anew at each step. In every table each free frame walks from noise to data in the same number
of steps, and conditions stay clean. But steps are uneven in all but the usual table, and random levels go up and down,
which costs error by itself: so they are compared with random levels that all frames share.

The strangeness of a table is how far apart its free frames are: the mean of |τ_i - τ_j| over pairs of frames and over
steps. It is 0 in the base's training, where all share one level, and 1/3 on average in the LoRA's. A network that has
learnt unequal levels keeps its error as tables get stranger.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flow import shifted
from paper.lab import Lab, Row, every, page
from support import plots
from toy.judge import Judge

OWN, SHARED, RANDOM = "together", "random levels, shared", ("random pace", "random levels")
ORDERLY = ("late", "early", "backwards", "staircase", "staircase from the end")
MEASURED = {  # task and network → tables
    ("i2v", "seed-0"): (OWN, *ORDERLY, SHARED, *RANDOM), ("i2v", "base"): (OWN, "staircase", SHARED, RANDOM[1]),
    ("extend", "seed-0"): (OWN, "staircase", SHARED, RANDOM[1]), ("extend", "base"): (OWN, SHARED, RANDOM[1]),
}  # fmt: skip
MARGIN = 1.25  # a table is as good as the task's own if the error is no more than this times as high


def measure(lab: Lab) -> None:
    for task, network in MEASURED:
        for table in tried(lab, task, network):
            same = f"zero_shot: {task}, {network}: error" if table == OWN else ""
            lab.figure(f"{task}, {network}: {table}", partial(_error, lab, task, network, table), same)


def tried(lab: Lab, task: str, network: str) -> Sequence[str]:
    """The tables that are tried: `MEASURED`, or a few of them in a quick pass."""
    few = OWN, SHARED, RANDOM[1]
    return tuple(table for table in MEASURED[task, network] if table in few or not lab.config.quick)


def _error(lab: Lab, task: str, network: str, table: str, seed: int) -> Tensor:
    preset = lab.judge.preset
    return lab.error(lab.network(network), task, seed, taus=taus(table, task, preset.steps, preset.shift, seed))


def taus(table: str, task: str, K: int, shift: float, seed: int = 0) -> Tensor:
    """A table (K+1, F) for a task with clean conditions; the seed is that of the random ones."""
    m = Judge.plan(task).m
    free, generator = m.nonzero()[:, 0].tolist(), torch.Generator().manual_seed(seed)
    one, F = free[len(free) // 2], len(m)
    done = torch.linspace(0, 1, K + 1, dtype=torch.float64)[:, None].repeat(1, F)  # each frame's share of its way
    stairs = torch.logspace(-1, 1, len(free), base=3, dtype=torch.float64)  # powers: below 1 leads, above 1 lags
    if table == "late":
        done[:, one] **= 3
    elif table == "early":
        done[:, one] **= 1 / 3
    elif table == "backwards":  # to about 0.6, back to 0.4, and on
        u = done[:, one]
        done[:, one] = u + 3.6 * u * (1 - u) * (1 - 2 * u)
    elif table in ("staircase", "staircase from the end"):
        done[:, free] **= stairs if table == "staircase" else stairs.flip(0)
    elif table == "random pace":
        done[1:-1] = torch.rand(K - 1, F, dtype=torch.float64, generator=generator).sort(0).values
    levels = shifted((1 - done).clamp(0, 1), shift)
    if table in ("random levels", SHARED):  # as the LoRA's training draws them, without a shift
        drawn = torch.rand(K - 1, F, dtype=torch.float64, generator=generator)
        levels[1:-1] = drawn[:, one, None] if table == SHARED else drawn
    return (m * levels).float()


def strangeness(taus: Tensor, task: str) -> float:
    """The mean of |τ_i - τ_j| over all pairs of free frames and the steps of a table (K+1, F)."""
    levels = taus[:-1, Judge.plan(task).m > 0]
    n = levels.shape[1]
    return ((levels[:, :, None] - levels[:, None]).abs().sum((1, 2)) / (n * (n - 1))).mean().item()


def draw(lab: Lab, path: Path | str) -> None:
    """The tables, from the least strange to the strangest, and the error by each of the base and the LoRA."""
    preset, names = lab.opened.preset, ("i2v", "extend")
    tables = sorted(tried(lab, "i2v", "seed-0"), key=lambda table: _strangeness(lab, table, "i2v"))
    own, strange = (lab.middle(f"i2v, seed-0: {table}") for table in (OWN, _worst(lab, "i2v", (OWN, *ORDERLY))))
    title = f"Frames late, early or as stairs: at worst {strange / own:.1f} times the error of frames in step (i2v)"
    with page(path, title, (0.45, 1, 1), 4.6) as (pictures, *panels):
        for row, table in enumerate(tables):
            levels = taus(table, "i2v", preset.steps, preset.shift)
            where = (0, levels.shape[1], row + 0.42, row - 0.42)
            pictures.imshow(levels.numpy(), "magma_r", extent=where, vmin=0, vmax=1, aspect="auto")
        labels = [f"{table}  {_strangeness(lab, table, 'i2v'):.2f}" for table in tables]
        pictures.set_yticks(range(len(tables)), labels)
        pictures.set(xticks=[], xlim=(0, levels.shape[1]), xlabel="strangeness, and τ:\nsteps down, dark is noise")
        pictures.xaxis.set_label_coords(1, -0.03)
        pictures.xaxis.label.set_horizontalalignment("right")
        for axes, task in zip(panels, names, strict=True):
            for network, colour, label in (("base", plots.COLOURS[1], "base"), ("seed-0", plots.COLOURS[0], "LoRA")):
                measured = [f"{task}, {network}: {table}" for table in tables if table in tried(lab, task, network)]
                at = [row for row, table in enumerate(tables) if table in tried(lab, task, network)]
                middle, spread = ([of(name) for name in measured] for of in (lab.middle, lab.spread))
                axes.errorbar(middle, at, xerr=spread, color=colour, marker="o", linestyle="none", label=label)
            axes.set(title=task, xlabel="error, px", xlim=(0, None), yticks=range(len(tables)), yticklabels=[])
            axes.grid()
        for axes in (pictures, *panels):
            axes.set_ylim(len(tables) - 0.5, -0.5)
        panels[1].legend(loc=(0.5, 0.62))  # beside tables that are not tried for it


def _strangeness(lab: Lab, table: str, task: str) -> float:
    """The mean over the seeds."""
    preset = lab.opened.preset
    each = [strangeness(taus(table, task, preset.steps, preset.shift, seed), task) for seed in lab.seeds]
    return sum(each) / len(each)


def _worst(lab: Lab, task: str, tables: tuple[str, ...]) -> str:
    known = [table for table in tables if table in tried(lab, task, "seed-0")]
    return max(known, key=lambda table: lab.middle(f"{task}, seed-0: {table}"))


def rows(lab: Lab) -> list[Row]:
    """One row for all kinds of tables, then one for each."""
    found, good = [], []
    for claim, task, usual, tables in (
        ("i2v with a frame late, early or backwards, or as a staircase", "i2v", OWN, ORDERLY),
        ("i2v at random paces", "i2v", OWN, ("random pace",)),
        ("i2v with a random level for each frame", "i2v", SHARED, ("random levels",)),
        ("extend as a staircase", "extend", OWN, ("staircase",)),
        ("extend with a random level for each frame", "extend", SHARED, ("random levels",)),
    ):
        if tables[0] not in tried(lab, task, "seed-0"):
            continue
        name, worst = f"{task}, seed-0: {usual}", _worst(lab, task, tables)
        ours = f"{usual} {lab.told(name)}, at worst ({worst}) {lab.told(f'{task}, seed-0: {worst}')}"
        ours += f" (the task's own table: {lab.told(f'{task}, seed-0: {OWN}')})" if usual != OWN else ""
        if worst in tried(lab, task, "base"):
            ours += f"; base {lab.told(f'{task}, base: {usual}')}, {lab.told(f'{task}, base: {worst}')}"
        holds = every(as_good(lab, f"{task}, seed-0: {table}", name) for table in tables)
        good += [claim] if holds else []
        of = "the task's own table" if usual == OWN else "random levels that all frames share"
        what = f"{claim}: at most {MARGIN} times the error of {of}"
        found.append(Row(what, "explosion avoided, no figure", ours, holds))
    short = f"so in {len(good)} of {len(found)}"
    ours, holds = f"{short}: {', '.join(good) or 'none'}", every(row.holds for row in found)
    what = f"any order of denoising costs at most {MARGIN} times the error"
    return [Row(what, "explosion avoided, no figure", ours, holds, short), *found]


def as_good(lab: Lab, name: str, usual: str) -> bool | None:
    """Whether an error is at most `MARGIN` times the usual; None if that cannot be told, or is not so at every seed.

    A random table is another one at every seed, and one for all of its scenes: the scenes alone do not tell of others.
    """
    each = all(error <= MARGIN * other for error, other in zip(lab.each(name), lab.each(usual), strict=True))
    holds = lab.below(name, usual, factor=MARGIN)
    return holds if each or not holds else None
