"""Train: a Pusa LoRA on a text-to-video model, all of its weights, or a model from scratch.

Each step draws a noise level for every latent frame (PTSS), noises each frame to its own level, and moves the network's
velocity towards the true one (FAFM); see `flow.py`. Latents and prompt embeddings are computed once and stored.

    python train.py --data clips/                                    a Pusa LoRA on the embedded model, in minutes
    python train.py --data clips/ --full --from-scratch --p-async 0  text-to-video pretraining
    python train.py --data clips/ --rank 512 --dry-run               what a run would see and need
    torchrun --nproc-per-node 8 train.py --data clips/               on eight GPUs, see `distributed.py`

Wan2.2 has two transformers, one for high and one for low noise, and `--expert` trains one of them. When it samples, its
free frames are at noise levels on its own side of the boundary, but its conditions are at m·σ, which is often 0. An
expert that was trained on its own side alone would never have seen a clean frame, and its LoRA could not learn to use
one. So both experts draw τ over all of [0, 1], as a single transformer does.

A step depends on the seed and its own number alone, so a run that was stopped, or killed at any moment, goes on with
`--resume` as if it had not been: on a CPU, with the same number of threads, its LoRA is the same to the byte.
Everything is written to `runs/NAME/`; `python -m support.report` makes a page of it.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import flow
import lora
import tasks
from model import Wan
from support import cache, cli, cost, dataset, distributed, resume
from wan import checkpoint, text
from wan.checkpoint import Opened


@dataclass(frozen=True)
class TrainConfig:
    data: str = cli.option("clips", "folder of clips with captions")
    model: str = cli.option("checkpoints/tiny", "base model: folder or Hugging Face repository")
    out: str = cli.option("runs/pusa", "folder of this run")
    cache: str | None = cli.option(None, "folder of latents and embeddings (default: .cache in --data)")
    strict: bool = cli.option(False, "stop if any clip cannot be used, instead of going on without it")
    size: str | None = cli.option(None, "pixels as WxH (default: the model's own); other shapes get as many in theirs")
    buckets: bool = cli.option(True, "keep the shape of each clip; --no-buckets crops all to --size")
    frames: int | None = cli.option(None, "pixel frames N = 4k+1 of a window (default: the model's own)")
    rank: int = cli.option(32, "LoRA rank; the paper's is 512 on Wan 14B")
    alpha: float | None = cli.option(None, "LoRA alpha (default: the rank)")
    lr: float = cli.option(1e-3, "peak learning rate; the paper's is 1e-5 on Wan 14B")
    steps: int = cli.option(300, "optimizer steps")
    batch: int = cli.option(8, "windows a step")
    accumulate: int = cli.option(1, "parts that a step's batch is taken in, one after another, to save memory")
    gradient_checkpointing: bool = cli.option(False, "compute each block again in the backward pass, to save memory")
    p_async: float = cli.option(1.0, "PTSS: probability that each frame draws its own noise level")
    shift: float = cli.option(1.0, "shift of the noise levels drawn; 5 is Wan's")
    weighting: str = cli.option("none", "weight of each frame's loss", choices=("none", "bell"))
    drop_caption: float = cli.option(0.1, "probability of training without the caption, which guidance needs")
    expert: str | None = cli.option(None, "which of Wan2.2's two transformers to train", choices=("high", "low"))
    boundary: float | None = cli.option(None, "with --expert: noise level that parts the two (default: the model's)")
    full: bool = cli.option(False, "train all weights of the transformer instead of a LoRA")
    from_scratch: bool = cli.option(False, "with --full: start from random weights, and train the text encoder too")
    muon: bool = cli.option(False, "with --full: train the blocks' matrices by Muon, faster from scratch than AdamW")
    save_every: int = cli.option(200, "steps between saves of the training state")
    keep: int = cli.option(2, "how many of the last states to keep")
    val_every: int = cli.option(100, "steps between validations")
    sample_every: int = cli.option(0, "steps between filmstrips of a fixed seed; 0: only at the end")
    resume: bool = cli.option(False, "go on from the last state in --out")
    dry_run: bool = cli.option(False, "print clips, buckets, parameters and memory, and stop")
    gpus: int = cli.option(1, "with --dry-run: GPUs that share batch, weights and optimizer")
    compile: bool = cli.option(False, "compile the network: slow to start, then faster (needs a C++ compiler)")
    seed: int = cli.option(0, "seed of everything random")
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type to compute in", choices=("auto", "float32", "bfloat16"))


# Flags that may differ when a run goes on: they say where and how it is computed, not what. The data may have moved;
# that they are the same is told by their content. --steps may only be raised: the learning rate, which comes down by
# them, then goes on from where it would be in the longer run.
_MAY_CHANGE = {
    "data", "out", "cache", "strict", "accumulate", "gradient_checkpointing", "save_every", "keep", "val_every",
    "sample_every", "resume", "dry_run", "gpus", "compile", "device",
}  # fmt: skip


class Dataset(NamedTuple):
    """What training needs of the clips: latents (C, F, H, W) of each window, and what the encoder makes of captions."""

    latents: Sequence[Tensor]
    prompts: list[str]  # of each window
    context: Callable[[list[str]], Tensor]  # B prompts → (B, text_len, text_dim)
    validation: list[int]  # a window of each clip that no training step sees
    training: list[list[int]]  # buckets of windows, in each of which latents have one shape
    digest: str = ""  # of everything above
    skipped: Sequence[dataset.Skipped] = ()


class Batch(NamedTuple):
    """b windows of a step's batch, each with its noise, noise levels and prompt."""

    x0: Tensor  # (b, C, F, H, W)
    x1: Tensor  # (b, C, F, H, W)
    tau: Tensor  # (b, F)
    prompts: list[str]
    share: float  # of the windows of the whole batch


