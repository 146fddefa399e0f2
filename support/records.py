"""The files of a run of `sample.py`: images and clips that it is given, and what it leaves.

It leaves a video, a filmstrip, and a JSON file with every setting, which repeats the run.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, groupby, product
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from support import cli, media, plots

Config = TypeVar("Config")  # a dataclass of settings
EXAMPLES, EXAMPLE_CLIPS = Path("clips"), ("00009.mp4", "00015.mp4")  # what a task takes that is given nothing
# Stretches of the first in which its caption holds at the start of what is made; what `restyle` makes of it.
EXAMPLE_STRETCHES = {"extend": "@0-12", "prepend": "@16-32"}
_SHOWN_WHOLE = ("extend", "prepend", "retake")  # tasks whose video is the whole clip with what was made of it
_RESTYLED = "a large yellow circle moving right slowly on a grey background"
_NOT_REPEATED = ("out", "overwrite", "dry_run")
# What a flag beside --from-json takes back: what excludes it, or what was settled by the setting that it replaces.
_UNDOES = {
    "frames": ("seconds",), "seconds": ("frames",), "lora": ("no_lora",), "no_lora": ("lora",),
    "task": ("noise", "at", "between", "only_new"), "guidance": ("guidance_2", "history_guidance"),
    "preset": ("steps", "shift", "guidance", "guidance_2", "history_guidance"), "tau": ("steps", "shift"),
}  # fmt: skip
# What may change when --prompts goes on: where and how clips are computed. The prompts are compared with the captions.
_MAY_CHANGE = {"out", "prompts", "device", "dtype", "offload", "compile", "preset", "no_lora"}
SWEPT = ("noise", "lora", "guidance", "history-guidance", "shift", "steps", "seed")  # the last two are whole numbers


# Settings.


def write(path: Path, config: Config, **facts: object) -> None:
    """Write the settings of a run, the version of torch that it ran on, and what else there is to say of it."""
    cli.write_json(path, {"settings": dataclasses.asdict(config), "torch": torch.__version__, **facts})


def read(path: Path, config_class: type[Config]) -> Config:
    """The settings that `write` wrote. ValueError if the file is no such record, or lacks a setting."""
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
        entries = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
        config = cli.check(config_class(**entries))
        if missing := {field.name for field in dataclasses.fields(config)} - entries.keys():
            raise ValueError(f"it lacks settings such as {', '.join(sorted(missing)[:8])}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a run, expected a JSON file that sample.py wrote: {error}") from None
    return config


def repeated(path: str, named: dict, config_class: type[Config]) -> Config:
    """The settings recorded in a file, but for those `named` by other flags; stderr says which these are."""
    record, defaults = read(Path(path), config_class), config_class()
    changed = [name for name in named if name not in ("from_json", *_NOT_REPEATED)]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        print(f"settings: those of {path}, except for {flags}", file=sys.stderr)
    undone = (*_NOT_REPEATED, *(other for name in changed for other in _UNDOES.get(name, ())))
    values = {name: getattr(defaults, name) for name in undone} | named | {"from_json": None}
    return cli.check(dataclasses.replace(record, **values))


def summary(config: Config, taus: Sequence[Tensor] = ()) -> str:
    """What was chosen for a run, in one line, and the tables of noise levels below it."""
    guidance = f"{config.guidance:g}" + ("" if config.guidance_2 is None else f" and {config.guidance_2:g}")
    loras = f"LoRA {', '.join(config.lora)}" if config.lora else "no LoRA"
    loras += f", sweep {' '.join(config.sweep)}" if config.sweep else ""
    guidance += "" if config.history_guidance == 1 else f", history guidance {config.history_guidance:g}"
    guidance += f", context noise {config.context_noise:g}" if config.context_noise else ""
    levels = f"levels of {config.tau}" if config.tau else f"{config.steps} steps, shift {config.shift:g}"
    line = (f"settings: {config.size}, {config.frames} frames at {config.fps:g} fps, {levels}, guidance {guidance}, "
            f"{loras}")  # fmt: skip
    return "\n\n".join([line, *map(plots.table, taus)])


def swept(config: Config) -> dict[tuple[str, ...], dict[str, object]]:
    """What each cell of `--sweep` sets, by the labels of its row and column; without a sweep {(): {}}.

    `lora` there is a strength. ValueError for what cannot be swept.
    """
    got, entries, axes = f"--sweep {' '.join(config.sweep or ())}", config.sweep or (), []
    names = [entry.partition("=")[0] for entry in entries]
    right = len({*names} & {*SWEPT}) == len(names) <= 2
    cli.expect(right, got, f"one or two of {', '.join(SWEPT)}, as in noise=0,0.2 lora=1,1.4")
    cli.expect(not names or config.prompts is None and not config.plot, f"{got} with --prompts or --plot", "neither")
    free = config.tau is None or not {*names} & {"noise", "shift", "steps"}
    cli.expect(free, f"{got} with --tau", "one of the two, as the table says all noise levels")
    for name, entry in zip(names, entries, strict=True):
        values = cli.parse_numbers(f"sweep {name}", entry[len(name) + 1 :], int if name in SWEPT[-2:] else float)
        texts = {str(value).removesuffix(".0"): value for value in values}
        cli.expect(len(texts) == len(values) and all(abs(v) < math.inf for v in values), got, "finite numbers, once")
        field = name.replace("-", "_")
        axes.append([(f"{name}={text}", field, text if name == "noise" else value) for text, value in texts.items()])
    return {tuple(label for label, _, _ in cell): {n: value for _, n, value in cell} for cell in product(*axes)}


# What is given.


def caption(clip: str) -> str:
    """The caption beside a clip, "" if there is none."""
    path = Path(media.stretch_of(clip)[0]).with_suffix(".txt")
    return " ".join(cli.read_text(path).split()) if path.exists() else ""


def from_file(text: str | None) -> str | None:
    """The text itself, or what stands in the file of `@FILE`."""
    return " ".join(cli.read_prompts(text[1:])) if text and text.startswith("@") else text


def with_inputs(config: Config, needed: NamedTuple, size: tuple[int, int], as_long_as_the_clip: bool) -> Config:
    """Fill in images, videos, positions and prompt; where none are given, from the clips that come with the project.

    needed: the task, with how many `images` and `videos` it is given. Without --size the video has the shape of the
    first, at the number of pixels of `size`. as_long_as_the_clip: whether a `retake` of a short clip has fewer frames.
    """
    image, video, at, between = config.image or (), config.video or (), config.at, config.between
    cli.expect(between is None or config.task == "retake", f"--between for {config.task}", "--task retake")
    shown_whole = not config.only_new or config.task in _SHOWN_WHOLE
    cli.expect(shown_whole, f"--only-new for {config.task}", f"one of {', '.join(_SHOWN_WHOLE)}")
    folder = EXAMPLES if (EXAMPLES / EXAMPLE_CLIPS[0]).exists() else Path(__file__).parent.parent / EXAMPLES
    one, other = (str(folder / name) for name in EXAMPLE_CLIPS)
    source = video[0] if video else one if config.task in ("t2v", "stream") else None
    if not image and not video and (needed.images != 0 or needed.videos):
        F, images = cli.latent_frames(config.frames), [f"{one}@{n}" for n in (0, 16, 32)]
        image = {0: [], 1: images[:1], 2: images[::2], None: images}[needed.images]
        video = (one + EXAMPLE_STRETCHES.get(config.task, ""), other)[: needed.videos or 0]
        source = other if config.task == "transition" else one
        at = f"0,{F // 2},{F - 1}" if config.task == "keyframes" and at is None else at
        between = "0.5,1.25" if config.task == "retake" and between is None else between
    prompt = config.prompt
    if prompt is None and config.prompts is None:
        prompt = _RESTYLED if config.task == "restyle" and not config.video else caption(source) if source else ""
    size = cli.parse_size(config.size) if config.size else size_like(image, video, size)
    changes = {"image": tuple(image), "video": tuple(video), "at": at, "between": between, "prompt": prompt}
    if config.task == "retake" and video and as_long_as_the_clip:
        frames = media.count(video[0], config.fps)
        changes["frames"] = min(config.frames, frames - (frames - 1) % 4)
    return dataclasses.replace(config, size="{}x{}".format(*size), **changes)


def size_like(images: Iterable[str], videos: Iterable[str], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in the shape of the first image, or else clip, with as many pixels as `size`, as in training.

    That is `size` itself if there is no image or clip. Others are cropped to it; stderr says which have another shape.
    """
    shapes = {name: media.read_image(name).shape for name in images}
    shapes |= {name: media.read_video(name, first=1).shape for name in videos}
    sizes = {name: media.bucket(shape[-1], shape[-2], size) for name, shape in shapes.items()}
    for first, chosen in list(sizes.items())[:1]:
        for other in (name for name in sizes if sizes[name] != chosen):
            width, height = chosen
            print(f"{other} is cropped to the shape of {first}, {width}x{height}", file=sys.stderr)
        return chosen
    return size


