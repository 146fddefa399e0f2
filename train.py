"""Train: a Pusa LoRA on a text-to-video model, all of its weights, or a model from scratch.

Each step draws a noise level for every latent frame (PTSS), noises each frame to its own level, and moves the network's
velocity towards the true one (FAFM); see `flow.py`. Latents and prompt embeddings are computed once and stored.

    python train.py --data clips/                                    a Pusa LoRA on the embedded model, in minutes
    python train.py --data clips/ --full --from-scratch --p-async 0  text-to-video pretraining
    python train.py --data clips/ --rank 512 --dry-run               what a run would see and need
    torchrun --nproc-per-node 8 train.py --data clips/               on eight GPUs, see `support/distributed.py`

A step depends on the seed and its own number alone, so a run that was stopped, or killed at any moment, goes on with
`--resume` as if it had not been: on a CPU, with the same number of threads, its LoRA is the same to the byte.
Everything is written to the folder `--out`; `python -m support.report` makes a page of it.

An expert of Wan2.2 (`--expert`) is trained on τ over all of [0, 1], not on its side of the boundary alone: when it
samples, its conditions are often clean (m·σ = 0), so it must have seen clean frames.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import flow
import lora
from model import Wan
from support import cli, cost, dataset, distributed, resume
from support.dataset import Dataset
from wan import checkpoint
from wan.checkpoint import Opened

_RATE = (1e-300, 1 - 1e-9, "a number between 0 and 1, such as 1e-3")
_LEVEL = (1e-9, 1 - 1e-9, "a noise level between 0 and 1, such as 0.875")
Prepare = Callable[[Opened, "TrainConfig", nn.Module | None], Dataset]  # the module: a text encoder to be trained


@dataclass(frozen=True)
class TrainConfig:
    data: str = cli.option("clips", "folder of clips with captions")
    model: str = cli.option("checkpoints/tiny", "base model: folder or Hugging Face repository")
    out: str | None = cli.option(None, "folder of this run (default: the next free runs/pusa-NNN)")
    cache: str | None = cli.option(None, "folder of latents and embeddings (default: .cache in --data)")
    strict: bool = cli.option(False, "stop if any clip cannot be used, instead of going on without it")
    size: str | None = cli.option(None, "pixels as WxH (default: the model's); others get as many in their shape")
    buckets: bool = cli.option(True, "keep about the shape of each clip; --no-buckets crops all to --size")
    frames: int | None = cli.option(None, "pixel frames N = 4k+1 of a window (default: the model's own)")
    rank: int = cli.option(32, "LoRA rank; the paper's is 512 on Wan 14B", cli.COUNT)
    alpha: float | None = cli.option(None, "LoRA alpha (default: the rank)", cli.POSITIVE)
    lr: float | None = cli.option(None, "peak learning rate (default: 1e-3; of large models the paper's 1e-5)", _RATE)
    steps: int = cli.option(300, "optimizer steps", cli.COUNT)
    batch: int = cli.option(8, "windows a step", cli.COUNT)
    accumulate: int = cli.option(1, "parts that a step's batch is taken in, one by one, to save memory", cli.COUNT)
    gradient_checkpointing: bool = cli.option(False, "compute each block again in the backward pass, to save memory")
    p_async: float = cli.option(1.0, "PTSS: probability that each frame draws its own noise level", cli.SHARE)
    two_levels: bool = cli.option(False, "PTSS: such a frame takes one of two levels, not a level of its own")
    shift: float = cli.option(1.0, "shift of the noise levels drawn; 5 is Pusa's", cli.POSITIVE)
    weighting: str = cli.option("none", "weight of each frame's loss", choices=("none", "bell"))
    drop_caption: float = cli.option(0.1, "probability of training without the caption, for guidance", cli.SHARE)
    expert: str | None = cli.option(None, "which of Wan2.2's two transformers to train", choices=("high", "low"))
    boundary: float | None = cli.option(None, "with --expert: level that parts the two (default: the model's)", _LEVEL)
    full: bool = cli.option(False, "train all weights of the transformer instead of a LoRA")
    from_scratch: bool = cli.option(False, "with --full: start from random weights, and train the text encoder too")
    muon: bool = cli.option(False, "with --full: train the blocks' matrices by Muon, faster from scratch than AdamW")
    save_every: int = cli.option(200, "steps between saves of the training state")
    keep: int = cli.option(2, "how many of the last states to keep", cli.COUNT)
    val_every: int = cli.option(100, "steps between validations")
    sample_every: int = cli.option(0, "steps between filmstrips of a fixed seed; 0: only at the end")
    resume: bool = cli.option(False, "go on from the last state in --out (default: the last runs/pusa-NNN)")
    dry_run: bool = cli.option(False, "print clips, buckets, parameters and memory, and stop")
    gpus: int = cli.option(1, "with --dry-run: GPUs that share batch, weights and optimizer", cli.COUNT)
    compile: bool = cli.option(False, "compile the network: slow to start, then faster (needs a C++ compiler)")
    seed: int = cli.option(0, "seed of everything random", cli.SEED)
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type to compute in", choices=("auto", "float32", "bfloat16"))


# Flags that may change when a run goes on: they say where and how it is computed, not what. The data may have moved,
# as their content is compared, not their path. --steps may be raised too: the learning rate then comes down later.
_MAY_CHANGE = {"data", "out", "cache", "strict", "accumulate", "gradient_checkpointing", "save_every", "keep",
               "val_every", "sample_every", "resume", "dry_run", "gpus", "compile", "device"}  # fmt: skip


class Batch(NamedTuple):
    """b windows of a step's batch, each with its noise, noise levels and prompt."""

    x0: Tensor  # (b, C, F, H, W)
    x1: Tensor  # (b, C, F, H, W)
    tau: Tensor  # (b, F)
    prompts: list[str]
    share: float  # b as a fraction of the windows of the step's batch


