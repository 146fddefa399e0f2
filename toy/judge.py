"""How good the embedded model is: on captions that training never saw, against the world's exact truth.

    python -m toy.judge     judges checkpoints/tiny and writes the table to its README.md
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import flow
import lora
import sample
import tasks
from support import cli
from toy import grow, world
from wan import checkpoint, text


def _psnr(mean_square_error: float) -> float:
    """Peak signal-to-noise ratio in dB of an error on the scale [-1, 1]."""
    return 10 * math.log10(4 / mean_square_error)


# How the embedded model is judged: on captions that training never saw, against the world's exact truth.


@torch.no_grad()
def generate(
    pipeline: checkpoint.Pipeline, scenes: list[world.Scene], truth: Tensor, name: str, seed: int = 0
) -> Tensor:
    """Videos (B, 3, N, 64, 64) by a task, which is given what it needs of the true clips (B, 3, N, 64, 64)."""
    F = tasks.latent_frames(truth.shape[2])
    plan = tasks.plan(name, F, noise=(0.0,) if tasks.TASKS[name].noise else None)
    taus = tasks.tau_schedule(plan.m, grow.PRESET.steps, grow.PRESET.shift, plan.d)
    x1 = torch.randn(len(truth), 16, F, world.SIDE // 8, world.SIDE // 8, generator=torch.Generator().manual_seed(seed))
    ends = [truth[:, :, :1], truth[:, :, -1:]]
    # "tail 0" of extend is the tail of what the user has, which here is the start of the true clip.
    known = tasks.pixel_frames(plan.given[0].positions[-1] + 1) if name == "extend" else truth.shape[2]
    inputs = {"image": ends, "head": [truth], "tail": [truth[:, :, :known]]}
    x0 = sample.conditions(pipeline.vae, plan, inputs, x1)
    prompts, negative = [scene.caption for scene in scenes], [grow.PRESET.negative_prompt] * len(scenes)
    contexts = [text.embed(pipeline.tokenizer, pipeline.text_encoder, texts) for texts in (prompts, negative)]
    velocity = sample.guided_velocity(pipeline.transformer, *contexts, grow.PRESET.guidance)
    return pipeline.vae.decode(flow.euler(velocity, flow.interpolate(x0, x1, taus[:1]), taus)).float()


def as_prompted(scene: world.Scene, video: Tensor) -> bool:
    """Whether a clip (3, N, 64, 64) shows exactly the caption's colours, each with its shape and direction."""
    frames = world.read(video)
    common = {c for c in world.COLOURS if sum(c in frame for frame in frames) > len(frames) / 2}
    if common != {thing.colour for thing in scene.things}:
        return False
    for thing in scene.things:
        seen = [frame[thing.colour] for frame in frames if thing.colour in frame]
        start = [frame[thing.colour] for frame in frames[:9] if thing.colour in frame]
        if statistics.mode(reading.shape for reading in seen) != thing.shape or len(start) < 2:
            return False
        moved = (start[-1].x - start[0].x, start[-1].y - start[0].y)
        along = sum(a * b for a, b in zip(moved, world.DIRECTIONS[thing.direction], strict=True))
        if along < 2 or along < max(abs(moved[0]), abs(moved[1])) - 1e-6:
            return False
    return True


def held_to_the_end(scene: world.Scene, video: Tensor) -> bool:
    """Whether each thing has its colour and shape in the last frame."""
    last = world.read(video[:, -1:])[0]
    return all(thing.colour in last and last[thing.colour].shape == thing.shape for thing in scene.things)


