"""Sample: make a video by a task of `tasks.py`, on the embedded model or on any Wan text-to-video model.

The task says which latent frames are given and how noisy they stay; the text encoder turns the prompt into embeddings;
`flow.euler` walks the table of noise levels; the VAE turns latents into pixels. Longer videos than the model's are made
window by window, each conditioned on the edge of the one before.

The VAE, which is small, is there from beginning to end. Of the large parts each is loaded when it is its turn and gone
when the next one comes: text encoder, transformer, of two experts one after the other. `--offload` is for a transformer
that is larger than the GPU's memory.

    python sample.py --task extend
    python sample.py --task i2v --image start.png --prompt "a red circle moving left" --seed 1
    python sample.py --task keyframes --image a.png b.png c.png --at 0,4,8 --noise 0,0.2,0.3

Beside the video are a filmstrip of what was given and what was generated, and a JSON file with every setting;
`--from-json` runs it again. With `--prompts` the model makes a captioned clip of each line of a file, for training:

    python sample.py --task t2v --prompts prompts.txt --out data/mine
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import flow
import lora
import tasks
from model import Wan
from support import cache, cli, cost, dataset, media, plots
from support.offload import offload
from wan import checkpoint, text
from wan.vae import WanVAE

EXAMPLES = Path("clips")
# What `--preset` puts in place of the model's own settings: LoRAs that distil many steps into few ask for these.
DISTILLED = {"lightx2v": {"steps": 4, "shift": 5.0, "guidance": 1.0, "guidance_2": None, "strength": 1.0}}
TURN = 8  # clips that one of two experts does before the other is loaded
# What may differ when a folder of clips is gone on with: where and how they are computed, not what they show. That the
# prompts are the same is told by the captions.
_MAY_CHANGE = {"out", "prompts", "device", "dtype", "offload", "compile", "preset", "no_lora"}


@dataclass(frozen=True)
class SampleConfig:
    task: str = cli.option("extend", "what to make", choices=tuple(tasks.TASKS))
    model: str = cli.option("checkpoints/tiny", "folder or Hugging Face repository of a Wan text-to-video model")
    lora: tuple[str, ...] | None = cli.option(
        None,
        "LoRAs, each PATH or PATH:STRENGTH; high=PATH or low=PATH is for one expert (default: the model folder's own, "
        "with --prompts none)",
        nargs="+",
        action="extend",
    )
    no_lora: bool = cli.option(False, "run the base model alone")
    prompt: str | None = cli.option(None, "what the video shows (default: the caption beside the clip)")
    prompts: str | None = cli.option(
        None, "t2v: file with a prompt a line; --out is a folder, which gets a clip of each, and may be gone on with"
    )
    negative_prompt: str | None = cli.option(None, "what guidance leads away from (default: the model's)")
    image: tuple[str, ...] | None = cli.option(None, "image files; FILE@N is frame N of a video", nargs="+")
    video: tuple[str, ...] | None = cli.option(None, "video files", nargs="+")
    at: str | None = cli.option(None, "keyframes: latent frame of each image, as in 0,4,8")
    noise: str | None = cli.option(None, "noise multiplier of the conditions in [0, 1], one or one each, as in 0,0.2")
    strength: float = cli.option(0.7, "restyle: how much of the schedule the clip goes through, in [0, 1]")
    frames: int | None = cli.option(None, "pixel frames N = 4k+1 (default: the model's)")
    seconds: float | None = cli.option(None, "length in seconds, instead of --frames")
    size: str | None = cli.option(None, "pixels as WxH (default: the model's)")
    fps: float | None = cli.option(None, "frames a second, read and written (default: the model's)")
    preset: str | None = cli.option(
        None, "other defaults; lightx2v: 4 steps, guidance 1, shift 5, LoRA strength 1", choices=tuple(DISTILLED)
    )
    steps: int | None = cli.option(None, "sampling steps K (default: the model's)")
    guidance: float | None = cli.option(None, "guidance scale; 1 runs the model once a step (default: the model's)")
    guidance_2: float | None = cli.option(None, "two experts: guidance of the low-noise one (default: the model's)")
    boundary: float | None = cli.option(None, "two experts: sigma under which the low-noise one runs (default: 0.875)")
    shift: float | None = cli.option(None, "shift of the sigma schedule (default: the model's)")
    seed: int = cli.option(0, "seed of the noise")
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type of the transformer", choices=("auto", "float32", "bfloat16"))
    offload: bool = cli.option(False, "keep the weights in the CPU's memory, on the device one block at a time")
    compile: bool = cli.option(False, "compile the transformer: slow to start, then faster (needs a C++ compiler)")
    out: str | None = cli.option(
        None, "mp4 or gif file, with --prompts a folder (default: the next free outputs/TASK-NNN.mp4)"
    )
    overwrite: bool = cli.option(False, "replace files that exist")
    dry_run: bool = cli.option(False, "print the tau table, the memory and the time it would take, and stop")
    plot: bool = cli.option(False, "also draw the tau table and a filmstrip of the denoising")
    from_json: str | None = cli.option(None, "repeat the run of this file; only --out, --overwrite and --dry-run count")


def resolve(config: SampleConfig) -> SampleConfig:
    """Put a value in place of everything that was left to the model, the clip or the machine.

    What comes out makes the same video wherever the files that it names are the same.
    """
    if config.from_json:
        kept = {name: getattr(config, name) for name in ("out", "overwrite", "dry_run")}
        config = dataclasses.replace(_recorded(Path(config.from_json)), **kept)
        cli.pick_device(config.device)
        return config
    preset, task = checkpoint.load_preset(config.model), tasks.TASKS[config.task]
    preset = dataclasses.replace(preset, **DISTILLED.get(config.preset, {}))

    def chosen(given, default):
        return default if given is None else given

    fps = chosen(config.fps, preset.fps)
    if not 0 < fps < math.inf:
        raise ValueError(f"got --fps {fps}, expected a number above 0, such as 16")
    frames = chosen(config.frames, preset.frames)
    if config.seconds is not None:
        if config.frames is not None or not 0 < config.seconds < math.inf:
            raise ValueError("got --seconds that are not above 0, or --frames as well; expected one of the two")
        frames = 4 * round(config.seconds * fps / 4) + 1

    image, video, at, prompt = config.image, config.video, config.at, config.prompt
    if config.prompts is not None and (config.task != "t2v" or prompt is not None or config.overwrite or config.plot):
        raise ValueError(
            "got --prompts with another task than t2v, or with --prompt, --plot or --overwrite, expected none of them; "
            "to make clips anew, choose another --out"
        )
    if not image and not video and (task.images != 0 or task.videos):
        image, video, places = _example(config.task, frames)
        at = places if at is None else at
        prompt = _caption(EXAMPLES / "00000.mp4") if prompt is None else prompt
    if prompt is None and config.prompts is None:
        source = (video or (EXAMPLES / "00000.mp4",))[0]
        prompt = _caption(Path(source)) if video or config.task in ("t2v", "stream") else ""
    if config.lora and config.no_lora:
        raise ValueError("got --lora and --no-lora, expected one of the two")
    own = checkpoint.find_model(config.model, parts=()) / "lora.safetensors"
    alone = config.no_lora or config.prompts is not None or not own.exists()
    loras = chosen(config.lora, () if alone else (own.as_posix(),))
    loras = tuple(f"{entry}:{preset.strength:g}" if _parse_lora(entry)[2] is None else entry for entry in loras)
    boundary, guidance, guidance_2 = config.boundary, chosen(config.guidance, preset.guidance), config.guidance_2
    if checkpoint.has_two_experts(config.model):
        boundary = chosen(boundary, preset.boundary)
        own_2 = preset.guidance_2 if config.guidance is None else None  # --guidance alone is for both
        guidance_2 = chosen(guidance_2, chosen(own_2, guidance))
    elif boundary is not None or guidance_2 is not None or any(_parse_lora(entry)[0] for entry in loras):
        raise ValueError(
            f"got --boundary, --guidance-2, or a LoRA for high or low noise, but {config.model} has one transformer, "
            "not two experts; leave these out"
        )
    noise = config.noise
    if noise is None and preset.noise is not None and task.noise:
        noise = f"{preset.noise:g}"
    device = cli.pick_device(config.device)
    return dataclasses.replace(
        config,
        prompt=prompt, negative_prompt=chosen(config.negative_prompt, preset.negative_prompt),
        image=tuple(image or ()), video=tuple(video or ()), at=at, noise=noise, lora=loras,
        frames=frames, seconds=None, fps=fps, size=chosen(config.size, f"{preset.size[0]}x{preset.size[1]}"),
        steps=chosen(config.steps, preset.steps), guidance=guidance, guidance_2=guidance_2, boundary=boundary,
        shift=chosen(config.shift, preset.shift), device=device,
        dtype=str(cli.pick_dtype(config.dtype, device)).removeprefix("torch."),
    )  # fmt: skip


def _record(config: SampleConfig, path: Path) -> None:
    record = {"settings": dataclasses.asdict(config), "torch": torch.__version__}
    cli.write_json(path, record)


def _recorded(path: Path) -> SampleConfig:
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
        config = SampleConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()})
        missing = {field.name for field in dataclasses.fields(config)} - entries.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a run, expected a JSON file that sample.py wrote: {error}") from None
    return config


def _example(task: str, frames: int) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Images, videos and positions for a task that was given none, from the clips that come with the project."""
    one, other = (str(EXAMPLES / name) for name in ("00000.mp4", "00001.mp4"))
    first, middle, last = (f"{one}@{n}" for n in (0, 16, 32))
    if task == "keyframes":
        F = tasks.latent_frames(frames)
        return (first, middle, last), (), f"0,{F // 2},{F - 1}"
    images = {0: (), 1: (first,), 2: (first, last)}[tasks.TASKS[task].images]
    return images, (one, other)[: tasks.TASKS[task].videos], None


