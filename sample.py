"""Sample: make a video by a task of `tasks.py`, on the embedded model or on any Wan text-to-video model.

The task says which latent frames are given and how noisy they stay; the text encoder turns the prompt into embeddings;
`flow.denoise` walks the table of noise levels; the VAE turns latents into pixels. A video that is longer than the
model's is made window by window, each conditioned on the edge of the one before.

The VAE, which is small, stays in memory. The large parts come one after another, each gone before the next is loaded:
the text encoder, the transformer, and where there are two experts, the second one. `--offload` is for a transformer
that is larger than the GPU's memory.

    python sample.py --task extend
    python sample.py --task i2v --image start.png --prompt "a red circle moving left" --seed 1
    python sample.py --task keyframes --image a.png b.png c.png --at 0,4,8 --noise 0,0.2,0.3

Beside the video are a filmstrip of what was given and what was generated, and a JSON file with every setting;
`--from-json` runs it again. With `--prompts` the model makes a captioned clip of each line of a file, for training:

    python sample.py --task t2v --prompts prompts.txt --out data/mine
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flow
import lora
import tasks
from model import Wan
from support import cli, cost, dataset, media, plots, records
from support.offload import offload
from wan import checkpoint
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


# What to make: every setting, and the plan of each window.


def prepare(config: SampleConfig) -> tuple[SampleConfig, checkpoint.Opened]:
    """Open the model of a run and settle every setting: what comes out makes the same video from the same files."""
    if config.from_json:
        own = {name: getattr(config, name) for name in ("out", "overwrite", "dry_run")}
        config = dataclasses.replace(records.read(Path(config.from_json), SampleConfig), **own)
        cli.pick_device(config.device)
        return config, checkpoint.open(config.model, Wan)
    opened = checkpoint.open(config.model, Wan)
    return resolve(config, opened), opened


def resolve(config: SampleConfig, opened: checkpoint.Opened) -> SampleConfig:
    """Put a value in place of everything that was left to the model, the clip or the machine."""
    _refuse_together(config)
    preset = dataclasses.replace(opened.preset, **DISTILLED.get(config.preset, {}))
    device = cli.pick_device(config.device)
    config = dataclasses.replace(
        config,
        **_defaults(config, preset, opened.two_experts),
        lora=_loras(config, opened.folder / "lora.safetensors", preset.strength),
        device=device,
        dtype=str(cli.pick_dtype(config.dtype, device)).removeprefix("torch."),
    )
    second = config.boundary is not None or config.guidance_2 is not None
    if not opened.two_experts and (second or any(_parse_lora(entry)[0] for entry in config.lora)):
        raise ValueError(
            f"got --boundary, --guidance-2, or a LoRA for high or low noise, but {config.model} has one transformer, "
            "not two experts; leave these out"
        )
    if not 0 < config.fps < math.inf:
        raise ValueError(f"got --fps {config.fps}, expected a number above 0, such as 16")
    if config.seconds is not None:
        config = dataclasses.replace(config, frames=4 * round(config.seconds * config.fps / 4) + 1, seconds=None)
    return _with_inputs(config)


def _refuse_together(config: SampleConfig) -> None:
    alone = config.task == "t2v" and config.prompt is None and not config.overwrite and not config.plot
    if config.prompts is not None and not alone:
        raise ValueError(
            "got --prompts with another task than t2v, or with --prompt, --plot or --overwrite, expected none of them; "
            "to make clips anew, choose another --out"
        )
    if config.seconds is not None and (config.frames is not None or not 0 < config.seconds < math.inf):
        raise ValueError("got --seconds that are not above 0, or --frames as well; expected one of the two")
    if config.lora and config.no_lora:
        raise ValueError("got --lora and --no-lora, expected one of the two")


def _defaults(config: SampleConfig, preset: checkpoint.Preset, two_experts: bool) -> dict:
    """The preset's value of every setting that is None, written as the flag has it."""
    values = dataclasses.asdict(preset) | {"size": "{}x{}".format(*preset.size), "noise": None}
    if preset.noise is not None and tasks.TASKS[config.task].noise:
        values["noise"] = f"{preset.noise:g}"
    if not two_experts:
        values |= {"boundary": None, "guidance_2": None}
    elif config.guidance is not None or preset.guidance_2 is None:  # --guidance alone is for both
        values["guidance_2"] = preset.guidance if config.guidance is None else config.guidance
    return {name: value for name, value in values.items() if getattr(config, name) is None}


