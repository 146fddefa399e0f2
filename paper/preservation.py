"""Text-to-video is kept: what the LoRA changes where all frames share one noise level.

The paper says that Pusa makes videos from text as well as Wan does. Three measures of it, for several strengths of the
LoRA (0 is the base): how many clips show what their caption says; how far apart the shapes begin in two clips of the
same caption, whose seeds follow each other (a shape that is missing counts as 0), so that accuracy is not bought with
sameness; and how much the LoRA changes the velocity on true clips at equal levels, as a share of the velocity itself,
beside the same with a clean first frame, where change is wanted.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from paper.lab import Lab, Row, page
from support import plots
from toy import world
from toy.judge import as_prompted

STRENGTHS = (0.0, 0.5, 1.0, 1.4, 1.7, 2.5)
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
EQUAL, CLEAN = "all at t", "first clean"
ACCURACY, DIVERSITY = 0.98, 0.9  # shares of the base's that must stay


def measure(lab: Lab) -> None:
    for strength in strengths(lab):
        measured = cache(partial(_text_to_video, lab, strength))  # clips are made once and give both figures
        for n, name in enumerate(("as prompted", "diversity")):
            lab.figure(f"{name}, {strength:g}", lambda seed, n=n, measured=measured: measured(seed)[n])
    for t in lab.few(LEVELS):
        for pattern in (EQUAL, CLEAN):
            lab.figure(f"change at {t:g}: {pattern}", partial(_change, lab, t, pattern))


def strengths(lab: Lab) -> Sequence[float]:
    """Those of the LoRA that are tried; a quick pass compares with it and without."""
    return (0.0, 1.0) if lab.config.quick else STRENGTHS


def _text_to_video(lab: Lab, strength: float, seed: int) -> tuple[Tensor, Tensor]:
    """For each scene, 100 if its clip is as prompted, else 0; and how far apart it and that of the next seed begin."""
    network, scenes = lab.network("seed-0", strength), lab.judge.scenes
    one, other = (world.measure(lab.judge.videos(network, "t2v", n)) for n in (seed, seed + 1))
    return 100.0 * as_prompted(scenes, one), apart(scenes, one, other)


def apart(scenes: list[world.Scene], one: world.Readings, other: world.Readings) -> Tensor:
    """Distance in pixels between the starts of a scene's shapes in two clips, the mean over its shapes, (scenes,)."""
    distance = torch.hypot(one.x[:, 0] - other.x[:, 0], one.y[:, 0] - other.y[:, 0])  # (scenes, colours)
    distance = distance.where(one.seen[:, 0] & other.seen[:, 0], 0.0)
    colours = [[list(world.COLOURS).index(thing.colour) for thing in scene.things] for scene in scenes]
    return torch.stack([distance[b, wanted].mean() for b, wanted in enumerate(colours)])


def _change(lab: Lab, t: float, pattern: str, seed: int) -> Tensor:
    """How much the LoRA changes the velocity of a scene's frames but the first, in percent of the base's."""
    tau = torch.full((lab.latents.shape[2],), t)
    tau[0] = t if pattern == EQUAL else 0
    predicted = (lab.velocity(lab.network(name), tau, seed)[0] for name in ("base", "seed-0"))
    base, pusa = (velocity[:, :, 1:].flatten(1) for velocity in predicted)
    return 100 * (pusa - base).norm(dim=1) / base.norm(dim=1)


def draw(lab: Lab, path: Path | str) -> None:
    """Accuracy and diversity by strength, and the change of the velocity by noise level."""
    before, after = (lab.middle(f"as prompted, {strength}", False) for strength in (0, 1))
    title = f"Text-to-video as prompted: {before:.1f} % before, {after:.1f} % with the LoRA at strength 1"
    with page(path, title, (1, 1, 1.2)) as (accuracy, diversity, change):
        for axes, what, told in (
            (accuracy, "as prompted", "clips as prompted, %"), (diversity, "diversity", "starts apart, px"),
        ):  # fmt: skip
            names = [f"{what}, {strength:g}" for strength in strengths(lab)]
            middle, spread = ([of(name, median=False) for name in names] for of in (lab.middle, lab.spread))
            axes.errorbar(strengths(lab), middle, spread, color=plots.COLOURS[0], marker="o", markersize=4)
            axes.axhline(middle[0], color=plots.GREY, linestyle=":", linewidth=1)
            axes.set(title=told, xlabel="strength of the LoRA", ylim=(0, 1.1 * max(middle) or 1))
            axes.grid(axis="y")
        for pattern, colour in zip((EQUAL, CLEAN), plots.COLOURS, strict=False):
            values = [lab.middle(f"change at {t:g}: {pattern}") for t in lab.few(LEVELS)]
            change.plot(lab.few(LEVELS), values, color=colour, marker="o", markersize=4, label=pattern)
        change.set(title="change of the velocity, %", xlabel="noise level t", ylim=(0, None))
        change.grid(axis="y")
        change.legend()


def rows(lab: Lab) -> list[Row]:
    told = partial(lab.told, median=False)
    accuracy, diversity = (tuple(f"{what}, {strength}" for strength in (0, 1)) for what in ("as prompted", "diversity"))
    equal, clean = ([lab.middle(f"change at {t:g}: {pattern}") for t in lab.few(LEVELS)] for pattern in (EQUAL, CLEAN))
    mean = [sum(values) / len(values) for values in (equal, clean)]
    return [
        Row(f"T2V shows what its caption says as often, to {1 - ACCURACY:.0%}", "kept, no figure",
            f"{told(accuracy[0], '%')} → {told(accuracy[1], '%')}", lab.below(*accuracy, False, 1 / ACCURACY)),
        Row(f"T2V is as diverse, to {1 - DIVERSITY:.0%}", "kept, no figure",
            f"{told(diversity[0])} → {told(diversity[1])}", lab.below(*diversity, False, 1 / DIVERSITY)),
        Row("little changes where all frames share one level", "prior kept, no figure",
            f"velocity changed by {mean[0]:.1f} %, beside a clean first frame by {mean[1]:.1f} %",
            mean[0] < mean[1] / 2),
    ]  # fmt: skip
