"""How good a model of the toy world is: on captions that training never saw, against the world's exact truth.

    python -m toy.judge     judges checkpoints/tiny and writes the table to its README.md
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import flow
import lora
import sample
import tasks
from model import Wan
from support import cli
from toy import world
from wan import checkpoint

# The frames of each task that are generated, and where things must be in them by the conditions alone.
DETERMINED = {
    "i2v": range(1, 33), "start-end": range(14, 19), "extend": range(13, 33), "prepend": range(0, 17),
    "complete": range(14, 19), "transition": range(14, 19), "keyframes": range(1, 32),
}  # fmt: skip
_AT = (0, 4, 8)  # latent frames of the key frames


class Judge:
    """Scenes, their true clips, and what it takes to make the same clips by a transformer, many at a time."""

    def __init__(
        self, opened: checkpoint.Opened, scenes: Sequence[world.Scene], device: str = "cpu", dtype: str = "auto",
        part: slice = slice(None), compile: bool = False,
    ):  # fmt: skip
        """part: the scenes that are judged, with the noise that they have among all; compile: the transformers."""
        every = list(scenes)
        self.opened, self.scenes, self.device = opened, every[part], device
        self.count, self.part, self.compile = len(every), part, compile
        # Clips at a time, of the transformer and of the VAE: more would not stay in a CPU's cache.
        self.batch, self.vae_batch = (256, 256) if device.startswith("cuda") else (32, 2)
        self.vae, self.preset, self.dtype = opened.vae(device=device), opened.preset, cli.pick_dtype(dtype, device)
        with torch.device(device):
            self.truth = torch.stack([world.render(scene) for scene in self.scenes])
        encoder, prompts = opened.text_encoder(torch.float32, device), [scene.caption for scene in self.scenes]
        with torch.no_grad():
            embedded = opened.tokenizer().embed(encoder, [*prompts, self.preset.negative_prompt]).to(self.dtype)
        self.context, self.negative = embedded[:-1], embedded[-1:]

    def transformer(self, change: Path | str | lora.LoRA | None = None, strength: float | None = None) -> Wan:
        """The model's transformer, with a LoRA merged if one is given, at the model's own strength or another."""
        transformer = self.opened.transformer(self.dtype, self.device)
        if change is not None:
            change = change if isinstance(change, lora.LoRA) else lora.load(change)
            lora.merge(transformer, change, self.preset.strength if strength is None else strength)
        if self.compile:
            transformer.compile_blocks()
        return transformer.requires_grad_(False)

    @torch.no_grad()
    def videos(
        self, network: nn.Module, task: str, seed: int = 0, taus: Tensor | None = None,
        plan: tasks.Plan | None = None, **settings: float,
    ) -> Tensor:  # fmt: skip
        """Clips (B, 3, N, 64, 64) of every scene by a task, in [-1, 1]; it is given what it needs of the true clips.

        taus, plan: noise levels (K+1, F) and plan in place of the task's own, with all conditions clean. settings:
        those of the preset's steps, shift, guidance, history_guidance and context_noise that are to be others.
        """
        preset, plan = dataclasses.replace(self.preset, **settings), plan or self.plan(task)
        taus = tasks.tau_schedule(plan.m, preset.steps, preset.shift, plan.d) if taus is None else taus
        given = [position for slot in plan.slots for position in slot.positions]
        generator, made = torch.Generator().manual_seed(seed), []
        shape = self.count, 16, len(plan.m), world.SIDE // 8, world.SIDE // 8
        noise = torch.randn(shape, generator=generator)[self.part]
        for x1, context, truth in zip(*(x.split(self.batch) for x in (noise, self.context, self.truth)), strict=True):
            x1, negative = x1.to(self.device), self.negative.expand(len(x1), -1, -1)
            x0 = sample.conditions(self.vae, plan, self._inputs(task, plan, truth), x1)
            if hasattr(network, "condition"):  # one that is told of the conditions in a way of its own
                network.condition(x0, x1, given)
            led = preset.guidance, preset.history_guidance, plan.m, x1, preset.context_noise
            made.append(flow.denoise(sample.guided_velocity(network, context, negative, *led), x0, x1, taus))
        return self.decode(torch.cat(made))

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Latents (B, 16, F, H, W), fp32, of clips (B, 3, N, 8H, 8W) in [-1, 1]."""
        return torch.cat([self.vae.encode(part).float() for part in clips.split(self.vae_batch)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips (B, 3, N, 8H, 8W) in [-1, 1], fp32, of latents (B, 16, F, H, W)."""
        return torch.cat([self.vae.decode(part).float() for part in latents.split(self.vae_batch)])

    @staticmethod
    def plan(task: str) -> tasks.Plan:
        """The task laid out on a clip's latent frames, its conditions clean."""
        at, noise = _AT if task == "keyframes" else (), (0.0,) if tasks.TASKS[task].noise else None
        return tasks.plan(task, tasks.latent_frames(world.FRAMES), noise=noise, at=at)

    @staticmethod
    def _inputs(task: str, plan: tasks.Plan, truth: Tensor) -> list[Tensor]:
        """The pixels of each condition. What a user has is the part of the true clip that the task does not make."""
        known = {"extend": [slice(13)], "prepend": [slice(-17, None)], "transition": [slice(5), slice(-9, None)]}
        videos = [truth[:, :, frames] for frames in known.get(task, [slice(None)])]
        at = _AT if task == "keyframes" else (0, len(plan.m) - 1)
        images = [truth[:, :, tasks.pixel_frames(position + 1) - 1 :] for position in at]
        return [tasks.cut(slot, (images if slot.source == "image" else videos)[slot.index]) for slot in plan.slots]


def centroid_errors(
    scenes: Sequence[world.Scene], readings: world.Readings, frames: range, true: range | None = None
) -> Tensor:
    """Distance in pixels of the shapes from their true places, (B, frames), the mean over a scene's shapes.

    A shape that is not seen counts as 64 px away. true: which frames of the scene these are, if they are not the same.
    """
    colours, frames, errors, times = list(world.COLOURS), list(frames), [], list(true or frames)
    for b, scene in enumerate(scenes):
        each = []
        for thing in scene.things:
            c, place = colours.index(thing.colour), world.positions(thing, times[-1] + 1)[times]
            distance = torch.hypot(readings.x[b, frames, c] - place[:, 0], readings.y[b, frames, c] - place[:, 1])
            each.append(torch.where(readings.seen[b, frames, c], distance, float(world.SIDE)))
        errors.append(torch.stack(each).mean(0))
    return torch.stack(errors)


def as_prompted(scenes: Sequence[world.Scene], readings: world.Readings) -> Tensor:
    """Whether each clip shows exactly the caption's colours, each with its shape and direction, (B,) bool."""
    return torch.tensor([_as_prompted(scene, *(x[b] for x in readings)) for b, scene in enumerate(scenes)])


def _as_prompted(scene: world.Scene, seen: Tensor, shape: Tensor, size: Tensor, x: Tensor, y: Tensor) -> bool:
    colours, N = list(world.COLOURS), len(seen)
    if {colours[c] for c in (seen.sum(0) > N / 2).nonzero()[:, 0]} != {thing.colour for thing in scene.things}:
        return False
    for thing in scene.things:
        c, along = colours.index(thing.colour), torch.tensor(world.DIRECTIONS[thing.direction])
        frames = seen[:, c].nonzero()[:, 0]
        start = frames[frames < 9] if (frames < 9).any() else frames[:1]  # before it turns round at a wall
        moved = torch.stack([x[start[-1], c] - x[start[0], c], y[start[-1], c] - y[start[0], c]])
        most = shape[frames, c].bincount(minlength=len(world.SHAPES)).argmax()
        if world.SHAPES[most] != thing.shape or (moved * along).sum() < max(2, moved.abs().max().item() - 1e-6):
            return False
    return True


def held_to_the_end(scenes: Sequence[world.Scene], readings: world.Readings) -> Tensor:
    """Whether each thing has its colour and shape in the last frame, (B,) bool."""
    colours = list(world.COLOURS)
    held = ([(colours.index(t.colour), world.SHAPES.index(t.shape)) for t in scene.things] for scene in scenes)
    seen, shape = readings.seen[:, -1], readings.shape[:, -1]
    return torch.tensor([all(seen[b, c] and shape[b, c] == s for c, s in things) for b, things in enumerate(held)])


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of clips (B, ...) in [-1, 1], (B,)."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1))


def unseen_scenes(samples: int, seed: int = 3) -> list[world.Scene]:
    """Scenes whose captions training never saw; one in four has two shapes, unseen the other way round too."""
    pairs = samples // 4
    two = world.scenes(100 * pairs, seed=seed + 1, unseen=True, pairs=1)
    two = (scene for scene in two if world.held_out(dataclasses.replace(scene, things=scene.things[::-1]).caption))
    return [*world.scenes(samples - pairs, seed=seed, unseen=True, pairs=0), *islice(two, pairs)]


def figures(judge: Judge, network: nn.Module, seed: int, **settings: float) -> Iterator[tuple[str, str, Tensor]]:
    """What a network reaches from one seed's noise: what is judged, its unit, and the figure of each scene (B, ...)."""
    scenes, truth = judge.scenes, judge.truth
    for task in ("t2v", "i2v", "extend", "start-end", "complete"):
        videos = judge.videos(network, task, seed, **settings)
        readings = world.measure(videos)
        if task == "t2v":
            yield "T2V: shapes, colours and directions all as prompted", "%", 100.0 * as_prompted(scenes, readings)
        if task == "i2v":
            yield "I2V: first frame kept (PSNR)", "dB", psnr(videos[:, :, 0], truth[:, :, 0])
            yield "I2V: shape and colour held to the last frame", "%", 100.0 * held_to_the_end(scenes, readings)
        if task in ("start-end", "complete"):
            yield f"{task}: both ends kept (PSNR)", "dB", psnr(videos[:, :, [0, -1]], truth[:, :, [0, -1]])
        if task in DETERMINED:
            errors = centroid_errors(scenes, readings, DETERMINED[task])
            where = "in the middle" if DETERMINED[task].stop < world.FRAMES else "of the generated frames"
            yield f"{task.replace('i2v', 'I2V')}: median centroid error {where}", "px", errors


def evaluate(judges: Sequence[Judge], change: Path) -> str:
    """A Markdown table: the model without its LoRA, with it, and as it is sampled; a judge for each seed."""
    rebuilt = torch.cat([psnr(judge.decode(judge.encode(judge.truth)), judge.truth) for judge in judges]).mean()
    base, pusa, preset = judges[0].transformer(), judges[0].transformer(change), judges[0].preset
    plain = {"history_guidance": 1.0, "context_noise": 0.0}
    columns = ((base, plain), (pusa, plain), (pusa, {}))
    progress, rows = cli.Progress(len(columns) * len(judges), "evaluating"), {}
    for network, settings in columns:
        cells: dict[str, list] = {}
        for seed, judge in enumerate(judges):
            two = torch.tensor([len(scene.things) > 1 for scene in judge.scenes])
            for what, unit, values in figures(judge, network, seed, **settings):
                middle = torch.median if unit == "px" else torch.mean
                halves = [middle(values[two == pair].float()).item() for pair in (False, True)]
                cells.setdefault(f"{what} | {unit}", []).append(halves)
            progress.step()
        for what, each in cells.items():
            spread = torch.tensor(each, dtype=torch.float64)
            mean, std = spread.mean(0).tolist(), spread.std(0, correction=0).tolist()
            told = " / ".join(f"{a:.1f} ± {b:.1f}" for a, b in zip(mean, std, strict=True))
            rows.setdefault(what, []).append(told)
    used = f"and history guidance {preset.history_guidance:g}, context noise {preset.context_noise:g}"
    head = ["what | unit", "LoRA off", "with the LoRA", used]
    lines = [head, ["---"] * 5, ["VAE: reconstruction (PSNR) | dB", f"{rebuilt:.1f}", "the same", "the same"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *([what, *told] for what, told in rows.items())])


@dataclass(frozen=True)
class JudgeConfig:
    model: str = cli.option("checkpoints/tiny", "folder of the model, whose README.md gets the table")
    samples: int = cli.option(256, "scenes a row", (4, 10**6, "at least 4"))
    seeds: int = cli.option(3, "seeds of noise, which share out the scenes", (1, 1000, "at least 1"))
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type to compute in", choices=("auto", "float32", "bfloat16"))
    compile: bool = cli.option(False, "compile the transformers: faster, needs a C++ compiler")


def main() -> None:
    config = cli.parse(JudgeConfig, __doc__)
    opened, folder = checkpoint.open(config.model, Wan), Path(config.model)
    got = f"--samples {config.samples} for {config.seeds} seeds"
    cli.expect(config.samples >= 4 * config.seeds, got, "at least 4 a seed: one in four has two shapes")
    scenes, device = unseen_scenes(config.samples), cli.pick_device(config.device)
    parts = [slice(seed, None, config.seeds) for seed in range(config.seeds)]
    judges = [Judge(opened, scenes, device, config.dtype, part, config.compile) for part in parts]
    table, preset = evaluate(judges, folder / "lora.safetensors"), opened.preset
    readme = f"""# The embedded model

A complete text-to-video model of Wan's architecture for 64x64 clips of 33 frames, grown from nothing by
`python -m toy.grow`, in the `-Diffusers` layout, with the Pusa LoRA that was trained on it (`lora.safetensors`).

Judged by `python -m toy.judge` on {config.samples} scenes a row whose captions training never saw, one in four with
two shapes. Each of {config.seeds} seeds of noise makes its share of them: mean ± standard deviation over the seeds,
for scenes with one shape / with two. {preset.steps} steps, shift {preset.shift:g}, guidance {preset.guidance:g}, LoRA
strength {preset.strength:g}:

{table}
"""
    with cli.replacing(folder / "README.md") as path:
        path.write_text(readme, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    cli.run(main)
