"""How good the embedded model is: on captions that training never saw, against the world's exact truth.

    python -m toy.judge     judges checkpoints/tiny and writes the table to its README.md
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

import sample
import tasks
from support import cli
from toy import world


def base_and_pusa(model: str, scenes: list[world.Scene]) -> tuple[sample.Experts, sample.Experts]:
    """A model with the captions of these scenes encoded, sampled as its preset says: without and with its LoRA."""
    config, opened = sample.prepare(sample.SampleConfig("t2v", model, no_lora=True, prompt="", device="cpu"))
    prompts = [scene.caption for scene in scenes]
    adapted = replace(config, lora=(f"{model}/lora.safetensors:{opened.preset.strength}",))
    return sample.Experts(config, opened, prompts), sample.Experts(adapted, opened, prompts)


@torch.no_grad()
def generate(experts: sample.Experts, scenes: list[world.Scene], truth: Tensor, name: str, seed: int = 0) -> Tensor:
    """Videos (B, 3, N, 64, 64) by a task, which is given what it needs of the true clips, all in [-1, 1]."""
    config, F = experts.config, tasks.latent_frames(truth.shape[2])
    plan = tasks.plan(name, F, noise=(0.0,) if tasks.TASKS[name].noise else None)
    taus = tasks.tau_schedule(plan.m, config.steps, config.shift, plan.d)
    x1 = torch.randn(len(truth), 16, F, world.SIDE // 8, world.SIDE // 8, generator=torch.Generator().manual_seed(seed))
    # "tail 0" of extend is the tail of what the user has, which here is the start of the true clip.
    known = truth[:, :, : tasks.pixel_frames(plan.given[0].positions[-1] + 1)] if name == "extend" else truth
    sources = {("image", 0): truth, ("image", 1): truth[:, :, -1:], ("head", 0): truth, ("tail", 0): known}
    inputs = [tasks.cut(slot, sources[slot.source, slot.index]) for slot in plan.given]
    x0 = sample.conditions(experts.vae, plan, inputs, x1)
    return experts.vae.decode(experts.walk([scene.caption for scene in scenes], x0, x1, taus)).float()


def as_prompted(scene: world.Scene, video: Tensor) -> bool:
    """Whether a clip (3, N, 64, 64) shows exactly the caption's colours, each with its shape and direction."""
    frames = world.read(video)
    common = {c for c in world.COLOURS if sum(c in frame for frame in frames) > len(frames) / 2}
    if common != {thing.colour for thing in scene.things}:
        return False
    for thing in scene.things:
        seen = [frame[thing.colour] for frame in frames if thing.colour in frame]
        start = [frame[thing.colour] for frame in frames[:9] if thing.colour in frame] or seen[:1]
        dx, dy = start[-1].x - start[0].x, start[-1].y - start[0].y
        x, y = world.DIRECTIONS[thing.direction]
        shape = statistics.mode(reading.shape for reading in seen)
        if shape != thing.shape or dx * x + dy * y < max(2, abs(dx) - 1e-6, abs(dy) - 1e-6):
            return False
    return True


def held_to_the_end(scene: world.Scene, video: Tensor) -> bool:
    """Whether each thing has its colour and shape in the last frame."""
    (last,) = world.read(video[:, -1:])
    return all(thing.colour in last and last[thing.colour].shape == thing.shape for thing in scene.things)