def _caption(clip: Path) -> str:
    beside = clip.with_suffix(".txt")
    return " ".join(dataset.read_text(beside).split()) if beside.exists() else ""


@dataclass
class Job:
    """A run, laid out: one `tasks.Plan` and one table of noise levels (K+1, F) for each window."""

    plans: list[tasks.Plan]
    taus: list[Tensor]
    F: int  # latent frames of the whole video
    carried: int  # latents that a window takes over from the one before
    backwards: bool  # windows go towards the past


def lay_out(config: SampleConfig) -> Job:
    """The plan of every window of a resolved config. Raises ValueError for whatever does not fit together."""
    preset = checkpoint.load_preset(config.model)
    F = tasks.latent_frames(config.frames)
    noise, at = _numbers("noise", config.noise, float), _numbers("at", config.at, int)
    counts = {"images": len(config.image), "videos": len(config.video)}
    backwards = config.task == "prepend"
    window = F
    if config.task in ("extend", "prepend", "stream"):
        window = min(F, tasks.latent_frames(preset.frames))
    # Of two experts each knows one range of noise levels, so frames cannot lag behind each other across the boundary.
    stagger = 0.5 if config.boundary is None else 0.0
    first = tasks.plan(config.task, window, **counts, at=at, noise=noise, strength=config.strength, stagger=stagger)
    # A window goes on from as many latents as the first was given, as noisy as those; `stream` may have had none.
    given = [position for slot in first.given for position in slot.positions]
    carried, carried_noise = (len(given), first.m[given].tolist()) if given else (4, (0.0,))
    plans, made = [first], window
    while made < F:
        ends = (0, carried) if backwards else (carried, 0)
        plans.append(tasks.plan(config.task, window, clip_latents=ends, noise=carried_noise, stagger=stagger))
        fresh = window - carried - backwards
        if fresh < 1:
            raise ValueError(f"got windows of {window} latent frames, expected at least {carried + 2} to go on from")
        made += fresh
    for guidance in (config.guidance, config.guidance_2):
        if guidance is not None and not 0 <= guidance < math.inf:
            raise ValueError(f"got guidance {guidance}, expected 0 or more; 1 is without guidance")
    if config.boundary is not None and not 0 <= config.boundary <= 1:
        raise ValueError(f"got --boundary {config.boundary}, expected a noise level in [0, 1], such as 0.875")
    taus = []
    for plan in plans:
        # A frame takes 1 - d_max of the run. What is above a whole number by rounding alone is not rounded up.
        steps = math.ceil(config.steps / (1 - plan.d.max().item()) - 1e-6) if config.steps > 0 else config.steps
        taus.append(tasks.tau_schedule(plan.m, steps, config.shift, plan.d))
    return Job(plans, taus, F, carried, backwards)


