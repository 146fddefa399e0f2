"""The paper: VBench-I2V 87.32 against Wan-I2V's 86.86, with I2V subject 97.64 to 96.95 and background 99.24 to 96.44.

Measured: analogues of VBench's dimensions on the toy world, 0 to 100, where no judge network is needed: `world.measure`
reads colour, shape, size and place of all that a frame shows. `scores` defines them. VBench's aesthetic and imaging
quality and camera motion have none here. The total has VBench's normalisation and weights: the mean of two halves, the
clip against the image and the clip in itself. The finetune and Pusa's LoRA, trained for as many steps, make the same
scenes as the base, which is told one τ for all: so it does best without training.

Read: higher is better, and the true clips, encoded and decoded, show what a perfect model would get. The claim is about
Pusa's LoRA against the finetune; the figures themselves do not compare with VBench's. Every shape here moves, so the
dynamic degree tells no two networks apart. In two dimensions the paper's own figures have Wan-I2V ahead.
"""

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from paper import i2v, score
from paper.efficiency import FINETUNE, PUSA
from paper.lab import BUDGETS, Lab, Row, page
from support import plots
from toy import world

TITLE = "{} better clips from an image, by an analogue of VBench's total"
# The dimensions that are here, with VBench's constants.
AGAINST_THE_IMAGE = {"I2V subject": score.I2V["i2v_subject"], "I2V background": score.I2V["i2v_background"]}
IN_ITSELF = {
    name: score.QUALITY[name.replace(" ", "_")]
    for name in ("subject consistency", "background consistency", "motion smoothness", "dynamic degree")
}
DIMENSIONS = (*AGAINST_THE_IMAGE, *IN_ITSELF, "total")
BASE, TRUE = "base, told one τ", "true clips through the VAE"
NAMES = (BASE, FINETUNE, PUSA, TRUE)


def measure(lab: Lab) -> None:
    """Three evaluations of all scenes, as all dimensions come from the same clips."""
    networks = {BASE: lab.judge.transformer, FINETUNE: partial(i2v.finetuned, lab),
                PUSA: partial(lab.pusa, f"steps-{BUDGETS[-1]}")}  # fmt: skip

    @cache
    def scored(name: str, seed: int) -> dict[str, Tensor]:
        if name == TRUE:
            return scores(lab.judge.decode(lab.latents), lab.judge.truth[:, :, :1])
        settings = {BASE: {"context_noise": 1.0}, FINETUNE: {"taus": i2v.one_level(lab)}}.get(name, {})
        return scores(lab.judge.videos(networks[name](), "i2v", seed, **settings), lab.judge.truth[:, :, :1])

    for name in NAMES:
        for dimension in DIMENSIONS:
            lab.figure(f"{name}: {dimension}", lambda seed, n=name, d=dimension: scored(n, seed)[d])


