"""Every task is one line: what is put at the start of the video, what at its end, and how noisy it stays there.

The multiplier m_i of a latent frame says how much of the schedule it goes through: 1 is free, made from pure noise; 0
is a clean condition; in between, a condition may still change a little. The delay d_i lets a frame begin later. Both
become the table of noise levels that `flow.euler` walks, steps down and frames across (σ is the shifted schedule):

    τ[k, i] = m_i · σ(clamp((k/K - d_i) / (1 - d_max), 0, 1))

`python tasks.py` prints every task with its table and draws it in outputs/tasks/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flow import shifted
from support import plots
from support.cli import option, parse, run


@dataclass(frozen=True)
class Task:
    """What a task is given and where that goes.

    `start` and `end` name what fills the two ends of the new video: ("image", which), or ("head", which) and
    ("tail", which), the first and the last frames of a video. `latents` counts the latent frames that they fill.
    """

    given: str
    start: tuple[str, int] | None = None
    end: tuple[str, int] | None = None
    latents: tuple[int, int] = (0, 0)
    noise: tuple[float, ...] = ()  # m of the conditions, one for all or one each; the defaults are right for Wan
    images: int | None = 0  # how many are needed; None: any number
    videos: int = 0


TASKS = {
    "t2v": Task("a prompt"),
    "i2v": Task("the first image", ("image", 0), None, (1, 0), (0.2,), images=1),
    "start-end": Task("the first and the last image", ("image", 0), ("image", 1), (1, 1), (0.2, 0.4), images=2),
    "extend": Task("a clip; its tail continues", ("tail", 0), None, (4, 0), (0.0, 0.3, 0.4, 0.5), videos=1),
    "prepend": Task("a clip; what came before it", None, ("head", 0), (0, 4), (0.5, 0.4, 0.3, 0.0), videos=1),
    "complete": Task("the head and the tail of a clip", ("head", 0), ("tail", 0), (2, 2), (0.3,), videos=1),
    "transition": Task("two clips, one to become the other", ("tail", 0), ("head", 1), (2, 2), (0.3,), videos=2),
    "keyframes": Task("images, each at a latent frame of its own", noise=(0.2,), images=None),
    "loop": Task("one image for both ends", ("image", 0), ("image", 0), (1, 1), (0.2, 0.4), images=1),
    "restyle": Task("a clip, noised to a strength and denoised again", ("head", 0), videos=1),
    "stream": Task("a prompt, or a clip to go on from", ("tail", 0), None, (4, 0), (0.0,)),  # the clip is optional
}


class Slot(NamedTuple):
    """A run of condition latents and what it is made of: `vae.encode(cut(slot, pixels))[:, :, slot.drop :]`."""

    source: str  # "image", "head" or "tail"
    index: int  # which of the images, or which of the videos
    positions: tuple[int, ...]  # the latent frames that it fills
    frames: int  # how many pixel frames are encoded
    drop: int  # how many latents are dropped from the front of the encoding


class Plan(NamedTuple):
    """A task laid out on F latent frames: multipliers m (F,), delays d (F,), and the conditions."""

    m: Tensor
    d: Tensor
    given: list[Slot]


def tau_schedule(
    m: Tensor | Sequence[float], K: int, shift: float, d: Tensor | Sequence[float] | None = None
) -> Tensor:
    """The noise level of every frame before each of K steps, and after the last: → τ (K+1,F), fp32.

    m (F,) multipliers in [0,1]; d (F,) delays in [0,1), in shares of the run; shift: the σ schedule's. Without delays
    this is σ[:, None] · m[None]. With them frame i waits at m_i, then takes 1 - d_max of the run: the last one to begin
    ends with the run.
    """
    m = torch.as_tensor(m, dtype=torch.float64)
    d = torch.zeros_like(m) if d is None else torch.as_tensor(d, dtype=torch.float64)
    if m.dim() != 1 or not len(m) or d.shape != m.shape:
        raise ValueError(f"got m {tuple(m.shape)} and d {tuple(d.shape)}, expected one of each for a latent frame")
    if K < 1:
        raise ValueError(f"got {K} steps, expected at least 1: 10 are enough for most videos")
    _check("noise", m, (m >= 0) & (m <= 1), "[0, 1], where 0 keeps a condition clean and 1 leaves the frame free")
    _check("delay", d, (d >= 0) & (d < 1), "[0, 1), a share of the run")
    steps = torch.arange(K + 1, dtype=torch.float64)[:, None]
    u = (1 - (steps / K - d) / (1 - d.max())).clamp(0, 1)
    u[u < 1e-6] = 0  # a frame that ends on a step ends at exactly 0, whatever the rounding
    return (m * shifted(u, shift)).float()


def plan(
    name: str,
    F: int,
    images: int | None = None,
    videos: int | None = None,
    clip_latents: tuple[int, int] | None = None,
    at: Sequence[int] = (),
    noise: Sequence[float] | None = None,
    strength: float = 0.7,
    stagger: float = 0.5,
) -> Plan:
    """Lay a task out on F latent frames. What the user asks for and cannot have is a ValueError.

    images, videos: how many there are, to be checked. None: as many as the task needs.
    clip_latents: how many latents clips fill at the start and at the end. None: as many as `noise` has values if it has
        several, else the task's own. `stream` goes on from a clip if videos is 1 or this is given.
    at: the latent frame (0..F-1) of each image of `keyframes`.
    noise: m of the condition latents, one for all or one each in the order of `Plan.given`. None: the task's own.
    strength: m of every frame of `restyle`.
    stagger: how far the last frame of `stream` lags behind the first, from 0 (all at once) to 1 (one by one). A frame
        takes 1 - d_max of the run: to give each K steps, make the run K / (1 - d_max) steps long.
    """
    if name not in TASKS:
        raise ValueError(f"got task {name!r}, expected one of {', '.join(TASKS)}")
    task = TASKS[name]
    if images is not None and task.images is not None and images != task.images:
        raise ValueError(f"got {images} images for {name}, expected {task.images}: it is given {task.given}")
    if videos is not None and videos != task.videos and not (name == "stream" and videos == 1):
        raise ValueError(f"got {videos} videos for {name}, expected {task.videos}: it is given {task.given}")
    for what, asked, taken in (("noise", noise, task.noise), ("positions", at, name == "keyframes")):
        if asked and not taken:
            raise ValueError(f"got {what} for {name}, expected none: {name} has nothing to put them on")
    if not 0 <= stagger <= 1:
        raise ValueError(f"got stagger {stagger}, expected a number in [0, 1]: 0 is all at once, 1 is one by one")

    if name == "keyframes":
        if not at or images not in (None, len(at)):
            raise ValueError(f"got {len(at)} positions, expected one for each image, as in --at 0,4,8 for three images")
        given = [_slot("image", i, position, 1) for i, position in enumerate(at)]
    else:
        start, end = _ends(name, F, videos, clip_latents, noise)
        given = [_slot(*task.start, 0, start)] if start else []
        given += [_slot(*task.end, F - end, end)] if end else []

    positions = [position for slot in given for position in slot.positions]
    if len(positions) >= F and name != "restyle":
        raise ValueError(f"got {F} latent frames for {name}, expected more than its {len(positions)} conditions fill: "
                         f"ask for at least --frames {pixel_frames(len(positions) + 1)}")  # fmt: skip
    for position in positions:
        if not 0 <= position < F:
            raise ValueError(f"got position {position}, expected 0 to {F - 1}: positions count latent frames, "
                             "and pixel frame n is in latent frame (n + 3) // 4")  # fmt: skip
    if len(set(positions)) < len(positions):
        raise ValueError(f"got positions {positions}, expected each only once: leave out what is there twice")

    noise = tuple((strength,) if name == "restyle" else task.noise if noise is None else noise)
    if len(noise) not in (1, len(positions)) and (noise or positions):
        raise ValueError(f"got {len(noise)} noise values for {len(positions)} condition latents, expected 1 or as many")
    m, d = torch.ones(F), torch.zeros(F)
    if positions:
        m[positions] = torch.tensor(noise, dtype=torch.float32)
    if name == "stream":
        free = F - len(positions)
        d[len(positions) :] = stagger * torch.arange(free) / free
    return Plan(m, d, given)


def cut(slot: Slot, pixels: Tensor) -> Tensor:
    """The pixel frames to encode for a slot, from its image or video: (B,3,n,8H,8W) → (B,3,slot.frames,8H,8W).

    Only frames that the user has are used. The first latent of an encoding is one pixel frame alone, each later one is
    a group of 4 that has seen the frames before it. So what fills k latents from the start of the video is 4(k-1)+1
    frames; what fills k latents further on is 4k+1, whose lone first frame gives the others their past and is dropped:
    the frame to which the generated part leads up. An image further on is 5 still frames, for the same reason.
    """
    if slot.source == "image":
        return pixels[:, :, :1].expand(-1, -1, slot.frames, -1, -1)
    if pixels.shape[2] < slot.frames:
        raise ValueError(f"got a clip of {pixels.shape[2]} frames, expected at least {slot.frames} to fill "
                         f"{len(slot.positions)} latent frames: give a longer one, or let it fill fewer")  # fmt: skip
    return pixels[:, :, : slot.frames] if slot.source == "head" else pixels[:, :, -slot.frames :]


def latent_frames(N: int) -> int:
    """How many latent frames F hold N pixel frames, N = 4(F-1) + 1."""
    if N < 1 or N % 4 != 1:
        below = max(1, N - (N - 1) % 4)
        raise ValueError(f"got {N} frames, expected 4k+1 for a whole k: the nearest are {below} and {below + 4}")
    return (N - 1) // 4 + 1


def pixel_frames(F: int) -> int:
    """How many pixel frames N are in F latent frames, N = 4(F-1) + 1."""
    return 4 * (F - 1) + 1


def latent_index(position: int, N: int) -> int:
    """The latent frame that holds pixel frame `position`, 0..N-1: the first is alone, the others go in groups of 4."""
    if not 0 <= position < N:
        raise ValueError(f"got frame {position}, expected a frame of the video, 0 to {N - 1}")
    return (position + 3) // 4


def table(taus: Tensor) -> str:
    """τ (K+1,F) as text, steps down and frames across; a frame that is exactly clean shows a bare 0."""
    rows = [f"{k:>4} |" + "".join(f"{t:5.2f}" if t else "    0" for t in row) for k, row in enumerate(taus.tolist())]
    return "\n".join(["step |" + "".join(f"{i:>5}" for i in range(taus.shape[1])), *rows])


def _slot(source: str, index: int, position: int, count: int) -> Slot:
    """A slot of `count` latents from `position` on. Past the start they need a latent before them: see `cut`."""
    drop = int(position > 0)
    return Slot(source, index, tuple(range(position, position + count)), pixel_frames(count + drop), drop)


def _ends(
    name: str, F: int, videos: int | None, clip_latents: tuple[int, int] | None, noise: Sequence[float] | None
) -> tuple[int, int]:
    """How many condition latents are at the start and at the end of a video; `plan` says by which rule."""
    task = TASKS[name]
    if name == "restyle":
        return F, 0
    if clip_latents is not None:
        for count, source in zip(clip_latents, (task.start, task.end), strict=True):
            if count < 0 or (count and (source is None or source[0] == "image")):
                raise ValueError(f"got clip_latents {clip_latents}, but {name} is given {task.given}")
        return clip_latents
    if name == "stream" and not videos:
        return 0, 0
    if (task.videos or videos) and noise is not None and len(noise) > 1:
        start = len(noise) * task.latents[0] // sum(task.latents)
        return start, len(noise) - start
    return task.latents


def _check(what: str, values: Tensor, valid: Tensor, expected: str) -> None:
    """Name the first value that is not valid."""
    for i in (~valid).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"got {what} {values[i]:g} for latent frame {i}, expected a number in {expected}")


@dataclass(frozen=True)
class Config:
    """What `python tasks.py` shows."""

    out: str = option("outputs/tasks", "folder for the pictures")
    frames: int = option(33, "pixel frames N, 4k+1")
    steps: int = option(10, "sampling steps K")
    shift: float = option(5.0, "shift of the sigma schedule")


def main() -> None:
    """Print the table of every task, at its default noise, and draw it."""
    config = parse(Config, __doc__)
    F = latent_frames(config.frames)
    for name, task in TASKS.items():
        m, d, given = plan(name, F, at=(0, F // 2, F - 1) if name == "keyframes" else ())
        taus = tau_schedule(m, config.steps, config.shift, d)
        marks = [(slot.source, slot.positions) for slot in given]
        plots.tau_table(Path(config.out) / f"{name}.png", taus, marks, f"{name}: {task.given}")
        print(f"{name}: {task.given}\n\n{table(taus)}\n")
    print(f"pictures: {config.out}")


if __name__ == "__main__":
    run(main)
