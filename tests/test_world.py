"""world.py: scenes that obey their rules, captions that tell the truth, and an analyser that finds it again."""

import itertools
import math
import re
from typing import NamedTuple

import pytest
import torch
from small import call, mistake
from torch import Tensor

from support import dataset, media
from toy import world
from toy.world import Scene, Thing

MIDDLE = world.SIDE / 2


class Reading(NamedTuple):
    shape: str
    size: str
    x: float  # centre of mass, pixels
    y: float


def read(video: Tensor, least: int = 25) -> list[dict[str, Reading]]:
    """The shapes of one clip (3, N, 64, 64), as `measure` finds them: for each frame, colour → what is seen of it."""
    seen, *rest = (values[0].tolist() for values in world.measure(video[None], least))
    shapes, sizes = tuple(world.SHAPES), tuple(world.SIZES)
    return [
        {colour: Reading(shapes[rest[0][n][c]], sizes[rest[1][n][c]], rest[2][n][c], rest[3][n][c])
         for c, colour in enumerate(world.COLOURS) if seen[n][c]}
        for n in range(len(seen))
    ]  # fmt: skip


def _thing(shape="circle", colour="red", size="large", speed="slowly", direction="right", x=MIDDLE, y=MIDDLE):
    return Thing(shape, colour, size, speed, direction, x, y)


def _bounds(thing):
    wall = {"small": 12, "large": 20}[thing.size]
    return wall, world.SIDE - wall


# Scenes


def test_scenes_follow_from_the_seed():
    assert list(world.scenes(20, seed=3)) == list(world.scenes(20, seed=3))
    assert list(world.scenes(5, seed=3)) == list(world.scenes(20, seed=3))[:5]
    assert list(world.scenes(20, seed=3)) != list(world.scenes(20, seed=4))
    assert list(world.scenes(0, seed=3)) == []


def test_scenes_have_one_shape_or_two_that_differ():
    scenes = list(world.scenes(600, seed=0))
    pairs = [scene.things for scene in scenes if len(scene.things) == 2]
    assert {len(scene.things) for scene in scenes} == {1, 2}
    assert len(pairs) / len(scenes) == pytest.approx(0.2, abs=0.05)
    for a, b in pairs:
        assert a.colour != b.colour and a.shape != b.shape
        assert a.x <= b.x, "named from left to right"
        gap = (world.positions(a) - world.positions(b)).norm(dim=1).min()
        assert gap > 1.2 * (world.SIZES[a.size] + world.SIZES[b.size]), "they never touch"
    for scene in scenes:
        assert all(place % world.GRID == 0 for thing in scene.things for place in (thing.x, thing.y))
    assert all(len(scene.things) == 1 for scene in world.scenes(30, seed=0, pairs=0.0))
    assert all(len(scene.things) == 2 for scene in world.scenes(30, seed=0, pairs=1.0))


def test_scenes_use_every_word():
    scenes = list(world.scenes(300, seed=1))
    things = [thing for scene in scenes for thing in scene.things]
    for words, used in (
        (world.SHAPES, {t.shape for t in things}),
        (world.COLOURS, {t.colour for t in things}),
        (world.SIZES, {t.size for t in things}),
        (world.SPEEDS, {t.speed for t in things}),
        (world.DIRECTIONS, {t.direction for t in things}),
        (world.BACKGROUNDS, {scene.background for scene in scenes}),
    ):
        assert used == set(words)


def test_captions_say_what_is_there():
    assert Scene("grey", (_thing(),)).caption == "a large red circle moving right slowly on a grey background"
    clause = re.compile(r"a (\w+) (\w+) (\w+) moving (\w+) (\w+)")
    for scene in world.scenes(200, seed=2):
        things, background = scene.caption.rsplit(" on a ", 1)
        assert background == f"{scene.background} background"
        said = [clause.fullmatch(text).groups() for text in things.split(" and ")]
        assert said == [(t.size, t.colour, t.shape, t.direction, t.speed) for t in scene.things]


def test_an_eighth_of_the_captions_is_held_out():
    words = itertools.product(
        world.SHAPES, world.COLOURS, world.SIZES, world.SPEEDS, world.DIRECTIONS, world.BACKGROUNDS
    )
    captions = [Scene(background, (_thing(*kind),)).caption for *kind, background in words]
    assert len(set(captions)) == 1536
    # 188 of 1536, for ever: clips and models that exist depend on which captions these are.
    assert sum(map(world.held_out, captions)) == 188


def test_training_and_held_out_scenes_share_no_caption():
    seen = {scene.caption for scene in world.scenes(400, seed=0)}
    unseen = {scene.caption for scene in world.scenes(400, seed=0, unseen=True)}
    assert seen and unseen and not seen & unseen
    assert not any(map(world.held_out, seen)) and all(map(world.held_out, unseen))


