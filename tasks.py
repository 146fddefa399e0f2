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
    """What a task is given, and which of it fills the start and the end of the new video."""

    given: str
    start: tuple[str, int] | None = None  # ("image", which), or ("head", which) or ("tail", which) of the videos
    end: tuple[str, int] | None = None
    latents: tuple[int, int] = (0, 0)  # how many latent frames they fill; of more or fewer, each has the same share
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
    "restyle": Task("a clip, noised to a strength and denoised again", ("head", 0), None, (1, 0), videos=1),
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

    m (F,) multipliers in [0,1]; d (F,) delays in [0,1), in shares of the run; shift: the σ schedule's. Frame i waits at
    m_i, then takes 1 - d_max of the run: the last one to begin ends with the run. Without delays τ is σ[:, None] · m.
    """
    m = torch.as_tensor(m, dtype=torch.float64)
    d = torch.zeros_like(m) if d is None else torch.as_tensor(d, dtype=torch.float64)
    if m.dim() != 1 or not len(m) or d.shape != m.shape:
        raise ValueError(f"got m {tuple(m.shape)} and d {tuple(d.shape)}, expected one of each for a latent frame")
    if K < 1:
        raise ValueError(f"got {K} steps, expected at least 1: 10 are enough for most videos")
    for what, values, low_enough, expected in (
        ("noise", m, m <= 1, "[0, 1], where 0 keeps a condition clean and 1 leaves the frame free"),
        ("delay", d, d < 1, "[0, 1), a share of the run"),
    ):
        for i in (~((values >= 0) & low_enough)).nonzero().flatten().tolist():
            raise ValueError(f"got {what} {values[i]:g} for latent frame {i}, expected a number in {expected}")
    steps = torch.arange(K + 1, dtype=torch.float64)[:, None]
    u = (1 - (steps / K - d) / (1 - d.max())).clamp(0, 1)
    u[u < 1e-6] = 0  # a frame that ends on a step ends at exactly 0, whatever the rounding
    return (m * shifted(u, shift)).float()


def place(name: str, F: int, images: int | None, videos: int | None, at: Sequence[int], count: int) -> list[Slot]:
    """Where conditions go on F latent frames: `count` latents of clips, or each image; the rest as in `plan`."""
    task = TASKS[name]
    for what, number, needed in (("images", images, task.images), ("videos", videos, task.videos)):
        if None not in (number, needed) and number != needed and (name, what, number) != ("stream", "videos", 1):
            raise ValueError(f"got {number} {what} for {name}, expected {needed}: it is given {task.given}")
    if at and task.images is not None:
        raise ValueError(f"got positions for {name}, expected none: {name} has nothing to put them on")
    if task.images is None and (not at or images not in (None, len(at))):
        raise ValueError(f"got {len(at)} positions, expected one for each image, as in --at 0,4,8 for three images")
    if name == "restyle":
        count = F
    elif count < 2 or not (task.videos or videos):
        count = 0 if name == "stream" and not videos else sum(task.latents)
    start = count * task.latents[0] // max(1, sum(task.latents))
    runs = [("image", i, position, 1) for i, position in enumerate(at)]
    runs += [(*task.start, 0, start)] if start else []
    runs += [(*task.end, F - count + start, count - start)] if start < count else []
    positions = [first + i for _, _, first, length in runs for i in range(length)]
    if len(positions) >= F and name != "restyle":
        raise ValueError(f"got {F} latent frames for {name}, expected more than its {len(positions)} conditions fill: "
                         f"ask for at least --frames {pixel_frames(len(positions) + 1)}")  # fmt: skip
    for position in positions:
        if not 0 <= position < F:
            raise ValueError(f"got position {position}, expected 0 to {F - 1}: positions count latent frames, "
                             "and pixel frame n is in latent frame (n + 3) // 4")  # fmt: skip
    if len(set(positions)) < len(positions):
        raise ValueError(f"got positions {positions}, expected each only once: leave out what is there twice")
    slots = []
    for source, index, first, length in runs:
        drop = int(first > 0)  # past the start, an encoding needs a latent before it: see `cut`
        slots.append(Slot(source, index, tuple(range(first, first + length)), pixel_frames(length + drop), drop))
    return slots


def plan(
    name: str,
    F: int,
    images: int | None = None,
    videos: int | None = None,
    at: Sequence[int] = (),
    noise: Sequence[float] | None = None,
    strength: float = 0.7,
    stagger: float = 0.5,
) -> Plan:
    """A task laid out on F latent frames. What the user asks for and cannot have is a ValueError.

    images, videos: how many there are; None: as many as the task needs. `stream` may go on from one video.
    at: the latent frame (0..F-1) of each image of `keyframes`.
    noise: m of the condition latents, one for all, or one each: as many as clips then fill. None: the task's own.
    strength: m of every frame of `restyle`.
    stagger: how far the last frame of `stream` lags behind the first, from 0 (all at once) to 1 (one by one). A frame
        takes 1 - d_max of the run: to give each K steps, make the run K / (1 - d_max) steps long.
    """
    if name not in TASKS:
        raise ValueError(f"got task {name!r}, expected one of {', '.join(TASKS)}")
    if noise and not TASKS[name].noise:
        raise ValueError(f"got noise for {name}, expected none: {name} has nothing to put them on")
    if not 0 <= stagger <= 1:
        raise ValueError(f"got stagger {stagger}, expected a number in [0, 1]: 0 is all at once, 1 is one by one")
    slots = place(name, F, images, videos, at, len(noise or ()))
    given = [position for slot in slots for position in slot.positions]
    noise = (strength,) if name == "restyle" else TASKS[name].noise if noise is None else noise
    if len(noise) not in (1, len(given)) and (noise or given):
        raise ValueError(f"got {len(noise)} noise values for {len(given)} condition latents, expected 1 or as many")
    m, d = torch.ones(F), torch.zeros(F)
    m[given] = torch.tensor(noise, dtype=torch.float32)
    if name == "stream":
        d[len(given) :] = stagger * torch.arange(F - len(given)) / (F - len(given))
    return Plan(m, d, slots)


def cut(slot: Slot, pixels: Tensor) -> Tensor:
    """The pixel frames to encode for a slot, from its image or video: (B,3,n,8H,8W) → (B,3,slot.frames,8H,8W).

    The first latent of an encoding is one pixel frame alone, each later one a group of 4 that has seen those before it.
    So k latents at the start of the video take 4(k-1)+1 frames; k latents further on take 4k+1, of which the first only
    gives the others their past and is dropped. An image further on is 5 still frames, for the same reason.
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
        print(f"{name}: {task.given}\n\n{plots.table(taus)}\n")
    print(f"pictures: {config.out}")


if __name__ == "__main__":
    run(main)
