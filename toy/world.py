"""The toy world: captioned clips of moving shapes whose truth is known to the pixel.

One or two shapes slide over a background and bounce off the walls. The caption says everything but where they start,
and names two shapes from left to right; `measure` finds them in a clip, so that a generated clip can be judged exactly.
`python -m toy.world --out data/world --count 4000` writes clips that two cores can learn from.
"""

import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support import cli, media

SIDE, FRAMES, FPS = 64, 33, 16  # SIDE: width and height in pixels
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (225, 45, 45), "orange": (250, 140, 20), "yellow": (245, 230, 50), "green": (40, 175, 70),
    "cyan": (50, 215, 225), "blue": (50, 85, 235), "purple": (175, 60, 215), "white": (245, 245, 245),
}  # fmt: skip
SIZES = {"small": 10.0, "large": 16.0}  # radius in pixels
SPEEDS = {"slowly": 1.0, "quickly": 2.0}  # pixels a frame
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = {  # from one colour to another
    "black": ((12, 12, 14), (12, 12, 14)), "grey": ((118, 118, 122), (118, 118, 122)),
    "gradient": ((20, 25, 60), (95, 55, 95)), "checkered": ((38, 44, 50), (72, 80, 88)),
}  # fmt: skip
GRID = 4  # pixels between the places where a shape may start or turn round; in a latent frame it moves on by 4 or 8
_REACH = 1.2  # no shape reaches farther than this many radii from its centre
# Pixels from the border at which a shape's centre turns round: its reach, rounded up to the grid.
_WALLS = {size: math.ceil(_REACH * radius / GRID) * GRID for size, radius in SIZES.items()}


class Thing(NamedTuple):
    shape: str
    colour: str
    size: str
    speed: str
    direction: str
    x: float  # centre of mass in the first frame, pixels
    y: float


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        named = [f"a {t.size} {t.colour} {t.shape} moving {t.direction} {t.speed}" for t in self.things]
        return f"{' and '.join(named)} on a {self.background} background"


def held_out(caption: str) -> bool:
    """Whether a caption is in the eighth that no training clip has."""
    return zlib.crc32(caption.encode()) % 8 == 0


def scenes(count: int, seed: int, unseen: bool = False, pairs: float = 0.2) -> Iterator[Scene]:
    """`count` random scenes, a share `pairs` of them with two shapes; with `unseen`, only held-out captions."""
    if count < 0 or not 0 <= pairs <= 1:
        raise ValueError(f"got {count} scenes, {pairs:g} of them pairs, expected a count and a share between 0 and 1")
    draw = random.Random(seed)
    while count:
        scene = _random_scene(draw, 2 if draw.random() < pairs else 1)
        if held_out(scene.caption) == unseen:
            count -= 1
            yield scene


def _random_scene(draw: random.Random, count: int) -> Scene:
    """A scene of one shape, or of two that differ and never touch."""
    while True:
        colours = draw.sample(list(COLOURS), count)
        things = tuple(sorted((_random_thing(draw, colour) for colour in colours), key=lambda thing: thing.x))
        a, b = things[0], things[-1]
        gap, reach = (positions(a) - positions(b)).norm(dim=1).min(), _REACH * (SIZES[a.size] + SIZES[b.size])
        if count == 1 or (a.shape != b.shape and gap > reach + 1):
            return Scene(draw.choice(list(BACKGROUNDS)), things)


def _random_thing(draw: random.Random, colour: str) -> Thing:
    size, direction = draw.choice(list(SIZES)), draw.choice(list(DIRECTIONS))
    wall = _WALLS[size]
    start = [draw.randrange(wall, SIDE - wall + 1, GRID) for _ in "xy"]
    for axis, step in enumerate(DIRECTIONS[direction]):
        if step:
            run = draw.randrange(wall, SIDE - wall - 16 + 1, GRID)  # 16 pixels to the first wall show the direction
            start[axis] = run if step > 0 else SIDE - run
    return Thing(draw.choice(SHAPES), colour, size, draw.choice(list(SPEEDS)), direction, *map(float, start))


def positions(thing: Thing, frames: int = FRAMES) -> Tensor:
    """Centre of a shape in each frame, (frames, 2) as x and y in pixels: straight lines between the walls."""
    wall, room = _WALLS[thing.size], SIDE - 2 * _WALLS[thing.size]
    travelled = torch.arange(frames)[:, None] * SPEEDS[thing.speed] * torch.tensor(DIRECTIONS[thing.direction])
    unfolded = torch.tensor([thing.x, thing.y]) - wall + travelled
    return wall + room - (unfolded % (2 * room) - room).abs()


