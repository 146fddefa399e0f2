"""Clips and captions: finding them in a folder, cutting them into windows, and drawing batches of windows.

For training, a clip of any size, length and frame rate is brought to the model's frame rate, cut into windows of N
frames, and scaled to a size near its own shape. Windows of one size are a bucket, and a batch comes from one bucket.
`python train.py --data clips/` reads captions and clips through this file.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support import cache, cli, media


class Clip(NamedTuple):
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

    The clips are listed in `metadata.jsonl`, or else `metadata.csv`, or else `videos.txt` with `prompts.txt` or
    `prompt.txt` line by line; without a list, they are all media files. Clips may lie in the folder or in its `train/`.
    A caption that the list lacks is read from the `.txt` beside the clip.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected one with clips and their captions")
    clips = []
    for name, caption in _listed(folder):
        path = next((path for path in (folder / name, folder / "train" / name) if path.is_file()), folder / name)
        if not caption and (beside := path.with_suffix(".txt")).is_file():
            caption = read_text(beside)
        clips.append(Clip(path, " ".join(caption.split())))
    if not clips:
        raise ValueError(f"{folder} holds no clips: expected such as a.mp4 with its caption in a.txt or metadata.csv")
    return sorted(clips, key=lambda clip: (clip.path.as_posix(), clip.caption))


def _listed(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption or "") of each clip in a folder."""
    if (path := folder / "metadata.jsonl").is_file():
        lines = enumerate(read_text(path).splitlines(), 1)
        return [_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if (path := folder / "metadata.csv").is_file():
        reader = csv.DictReader(io.StringIO(read_text(path)))
        return [_row(row, f"{path}, line {reader.line_num}") for row in reader]
    if (path := folder / "videos.txt").is_file():
        prompts = next((path for path in (folder / "prompts.txt", folder / "prompt.txt") if path.is_file()), None)
        if prompts is None:
            raise ValueError(f"{folder} has videos.txt and no prompts.txt, expected a caption in it for each line")
        names, captions = (read_text(text).strip().splitlines() for text in (path, prompts))
        if len(names) != len(captions):
            raise ValueError(f"{path} has {len(names)} lines and {prompts.name} {len(captions)}, expected as many")
        return [(name.strip(), caption) for name, caption in zip(names, captions, strict=True) if name.strip()]
    suffixes = media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES
    files = [path for place in (folder, folder / "train") if place.is_dir() for path in place.iterdir()]
    files = [path for path in files if path.suffix.lower() in suffixes]
    return [(path.relative_to(folder).as_posix(), "") for path in files if not path.name.startswith(".")]


def _row(row: dict | str, where: str) -> tuple[str, str]:
    """(file name, caption or "") of one row of metadata: a row of a table, or the text of a JSON object."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
        name = next(row[key] for key in ("file_name", "video_path", "video", "path") if row.get(key))
    except (json.JSONDecodeError, AttributeError, StopIteration) as error:
        got = ", ".join(map(str, row)) if isinstance(row, dict) else row
        expected = "expected file_name, video_path, video or path, and the caption as text, caption or prompt"
        raise ValueError(f"{where} names no clip: got {got}, {expected}") from error
    return str(name), str(next((row[key] for key in ("text", "caption", "prompt") if row.get(key)), ""))


def read_text(path: Path | str) -> str:
    """A text file that a user made: UTF-8, with or without the mark that some editors put first."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path} as UTF-8 ({error}), expected a text file in that encoding") from None


def read_prompts(path: Path | str) -> list[str]:
    """The lines of a text file, without blank ones."""
    try:
        prompts = [" ".join(line.split()) for line in read_text(path).splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error}), expected a text file with a prompt in each line") from None
    if not prompts:
        raise ValueError(f"{path} is empty, expected a prompt in each line")
    return prompts


def missing_clips(folder: Path | str, captions: Sequence[str]) -> list[int]:
    """The numbers of the captions whose clip is not in a folder that `write_clip` fills.

    A clip without caption was cut off, and counts as missing. ValueError if one has another caption.
    """
    missing = []
    for number, caption in enumerate(captions):
        clip = Path(folder) / f"{number:05d}.mp4"
        beside = clip.with_suffix(".txt")
        if not (clip.is_file() and beside.is_file()):
            missing.append(number)
        elif " ".join(beside.read_text(encoding="utf-8").split()) != caption:
            raise ValueError(f"{beside} has the caption of another clip; choose another --out")
    return missing


