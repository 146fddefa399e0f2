"""The toy world: captioned clips of moving shapes whose truth is known to the pixel.

One or two shapes slide over a background and bounce off the walls; the caption says all there is to know but the place
where they start, and names two of them from left to right. Because the rules are exact, so is the judgement of a
generated clip: `read` finds shape, colour, size and position of whatever is in a frame. The world is as plain as it can
be, so that two cores can learn it: shapes are large, start on a coarse grid, and two of them never meet.

    python -m toy.world --out data/world --count 4000
"""

import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from support import cli, dataset

SIDE = 64  # pixels, width and height
FRAMES = 33
FPS = 16
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (225, 45, 45), "orange": (250, 140, 20), "yellow": (245, 230, 50), "green": (40, 175, 70),
    "cyan": (50, 215, 225), "blue": (50, 85, 235), "purple": (175, 60, 215), "white": (245, 245, 245),
}  # fmt: skip
SIZES = {"small": 10.0, "large": 16.0}  # radius in pixels
SPEEDS = {"slowly": 1.0, "quickly": 2.0}  # pixels a frame
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = ("black", "grey", "gradient", "checkered")
GRID = 4  # pixels between the places where a shape may start or turn round; a shape moves on by 4 or 8 in a latent
_REACH = 1.2  # no shape reaches farther than this many radii from its centre
_FREE_WAY = 16  # pixels before the first wall, so that the caption's direction can be seen


@dataclass(frozen=True)
class Thing:
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
    """Whether a caption is one of the eighth that no training clip has."""
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
    while True:
        colours = draw.sample(list(COLOURS), count)
        things = tuple(sorted((_random_thing(draw, colour) for colour in colours), key=lambda thing: thing.x))
        if count == 1 or _keep_apart(*things):
            return Scene(draw.choice(BACKGROUNDS), things)


def _random_thing(draw: random.Random, colour: str) -> Thing:
    size, direction = draw.choice(list(SIZES)), draw.choice(list(DIRECTIONS))
    wall = wall_distance(size)
    start = [draw.randrange(wall, SIDE - wall + 1, GRID) for _ in "xy"]
    for axis, step in enumerate(DIRECTIONS[direction]):
        if step:
            run = draw.randrange(wall, SIDE - wall - _FREE_WAY + 1, GRID)
            start[axis] = run if step > 0 else SIDE - run
    return Thing(draw.choice(SHAPES), colour, size, draw.choice(list(SPEEDS)), direction, *map(float, start))


def _keep_apart(a: Thing, b: Thing) -> bool:
    """Whether two things are of different shapes and never touch."""
    gap = (positions(a) - positions(b)).norm(dim=1).min()
    return a.shape != b.shape and gap > _REACH * (SIZES[a.size] + SIZES[b.size]) + 1


def wall_distance(size: str) -> int:
    """Pixels from the border at which a shape's centre turns round: its reach, rounded up to the grid."""
    return math.ceil(_REACH * SIZES[size] / GRID) * GRID


def positions(thing: Thing, frames: int = FRAMES) -> Tensor:
    """Centre of a shape in each frame, (frames, 2) as x and y in pixels: straight lines between the walls."""
    wall = wall_distance(thing.size)
    room = SIDE - 2 * wall
    travelled = torch.arange(frames)[:, None] * SPEEDS[thing.speed] * torch.tensor(DIRECTIONS[thing.direction])
    unfolded = torch.tensor([thing.x, thing.y]) - wall + travelled
    return wall + room - (unfolded % (2 * room) - room).abs()


def render(scene: Scene, frames: int = FRAMES) -> Tensor:
    """The clip of a scene, (3, frames, 64, 64) in [-1, 1], edges smoothed over one pixel."""
    video = _backdrop(scene.background)[:, None].repeat(1, frames, 1, 1)
    for thing in scene.things:
        cover = _cover(thing.shape, positions(thing, frames), SIZES[thing.size])
        video = torch.lerp(video, _rgb(COLOURS[thing.colour])[:, None, None, None], cover)
    return video


