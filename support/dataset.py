"""Clips and captions: finding them in a folder, cutting them into windows, and drawing batches of windows.

For training, a clip of any size, length and frame rate is brought to the model's frame rate, cut into windows of N
frames, and scaled to a size near its own shape. Windows of one size are a bucket, and a batch comes from one bucket.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support import cache, cli, media

Context = Callable[[list[str]], Tensor]  # B prompts → (B, text_len, text_dim)


class Clip(NamedTuple):
    path: Path
    caption: str


class Source(NamedTuple):
    """A clip that can be trained on."""

    clip: Clip
    size: tuple[int, int]  # width and height in pixels to scale it to
    windows: int  # that it can be cut into
    rest: int = 0  # frames after the last window


class Skipped(NamedTuple):
    """A clip that cannot be trained on."""

    path: Path
    reason: str


class Cut(NamedTuple):
    """How clips are cut into windows."""

    size: tuple[int, int]  # width and height in pixels of a window
    frames: int
    fps: float
    buckets: bool = True  # a window has the clip's own shape, and the area of `size`


class Dataset(NamedTuple):
    """What training needs of the clips: latents (C, F, H, W) of each window, and what the encoder makes of captions."""

    latents: Sequence[Tensor]
    prompts: list[str]  # of each window
    context: Context
    validation: list[int]  # a window of each clip held out of training; if none is, of at most 16 that are trained on
    training: list[list[int]]  # buckets of windows, in each of which latents have one shape
    digest: str = ""  # of the captions and latents
    skipped: Sequence[Skipped] = ()


def find_clips(folder: Path | str) -> list[Clip]:
    """Every clip or image of a folder with its caption, sorted by path; "" where there is none.

    The clips are listed in `metadata.jsonl`, or else `metadata.csv`, or else `videos.txt` with `prompts.txt` or
    `prompt.txt` line by line, and lie in the folder or in its `train/`; without a list, they are all media files of the
    folder and of subfolders that are not hidden. A caption that the list lacks is read from the `.txt` beside the clip.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected one with clips and their captions")
    clips = []
    for name, caption in _listed(folder):
        path = next((path for path in (folder / name, folder / "train" / name) if path.is_file()), folder / name)
        if not caption and (beside := path.with_suffix(".txt")).is_file():
            caption = cli.read_text(beside)
        clips.append(Clip(path, " ".join(caption.split())))
    if not clips:
        raise ValueError(f"{folder} holds no clips: expected such as a.mp4 with its caption in a.txt or metadata.csv")
    return sorted(clips, key=lambda clip: (clip.path.as_posix(), clip.caption))


def _listed(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption or "") of each clip in a folder."""
    if (path := folder / "metadata.jsonl").is_file():
        lines = enumerate(cli.read_text(path).splitlines(), 1)
        return [_row(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if (path := folder / "metadata.csv").is_file():
        reader = csv.DictReader(io.StringIO(cli.read_text(path)))
        try:
            return [_row(row, f"{path}, line {reader.line_num}") for row in reader]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} cannot be read ({error}), expected a table") from None
    if (path := folder / "videos.txt").is_file():
        prompts = next((path for path in (folder / "prompts.txt", folder / "prompt.txt") if path.is_file()), None)
        if prompts is None:
            raise ValueError(f"{folder} has videos.txt and no prompts.txt, expected a caption in it for each line")
        names, captions = (cli.read_text(text).strip().splitlines() for text in (path, prompts))
        if len(names) != len(captions):
            raise ValueError(f"{path} has {len(names)} lines and {prompts.name} {len(captions)}, expected as many")
        return [(name.strip(), caption) for name, caption in zip(names, captions, strict=True) if name.strip()]
    suffixes = media.VIDEO_SUFFIXES + media.IMAGE_SUFFIXES
    files = []
    for inside, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]  # where it goes on
        files += [Path(inside, name) for name in names if name[0] != "."]
    return [(path.relative_to(folder).as_posix(), "") for path in files if path.suffix.lower() in suffixes]


def _row(row: dict | str, where: str) -> tuple[str, str]:
    """(file name, caption or "") of one row of metadata: a row of a table, or the text of a JSON object."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
        name = next(row[key] for key in ("file_name", "video_path", "video", "path") if row.get(key))
    except (ValueError, RecursionError, AttributeError, StopIteration) as error:
        got = shorten(", ".join(map(str, row)) if isinstance(row, dict) else str(row), 100)
        expected = "expected file_name, video_path, video or path, and the caption as text, caption or prompt"
        raise ValueError(f"{where} names no clip: got {got}, {expected}") from error
    return str(name), str(next((row[key] for key in ("text", "caption", "prompt") if row.get(key)), ""))