def train(config: TrainConfig) -> Path:
    """Run a training to its end and return the path of what it made: `lora.safetensors`, or the model's folder."""
    opened = checkpoint.open(config.model, Wan)
    config = checked(config, opened)
    run = resume.Run(vars(config), _MAY_CHANGE)
    clips, models, inputs = set_up(opened, config)
    transformer, device, dtype = models["transformer"], config.device, getattr(torch, config.dtype)
    trained = [parameter for parameter in models.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(config, list(models.values()))
    parts = range(config.accumulate * distributed.size())  # of each step's batch
    window_cost = functools.cache(partial(_window_cost, _outline(opened, config)))

    with run.open(models, optimizers, inputs, facts(config, clips, transformer, trained)) as steps:
        for step in steps:
            begun, lr, loss = time.monotonic(), config.lr * rate(step, config.steps), 0.0
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            for part in distributed.my_share(parts):
                batch = draw(clips, config, step, part)
                with _autocast(device, dtype):
                    share = step_loss(transformer, batch, clips.context, config.weighting, device)
                (share * distributed.size()).backward()  # gradients become the mean over the processes
                loss += share.item()
            loss = distributed.all_reduce(loss, device)
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step}; start again with a lower --lr and another --out")
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            figures = run.count(loss, time.monotonic() - begun, *window_cost(batch.x0.shape[1:])) | {"lr": lr}
            if run.due(config.val_every, at_end=True):
                windows = math.ceil(config.batch / len(parts))  # at a time
                figures |= distributed.broadcast(validate(transformer, clips, device, dtype, windows))
                if run.is_best(figures) and not config.full:
                    write_lora(run.out / "best.safetensors", opened, models, config, clips.digest, step + 1)
            run.log(figures)
            if run.due(config.sample_every):
                run.save_filmstrip(f"step-{step + 1:06d}.png", *filmstrip(opened, transformer, clips, config))
            run.save()

    if config.full:
        result = write_model(run.out / "model", opened, models, config)
    else:
        result = write_lora(run.out / "lora.safetensors", opened, models, config, clips.digest, config.steps)
    run.save_filmstrip("filmstrip.png", *filmstrip(opened, transformer, clips, config))
    tell_skipped(clips.skipped, len(clips.latents), config)
    run.finish(result)
    return result