def centroid_errors(scene: world.Scene, video: Tensor, frames: range) -> Iterator[float]:
    """Distance in pixels of each thing from its true place in each of the frames; 64 where it is not to be found."""
    readings = world.read(video[:, frames.start : frames.stop])
    for thing in scene.things:
        places = world.positions(thing, video.shape[1])[frames.start : frames.stop].tolist()
        for found, (x, y) in zip(readings, places, strict=True):
            reading = found.get(thing.colour)
            yield float(world.SIDE) if reading is None else math.hypot(reading.x - x, reading.y - y)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB between pictures on the scale [-1, 1]."""
    return _psnr((a - b).square().mean().item())


def _unseen_either_way(scene: world.Scene) -> bool:
    """Whether training saw neither a pair of shapes nor the same two the other way round."""
    return world.held_out(dataclasses.replace(scene, things=scene.things[::-1]).caption)


def evaluate(config: "JudgeConfig") -> str:
    """The table of how good the embedded model is, as Markdown; with the LoRA and without it, on the same scenes."""
    if config.samples < 5:
        raise ValueError(f"got --samples {config.samples}, expected at least 5: one in five has two shapes")
    pairs = config.samples // 5
    scenes = [
        *world.scenes(config.samples - pairs, seed=3, unseen=True, pairs=0),
        *islice(filter(_unseen_either_way, world.scenes(100 * pairs, seed=4, unseen=True, pairs=1)), pairs),
    ]
    truth = torch.stack([world.render(scene) for scene in scenes])
    progress = cli.Progress(11, "evaluating")

    def judged(pipeline: checkpoint.Pipeline, name: str) -> list[Tensor]:
        pieces = range(0, len(scenes), 16)
        videos = [generate(pipeline, scenes[i : i + 16], truth[i : i + 16], name, seed=i) for i in pieces]
        progress.step()
        return list(torch.cat(videos))

    def share(passed: list[bool]) -> str:
        return f"{100 * sum(passed) / len(passed):.0f} %"

    def kept(videos: list[Tensor], ends: tuple[int, ...]) -> str:
        pairs = zip(videos, truth, strict=True)
        return f"{statistics.mean(psnr(video[:, e], clip[:, e]) for video, clip in pairs for e in ends):.1f} dB"

    def error(videos: list[Tensor], frames: range) -> str:
        pairs = zip(scenes, videos, strict=True)
        return f"{statistics.median(e for scene, video in pairs for e in centroid_errors(scene, video, frames)):.1f} px"

    columns = {}
    dtype = cli.pick_dtype("auto", "cpu")
    for column in ("base", "LoRA"):
        pipeline = checkpoint.load_pipeline(config.model, dtype)
        if column == "LoRA":
            lora.merge(pipeline.transformer, lora.load(Path(config.model) / "lora.safetensors"), grow.PRESET.strength)
        cells = columns[column] = []
        videos = judged(pipeline, "t2v")
        cells.append(share([as_prompted(s, v) for s, v in zip(scenes, videos, strict=True)]))
        videos = judged(pipeline, "i2v")
        cells += [kept(videos, (0,)), share([held_to_the_end(s, v) for s, v in zip(scenes, videos, strict=True)])]
        cells.append(error(videos, range(1, world.FRAMES)))
        videos = judged(pipeline, "extend")
        cells.append(error(videos, range(13, world.FRAMES)))
        videos = judged(pipeline, "start-end")
        cells += [kept(videos, (0, -1)), error(videos, range(14, 19))]
        videos = judged(pipeline, "complete")
        cells += [kept(videos, (0, -1)), error(videos, range(14, 19))]
    with torch.no_grad():
        pictures = torch.cat([pipeline.vae.decode(pipeline.vae.encode(clip[None])) for clip in truth])
    progress.step()
    reconstruction = f"{statistics.mean(psnr(a, b) for a, b in zip(pictures, truth, strict=True)):.1f} dB"

    whats = (
        ("T2V: shapes, colours and directions all as prompted", "≥ 90 %"),
        ("I2V: first frame kept (PSNR)", "≥ 28 dB"),
        ("I2V: shape and colour held to the last frame", "≥ 90 %"),
        ("I2V: median centroid error of the generated frames", "none"),  # shows that the image is what they follow
        ("extend: median centroid error of the generated frames", "≤ 3 px"),
        ("start-end: both ends kept (PSNR)", "≥ 28 dB"),
        ("start-end: median centroid error in the middle", "≤ 4 px"),
        ("complete: both ends kept (PSNR)", "≥ 28 dB"),
        ("complete: median centroid error in the middle", "≤ 4 px"),
    )
    rows = ["| what | target | with the LoRA | LoRA off |", "| --- | --- | --- | --- |"]
    rows.append(f"| VAE: reconstruction (PSNR) | ≥ 30 dB | {reconstruction} | the same |")
    for (what, target), with_lora, without in zip(whats, columns["LoRA"], columns["base"], strict=True):
        rows.append(f"| {what} | {target} | {with_lora} | {without} |")
    return "\n".join(rows)


@dataclass(frozen=True)
class JudgeConfig:
    model: str = cli.option("checkpoints/tiny", "folder of the model, whose README.md gets the table")
    samples: int = cli.option(64, "samples a row")


def main() -> None:
    config = cli.parse(JudgeConfig, __doc__)
    table = evaluate(config)
    readme = f"""# The embedded model

A complete text-to-video model of Wan's architecture for 64x64 clips of 33 frames, grown from nothing by
`python -m toy.grow`, in the `-Diffusers` layout, with the Pusa LoRA that was trained on it (`lora.safetensors`).

Judged by `python -m toy.judge` on {config.samples} scenes a row whose captions training never saw, one in five
with two shapes; {grow.PRESET.steps} steps, shift {grow.PRESET.shift:g}, guidance {grow.PRESET.guidance:g}, fixed seeds:

{table}
"""
    with cli.replacing(Path(config.model) / "README.md") as path:
        path.write_text(readme, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    cli.run(main)