def _loras(config: SampleConfig, own: Path, strength: float) -> tuple[str, ...]:
    """Every LoRA with its strength; by default the model folder's own, which is for finished videos."""
    loras = config.lora
    if loras is None:
        alone = config.no_lora or config.prompts is not None or Path(config.model).is_file() or not own.exists()
        loras = () if alone else (own.as_posix(),)
    return tuple(f"{entry}:{strength:g}" if _parse_lora(entry)[2] is None else entry for entry in loras)


def _parse_lora(entry: str) -> tuple[str, str, float | None]:
    """The expert ("" for both), path and strength of [high=|low=]PATH[:STRENGTH]; the colon of `C:` is of the path."""
    expert, mark, rest = entry.partition("=")
    if not mark or expert not in ("high", "low"):
        expert, rest = "", entry
    path, colon, number = rest.rpartition(":")
    try:
        return (expert, path, float(number)) if colon else (expert, rest, None)
    except ValueError:
        return expert, rest, None


def _with_inputs(config: SampleConfig) -> SampleConfig:
    """Images, videos, positions and prompt, where none are given those of the clips that come with the project."""
    task, image, video, at, prompt = config.task, config.image or (), config.video or (), config.at, config.prompt
    needed = tasks.TASKS[task]
    one, other = (str(EXAMPLES / name) for name in ("00000.mp4", "00001.mp4"))
    source = video[0] if video else one if task in ("t2v", "stream") else None
    if not image and not video and (needed.images != 0 or needed.videos):
        F, first, middle, last = tasks.latent_frames(config.frames), *(f"{one}@{n}" for n in (0, 16, 32))
        image = {0: (), 1: (first,), 2: (first, last), None: (first, middle, last)}[needed.images]
        video, source = (one, other)[: needed.videos], one
        at = f"0,{F // 2},{F - 1}" if task == "keyframes" and at is None else at
    if prompt is None and config.prompts is None:
        caption = Path(source).with_suffix(".txt") if source else None
        prompt = " ".join(dataset.read_text(caption).split()) if caption and caption.exists() else ""
    return dataclasses.replace(config, image=tuple(image), video=tuple(video), at=at, prompt=prompt)


@dataclass
class Job:
    """A run, laid out: one `tasks.Plan` and one table of noise levels (K+1, F) for each window."""

    plans: list[tasks.Plan]
    taus: list[Tensor]
    F: int  # latent frames of the whole video
    carried: int  # latents that a window takes over from the one before
    backwards: bool  # windows go towards the past


def lay_out(config: SampleConfig, longest: int) -> Job:
    """The plan of every window, of at most `longest` pixel frames. Raises ValueError for what does not fit together."""
    for guidance in (config.guidance, config.guidance_2):
        if guidance is not None and not 0 <= guidance < math.inf:
            raise ValueError(f"got guidance {guidance}, expected 0 or more; 1 is without guidance")
    if config.boundary is not None and not 0 <= config.boundary <= 1:
        raise ValueError(f"got --boundary {config.boundary}, expected a noise level in [0, 1], such as 0.875")
    F = window = tasks.latent_frames(config.frames)
    if config.task in ("extend", "prepend", "stream"):
        window = min(F, tasks.latent_frames(longest))
    # Each of two experts knows one range of noise levels, so frames cannot lag behind each other across the boundary.
    stagger = 0.5 if config.boundary is None else 0.0
    first = tasks.plan(
        config.task, window, len(config.image), len(config.video), _numbers("at", config.at, int) or (),
        _numbers("noise", config.noise, float), config.strength, stagger,
    )  # fmt: skip
    # A window goes on from as many latents as the first was given, as noisy as those; `stream` may have had none.
    given = [position for slot in first.given for position in slot.positions]
    carried, noise = (len(given), first.m[given].tolist()) if given else (4, [0.0])
    plans, backwards = [first], config.task == "prepend"
    if window < F:
        following = tasks.plan(config.task, window, videos=1, noise=noise, stagger=stagger)
        fresh = window - carried - backwards
        if fresh < 1:
            raise ValueError(f"got windows of {window} latent frames, expected at least {carried + 2} to go on from")
        plans += [following] * math.ceil((F - window) / fresh)
    taus = []
    for plan in plans:
        # A frame takes 1 - d_max of the run. What is above a whole number by rounding alone is not rounded up.
        steps = math.ceil(config.steps / (1 - plan.d.max().item()) - 1e-6) if config.steps > 0 else config.steps
        taus.append(tasks.tau_schedule(plan.m, steps, config.shift, plan.d))
    return Job(plans, taus, F, carried, backwards)