def centroid_errors(scene: world.Scene, video: Tensor, frames: range) -> Iterator[float]:
    """Distance in pixels of each thing from its true place in each of the frames; 64 where it cannot be found."""
    for thing in scene.things:
        places = world.positions(thing, video.shape[1])[list(frames)].tolist()
        for found, (x, y) in zip(world.read(video[:, list(frames)]), places, strict=True):
            reading = found.get(thing.colour)
            yield math.hypot(reading.x - x, reading.y - y) if reading else float(world.SIDE)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB between pictures in [-1, 1]."""
    return 10 * math.log10(4 / (a - b).square().mean().item())


def unseen_scenes(samples: int) -> list[world.Scene]:
    """Scenes whose captions training never saw; one in five has two shapes, unseen the other way round too."""
    pairs = samples // 5
    two = world.scenes(100 * pairs, seed=4, unseen=True, pairs=1)
    two = (scene for scene in two if world.held_out(replace(scene, things=scene.things[::-1]).caption))
    return [*world.scenes(samples - pairs, seed=3, unseen=True, pairs=0), *islice(two, pairs)]


@torch.no_grad()
def evaluate(base: sample.Experts, pusa: sample.Experts, scenes: list[world.Scene]) -> str:
    """A Markdown table of how good a model is with its LoRA and without, on the same scenes."""
    truth, progress = torch.stack([world.render(scene) for scene in scenes]), cli.Progress(11, "evaluating")
    without, adapted = (figures(experts, scenes, truth, progress) for experts in (base, pusa))
    reconstruction = statistics.mean(psnr(base.vae.decode(base.vae.encode(clip[None]))[0], clip) for clip in truth)
    progress.step()
    rows = ["| what | target | with the LoRA | LoRA off |", "| --- | --- | --- | --- |"]
    rows.append(f"| VAE: reconstruction (PSNR) | ≥ 30 dB | {reconstruction:.1f} dB | the same |")
    rows += [f"| {what} | {reached} | {without[what]} |" for what, reached in adapted.items()]
    return "\n".join(rows)


def figures(
    experts: sample.Experts, scenes: list[world.Scene], truth: Tensor, progress: cli.Progress
) -> dict[str, str]:
    """What the model reaches, by the first two cells of its row in the table: "what is judged | target"."""
    videos = {}
    for name in ("t2v", "i2v", "extend", "start-end", "complete"):
        pieces = [slice(i, i + 16) for i in range(0, len(scenes), 16)]
        videos[name] = torch.cat([generate(experts, scenes[p], truth[p], name, seed=p.start) for p in pieces])
        progress.step()

    def share(name: str, passes: Callable[[world.Scene, Tensor], bool]) -> str:
        return f"{100 * sum(map(passes, scenes, videos[name])) / len(scenes):.0f} %"

    def psnr_at(name: str, *frames: int) -> str:
        pairs = zip(videos[name], truth, strict=True)
        return f"{statistics.mean(psnr(video[:, n], clip[:, n]) for video, clip in pairs for n in frames):.1f} dB"

    def error(name: str, first: int, end: int = world.FRAMES) -> str:
        errors = (centroid_errors(*pair, range(first, end)) for pair in zip(scenes, videos[name], strict=True))
        return f"{statistics.median(chain.from_iterable(errors)):.1f} px"

    return {
        "T2V: shapes, colours and directions all as prompted | ≥ 90 %": share("t2v", as_prompted),
        "I2V: first frame kept (PSNR) | ≥ 28 dB": psnr_at("i2v", 0),
        "I2V: shape and colour held to the last frame | ≥ 90 %": share("i2v", held_to_the_end),
        "I2V: median centroid error of the generated frames | none": error("i2v", 1),  # as it follows the image
        "extend: median centroid error of the generated frames | ≤ 3 px": error("extend", 13),
        "start-end: both ends kept (PSNR) | ≥ 28 dB": psnr_at("start-end", 0, -1),
        "start-end: median centroid error in the middle | ≤ 4 px": error("start-end", 14, 19),
        "complete: both ends kept (PSNR) | ≥ 28 dB": psnr_at("complete", 0, -1),
        "complete: median centroid error in the middle | ≤ 4 px": error("complete", 14, 19),
    }


@dataclass(frozen=True)
class JudgeConfig:
    model: str = cli.option("checkpoints/tiny", "folder of the model, whose README.md gets the table")
    samples: int = cli.option(64, "samples a row", (5, 10**6, "at least 5: one in five has two shapes"))


def main() -> None:
    config = cli.parse(JudgeConfig, __doc__)
    scenes = unseen_scenes(config.samples)
    base, pusa = base_and_pusa(config.model, scenes)
    table, settings = evaluate(base, pusa, scenes), base.config
    readme = f"""# The embedded model

A complete text-to-video model of Wan's architecture for 64x64 clips of 33 frames, grown from nothing by
`python -m toy.grow`, in the `-Diffusers` layout, with the Pusa LoRA that was trained on it (`lora.safetensors`).

Judged by `python -m toy.judge` on {config.samples} scenes a row whose captions training never saw, one in five
with two shapes; {settings.steps} steps, shift {settings.shift:g}, guidance {settings.guidance:g}, fixed seeds:

{table}
"""
    with cli.replacing(Path(config.model) / "README.md") as path:
        path.write_text(readme, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    cli.run(main)
