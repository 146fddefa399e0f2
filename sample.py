"""Sample: make a video by a task of `tasks.py`, on the embedded model or on any Wan text-to-video model.

The task says which latent frames are given and how noisy they stay; the text encoder turns the prompt into embeddings;
`flow.euler` walks the table of noise levels; the VAE turns latents into pixels. `extend`, `prepend` and `stream` make
a longer video window by window, each from the edge of the one before. The large parts are in memory one after another:
the text encoder, the transformer and, in a model of two experts, the other transformer.

    python sample.py --task extend
    python sample.py --task i2v --image start.png --prompt "a red circle moving left" --seed 1
    python sample.py --task keyframes --image a.png b.png c.png --at 0,4,8 --noise 0,0.2,0.3
    python sample.py --task i2v --sweep noise=0,0.2 lora=1,1.4            a contact sheet to choose by
    python sample.py --task t2v --prompts prompts.txt --out data/mine     a captioned clip of each line, for training

Beside the video are a filmstrip of what was given and what was generated, and a JSON file with every setting;
`--from-json` runs it again.
"""

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import flow
import lora
import tasks
from model import PromptKeys, Wan
from support import cli, cost, offload, records
from wan import checkpoint

TURN = 8  # how many clips one of two experts works on before the other is loaded
_GUIDANCE = (0, 1e9, "0 or more; 1 is without guidance")


@dataclass(frozen=True)
class SampleConfig:
    task: str = cli.option("extend", "what to make", choices=tuple(tasks.TASKS))
    model: str = cli.option("checkpoints/tiny", "folder or Hugging Face repository of a Wan text-to-video model")
    lora: tuple[str, ...] | None = cli.option(None, "LoRAs, each PATH or PATH:STRENGTH; high=PATH or low=PATH is for "
        "one expert (default: the model folder's own; none with --prompts)", nargs="+", action="extend")  # fmt: skip
    no_lora: bool = cli.option(False, "run the base model alone")
    prompt: str | None = cli.option(None, "what the video shows (default: the caption beside the clip)")
    prompts: str | None = cli.option(None, "t2v: file with a prompt a line; the folder --out gets a clip of each")
    negative_prompt: str | None = cli.option(None, "what guidance leads away from, or @FILE (default: the model's)")
    image: tuple[str, ...] | None = cli.option(None, "image files; FILE@N is frame N of a video", nargs="+")
    video: tuple[str, ...] | None = cli.option(None, "video files; FILE@A-B is frames A to B, at --fps", nargs="+")
    at: str | None = cli.option(None, "keyframes: first latent frame of each image, then of each clip, as in 0,4,8")
    between: str | None = cli.option(None, "retake: the stretch to make again, in seconds of the clip, as in 3,6")
    noise: str | None = cli.option(None, "noise multiplier of the conditions in [0, 1], one or one each, as in 0,0.2")
    strength: float = cli.option(0.7, "restyle, retake: how much of the schedule the clip goes through, in [0, 1]")
    end_latent: str = cli.option("group", "encode a later image with 4 still ones, or alone", choices=("group", "lone"))
    only_new: bool = cli.option(False, "extend, prepend, retake: write what was made without the whole clip around it")
    frames: int | None = cli.option(None, "pixel frames N = 4k+1 (default: the model's)")
    seconds: float | None = cli.option(None, "length in seconds, instead of --frames", cli.POSITIVE)
    size: str | None = cli.option(None, "pixels as WxH (default: as many as the model's, in the first input's shape)")
    fps: float | None = cli.option(None, "frames a second, read and written (default: the model's)", cli.POSITIVE)
    preset: str | None = cli.option(
        None, "steps, shift and guidance: Wan's own, or for a LoRA of few steps", choices=tuple(checkpoint.PRESETS)
    )
    steps: int | None = cli.option(None, "sampling steps K (default: the model's)", cli.COUNT)
    guidance: float | None = cli.option(None, "guidance scale; 1 is off (default: the model's)", _GUIDANCE)
    history_guidance: float | None = cli.option(None, "the same, to the conditions (default: the model's)", _GUIDANCE)
    context_noise: float | None = cli.option(None, "noise said of conditions, a share (default: own)", cli.SHARE)
    guidance_2: float | None = cli.option(None, "guidance of the low-noise expert (default: the model's)", _GUIDANCE)
    boundary: float | None = cli.option(None, "noise level under which that expert runs (default: 0.875)", cli.SHARE)
    shift: float | None = cli.option(None, "shift of the sigma schedule (default: the model's)")
    tau: str | None = cli.option(None, "file with a table of noise levels to walk, steps down, latent frames across")
    seed: int = cli.option(0, "seed of the noise", cli.SEED)
    sweep: tuple[str, ...] | None = cli.option(None, "a video for each value of one or two of " +
        f"{', '.join(records.SWEPT)}, as in noise=0,0.2 lora=1,1.4; and a contact sheet", nargs="+")  # fmt: skip
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("auto", "type of the transformer", choices=("auto", "float32", "bfloat16"))
    offload: bool = cli.option(False, "keep the weights in the CPU's memory, on the device one block at a time")
    compile: bool = cli.option(False, "compile the transformer: slow to start, then faster (needs a C++ compiler)")
    out: str | None = cli.option(None, "mp4 or gif file, or a folder (default: the next free outputs/TASK-NNN.mp4)")
    overwrite: bool = cli.option(False, "replace files that exist")
    dry_run: bool = cli.option(False, "print the tau table, the memory and the time it would take, and stop")
    plot: bool = cli.option(False, "also draw the tau table and a filmstrip of the denoising")
    mark: bool = cli.option(False, "put each frame in a border: blue if it was given, orange if it was generated")
    from_json: str | None = cli.option(None, "repeat the run of this file, except for what other flags say")