def _numbers(flag: str, text: str | None, kind: type) -> list | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"got --{flag} {text}, expected numbers with commas, as in 0,4,8") from None


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


# The method: noise, conditions, guidance, denoise, window by window.


class Clip(NamedTuple):
    """What tells one video of a run from another."""

    prompt: str
    seed: int


class Leg(NamedTuple):
    """The part of a table of noise levels that one transformer walks."""

    expert: str  # "high" or "low" noise; "high" is also the only one
    guidance: float
    taus: Tensor  # (K+1, F)


def legs(config: SampleConfig, taus: Tensor) -> list[Leg]:
    """Which transformer walks which part of a table (K+1, F): the only one, or first "high", then "low".

    The low-noise expert takes the steps with σ_k < boundary. That σ is the step's own, before multipliers, so all
    frames change over together, conditions included.
    """
    sigma = flow.sigma_schedule(len(taus) - 1, config.shift)
    high = int((sigma[:-1] >= (config.boundary or 0)).sum())
    both = (Leg("high", config.guidance, taus[: high + 1]), Leg("low", config.guidance_2, taus[high:]))
    return [leg for leg in both if len(leg.taus) > 1]


class Experts:
    """The transformers of a run, one at a time in memory, and the prompts that they know.

    Each prompt is encoded once ever, and stored in $NANOPUSA_CACHE, or ~/.cache/nanopusa. The text encoder is gone when
    this is made.
    """

    def __init__(self, config: SampleConfig, opened: checkpoint.Opened, prompts: Sequence[str]):
        self.config, self.opened, self.dtype = config, opened, getattr(torch, config.dtype)
        self.home = "cpu" if config.offload else config.device
        folder = os.environ.get("NANOPUSA_CACHE") or Path.home() / ".cache" / "nanopusa"
        self.context = opened.encode_prompts([*prompts, config.negative_prompt], self.dtype, self.home, folder)
        self.name = self.transformer = self.prompt = self.velocity = None

    def load(self, name: str) -> Wan:
        """The "high" or "low" transformer with its LoRAs merged; the earlier one is let go before it is loaded."""
        if name != self.name:
            self.name = self.transformer = self.velocity = None
            named = [_parse_lora(entry) for entry in self.config.lora]
            loras = [(lora.load(path), strength) for which, path, strength in named if which in ("", name)]
            transformer = self.opened.transformer(self.dtype, self.home, name)
            for change, strength in loras:
                lora.merge(transformer, change, strength)
            if self.config.compile:
                transformer.compile_blocks()
            if self.config.offload:
                offload(transformer, self.config.device)
            self.name, self.transformer = name, transformer
        return self.transformer

    def led_by(self, prompt: str, leg: Leg) -> flow.Velocity:
        """The guided velocity of a leg, whose keys and values stay until another prompt or expert comes."""
        transformer = self.load(leg.expert)
        if self.velocity is None or self.prompt != prompt:
            self.velocity = None
            contexts = (self.context([text]).to(self.config.device) for text in (prompt, self.config.negative_prompt))
            self.velocity, self.prompt = guided_velocity(transformer, *contexts, leg.guidance), prompt
        return self.velocity

    def walk(
        self, prompts: Sequence[str], x0: Tensor, x1: Tensor, taus: Tensor, on_step: flow.OnStep = None
    ) -> Tensor:
        """From conditions x0 and noise x1 (B, 16, F, H, W) to latents, for B prompts, by one expert after the other."""
        first, *others = legs(self.config, taus)
        ends = zip(prompts, x0.split(1), x1.split(1), strict=True)
        z = [flow.denoise(self.led_by(prompt, first), a, b, first.taus, on_step) for prompt, a, b in ends]
        for leg in others:
            clips = zip(prompts, z, strict=True)
            z = [flow.euler(self.led_by(prompt, leg), latents, leg.taus, on_step) for prompt, latents in clips]
        return torch.cat(z)