def train(config: TrainConfig, prepare: Prepare | None = None) -> Path:
    """Train on the data that `prepare`, or else `encoded_clips`, makes; returns the path of the LoRA or the model."""
    opened = checkpoint.open(config.model, Wan)
    config = checked(config, opened)
    with resume.claim(vars(config), _MAY_CHANGE) as run:
        clips, models, inputs = set_up(opened, config, prepare or encoded_clips)
        transformer, device, dtype = models["transformer"], config.device, getattr(torch, config.dtype)
        optimizers = make_optimizers(config, list(models.values()))
        parts = range(config.accumulate * distributed.size())  # of each step's batch; without gradients, 4x fit
        ask = partial(validate, transformer, clips, device, dtype, 4 * math.ceil(config.batch / len(parts)))
        flops = cache(partial(cost.window_flops, outline(opened, config)["transformer"]))

        with run.open(models, optimizers, inputs, {"base": config.model, **dataset.facts(clips)}) as steps:
            if run.due(config.val_every) and steps.start == 0:
                run.log(run.judge(ask()))  # what there is before anything is trained
            for step in steps:
                begun, lr, loss = time.monotonic(), config.lr * rate(step, config.steps), 0.0
                for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                    group["lr"] = lr
                for part in distributed.my_share(parts):
                    batch = draw(clips, config, step, part)
                    with _autocast(device, dtype):
                        part_loss = step_loss(transformer, batch, clips.context, config.weighting, device)
                    (part_loss * distributed.size()).backward()  # as gradients become the mean over the processes
                    loss += part_loss.item()
                loss = distributed.all_reduce(loss, device)
                if not math.isfinite(loss):
                    raise ValueError(f"the loss is {loss} at step {step}; start anew with a lower --lr, another --out")
                torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

                shape = batch.x0.shape[1:]
                figures = run.count(loss, time.monotonic() - begun, cost.tokens(shape), flops(shape)) | {"lr": lr}
                if run.due(config.val_every, at_end=True):
                    figures |= run.judge(ask())
                    if run.figures["best"] == step + 1 and not config.full:
                        write(run.out / "best.safetensors", opened, models, config, clips.digest, step + 1)
                run.log(figures)
                if run.due(config.sample_every):
                    run.save_filmstrip(f"step-{step + 1:06d}.png", *filmstrip(opened, transformer, clips, config))
                run.save()

        result = run.out / ("model" if config.full else "lora.safetensors")
        write(result, opened, models, config, clips.digest, config.steps)
        run.save_filmstrip("filmstrip.png", *filmstrip(opened, transformer, clips, config))
        dataset.tell_skipped(clips.skipped, len(clips.latents), config.data, config.strict)
        run.finish(result)
    return result