# Motion


@pytest.mark.parametrize("size", world.SIZES)
@pytest.mark.parametrize("speed", world.SPEEDS)
@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_positions_are_a_ball_between_walls(size, speed, direction):
    thing = _thing(size=size, speed=speed, direction=direction, x=23.3, y=29.7)
    low, high = _bounds(thing)
    step = list(world.DIRECTIONS[direction])
    at, expected = [thing.x, thing.y], []
    for _ in range(200):  # enough to meet both walls, whatever the speed
        expected.append(list(at))
        for axis in (0, 1):
            at[axis] += step[axis] * world.SPEEDS[speed]
            if not low <= at[axis] <= high:
                at[axis] = 2 * (high if at[axis] > high else low) - at[axis]
                step[axis] = -step[axis]
    found = world.positions(thing, 200)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-3)
    across = 1 if direction in ("left", "right") else 0
    assert found[:, across].unique().numel() == 1
    assert found[:, 1 - across].min() < low + 2 and found[:, 1 - across].max() > high - 2


@pytest.mark.parametrize("direction, step", [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))])
@pytest.mark.parametrize("speed, pixels", [("slowly", 1), ("quickly", 2)])
def test_words_of_motion_mean_what_they_say(direction, step, speed, pixels):
    path = world.positions(_thing(direction=direction, speed=speed), 3)  # y grows downwards
    assert (path[1] - path[0]).tolist() == pytest.approx([pixels * step[0], pixels * step[1]], abs=1e-4)


def test_the_direction_can_be_seen_before_the_first_wall():
    for scene in world.scenes(300, seed=5):
        for thing in scene.things:
            low, high = _bounds(thing)
            path = world.positions(thing)
            assert path.min() >= low - 1e-4 and path.max() <= high + 1e-4
            frames = int(16 / world.SPEEDS[thing.speed])
            way = torch.tensor(world.DIRECTIONS[thing.direction]) * 16.0
            torch.testing.assert_close(path[frames] - path[0], way, rtol=0, atol=1e-3)


# Pictures


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_clips_are_pictures_in_range(background):
    video = world.render(Scene(background, (_thing(),)))
    assert video.shape == (3, 33, 64, 64) and -1 <= video.min() and video.max() <= 1
    empty = world.render(Scene(background, ()), 2)
    assert torch.equal(empty[:, 0], empty[:, 1])
    corner = video[:, 0, :10, :10]
    assert torch.equal(corner, empty[:, 0, :10, :10])
    red = torch.tensor(world.COLOURS["red"]) / 127.5 - 1
    torch.testing.assert_close(video[:, 0, 32, 32], red)


def test_backgrounds_differ():
    pictures = [world.render(Scene(background, ()), 1) for background in world.BACKGROUNDS]
    assert all((a - b).abs().max() > 0.2 for a, b in itertools.combinations(pictures, 2))


@pytest.mark.parametrize("shape, area", [("circle", math.pi), ("square", math.pi), ("triangle", 3**1.5 * 0.6**2)])
def test_shapes_have_their_centre_and_size(shape, area):
    cover = world._cover(shape, torch.tensor([[30.25, 33.5]]), 12.0)[0]
    grid = torch.arange(64) + 0.5
    centre = [((cover.sum(dim) * grid).sum() / cover.sum()).item() for dim in (0, 1)]
    assert centre == pytest.approx([30.25, 33.5], abs=0.15)
    assert cover.sum().item() == pytest.approx(area * 12**2, rel=0.03)
    reach = (grid[None] - 30.25).square() + (grid[:, None] - 33.5).square()
    assert reach[cover > 0.5].max().sqrt() <= 1.2 * 12 + 0.5
    assert (0.2 < cover).logical_and(cover < 0.8).any()  # edges are smooth


def test_the_later_shape_passes_over_the_earlier():
    red, blue = _thing(colour="red"), _thing(colour="blue", size="small")
    over = world.render(Scene("black", (red, blue)), 1)[:, 0, 32, 32]
    under = world.render(Scene("black", (blue, red)), 1)[:, 0, 32, 32]
    assert over[2] > 0.5 > over[0] and under[0] > 0.5 > under[2]


# The analyser


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_reading_finds_every_shape(background):
    for shape, colour, size in itertools.product(world.SHAPES, world.COLOURS, world.SIZES):
        thing = _thing(shape, colour, size, "quickly", "right", _bounds(_thing(size=size))[0], 30.3)
        video = world.render(Scene(background, (thing,)))[:, ::8]  # from one wall to the other and on
        for found, (x, y) in zip(read(video), world.positions(thing)[::8].tolist(), strict=True):
            assert set(found) == {colour}, thing
            reading = found[colour]
            assert (reading.shape, reading.size) == (shape, size), thing
            assert (reading.x, reading.y) == pytest.approx((x, y), abs=0.5), thing