@torch.no_grad()
def generate(
    config: SampleConfig,
    opened: checkpoint.Opened,
    job: Job,
    vae: WanVAE,
    inputs: dict[str, list[Tensor]],
    clips: Sequence[Clip],
    on_step: flow.OnStep = None,
) -> Iterator[Tensor]:
    """The latents (1, 16, F, H, W), fp32, of one clip after another, of a run that `prepare` and `lay_out` settled.

    Every part is loaded once: the text encoder for all prompts, then the transformer, which stays until the last clip.
    Two experts take turns at groups of clips. `on_step(k, z)` is called after each step of every clip and expert.
    """
    experts = Experts(config, opened, [clip.prompt for clip in clips])
    width, height = cli.parse_size(config.size)
    shape = (1, opened.config.in_dim, len(job.plans[0].m), height // 8, width // 8)
    turn = 1 if config.boundary is None else TURN
    for group in (clips[i : i + turn] for i in range(0, len(clips), turn)):
        generators = [torch.Generator().manual_seed(clip.seed) for clip in group]
        made = None
        for plan, taus in zip(job.plans, job.taus, strict=True):
            x1 = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(config.device)
            x0 = conditions(vae, plan, inputs, x1) if made is None else carried_over(vae, made, job, x1)
            z = experts.walk([clip.prompt for clip in group], x0, x1, taus, on_step)
            made = z if made is None else joined(made, z, job)
        yield from made.split(1)


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


def guided_velocity(transformer: Wan, positive: Tensor, negative: Tensor, guidance: float) -> flow.Velocity:
    """velocity(z, tau) for B prompts, led away from the negative ones: v = v_neg + guidance · (v_pos - v_neg).

    positive, negative: the prompts' embeddings, (B, T, text_dim), whose keys and values are computed here and once.
    Guidance 1 runs the model once a step.
    """
    keys = transformer.prompt_keys(positive)
    keys_away = transformer.prompt_keys(negative) if guidance != 1 else None

    def velocity(z: Tensor, tau: Tensor) -> Tensor:
        v = transformer(z, tau, keys)
        away = v if keys_away is None else transformer(z, tau, keys_away)
        return v if keys_away is None else away + guidance * (v - away)

    return velocity


def carried_over(vae: WanVAE, made: Tensor, job: Job, like: Tensor) -> Tensor:
    """The edge of the latents made so far, at the places where a next window shaped `like` (B, 16, F, H, W) has it.

    All that was ever trained on begins with a lone frame, and with latents that know of nothing before it; none in the
    middle of a video are like that. So the older half of what is taken over is decoded, and encoded again as the start
    of a clip. The newer half hardly depends on that and stays as it is: if all went through pixels, colours would drift
    from window to window.
    """
    x0 = torch.zeros_like(like)
    if job.backwards:  # at the end of a window there is no such difference; only the lone frame has no place there
        x0[:, :, -job.carried :] = made[:, :, 1 : 1 + job.carried]
        return x0
    older = (job.carried + 1) // 2
    newer = made[:, :, made.shape[2] - job.carried + older :]
    past = made[:, :, max(0, made.shape[2] - like.shape[2]) : made.shape[2] - newer.shape[2]]
    pixels = vae.decode(past)[:, :, -tasks.pixel_frames(older) :]
    x0[:, :, : job.carried] = torch.cat([vae.encode(pixels).to(made.dtype), newer], dim=2)
    return x0


def joined(made: Tensor, z: Tensor, job: Job) -> Tensor:
    """The latents made so far and those of a new window z, without what it took over and what is more than F."""
    if not job.backwards:
        return torch.cat([made, z[:, :, job.carried :]], dim=2)[:, :, : job.F]
    made = torch.cat([z[:, :, : -job.carried], made[:, :, 1:]], dim=2)
    surplus = max(0, made.shape[2] - job.F)  # at the start, whose latent must stay a lone frame
    return torch.cat([made[:, :, :1], made[:, :, 1 + surplus :]], dim=2)


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Pixels (3, N, 8H, 8W) on the CPU of one video's latents (1, 16, F, H, W)."""
    return vae.decode(latents)[0].float().cpu()


# The command: from files to files.


def sample(config: SampleConfig) -> dict[str, Path]:
    """Run a config from files to files, and return their paths."""
    config, opened = prepare(config)
    job = lay_out(config, opened.preset.frames)
    if config.dry_run:
        print("\n\n".join(plots.table(taus) for taus in job.taus) + "\n\n" + estimate(config, opened, job))
        return {}
    for _, path, _ in map(_parse_lora, config.lora):
        if not Path(path).is_file():
            raise ValueError(f"no LoRA file at {path}; give the path of a .safetensors or .pt file")
    return _sample_one(config, opened, job) if config.prompts is None else _sample_each(config, opened, job)


def _sample_one(config: SampleConfig, opened: checkpoint.Opened, job: Job) -> dict[str, Path]:
    started, wanted = time.monotonic(), (config.out, config.task, config.plot, config.overwrite)
    files = records.outputs(*wanted)
    inputs = read_inputs(config, job.plans[0])
    for slot in job.plans[0].given:
        tasks.cut(slot, inputs[slot.source][slot.index])  # a clip that is too short is told before the model loads
    opened.fetch()
    vae = opened.vae(device=config.device)
    progress = cli.Progress(sum(len(taus) - 1 for taus in job.taus), "denoising")
    steps = len(job.taus[0]) - 1
    drawn = set(torch.linspace(1, steps, min(steps, 8)).round().int().tolist())  # more would be too small to see
    states: dict[int, Tensor] = {}

    def on_step(k: int, z: Tensor) -> None:
        progress.step()
        if config.plot and progress.done in drawn:  # of the first window
            states[progress.done] = z

    (latents,) = generate(config, opened, job, vae, inputs, [Clip(config.prompt, config.seed)], on_step)
    video, title = decode(vae, latents), f"{config.task}: {config.prompt}"
    if config.out is None:
        files = records.outputs(*wanted)  # another run may have taken the number that was free when this one began
    media.write_video(files["video"], video, config.fps)
    media.save_image(files["filmstrip"], media.filmstrip([(title, video)], marks=[given_frames(job)]))
    if config.plot:
        marks = [(slot.source, slot.positions) for slot in job.plans[0].given]
        plots.tau_table(files["tau"], job.taus[0], marks, config.task)
        rows = [(f"after step {k}", decode(vae, z)) for k, z in states.items()]
        media.save_image(files["denoising"], media.filmstrip(rows, height=48))
    records.write(files["settings"], dataclasses.replace(config, out=str(files["video"]), overwrite=False))
    print(f"{config.task}: {config.prompt!r}, in {time.monotonic() - started:.1f} s", file=sys.stderr)
    print(*files.values(), sep="\n")
    return files


def _sample_each(config: SampleConfig, opened: checkpoint.Opened, job: Job) -> dict[str, Path]:
    """Make the clips of `--prompts` that the folder `--out` lacks."""
    prompts, out = dataset.read_prompts(config.prompts), Path(config.out or "a.mp4")
    if out.is_file() or out.suffix in (".mp4", ".gif"):
        raise ValueError(f"got {config.out} as --out of --prompts, expected a folder for the clips, such as data/mine")
    records.check_clips(out, config, _MAY_CHANGE)
    missing = dataset.missing_clips(out, prompts)
    done, steps = len(prompts) - len(missing), len(job.taus[0]) - 1
    progress = cli.Progress(len(prompts) * steps, "denoising", done * steps)
    if missing:
        opened.fetch()
        vae = opened.vae(device=config.device)
        clips = [Clip(prompts[n], clip_seed(config.seed, n)) for n in missing]
        made = generate(config, opened, job, vae, {}, clips, lambda k, z: progress.step())
        try:
            for n, latents in zip(missing, made, strict=True):
                records.write(out / "settings.json", config)  # only now, as a run that fails before shall leave nothing
                dataset.write_clip(out, n, decode(vae, latents), config.fps, prompts[n])
                done += 1
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped at {done} of {len(prompts)} clips; the same command goes on") from None
    print(out)
    return {"clips": out}


def clip_seed(seed: int, number: int) -> int:
    """The seed of a clip of `--prompts`: with it, `--prompt` makes that clip alone."""
    return seed * 1_000_003 + number


def given_frames(job: Job) -> list[bool]:
    """For each pixel frame of the finished video, whether it was given."""
    given = {position for slot in job.plans[0].given for position in slot.positions}
    if job.backwards:
        given = {job.F - len(job.plans[0].m) + position for position in given}
    N = tasks.pixel_frames(job.F)
    return [tasks.latent_index(n, N) in given for n in range(N)]


def estimate(config: SampleConfig, opened: checkpoint.Opened, job: Job) -> str:
    """Memory and time that a run would take."""
    width, height = cli.parse_size(config.size)
    walks = [leg for taus in job.taus for leg in legs(config, taus)]
    passes = sum((len(leg.taus) - 1) * (1 if leg.guidance == 1 else 2) for leg in walks)
    passes *= len(dataset.read_prompts(config.prompts)) if config.prompts else 1
    parts = opened.outline()
    decoding = parts[1].decoding_bytes(job.F, height, width) + 3 * 4 * tasks.pixel_frames(job.F) * width * height
    return cost.sampling(
        parts, (len(job.plans[0].m), height // 8, width // 8), passes, decoding,
        getattr(torch, config.dtype), config.device, stays=config.prompts is not None or len(job.plans) > 1,
    )  # fmt: skip


def main() -> None:
    sample(cli.parse(SampleConfig, __doc__))


if __name__ == "__main__":
    cli.run(main)