def _numbers(flag: str, text: str | None, kind: type) -> list | None:
    if text is None:
        return [] if kind is int else None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"got --{flag} {text}, expected numbers with commas, as in 0,4,8") from None


def experts(config: SampleConfig, taus: Tensor) -> list[tuple[str, float, Tensor]]:
    """Which transformer walks which part of a table (K+1, F), at which guidance: one, or "high" and then "low" noise.

    Of two experts, the low-noise one takes the steps with σ_k < boundary. That σ is the step's own, before multipliers,
    so all frames change over together, conditions included.
    """
    if config.boundary is None:
        return [("high", config.guidance, taus)]
    sigma = flow.sigma_schedule(len(taus) - 1, config.shift)
    high = int((sigma[:-1] >= config.boundary).sum())
    parts = [("high", config.guidance, taus[: high + 1]), ("low", config.guidance_2, taus[high:])]
    return [part for part in parts if len(part[2]) > 1]


def load_expert(config: SampleConfig, expert: str = "high") -> Wan:
    """A transformer of a resolved config with its LoRAs merged, ready to run; "high" is also the only one."""
    named = [_parse_lora(entry) for entry in config.lora]
    loras = [(lora.load(path), strength) for which, path, strength in named if which in ("", expert)]
    home = "cpu" if config.offload else config.device
    transformer = checkpoint.load_transformer(config.model, getattr(torch, config.dtype), home, expert=expert)
    for change, strength in loras:
        lora.merge(transformer, change, strength)
    if config.compile:
        transformer.compile_blocks()
    if config.offload:
        offload(transformer, config.device)
    return transformer


