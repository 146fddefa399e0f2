"""Beyond the paper: history guidance, which leads away from the video without its conditions (arXiv 2502.06764).

    v = v(c, h) + (w_c - 1) · [v(c, h) - v(∅, h)] + (w_h - 1) · [v(c, h) - v(c, ∅)]

h: conditions at m·σ; ∅ in its place: the same frames as pure noise at τ = 1. PTSS trains both branches. Each weight
other than 1 costs one more pass of the network a step; equal weights share one, away from both at once.
Measured with the embedded LoRA: the error where the conditions determine the future, by weights and passes. In the
picture, grey is one pass a step, blue two, orange three. It helps a task if the best two passes beat (3, 1), the
prompt's guidance alone. (3, 3), which costs no more than that, is the embedded model's default.
"""

from functools import partial
from pathlib import Path

from paper.lab import Lab, Row, page
from sample import passes_a_step
from support import plots

TASKS, MORE = ("i2v", "start-end", "extend", "complete"), ("prepend", "keyframes")
PLAIN, DEFAULT = (3, 1), (3, 3)
# (w_c, w_h): one pass; then two, by the prompt, by the history, by both together; then three.
WEIGHTS = ((1, 1), (3, 1), (1, 2), (1, 3), (1, 5), (2, 2), (3, 3), (2, 3), (3, 2), (3, 5))


def measure(lab: Lab) -> None:
    pusa = lab.network("embedded")
    for prompt, history in WEIGHTS:
        for task in (*TASKS, *(MORE if (prompt, history) in (PLAIN, DEFAULT) else ())):
            measured = partial(lab.error, pusa, task, guidance=float(prompt), history_guidance=float(history))
            lab.figure(f"{task} {prompt} {history}", measured)


def best(lab: Lab, task: str, count: int) -> tuple[float, float]:
    """The weights with the smallest error at this many passes."""
    return min((w for w in WEIGHTS if passes_a_step(*w) == count), key=lambda w: lab.middle(f"{task} {w[0]} {w[1]}"))


def better(lab: Lab, task: str) -> bool | None:
    """Whether the best two passes are better than those of the prompt's guidance alone."""
    return lab.below("{} {} {}".format(task, *best(lab, task, 2)), "{} {} {}".format(task, *PLAIN))


def draw(lab: Lab, path: Path) -> None:
    """The error of each task by the two weights, coloured by the passes that they cost."""
    helped = [task for task in TASKS if better(lab, task)]
    told = " and ".join(helped) or "no task"
    title = f"At two passes a step (blue), history guidance helps {told}"
    with page(path, title, [1] * len(TASKS)) as panels:
        for axes, task in zip(panels, TASKS, strict=True):
            names = [f"{task} {a} {b}" for a, b in WEIGHTS]
            errors, spreads = [lab.middle(name) for name in names], [lab.spread(name) for name in names]
            colours = [(plots.GREY, *plots.COLOURS)[passes_a_step(*weights) - 1] for weights in WEIGHTS]
            axes.barh(range(len(names)), errors, xerr=spreads, color=colours)
            axes.set_yticks(range(len(names)), [f"{a:g}, {b:g}" for a, b in WEIGHTS] if axes is panels[0] else [])
            axes.invert_yaxis()
            axes.set(title=task, xlabel="error, px")
        panels[0].set_ylabel("by the prompt, by history")


def rows(lab: Lab) -> list[Row]:
    pairs = {task: ["{} {} {}".format(task, *weights) for weights in (PLAIN, DEFAULT)] for task in (*TASKS, *MORE)}
    told = (f"{task} {lab.told(plain)} → {lab.told(default)}" for task, (plain, default) in pairs.items())
    helped, harmed = ([task for task, pair in pairs.items() if lab.below(*pair[::order])] for order in (-1, 1))
    what = "history guidance at no cost, (3, 3), helps some tasks and harms none"
    short = f"helps {', '.join(helped) or 'none'}; harms {', '.join(harmed) or 'none'}"
    lines = [Row(what, "", ", ".join(told), False if harmed else bool(helped) or None, short)]
    for task in TASKS:
        plain, found = f"{task} 3 1", [best(lab, task, count) for count in (2, 3)]
        told = [f"{lab.told(f'{task} {a} {b}')} with weights {a}, {b}" for a, b in found]
        ours = f"{lab.told(plain)} by the prompt alone; two passes: {told[0]}; three: {told[1]}"
        lines.append(Row(f"history guidance helps {task}", "", ours, better(lab, task)))
    return lines