def set_up(opened: Opened, config: TrainConfig, prepare: Prepare) -> tuple[Dataset, nn.ModuleDict, dict]:
    """The data, the models on their device and ready to train, and fingerprints of what the run is made from."""
    encoder = opened.text_encoder(torch.float32).requires_grad_() if config.from_scratch else None
    clips = prepare(opened, config, encoder)
    first, alone = distributed.rank() == 0, distributed.size() == 1  # `shard` sends the others the first one's weights
    stored = torch.float32 if config.full else getattr(torch, config.dtype)  # frozen ones take the type to compute in
    device = config.device if alone and not config.from_scratch else "cpu"
    transformer = opened.transformer(stored, device, config.expert or "high") if first else opened.outline()[0]
    models = nn.ModuleDict({"transformer": transformer} | ({"text_encoder": encoder} if encoder else {}))
    torch.manual_seed(config.seed)
    for model in models.values() if config.from_scratch else ():
        model.init_weights()  # on the CPU, so that a seed gives the same on any device
    inputs = {"clips": clips.digest, "base model": checkpoint.fingerprint(transformer) if first else None}
    trainable(transformer, config)
    if config.compile:
        torch._dynamo.config.recompile_limit = 8 * len(clips.training)  # each shape of latents is compiled separately
        transformer.compile_blocks()
    if config.gradient_checkpointing:
        transformer.recompute_blocks()
    if not alone:
        shard(models, config.device)
    return clips, models.to(config.device), inputs


def encoded_clips(opened: Opened, config: TrainConfig, encoder: nn.Module | None) -> Dataset:
    """Encode clips and captions, or find what an earlier run encoded; encoder: the text encoder if it is trained."""
    vae, dtype = opened.vae(device=config.device), getattr(torch, config.dtype)

    def encode(window: Tensor) -> Tensor:
        with _autocast(config.device, dtype):
            return vae.encode(window.to(config.device))

    name = f"{checkpoint.fingerprint(vae)} {config.dtype}"
    cut = dataset.Cut(cli.parse_size(config.size), config.frames, opened.preset.fps, config.buckets)
    sources, skipped = dataset.look_through(config.data, cut, config.strict)
    load = partial(dataset.latents, cut=cut, encode=encode, encoder_name=name, folder=config.cache)
    encoded, damaged = distributed.each_its_share(load, sources)
    if damaged:
        dataset.tell_skipped(skipped + damaged, sum(map(bool, encoded)), config.data, config.strict)
    contexts = partial(context_of, opened, config, encoder)
    return dataset.assembled(sources, encoded, skipped + damaged, contexts, config.seed)


def context_of(opened: Opened, config: TrainConfig, encoder: nn.Module | None, captions: list[str]) -> dataset.Context:
    """What gives the embeddings (b, T, text_dim) of prompts: `encoder` if it is trained, else what is stored."""
    if encoder:
        return partial(opened.tokenizer().embed, encoder)
    dtype, folder = getattr(torch, config.dtype), config.cache
    stored = partial(opened.encode_prompts, dtype=dtype, device=config.device, cache_folder=folder)
    embed = distributed.each_its_share(stored, sorted({*captions, ""}))  # guidance needs the empty one
    return lambda prompts: embed(prompts).to(config.device)