def _parse_lora(entry: str) -> tuple[str, str, float | None]:
    """The expert ("" for both), path and strength of [high=|low=]PATH[:STRENGTH].

    The colon of `C:\\lora.safetensors` is part of the path.
    """
    expert, mark, rest = entry.partition("=")
    if not mark or expert not in ("high", "low"):
        expert, rest = "", entry
    path, colon, number = rest.rpartition(":")
    try:
        return (expert, path, float(number)) if colon else (expert, rest, None)
    except ValueError:
        return expert, rest, None


def read_inputs(config: SampleConfig, plan: tasks.Plan) -> dict[str, list[Tensor | None]]:
    """The images and videos of a resolved config, each (1, 3, n, 8H, 8W), as `tasks.cut` takes them.

    Of a video, only the frames at its head and its tail that the plan needs are kept, None where it needs none.
    """
    size = cli.parse_size(config.size)
    inputs = {"image": [], "head": [], "tail": []}
    for name in config.image:
        path, mark, frame = name.rpartition("@")
        of_video = mark and frame.isdigit() and Path(path).suffix.lower() in media.VIDEO_SUFFIXES
        image = media.read_frame(path, int(frame), size) if of_video else media.read_image(name, size)
        inputs["image"].append(image[None, :, None])
    for index, path in enumerate(config.video):
        for end, which in (("head", "first"), ("tail", "last")):
            needed = [slot.frames for slot in plan.given if (slot.source, slot.index) == (end, index)]
            video = media.read_video(path, size, config.fps, **{which: max(needed)})[None] if needed else None
            inputs[end].append(video)
    return inputs


@torch.no_grad()
def encode_prompts(config: SampleConfig, prompts: Sequence[str]) -> Iterator[Tensor]:
    """Embeddings (1, T, text_dim) of each prompt, put on the device when it is their turn.

    Each prompt is encoded once ever: what comes of it is kept in $NANOPUSA_CACHE, or ~/.cache/nanopusa. Only for one
    that is not there the encoder is loaded, and it is gone when this returns.
    """
    folder = os.environ.get("NANOPUSA_CACHE") or Path.home() / ".cache" / "nanopusa"
    device, dtype = "cpu" if config.offload else config.device, getattr(torch, config.dtype)
    embeddings = cache.prompts(config.model, prompts, dtype, device, folder)
    text_len = checkpoint.load_config(config.model).text_len
    return (text.padded([embedding], text_len).to(config.device) for embedding in embeddings)


