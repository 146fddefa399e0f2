"""What the page does, without the page: what was chosen becomes settings of `sample.py`, which make a video.

`Studio.settings` finds the settings that walk the chosen table, `Studio.command` writes them as the line that makes the
same video, to the byte, and `Studio.run` makes it, one run at a time, with the functions of `sample.py`.
"""

import base64
import hashlib
import queue
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import sample
import tasks
from support import cli, media, records

FOLDER = Path("outputs/page")  # pictures, clips and tables that come from the page; videos go where sample.py's go


@dataclass(frozen=True)
class Choices:
    """What a person has chosen."""

    task: str
    prompt: str
    clips: tuple[str, str]  # where a clip is asked for, or a picture that is not there; "" for none
    pictures: dict[int, str]  # latent frame → file
    m: tuple[float, ...]  # of each latent frame, as d
    d: tuple[float, ...]
    steps: int
    shift: float
    guidance: float
    history: float  # guidance away from the video without its conditions
    seed: int
    strengths: tuple[float, ...]  # of each LoRA; 0 leaves it out
    between: str = "0.5,1.25"  # for a retake: from when to when, in seconds
    painted: Tensor | None = None  # (K+1, F): a table in place of m, d, steps and shift
    context: float | None = None  # noise said of the conditions, a share of the others'; None: as much as is usual

    @property
    def table(self) -> Tensor:
        """τ (K+1, F)."""
        if self.painted is not None:
            return self.painted
        for name, numbers in (("m", self.m), ("d", self.d)):
            for i, number in enumerate(numbers):
                cli.expect(number is not None, f"no number as {name} of frame {i}", "one such as 0.5")
        return sample.walked(torch.tensor(self.m), self.steps, self.shift, torch.tensor(self.d))


class Moment(NamedTuple):
    """What there is to see while a run goes on."""

    words: str
    video: Tensor | None = None  # (3, N, 8H, 8W), as it is now
    given: list[bool] | None = None  # for each of its N frames
    files: dict[str, Path] | None = None  # of a run that is done


