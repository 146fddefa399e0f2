"""Clips and captions: which a folder holds, which can be trained on, and in what order.

A clip is a media file with a caption. For training, a clip of any size, length and frame rate is brought to the
model's frame rate, cut into windows of N frames, and scaled to a size near its own shape; windows of one size are a
bucket, and a batch is drawn from one bucket.

    python train.py --data clips/        # reads captions and clips through this file
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support import cli, media


@dataclass(frozen=True)
class Clip:
    path: Path
    caption: str


class Source(NamedTuple):
    """A clip that can be trained on."""

    clip: Clip
    size: tuple[int, int]  # width and height in pixels to scale it to
    windows: int  # that it can be cut into


class Skipped(NamedTuple):
    """A clip that cannot be trained on."""

    path: Path
    reason: str


def find_clips(folder: Path | str) -> list[Clip]:
    """Every clip or image of a folder with its caption, sorted by path; "" where there is none.

    `metadata.jsonl`, or else `metadata.csv`, or else `videos.txt` with `prompts.txt` or `prompt.txt` line by line, is
    the list of clips where there is one; otherwise the list is every media file in the folder and in its `train/`.
    Listed clips are looked for in the same two places. A caption that the list lacks is read from the `.txt` beside
    the clip.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected one with clips and their captions")
    clips = []
    for name, caption in _listed(folder):
        places = (folder / name, folder / "train" / name)
        path = next((place for place in places if place.is_file()), places[0])
        sidecar = path.with_suffix(".txt")
        if not caption and sidecar.is_file():
            caption = read_text(sidecar)
        clips.append(Clip(path, " ".join(caption.split())))
    if not clips:
        raise ValueError(f"{folder} holds no clips: expected such as a.mp4 with its caption in a.txt or metadata.csv")
    return sorted(clips, key=lambda clip: (clip.path.as_posix(), clip.caption))


def read_text(path: Path | str) -> str:
    """A text file that a user made: UTF-8, with or without the mark that some editors put first."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path} as UTF-8 ({error}), expected a text file in that encoding") from None


def read_prompts(path: Path | str) -> list[str]:
    """The lines of a text file, without blank ones."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error}), expected a text file with a prompt in each line") from None
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty, expected a prompt in each line")
    return prompts


def missing_clips(folder: Path | str, captions: Sequence[str]) -> list[int]:
    """The numbers of the captions whose clip is not in a folder that `write_clip` fills.

    A clip without caption was cut off, and counts as missing. ValueError if one has another caption.
    """
    missing = []
    for number, caption in enumerate(captions):
        clip = _numbered(folder, number)
        beside = clip.with_suffix(".txt")
        if not (clip.is_file() and beside.is_file()):
            missing.append(number)
        elif " ".join(beside.read_text(encoding="utf-8").split()) != caption:
            raise ValueError(f"{beside} has the caption of another clip; choose another --out")
    return missing


def write_clip(folder: Path | str, number: int, video: Tensor, fps: float, caption: str) -> None:
    """Write a clip such as `00000.mp4`, and when it is whole, its caption beside it."""
    clip = _numbered(folder, number)
    media.write_video(clip, video, fps)
    with cli.replacing(clip.with_suffix(".txt")) as beside:
        beside.write_text(caption + "\n", encoding="utf-8")


def _numbered(folder: Path | str, number: int) -> Path:
    return Path(folder) / f"{number:05d}.mp4"


