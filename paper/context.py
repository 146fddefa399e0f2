"""Beyond the paper: context noise. Conditions stay clean, and the network is told that they are not (arXiv 2407.01392).

    told τ_i = max(τ_i, C · max_j τ_j)     for each condition i

Training on random levels hardly ever shows a frame that is all clean among others that are nearly pure noise, which is
where a task begins. Told some noise, the network is back among what it knows. It costs nothing. C was chosen on
ninety-six other scenes, where 0.3, 0.5 and 0.9 were better than 0 in each of four tasks. Measured with the embedded
model as it is sampled, with history guidance; and with the paper's LoRA, without.
"""

from functools import partial
from pathlib import Path

from torch import Tensor

from paper.history import MORE, TASKS
from paper.lab import Lab, Row, every, page
from support import plots

SHARES = 0.0, 0.5  # C: as the paper has it, and as it was chosen
CASES = {"embedded": (3.0, (*TASKS, *MORE)), "seed-0": (1.0, TASKS)}  # networks, their history guidance, and the tasks


def measure(lab: Lab) -> None:
    for network, (history, tasks) in CASES.items():
        for task in tasks:
            for share in SHARES:
                known = f"history: {task} 3 3" if network == "embedded" else f"zero_shot: {task}, {network}: error"
                measured = partial(_error, lab, network, task, history_guidance=history, context_noise=share)
                lab.figure(f"{network}, {task}: {share:g}", measured, "" if share else known)


def _error(lab: Lab, network: str, task: str, seed: int, **settings: float) -> Tensor:
    return lab.error(lab.network(network), task, seed, **settings)


def pairs(network: str) -> dict[str, list[str]]:
    """The names of each task's two figures."""
    return {task: [f"{network}, {task}: {share:g}" for share in SHARES] for task in CASES[network][1]}


def draw(lab: Lab, path: Path) -> None:
    """The error of each task without context noise and with it."""
    before, after = map(lab.middle, pairs("embedded")["i2v"])
    title = f"Told that clean conditions are noisy, i2v is off by {after:.1f} px instead of {before:.1f}"
    with page(path, title, [len(tasks) for _, tasks in CASES.values()], 3.2) as panels:
        for axes, network, label in zip(panels, CASES, ("embedded model", "paper's LoRA"), strict=True):
            before_and_after = zip(*pairs(network).values(), strict=True)
            for share, colour, names in zip(SHARES, plots.COLOURS[1::-1], before_and_after, strict=True):
                errors, spreads = [lab.middle(name) for name in names], [lab.spread(name) for name in names]
                at = [n + 0.8 * (share - 0.25) for n in range(len(names))]
                axes.bar(at, errors, 0.4, yerr=spreads, color=colour, label=f"C = {share:g}")
            axes.set_xticks(range(len(pairs(network))), pairs(network), fontsize=9)
            axes.set(title=f"the {label}", ylabel="error, px" if axes is panels[0] else None)
            axes.grid(axis="y")
        panels[0].legend()


def rows(lab: Lab) -> list[Row]:
    found = []
    for network, claim in (("embedded", "helps every task, at no cost"), ("seed-0", "helps the paper's LoRA, too")):
        told = (f"{task} {lab.told(before)} → {lab.told(after)}" for task, (before, after) in pairs(network).items())
        helped = [lab.below(after, before) for before, after in pairs(network).values()]
        short = f"nearer, by the median, in {helped.count(True)} of {len(helped)}"
        found.append(Row(f"context noise {SHARES[1]:g} {claim}", "", ", ".join(told), every(helped), short))
    return found