def scores(videos: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Every dimension of clips (B, 3, N, 64, 64) made from images (B, 3, 1, 64, 64) → (B,) each, 0 to 100 or so.

    I2V subject: likeness of the frames to the image. I2V background: closeness of their backgrounds to the image's.
    subject consistency, background consistency: the same of each frame to the clip's first and to the one before it.
    motion smoothness: see `smoothness`.
    dynamic degree: 1 if some shape goes 16 pixels or more in all, half of what the slowest true one does.
    All but the last two are means over frames.
    """
    read, image = world.measure(videos), world.measure(images)
    bare, bare_image = background(read, videos.device), background(image, images.device)

    def subject(frames: slice, other: world.Readings, others: slice) -> Tensor:
        return likeness(_at(read, frames), _at(other, others)).mean(1)

    def around(frames: slice, pixels: Tensor, free: Tensor, others: slice) -> Tensor:
        a, b = videos[:, :, frames].float(), pixels[:, :, others].float()
        return closeness(a, b, bare[:, frames] & free[:, others]).mean(1).cpu()

    every, first, later, before = slice(None), slice(1), slice(1, None), slice(-1)
    values = {
        "I2V subject": subject(every, image, first),
        "I2V background": around(every, images, bare_image, first),
        "subject consistency": (subject(later, read, first) + subject(later, read, before)) / 2,
        "background consistency": (around(later, videos, bare, first) + around(later, videos, bare, before)) / 2,
        "motion smoothness": smoothness(read),
        "dynamic degree": (travelled(read) >= 16).any(1).float(),
    }
    return {name: 100 * value for name, value in (values | {"total": total(values)}).items()}


def likeness(a: world.Readings, b: world.Readings) -> Tensor:
    """Of the colours that a frame or its counterpart shows, the share both show in one shape and size, (B, N)."""
    alike = a.seen & b.seen & (a.shape == b.shape) & (a.size == b.size)
    return alike.sum(-1) / (a.seen | b.seen).sum(-1).clamp(min=1)


def background(read: world.Readings, device: torch.device) -> Tensor:
    """The pixels that no shape reaches, (B, N, 64, 64) bool."""
    pixels = torch.arange(world.SIDE, device=device) + 0.5
    reach = torch.where(read.seen, 1.2 * torch.tensor([*world.SIZES.values()])[read.size] + 2, 0)
    free = torch.ones(*read.seen.shape[:2], world.SIDE, world.SIDE, dtype=torch.bool, device=device)
    for c in range(len(world.COLOURS)):
        x, y, far = (value[..., c, None, None].to(device) for value in (read.x, read.y, reach))
        free &= ~((pixels - x) ** 2 + (pixels[:, None] - y) ** 2 < far**2)  # where nothing is seen, far is 0
    return free


def closeness(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """1 less the mean difference of frames (B, 3, N, 64, 64) as a share of the range, over pixels `where`, (B, N)."""
    difference = (a - b).abs().mean(1) / 2
    return 1 - (difference * where).sum((-1, -2)) / where.sum((-1, -2)).clamp(min=1)


def smoothness(read: world.Readings) -> Tensor:
    """1 less how far shapes are from midway between the frames around, in units of 4 pixels and at most 1, (B,).

    VBench drops every other frame, makes it anew and compares. A clip without shapes has 0.
    """
    seen, places = read.seen, torch.stack([read.x, read.y], -1)
    off = (places[:, 1:-1] - (places[:, :-2] + places[:, 2:]) / 2).norm(dim=-1) / 4
    known = seen[:, 1:-1] & seen[:, :-2] & seen[:, 2:]
    held = torch.where(known, 1 - off.clamp(max=1), 0.0)
    return held.sum((1, 2)) / known.sum((1, 2)).clamp(min=1)


def travelled(read: world.Readings) -> Tensor:
    """Pixels that the shape of each colour goes, (B, 8), from every fourth frame to the next: jitter is not motion."""
    seen, places = read.seen[:, ::4], torch.stack([read.x, read.y], -1)[:, ::4]
    steps = (places[:, 1:] - places[:, :-1]).norm(dim=-1)
    return torch.where(seen[:, 1:] & seen[:, :-1], steps, 0.0).sum(1)


def total(values: dict[str, Tensor]) -> Tensor:
    """VBench's total of the dimensions that are here, each 0 to 1."""

    return (score.mean(values, AGAINST_THE_IMAGE) + score.mean(values, IN_ITSELF)) / 2


def _at(read: world.Readings, frames: slice) -> world.Readings:
    return world.Readings(*(value[:, frames] for value in read))


def draw(lab: Lab, path: Path) -> None:
    """A row for each dimension, with a mark for each network."""
    better = lab.below(f"{FINETUNE}: total", f"{PUSA}: total", median=False)
    winner = {True: f"{PUSA} makes", False: f"The {FINETUNE} makes", None: "It cannot be told which way makes"}[better]
    with page(path, TITLE.format(winner), height=4) as (axes,):
        places = list(range(len(DIMENSIONS)))
        marks = zip((plots.GREY, *plots.COLOURS[1::-1], "#222222"), "svo|", (-0.24, -0.08, 0.08, 0.24), strict=True)
        for name, (colour, marker, beside) in zip(NAMES, marks, strict=True):
            names = [f"{name}: {dimension}" for dimension in DIMENSIONS]
            scores, spreads = [lab.middle(n, False) for n in names], [lab.spread(n, False) for n in names]
            at = [place + beside for place in places]
            axes.errorbar(scores, at, xerr=spreads, color=colour, marker=marker, linestyle="", label=name)
        axes.set_yticks(places, DIMENSIONS)
        axes.set(xlabel="score, mean over scenes")
        axes.invert_yaxis()
        axes.grid()
        axes.figure.legend(loc="outside lower center", ncols=4)


def rows(lab: Lab) -> list[Row]:
    """Total and dimensions: the paper's figures, ours, and whether Pusa's LoRA is above the finetune."""
    columns = (*score.MEANS, *score.DIMENSIONS)

    def row(dimension: str) -> Row:
        told = {name: lab.told(f"{name}: {dimension}", "", median=False).strip() for name in NAMES}
        short = f"{told[PUSA]} to {told[FINETUNE]}"
        ours = f"{short} ({BASE} {told[BASE]}, {TRUE} {told[TRUE]})"
        at = columns.index(dimension.lower().replace(" ", "_"))
        paper = " to ".join(f"{score.PAPER[f'{who}, paper'][at]:.2f}" for who in ("Pusa", "Wan-I2V"))
        above = lab.below(f"{FINETUNE}: {dimension}", f"{PUSA}: {dimension}", median=False)
        return Row(f"{PUSA} beats the {FINETUNE} in {dimension}", paper, ours, above, short)

    return [row("total"), *map(row, DIMENSIONS[:-1])]