def render(scene: Scene, frames: int = FRAMES) -> Tensor:
    """The clip of a scene, (3, frames, 64, 64) in [-1, 1], edges smoothed over one pixel."""
    first, second = _rgb(BACKGROUNDS[scene.background])[:, :, None, None]
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    share = (y // 16 + x // 16) % 2 if scene.background == "checkered" else y / (SIDE - 1)  # of the second colour
    video = torch.lerp(first, second, share.float())[:, None].repeat(1, frames, 1, 1)
    for thing in scene.things:
        cover = _cover(thing.shape, positions(thing, frames), SIZES[thing.size])
        video = torch.lerp(video, _rgb(COLOURS[thing.colour])[:, None, None, None], cover)
    return video


def _rgb(colours: tuple) -> Tensor:
    return torch.tensor(colours) / 127.5 - 1


def _cover(shape: str, centres: Tensor, radius: float) -> Tensor:
    """Share of each pixel that a shape covers, (..., 64, 64), by its distance from the edge; centres: (..., 2)."""
    pixels = torch.arange(SIDE, device=centres.device) + 0.5  # the middle of each
    dx = pixels - centres[..., 0, None, None]  # (..., 1, 64)
    dy = pixels[:, None] - centres[..., 1, None, None]  # (..., 64, 1)
    if shape == "circle":
        distance = (dx**2 + dy**2).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - 0.886 * radius  # the circle's area
    else:  # an equilateral triangle that stands on its base
        distance = torch.maximum(dy, 0.866 * dx.abs() - 0.5 * dy) - 0.5 * _REACH * radius
    return (0.5 - distance).clamp(0, 1)


class Readings(NamedTuple):
    """What is seen of each colour in each frame, all (B, N, 8) in the order of `COLOURS`, on the CPU."""

    seen: Tensor  # bool
    shape: Tensor  # index into SHAPES
    size: Tensor  # index into SIZES
    x: Tensor  # centre of mass, pixels; NaN where nothing has that colour
    y: Tensor


def measure(videos: Tensor, least: int = 25) -> Readings:
    """Find the shapes of clips (B, 3, N, 64, 64), frame by frame, on the clips' device.

    A pixel belongs to the nearest colour, if that is near enough. Colours with fewer than `least` pixels are not seen.
    Shape and size are those that overlap the pixels of a colour best when drawn at their centre.
    """
    parts = [Readings(*(x.cpu() for x in _measured(part, least))) for part in videos.split(8)]  # more leave the cache
    return Readings(*map(torch.cat, zip(*parts, strict=True)))


def _measured(videos: Tensor, least: int) -> Readings:
    device = videos.device
    palette = _rgb(tuple(COLOURS.values())).to(device)[:, :, None, None, None]
    distance = (videos.float()[:, None] - palette).square().sum(2)  # (B, 8, N, 64, 64)
    nearest = torch.where(distance.amin(1) < 0.35, distance.argmin(1), -1)
    mask = (nearest[:, :, None] == torch.arange(len(COLOURS), device=device)[:, None, None]).float()  # (B, N, 8, ...)
    count, pixels = mask.sum((-1, -2)), torch.arange(SIDE, device=device) + 0.5
    x, y = ((mask.sum(dim) * pixels).sum(-1) / count for dim in (-2, -1))
    seen, overlaps = count >= least, torch.zeros(*count.shape, len(SHAPES) * len(SIZES), device=device)
    centres, found = torch.stack([x, y], -1)[seen], mask[seen]  # of the few that are seen, (n, 2) and (n, 64, 64)
    drawn = (_cover(shape, centres, radius) for shape, radius in product(SHAPES, SIZES.values()))
    both = [(torch.minimum(d, found).sum((1, 2)), torch.maximum(d, found).sum((1, 2))) for d in drawn]
    overlaps[seen] = torch.stack([shared / either for shared, either in both], -1)
    best = overlaps.argmax(-1)
    return Readings(seen, best // len(SIZES), best % len(SIZES), x, y)


def write(folder: Path | str, count: int, seed: int, unseen: bool = False, pairs: float = 0.2) -> None:
    """Write `count` clips as mp4 with a caption beside each; clips that are there already stay."""
    wanted = list(scenes(count, seed, unseen, pairs))
    missing = media.missing_clips(folder, [scene.caption for scene in wanted])
    progress = cli.Progress(count, "clips", count - len(missing))
    for index in missing:
        media.write_clip(folder, index, render(wanted[index]), FPS, wanted[index].caption)
        progress.step()


@dataclass(frozen=True)
class WorldConfig:
    out: str = cli.option("data/world", "folder to write the clips to")
    count: int = cli.option(4000, "number of clips")
    seed: int = cli.option(0, "seed of the scenes")
    unseen: bool = cli.option(False, "write clips with the captions that training never sees")
    pairs: float = cli.option(0.2, "share of the clips that have two shapes")


def main() -> None:
    config = cli.parse(WorldConfig, __doc__)
    write(config.out, config.count, config.seed, config.unseen, config.pairs)
    print(f"{config.count} clips in {config.out}")


if __name__ == "__main__":
    cli.run(main)