def set_up(opened: Opened, config: TrainConfig) -> tuple[Dataset, nn.ModuleDict, dict[str, str]]:
    """The data, the models with what is trained, on their device, and fingerprints of what the run is made from."""
    encoder = opened.text_encoder(torch.float32).requires_grad_() if config.from_scratch else None
    clips = prepare(opened, config, encoder)
    models = nn.ModuleDict({"transformer": load_base(opened, config)} | ({"text_encoder": encoder} if encoder else {}))
    torch.manual_seed(config.seed)
    for model in models.values() if config.from_scratch else ():
        model.init_weights()  # on the CPU, so that a seed gives the same on any device
    base = cache.fingerprint(models["transformer"]) if distributed.rank() == 0 else None
    trainable(models["transformer"], config)
    if config.compile:
        torch._dynamo.config.recompile_limit = 8 * len(clips.training)  # each shape of latents is compiled apart
        models["transformer"].compile_blocks()
    if config.gradient_checkpointing:
        recompute_blocks(models["transformer"])
    if distributed.size() > 1:
        shard(models, config.device)
    return clips, models.to(config.device), {"clips": clips.digest, "base model": distributed.broadcast(base)}


def draw(clips: Dataset, config: TrainConfig, step: int, part: int = 0) -> Batch:
    """One part of a step's batch: windows of one bucket, captions, noise, and τ by PTSS.

    All of it follows from the seed and the step, and is drawn for the whole batch, whichever part is asked for.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    picked = dataset.batch_of(step, config.batch, clips.training, config.seed)
    mine = slice(part, None, config.accumulate * distributed.size())
    x0 = torch.stack([clips.latents[i] for i in picked[mine]])
    B, (C, F, H, W) = len(picked), x0.shape[1:]
    dropped = (torch.rand(B, generator=generator) < config.drop_caption).tolist()
    prompts = ["" if drop else clips.prompts[i] for drop, i in zip(dropped, picked, strict=True)]
    x1 = torch.randn(B, C, F, H, W, generator=generator)
    tau = flow.sample_tau(B, F, config.p_async, config.shift, generator)
    return Batch(x0, x1[mine], tau[mine], prompts[mine], len(x0) / B)


def step_loss(
    network: nn.Module, batch: Batch, context: Callable[[list[str]], Tensor], weighting: str, device: str
) -> Tensor:
    """The FAFM loss of one part of a step's batch, times its share: these add up to the loss of the batch."""
    x0, x1, tau = (tensor.to(device) for tensor in (batch.x0, batch.x1, batch.tau))
    velocity = network(flow.interpolate(x0, x1, tau), tau, context(batch.prompts))
    return flow.fafm_loss(velocity, x0, x1, tau, weighting) * batch.share


@torch.no_grad()
def validate(network: nn.Module, clips: Dataset, device: str, dtype: torch.dtype, batch: int = 16) -> dict[str, float]:
    """Losses on at most 16 fixed windows with fixed noise and τ, which can be compared between steps and runs.

    The training loss is noise around a mean that depends on the τ drawn. Here it is taken for three kinds of τ: one for
    all frames (`sync`), one each (`async`), and the first frame clean, one for the others (`clean`).

    `copy` asks what the network takes from a clean frame: the first is at τ = 0 and all others are pure noise, and only
    the frame after the clean one counts. Its loss is the error of that frame as predicted in a single step: 0 if it is
    right to the bit, about 1, the variance of the latents, if the network uses the prompt alone.
    """
    shown = clips.validation[:16]
    V, F = len(shown), clips.latents[shown[0]].shape[1]
    generator = torch.Generator().manual_seed(0)
    x1s = [torch.randn(clips.latents[i].shape, generator=generator) for i in shown]
    together = ((torch.arange(V) + 0.5) / V)[:, None].repeat(1, F)  # evenly over [0, 1]
    taus = {"sync": together, "async": torch.rand(V, F, generator=generator), "clean": together.clone()}
    if F > 1:
        taus["copy"] = torch.ones(V, F)
    for name in taus.keys() & {"clean", "copy"}:
        taus[name][:, 0] = 0
    losses = dict.fromkeys(taus, 0.0)
    for bucket in dataset.by_shape([x1.shape for x1 in x1s], range(V)):
        for members in (bucket[i : i + batch] for i in range(0, len(bucket), batch)):
            x0 = torch.stack([clips.latents[shown[i]] for i in members]).to(device)
            x1 = torch.stack([x1s[i] for i in members]).to(device)
            context = clips.context([clips.prompts[shown[i]] for i in members])
            for name, levels in taus.items():
                tau = levels[members].to(device)
                with _autocast(device, dtype):
                    velocity = network(flow.interpolate(x0, x1, tau), tau, context)
                counted = slice(1, 2) if name == "copy" else slice(None)  # frames
                error = flow.fafm_loss(*(x[:, :, counted] for x in (velocity, x0, x1)), tau[:, counted])
                losses[name] += error.item() * len(members) / V
    return losses


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
    warm = min(100, steps // 10 + 1)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def load_base(opened: Opened, config: TrainConfig) -> Wan:
    """The transformer to start from. Of several processes, the first loads it, on the CPU; others get its outline."""
    if distributed.rank() > 0:
        return opened.outline()[0]
    device = "cpu" if config.from_scratch or distributed.size() > 1 else config.device
    return opened.transformer(_stored(config), device, config.expert or "high")


def trainable(transformer: Wan, config: TrainConfig) -> list[nn.Parameter]:
    """Make ready, and return, what a run trains of the transformer: all of it, or the pairs of a new LoRA."""
    if not config.full:
        return lora.inject(transformer, config.rank, config.alpha)
    return list(transformer.requires_grad_(True).parameters())


def recompute_blocks(transformer: Wan) -> None:
    """Gradient checkpointing: keep only what goes into each block, and compute the block again when going back."""
    for block in transformer.blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)


