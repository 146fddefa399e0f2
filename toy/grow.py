"""Grow the embedded model from nothing: `python -m toy.grow` (or `make tiny`), which can be stopped and run again.

Three stages, each skipped when its result is there: the VAE, from scenes rendered as it goes; the text-to-video base
with its umT5 encoder, which is `train.py --full --from-scratch --p-async 0`; the Pusa LoRA, which is `train.py
--two-levels`. Base and LoRA learn from the latents of a fixed number of scenes. `python -m toy.judge` judges the result
on captions that training never saw.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from model import Wan, WanConfig
from support import cli
from support.dataset import Context, Dataset, held_out
from toy import world
from train import Prepare, TrainConfig, context_of, train
from wan import checkpoint, text
from wan.vae import VAEConfig, WanVAE

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
    size=(world.SIDE, world.SIDE), frames=world.FRAMES, fps=world.FPS, steps=10, shift=3.0, guidance=3.0,
    history_guidance=3.0, context_noise=0.5, noise=0.0, strength=1.2, negative_prompt="",
)  # fmt: skip


@dataclass(frozen=True)
class TinyConfig:
    out: str = cli.option("checkpoints/tiny", "folder of the model")
    work: str = cli.option("runs/tiny", "folder for the latents and the state of each stage")
    clips: int = cli.option(6000, "training clips", cli.COUNT)
    vae_steps: int = cli.option(3600, "steps of the VAE", cli.COUNT)
    base_steps: int = cli.option(13000, "steps of the text-to-video base", cli.COUNT)
    lora_steps: int = cli.option(3500, "steps of the Pusa LoRA", cli.COUNT)
    compile: bool = cli.option(False, "compile the networks: faster, needs a C++ compiler")
    device: str | None = cli.option(None, "device of base and LoRA (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type to train base and LoRA in", choices=("auto", "float32", "bfloat16"))


def grow(config: TinyConfig) -> None:
    """Run every stage that has no result yet; each goes on from where it was stopped."""
    work, out = Path(config.work), Path(config.out)
    seedling, base, pusa = (work / name for name in ("seedling", "base/model", "lora/lora.safetensors"))
    data = partial(rendered_clips, count=config.clips, folder=work)
    if not (seedling / "vae" / "diffusion_pytorch_model.safetensors").exists():
        vae = train_vae(work / "vae.pt", config.vae_steps, batch=4, lr=1e-3, compile=config.compile)
        measure_latents(vae)
        checkpoint.save_pipeline(seedling, {"vae": vae}, dtype={"vae": torch.bfloat16})
    if not (seedling / "model_index.json").exists():
        tokenizer = text.train_tokenizer(scene.caption for scene in world.scenes(config.clips, seed=1, pairs=PAIRS))
        encoder = text.UMT5Encoder(dataclasses.replace(ENCODER, vocab_size=tokenizer.get_vocab_size()))
        parts = {"transformer": Wan(TRANSFORMER), "text_encoder": encoder, "tokenizer": tokenizer}
        checkpoint.save_pipeline(seedling, parts, PRESET)

    pretraining = TrainConfig(
        data=str(work), model=str(seedling), out=str(work / "base"), full=True, from_scratch=True, p_async=0.0,
        shift=2.0, steps=config.base_steps, batch=32, lr=4e-3, muon=True, compile=config.compile,
        device=config.device, dtype=config.dtype,
    )  # fmt: skip
    train_or_resume(pretraining, data, base / "model_index.json")  # which is written last
    if not pusa.exists():  # so what is in `out` may come from an earlier growth
        grown = checkpoint.open(base, Wan)
        parts = {part: getattr(grown, part)() for part in ("transformer", "vae", "text_encoder", "tokenizer")}
        dtypes = {"transformer": torch.bfloat16, "vae": torch.bfloat16, "text_encoder": torch.float32}
        checkpoint.save_pipeline(out, parts, PRESET, dtypes)
    finetuning = TrainConfig(
        data=str(work), model=str(out), out=str(work / "lora"), two_levels=True, steps=config.lora_steps, batch=32,
        lr=1e-3, compile=config.compile, device=config.device, dtype=config.dtype,
    )  # fmt: skip
    train_or_resume(finetuning, data, pusa)
    pairs = lora.load(pusa).pairs.items()
    halved = lora.LoRA({layer: lora.Pair(A.bfloat16(), B.bfloat16(), alpha) for layer, (A, B, alpha) in pairs})
    lora.save(out / "lora.safetensors", halved, base=str(out))


def train_or_resume(config: TrainConfig, data: Prepare, result: Path) -> None:
    """Train if the result is not there; a run that has begun goes on."""
    if not result.exists():
        train(dataclasses.replace(config, resume=(Path(config.out) / "settings.json").exists()), data)


@torch.no_grad()
def rendered_clips(
    opened: checkpoint.Opened, config: TrainConfig, encoder: nn.Module | None, count: int, folder: Path
) -> Dataset:
    """Training data without files of clips: scenes are rendered and encoded, once; latents are kept in `folder`."""
    scenes, vae = list(world.scenes(count, seed=1, pairs=PAIRS)), opened.vae(device=config.device)
    digest = f"{checkpoint.fingerprint(vae)[:12]}-{count}"
    stored = folder / f"latents-{digest}.safetensors"
    if not stored.exists():
        batches, parts = [scenes[i : i + 16] for i in range(0, count, 16)], []
        progress = cli.Progress(len(batches), "encoding scenes")
        for batch in batches:
            with torch.device(config.device):
                clips = torch.stack([world.render(scene) for scene in batch])
            parts.append(vae.encode(clips).cpu())
            progress.step()
        with cli.replacing(stored) as path:
            save_file({"latents": torch.cat(parts).contiguous()}, path)
    captions, apart = [scene.caption for scene in scenes], held_out(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    context = context_of(opened, config, encoder, captions) if encoder else embedded(opened, config, captions)
    latents = load_file(stored)["latents"]
    return Dataset(latents, captions, context, order[: apart or 16], [sorted(order[apart:])], digest)


@torch.no_grad()
def embedded(opened: checkpoint.Opened, config: TrainConfig, captions: list[str]) -> Context:
    """What gives the embeddings of captions, and of none: so small an encoder takes many at a time."""
    prompts, encoder, tokenizer = ["", *captions], opened.text_encoder(torch.float32, config.device), opened.tokenizer()
    table = torch.cat([tokenizer.embed(encoder, prompts[i : i + 512]) for i in range(0, len(prompts), 512)])
    table, row = table.to(getattr(torch, config.dtype)), {prompt: i for i, prompt in enumerate(prompts)}
    return lambda wanted: table[[row[prompt] for prompt in wanted]]


@torch.no_grad()
def measure_latents(vae: WanVAE) -> None:
    """Put the mean and standard deviation of each latent channel into the VAE's config."""
    # The latents are those with the VAE's noise: without it, a channel that the VAE does not use would be scaled up to
    # the size of the others.
    moments = [vae.moments(world.render(scene)[None]) for scene in world.scenes(256, seed=2)]
    means, log_variances = (torch.cat(part) for part in zip(*moments, strict=True))
    mean, std = means.mean((0, 2, 3, 4)), (means.var((0, 2, 3, 4)) + log_variances.exp().mean((0, 2, 3, 4))).sqrt()
    vae.config = dataclasses.replace(vae.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def train_vae(state: Path, steps: int, batch: int, lr: float, compile: bool) -> WanVAE:
    """Train the VAE on clips rendered as it goes; a training that was stopped goes on from the file `state`."""
    torch.manual_seed(0)
    vae = WanVAE(VAE)
    for module in vae.modules():  # the layout in which CPUs convolve bf16 fastest
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    losses = torch.compile(vae_losses, dynamic=False) if compile else vae_losses
    progress = cli.Progress(steps, "vae", first)
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        # Twice as many clips of half the length teach more for the same work; only the end needs the full length.
        half = step < 0.7 * steps
        start, frames = (16 * (step % 2), 17) if half else (0, world.FRAMES)
        scenes = world.scenes(2 * batch if half else batch, seed=step)
        video = torch.stack([world.render(scene)[:, start : start + frames] for scene in scenes])
        noise = torch.randn(len(video), 16, (frames + 3) // 4, 8, 8, generator=torch.Generator().manual_seed(step))
        square, absolute, kl = losses(vae, video, noise)
        (square + 0.1 * absolute + KL_WEIGHT * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step(psnr=10 * math.log10(4 / square.item()), kl=kl.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            with cli.replacing(state) as path:
                torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path)
    return vae


def vae_losses(vae: WanVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared and absolute error of clips (B, 3, N, 64, 64) made again from noised latents, and the mean KL."""
    with torch.autocast(video.device.type, torch.bfloat16):
        mean, log_variance = vae.moments(video)
        mean, log_variance = mean.float(), log_variance.float().clamp(-30, 20)
        error = vae.pixels(mean + noise * (0.5 * log_variance).exp()).float() - video
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.square().mean(), error.abs().mean(), kl


def main() -> None:
    grow(cli.parse(TinyConfig, __doc__))


if __name__ == "__main__":
    cli.run(main)