def look_through(folder: Path | str, cut: Cut, strict: bool) -> tuple[list[Source], list[Skipped]]:
    """The clips of a folder that can be used, and those that cannot; prints `tell_skipped` and `summary` of them."""
    sources, skipped = survey(find_clips(folder), cut)
    tell_skipped(skipped, len(sources), folder, strict)
    print(summary(sources, skipped, cut))
    return sources, skipped


def tell_skipped(skipped: Sequence[Skipped], usable: int, folder: Path | str, strict: bool) -> None:
    """Print which clips are left out, and why. ValueError if none may be, or if none is left."""
    if skipped and (strict or not usable):
        alike = [re.match("[a-z ]*", reason)[0] for _, reason in skipped]
        (most, count), *_ = Counter(alike).most_common()
        example, reason = skipped[alike.index(most)]
        advice = "mend or remove them, or leave out --strict" if usable else "mend them or add others"
        raise ValueError(f"{len(skipped)} of {len(skipped) + usable} clips in {folder} cannot be used, {count} of them "
                         f"like {example.name} ({reason}); {advice}")  # fmt: skip
    if skipped:
        print("\n".join([f"clips left out: {len(skipped)}", *(f"  {path.name}: {why}" for path, why in skipped)]))


def summary(sources: Sequence[Source], skipped: Sequence[Skipped], cut: Cut) -> str:
    """How many windows there are, of which sizes, what is left over, and what validation is on, in words."""
    windows = Counter()
    for source in sources:
        windows[source.size] += source.windows
    rest, apart = sum(source.rest for source in sources), held_out(len(sources))
    return "\n".join([
        f"{len(sources)} of {len(sources) + len(skipped)} clips, {windows.total()} windows of {cut.frames} frames at "
        f"{cut.fps:g} fps" + f"; frames at the ends of clips that fill no window: {rest}" * (rest > 0),
        *(f"  {width}x{height}: {count} windows" for (width, height), count in sorted(windows.items())),
        f"validation on {apart} clips, set apart" if apart else
        f"validation on {min(16, len(sources))} of the clips that are trained on, as fewer than 80 can spare none",
    ])  # fmt: skip


def survey(clips: Sequence[Clip], cut: Cut) -> tuple[list[Source], list[Skipped]]:
    """Sort clips into those that give at least one window, and the others with the reason.

    Only the first picture is decoded, so damage further in shows when the clip is encoded.
    """
    sources, skipped = [], []
    for clip in clips:
        try:
            if not clip.path.is_file():
                raise ValueError("no such file")
            if not clip.caption:
                raise ValueError(f"no caption: write one in {clip.path.with_suffix('.txt').name} beside it")
            width, height, length = media.probe(clip.path, cut.fps)
            if length < cut.frames:
                raise ValueError(f"too short: {length} frames at {cut.fps:g} fps, expected {cut.frames}; "
                                 f"--frames {length - (length - 1) % 4} takes it")  # fmt: skip
            size = media.bucket(width, height, cut.size) if cut.buckets else cut.size
            sources.append(Source(clip, size, *divmod(length, cut.frames)))
        except ValueError as error:
            skipped.append(_skipped(clip.path, error))
    return sources, skipped


def _skipped(path: Path, error: ValueError) -> Skipped:
    return Skipped(path, str(error).removeprefix(f"{path} "))


