"""Every task is one line: what is put at the start of the video, what at its end, and how noisy it stays there.

The multiplier m_i of a latent frame says how much of the schedule it goes through: 1 is free, made from pure noise; 0
is a clean condition; a condition in between may still change a little. The delay d_i lets a frame begin later. Both
become the table of noise levels that `flow.euler` walks, steps down and frames across (σ is the shifted schedule):

    τ[k, i] = m_i · σ(1 - clamp((k/K - d_i) / (1 - d_max), 0, 1))

`python tasks.py` prints every task with its table and draws it in outputs/tasks/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flow import shifted
from support import plots
from support.cli import expect, latent_frames, latent_index, option, parse, pixel_frames, replacing, run


class Task(NamedTuple):
    given: str
    start: tuple[str, int] | None = None  # ("image", which), or ("head", which) or ("tail", which) of the videos
    end: tuple[str, int] | None = None
    latents: tuple[int, int] = (0, 0)  # latent frames at start and end; more or fewer noise values split in this ratio
    noise: tuple[float, ...] = ()  # m of the conditions, one for all or one each; the defaults are right for Wan
    images: int | None = 0  # how many are needed; None: any number
    videos: int | None = 0


TASKS = {
    "t2v": Task("a prompt"),
    "i2v": Task("the first image", ("image", 0), None, (1, 0), (0.2,), images=1),
    "start-end": Task("the first and the last image", ("image", 0), ("image", 1), (1, 1), (0.2, 0.4), images=2),
    "extend": Task("a clip; its tail continues", ("tail", 0), None, (4, 0), (0.0, 0.3, 0.4, 0.5), videos=1),
    "prepend": Task("a clip; what came before it", None, ("head", 0), (0, 4), (0.5, 0.4, 0.3, 0.0), videos=1),
    "complete": Task("the head and the tail of a clip", ("head", 0), ("tail", 0), (2, 2), (0.3,), videos=1),
    "transition": Task("two clips, one to become the other", ("tail", 0), ("head", 1), (2, 2), (0.3,), videos=2),
    "keyframes": Task("images and clips, each from a latent frame on", noise=(0.2,), images=None, videos=None),
    "loop": Task("one image for both ends", ("image", 0), ("image", 0), (1, 1), (0.2, 0.4), images=1),
    "restyle": Task("a clip, noised to a strength and denoised again", ("head", 0), None, (1, 0), videos=1),
    "retake": Task("a clip, of which a stretch is made again", ("head", 0), None, (1, 0), videos=1),
    "stream": Task("a prompt, or a clip to go on from", ("tail", 0), None, (4, 0), (0.0,)),  # the clip is optional
}


class Slot(NamedTuple):
    """A run of condition latents and what it is made of: `vae.encode(cut(slot, pixels))[:, :, slot.drop :]`."""

    source: str  # "image", "head" or "tail"
    index: int  # which of the images, or which of the videos
    positions: tuple[int, ...]  # the latent frames that it fills
    frames: int  # how many pixel frames are encoded
    drop: int  # how many latents are dropped from the front: 0 at the video's start, 1 further on (see `cut`)


class Plan(NamedTuple):
    m: Tensor  # (F,) multipliers in [0, 1]
    d: Tensor  # (F,) delays in [0, 1), as fractions of the run
    slots: list[Slot]  # what is given


def plan(
    name: str, F: int,
    images: int | None = None, videos: int | None = None,  # how many there are; None: as many as the task needs
    at: Sequence[int] = (),  # `keyframes`: the first latent frame of each image, then of each clip
    noise: Sequence[float] | None = None,  # m of the conditions: one for all or one each; clips fill as many latents
    strength: float = 0.7,  # `restyle`: m of every frame; `retake`: of those in the stretch
    stagger: float = 0.5,  # `stream`: how far the last frame lags behind the first, 0 (all at once) to 1 (one by one)
    lengths: Sequence[int] = (),  # `keyframes`: pixel frames of each clip
    stretch: tuple[int, int] | None = None,  # `retake`: its first pixel frame and its end
) -> Plan:  # fmt: skip
    """A task laid out on F latent frames. ValueError for what the user cannot ask of it."""
    expect(name in TASKS, f"task {name!r}", f"one of {', '.join(TASKS)}")
    task = TASKS[name]
    for what, number, needed in (("images", images, task.images), ("videos", videos, task.videos)):
        right = None in (number, needed) or number == needed or (name, what, number) == ("stream", "videos", 1)
        expect(right, f"{number} {what} for {name}", f"{needed}: it is given {task.given}")
    for what, values, wanted in (("positions", at, task.images is None), ("noise", noise, task.noise)):
        expect(wanted or not values, f"{what} for {name}", f"none: {name} has nothing to put them on")
    right = task.images is not None or (at and (images is None or len(at) == images + len(lengths)))
    expect(right, f"{len(at)} positions", "one for each image and clip, as in --at 0,4,8 for three")
    again = {latent_index(n, pixel_frames(F)) for n in range(*(stretch or (0, pixel_frames(F))))}
    usual = [strength * (i in again) for i in range(F)] if task.videos and not task.noise else task.noise
    noise = usual if noise is None else noise
    clips = videos or task.videos
    count = len(noise) if clips and len(noise) > 1 else sum(task.latents) if clips or task.images else 0
    slots = place(name, F, count, at, lengths)
    filled = [position for slot in slots for position in slot.positions]
    m, d = torch.ones(F), torch.zeros(F)
    expect(len(noise) in (1, len(filled)), f"{len(noise)} noise values for {len(filled)} condition latents", "1 or all")
    m[filled] = torch.tensor(noise, dtype=m.dtype)
    if name == "stream":
        d[len(filled) :] = stagger * torch.arange(F - len(filled)) / (F - len(filled))
    return Plan(m, d, slots)


def place(name: str, F: int, count: int, at: Sequence[int] = (), lengths: Sequence[int] = ()) -> list[Slot]:
    """Where conditions go on F latent frames: images and clips `at` their positions, or `count` latents at the ends."""
    task = TASKS[name]
    start = count * task.latents[0] // max(1, sum(task.latents))
    inputs = [("image", i, 1) for i in range(len(at) - len(lengths))] + [("head", i, n) for i, n in enumerate(lengths)]
    runs = [(x[:2], range(p, p + max(1, latent_frames(x[2]) - (p > 0)))) for x, p in zip(inputs, at, strict=True)]
    runs = runs or [(task.start, range(start)), (task.end, range(F - count + start, F))]
    filled = [position for _, positions in runs for position in positions]
    more = f"more than its {len(filled)} conditions fill: ask for at least --frames {pixel_frames(len(filled) + 1)}"
    expect(len(filled) < F or not task.noise, f"{F} latent frames for {name}", more)
    once = f"each only once, and 0 to {F - 1}: pixel frame n is in latent (n + 3) // 4"
    expect(len({*filled} & {*range(F)}) == len(filled), f"positions {filled}", once)
    return [Slot(*which, tuple(p), pixel_frames(len(p) + (p[0] > 0)), int(p[0] > 0)) for which, p in runs if p]


def tau_schedule(m: Tensor | Sequence, K: int, shift: float, d: Tensor | Sequence | None = None) -> Tensor:
    """The noise level of every frame before each of K steps, and after the last: → τ (K+1,F), fp32.

    m and d (F,) are a `Plan`'s, shift the σ schedule's. Frame i waits at m_i for d_i of the run, then takes 1 - d_max
    of it, so the last one to begin ends with the run. Without delays τ is σ[:, None] · m.
    """
    m = torch.as_tensor(m, dtype=torch.float64)
    d = torch.zeros_like(m) if d is None else torch.as_tensor(d, dtype=torch.float64)
    right = m.dim() == 1 and m.shape == d.shape != (0,)
    expect(right, f"m {tuple(m.shape)} and d {tuple(d.shape)}", "one of each for a latent frame")
    expect(K >= 1, f"{K} steps", "at least 1: 10 are enough for most videos")
    for i, (noise, delay) in enumerate(zip(m.tolist(), d.tolist(), strict=True)):
        expect(0 <= noise <= 1, f"noise {noise:g} for latent frame {i}", "a number in [0, 1]: 0 is clean, 1 is free")
        expect(0 <= delay < 1, f"delay {delay:g} for latent frame {i}", "a number in [0, 1), a share of the run")
    u = (1 - (torch.arange(K + 1, dtype=m.dtype)[:, None] / K - d) / (1 - d.max())).clamp(0, 1)
    u[u < 1e-6] = 0  # a frame that ends on a step ends at exactly 0, whatever the rounding
    return (m * shifted(u, shift)).float()


def cut(slot: Slot, pixels: Tensor) -> Tensor:
    """The pixel frames to encode for a slot, from its image or video: (B,3,n,8H,8W) → (B,3,slot.frames,8H,8W).

    An encoding's first latent is one frame alone, each later one 4 frames that have seen those before. So k latents at
    the video's start take 4(k-1)+1 frames; further on 4k+1, of which the first only gives the others their past, and
    its latent is dropped. For the same reason an image further on is 5 still frames.
    """
    if slot.source == "image":
        return pixels[:, :, :1].expand(-1, -1, slot.frames, -1, -1)
    n = pixels.shape[2]
    expect(n >= slot.frames, f"a clip of {n} frames", f"at least {slot.frames}: give a longer one, or less --noise")
    return pixels[:, :, : slot.frames] if slot.source == "head" else pixels[:, :, -slot.frames :]


@dataclass(frozen=True)
class Config:
    out: str = option("outputs/tasks", "folder for the pictures")
    frames: int = option(33, "pixel frames N, 4k+1")
    steps: int = option(10, "sampling steps K")
    shift: float = option(5.0, "shift of the sigma schedule")


def main() -> None:
    config = parse(Config, __doc__)
    F = latent_frames(config.frames)
    at, stretch = {"keyframes": (0, F // 2, F - 1)}, {"retake": (F, 3 * F)}
    plans = [plan(name, F, at=at.get(name, ()), stretch=stretch.get(name)) for name in TASKS]
    for (name, task), (m, d, slots) in zip(TASKS.items(), plans, strict=True):
        taus = tau_schedule(m, config.steps, config.shift, d)
        marks = [(slot.source, slot.positions) for slot in slots]
        with replacing(f"{config.out}/{name}.png") as path:
            plots.tau_table(path, taus, marks, f"{name}: {task.given}")
        print(f"{name}: {task.given}\n\n{plots.table(taus)}\n")
    print(f"pictures: {config.out}")


if __name__ == "__main__":
    run(main)
