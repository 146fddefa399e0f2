"""Beyond the paper: context noise. Conditions stay clean, and the network is told that they are not (arXiv 2407.01392).

    told τ_i = max(τ_i, C · max_j τ_j)     for each condition i

Training on random levels hardly ever shows a frame that is all clean among others that are nearly pure noise, which is
where a task begins. Told some noise, the network is back among what it knows. It costs nothing. C = 0.5 was chosen on
ninety-six other scenes, where 0.3 to 0.9 were better than 0 in each of four tasks. Measured with the embedded model as
it is sampled, with history guidance; and with the paper's LoRA, without.
"""

from functools import partial
from pathlib import Path

from paper.history import MORE, TASKS
from paper.lab import Lab, Row, every, page
from support import plots

CHOSEN, SHARES = 0.5, (0.0, 0.25, 0.5, 0.75)
# Networks, their history guidance, the tasks, and the values of C.
CASES = (
    ("embedded", 3.0, (*TASKS, *MORE), (0.0, CHOSEN)), ("seed-0", 1.0, TASKS, (0.0, CHOSEN)),
    ("embedded", 3.0, TASKS, SHARES),
)  # fmt: skip


def measure(lab: Lab) -> None:
    for network, history, tasks, shares in CASES:
        for task in tasks:
            for share in shares:
                known = f"history: {task} 3 3" if network == "embedded" else f"zero_shot: {task}, {network}: error"
                settings = {"history_guidance": history, "context_noise": share}
                measured = partial(lab.error, lab.network(network), task, **settings)
                lab.figure(f"{network}, {task}: {share:g}", measured, "" if share else known)


def helped(lab: Lab, network: str, tasks: tuple[str, ...]) -> tuple[str, bool | None]:
    """What context noise does to each task, and whether it clearly helps them all."""
    pairs = [(f"{network}, {task}: 0", f"{network}, {task}: {CHOSEN:g}") for task in tasks]
    told = (f"{task} {lab.told(a)} → {lab.told(b)}" for task, (a, b) in zip(tasks, pairs, strict=True))
    return ", ".join(told), every(lab.below(b, a) for a, b in pairs)


def draw(lab: Lab, path: Path) -> None:
    """The error by C with the embedded model, and without and with it by the paper's LoRA, task by task."""
    first, now = (lab.middle(f"embedded, i2v: {share:g}") for share in (0.0, CHOSEN))
    title = f"Told that clean conditions are noisy, i2v's error is {now:.1f} px instead of {first:.1f}"
    with page(path, title, (1.4, 1), 3.4) as (curves, pairs):
        colours = dict(zip(TASKS, (*plots.COLOURS, plots.GREY), strict=False))
        for task, colour in colours.items():
            for axes, network, shares in ((curves, "embedded", SHARES), (pairs, "seed-0", (0.0, CHOSEN))):
                names = [f"{network}, {task}: {share:g}" for share in shares]
                errors, spreads = [lab.middle(name) for name in names], [lab.spread(name) for name in names]
                axes.errorbar(shares, errors, spreads, color=colour, marker="o", label=task)
        curves.set(title="the embedded model", ylabel="error, px")
        pairs.set(title="the paper's LoRA", xticks=(0.0, CHOSEN))
        for axes in (curves, pairs):
            axes.set(xlabel="context noise C", ylim=(0, None))
            axes.grid(axis="y")
        curves.legend(ncols=2)


def rows(lab: Lab) -> list[Row]:
    embedded, pusa = helped(lab, "embedded", (*TASKS, *MORE)), helped(lab, "seed-0", TASKS)
    return [
        Row(f"context noise {CHOSEN:g} helps every task, at no cost", "", *embedded),
        Row(f"context noise {CHOSEN:g} helps the paper's LoRA, too", "", *pusa),
    ]