def _rgb(colour: tuple[int, int, int]) -> Tensor:
    return torch.tensor(colour) / 127.5 - 1


def _backdrop(name: str) -> Tensor:
    ramp = torch.arange(SIDE) / (SIDE - 1)
    if name == "gradient":
        return torch.lerp(_rgb((20, 25, 60))[:, None, None], _rgb((95, 55, 95))[:, None, None], ramp[:, None]).expand(
            3, SIDE, SIDE
        )
    if name == "checkered":
        cell = torch.arange(SIDE) // 16
        dark = ((cell[:, None] + cell) % 2 == 0)[None]
        return torch.where(dark, _rgb((38, 44, 50))[:, None, None], _rgb((72, 80, 88))[:, None, None])
    return _rgb({"black": (12, 12, 14), "grey": (118, 118, 122)}[name])[:, None, None].expand(3, SIDE, SIDE)


def _cover(shape: str, centres: Tensor, radius: float) -> Tensor:
    """Share of each pixel that a shape covers, (frames, 64, 64), from its signed distance."""
    grid = torch.arange(SIDE) + 0.5
    dx = grid[None, None, :] - centres[:, 0, None, None]
    dy = grid[None, :, None] - centres[:, 1, None, None]
    if shape == "circle":
        distance = (dx**2 + dy**2).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - 0.886 * radius  # the circle's area
    else:  # an equilateral triangle that stands on its base
        distance = torch.maximum(dy, 0.866 * dx.abs() - 0.5 * dy) - 0.5 * _REACH * radius
    return (0.5 - distance).clamp(0, 1)


@dataclass(frozen=True)
class Reading:
    """What `read` finds of one colour in one frame."""

    shape: str
    size: str
    x: float
    y: float


def read(video: Tensor, least: int = 25) -> list[dict[str, Reading]]:
    """Find the shapes of a clip (3, N, 64, 64): for each frame, colour → shape, size and centre.

    A pixel belongs to the colour that it is nearest to, if that is near enough; shape and size are those whose own
    picture at that place overlaps best. Colours with fewer than `least` pixels are left out.
    """
    palette = torch.stack([_rgb(c) for c in COLOURS.values()])
    distance = (video.float()[None] - palette[:, :, None, None, None]).square().sum(1)  # (8, N, 64, 64)
    nearest = distance.min(0)
    found = torch.where(nearest.values < 0.35, nearest.indices, -1)
    frames: list[dict[str, Reading]] = [{} for _ in range(video.shape[1])]
    grid = torch.arange(SIDE) + 0.5
    for index, colour in enumerate(COLOURS):
        masks = (found == index).float()
        for frame, mask in enumerate(masks):
            area = mask.sum()
            if area < least:
                continue
            x, y = ((mask.sum(0) * grid).sum() / area).item(), ((mask.sum(1) * grid).sum() / area).item()
            fits = {}
            for shape in SHAPES:
                for size, radius in SIZES.items():
                    picture = _cover(shape, torch.tensor([[x, y]]), radius)[0]
                    fits[shape, size] = (torch.minimum(picture, mask).sum() / torch.maximum(picture, mask).sum()).item()
            frames[frame][colour] = Reading(*max(fits, key=fits.get), x, y)
    return frames


def write(folder: Path | str, count: int, seed: int, unseen: bool = False, pairs: float = 0.2) -> None:
    """Write `count` clips as mp4 with a caption beside each; clips that are there already are kept."""
    wanted = list(scenes(count, seed, unseen, pairs))
    missing = dataset.missing_clips(folder, [scene.caption for scene in wanted])
    progress = cli.Progress(count, "clips", count - len(missing))
    for index in missing:
        dataset.write_clip(folder, index, render(wanted[index]), FPS, wanted[index].caption)
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
