"""Beyond the paper: a stream that remembers. One ramp of noise levels that never restarts (`roll`), any length.

Measured against the windows of `sample.py`, each conditioned on the end of the one before, over thirty seconds that go
on from thirteen given frames, so that the truth is exact: at each second, whether the shapes have their colours, shapes
and sizes, how far they are from where they must be, and how far the background has drifted. The prompt says how the
clip begins: it is wrong once a shape has bounced.
"""

import math
import textwrap
from collections.abc import Iterator
from functools import cache, partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Generator, Tensor

import flow
import sample
import tasks
from model import Wan
from paper.lab import Lab, Row, page
from support import plots
from toy import world
from toy.judge import centroid_errors

SECONDS = (1, 2, 4, 8, 15, 22, 30)
METHODS = "windows", "ramp"
KINDS = {"shapes": "shapes right, %", "colours": "colours right, %", "sizes": "sizes right, %",
         "error": "error of position, px", "background": "error of the background, 0 to 255"}  # fmt: skip
GIVEN, WINDOW, RECENT = 4, 9, 4  # latent frames: those that are given, seen at a time, and done, of those seen
F = (SECONDS[-1] * world.FPS + 3) // 4 + 1


def measure(lab: Lab) -> None:
    network = lab.network("embedded")
    for method in METHODS:
        judged = cache(partial(drift, lab, network, method))
        for second in SECONDS:
            for kind in KINDS:
                name = f"{kind} at {second} s"
                lab.figure(f"{method}: {name}", lambda seed, judged=judged, name=name: judged(seed)[name])


@torch.no_grad()
def drift(lab: Lab, network: Wan, method: str, seed: int) -> dict[str, Tensor]:
    """Every figure of one method and seed, for each scene."""
    judge, generator = lab.judge, torch.Generator().manual_seed(seed)
    seconds = {second: range((second - 1) * world.FPS, second * world.FPS) for second in SECONDS}
    made: dict[int, list[Tensor]] = {second: [] for second in SECONDS}
    for context, truth in zip(judge.context.split(judge.batch), judge.truth.split(judge.batch), strict=True):
        led = context, judge.negative.expand(len(context), -1, -1), judge.preset.guidance
        video = judge.decode(generate(lab, network, method, truth, led, generator))
        for second, frames in seconds.items():
            made[second].append(video[:, :, frames.start : frames.stop].clone())
    named = {}
    for second, frames in seconds.items():
        clips = torch.cat(made[second])
        readings = world.measure(clips)
        for kind in ("colours", "shapes", "sizes"):
            named[f"{kind} at {second} s"] = right(judge.scenes, readings, kind)
        named[f"error at {second} s"] = centroid_errors(judge.scenes, readings, range(world.FPS), frames).mean(1)
        named[f"background at {second} s"] = background_error(judge.scenes, clips)
    return named


def generate(
    lab: Lab, network: Wan, method: str, truth: Tensor, led: tuple[Tensor, Tensor, float], generator: Generator
) -> Tensor:
    """Latents (B, 16, F, H, W) that go on from the first GIVEN of the true clips, by `roll` or by windows."""
    vae, preset = lab.judge.vae, lab.judge.preset
    height, width = truth.shape[3] // 8, truth.shape[4] // 8

    def draw(frames: int) -> Tensor:
        return torch.randn(len(truth), 16, frames, height, width, generator=generator).to(lab.device)

    known, velocity = truth[:, :, : tasks.pixel_frames(GIVEN)], sample.guided_velocity(network, *led)
    if method == "ramp":
        start, noise = vae.encode(known), (draw(1) for _ in count())
        rolled = roll(velocity, list(start.split(1, 2)), noise, preset.steps, preset.shift)
        return torch.cat([start, *islice(rolled, F - GIVEN)], dim=2)
    plan, made = tasks.plan("stream", WINDOW, videos=1), None
    taus = sample.walked(plan.m, preset.steps, preset.shift, plan.d)
    job = sample.Job([plan], [taus], F, GIVEN, False, [], None)
    while made is None or made.shape[2] < F:
        x1 = draw(WINDOW)
        x0 = sample.conditions(vae, plan, [known], x1) if made is None else sample.carried_over(vae, made, job, x1)
        z = flow.denoise(velocity, x0, x1, taus)
        made = z if made is None else sample.joined(made, z, job)
    return made