def prepare(config: SampleConfig) -> tuple[SampleConfig, checkpoint.Opened]:
    """Open the model of a run and settle every setting: the config returned repeats the video from the same files."""
    opened = checkpoint.open(config.model, Wan, config.dry_run)
    return resolve(config, opened), opened


def resolve(config: SampleConfig, opened: checkpoint.Opened, strength: float | None = None) -> SampleConfig:
    """Fill in what is left to the model, the clip or the machine. ValueError for settings that exclude each other.

    strength: of each LoRA that is given without one, in place of the usual.
    """
    for one, other in (("seconds", "frames"), ("lora", "no_lora"), ("tau", "steps"), ("tau", "shift")):
        if getattr(config, one) and getattr(config, other) not in (None, False):
            raise ValueError(f"got --{one} and --{other.replace('_', '-')}, expected one of the two")
    task, as_long_as_the_clip = tasks.TASKS[config.task], config.frames is None and config.seconds is None
    values = opened.settings(config.preset, config.task, config.guidance)
    values |= {"steps": None, "shift": None} if config.tau else {}  # the table says both
    size, values["noise"] = values.pop("size"), values["noise"] if task.noise else None
    config = replace(config, negative_prompt=records.from_file(config.negative_prompt))
    loras, own, device = config.lora, opened.folder / "lora.safetensors", cli.pick_device(config.device)
    if loras is None:  # the model folder's LoRA is for finished videos, not for clips to train on
        bare = config.no_lora or config.prompts is not None or Path(config.model).is_file() or not own.exists()
        loras = () if bare else (own.as_posix(),)
    config = replace(
        config, device=device, dtype=str(cli.pick_dtype(config.dtype, device)).removeprefix("torch."),
        lora=lora.with_strengths(loras, own, opened.preset.strength, strength),
        **{name: value for name, value in values.items() if getattr(config, name) is None},
    )  # fmt: skip
    second = config.boundary is not None or config.guidance_2 is not None
    if not opened.two_experts and (second or any(lora.parse_entry(name)[0] for name in config.lora)):
        raise ValueError("got --boundary, --guidance-2, or a LoRA for high or low noise, but "
                         f"{config.model} has one transformer, not two experts; leave these out")  # fmt: skip
    cli.check(config)  # a model's preset may be out of range, too
    if config.seconds is not None:
        config = replace(config, frames=4 * round(config.seconds * config.fps / 4) + 1, seconds=None)
    return records.with_inputs(config, task, size, as_long_as_the_clip)


@dataclass
class Job:
    """A run, laid out: one `tasks.Plan` and one table of noise levels (K+1, F) for each window."""

    plans: list[tasks.Plan]
    taus: list[Tensor]
    F: int  # latent frames of the finished video
    carried: int  # latents that a window takes over from the one before
    backwards: bool  # windows go towards the past
    given: list[bool]  # for each of its pixel frames, whether it was given
    around: records.Around | None  # the clip to show it in


