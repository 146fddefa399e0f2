"""Train: a Pusa LoRA on a text-to-video model, all of its weights, or a model from scratch.

Each step draws a noise level for every latent frame (PTSS), noises each frame to its own level, and moves the network's
velocity towards the true one (FAFM); see `flow.py`. Latents and prompt embeddings are computed once and kept.

    python train.py --data clips/                                    a Pusa LoRA on the embedded model, in minutes
    python train.py --data clips/ --full --from-scratch --p-async 0  text-to-video pretraining

A step depends on the seed and its own number alone, so a run that was stopped goes on with `--resume` as if it had not
been. Everything is written to `runs/NAME/`.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
import cli
import data
import flow
import lora
import tasks


@dataclass(frozen=True)
class TrainConfig:
    data: str = cli.option("clips", "folder of clips with captions")
    model: str = cli.option("checkpoints/tiny", "base model: folder or Hugging Face repository")
    out: str = cli.option("runs/pusa", "folder of this run")
    size: str | None = cli.option(None, "pixels as WxH (default: the model's own)")
    frames: int | None = cli.option(None, "pixel frames N = 4k+1 (default: the model's own)")
    rank: int = cli.option(32, "LoRA rank; the paper's is 512 on Wan 14B")
    alpha: float | None = cli.option(None, "LoRA alpha (default: the rank)")
    lr: float = cli.option(1e-3, "peak learning rate; the paper's is 1e-5 on Wan 14B")
    steps: int = cli.option(300, "optimizer steps")
    batch: int = cli.option(8, "clips a step")
    p_async: float = cli.option(1.0, "PTSS: probability that each frame draws its own noise level")
    shift: float = cli.option(1.0, "shift of the noise levels drawn; 5 is Wan's")
    weighting: str = cli.option("none", "weight of each frame's loss", choices=("none", "bell"))
    drop_caption: float = cli.option(0.1, "probability of training without the caption, which guidance needs")
    full: bool = cli.option(False, "train all weights of the transformer instead of a LoRA")
    from_scratch: bool = cli.option(False, "with --full: start from random weights, and train the text encoder too")
    muon: bool = cli.option(False, "with --full: train the blocks' matrices by Muon, faster from scratch than AdamW")
    save_every: int = cli.option(200, "steps between saves of the training state")
    val_every: int = cli.option(100, "steps between validations")
    sample_every: int = cli.option(0, "steps between filmstrips of a fixed seed; 0: only at the end")
    resume: bool = cli.option(False, "go on from the state in --out")
    compile: bool = cli.option(False, "compile the network: slow to start, then faster (needs a C++ compiler)")
    seed: int = cli.option(0, "seed of everything random")
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type to compute in", choices=("auto", "float32", "bfloat16"))


class Dataset(NamedTuple):
    """What training needs of the clips: latents (clips, C, F, H, W) and what the text encoder makes of the captions."""

    latents: list[Tensor]
    prompts: list[str]
    context: Callable[[list[str]], Tensor]  # prompts → (B, T, text_dim)
    validation: list[int]  # indices that no training step sees
    training: list[int]


def train(config: TrainConfig) -> Path:
    """Run a training to its end and return the path of what it made: `lora.safetensors`, or the model's folder."""
    _check(config)
    out, state_path = Path(config.out), Path(config.out) / "state.pt"
    if state_path.exists() and not config.resume:
        raise ValueError(f"got --out {out}, which holds a run; go on with --resume, or choose another folder")
    if config.resume and not state_path.exists():
        raise ValueError(f"got --resume, but there is no {state_path} to go on from; start without --resume")
    device = cli.pick_device(config.device)
    dtype = cli.pick_dtype(config.dtype, device)
    torch.manual_seed(config.seed)

    stored = None if dtype == torch.bfloat16 and not config.full else torch.float32  # None: as in the file
    transformer = checkpoint.load_transformer(config.model, stored, device)
    encoder = checkpoint.load_text_encoder(config.model, stored, device)
    if config.from_scratch:
        transformer.init_weights()
        encoder.float().init_weights()
    clips = prepare(config, encoder, device, dtype)
    if config.full:
        trained = list(transformer.parameters()) + (list(encoder.parameters()) if config.from_scratch else [])
        transformer.requires_grad_(True)
        encoder.requires_grad_(config.from_scratch)
    else:
        trained = lora.inject(transformer, config.rank, config.alpha)
        encoder.requires_grad_(False)

    optimizers = make_optimizers(config, trained, transformer)
    first, seconds = 0, 0.0
    if config.resume:
        try:
            saved = torch.load(state_path, map_location=device, weights_only=True)
        except Exception as error:  # over damaged bytes the unpickler stumbles in every way there is
            reason = str(error).splitlines()[0][:100]
            raise ValueError(f"cannot read {state_path} ({reason}); start again with another --out") from error
        if [value.shape for value in saved["trained"]] != [parameter.shape for parameter in trained]:
            raise ValueError(
                f"got --resume, but the weights in {state_path} are not those that these flags train; repeat the "
                f"--model, --rank, --full and --from-scratch that are in {out / 'settings.json'}"
            )
        for parameter, value in zip(trained, saved["trained"], strict=True):
            parameter.data.copy_(value)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, seconds = saved["step"], saved["seconds"]
        print(f"going on from step {first}")

    def save_state(step: int) -> None:
        with cli.replacing(state_path) as path:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"trained": [p.data for p in trained], "optimizers": states, "step": step}
            torch.save({**state, "seconds": seconds + time.monotonic() - start}, path)

    out.mkdir(parents=True, exist_ok=True)
    with cli.replacing(out / "settings.json") as path:
        path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    network = torch.compile(transformer, dynamic=False) if config.compile else transformer
    progress = cli.Progress(config.steps, "training", first)
    start, done, smooth, validation = time.monotonic(), first, None, {}
    try:
        for step in range(first, config.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * rate(step, config.steps)
            with _autocast(device, dtype):
                loss = step_loss(network, clips, config, step, device)
            if not loss.isfinite():
                raise ValueError(f"the loss is {loss.item()} at step {step}; lower --lr and go on with --resume")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            done = step + 1
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            if config.val_every and (done % config.val_every == 0 or done == config.steps):
                validation = validate(network, clips, device, dtype)
                _log(out / "metrics.jsonl", {"step": done, "loss": smooth, **validation})
            if config.save_every and done % config.save_every == 0 and done < config.steps:
                save_state(done)
            if config.sample_every and done % config.sample_every == 0:
                _filmstrip(config, transformer, clips, device, out / f"step-{done:06d}.png")
            progress.step(loss=smooth, **validation)
    except KeyboardInterrupt:
        save_state(done)
        raise KeyboardInterrupt(f"stopped after step {done}; go on with the same command and --resume") from None
    save_state(config.steps)

    _filmstrip(config, transformer, clips, device, out / "filmstrip.png")
    if not config.full:
        result = out / "lora.safetensors"
        lora.save(result, lora.extract(transformer), base=config.model, metadata={"steps": str(config.steps)})
    else:
        result = out / "model"
        preset = checkpoint.load_preset(config.model)
        vae, tokenizer = checkpoint.load_vae(config.model), checkpoint.load_tokenizer(config.model)
        checkpoint.save_pipeline(result, transformer, vae, encoder, tokenizer, preset.shift)
        checkpoint.save_preset(result, preset)
    print(f"{result}\n{out / 'filmstrip.png'}")
    return result


def make_optimizers(config: TrainConfig, trained: list[nn.Parameter], transformer: nn.Module) -> list:
    """AdamW; with `--muon`, Muon for the matrices of the blocks, scaled to AdamW's step, and AdamW for the rest."""
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2] if config.muon else []
    apart = set(matrices)
    rest = [p for p in trained if p not in apart]
    optimizers = [torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
    warm = min(100, steps // 10 + 1)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def prepare(config: TrainConfig, encoder: nn.Module, device: str, dtype: torch.dtype) -> Dataset:
    """Encode all clips, or read what an earlier run encoded, and set one in ten (at most 64) apart for validation."""
    clips = data.find_clips(config.data)
    vae = checkpoint.load_vae(config.model, device=device)
    preset = checkpoint.load_preset(config.model)
    size = cli.parse_size(config.size) if config.size else preset.size
    frames = preset.frames if config.frames is None else config.frames
    tasks.latent_frames(frames)
    cache = Path(config.data) / ".cache"
    with _autocast(device, dtype):
        latents = data.cached_latents(clips, size, frames, preset.fps, vae, f"{fingerprint(vae)} {dtype}", cache)
    tokenizer = checkpoint.load_tokenizer(config.model)

    def embed(prompts: list[str]) -> Tensor:
        ids, mask = tokenizer(prompts)
        return encoder(ids.to(device), mask.to(device))

    if config.from_scratch:
        context = embed
    else:
        prompts = sorted({clip.caption for clip in clips} | {""})
        known = dict(zip(prompts, data.cached_embeddings(prompts, embed, fingerprint(encoder), cache), strict=True))

        def context(prompts: list[str]) -> Tensor:
            return torch.stack([known[prompt] for prompt in prompts]).to(device)

    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = min(64, len(clips) // 10)
    # A dataset too small to spare a clip is validated on what it trains on: better than no figure at all.
    validation, training = (order[:held], order[held:]) if held else (order, order)
    return Dataset(latents, [clip.caption for clip in clips], context, validation, training)


def step_loss(network: nn.Module, clips: Dataset, config: TrainConfig, step: int, device: str) -> Tensor:
    """The FAFM loss of one step's batch; everything that is drawn for it follows from the seed and the step."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    x0, prompts = _batch(clips, config, step)
    B, _, F = x0.shape[:3]
    dropped = torch.rand(B, generator=generator) < config.drop_caption
    context = clips.context(["" if drop else prompt for drop, prompt in zip(dropped.tolist(), prompts, strict=True)])
    x1 = torch.randn(x0.shape, generator=generator)
    tau = flow.sample_tau(B, F, config.p_async, config.shift, generator)
    x0, x1, tau = x0.to(device), x1.to(device), tau.to(device)
    return flow.fafm_loss(network(flow.interpolate(x0, x1, tau), tau, context), x0, x1, tau, config.weighting)


def _batch(clips: Dataset, config: TrainConfig, step: int) -> tuple[Tensor, list[str]]:
    """The clips of a step: epochs in a new order each, so a step's clips are known from its number."""
    picked, total = [], len(clips.training)
    for position in range(step * config.batch, (step + 1) * config.batch):
        epoch, place = divmod(position, total)
        picked.append(clips.training[_order(config.seed, epoch, total)[place]])
    return torch.stack([clips.latents[i] for i in picked]), [clips.prompts[i] for i in picked]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> list[int]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


@torch.no_grad()
def validate(network: nn.Module, clips: Dataset, device: str, dtype: torch.dtype) -> dict[str, float]:
    """The loss on fixed clips, noise and τ, for three kinds of τ: one for all frames, one each, one clean frame.

    The training loss is noise around a mean that depends on the τ drawn; these figures can be compared between steps.
    """
    x0 = torch.stack([clips.latents[i] for i in clips.validation[:16]])
    context = clips.context([clips.prompts[i] for i in clips.validation[:16]])
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randn(x0.shape, generator=generator)
    B, _, F = x0.shape[:3]
    together = ((torch.arange(B) + 0.5) / B)[:, None].expand(B, F)  # evenly over [0, 1]
    apart = torch.rand(B, F, generator=generator)
    one_clean = together.clone()
    one_clean[:, 0] = 0
    x0, x1 = x0.to(device), x1.to(device)
    figures = {}
    for name, tau in (("sync", together), ("async", apart), ("clean", one_clean)):
        tau = tau.to(device)
        with _autocast(device, dtype):
            velocity = network(flow.interpolate(x0, x1, tau), tau, context)
        figures[name] = flow.fafm_loss(velocity, x0, x1, tau).item()
    return figures


def fingerprint(model: nn.Module) -> str:
    """A name for a model's weights, so that what another model encoded is never taken for this one's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        # Sums instead of bytes: 5.7 billion parameters would take a minute to hash.
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item()!r}".encode())
    return digest.hexdigest()


@torch.no_grad()
def _filmstrip(config: TrainConfig, transformer: nn.Module, clips: Dataset, device: str, path: Path) -> None:
    """Two validation clips beside what the network makes of their first latent, and of their prompt alone."""
    vae = checkpoint.load_vae(config.model, device=device)
    preset = checkpoint.load_preset(config.model)
    rows, marks = [], []
    for index in clips.validation[:2]:
        x0 = clips.latents[index][None].to(device)
        F = x0.shape[2]
        context = clips.context([clips.prompts[index]])
        x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
        rows.append((f"clip: {clips.prompts[index]}", vae.decode(x0)[0].cpu()))
        marks.append([True] * tasks.pixel_frames(F))
        for name, m in (("from its first frame", [0.0] + [1.0] * (F - 1)), ("from its prompt", [1.0] * F)):
            taus = tasks.tau_schedule(m, preset.steps, preset.shift).to(device)
            keys = transformer.prompt_keys(context)
            z = flow.euler(lambda z, t, keys=keys: transformer(z, t, keys), flow.interpolate(x0, x1, taus[:1]), taus)
            rows.append((name, vae.decode(z)[0].cpu()))
            marks.append([m[tasks.latent_index(n, tasks.pixel_frames(F))] == 0 for n in range(tasks.pixel_frames(F))])
    data.save_image(path, data.filmstrip(rows, marks=marks))


def _autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` what bears it; the weights stay as they are."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def _log(path: Path, figures: dict[str, float]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def _check(config: TrainConfig) -> None:
    for name in ("rank", "steps", "batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"got --{name} {getattr(config, name)}, expected at least 1")
    if not 0 < config.lr < 1:
        raise ValueError(f"got --lr {config.lr}, expected a number between 0 and 1, such as 1e-3")
    for name in ("p_async", "drop_caption"):
        if not 0 <= getattr(config, name) <= 1:
            flag = name.replace("_", "-")
            raise ValueError(f"got --{flag} {getattr(config, name)}, expected a probability in [0, 1]")
    flow.shifted(torch.ones(1), config.shift)
    if config.from_scratch and not config.full:
        raise ValueError("got --from-scratch without --full: a LoRA needs trained weights under it; add --full")
    if config.muon and not config.full:
        raise ValueError("got --muon without --full: Muon is for whole matrices, not for a LoRA's pairs; add --full")


def main() -> None:
    train(cli.parse(TrainConfig, __doc__))


if __name__ == "__main__":
    cli.run(main)
