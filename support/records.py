"""What `sample.py` leaves: a video, its filmstrip, and a JSON file with every setting, which repeats the run."""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from support import cli, media

Config = TypeVar("Config")  # a dataclass of settings


def write(path: Path, config: Config) -> None:
    """Write the settings of a run, and the version of torch that it ran on."""
    cli.write_json(path, {"settings": dataclasses.asdict(config), "torch": torch.__version__})


def read(path: Path, config_class: type[Config]) -> Config:
    """The settings that `write` wrote. ValueError if the file is no such record, or lacks a setting."""
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
        entries = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
        config = cli.check(config_class(**entries))
        missing = {field.name for field in dataclasses.fields(config)} - entries.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a run, expected a JSON file that sample.py wrote: {error}") from None
    return config


def repeated(config: Config, *names: str) -> Config:
    """The settings recorded in `config.from_json`, except those of these names, which stay as they are in `config`."""
    record = read(Path(config.from_json), type(config))
    return dataclasses.replace(record, **{name: getattr(config, name) for name in names})


def outputs(out: str | None, name: str, plot: bool, overwrite: bool) -> dict[str, Path]:
    """The files of a run, by default with the first free number of outputs/NAME-001.mp4, outputs/NAME-002.mp4, ...

    Raises ValueError if one exists and may not be replaced.
    """
    numbers = (n for n in range(1, 10**6) if not list(Path("outputs").glob(f"{name}-{n:03d}.*")))
    video = Path(out or f"outputs/{name}-{next(numbers):03d}.mp4")
    if video.suffix not in (".mp4", ".gif"):
        raise ValueError(f"got --out {video}, expected a file that ends in .mp4 or .gif")
    files = {"video": video, "filmstrip": video.with_suffix(".png"), "settings": video.with_suffix(".json")}
    if plot:
        files |= {plot: video.with_name(f"{video.stem}-{plot}.png") for plot in ("tau", "denoising")}
    for path in files.values():
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; add --overwrite to replace it, or choose another --out")
    return files


def write_run(config: Config, files: dict[str, Path], video: Tensor, given: list[bool]) -> dict[str, Path]:
    """Write the video (3, N, 8H, 8W) in [-1, 1], its settings and a filmstrip that marks given frames → their paths."""
    if config.out is None:  # another run may have taken the number that was free when this one began
        files = outputs(config.out, config.task, config.plot, config.overwrite)
    media.write_video(files["video"], video, config.fps)
    media.save_image(files["filmstrip"], media.filmstrip([(f"{config.task}: {config.prompt}", video)], marks=[given]))
    write(files["settings"], dataclasses.replace(config, out=str(files["video"]), overwrite=False))
    return files


def clip_folder(config: Config, may_change: set[str]) -> Path:
    """The folder `config.out` for clips. ValueError if it holds anything but clips begun with these settings.

    may_change: the settings that need not be those in its `settings.json`.
    """
    folder = Path(config.out or "")
    record = folder / "settings.json"
    if not config.out or folder.is_file() or folder.suffix in (".mp4", ".gif"):
        raise ValueError(f"got {config.out} as --out of --prompts, expected a folder for the clips, such as data/mine")
    if record.is_file():
        begun = vars(read(record, type(config)))
        for name, now in vars(config).items():
            if name not in may_change and begun[name] != now:
                raise ValueError(f"got {now} as --{name.replace('_', '-')}, but the clips in {folder} began with "
                                 f"{begun[name]}; repeat that, or choose another --out")  # fmt: skip
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(
            f"got --out {folder}, which holds other files, expected a new folder or one that --prompts began"
        )
    return folder