def lay_out(config: SampleConfig, longest: int) -> Job:
    """Plan every window, of at most `longest` pixel frames. Raises ValueError for what does not fit together."""
    F = window = tasks.latent_frames(config.frames)
    if config.task in ("extend", "prepend", "stream"):
        window = min(F, tasks.latent_frames(longest))
    # Each of two experts knows one range of noise levels, so frames cannot lag behind each other across the boundary.
    stagger = 0.5 if config.boundary is None else 0.0
    stretch = records.retaken(config)[1] if config.task == "retake" else None
    lengths = records.lengths(config) if config.task == "keyframes" else ()
    first = tasks.plan(
        config.task, window, len(config.image), len(config.video), cli.parse_numbers("at", config.at, int) or (),
        cli.parse_numbers("noise", config.noise, float), config.strength, stagger, lengths, stretch,
    )  # fmt: skip
    if config.end_latent == "lone":  # as the official code has it
        alone = [slot._replace(frames=1, drop=0) if slot.source == "image" else slot for slot in first.slots]
        first = first._replace(slots=alone)
    # A window goes on from as many latents as the first one has conditions, as noisy as those; `stream` may have none.
    filled = [position for slot in first.slots for position in slot.positions]
    carried, noise = (len(filled), first.m[filled].tolist()) if filled else (4, [0.0])
    plans, backwards = [first], config.task == "prepend"
    if window < F:
        following = tasks.plan(config.task, window, videos=1, noise=noise, stagger=stagger)
        fresh = window - carried - backwards
        if fresh < 1:
            raise ValueError(f"got windows of {window} latent frames, expected at least {carried + 2} to go on from")
        plans += [following] * math.ceil((F - window) / fresh)
    if config.tau is None:
        taus = [walked(plan.m, config.steps, config.shift, plan.d) for plan in plans]
    else:
        cli.expect(len(plans) == 1, f"--tau for a video of {len(plans)} windows", "one: leave out --frames or --tau")
        cli.expect(Path(config.tau).is_file(), f"--tau {config.tau}", "a file with a table of noise levels")
        taus = [records.read_table(Path(config.tau).read_text(encoding="utf-8", errors="replace"), F)]
    given = records.given_frames(first, F, backwards, may_change=not tasks.TASKS[config.task].noise)
    return Job(plans, taus, F, carried, backwards, given, records.around(config, first, F))


def walked(m: Tensor, K: int, shift: float, d: Tensor) -> Tensor:
    """The table of noise levels of a plan's m and d (F,), with more steps than K if frames are to take K each."""
    # A frame takes 1 - d_max of the run, so delays add steps. 1e-6: floating-point error must not add one more.
    return tasks.tau_schedule(m, math.ceil(K / max(0.01, 1 - d.max().item()) - 1e-6), shift, d)


def read_inputs(config: SampleConfig, plan: tasks.Plan) -> list[Tensor]:
    """The pixels (1, 3, n, 8H, 8W) in [-1, 1] of each slot of the plan; no more of a video is read."""
    return [tasks.cut(slot, records.pixels(config, slot)[None]) for slot in plan.slots]


def legs(config: SampleConfig, taus: Tensor) -> list[tuple[str, float, Tensor]]:
    """Each expert ("high" or "low"; one alone is "high"), its guidance, and its part of the table (K+1, F).

    The high-noise expert takes the steps at which any frame is at the boundary or above: all frames change over
    together, conditions included.
    """
    high = int((taus[:-1].amax(1) >= (config.boundary or 0)).sum())
    both = ("high", config.guidance, taus[: high + 1]), ("low", config.guidance_2, taus[high:])
    return [leg for leg in both if len(leg[2]) > 1]