def survey(
    clips: Sequence[Clip], size: tuple[int, int], frames: int, fps: float, buckets: bool = True
) -> tuple[list[Source], list[Skipped]]:
    """Sort clips into those that give at least one window of `frames` frames at `fps`, and the others with the reason.

    `size` is (width, height) in pixels: that of every window, or with `buckets` the one whose area others keep.
    Nothing but the first picture is decoded, so damage further in shows only when the clip is encoded.
    """
    sources, left_out = [], []
    for clip in clips:
        try:
            if not clip.path.is_file():
                raise ValueError("no such file")
            if not clip.caption:
                raise ValueError(f"no caption: write one in {clip.path.with_suffix('.txt').name} beside it")
            width, height, length = media.probe(clip.path, fps)
            if length < frames:
                raise ValueError(f"too short: {length} frames at {fps:g} fps, expected {frames}")
            sources.append(Source(clip, bucket(width, height, size) if buckets else size, length // frames))
        except ValueError as error:
            left_out.append(skipped(clip, error))
    return sources, left_out


def skipped(clip: Clip, error: ValueError) -> Skipped:
    """A clip that is left out, for the error that it gave."""
    return Skipped(clip.path, str(error).removeprefix(f"{clip.path} "))


def bucket(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size (W, H) for a clip of width x height: about the area of `size`, about the clip's shape, multiples of 16.

    Shapes go in steps of 4/3 from that of `size`: from 16:9 they are 4:3, 1:1, 3:4 and 9:16, or nearly so.
    """
    W, H = size
    steps = round(math.log((width / height) / (W / H)) / math.log(4 / 3))
    stretch = (4 / 3) ** (steps / 2)
    return 16 * max(1, round(W * stretch / 16)), 16 * max(1, round(H / stretch / 16))


def _listed(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption or "") of everything that the folder offers."""
    jsonl, table, videos = (folder / name for name in ("metadata.jsonl", "metadata.csv", "videos.txt"))
    if jsonl.is_file():
        lines = enumerate(read_text(jsonl).splitlines(), 1)
        return [_row(line, f"{jsonl}, line {number}") for number, line in lines if line.strip()]
    if table.is_file():
        reader = csv.DictReader(io.StringIO(read_text(table)))
        return [_row(row, f"{table}, line {reader.line_num}") for row in reader]
    if videos.is_file():
        prompts = next((path for path in (folder / "prompts.txt", folder / "prompt.txt") if path.is_file()), None)
        if prompts is None:
            raise ValueError(f"{folder} has videos.txt and no prompts.txt, expected a caption in it for each line")
        names, captions = (read_text(path).strip().splitlines() for path in (videos, prompts))
        if len(names) != len(captions):
            raise ValueError(f"{videos} has {len(names)} lines and {prompts.name} {len(captions)}, expected as many")
        return [(name.strip(), caption) for name, caption in zip(names, captions, strict=True) if name.strip()]
    suffixes = media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES
    files = [path for place in (folder, folder / "train") if place.is_dir() for path in place.iterdir()]
    files = [path for path in files if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    return [(path.relative_to(folder).as_posix(), "") for path in files]


def _row(row: dict | str, where: str) -> tuple[str, str]:
    """(file name, caption or "") of one row of metadata: a row of a table, or the text of a JSON object."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
        name = next(row[key] for key in ("file_name", "video_path", "video", "path") if row.get(key))
    except (json.JSONDecodeError, AttributeError, StopIteration) as error:
        got = ", ".join(map(str, row)) if isinstance(row, dict) else row
        raise ValueError(
            f"{where} names no clip: got {got}, expected file_name, video_path, video or path, "
            "and the caption as text, caption or prompt"
        ) from error
    return str(name), str(next((row[key] for key in ("text", "caption", "prompt") if row.get(key)), ""))





def by_shape(shapes: Sequence[tuple[int, ...]], indices: Sequence[int]) -> list[list[int]]:
    """The indices in buckets, of which each has one shape."""
    buckets: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        buckets.setdefault(shapes[index], []).append(index)
    return list(buckets.values())


def batch_of(step: int, batch: int, buckets: Sequence[Sequence[int]], seed: int) -> list[int]:
    """The `batch` members of one bucket that training step `step` sees; they follow from the arguments alone.

    Each bucket is gone through in epochs, each in a new order. Of as many steps as there are members in all, every
    bucket gets as many as it has members, so all members are seen equally often.
    """
    ends = torch.tensor([len(members) for members in buckets]).cumsum(0)
    lap, turn = divmod(step, ends[-1].item())
    turns = torch.bucketize(_order(seed, lap, ends[-1].item()), ends, right=True)  # the bucket of each step of this lap
    members = buckets[turns[turn]]
    before = lap * len(members) + (turns[:turn] == turns[turn]).sum().item()  # earlier steps of this bucket
    picked = []
    for position in range(before * batch, (before + 1) * batch):
        epoch, place = divmod(position, len(members))
        picked.append(members[_order(seed, epoch, len(members))[place]])
    return picked


@lru_cache(maxsize=64)
def _order(seed: int, epoch: int, total: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
