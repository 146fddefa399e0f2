"""Train: a Pusa LoRA on a text-to-video model, all of its weights, or a model from scratch.

Each step draws a noise level for every latent frame (PTSS), noises each frame to its own level, and moves the network's
velocity towards the true one (FAFM); see `flow.py`. Latents and prompt embeddings are computed once and kept.

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
import hashlib
import json
import math
import time
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
import sample
import tasks
from model import Wan
from support import cache, cli, cost, dataset, distributed, media, report, resume
from wan import checkpoint, text


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
    expert: str | None = cli.option(
        None, "which of Wan2.2's two transformers to train, over all noise levels", choices=("high", "low")
    )
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
    context: Callable[[list[str]], Tensor]  # prompts → (B, T, text_dim)
    validation: list[int]  # a window of each clip that no training step sees
    training: list[list[int]]  # buckets of windows, in each of which latents have one shape
    digest: str = ""  # of everything above
    skipped: tuple[dataset.Skipped, ...] = ()


def train(config: TrainConfig) -> Path:
    """Run a training to its end and return the path of what it made: `lora.safetensors`, or the model's folder."""
    config = _checked(config)
    out, device, dtype = Path(config.out), config.device, getattr(torch, config.dtype)
    if not config.resume and resume.newest_state(out):
        raise ValueError(f"got --out {out}, which holds a run; go on with --resume, or choose another folder")
    state = resume.load_state(out, vars(config), _MAY_CHANGE) if config.resume else None
    for result in (out / "lora.safetensors", out / "model"):
        if state is None and result.exists():
            raise ValueError(f"{result} is there, but no state to go on from; choose another --out, or move it away")

    encoder = None
    if config.from_scratch:
        encoder = checkpoint.load_text_encoder(config.model, torch.float32).requires_grad_()
    clips = prepare(config, encoder)
    transformer = _base(config)
    torch.manual_seed(config.seed)
    if config.from_scratch:
        transformer.init_weights()  # on the CPU, so that a seed gives the same on any device
        encoder.init_weights()
    base = cache.fingerprint(transformer) if distributed.rank() == 0 else None
    inputs = {"clips": clips.digest, "base model": distributed.agreed(base)}
    trainable(transformer, config)
    if config.compile:
        torch._dynamo.config.recompile_limit = 8 * len(clips.training)  # each shape is compiled apart
        transformer.compile_blocks()
    if config.gradient_checkpointing:
        recompute_blocks(transformer)
    models = [transformer, encoder] if config.from_scratch else [transformer]
    if distributed.size() > 1:
        shard(transformer, encoder, device)
    else:
        for model in models:
            model.to(device)
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(config, models)
    run = {"step": 0, "smooth": None, "best": None, "seconds": 0.0, "flops": 0.0}
    if state:
        run, state = resume.restore(state, inputs, trained, optimizers), None
        print(f"going on from step {run['step']}")
    resume.open_folder(out, vars(config), _facts(config, clips, transformer, trained), run["step"])

    progress = cli.Progress(config.steps, "training", run["step"])
    with resume.stopping() as stopping, resume.tensorboard(out, run["step"]) as board:
        for step in range(run["step"], config.steps):
            begun, lr, loss = time.monotonic(), config.lr * rate(step, config.steps), 0.0
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            for part in range(distributed.rank(), config.accumulate * distributed.size(), distributed.size()):
                with _autocast(device, dtype):
                    share = step_loss(transformer, clips, config, step, device, part)
                (share * distributed.size()).backward()  # gradients become the mean over the processes
                loss += share.item()
            loss = distributed.total(loss, device)
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step}; start again with a lower --lr and another --out")
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            done, last = step + 1, step + 1 == config.steps
            figures = _account(run, config, clips, transformer, step, loss, time.monotonic() - begun)
            if config.val_every and (last or done % config.val_every == 0):
                batch = math.ceil(config.batch / (config.accumulate * distributed.size()))
                validation = validate(transformer, clips, device, dtype, batch)
                figures |= distributed.agreed(validation)
                _keep_best(config, clips, transformer, figures, run)
            resume.log(out, board, {**run, "lr": lr, **figures})
            progress.step(smooth=run["smooth"], lr=lr, **figures)
            if config.sample_every and done % config.sample_every == 0:
                _filmstrip(config, transformer, clips, out / f"step-{done:06d}.png")
            stop = distributed.total(stopping(), device)  # if one is asked to, all do
            if last or stop or (config.save_every and done % config.save_every == 0):
                resume.save_state(out, config.keep, vars(config), inputs, run, trained, optimizers)
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after step {done}; go on with the same command and --resume")

    result = _write_result(config, transformer, encoder, clips)
    _filmstrip(config, transformer, clips, out / "filmstrip.png")
    _tell_skipped(clips.skipped)
    if distributed.rank() == 0:
        print(f"{result}\n{out / 'filmstrip.png'}\n{report.write(out)}")
    return result