@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_reading_follows_a_shape_over_a_whole_clip(direction):
    thing = _thing("triangle", "yellow", "small", "quickly", direction, 30.6, 33.2)
    found = read(world.render(Scene("checkered", (thing,))))
    path = torch.tensor([[frame["yellow"].x, frame["yellow"].y] for frame in found])
    torch.testing.assert_close(path, world.positions(thing), rtol=0, atol=0.5)


def test_reading_finds_both_of_a_pair():
    for scene in world.scenes(12, seed=6, pairs=1.0):
        paths = [world.positions(thing)[::8].tolist() for thing in scene.things]
        for frame, found in enumerate(read(world.render(scene)[:, ::8])):
            assert set(found) == {thing.colour for thing in scene.things}
            for thing, path in zip(scene.things, paths, strict=True):
                reading = found[thing.colour]
                assert (reading.shape, reading.size) == (thing.shape, thing.size)
                assert (reading.x, reading.y) == pytest.approx(path[frame], abs=0.5)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_reading_finds_nothing_where_nothing_is(background):
    assert read(world.render(Scene(background, ()), 3)) == [{}, {}, {}]
    noisy = world.render(Scene(background, ()), 1) + 0.05 * torch.randn(3, 1, 64, 64)
    assert read(noisy) == [{}]


def test_reading_says_when_a_shape_has_gone():
    video = world.render(Scene("grey", (_thing(),)), 3)
    video[:, 1] = world.render(Scene("grey", ()), 1)[:, 0]
    assert [set(found) for found in read(video)] == [{"red"}, set(), {"red"}]
    assert read(video, least=64 * 64) == [{}, {}, {}]


def test_reading_takes_bf16_and_noise():
    thing = _thing("square", "green", "small")
    video = world.render(Scene("gradient", (thing,)), 2)
    for changed in (video.bfloat16(), video + 0.15 * torch.randn_like(video)):
        reading = read(changed)[0]["green"]
        assert (reading.shape, reading.size) == ("square", "small")
        assert (reading.x, reading.y) == pytest.approx((MIDDLE, MIDDLE), abs=0.5)


# Files


def test_write_makes_clips_and_captions_and_keeps_them(tmp_path):
    folder = tmp_path / "world" / "clips"
    world.write(folder, 2, seed=7)
    names = ["00000.mp4", "00000.txt", "00001.mp4", "00001.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    scenes = list(world.scenes(3, seed=7))
    assert (folder / "00001.txt").read_text(encoding="utf-8") == scenes[1].caption + "\n"
    assert dataset.find_clips(folder)[0].caption == scenes[0].caption

    # What is complete stays; a clip that was cut off before its caption is made again.
    (folder / "00000.mp4").write_bytes(b"mine")
    (folder / "00001.mp4").write_bytes(b"half")
    (folder / "00001.txt").unlink()
    world.write(folder, 3, seed=7)
    assert len(list(folder.iterdir())) == 6
    assert (folder / "00000.mp4").read_bytes() == b"mine"
    assert (folder / "00001.mp4").stat().st_size > 1000
    assert (folder / "00002.txt").read_text(encoding="utf-8") == scenes[2].caption + "\n"


def test_clips_of_another_seed_are_not_taken_for_these(tmp_path):
    world.write(tmp_path, 1, seed=7)
    with pytest.raises(ValueError, match="has the caption of another clip; choose another --out"):
        world.write(tmp_path, 1, seed=8)


def test_written_clips_can_still_be_read(tmp_path):
    world.write(tmp_path, 1, seed=8, unseen=True)
    (scene,) = world.scenes(1, seed=8, unseen=True)
    video = media.read_video(tmp_path / "00000.mp4")
    assert video.shape == (3, 33, 64, 64)
    assert torch.equal(media.read_video(tmp_path / "00000.mp4", fps=16), video)  # the rate that it was written at
    assert (video - world.render(scene)).square().mean().sqrt() < 0.1
    for thing in scene.things:
        for found, at in zip(read(video[:, ::4]), world.positions(thing)[::4].tolist(), strict=True):
            reading = found[thing.colour]
            assert (reading.shape, reading.size) == (thing.shape, thing.size)
            assert (reading.x, reading.y) == pytest.approx(at, abs=0.6)


@pytest.mark.parametrize("flags", [["--count", "-1"], ["--pairs", "2"], ["--pairs", "nan"]])
def test_what_is_no_number_of_scenes_is_refused(flags, tmp_path):
    mistake(call(world, "--out", tmp_path / "out", *flags), flags[1], "expected a count and a share")
    assert not (tmp_path / "out").exists()