def lengths(config: Config) -> list[int]:
    """How many frames each clip has that is a keyframe."""
    numbers = [media.stretch_of(name)[2] for name in config.video]
    cli.expect(all(numbers), "a whole clip for keyframes", "a stretch of it, such as a.mp4@0-12")
    return numbers


def prompts(config: Config) -> list[str]:
    """The lines of `--prompts`. ValueError for what cannot be asked of them."""
    if config.task != "t2v" or config.prompt is not None or config.overwrite or config.plot or config.mark:
        raise ValueError("got --prompts with another task than t2v, or with --prompt, --plot, --mark or --overwrite, "
                         "expected none of them; to make clips anew, choose another --out")  # fmt: skip
    return cli.read_prompts(config.prompts)


def retaken(config: Config) -> tuple[int, tuple[int, int]]:
    """`retake`, in frames: where in its clip the window begins, and the stretch of the window that is made again."""
    seconds, N = cli.parse_numbers("between", config.between, float) or (), config.frames
    clip = media.count(config.video[0], config.fps) if config.video else 0
    got, long = f"--between {config.between}" if config.between else "no --between", clip / config.fps
    right = len(seconds) == 2 and 0 <= seconds[0] < seconds[1] <= long
    cli.expect(right, got, f"two times within the clip's {long:.4g} s, as in 3,6")
    first, end = (round(time * config.fps) for time in seconds)
    cli.expect(first < end < first + N, got, f"a stretch of 1 to {N - 1} frames: see --frames")
    start = max(0, min((first + end - N) // 2, clip - N))
    return start, (first - start, end - start)


def pixels(config: Config, slot: NamedTuple) -> Tensor:
    """The image or frames (3, n, 8H, 8W) in [-1, 1] that a slot of a plan is made of; no more of a video is read."""
    size = cli.parse_size(config.size)
    if slot.source == "image":
        return media.read_image(config.image[slot.index], size)[:, None]
    name, end = config.video[slot.index], {"first" if slot.source == "head" else "last": slot.frames}
    if config.task == "retake":
        name = media.part(name, retaken(config)[0], slot.frames)
    return media.read_video(name, size, config.fps, **end)


def read_table(text: str, F: int) -> Tensor:
    """τ (K+1, F) of a text: a line for each step, of F levels between commas or spaces, or as --dry-run prints it."""
    rows = [line.rpartition("|")[2].replace(",", " ").split() for line in text.splitlines() if line.strip()]
    rows = rows[text.lstrip().startswith("step |") :]
    try:
        taus = torch.tensor([[float(word) for word in row] for row in rows])
    except ValueError:  # no numbers, or not as many in each line
        taus = torch.empty(0)
    right = taus.dim() == 2 and len(taus) > 1 and taus.shape[1] == F and ((taus >= 0) & (taus <= 1)).all()
    got = f"{len(rows)} lines of {' or '.join(map(str, sorted(set(map(len, rows)))))} numbers as noise levels"
    cli.expect(right, got, f"a line for each step and one for the end, each of {F} numbers in [0, 1]")
    return taus


# What is left.


class Around(NamedTuple):
    """The clip around the frames that a run made, so that the video shows it whole."""

    clip: str
    frames: int  # that it has
    start: int  # its frame at which the made ones begin; negative if they begin before it
    kept: list[bool]  # for each made frame whether the clip's own is shown in its place

    def whole(self, made: Tensor, size: tuple[int, int], fps: float) -> Iterator[Tensor]:
        """The frames (3, H, W) of the clip, before, among and after the made ones (3, N, H, W)."""
        N, n = made.shape[1], 0  # n counts the made ones that were passed
        while n < -self.start:
            yield made[:, n]
            n += 1
        for t, frame in enumerate(media.pictures(self.clip, size, fps)):
            n = t - self.start
            yield made[:, n] if 0 <= n < N and not self.kept[n] else frame
        yield from made[:, max(0, n + 1) :].unbind(1)

    def marks(self, given: Sequence[bool]) -> list[bool]:
        """Whether each frame of the whole clip was given; `given` says so of the frames that were made."""
        among = {self.start + n: mark or kept for n, (mark, kept) in enumerate(zip(given, self.kept, strict=True))}
        ends = min(0, self.start), max(self.frames, self.start + len(given))
        return [among.get(t, True) for t in range(*ends)]

    def sound(self, fps: float) -> media.Sound:
        clip, first, _ = media.stretch_of(self.clip)
        return media.Sound(clip, first / fps, self.frames / fps, max(0, -self.start) / fps)


def given_frames(plan: NamedTuple, F: int, backwards: bool, may_change: bool) -> list[bool]:
    """For each pixel frame of a video of F latents whether it was given, by the plan of its first window.

    backwards: the window is the video's end. may_change: a frame counts only if its latent is clean.
    """
    N, before = cli.pixel_frames(F), (F - len(plan.m)) * backwards
    given = {i for slot in plan.slots for i in slot.positions if not may_change or plan.m[i] == 0}
    return [cli.latent_index(n, N) - before in given for n in range(N)]


def around(config: Config, plan: NamedTuple, F: int) -> Around | None:
    """Where in its clip a finished video of F latents lies, for a task that shows all of the clip.

    plan: of the task; what it takes clean comes back as it was. None for other tasks, and with --only-new.
    """
    if config.only_new or config.task not in _SHOWN_WHOLE:
        return None
    (slot,), N, m, clip = plan.slots, cli.pixel_frames(F), plan.m.tolist(), media.count(config.video[0], config.fps)
    if config.task == "retake":
        start, stretch = retaken(config)
        return Around(config.video[0], clip, start, [n not in range(*stretch) for n in range(N)])
    later = F - len(m) if config.task == "prepend" else 0  # latents that come before those of the plan
    end = cli.pixel_frames(slot.positions[-1] + later + 1)  # of the frames that the slot was cut from
    latents = [max(cli.latent_index(n, N) - later, slot.positions[0]) for n in range(end)]
    kept = [end - slot.frames <= n < end and m[latents[n]] == 0 for n in range(N)]
    return Around(config.video[0], clip, (clip if slot.source == "tail" else slot.frames) - end, kept)


@contextmanager
def claimed(config: Config) -> Iterator[dict[str, Path]]:
    """The files of a run, by default with the first free number of outputs/TASK-001.mp4, outputs/TASK-002.mp4, ...

    They are claimed at once: the JSON file is made, and stays if the run leaves a video. ValueError if a file exists
    and may not be replaced, or cannot be written.
    """
    numbered = (Path(f"outputs/{config.task}-{n:03d}.mp4") for n in count(1))
    for video in numbered if config.out is None else [Path(config.out)]:
        files = _files(video, config)
        taken = next((path for path in files.values() if path.exists()), None)
        if taken and not config.overwrite and config.out is not None:
            raise ValueError(f"{taken} exists; add --overwrite to replace it, or choose another --out")
        if (not taken or config.overwrite) and (is_mine := _claim(files["settings"], config)) is not None:
            break
    try:
        yield files
    except BaseException:
        if is_mine and not files["sheet" if config.sweep else "video"].exists():
            files["settings"].unlink(missing_ok=True)
        raise


def _files(video: Path, config: Config) -> dict[str, Path]:
    cli.expect(video.suffix in (".mp4", ".gif"), f"--out {video}", "a file that ends in .mp4 or .gif")
    files = {"video": video, "filmstrip": video.with_suffix(".png"), "settings": video.with_suffix(".json")}
    if config.sweep:
        alone, cells = dataclasses.replace(config, sweep=None), {}
        for labels in swept(config):
            cell = _files(video.with_name("-".join((video.stem, *labels)) + video.suffix), alone)
            cells |= {" ".join((kind, *labels)): path for kind, path in cell.items()}
        return cells | {"settings": files["settings"], "sheet": files["filmstrip"]}
    if config.plot:
        files |= {plot: video.with_name(f"{video.stem}-{plot}.png") for plot in ("tau", "denoising")}
    return files


def _claim(path: Path, config: Config) -> bool | None:
    """Make the record of a run: True if it is new, False if it replaces one, None if another run was faster."""
    cli.try_writing(path.parent, "--out")  # what cannot be written is better known before all the work
    try:
        path.touch(exist_ok=False)
        return True
    except FileExistsError:
        if config.overwrite:
            return False
        if config.out is not None:
            raise ValueError(f"{path} exists, as another run has just begun; choose another --out") from None
        return None


def write_run(
    config: Config, files: dict[str, Path], made: Tensor, given: Sequence[bool], around: Around | None = None
) -> None:
    """Write the video, its settings, and a filmstrip that marks given frames.

    made: the frames (3, N, H, W) in [-1, 1] of the run, and whether each was given; around: the clip around them.
    """
    frames, sound = made.unbind(1), None
    if around:
        frames, sound = around.whole(made, cli.parse_size(config.size), config.fps), around.sound(config.fps)
        given = around.marks(given)
    shown = dict.fromkeys(media.evenly(len(given)))

    def watched() -> Iterator[Tensor]:
        for n, frame in enumerate(frames):
            if n in shown:
                shown[n] = frame
            yield media.bordered(frame, given[n]) if config.mark else frame

    media.write_video(files["video"], watched(), config.fps, sound)
    strip = [(f"{config.task}: {config.prompt}", torch.stack(list(shown.values()), dim=1))]
    marks = [[given[n] for n in shown]]
    media.save_image(files["filmstrip"], media.filmstrip(strip, marks, numbers=list(shown)))
    ranges = [[n for n, _ in group] for mark, group in groupby(enumerate(given), lambda pair: pair[1]) if mark]
    settings = dataclasses.replace(config, out=str(files["video"]), overwrite=False, sweep=None)
    write(files["settings"], settings, given=[[numbers[0], numbers[-1]] for numbers in ranges])


class Sheet:
    """The files of a sweep: those of each cell, as of a run of its own, and a contact sheet of the cells made so far.

    A run without `sweep` is one cell without a sheet. files: those of `claimed`.
    """

    def __init__(self, config: Config, files: dict[str, Path]):
        self.config, self.files, self.cells = config, files, {}

    def write(
        self, labels: tuple[str, ...], config: Config, made: Tensor, given: Sequence[bool], around: Around | None
    ) -> None:  # fmt: skip
        """Write the files of a cell as `write_run` does, and the sheet with three of the frames that were not given."""
        own = {kind: self.files[" ".join((kind, *labels))] for kind in ("video", "filmstrip", "settings")}
        write_run(config, own, made, given, around)
        if not labels:
            return
        write(self.files["settings"], self.config)
        new = [n for n, known in enumerate(given) if not known] or range(len(given))
        shown = [new[i] for i in media.evenly(len(new), 3)]
        self.cells[labels] = made[:, shown]
        blank, cells = torch.ones_like(self.cells[labels]), list(swept(self.config))
        rows, columns = (list(dict.fromkeys(cell[part] for cell in cells)) for part in (slice(1), slice(1, None)))
        strips = [(*row, torch.cat([self.cells.get(row + column, blank) for column in columns], 1)) for row in rows]
        numbers = [n + max(0, around.start if around else 0) for n in shown] * len(columns)
        heads = [label for column in columns for label in column]
        media.save_image(self.files["sheet"], media.filmstrip(strips, [], 96, len(numbers), numbers, heads))


def plot(
    files: dict[str, Path], taus: Tensor, given: Sequence[tuple[str, Sequence[int]]], title: str,
    states: Sequence[tuple[str, Tensor]],
) -> None:  # fmt: skip
    """Draw the noise levels of a run, as `plots.tau_table`, and what its video was on the way: (title, video) each."""
    with cli.replacing(files["tau"]) as path:
        plots.tau_table(path, taus, given, title)
    media.save_image(files["denoising"], media.filmstrip(states, height=48))


class ClipFolder:
    """The clips of `--prompts`, in the folder `--out`: a run that was stopped goes on with those that it lacks.

    ValueError if the folder holds anything but clips that were begun with these settings.
    """

    def __init__(self, config: Config):
        self.config, self.prompts, self.folder = config, prompts(config), Path(config.out or "")
        right = config.out and not self.folder.is_file() and self.folder.suffix not in (".mp4", ".gif")
        cli.expect(right, f"{config.out or 'nothing'} as --out of --prompts", "a folder for clips, such as data/mine")
        self._check()
        self.missing = media.missing_clips(self.folder, self.prompts)

    def _check(self) -> None:
        record, folder = self.folder / "settings.json", self.folder
        if record.is_file():
            begun = vars(read(record, type(self.config)))
            for name, now in vars(self.config).items():
                got = f"{now} as --{name.replace('_', '-')} for the clips in {folder}, which began with {begun[name]}"
                cli.expect(name in _MAY_CHANGE or begun[name] == now, got, "the same, or another --out")
        elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"got --out {folder}, which holds other files, expected a new folder or one of --prompts")

    def write(self, videos: Iterable[Tensor]) -> None:
        """Write the missing clips, (3, N, H, W) each, as they are made."""
        done, total = len(self.prompts) - len(self.missing), len(self.prompts)
        try:
            for n, video in zip(self.missing, videos, strict=True):
                write(self.folder / "settings.json", self.config)  # only now: a run that fails earlier leaves nothing
                media.write_clip(self.folder, n, video, self.config.fps, self.prompts[n])
                done += 1
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped at {done} of {total} clips; the same command goes on") from None