class Experts:
    """What a run has in memory: the VAE, embeddings of its prompts, and one transformer at a time."""

    def __init__(self, config: SampleConfig, opened: checkpoint.Opened, prompts: Sequence[str]):
        self.config, self.opened, self.prompts, self.dtype = config, opened, prompts, getattr(torch, config.dtype)
        opened.fetch()
        if unknown := opened.tokenizer().unknown(prompts):
            print(f"{', '.join(unknown)} {'are' if len(unknown) > 1 else 'is'} unknown to this model", file=sys.stderr)
        self.vae, self.home = opened.vae(device=config.device), "cpu" if config.offload else config.device
        folder = os.environ.get("NANOPUSA_CACHE") or Path.home() / ".cache" / "nanopusa"
        self.context = opened.encode_prompts([*prompts, config.negative_prompt], self.dtype, self.home, folder)
        self.clear()

    def clear(self) -> None:
        """Let go of the transformer, and of the keys that it made of prompts."""
        self.loaded = self.transformer = None
        self.keys: dict[str, PromptKeys] = {}

    def load(self, name: str) -> Wan:
        """The "high" or "low" transformer with its LoRAs merged; the other one is let go of first."""
        if (name, self.config.lora) != self.loaded:
            self.clear()
            loras = map(lora.parse_entry, self.config.lora)
            changes = [(lora.load(path), strength) for expert, path, strength in loras if expert in ("", name)]
            transformer = self.opened.transformer(self.dtype, self.home, name)
            for change, strength in changes:
                lora.merge(transformer, change, strength)
            if self.config.compile:
                transformer.compile_blocks()
            if self.config.offload:
                offload.offload(transformer, self.config.device)
            self.loaded, self.transformer = (name, self.config.lora), transformer
        return self.transformer

    def _guided(self, prompt: str, expert: str, guidance: float, m: Tensor | None, x1: Tensor) -> flow.Velocity:
        """The guided velocity of an expert for one clip, whose noise is x1 (1, 16, F, H, W)."""
        transformer, negative, device = self.load(expert), self.config.negative_prompt, self.config.device
        texts = [prompt] if guidance == 1 else [prompt, negative]  # no more are kept: the keys of a prompt are large
        self.keys = {t: self.keys.get(t) or transformer.prompt_keys(self.context([t]).to(device)) for t in texts}
        led = guidance, self.config.history_guidance, m, x1, self.config.context_noise
        return guided_velocity(transformer, self.keys[prompt], self.keys.get(negative), *led)

    def walk(
        self, prompts: Sequence[str], x0: Tensor, x1: Tensor, taus: Tensor, m: Tensor | None = None,
        on_step: flow.OnStep = None,
    ) -> Tensor:  # fmt: skip
        """From conditions x0 and noise x1 (B, 16, F, H, W) to latents, for B prompts; m (F,): a plan's multipliers."""
        z = list(flow.interpolate(x0, x1, taus[:1].to(x1.device)).split(1))
        for expert, guidance, part in legs(self.config, taus):  # one expert after the other
            for i, prompt in enumerate(prompts):
                # A velocity with a name here would keep its transformer in memory while the next one is loaded.
                z[i] = flow.euler(self._guided(prompt, expert, guidance, m, x1[i, None]), z[i], part, on_step)
        return torch.cat(z)


