"""Beyond the paper: `retake`, a stretch of a clip made again from noise, while the rest stays.

One more table of τ: m_i = strength for the latent frames of the stretch, 0 for the others. Measured on true clips, of
which frames 9 to 20 of 33 are made again under their own caption, by the embedded model: how far the shapes are from
where the rest of the clip puts them, and how like the stretch is to what was there. At strength 1 nothing of it is
known.
"""

from functools import cache, partial
from pathlib import Path

from torch import Tensor

import tasks
from paper.lab import Lab, Row, page
from support import plots
from toy import world
from toy.judge import centroid_errors, psnr

STRETCH, STRENGTHS = range(9, 21), (0.4, 0.6, 0.8, 1.0)
CASES = (*(("embedded", strength) for strength in STRENGTHS), ("base", 1.0))
FIGURES = {"error": "error in the stretch, px", "likeness": "likeness to what was there, dB"}


def measure(lab: Lab) -> None:
    for network, strength in CASES:
        judged = cache(partial(_judged, lab, network, strength))
        for figure in FIGURES:
            lab.figure(f"{network} {strength:g}: {figure}", lambda seed, j=judged, f=figure: j(seed)[f])


def _judged(lab: Lab, network: str, strength: float, seed: int) -> dict[str, Tensor]:
    F, stretch = tasks.latent_frames(world.FRAMES), (STRETCH.start, STRETCH.stop)
    plan = tasks.plan("retake", F, strength=strength, stretch=stretch)
    videos, truth = lab.judge.videos(lab.network(network), "retake", seed, plan=plan), lab.judge.truth
    errors = centroid_errors(lab.judge.scenes, world.measure(videos), STRETCH).mean(1)
    return {"error": errors, "likeness": psnr(videos[:, :, slice(*stretch)], truth[:, :, slice(*stretch)])}


def draw(lab: Lab, path: Path) -> None:
    """Both figures by strength, and those of the base at strength 1."""
    near = lab.middle("embedded 1: error")
    with page(path, f"A stretch that is made again fits the rest to {near:.1f} px", (1, 1), 3) as panels:
        for axes, (figure, label) in zip(panels, FIGURES.items(), strict=True):
            for network, colour in (("embedded", plots.COLOURS[0]), ("base", plots.COLOURS[1])):
                at = [strength for name, strength in CASES if name == network]
                names = [f"{network} {strength:g}: {figure}" for strength in at]
                middles, spreads = [lab.middle(name) for name in names], [lab.spread(name) for name in names]
                axes.errorbar(at, middles, spreads, color=colour, marker="o", label=f"{network} model")
            axes.set(xlabel="strength", ylabel=label, ylim=(0, None), xticks=STRENGTHS)
            axes.grid(axis="y")
        panels[0].legend()


def rows(lab: Lab) -> list[Row]:
    told = ", ".join(f"strength {s:g}: {lab.told(f'embedded {s:g}: error')}" for s in STRENGTHS)
    with_it, without = (lab.told(f"{name} 1: error") for name in ("embedded", "base"))
    ours, holds = f"{told}; LoRA off, strength 1: {without}", lab.below("embedded 1: error", "base 1: error")
    short = f"{without} → {with_it}"
    return [Row("a stretch that is made again fits the rest better with the LoRA", "", ours, holds, short)]