@torch.no_grad()
def generate(
    vae: WanVAE,
    config: SampleConfig,
    job: Job,
    inputs: dict[str, list[Tensor]],
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The latents (1, 16, F, H, W), fp32, of a run that `resolve` and `lay_out` have prepared.

    Text encoder and transformers are loaded here, one at a time, and gone at the end. `on_step(k, z)` is called after
    each step of every window and expert.
    """
    width, height = cli.parse_size(config.size)
    channels = checkpoint.load_config(config.model).in_dim
    positive, negative = encode_prompts(config, [config.prompt, config.negative_prompt])

    @_kept
    def velocity(expert: str, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        return guided_velocity(load_expert(config, expert), positive, negative, guidance)

    generator = torch.Generator().manual_seed(config.seed)
    made = None
    for plan, taus in zip(job.plans, job.taus, strict=True):
        shape = (1, channels, len(plan.m), height // 8, width // 8)
        x1 = torch.randn(shape, generator=generator).to(config.device)
        if made is None:
            x0 = conditions(vae, plan, inputs, x1)
        else:
            x0 = torch.zeros_like(x1)
            x0[:, :, list(plan.given[0].positions)] = edge(vae, made, job, len(plan.m))
        z = flow.interpolate(x0, x1, taus[:1].to(config.device))
        for expert, guidance, part in experts(config, taus):
            z = flow.euler(velocity(expert, guidance), z, part, on_step)
        if made is None:
            made = z
        elif job.backwards:
            made = torch.cat([z[:, :, : -job.carried], made[:, :, 1:]], dim=2)
        else:
            made = torch.cat([made, z[:, :, job.carried :]], dim=2)
    # Whole windows may overshoot. Towards the past the surplus is at the start, whose latent must stay a lone frame.
    if job.backwards and made.shape[2] > job.F:
        made = torch.cat([made[:, :, :1], made[:, :, made.shape[2] - job.F + 1 :]], dim=2)
    return made[:, :, : job.F]


@torch.no_grad()
def generate_each(
    config: SampleConfig, taus: Tensor, prompts: dict[int, str], on_step: Callable[[int, Tensor], None] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """For each numbered prompt, its number and the latents (1, 16, F, H, W) of a clip of its own seed, one at a time.

    They are those that `generate` makes, but every part is loaded once: the text encoder for all prompts, then the
    transformer, which stays. Two experts take turns at groups of clips, whose latents wait meanwhile.
    """
    width, height = cli.parse_size(config.size)
    shape = (1, checkpoint.load_config(config.model).in_dim, taus.shape[1], height // 8, width // 8)
    parts = experts(config, taus)
    contexts = encode_prompts(config, [config.negative_prompt, *prompts.values()])
    negative, clips = next(contexts), zip(prompts, contexts, strict=True)
    transformer = _kept(partial(load_expert, config))
    while group := dict(islice(clips, 1 if len(parts) == 1 else TURN)):
        generators = [torch.Generator().manual_seed(clip_seed(config.seed, n)) for n in group]
        zs = {n: torch.randn(shape, generator=g).to(config.device) for n, g in zip(group, generators, strict=True)}
        for expert, guidance, part in parts:
            for n, positive in group.items():
                velocity = guided_velocity(transformer(expert), positive, negative, guidance)
                zs[n] = flow.euler(velocity, zs[n], part, on_step)
                del velocity  # it would keep its transformer while the next one is loaded
        yield from zs.items()


def clip_seed(seed: int, number: int) -> int:
    """The seed of a clip of `--prompts`: with it, `--prompt` makes that clip alone."""
    return seed * 1_000_003 + number


def _kept(make: Callable) -> Callable:
    """The same function, whose last result is kept for the same arguments, and gone before the next one is made."""
    last = {}

    def get(*arguments):
        if arguments not in last:
            last.clear()
            last[arguments] = make(*arguments)
        return last[arguments]

    return get


def edge(vae: WanVAE, made: Tensor, job: Job, window: int) -> Tensor:
    """The latents (1, 16, carried, H, W) that the next window, of `window` latents, takes over from those made so far.

    All that was ever trained on begins with a lone frame, and with latents that know of nothing before it; none in the
    middle of a video are like that. So the older half of what is taken over is decoded, and encoded again as the start
    of a clip. The newer half hardly depends on that and stays as it is: if all went through pixels, colours would drift
    from window to window.
    """
    if job.backwards:  # at the end of a window there is no such difference; only the lone frame has no place there
        return made[:, :, 1 : 1 + job.carried]
    older = (job.carried + 1) // 2
    newer = made[:, :, made.shape[2] - job.carried + older :]
    past = made[:, :, max(0, made.shape[2] - window) : made.shape[2] - newer.shape[2]]
    pixels = vae.decode(past)[:, :, -tasks.pixel_frames(older) :]
    return torch.cat([vae.encode(pixels).to(made.dtype), newer], dim=2)


@torch.no_grad()
def conditions(vae: WanVAE, plan: tasks.Plan, inputs: dict[str, list[Tensor]], like: Tensor) -> Tensor:
    """The latents of everything that is given, at their places in zeros shaped `like` (B, 16, F, H, W).

    inputs: for each source of a slot, its pixels (B, 3, n, 8H, 8W). Only the frames that a slot stands for are encoded,
    so nothing that the task hides leaks into a condition.
    """
    x0 = torch.zeros_like(like)
    for slot in plan.given:
        pixels = tasks.cut(slot, inputs[slot.source][slot.index]).to(like.device)
        x0[:, :, list(slot.positions)] = vae.encode(pixels)[:, :, slot.drop :].to(like.dtype)
    return x0


@torch.no_grad()
def guided_velocity(
    transformer: Wan, positive: Tensor, negative: Tensor, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """velocity(z, tau) for B prompts, led away from the negative ones: v = v_neg + guidance · (v_pos - v_neg).

    positive, negative: the prompts' embeddings, (B, T, text_dim), whose keys and values are computed here and once.
    Guidance 1 runs the model once a step.
    """
    keys = transformer.prompt_keys(positive)
    keys_away = transformer.prompt_keys(negative) if guidance != 1 else None

    def velocity(z: Tensor, tau: Tensor) -> Tensor:
        v = transformer(z, tau, keys)
        if keys_away is None:
            return v
        away = transformer(z, tau, keys_away)
        return away + guidance * (v - away)

    return velocity


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Pixels (3, N, 8H, 8W) on the CPU of one video's latents (1, 16, F, H, W)."""
    return vae.decode(latents)[0].float().cpu()


def given_frames(job: Job) -> list[bool]:
    """For each pixel frame of the finished video, whether it was given."""
    given = {position for slot in job.plans[0].given for position in slot.positions}
    if job.backwards:
        given = {job.F - len(job.plans[0].m) + position for position in given}
    N = tasks.pixel_frames(job.F)
    return [tasks.latent_index(n, N) in given for n in range(N)]


def estimate(config: SampleConfig, job: Job) -> str:
    """Memory and time that a run would take."""
    width, height = cli.parse_size(config.size)
    walks = [walk for taus in job.taus for walk in experts(config, taus)]
    passes = sum((len(taus) - 1) * (1 if guidance == 1 else 2) for _, guidance, taus in walks)
    passes *= len(dataset.read_prompts(config.prompts)) if config.prompts else 1
    parts = checkpoint.outline(config.model)
    decoding = parts[1].decoding_bytes(job.F, height, width) + 3 * 4 * tasks.pixel_frames(job.F) * width * height
    return cost.sampling(
        parts, (len(job.plans[0].m), height // 8, width // 8), passes, decoding,
        getattr(torch, config.dtype), config.device, stays=config.prompts is not None or len(job.plans) > 1,
    )  # fmt: skip


def outputs(config: SampleConfig) -> dict[str, Path]:
    """The files of a run. Raises ValueError if one exists and may not be replaced."""
    if config.out is None:
        numbers = (n for n in range(1, 10**6) if not list(Path("outputs").glob(f"{config.task}-{n:03d}.*")))
        video = Path("outputs") / f"{config.task}-{next(numbers):03d}.mp4"
    else:
        video = Path(config.out)
    if video.suffix not in (".mp4", ".gif"):
        raise ValueError(f"got --out {video}, expected a file that ends in .mp4 or .gif")
    files = {"video": video, "filmstrip": video.with_suffix(".png"), "settings": video.with_suffix(".json")}
    if config.plot:
        files["tau"] = video.with_name(f"{video.stem}-tau.png")
        files["denoising"] = video.with_name(f"{video.stem}-denoising.png")
    for path in files.values():
        if path.exists() and not config.overwrite:
            raise ValueError(f"{path} exists; add --overwrite to replace it, or choose another --out")
    return files


def sample(config: SampleConfig) -> dict[str, Path]:
    """Run a config from files to files, and return their paths."""
    started = time.monotonic()
    config = resolve(config)
    job = lay_out(config)
    if config.dry_run:
        print("\n\n".join(tasks.table(taus) for taus in job.taus) + "\n\n" + estimate(config, job))
        return {}
    for _, path, _ in map(_parse_lora, config.lora):
        if not Path(path).is_file():
            raise ValueError(f"no LoRA file at {path}; give the path of a .safetensors or .pt file")
    if config.prompts is not None:
        return sample_each(config, job)
    files = outputs(config)
    inputs = read_inputs(config, job.plans[0])
    for slot in job.plans[0].given:
        tasks.cut(slot, inputs[slot.source][slot.index])  # a clip that is too short is told before the model loads
    vae = checkpoint.load_vae(checkpoint.find_model(config.model), device=config.device)
    progress = cli.Progress(sum(len(taus) - 1 for taus in job.taus), "denoising")
    steps = len(job.taus[0]) - 1
    drawn = set(torch.linspace(1, steps, min(steps, 8)).round().int().tolist())  # more would be too small to see
    states: dict[int, Tensor] = {}

    def on_step(k: int, z: Tensor) -> None:
        progress.step()
        if config.plot and progress.done in drawn:  # of the first window
            states[progress.done] = z

    latents = generate(vae, config, job, inputs, on_step)
    video, title = decode(vae, latents), f"{config.task}: {config.prompt}"
    if config.out is None:
        files = outputs(config)  # anew: another run may have taken the number that was free when this one began
    media.write_video(files["video"], video, config.fps)
    media.save_image(files["filmstrip"], media.filmstrip([(title, video)], marks=[given_frames(job)]))
    if config.plot:
        marks = [(slot.source, slot.positions) for slot in job.plans[0].given]
        plots.tau_table(files["tau"], job.taus[0], marks, config.task)
        rows = [(f"after step {k}", decode(vae, z)) for k, z in states.items()]
        media.save_image(files["denoising"], media.filmstrip(rows, height=48))
    _record(dataclasses.replace(config, out=str(files["video"]), overwrite=False), files["settings"])
    print(f"{config.task}: {config.prompt!r}, in {time.monotonic() - started:.1f} s", file=sys.stderr)
    for path in files.values():
        print(path)
    return files


def sample_each(config: SampleConfig, job: Job) -> dict[str, Path]:
    """Make the clips of `--prompts` that the folder `--out` lacks, and return the folder."""
    prompts = dataset.read_prompts(config.prompts)
    out = _clip_folder(config)
    missing = dataset.missing_clips(out, prompts)
    done, steps = len(prompts) - len(missing), len(job.taus[0]) - 1
    progress = cli.Progress(len(prompts) * steps, "denoising", done * steps)
    if missing:
        vae = checkpoint.load_vae(checkpoint.find_model(config.model), device=config.device)
        wanted = {n: prompts[n] for n in missing}
        try:
            for n, latents in generate_each(config, job.taus[0], wanted, lambda k, z: progress.step()):
                _record(config, out / "settings.json")  # only now, as a run that fails before shall leave nothing
                dataset.write_clip(out, n, decode(vae, latents), config.fps, prompts[n])
                done += 1
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped at {done} of {len(prompts)} clips; the same command goes on") from None
    print(out)
    return {"clips": out}


def _clip_folder(config: SampleConfig) -> Path:
    """The folder of `--prompts`. Raises ValueError if it holds anything else than a run with these settings began."""
    out = Path(config.out or "a.mp4")
    if out.is_file() or out.suffix in (".mp4", ".gif"):
        raise ValueError(f"got {config.out} as --out of --prompts, expected a folder for the clips, such as data/mine")
    if (out / "settings.json").is_file():
        begun = _recorded(out / "settings.json")
        for name, now in vars(config).items():
            before = getattr(begun, name)
            if name not in _MAY_CHANGE and before != now:
                flag = name.replace("_", "-")
                raise ValueError(f"got {now} as --{flag}, but the clips in {out} began with {before}; repeat that, or "
                                 "choose another --out")  # fmt: skip
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"got --out {out}, which holds other files, expected a new folder or one that --prompts began")
    return out


def main() -> None:
    sample(cli.parse(SampleConfig, __doc__))


if __name__ == "__main__":
    cli.run(main)