class Studio:
    """A model, the settings from which the page starts, and the runs that wait for their turn."""

    def __init__(self, start: sample.SampleConfig):
        self.size = start.size  # None: of the model's number of pixels, in the shape of what is given
        self.start, self.opened = sample.prepare(replace(start, task="t2v", prompt=""))
        self.F = tasks.latent_frames(self.start.frames)
        self.loras = [sample.lora.parse_entry(entry) for entry in self.start.lora]  # (expert, path, strength)
        self.line: list[object] = []  # the first one computes

    def pictured(self, task: str, pictures: Collection[int] = ()) -> list[int]:
        """The latent frame of each image that a task is given; pictures: the frames that have one."""
        at = sorted(pictures) or (0, self.F // 2, self.F - 1)
        given = tasks.plan(task, self.F, at=at if tasks.TASKS[task].images is None else ()).slots
        first = {slot.index: slot.positions[0] for slot in reversed(given) if slot.source == "image"}
        return [first[i] for i in sorted(first)]

    def plan(self, choices: Choices) -> tasks.Plan:
        """The task that was chosen, with its usual table."""
        return sample.lay_out(self.inputs(choices), self.opened.preset.frames).plans[0]

    def settings(self, choices: Choices) -> sample.SampleConfig:
        """What makes the video that was chosen. ValueError for what no run can do."""
        taus, config = choices.table, self.inputs(choices)
        for simple in (config, self._with_noise(config, choices)):
            if torch.equal(sample.lay_out(simple, self.opened.preset.frames).taus[0], taus):
                return simple
        lines = "".join(",".join(f"{tau:.9g}" for tau in row) + "\n" for row in taus.tolist())  # to the bit
        return replace(config, tau=kept(lines.encode(), ".csv"), steps=None, shift=None)

    def inputs(self, choices: Choices) -> sample.SampleConfig:
        """The settings for everything but the table, which is the usual one of the task."""
        task, (first, second) = tasks.TASKS[choices.task], choices.clips
        at = self.pictured(choices.task, choices.pictures)
        images = [choices.pictures.get(i) or first and f"{first}@{4 * i}" for i in at]
        videos = [first, second][: max(task.videos or 0, int(choices.task == "stream" and first != ""))]
        cli.expect(all(images), "no picture and no clip", "a picture dropped on the frame that needs it, or a clip")
        cli.expect(all(videos), f"no clip for {choices.task}", f"{task.given}: choose a clip")
        loras = [
            f"{expert}={path}:{strength:g}" if expert else f"{path}:{strength:g}"
            for (expert, path, _), strength in zip(self.loras, choices.strengths, strict=True) if strength
        ]  # fmt: skip
        config = replace(
            self.start, task=choices.task, image=tuple(images), video=tuple(videos), prompt=choices.prompt, noise=None,
            at=",".join(map(str, at)) if task.images is None else None, size=self.size,
            between=choices.between if choices.task == "retake" else None,
            steps=choices.steps, shift=choices.shift, guidance=choices.guidance, history_guidance=choices.history,
            context_noise=self.start.context_noise if choices.context is None else choices.context,
            seed=choices.seed, lora=tuple(loras), no_lora=not loras,
        )  # fmt: skip
        return sample.resolve(cli.check(config), self.opened)

    def _with_noise(self, config: sample.SampleConfig, choices: Choices) -> sample.SampleConfig:
        """The settings, with the multipliers of the conditions that were chosen."""
        m = [choices.m[i] for slot in self.plan(choices).slots for i in slot.positions]
        if not tasks.TASKS[choices.task].noise:
            return replace(config, strength=max(m, default=config.strength))
        return replace(config, noise=",".join(f"{value:g}" for value in (m if len(set(m)) > 1 else m[:1])))

    def command(self, config: sample.SampleConfig) -> str:
        """The shortest line that tells `sample.py` the same: what it fills in by itself is left out."""
        told = config
        for field in fields(config):
            if field.name == "task" or getattr(config, field.name) == field.default:
                continue
            plain = replace(told, **{field.name: field.default})
            try:
                told = plain if sample.resolve(plain, self.opened) == config else told
            except ValueError:  # it cannot be left out
                continue
        words = ["python", "sample.py", "--task", config.task]
        for field in fields(told):
            value = getattr(told, field.name)
            if field.name != "task" and value != field.default:
                flag = "--" + field.name.replace("_", "-")
                words += [flag] if value is True else [flag, *value] if isinstance(value, tuple) else [flag, str(value)]
        return shlex.join(words)

    def thumbnails(self, choices: Choices) -> dict[int, str]:
        """For each latent frame that is given, the last of its pixel frames, as an address that holds the picture."""
        config = self.inputs(choices)
        (plan, *_) = sample.lay_out(config, self.opened.preset.frames).plans
        shown = {}
        for slot, pixels in zip(plan.slots, sample.read_inputs(config, plan), strict=True):
            shown |= {i: _address(pixels[0, :, 4 * (n + slot.drop)]) for n, i in enumerate(slot.positions)}
        return shown

    def run(self, *configs: sample.SampleConfig) -> Iterator[Moment]:
        """Make one video after the other, as soon as earlier runs are done; closing the iterator ends the run."""
        ticket = object()
        self.line.append(ticket)
        try:
            while before := self.line.index(ticket):
                yield Moment(f"Another run is on. This one waits its turn: it is number {before + 1} in line.")
                time.sleep(0.2)
            for config in configs:
                yield from live(lambda show, config=config: self._make(config, show))
        finally:
            self.line.remove(ticket)

    def _make(self, config: sample.SampleConfig, show: Callable[[Moment], None]) -> None:
        """A run of `sample.py`, whose every step is decoded and shown."""
        show(Moment("Reading the model."))
        job = sample.lay_out(config, self.opened.preset.frames)
        total, done = sum(len(taus) - 1 for taus in job.taus), 0

        def on_step(k: int, z: Tensor) -> None:
            nonlocal done
            done += 1
            video = sample.decode(experts.vae, z)
            show(Moment(f"Denoising: step {done} of {total}.", video, job.given[: video.shape[1]]))

        with records.claimed(config) as files:
            inputs = sample.read_inputs(config, job.plans[0])
            experts = sample.Experts(config, self.opened, [config.prompt])
            (latents,) = sample.generate(experts, job, inputs, [config.seed], on_step)
            experts.clear()
            records.write_run(config, files, sample.decode(experts.vae, latents), job.given, job.around)
        whole = job.around.marks(job.given) if job.around else job.given  # extend shows the clip, too
        show(Moment("Done.", media.read_video(files["video"]), whole, files))


def live(work: Callable[[Callable[[Moment], None]], None]) -> Iterator[Moment]:
    """Do `work(show)` in a thread and yield what it shows, as it does; when this is closed, its next show ends it."""
    moments, closed = queue.SimpleQueue(), threading.Event()

    def show(moment: Moment) -> None:
        if closed.is_set():
            raise GeneratorExit
        moments.put(moment)

    def body() -> None:
        try:
            work(show)
            moments.put(None)
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            moments.put(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    try:
        while (moment := moments.get()) is not None:
            if isinstance(moment, BaseException):
                raise moment
            yield moment
    finally:
        closed.set()
        thread.join()


def warnings(taus: Tensor, given: Collection[int]) -> list[str]:
    """What is unusual about a table (K+1, F), in words; given: the latent frames that are."""
    found = []
    for i, levels in enumerate(taus.T.tolist()):
        rise = next((k for k, (now, then) in enumerate(zip(levels, levels[1:], strict=False)) if then > now), None)
        if rise is not None:
            found.append(f"Frame {i} rises from {levels[rise]:.2f} to {levels[rise + 1]:.2f} at step {rise}: there the "
                         "sampler walks back towards noise, which no training has shown to the model.")  # fmt: skip
        if levels[0] < 1 and i not in given:
            found.append(f"Frame {i} begins at {levels[0]:.2f}, but nothing is given there: it begins with grey.")
        if levels[-1] > 0:
            found.append(f"Frame {i} ends at {levels[-1]:.2f}: some noise is left in it.")
    return found


def kept(content: bytes, suffix: str) -> str:
    """Write a file that is called by what is in it, and return its path."""
    path = FOLDER / f"{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
    with cli.replacing(path) as temporary:
        temporary.write_bytes(content)
    return path.as_posix()


def png(pixels: Tensor) -> bytes:
    """A picture (3, H, W) in [-1, 1] as a PNG file."""
    with tempfile.TemporaryDirectory() as folder:
        media.save_image(f"{folder}/picture.png", pixels)
        return Path(folder, "picture.png").read_bytes()


def _address(pixels: Tensor) -> str:
    """A picture (3, H, W) in [-1, 1], made small, as an address that holds it."""
    height, width = (max(1, side * 96 // max(pixels.shape[1:])) for side in pixels.shape[1:])
    small = media.resize_crop(pixels[:, None], (width, height))[:, 0]
    return "data:image/png;base64," + base64.b64encode(png(small)).decode()
