"""Grow the embedded model from nothing: `python tiny.py` (or `make tiny`), which can be stopped and run again.

Four stages, each skipped when its result is there: clips of the toy world; the VAE; the text-to-video base with its
umT5 encoder, which is `train.py --full --from-scratch --p-async 0`; the Pusa LoRA, which is `train.py` as a user runs
it. `python tiny.py --evaluate` judges the result on captions that training never saw.
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

import checkpoint
import cli
import data
import flow
import lora
import sample
import tasks
import text
import world
from model import Wan, WanConfig
from resume import newest_state
from train import TrainConfig, train
from vae import VAEConfig, WanVAE

# Wan's VAE with few channels. Pixels are folded 2x2 first: at the same quality a step takes a third of the time.
VAE = VAEConfig(
    dim=32, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), patch_size=2,
    latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16,
)  # fmt: skip
KL_WEIGHT = 1e-3  # high for a VAE: what survives the noise is smooth, which is what a small transformer can learn
PAIRS = 0.6  # share of training clips with two shapes: only they teach which word belongs to which shape
TRANSFORMER = WanConfig(192, 768, 128, num_heads=4, num_layers=6, text_len=32, text_dim=64)
ENCODER = text.T5Config(256, 64, 64, 128, num_heads=4, num_layers=2)  # its vocabulary is what the tokenizer learns
PRESET = checkpoint.Preset(
    size=(world.SIDE, world.SIDE), frames=world.FRAMES, fps=world.FPS, steps=10, shift=3.0, guidance=3.0, noise=0.0,
    strength=1.0, negative_prompt="",
)  # fmt: skip


@dataclass(frozen=True)
class TinyConfig:
    out: str = cli.option("checkpoints/tiny", "folder of the model")
    work: str = cli.option("runs/tiny", "folder for the clips and the state of each stage")
    clips: int = cli.option(6000, "training clips")
    vae_steps: int = cli.option(3600, "steps of the VAE")
    base_steps: int = cli.option(13000, "steps of the text-to-video base")
    lora_steps: int = cli.option(800, "steps of the Pusa LoRA")
    compile: bool = cli.option(False, "compile the networks: faster, needs a C++ compiler")
    evaluate: bool = cli.option(False, "judge the model in --out, write the table to its README.md, and stop")
    samples: int = cli.option(64, "with --evaluate: samples a row")


def grow(config: TinyConfig) -> None:
    """Run every stage that has no result yet; each goes on from where it was stopped."""
    work, out = Path(config.work), Path(config.out)
    clips, seedling = work / "clips", work / "seedling"
    world.write(clips, config.clips, seed=1, pairs=PAIRS)
    if not (seedling / "vae" / "diffusion_pytorch_model.safetensors").exists():
        vae = measured(train_vae(work, config.vae_steps, batch=4, lr=1e-3, compile=config.compile))
        checkpoint.save_pipeline(seedling, vae=vae, dtype={"vae": torch.bfloat16})
    if not (seedling / "model_index.json").exists():
        captions = [clip.caption for clip in data.find_clips(clips)]
        tokenizer = text.train_tokenizer(captions)
        encoder = text.UMT5Encoder(dataclasses.replace(ENCODER, vocab_size=tokenizer.get_vocab_size()))
        checkpoint.save_preset(seedling, PRESET)
        checkpoint.save_pipeline(seedling, Wan(TRANSFORMER), None, encoder, tokenizer, PRESET.shift)

    base, pusa = work / "base" / "model", work / "lora" / "lora.safetensors"
    train_or_resume(
        TrainConfig(
            data=str(clips), model=str(seedling), out=str(work / "base"), full=True, from_scratch=True, p_async=0.0,
            shift=2.0, steps=config.base_steps, batch=32, lr=4e-3, muon=True, compile=config.compile,
        ),
        base / "model_index.json",  # which is written last
    )  # fmt: skip
    if not pusa.exists():  # what is in `out` may be of an earlier growth
        parts = checkpoint.load_pipeline(base)
        half = {"transformer": torch.bfloat16, "vae": torch.bfloat16, "text_encoder": torch.float32}
        checkpoint.save_preset(out, PRESET)
        checkpoint.save_pipeline(
            out, parts.transformer, parts.vae, parts.text_encoder, parts.tokenizer, PRESET.shift, half
        )
    train_or_resume(
        TrainConfig(
            data=str(clips), model=str(out), out=str(work / "lora"), steps=config.lora_steps, batch=32, lr=1e-3,
            compile=config.compile,
        ),
        pusa,
    )  # fmt: skip
    halved = {name: (A.bfloat16(), B.bfloat16(), alpha) for name, (A, B, alpha) in lora.load(pusa).items()}
    lora.save(out / "lora.safetensors", halved, base=str(out))


def train_or_resume(config: TrainConfig, result: Path) -> None:
    if not result.exists():
        train(dataclasses.replace(config, resume=newest_state(config.out) is not None))


@torch.no_grad()
def measured(vae: WanVAE, count: int = 256) -> WanVAE:
    """The same VAE with the mean and standard deviation of each channel of its latents in its config.

    The deviation is that of the latents as drawn, so that a channel which the VAE does not use, whose mean hardly
    varies, is not blown up to the size of the others.
    """
    moments = [vae.moments(world.render(scene)[None]) for scene in world.scenes(count, seed=2)]
    means, log_variances = (torch.cat(part) for part in zip(*moments, strict=True))
    mean = means.mean((0, 2, 3, 4))
    std = (means.var((0, 2, 3, 4)) + log_variances.exp().mean((0, 2, 3, 4))).sqrt()
    config = dataclasses.replace(vae.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    normalised = WanVAE(config)
    normalised.load_state_dict(vae.state_dict())
    return normalised


def train_vae(folder: Path, steps: int, batch: int, lr: float, compile: bool) -> WanVAE:
    """Train the VAE on clips rendered as it goes: squared error, a tenth of absolute error, a little KL."""
    torch.manual_seed(0)
    vae = WanVAE(VAE)
    for module in vae.modules():  # the layout in which CPUs convolve bf16 fastest
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    state = folder / "vae.pt"
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    def losses(video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(video.device.type, torch.bfloat16):
            mean, log_variance = vae.moments(video)
            mean, log_variance = mean.float(), log_variance.float().clamp(-30, 20)
            error = vae.pixels(mean + noise * (0.5 * log_variance).exp()).float() - video
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error.square().mean(), error.abs().mean(), kl

    step_losses = torch.compile(losses, dynamic=False) if compile else losses
    progress = cli.Progress(steps, "vae", first)
    smooth = None
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        # Twice as many clips of half the length teach more for the same work; only the end needs the whole length.
        half = step < 0.7 * steps
        first_frame, frames = (16 * (step % 2), 17) if half else (0, world.FRAMES)
        scenes = world.scenes(2 * batch if half else batch, seed=step)
        video = torch.stack([world.render(scene)[:, first_frame : first_frame + frames] for scene in scenes])
        noise = torch.randn(len(video), 16, (frames + 3) // 4, 8, 8, generator=torch.Generator().manual_seed(step))
        square, absolute, kl = step_losses(video, noise)
        (square + 0.1 * absolute + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = square.item() if smooth is None else 0.95 * smooth + 0.05 * square.item()
        progress.step(psnr=_psnr(smooth), kl=kl.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            with cli.replacing(state) as path:
                torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
    return vae


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
    taus = tasks.tau_schedule(plan.m, PRESET.steps, PRESET.shift, plan.d)
    x1 = torch.randn(len(truth), 16, F, world.SIDE // 8, world.SIDE // 8, generator=torch.Generator().manual_seed(seed))
    ends = [truth[:, :, :1], truth[:, :, -1:]]
    # "tail 0" of extend is the tail of what the user has, which here is the start of the true clip.
    known = tasks.pixel_frames(plan.given[0].positions[-1] + 1) if name == "extend" else truth.shape[2]
    inputs = {"image": ends, "head": [truth], "tail": [truth[:, :, :known]]}
    x0 = sample.conditions(pipeline.vae, plan, inputs, x1)
    prompts, negative = [scene.caption for scene in scenes], [PRESET.negative_prompt] * len(scenes)
    contexts = [text.embed(pipeline.tokenizer, pipeline.text_encoder, texts) for texts in (prompts, negative)]
    velocity = sample.guided_velocity(pipeline.transformer, *contexts, PRESET.guidance)
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


def evaluate(config: TinyConfig) -> str:
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
        pipeline = checkpoint.load_pipeline(config.out, dtype)
        if column == "LoRA":
            lora.merge(pipeline.transformer, lora.load(Path(config.out) / "lora.safetensors"), PRESET.strength)
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


def main() -> None:
    config = cli.parse(TinyConfig, __doc__)
    if not config.evaluate:
        grow(config)
        return
    table = evaluate(config)
    readme = f"""# The embedded model

A complete text-to-video model of Wan's architecture for 64x64 clips of 33 frames, grown from nothing by
`python tiny.py`, in the `-Diffusers` layout, with the Pusa LoRA that was trained on it (`lora.safetensors`).

Judged by `python tiny.py --evaluate` on {config.samples} scenes a row whose captions training never saw, one in five
with two shapes; {PRESET.steps} steps, shift {PRESET.shift:g}, guidance {PRESET.guidance:g}, fixed seeds:

{table}
"""
    with cli.replacing(Path(config.out) / "README.md") as path:
        path.write_text(readme, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    cli.run(main)