def _base(config: TrainConfig) -> Wan:
    """The transformer to start from; on the CPU if it is to be drawn anew or shared, by the first of the processes.

    The other processes get its outline.
    """
    if distributed.rank() > 0:
        return checkpoint.outline(config.model)[0]
    device = "cpu" if config.from_scratch or distributed.size() > 1 else config.device
    return checkpoint.load_transformer(config.model, _stored(config), device, config.expert or "high")


def shard(transformer: Wan, encoder: nn.Module | None, device: str) -> None:
    """Share the parameters out over the processes, to be put together a block at a time."""
    units = []
    for block in transformer.blocks:  # the prompt's keys and values are computed before and apart from the rest of it
        units += [[block.cross_attn.k, block.cross_attn.v, block.cross_attn.norm_k], block]
    distributed.shard(transformer, units, device)
    if encoder:
        distributed.shard(encoder, [], device)


def make_optimizers(config: TrainConfig, models: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """AdamW; with `--muon`, Muon for the matrices of the blocks, scaled to AdamW's step, and AdamW for the rest."""
    matrices = [
        layer.weight
        for model in models
        for layer in model.blocks.modules()
        if config.muon and isinstance(layer, nn.Linear)
    ]
    apart = set(matrices)
    trained = (parameter for model in models for parameter in model.parameters() if parameter.requires_grad)
    rest = [parameter for parameter in trained if parameter not in apart]
    optimizers = [torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
    warm = min(100, steps // 10 + 1)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def step_loss(network: nn.Module, clips: Dataset, config: TrainConfig, step: int, device: str, part: int = 0) -> Tensor:
    """The FAFM loss of one part of a step's batch; the sum over all parts is that of the batch.

    Each process takes `--accumulate` parts. A part counts by its windows, of which one may have more than another.
    Everything that is drawn follows from the seed and the step, and is drawn for the whole batch whatever the part.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    picked = dataset.batch_of(step, config.batch, clips.training, config.seed)
    mine = slice(part, None, config.accumulate * distributed.size())
    x0 = torch.stack([clips.latents[i] for i in picked[mine]]).to(device)
    B, (C, F, H, W) = len(picked), x0.shape[1:]
    dropped = (torch.rand(B, generator=generator) < config.drop_caption).tolist()
    prompts = ["" if drop else clips.prompts[i] for drop, i in zip(dropped, picked, strict=True)]
    x1 = torch.randn(B, C, F, H, W, generator=generator)
    tau = flow.sample_tau(B, F, config.p_async, config.shift, generator)

    context = clips.context(prompts[mine])
    x1, tau = (whole[mine].to(device) for whole in (x1, tau))
    velocity = network(flow.interpolate(x0, x1, tau), tau, context)
    return flow.fafm_loss(velocity, x0, x1, tau, config.weighting) * (len(x0) / B)


@torch.no_grad()
def validate(
    network: nn.Module, clips: Dataset, device: str, dtype: torch.dtype, batch: int = 16
) -> dict[str, float]:
    """Figures on at most 16 fixed windows with fixed noise and τ, which can be compared between steps and runs.

    The training loss is noise around a mean that depends on the τ drawn. Here it is taken for three kinds of τ: one for
    all frames (`sync`), one each (`async`), and the first frame clean, one for the others (`clean`).

    `copy` asks what the network takes from a clean frame: with the first at τ = 0 and all others pure noise, it is the
    mean squared error of the frame next to the clean one as predicted in a single step, x1 - v, against the data. 0 is
    that frame to the bit; what the prompt alone tells leaves about the variance of the latents, which is 1.
    """
    shown = clips.validation[:16]
    V, F = len(shown), clips.latents[shown[0]].shape[1]
    generator = torch.Generator().manual_seed(0)
    x1s = [torch.randn(clips.latents[i].shape, generator=generator) for i in shown]
    together = ((torch.arange(V) + 0.5) / V)[:, None].expand(V, F)  # evenly over [0, 1]
    taus = {"sync": together, "async": torch.rand(V, F, generator=generator), "clean": together}
    if F > 1:
        taus["copy"] = torch.ones(V, F)
    for name in taus.keys() & {"clean", "copy"}:
        taus[name] = taus[name].clone()
        taus[name][:, 0] = 0
    figures = dict.fromkeys(taus, 0.0)
    for bucket in dataset.by_shape([x1.shape for x1 in x1s], range(V)):
        for members in (bucket[i : i + batch] for i in range(0, len(bucket), batch)):
            x0 = torch.stack([clips.latents[shown[i]] for i in members]).to(device)
            x1 = torch.stack([x1s[i] for i in members]).to(device)
            context = clips.context([clips.prompts[shown[i]] for i in members])
            for name, levels in taus.items():
                tau = levels[members].to(device)
                x = flow.interpolate(x0, x1, tau)
                with _autocast(device, dtype):
                    velocity = network(x, tau, context)
                if name == "copy":
                    error = (x - velocity - x0)[:, :, 1].square().mean()
                else:
                    error = flow.fafm_loss(velocity, x0, x1, tau)
                figures[name] += error.item() * len(members) / V
    return figures


def prepare(config: TrainConfig, encoder: nn.Module | None) -> Dataset:
    """Encode all clips, or find what an earlier run encoded, and set one in ten (at most 16) apart for validation.

    encoder: the text encoder if it is trained too, and prompts become something else at every step.
    """
    device, folder = config.device, Path(config.cache or Path(config.data) / ".cache")
    found, sources, skipped, frames, fps = _survey(config)
    vae = checkpoint.load_vae(config.model, device=device)

    def encode(window: Tensor) -> Tensor:
        with _autocast(device, getattr(torch, config.dtype)):
            return vae.encode(window.to(device))

    keys = cache.latent_keys(sources, frames, fps, f"{cache.fingerprint(vae)} {config.dtype}")
    for share in distributed.shares():
        encoded, damaged = cache.latents(sources[share], keys[share], frames, fps, encode, folder)
    skipped += damaged
    if damaged:
        _tell_skipped(damaged)
    _refuse(config, len(found), skipped)
    usable = [item for item in zip(sources, keys, encoded, strict=True) if item[2] is not None]

    if encoder:
        context = partial(text.embed, checkpoint.load_tokenizer(config.model), encoder)
    else:
        captions = sorted({source.clip.caption for source, _, _ in usable} | {""})
        for share in distributed.shares():
            stored = cache.prompts(config.model, captions[share], getattr(torch, config.dtype), device, folder)
        known, text_len = dict(zip(captions, stored.places, strict=True)), checkpoint.load_config(config.model).text_len

        def context(prompts: list[str]) -> Tensor:
            return text.padded(list(cache.Kept(known[prompt] for prompt in prompts)), text_len).to(device)

    places, prompts, sizes, windows = [], [], [], []  # windows: of each clip, the indices of its own
    for source, _, pieces in usable:
        windows.append(range(len(places), len(places) + len(pieces)))
        places += pieces.places
        prompts += [source.clip.caption] * len(pieces)
        sizes += [source.size] * len(pieces)  # in pixels; of one size, latents have one shape
    latents = cache.Kept(places)
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = min(16, len(usable) // 10)
    # A dataset too small to spare a clip is validated on what it trains on: better than no figure at all.
    validation = [windows[k][0] for k in order[:held] or order]
    training = [i for k in order[held:] for i in windows[k]]
    digest = hashlib.sha256(json.dumps([(source.clip.caption, key) for source, key, _ in usable]).encode()).hexdigest()
    buckets = dataset.by_shape(sizes, training)
    return Dataset(latents, prompts, context, validation, buckets, digest[:16], tuple(skipped))


def _survey(config: TrainConfig) -> tuple[list[dataset.Clip], list[dataset.Source], list[dataset.Skipped], int, float]:
    """The clips found, those that can be used, those that cannot, and frames and fps of a window; tells what it saw."""
    preset = checkpoint.load_preset(config.model)
    size = cli.parse_size(config.size) if config.size else preset.size
    frames = preset.frames if config.frames is None else config.frames
    tasks.latent_frames(frames)
    found = dataset.find_clips(config.data)
    sources, skipped = dataset.survey(found, size, frames, preset.fps, config.buckets)
    _refuse(config, len(found), skipped)
    _tell_skipped(skipped)
    return found, sources, skipped, frames, preset.fps


def _refuse(config: TrainConfig, found: int, skipped: list[dataset.Skipped]) -> None:
    if skipped and (config.strict or len(skipped) == found):
        first = f"{len(skipped)} of {found} clips in {config.data} cannot be used, the first is {skipped[0].path.name}"
        advice = "mend or remove them, or leave out --strict" if len(skipped) < found else "mend them or add others"
        raise ValueError(f"{first} ({skipped[0].reason}); {advice}")


def _tell_skipped(skipped: tuple[dataset.Skipped, ...] | list[dataset.Skipped]) -> None:
    if skipped:
        print(f"clips left out: {len(skipped)}")
    for path, reason in skipped:
        print(f"  {path.name}: {reason}")


def trainable(transformer: Wan, config: TrainConfig) -> list[nn.Parameter]:
    """Make ready, and return, what a run trains of the transformer: all of it, or the pairs of a new LoRA."""
    if not config.full:
        return lora.inject(transformer, config.rank, config.alpha)
    return list(transformer.requires_grad_(True).parameters())


def recompute_blocks(transformer: Wan) -> None:
    """Gradient checkpointing: keep only what goes into each block, and compute the block again when going back."""
    for block in transformer.blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)


def rehearse(config: TrainConfig) -> str:
    """What a run would see and need, without its weights: clips, buckets, parameters, memory."""
    config = _checked(config)
    found, sources, _, frames, fps = _survey(config)
    buckets: dict[tuple[int, int], int] = {}
    for source in sources:
        buckets[source.size] = buckets.get(source.size, 0) + source.windows
    lines = [f"{len(sources)} of {len(found)} clips, {sum(buckets.values())} windows of {frames} frames at {fps:g} fps"]
    lines += [f"  {width}x{height}: {count} windows" for (width, height), count in sorted(buckets.items())]

    transformer, rank = checkpoint.load_config(config.model), None if config.full else config.rank
    width, height = max(buckets, key=math.prod)
    shape = (transformer.in_dim, tasks.latent_frames(frames), height // 8, width // 8)
    each = math.ceil(config.batch / config.gpus / config.accumulate)
    stored = _stored(config)
    plain, thrifty = (
        cost.memory(
            transformer, partial(trainable, config=config), recompute, (each, *shape),
            stored, getattr(torch, config.dtype), config.gpus,
        )
        for recompute in (None, recompute_blocks)
    )  # fmt: skip
    flops = config.steps * config.batch * cost.window_flops(transformer, shape, rank, config.gradient_checkpointing)
    trained = plain.trained * config.gpus / 4
    others = plain.weights * config.gpus / stored.itemsize
    lines += [
        f"{trained / 1e6:.2f} M trainable parameters, {others / 1e6:.2f} M frozen",
        f"{config.steps} steps of {config.batch} windows of up to {cost.tokens(shape)} tokens: {flops:.3g} FLOP",
        f"memory of {f'each of {config.gpus} GPUs' if config.gpus > 1 else 'the device'}, windows at a time: {each}",
        "                    plain      with --gradient-checkpointing",
    ]
    unit, scale = ("GiB", 2**30) if plain.total >= 2**30 else ("MiB", 2**20)
    for name, a, b in zip((*plain._fields, "together"), (*plain, plain.total), (*thrifty, thrifty.total), strict=True):
        lines.append(f"  {name:<12}{a / scale:>9.2f} {unit}{b / scale:>9.2f} {unit}")
    return "\n".join(lines)


def _facts(config: TrainConfig, clips: Dataset, transformer: Wan, trained: list[nn.Parameter]) -> dict:
    gpu, many = torch.device(config.device).type == "cuda", distributed.size()
    threads = f"threads: {torch.get_num_threads()}"
    device = torch.cuda.get_device_name(config.device) if gpu else f"{config.device.upper()}, {threads}"
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


def _account(
    run: dict, config: TrainConfig, clips: Dataset, transformer: Wan, step: int, loss: float, seconds: float
) -> dict[str, float]:
    """Add a step to the figures of the run so far, and return its own."""
    shape = clips.latents[dataset.batch_of(step, config.batch, clips.training, config.seed)[0]].shape
    rank, again = None if config.full else config.rank, config.gradient_checkpointing
    run["step"] = step + 1
    run["smooth"] = loss if step == 0 else 0.98 * run["smooth"] + 0.02 * loss
    run["seconds"] += seconds
    run["flops"] += config.batch * cost.window_flops(transformer.config, shape, rank, again)
    speed = config.batch / seconds
    return {"loss": loss, "samples/s": speed, "tokens/s": speed * cost.tokens(shape)}


def _keep_best(config: TrainConfig, clips: Dataset, transformer: Wan, figures: dict, run: dict) -> None:
    """Write `best.safetensors` if the mean of the three validation losses is the lowest so far."""
    score = sum(figures[name] for name in ("sync", "async", "clean")) / 3
    if math.isfinite(score) and (run["best"] is None or score < run["best"]):
        run["best"] = score
        if not config.full:
            _save_lora(config, clips, transformer, run["step"], "best.safetensors")


def _save_lora(config: TrainConfig, clips: Dataset, transformer: Wan, step: int, name: str) -> Path:
    path = Path(config.out) / name
    metadata = {"steps": str(step), "dataset": clips.digest} | ({"expert": config.expert} if config.expert else {})
    transformer = _gathered(config, transformer, 0)
    if distributed.rank() == 0:
        lora.save(path, lora.extract(transformer), base=config.model, metadata=metadata)
    return path


def _gathered(config: TrainConfig, model: nn.Module, part: int) -> nn.Module:
    """A part of the pipeline with whole parameters; of several processes, the first one gets those that are trained."""
    if distributed.size() == 1:
        return model
    outline = checkpoint.outline(config.model)
    trainable(outline[0], config)
    return distributed.gathered(model, outline[part])


def _write_result(config: TrainConfig, transformer: Wan, encoder: nn.Module | None, clips: Dataset) -> Path:
    if not config.full:
        return _save_lora(config, clips, transformer, config.steps, "lora.safetensors")
    transformer = _gathered(config, transformer, 0)
    encoder = encoder and _gathered(config, encoder, 2)
    result, preset = Path(config.out) / "model", checkpoint.load_preset(config.model)
    if config.expert:
        preset = dataclasses.replace(preset, boundary=config.boundary)
    if distributed.rank() > 0:
        return result
    vae, tokenizer = checkpoint.load_vae(config.model), checkpoint.load_tokenizer(config.model)
    encoder = encoder or checkpoint.load_text_encoder(config.model)
    experts = {config.expert or "high": transformer}
    if config.expert:
        other = "low" if config.expert == "high" else "high"
        experts[other] = checkpoint.load_transformer(config.model, expert=other)
    checkpoint.save_pipeline(
        result, experts["high"], vae, encoder, tokenizer, preset.shift,
        transformer_2=experts.get("low"), boundary=preset.boundary,
    )  # fmt: skip
    checkpoint.save_preset(result, preset)
    return result


@torch.no_grad()
def _filmstrip(config: TrainConfig, transformer: Wan, clips: Dataset, path: Path) -> None:
    """Two validation clips beside what the network makes of their first latent, and of their prompt alone.

    Of two experts, the one that is trained walks its own steps: "high" then goes to the end at once, "low" begins from
    the clip, noised to where its steps begin.
    """
    vae = checkpoint.load_vae(config.model, device=config.device)
    preset = checkpoint.load_preset(config.model)
    sigma = flow.sigma_schedule(preset.steps, preset.shift)
    mine = sigma >= 0 if config.expert is None else (sigma >= config.boundary) == (config.expert == "high")
    mine[-1] = True
    rows, marks = [], []
    for index in clips.validation[:2]:
        x0 = clips.latents[index][None].to(config.device)
        F = x0.shape[2]
        context = clips.context([clips.prompts[index]])
        x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(config.device)
        rows.append((f"clip: {clips.prompts[index]}", sample.decode(vae, x0)))
        marks.append([True] * tasks.pixel_frames(F))
        for name, m in (("from its first frame", [0.0] + [1.0] * (F - 1)), ("from its prompt", [1.0] * F)):
            taus = tasks.tau_schedule(m, preset.steps, preset.shift)[mine].to(config.device)
            start = flow.interpolate(x0, x1, taus[:1])
            z = flow.euler(lambda z, t, context=context: transformer(z, t, context), start, taus)
            rows.append((name, sample.decode(vae, z)))
            marks.append([m[tasks.latent_index(n, tasks.pixel_frames(F))] == 0 for n in range(tasks.pixel_frames(F))])
    if distributed.rank() == 0:
        media.save_image(path, media.filmstrip(rows, marks=marks))


def _autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` what bears it; the weights stay as they are."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def _stored(config: TrainConfig) -> torch.dtype:
    """The type to hold weights in: frozen ones need not be finer than they compute."""
    return torch.float32 if config.full else getattr(torch, config.dtype)


def _checked(config: TrainConfig) -> TrainConfig:
    """The config with device and dtype decided. Raises ValueError for what no run can be."""
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
    for name in ("p_async", "drop_caption"):
        if not 0 <= getattr(config, name) <= 1:
            flag = name.replace("_", "-")
            raise ValueError(f"got --{flag} {getattr(config, name)}, expected a probability in [0, 1]")
    flow.shifted(torch.ones(1), config.shift)
    if config.from_scratch and not config.full:
        raise ValueError("got --from-scratch without --full: a LoRA needs trained weights under it; add --full")
    if config.muon and not config.full:
        raise ValueError("got --muon without --full: Muon is for whole matrices, not for a LoRA's pairs; add --full")
    boundary = _boundary(config)
    device = cli.pick_device(config.device)
    dtype = str(cli.pick_dtype(config.dtype, device)).removeprefix("torch.")
    return dataclasses.replace(config, device=device, dtype=dtype, boundary=boundary)


def _boundary(config: TrainConfig) -> float | None:
    """Where the noise levels of two experts meet, None for a single transformer."""
    if checkpoint.has_two_experts(config.model) != (config.expert is not None):
        advice = "leave out --expert" if config.expert else "choose one of them by --expert high or --expert low"
        raise ValueError(f"{config.model} has {'one transformer' if config.expert else 'two experts'}; {advice}")
    if config.expert is None:
        if config.boundary is not None:
            raise ValueError("got --boundary without --expert, expected both or neither")
        return None
    if config.from_scratch:
        raise ValueError("got --from-scratch with --expert: the other expert would not know the new text encoder")
    boundary = checkpoint.load_preset(config.model).boundary if config.boundary is None else config.boundary
    if not 0 < boundary < 1:
        raise ValueError(f"got --boundary {boundary}, expected a noise level between 0 and 1, such as 0.875")
    return boundary


def main() -> None:
    config = cli.parse(TrainConfig, __doc__)
    with distributed.joined(config.device) as device:
        config = dataclasses.replace(config, device=device)
        if config.dry_run:
            print(rehearse(config))
        else:
            train(config)


if __name__ == "__main__":
    cli.run(main)