def roll(
    velocity: flow.Velocity, made: list[Tensor], noise: Iterator[Tensor], K: int, shift: float
) -> Iterator[Tensor]:
    """Denoise frames without end, on one ramp of noise levels, and yield each (B,C,1,H,W) as it reaches 0.

    made: clean frames to go on from, oldest first, or none; noise: x1 of each further frame, without end. The network
    sees WINDOW frames at a time: the first of all as an anchor, the RECENT newest that are done, and those on the ramp,
    each noisier than the one before. A frame takes K steps, or a few more. Rolling Forcing, arXiv 2509.25161; the
    anchor is the frame sink of LongLive, arXiv 2509.22622.
    """
    flight: list[Tensor] = []  # frames on the ramp, and behind them others that wait as pure noise
    depth = WINDOW - RECENT - 1
    apart, k = math.ceil(K / depth), 0  # steps from one frame's turn to the next; steps since the first one's turn
    while True:
        made = made[:1] + made[max(1, len(made) - RECENT) :]  # the others are not needed
        flight += [next(noise) for _ in range(WINDOW - len(made) - len(flight))]
        u = 1 - ((torch.tensor([k, k + 1])[:, None] / apart - torch.arange(len(flight))) / depth).clamp(0, 1)
        taus = torch.cat([torch.zeros(2, len(made)), flow.shifted(u, shift)], dim=1)
        z = flow.euler(velocity, torch.cat(made + flight, dim=2), taus)
        flight, k = list(z[:, :, len(made) :].split(1, dim=2)), k + 1
        if k == apart * depth:
            made, k = [*made, flight.pop(0)], k - apart
            yield made[-1]


def right(scenes: list[world.Scene], readings: world.Readings, kind: str) -> Tensor:
    """In percent, how many of a second's frames show exactly a scene's colours, or each of its shapes, or sizes."""
    names, values = list(world.COLOURS), []
    for b, scene in enumerate(scenes):
        wanted = torch.tensor([name in {thing.colour for thing in scene.things} for name in names])
        good = (readings.seen[b] == wanted).all(1) if kind == "colours" else torch.ones(world.FPS, dtype=torch.bool)
        for thing in scene.things if kind != "colours" else ():
            c = names.index(thing.colour)
            if kind == "shapes":
                found, true = readings.shape[b, :, c], world.SHAPES.index(thing.shape)
            else:
                found, true = readings.size[b, :, c], list(world.SIZES).index(thing.size)
            good &= readings.seen[b, :, c] & (found == true)
        values.append(100 * good.float().mean())
    return torch.stack(values)


def background_error(scenes: list[world.Scene], videos: Tensor) -> Tensor:
    """The median over pixels and frames of the difference from the true background, in steps of 0 to 255, (B,)."""
    empty = torch.cat([world.render(world.Scene(scene.background, ()), 1)[None] for scene in scenes]).to(videos.device)
    return 127.5 * (videos - empty).abs().mean(1).flatten(1).median(1).values


def draw(lab: Lab, path: Path) -> None:
    """Every figure over the seconds of a stream, a line for each way to make it."""
    kept = [lab.middle(f"{method}: shapes at 30 s", False) for method in METHODS]
    title = "After 30 s of a stream, {:.0f} % of shapes are right by windows, {:.0f} % on a ramp".format(*kept)
    with page(path, title, [1] * len(KINDS)) as panels:
        for axes, (kind, name) in zip(panels, KINDS.items(), strict=True):
            for method, colour in zip(METHODS, plots.COLOURS, strict=False):
                names = [f"{method}: {kind} at {second} s" for second in SECONDS]
                middles, spreads = ([told(n, False) for n in names] for told in (lab.middle, lab.spread))
                axes.errorbar(SECONDS, middles, spreads, color=colour, label=method)
            axes.set(title=textwrap.fill(name, 14), xlabel="second", ylim=(0, None))
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def rows(lab: Lab) -> list[Row]:
    lines = []
    for kind, name in KINDS.items():
        old, new = (f"{method}: {kind} at 30 s" for method in METHODS)
        less = (old, new) if "right" in name else (new, old)  # of what is right, more is better
        ours = f"ramp {lab.told(new, '', False).strip()}, windows {lab.told(old, '', False).strip()}"
        better = lab.below(*less, median=False)
        lines.append(Row(f"after 30 s a ramp does better than windows: {name}", "", ours, better))
    return lines