def draw(clips: Dataset, config: TrainConfig, step: int, part: int = 0) -> Batch:
    """One part of a step's batch, drawn from seed and step alone: windows of a bucket, prompts, noise, τ by PTSS."""
    generator = torch.Generator().manual_seed(cli.nth_seed(config.seed, step))
    picked = dataset.batch_of(step, config.batch, clips.training, config.seed)
    mine = slice(part, None, config.accumulate * distributed.size())
    x0 = torch.stack([clips.latents[i] for i in picked[mine]])
    B, (C, F, H, W) = len(picked), x0.shape[1:]
    dropped = (torch.rand(B, generator=generator) < config.drop_caption).tolist()
    prompts = ["" if drop else clips.prompts[i] for drop, i in zip(dropped, picked, strict=True)]
    x1 = torch.randn(B, C, F, H, W, generator=generator)
    tau = flow.sample_tau(B, F, config.p_async, config.shift, generator, config.two_levels)
    return Batch(x0, x1[mine], tau[mine], prompts[mine], len(x0) / B)


def step_loss(network: nn.Module, batch: Batch, context: dataset.Context, weighting: str, device: str) -> Tensor:
    """The FAFM loss (scalar) of one part of a step's batch, times its share: the parts' add up to the batch's."""
    x0, x1, tau = (tensor.to(device) for tensor in batch[:3])
    velocity = network(flow.interpolate(x0, x1, tau), tau, context(batch.prompts))
    return flow.fafm_loss(velocity, x0, x1, tau, weighting) * batch.share


@torch.no_grad()
def validate(network: nn.Module, clips: Dataset, device: str, dtype: torch.dtype, batch: int = 16) -> dict[str, Tensor]:
    """The loss of each of T fixed triples of clip, noise and τ, at least 64, by kind of τ → (T,) for each kind.

    `sync` is one level for all frames, `async` one each, `clean` a clean first frame and one level for the others, and
    `copy` the error of the frame next to a clean one, predicted in one step with all others pure noise. Triples are the
    same at every step and in every run with these clips. batch: how many each process takes at a time.
    """
    shapes = [clips.latents[i].shape for i in clips.validation]
    V, losses = len(shapes), {}
    T = V * math.ceil(64 / V)
    kinds = ("sync", "async", "clean", "copy") if shapes[0][1] > 1 else ("sync", "async", "clean")
    for places in dataset.by_shape(shapes, range(V)):
        asked = [(kind, t) for kind in kinds for t in range(T) if t % V in places]
        for mine in distributed.in_shares(asked, batch):
            shown = [clips.validation[t % V] for _, t in mine]
            x0 = torch.stack([clips.latents[i] for i in shown]).to(device)
            noised = zip(*(_noise(kind, t, T, x0.shape[1:]) for kind, t in mine), strict=True)
            x1, tau = (torch.stack(part).to(device) for part in noised)
            with _autocast(device, dtype):
                velocity = network(flow.interpolate(x0, x1, tau), tau, clips.context([clips.prompts[i] for i in shown]))
            errors = (velocity.float() - (x1 - x0)).square()
            for error, (kind, t) in zip(errors, mine, strict=True):
                losses[kind, t] = (error[:, 1:2] if kind == "copy" else error).mean().item()
    losses = {asked: loss for found in distributed.gather(losses) for asked, loss in found.items()}
    return {kind: torch.tensor([losses[kind, t] for t in range(T)]) for kind in kinds}