@torch.no_grad()
def generate(
    experts: Experts, job: Job, inputs: Sequence[Tensor], seeds: Sequence[int], on_step: flow.OnStep = None
) -> Iterator[Tensor]:
    """Yield the latents (1, 16, F, H, W), fp32, of a clip for each prompt of the experts and its seed, in order.

    inputs: as from `read_inputs`. on_step(k, z) is called after every step. Two experts take turns at groups of clips.
    """
    config, vae, (width, height) = experts.config, experts.vae, cli.parse_size(experts.config.size)
    shape = (1, experts.opened.config.in_dim, len(job.plans[0].m), height // 8, width // 8)
    turn = 1 if config.boundary is None else TURN
    for group in (slice(first, first + turn) for first in range(0, len(seeds), turn)):
        generators, made = [torch.Generator().manual_seed(seed) for seed in seeds[group]], None
        for plan, taus in zip(job.plans, job.taus, strict=True):
            x1 = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(config.device)
            x0 = conditions(vae, plan, inputs, x1) if made is None else carried_over(vae, made, job, x1)
            z = experts.walk(experts.prompts[group], x0, x1, taus, plan.m, on_step)
            made = z if made is None else joined(made, z, job)
        yield from made.split(1)


def conditions(vae: nn.Module, plan: tasks.Plan, inputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """The latents of all conditions at their places and zeros elsewhere, in the shape of `like` (B, 16, F, H, W).

    inputs: the pixels (B, 3, n, 8H, 8W) of each slot, which `tasks.cut` cut, so nothing that the task hides leaks in.
    """
    x0 = torch.zeros_like(like)
    for slot, pixels in zip(plan.slots, inputs, strict=True):
        x0[:, :, list(slot.positions)] = vae.encode(pixels.to(like.device))[:, :, slot.drop :].to(like.dtype)
    return x0


def guided_velocity(
    transformer: Wan, positive: Tensor | PromptKeys, negative: Tensor | PromptKeys | None, guidance: float,
    history: float = 1.0, m: Tensor | None = None, x1: Tensor | None = None, context_noise: float = 0.0,
) -> flow.Velocity:  # fmt: skip
    """velocity(z, tau) for B prompts, led away from the negative ones, and from the video without its conditions.

        v = v(c, h) + (guidance - 1) · [v(c, h) - v(∅, h)] + (history - 1) · [v(c, h) - v(c, ∅)]

    positive, negative: the prompts c and ∅, as `prompt_keys`, or as embeddings (B, T, text_dim) whose keys are computed
    here, once for all steps; without guidance (1) there need be no ∅. m (F,): a plan's multipliers: the conditions h
    are the latent frames with less noise than others, which history guidance (arXiv 2502.06764) replaces by the noise
    x1 at τ = 1. Each weight that is not 1 costs one more pass a step; if both are equal, v(c, h) - v(∅, ∅) serves both.
    The network is told that h have at least context_noise times the highest level, and they stay as clean as they are:
    what Diffusion Forcing (arXiv 2407.01392) says of generated frames, a little noise, is said of given ones.
    """
    prompts = (positive,) if guidance == 1 else (positive, negative)
    keys, *away_keys = (transformer.prompt_keys(p) if isinstance(p, Tensor) else p for p in prompts)
    given = [] if m is None else (m < m.max()).nonzero()[:, 0].tolist()
    history = history if given else 1

    def freed(z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        z, tau = z.clone(), tau.clone()
        z[:, :, given], tau[:, given] = x1[:, :, given].to(z.dtype), 1
        return z, tau

    def velocity(z: Tensor, tau: Tensor) -> Tensor:
        tau = tau.clone()
        tau[:, given] = tau[:, given].maximum(context_noise * tau.amax(1, keepdim=True))
        v = led = transformer(z, tau, keys)
        if guidance != 1:
            away = transformer(*(freed(z, tau) if history == guidance else (z, tau)), *away_keys)
            led = away + guidance * (v - away)
        if history not in (1, guidance):
            led = led + (history - 1) * (v - transformer(*freed(z, tau), keys))
        return led

    return velocity


def passes_a_step(guidance: float, history: float) -> int:
    """How often `guided_velocity` runs the model."""
    return 1 + (guidance != 1) + (history not in (1, guidance))


def carried_over(vae: nn.Module, made: Tensor, job: Job, like: Tensor) -> Tensor:
    """The edge of the latents made so far, at its places in the next window, which is shaped `like` (B, 16, F, H, W).

    Training knows only clips that begin with a lone frame and have no past, unlike the middle of a video. So the older
    half is decoded and encoded again as the start of a clip. The newer half hardly depends on that and stays: if all
    went through pixels, colours would drift from window to window.
    """
    x0 = torch.zeros_like(like)
    if job.backwards:  # latents at a window's end always have a past; only the lone frame cannot stand there
        x0[:, :, -job.carried :] = made[:, :, 1 : 1 + job.carried]
        return x0
    W, newer = like.shape[2], job.carried // 2
    past, recent = made[:, :, -W:].split([W - newer, newer], dim=2)
    pixels = vae.decode(past)[:, :, -tasks.pixel_frames(job.carried - newer) :]
    x0[:, :, : job.carried] = torch.cat([vae.encode(pixels).to(made.dtype), recent], dim=2)
    return x0


def joined(made: Tensor, z: Tensor, job: Job) -> Tensor:
    """The latents made so far with those of a new window z, but for the ones that z took over; cut to F."""
    if not job.backwards:
        return torch.cat([made, z[:, :, job.carried :]], dim=2)[:, :, : job.F]
    later = torch.cat([z[:, :, 1 : -job.carried], made[:, :, 1:]], dim=2)[:, :, 1 - job.F :]
    return torch.cat([z[:, :, :1], later], dim=2)  # the first latent must stay a lone frame


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """The video (3, N, 8H, 8W) in [-1, 1], fp32 on the CPU, of latents (1, 16, F, H, W)."""
    return vae.decode(latents)[0].float().cpu()


def sample(config: SampleConfig) -> dict[str, Path]:
    """Run a config from files to files, and return the paths of those written; a dry run writes none."""
    opened, runs = checkpoint.open(config.model, Wan, config.dry_run), {}
    for labels, changes in records.swept(config).items():
        strength = changes.pop("lora", None)
        cell = resolve(replace(config, **changes), opened, strength)
        if not runs:  # the first cell settles what all have in common
            own = {name: getattr(config, name) for name in ("lora", "guidance", "guidance_2", "history_guidance")}
            config = replace(cell, **own)
        runs[labels] = cell, lay_out(cell, opened.preset.frames)
    if config.dry_run:
        for labels, (cell, job) in runs.items():
            read_inputs(cell, job.plans[0])  # is it all there?
            print(*labels, records.summary(cell, job.taus), estimate(cell, opened, job), sep="\n\n")
        return {}
    return _sample_runs(config, opened, runs) if config.prompts is None else _sample_each(opened, *runs.popitem()[1])


def _sample_runs(config: SampleConfig, opened: checkpoint.Opened, runs: dict) -> dict[str, Path]:
    """Make one video, or the cells of `--sweep`; only another strength of a LoRA loads the transformer again."""
    started, (first, job) = time.monotonic(), next(iter(runs.values()))
    with records.claimed(config) as files:
        inputs, experts = read_inputs(config, job.plans[0]), Experts(first, opened, [config.prompt])
        print(records.summary(first), file=sys.stderr)
        progress = cli.Progress(sum(len(taus) - 1 for _, job in runs.values() for taus in job.taus), "denoising")
        steps, sheet = len(job.taus[0]) - 1, records.Sheet(config, files)
        drawn = set(torch.linspace(1, steps, min(steps, 8)).round().int().tolist())  # more would be too small to see
        states: dict[int, Tensor] = {}

        def on_step(k: int, z: Tensor) -> None:
            progress.step()
            if config.plot and progress.n in drawn:  # of the first window
                states[progress.n] = z

        for labels, (cell, job) in sorted(runs.items(), key=lambda run: run[1][0].lora):
            experts.config = cell
            (latents,) = generate(experts, job, inputs, [cell.seed], on_step)
            if not config.sweep:  # whose next cell needs the transformer
                experts.clear()
            sheet.write(labels, cell, decode(experts.vae, latents), job.given, job.around)
        if config.plot:
            marks = [(slot.source, slot.positions) for slot in job.plans[0].slots]
            videos = [(f"after step {k}", decode(experts.vae, z)) for k, z in states.items()]
            records.plot(files, job.taus[0], marks, config.task, videos)
    print(f"{config.task}: {config.prompt!r}, in {time.monotonic() - started:.1f} s", file=sys.stderr)
    print(*files.values(), sep="\n")
    return files


def _sample_each(opened: checkpoint.Opened, config: SampleConfig, job: Job) -> dict[str, Path]:
    """Make the clips of `--prompts` that the folder `--out` lacks."""
    clips, steps = records.ClipFolder(config), len(job.taus[0]) - 1
    total, missing = len(clips.prompts), clips.missing
    progress = cli.Progress(total * steps, "denoising", (total - len(missing)) * steps)
    if missing:
        experts = Experts(config, opened, [clips.prompts[n] for n in missing])
        seeds = [cli.nth_seed(config.seed, n) for n in missing]  # as --seed, with --prompt, each makes its clip alone
        made = generate(experts, job, (), seeds, lambda k, z: progress.step())
        clips.write(decode(experts.vae, latents) for latents in made)
    print(clips.folder)
    return {"clips": clips.folder}


def estimate(config: SampleConfig, opened: checkpoint.Opened, job: Job) -> str:
    """The memory and time that a run would take, in words. ValueError for a LoRA that does not fit."""
    passes = (1 if config.prompts is None else len(records.prompts(config))) * sum(
        (len(part) - 1) * passes_a_step(guidance, config.history_guidance if plan.m.min() < plan.m.max() else 1)
        for plan, taus in zip(job.plans, job.taus, strict=True) for _, guidance, part in legs(config, taus)
    )  # fmt: skip
    parts = opened.outline()
    for _, path, _ in map(lora.parse_entry, config.lora):
        lora.load(path).check(parts[0])
    return cost.sampling(
        parts, cli.parse_size(config.size), len(job.plans[0].m), job.F, passes,
        getattr(torch, config.dtype), config.device, stays=bool(config.prompts or config.sweep) or len(job.plans) > 1,
    )  # fmt: skip


def main() -> None:
    config = cli.parse(SampleConfig, __doc__)
    if config.from_json:
        config = records.repeated(config.from_json, cli.named(SampleConfig), SampleConfig)
    sample(config)


if __name__ == "__main__":
    cli.run(main)