def write_clip(folder: Path | str, number: int, video: Tensor, fps: float, caption: str) -> None:
    """Write a clip such as `00000.mp4`, and when it is whole, its caption beside it."""
    clip = Path(folder) / f"{number:05d}.mp4"
    media.write_video(clip, video, fps)
    with cli.replacing(clip.with_suffix(".txt")) as beside:
        beside.write_text(caption + "\n", encoding="utf-8")


def survey(
    clips: Sequence[Clip], size: tuple[int, int], frames: int, fps: float, buckets: bool = True
) -> tuple[list[Source], list[Skipped]]:
    """Sort clips into those that give at least one window of `frames` frames at `fps`, and the others with the reason.

    `size` is (width, height) in pixels of every window; with `buckets`, a window has the clip's own shape and about the
    same area. Only the first picture is decoded, so damage further in shows when the clip is encoded.
    """
    sources, skipped = [], []
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
            skipped.append(Skipped(clip.path, str(error).removeprefix(f"{clip.path} ")))
    return sources, skipped


def bucket(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size (W, H) for a clip of width x height: about the area of `size`, about the clip's shape, multiples of 16.

    Shapes go in steps of 4/3 from that of `size`: from 16:9 they are 4:3, 1:1, 3:4 and 9:16, or nearly so.
    """
    W, H = size
    steps = round(math.log((width / height) / (W / H)) / math.log(4 / 3))
    stretch = (4 / 3) ** (steps / 2)
    return 16 * max(1, round(W * stretch / 16)), 16 * max(1, round(H / stretch / 16))


def latent_keys(sources: Sequence[Source], frames: int, fps: float, encoder_name: str) -> list[str]:
    """A name for the latents of each clip. It follows from content, size, cut and encoder, whatever the file's name."""
    contents = [hashlib.sha256(np.memmap(source.clip.path, mode="r")).hexdigest() for source in sources]
    cuts = [(source.size, frames, float(fps)) for source in sources]
    return [cache.key(content, *cut, encoder_name) for content, cut in zip(contents, cuts, strict=True)]


def latents(
    sources: Sequence[Source], keys: Sequence[str], frames: int, fps: float, encode: Callable, folder: Path | str
) -> tuple[list[cache.StoredTensors | None], list[Skipped]]:
    """The latents of each clip's windows, each (16, F, H, W) in fp32; those not yet in `folder` are encoded.

    `encode` maps one window (1, 3, N, H, W) to (1, 16, F, H, W). A clip that turns out to be damaged, or shorter than
    it said, gives None, and the reason.
    """
    skipped = []

    def encode_windows(source: Source) -> Tensor | None:
        try:
            windows = media.read_windows(source.clip.path, source.size, fps, frames)
            encoded = [encode(window[None])[0].cpu() for window in windows]
            if not encoded:
                raise ValueError(f"too short: fewer than {frames} frames at {fps:g} fps")
            return torch.stack(encoded)
        except ValueError as error:
            path = source.clip.path
            skipped.append(Skipped(path, str(error).removeprefix(f"{path} ")))
            return None

    files = cache.compute_missing(sources, keys, encode_windows, folder, "encoding clips")
    return [file and cache.StoredTensors([(file[0], row) for row in range(file[1])]) for file in files], skipped


def by_shape(shapes: Sequence[tuple[int, ...]], indices: Sequence[int]) -> list[list[int]]:
    """The indices in buckets; all indices of a bucket have one shape."""
    buckets: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        buckets.setdefault(shapes[index], []).append(index)
    return list(buckets.values())


def batch_of(step: int, batch: int, buckets: Sequence[Sequence[int]], seed: int) -> list[int]:
    """The `batch` members of one bucket that training step `step` sees; they follow from the arguments alone.

    An epoch has as many batches as there are members, and shows each member `batch` times.
    """
    epoch, turn = divmod(step, sum(map(len, buckets)))
    return _epoch(epoch, batch, tuple(map(tuple, buckets)), seed)[turn].tolist()


@lru_cache(maxsize=2)
def _epoch(epoch: int, batch: int, buckets: tuple[tuple[int, ...], ...], seed: int) -> list[Tensor]:
    """The batches of an epoch, each (batch,): the buckets take turns in a random order.

    Each bucket gives as many batches as it has members: `batch` shuffles of them, one after another, cut into batches.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    turns = []  # for each turn, the batches of the bucket that takes it
    for members in map(torch.tensor, buckets):
        shuffles = [members[torch.randperm(len(members), generator=generator)] for _ in range(batch)]
        turns += [iter(torch.cat(shuffles).split(batch))] * len(members)
    return [next(turns[i]) for i in torch.randperm(len(turns), generator=generator).tolist()]