def _noise(kind: str, t: int, T: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The noise x1 of `shape` (C, F, H, W) and the τ (F,) of triple t of T in a validation; see there for the kinds."""
    generator, F = torch.Generator().manual_seed(t), shape[1]
    x1, apart = torch.randn(shape, generator=generator), torch.rand(F, generator=generator)
    together, later = torch.full((F,), (t + 0.5) / T), (torch.arange(F) > 0).float()  # evenly in [0, 1]; not the first
    return x1, {"sync": together, "async": apart, "clean": together * later, "copy": later}[kind]


def rate(step: int, steps: int) -> float:
    """The fraction of the peak learning rate at a step: a linear warm-up, then half a cosine down to 0."""
    warm = min(100, steps // 10 + 1)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def trainable(transformer: Wan, config: TrainConfig) -> list[nn.Parameter]:
    """Give the transformer a new LoRA and freeze the rest, or with --full unfreeze it all; returns what is trained."""
    full = config.full
    return [*transformer.requires_grad_().parameters()] if full else lora.inject(transformer, config.rank, config.alpha)


def shard(models: nn.ModuleDict, device: str) -> None:
    """Give each process a shard of every parameter; those of a block are gathered when it computes."""
    for name, model in models.items():
        blocks = model.blocks if name == "transformer" else ()  # a prompt's keys and values come before their forward
        units = [[block.cross_attn.k, block.cross_attn.v, block.cross_attn.norm_k] for block in blocks]
        distributed.shard(model, [*units, *blocks], device)


def make_optimizers(config: TrainConfig, models: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """AdamW; with `--muon`, Muon for the matrices of the blocks, scaled to AdamW's step, and AdamW for the rest."""
    layers = [layer for model in models for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    matrices = {layer.weight: None for layer in layers if config.muon}
    rest = [p for model in models for p in model.parameters() if p.requires_grad and p not in matrices]
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01)]  # the rate is set at each step
    if matrices:
        optimizers.append(torch.optim.Muon(list(matrices), weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def outline(opened: Opened, config: TrainConfig) -> nn.ModuleDict:
    """The models on "meta", without memory, the transformer made ready for training."""
    transformer, _, encoder = opened.outline()
    trainable(transformer, config)
    if config.gradient_checkpointing:
        transformer.recompute_blocks()
    return nn.ModuleDict({"transformer": transformer, "text_encoder": encoder})


def rehearse(config: TrainConfig) -> None:
    """Print what a run would see and need, without loading weights: clips, buckets, parameters, memory."""
    opened = checkpoint.open(config.model, Wan, rehearsal=True)
    config = checked(config, opened)
    cut = dataset.Cut(cli.parse_size(config.size), config.frames, opened.preset.fps, config.buckets)
    sources, _ = dataset.look_through(config.data, cut, config.strict)
    width, height = max((source.size for source in sources), key=math.prod)
    at_a_time, dtype = math.ceil(config.batch / config.gpus / config.accumulate), getattr(torch, config.dtype)
    shape = (at_a_time, opened.config.in_dim, cli.latent_frames(config.frames), height // 8, width // 8)
    print(cost.training(
        outline(opened, config)["transformer"], partial(trainable, config=config), Wan.recompute_blocks, shape,
        torch.float32 if config.full else dtype, dtype, config.gpus, config.steps, config.batch,
    ))  # fmt: skip


def write(path: Path, opened: Opened, models: nn.ModuleDict, config: TrainConfig, digest: str, step: int) -> None:
    """Write what is trained, after `step` steps: a LoRA, or the opened model with it; digest: of the dataset."""
    models = resume.full_models(models, outline(opened, config))
    if distributed.rank() > 0:
        return
    if config.full:
        encoder = models["text_encoder"] if config.from_scratch else None
        opened.save_with(path, models["transformer"], encoder, config.expert, config.boundary)
    else:
        metadata = {"steps": str(step), "dataset": digest} | ({"expert": config.expert} if config.expert else {})
        lora.save(path, lora.extract(models["transformer"]), base=config.model, metadata=metadata)


@torch.no_grad()
def filmstrip(
    opened: Opened, transformer: Wan, clips: Dataset, config: TrainConfig
) -> tuple[list[tuple[str, Tensor]], list[list[bool]]]:
    """Two validation clips beside what the network makes of their first latent, and of their prompt alone.

    An expert walks only its side of the boundary: "high" then goes to the end in one step, "low" begins from the clip,
    noised to where its steps begin. Returns rows of (title, video (3, N, 8H, 8W)), and which frames of each were given.
    """
    vae, preset = opened.vae(device=config.device), opened.preset
    sigma = flow.sigma_schedule(preset.steps, preset.shift)
    walked = sigma >= 0 if config.expert is None else (sigma >= config.boundary) == (config.expert == "high")
    walked[-1], sigma = True, sigma[:, None]  # a frame's τ is m · σ
    rows, marks = [], []
    for index in clips.validation[:2]:
        x0 = clips.latents[index][None].to(config.device)
        F, N = x0.shape[2], cli.pixel_frames(x0.shape[2])
        x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(config.device)
        velocity = partial(transformer, context=clips.context([clips.prompts[index]]))
        clean = {f"clip: {clips.prompts[index]}": F, "from its first frame": 1, "from its prompt": 0}
        for title, m in ((title, [0.0] * k + [1.0] * (F - k)) for title, k in clean.items()):
            latents = flow.denoise(velocity, x0, x1, (sigma * torch.tensor(m))[walked]) if any(m) else x0
            rows.append((title, vae.decode(latents)[0].float().cpu()))
            marks.append([m[cli.latent_index(n, N)] == 0 for n in range(N)])
    return rows, marks


def _autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` where autocast deems it safe; the weights stay as they are."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def checked(config: TrainConfig, opened: Opened) -> TrainConfig:
    """The config, filled in with the model's values. Raises ValueError for flags that exclude each other."""
    processes, gpus, expert, full, expect = distributed.size(), config.gpus, config.expert, config.full, cli.expect
    many = f" on {processes} processes" if processes > 1 else ""
    expect(config.dry_run or gpus == 1, f"--gpus {gpus} without --dry-run", "torchrun to say how many")
    parts = f"--accumulate {config.accumulate}{many or f' on {gpus} GPUs' * (gpus > 1)} for --batch {config.batch}"
    expect(config.accumulate * processes * gpus <= config.batch, parts, "a window for each part")
    expect(not (many and (config.muon or config.compile)), f"--muon or --compile{many}", "one process, or neither flag")
    expect(full or not config.from_scratch, "--from-scratch without --full", "both, as a LoRA needs trained weights")
    expect(full or not config.muon, "--muon without --full", "both, as Muon is for whole matrices, not a LoRA's pairs")
    expect(config.p_async > 0 or not config.two_levels, "--two-levels with --p-async 0", "one, as all frames share one")
    choice = "high or low, as it has two experts" if opened.two_experts else "none, as it has one transformer"
    expect(opened.two_experts == bool(expert), f"--expert {expert} for {config.model}", choice)
    expect(expert or config.boundary is None, "--boundary without --expert", "both or neither")
    expect(not (expert and config.from_scratch), "--from-scratch with --expert", "one, as experts share a text encoder")
    width, height = cli.parse_size(config.size or "{}x{}".format(*opened.preset.size))
    frames = opened.preset.frames if config.frames is None else config.frames
    cli.latent_frames(frames)
    device = cli.pick_device(config.device)
    return cli.check(replace(
        config, size=f"{width}x{height}", frames=frames, cache=config.cache or str(Path(config.data) / ".cache"),
        boundary=opened.preset.boundary if expert and config.boundary is None else config.boundary,
        device=device, dtype=str(cli.pick_dtype(config.dtype, device)).removeprefix("torch."),
        lr=config.lr or (1e-3 if opened.config.dim < 1024 else 1e-5),  # a wider model wants smaller steps
    ))  # fmt: skip


def main() -> None:
    config = cli.parse(TrainConfig, __doc__)
    with distributed.process_group(cli.pick_device(config.device)) as device:
        (rehearse if config.dry_run else train)(replace(config, device=device))


if __name__ == "__main__":
    cli.run(main)