def shard(models: nn.ModuleDict, device: str) -> None:
    """Give each process a shard of every parameter; those of a block are gathered when it computes."""
    units = []
    for block in models["transformer"].blocks:  # the prompt's keys and values are computed before the rest of it
        units += [[block.cross_attn.k, block.cross_attn.v, block.cross_attn.norm_k], block]
    for name, model in models.items():
        distributed.shard(model, units if name == "transformer" else [], device)


def make_optimizers(config: TrainConfig, models: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """AdamW; with `--muon`, Muon for the matrices of the blocks, scaled to AdamW's step, and AdamW for the rest."""
    layers = [layer for model in models for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    matrices = [layer.weight for layer in layers if config.muon]
    apart = set(matrices)
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if parameter not in apart]
    optimizers = [torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def prepare(opened: Opened, config: TrainConfig, encoder: nn.Module | None) -> Dataset:
    """Encode all clips, or find what an earlier run encoded, and set one in ten (at most 16) apart for validation.

    encoder: the text encoder if it is trained too, and prompts become something else at every step.
    """
    sources, keys, latents, skipped = encode_clips(opened, config)
    clip_of = [k for k, windows in enumerate(latents) for _ in windows.places]  # of each window, the number of its clip
    captions = [source.clip.caption for source in sources]
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = min(16, len(sources) // 10)
    learned = set(order[held_out:])
    sizes = [sources[k].size for k in clip_of]  # in pixels; of one size, latents have one shape
    return Dataset(
        latents=cache.StoredTensors([place for windows in latents for place in windows.places]),
        prompts=[captions[k] for k in clip_of],
        context=encode_captions(opened, config, captions, encoder),
        # A dataset too small to spare a clip is validated on what it trains on: better than no figure at all.
        validation=[clip_of.index(k) for k in order[:held_out] or order],
        training=dataset.by_shape(sizes, [i for i, k in enumerate(clip_of) if k in learned]),
        digest=hashlib.sha256(json.dumps([*zip(captions, keys, strict=True)]).encode()).hexdigest()[:16],
        skipped=skipped,
    )


def look_through(config: TrainConfig, fps: float) -> tuple[list[dataset.Source], list[dataset.Skipped]]:
    """The clips that can be used, and those that cannot."""
    found, size = dataset.find_clips(config.data), cli.parse_size(config.size)
    sources, skipped = dataset.survey(found, size, config.frames, fps, config.buckets)
    tell_skipped(skipped, len(sources), config)
    return sources, skipped


def encode_clips(opened: Opened, config: TrainConfig) -> tuple[Sequence, Sequence, Sequence, list[dataset.Skipped]]:
    """The clips that can be used, a name for the content of each, and its latents; and the clips that cannot."""
    fps, vae = opened.preset.fps, opened.vae(device=config.device)
    sources, skipped = look_through(config, fps)

    def encode(window: Tensor) -> Tensor:
        with _autocast(config.device, getattr(torch, config.dtype)):
            return vae.encode(window.to(config.device))

    keys = dataset.latent_keys(sources, config.frames, fps, f"{cache.fingerprint(vae)} {config.dtype}")
    load = partial(dataset.latents, frames=config.frames, fps=fps, encode=encode, folder=config.cache)
    latents, damaged = distributed.each_its_share(load, sources, keys)
    usable = [item for item in zip(sources, keys, latents, strict=True) if item[2] is not None]
    if damaged:
        tell_skipped(skipped + damaged, len(usable), config)
    return *zip(*usable, strict=True), skipped + damaged


def encode_captions(
    opened: Opened, config: TrainConfig, captions: list[str], encoder: nn.Module | None
) -> Callable[[list[str]], Tensor]:
    """A function from captions, or the empty one that guidance needs, to their embeddings on the device."""
    if encoder:
        return partial(text.embed, opened.tokenizer(), encoder)
    how = {"dtype": getattr(torch, config.dtype), "device": config.device, "cache_folder": config.cache}
    embed = distributed.each_its_share(partial(opened.encode_prompts, **how), sorted({*captions, ""}))
    return lambda prompts: embed(prompts).to(config.device)


def tell_skipped(skipped: list[dataset.Skipped], usable: int, config: TrainConfig) -> None:
    """Name the clips that are left out. Raises ValueError if none may be, or if all are."""
    if skipped and (config.strict or not usable):
        first = f"{len(skipped)} of {len(skipped) + usable} clips in {config.data} cannot be used, the first is "
        advice = "mend or remove them, or leave out --strict" if usable else "mend them or add others"
        raise ValueError(f"{first}{skipped[0].path.name} ({skipped[0].reason}); {advice}")
    if skipped:
        print("\n".join([f"clips left out: {len(skipped)}", *(f"  {path.name}: {why}" for path, why in skipped)]))


def rehearse(config: TrainConfig) -> str:
    """What a run would see and need, without its weights: clips, buckets, parameters, memory."""
    opened = checkpoint.open(config.model, Wan)
    config = checked(config, opened)
    sources, skipped = look_through(config, opened.preset.fps)
    windows = Counter()
    for source in sources:
        windows[source.size] += source.windows
    width, height = max(windows, key=math.prod)
    shape = (opened.config.in_dim, tasks.latent_frames(config.frames), height // 8, width // 8)
    each = math.ceil(config.batch / config.gpus / config.accumulate)
    stored = _stored(config)
    plain, thrifty = (
        cost.memory(
            Wan, opened.config, partial(trainable, config=config), recompute, (each, *shape),
            stored, getattr(torch, config.dtype), config.gpus,
        )
        for recompute in (None, recompute_blocks)
    )  # fmt: skip
    tokens, flops = _window_cost(_outline(opened, config), shape)
    trained, frozen = plain.trained * config.gpus / 4, plain.weights * config.gpus / stored.itemsize
    unit, scale = ("GiB", 2**30) if plain.total >= 2**30 else ("MiB", 2**20)
    rows = zip((*plain._fields, "together"), (*plain, plain.total), (*thrifty, thrifty.total), strict=True)
    return "\n".join([
        f"{len(sources)} of {len(sources) + len(skipped)} clips, "
        f"{windows.total()} windows of {config.frames} frames at {opened.preset.fps:g} fps",
        *(f"  {width}x{height}: {count} windows" for (width, height), count in sorted(windows.items())),
        f"{trained / 1e6:.2f} M trainable parameters, {frozen / 1e6:.2f} M frozen",
        f"{config.steps} steps of {config.batch} windows of up to {tokens} tokens: "
        f"{config.steps * config.batch * flops:.3g} FLOP",
        f"memory of {f'each of {config.gpus} GPUs' if config.gpus > 1 else 'the device'}, windows at a time: {each}",
        "                    plain      with --gradient-checkpointing",
        *(f"  {name:<12}{a / scale:>9.2f} {unit}{b / scale:>9.2f} {unit}" for name, a, b in rows),
    ])  # fmt: skip


def _outline(opened: Opened, config: TrainConfig) -> Wan:
    """The transformer without memory, made ready for training."""
    transformer = opened.outline()[0]
    trainable(transformer, config)
    if config.gradient_checkpointing:
        recompute_blocks(transformer)
    return transformer


def _window_cost(outline: Wan, shape: tuple[int, ...]) -> tuple[int, float]:
    """Tokens of a window with latents of a shape, and the operations to train on it."""
    return cost.tokens(shape), cost.window_flops(outline, shape)


def facts(config: TrainConfig, clips: Dataset, transformer: Wan, trained: list[nn.Parameter]) -> dict:
    """What facts.json says of a run."""
    device, many = f"{config.device.upper()}, threads: {torch.get_num_threads()}", distributed.size()
    if torch.device(config.device).type == "cuda":
        device = torch.cuda.get_device_name(config.device)
    return {
        "base": config.model,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "trained": sum(p.numel() for p in trained),
        "windows": len(clips.latents),
        "buckets": len(clips.training),
        "dataset": clips.digest,
        "device": f"{many} x {device}" if many > 1 else device,
        "skipped": [(path.name, reason) for path, reason in clips.skipped],
    }


def full_models(opened: Opened, models: nn.ModuleDict, config: TrainConfig) -> nn.ModuleDict:
    """The models with full parameters. The first of several processes gets those that are trained, on the CPU."""
    if distributed.size() == 1:
        return models
    transformer, _, encoder = opened.outline()
    trainable(transformer, config)
    outline = nn.ModuleDict({"transformer": transformer, "text_encoder": encoder})
    outline.load_state_dict(resume.full_weights(models), strict=False, assign=True)
    return outline


def write_lora(path: Path, opened: Opened, models: nn.ModuleDict, config: TrainConfig, digest: str, step: int) -> Path:
    """Write the LoRA as it is after a step; digest: of the dataset."""
    metadata = {"steps": str(step), "dataset": digest} | ({"expert": config.expert} if config.expert else {})
    transformer = full_models(opened, models, config)["transformer"]
    if distributed.rank() == 0:
        lora.save(path, lora.extract(transformer), base=config.model, metadata=metadata)
    return path


def write_model(folder: Path, opened: Opened, models: nn.ModuleDict, config: TrainConfig) -> Path:
    """Write a model of which the transformer, or one of the two, is the trained one, and maybe the text encoder."""
    models, preset = full_models(opened, models, config), opened.preset
    if distributed.rank() > 0:
        return folder
    encoder = models["text_encoder"] if config.from_scratch else opened.text_encoder()
    experts = {config.expert or "high": models["transformer"]}
    if config.expert:
        preset = dataclasses.replace(preset, boundary=config.boundary)
        other = "low" if config.expert == "high" else "high"
        experts[other] = opened.transformer(expert=other)
    checkpoint.save_pipeline(
        folder, experts["high"], opened.vae(), encoder, opened.tokenizer(), preset.shift,
        transformer_2=experts.get("low"), boundary=preset.boundary,
    )  # fmt: skip
    checkpoint.save_preset(folder, preset)
    return folder


@torch.no_grad()
def filmstrip(
    opened: Opened, transformer: Wan, clips: Dataset, config: TrainConfig
) -> tuple[list[tuple[str, Tensor]], list[list[bool]]]:
    """Two validation clips beside what the network makes of their first latent, and of their prompt alone.

    The expert that is trained walks its own steps: "high" then goes to the end at once, "low" begins from the clip,
    noised to where its steps begin. Gives rows of (title, video (3, N, 8H, 8W)), and which of their frames were given.
    """
    vae, preset = opened.vae(device=config.device), opened.preset
    sigma = flow.sigma_schedule(preset.steps, preset.shift)
    own = sigma >= 0 if config.expert is None else (sigma >= config.boundary) == (config.expert == "high")
    own[-1] = True
    rows, marks = [], []
    for index in clips.validation[:2]:
        x0 = clips.latents[index][None].to(config.device)
        F, N = x0.shape[2], tasks.pixel_frames(x0.shape[2])
        x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(config.device)
        context = clips.context([clips.prompts[index]])
        titles = (f"clip: {clips.prompts[index]}", "from its first frame", "from its prompt")
        for title, m in zip(titles, ([0.0] * F, [0.0] + [1.0] * (F - 1), [1.0] * F), strict=True):
            taus = tasks.tau_schedule(m, preset.steps, preset.shift)[own]
            velocity = partial(transformer, context=context)
            latents = flow.denoise(velocity, x0, x1, taus) if any(m) else x0
            rows.append((title, vae.decode(latents)[0].float().cpu()))
            marks.append([m[tasks.latent_index(n, N)] == 0 for n in range(N)])
    return rows, marks


def _autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` what bears it; the weights stay as they are."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def _stored(config: TrainConfig) -> torch.dtype:
    """The type to hold weights in: frozen ones need not be finer than they compute."""
    return torch.float32 if config.full else getattr(torch, config.dtype)


def checked(config: TrainConfig, opened: Opened) -> TrainConfig:
    """The config with the model's own values where it has none. Raises ValueError for what no run can be."""
    for name in ("rank", "steps", "batch", "accumulate", "keep", "gpus"):
        if getattr(config, name) < 1:
            raise ValueError(f"got --{name} {getattr(config, name)}, expected at least 1")
    many = f" on {distributed.size()} processes" if distributed.size() > 1 else ""
    if config.gpus > 1 and not config.dry_run:
        raise ValueError(f"got --gpus {config.gpus} without --dry-run; leave it out, it is torchrun that says how many")
    if config.accumulate * distributed.size() * config.gpus > config.batch:
        parts = f"--accumulate {config.accumulate}{many or f' on {config.gpus} GPUs' * (config.gpus > 1)}"
        raise ValueError(f"got {parts} for --batch {config.batch}, expected a window for each part")
    for flag in ("muon", "compile"):
        if many and getattr(config, flag):
            raise ValueError(f"got --{flag}{many}, expected a single one; leave it out")
    if config.alpha is not None and not 0 < config.alpha < math.inf:
        raise ValueError(f"got --alpha {config.alpha:g}, expected a positive number, such as the rank")
    if not 0 < config.lr < 1:
        raise ValueError(f"got --lr {config.lr}, expected a number between 0 and 1, such as 1e-3")
    for flag, value in (("p-async", config.p_async), ("drop-caption", config.drop_caption)):
        if not 0 <= value <= 1:
            raise ValueError(f"got --{flag} {value}, expected a probability in [0, 1]")
    flow.shifted(1.0, config.shift)
    if config.from_scratch and not config.full:
        raise ValueError("got --from-scratch without --full: a LoRA needs trained weights under it; add --full")
    if config.muon and not config.full:
        raise ValueError("got --muon without --full: Muon is for whole matrices, not for a LoRA's pairs; add --full")
    boundary = _boundary(config, opened)
    width, height = cli.parse_size(config.size) if config.size else opened.preset.size
    frames = opened.preset.frames if config.frames is None else config.frames
    tasks.latent_frames(frames)
    device = cli.pick_device(config.device)
    return dataclasses.replace(
        config, size=f"{width}x{height}", frames=frames, cache=config.cache or str(Path(config.data) / ".cache"),
        boundary=boundary, device=device, dtype=str(cli.pick_dtype(config.dtype, device)).removeprefix("torch."),
    )  # fmt: skip


def _boundary(config: TrainConfig, opened: Opened) -> float | None:
    """Where the noise levels of two experts meet, None for a single transformer."""
    if opened.two_experts != (config.expert is not None):
        advice = "leave out --expert" if config.expert else "choose one of them by --expert high or --expert low"
        raise ValueError(f"{config.model} has {'one transformer' if config.expert else 'two experts'}; {advice}")
    if config.expert is None and config.boundary is not None:
        raise ValueError("got --boundary without --expert, expected both or neither")
    if config.expert and config.from_scratch:
        raise ValueError("got --from-scratch with --expert: the other expert would not know the new text encoder")
    boundary = config.boundary if config.boundary is not None or not config.expert else opened.preset.boundary
    if boundary is not None and not 0 < boundary < 1:
        raise ValueError(f"got --boundary {boundary}, expected a noise level between 0 and 1, such as 0.875")
    return boundary


def main() -> None:
    config = cli.parse(TrainConfig, __doc__)
    with distributed.process_group(config.device) as device:
        config = dataclasses.replace(config, device=device)
        if config.dry_run:
            print(rehearse(config))
        else:
            train(config)


if __name__ == "__main__":
    cli.run(main)