def assembled(
    sources: Sequence[Source], encoded: Sequence[cache.StoredTensors | None], skipped: Sequence[Skipped],
    context_of: Callable[[list[str]], Context], seed: int,
) -> Dataset:  # fmt: skip
    """Training data of clips and what `latents` made of each; some are set apart for validation, as by `held_out`.

    context_of(captions) makes the `context`.
    """
    usable = [(source, windows.places) for source, windows in zip(sources, encoded, strict=True) if windows]
    clip_of = [k for k, (_, places) in enumerate(usable) for _ in places]  # of each window, the number of its clip
    captions = [source.clip.caption for source, _ in usable]
    keys = [places[0][0].stem for _, places in usable]  # a file's name stands for its latents
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed)).tolist()
    apart = held_out(len(usable))
    learned = set(order[apart:])
    sizes = [usable[k][0].size for k in clip_of]  # in pixels; of one size, latents have one shape
    return Dataset(
        latents=cache.StoredTensors([place for _, places in usable for place in places]),
        prompts=[captions[k] for k in clip_of],
        context=context_of(captions),
        # A dataset too small to spare clips is validated on what it trains on: better than a figure of one or two.
        validation=[clip_of.index(k) for k in order[: apart or 16]],
        training=by_shape(sizes, [i for i, k in enumerate(clip_of) if k in learned]),
        digest=hashlib.sha256(json.dumps([*zip(captions, keys, strict=True)]).encode()).hexdigest()[:16],
        skipped=skipped,
    )


def held_out(clips: int) -> int:
    """How many of so many clips are set apart for validation: one in ten, at most 16; none of fewer than 80."""
    return min(16, clips // 10) if clips >= 80 else 0


def facts(dataset: Dataset) -> dict:
    """What facts.json says of the data."""
    return {
        "windows": len(dataset.latents), "buckets": len(dataset.training), "dataset": dataset.digest,
        "skipped": [(path.name, reason) for path, reason in dataset.skipped],
    }  # fmt: skip


def latents(
    sources: Sequence[Source], cut: Cut, encode: Callable[[Tensor], Tensor], encoder_name: str, folder: Path | str
) -> tuple[list[cache.StoredTensors | None], list[Skipped]]:
    """The latents of each clip's windows, each (16, F, H, W) in fp32; those not yet in `folder` are encoded.

    encode: a window (1, 3, N, 8H, 8W) in [-1, 1] → (1, 16, F, H, W); encoder_name must differ where its weights do.
    Latents are found by content, size, cut and encoder, whatever a clip's file is called. A clip that turns out to be
    damaged, or shorter than it said, gives None, and the reason.
    """
    skipped = []

    def encode_windows(source: Source) -> Tensor | None:
        try:
            windows = media.read_windows(source.clip.path, source.size, cut.fps, cut.frames)
            encoded = [encode(window[None])[0].cpu() for window in windows]
            if not encoded:
                raise ValueError(f"too short: fewer than {cut.frames} frames at {cut.fps:g} fps")
            return torch.stack(encoded)
        except ValueError as error:
            skipped.append(_skipped(source.clip.path, error))
            return None

    contents = [hashlib.sha256(np.memmap(source.clip.path, mode="r")).hexdigest() for source in sources]
    cuts = [(source.size, cut.frames, float(cut.fps), encoder_name) for source in sources]
    keys = [cache.key(content, *how) for content, how in zip(contents, cuts, strict=True)]
    files = cache.compute_missing(sources, keys, encode_windows, folder, "encoding clips")
    return [file and cache.StoredTensors([(file[0], row) for row in range(file[1])]) for file in files], skipped


def by_shape(shapes: Sequence[tuple[int, ...]], indices: Sequence[int]) -> list[list[int]]:
    """The indices in buckets; all indices of a bucket have one shape."""
    buckets = defaultdict(list)
    for index in indices:
        buckets[shapes[index]].append(index)
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
    generator = torch.Generator().manual_seed(cli.nth_seed(seed, epoch))
    turns = []  # for each turn, the batches of the bucket that takes it
    for members in map(torch.tensor, buckets):
        shuffles = [members[torch.randperm(len(members), generator=generator)] for _ in range(batch)]
        turns += [iter(torch.cat(shuffles).split(batch))] * len(members)
    return [next(turns[i]) for i in torch.randperm(len(turns), generator=generator).tolist()]
