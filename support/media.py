"""Images and videos in, videos, images and contact sheets out.

In memory a video is a float32 tensor (3, N, H, W) in [-1, 1], where here, and only here, H and W count pixels.
"""

import math
import textwrap
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from support import cli

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
GIVEN, GENERATED = (31, 95, 168), (232, 119, 34)  # blue and orange: told apart by colour-blind readers and in grey

# swscale's bicubic (4) with full chroma both ways, exact rounding and the same bits on every processor. Its default
# darkens a video by one level each time it is written and read again, which shows when a clip is extended repeatedly.
_SWSCALE = 4 | 0x2000 | 0x4000 | 0x40000 | 0x80000
_BT601 = 5  # the colour matrix in swscale's numbering


def read_video(
    path: Path | str,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    first: int | None = None,
    last: int | None = None,
) -> Tensor:
    """Read a video, an animated GIF or a still image (one frame) → (3, N, H, W) in [-1, 1].

    size    (width, height) in pixels, reached by `resize_crop`; None keeps the file's.
    fps     frames per second of the result, above 0: each takes the file's frame that is shown nearest to its time, by
            the file's own timestamps; None keeps the file's frames.
    first   at most that many frames from the start, and reading stops there; None reads to the end.
    last    at most that many frames from the end of what is read. No more are held in memory.
    ValueError if the file cannot be read.
    """
    pictures = list(_pictures(Path(path), size, fps, first, last))
    if not pictures:
        raise ValueError(f"{path} has no frames, expected at least one; choose another file")
    return torch.stack(pictures, dim=1)


def read_frame(path: Path | str, index: int, size: tuple[int, int] | None = None) -> Tensor:
    """The frame of a video that has this number, from 0 → (3, H, W) in [-1, 1]; `size` as in `read_video`.

    ValueError if the file cannot be read, or has no such frame.
    """
    number = -1
    for number, frame in enumerate(_shown(Path(path), None)):
        if number == index:
            return _converted(frame, size, path)
    raise ValueError(f"{path} has frames 0 to {number}, and not {index}; choose one of them")


def read_windows(path: Path | str, size: tuple[int, int], fps: float, frames: int) -> Iterator[Tensor]:
    """A clip cut from its start into windows (3, N, H, W) of N = `frames`; a rest that fills none is left out.

    `size` and `fps` as in `read_video`. One window is in memory at a time.
    """
    pictures = _pictures(Path(path), size, fps)
    while len(window := list(islice(pictures, frames))) == frames:
        yield torch.stack(window, dim=1)


def probe(path: Path | str, fps: float) -> tuple[int, int, int]:
    """Width and height of a clip, upright, and how many frames it has at `fps`, without decoding more than one.

    The number is that of `read_video` where the packets of the file tell the truth about their times.
    ValueError if the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return *read_image(path).shape[:0:-1], 1
    picture, first, end = None, None, Fraction(0)
    with _opened(path) as (container, stream):
        usual = 1 / (stream.average_rate or Fraction(25))
        for packet in container.demux(stream):
            picture = picture or next(iter(packet.decode()), None)
            if packet.size == 0 or packet.is_discard:
                continue
            tick = packet.dts if packet.pts is None else packet.pts
            time = end if tick is None else tick * packet.time_base
            first = time if first is None else min(first, time)
            end = max(end, time + (packet.duration * packet.time_base if packet.duration else usual))
    if picture is None:
        raise ValueError(f"{path} cannot be read as a video (it has no pictures): expected a file that FFmpeg reads")
    width, height = picture.width, picture.height
    if round(picture.rotation / 90) % 2:
        width, height = height, width
    return width, height, max(1, math.floor((end - first) * Fraction(fps) + Fraction(1, 2)))


@contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    """(container, video stream) of a file; what goes wrong while it is open is a ValueError that names it."""
    with _named(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path} holds no video stream: expected a video or an image")
        container.streams.video[0].thread_type = "AUTO"
        yield container, container.streams.video[0]


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """FFmpeg's errors become ValueErrors that name the file."""
    try:
        yield
    except av.FFmpegError as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read as a video ({reason}): expected a file that FFmpeg reads") from error


def _pictures(path: Path, size, fps: float | None, first: int | None = None, last: int | None = None) -> Iterator:
    """The frames wanted, each (3, H, W), decoded as they are asked for."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        yield read_image(path, size)
        return
    frames = islice(_shown(path, fps), first)
    latest = image = None
    for frame in frames if last is None else deque(frames, maxlen=last):
        if frame is not latest:  # a frame that is shown twice is converted once
            image, latest = _converted(frame, size, path), frame
        yield image


def _shown(path: Path, fps: float | None) -> Iterator[av.VideoFrame]:
    with _opened(path) as (container, stream):
        yield from _pick(_timed(container, stream), fps)


def _converted(frame: av.VideoFrame, size: tuple[int, int] | None, path: Path | str) -> Tensor:
    with _named(path):
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", interpolation=_SWSCALE))
    # Phones store an upright picture sideways, and how many degrees to turn it anticlockwise.
    return _from_bytes(torch.rot90(pixels, round(frame.rotation / 90)).permute(2, 0, 1), size)


def _timed(container, stream) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """(time, duration, frame) of each frame, in seconds from the first; exact, so that ties are ties."""
    usual = 1 / (stream.average_rate or Fraction(25))
    first = None
    for index, frame in enumerate(container.decode(stream)):
        time = index * usual if frame.pts is None else frame.pts * frame.time_base
        first = time if first is None else first
        yield time - first, (frame.duration * frame.time_base if frame.duration else usual), frame


def _pick(timed, fps: float | None) -> Iterator[av.VideoFrame]:
    """The frame to show at each of 0, 1/fps, 2/fps, ...: the nearest, the earlier of two that are equally near."""
    if fps is None:
        yield from (frame for _, _, frame in timed)
        return
    step, wanted = 1 / Fraction(fps), Fraction(0)
    held = end = None
    for time, duration, frame in timed:
        while held is not None and wanted - held[0] <= time - wanted:
            yield held[1]
            wanted += step
        held, end = (time, frame), time + duration
    # The last frame stays on until it ends; a time counts if most of its own interval lies inside the clip.
    while held is not None and (wanted + step / 2 <= end or wanted == 0):
        yield held[1]
        wanted += step


def read_image(path: Path | str, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image upright, as its EXIF orientation says → (3, H, W) in [-1, 1]; `size` as in `read_video`."""
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "damaged, or of an unknown kind"
        raise ValueError(f"{path} cannot be read as an image ({reason}): expected a PNG, JPEG or the like") from error
    return _from_bytes(torch.from_numpy(pixels).permute(2, 0, 1), size)


def _from_bytes(pixels: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(3, h, w) of 0..255 → (3, H, W) in [-1, 1]."""
    image = pixels.float() / 127.5 - 1
    return image if size is None else resize_crop(image[:, None], size)[:, 0]


def _to_bytes(video: Tensor) -> np.ndarray:
    """(3, N, H, W) in [-1, 1] → (N, H, W, 3) of 0..255."""
    pixels = (video.detach().float().cpu() + 1) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()


def resize_crop(video: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, N, h, w) → (3, N, H, W) for size = (W, H): scaled to cover it, antialiased, and cropped around the centre."""
    W, H = size
    h, w = video.shape[-2:]
    if (h, w) == (H, W):
        return video
    scale = max(W / w, H / h)
    inner = (max(H, round(h * scale)), max(W, round(w * scale)))
    images = functional.interpolate(
        video.transpose(0, 1), size=inner, mode="bicubic", align_corners=False, antialias=True
    )  # (N, 3, h', w')
    top, left = (inner[0] - H) // 2, (inner[1] - W) // 2
    # Bicubic overshoots at edges.
    return images[..., top : top + H, left : left + W].transpose(0, 1).clamp(-1, 1)


def write_video(path: Path | str, video: Tensor, fps: float) -> None:
    """Write video (3, N, H, W) in [-1, 1] as .mp4 (H.264) or a looping .gif, by the suffix; same input, same bytes.

    An odd width or height of an .mp4 grows by one repeated pixel, as H.264's 4:2:0 needs even ones.
    """
    path = Path(path)
    writers = {".mp4": _write_mp4, ".gif": _write_gif}
    if path.suffix.lower() not in writers:
        raise ValueError(f"cannot write {path.name}: expected a name that ends in .mp4 or .gif")
    with cli.replacing(path) as temporary:
        writers[path.suffix.lower()](temporary, _to_bytes(video), Fraction(fps).limit_denominator(1001))


def _write_mp4(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    # Quality 12 of 0 (lossless) to 51; an index at the front, so that browsers can start at once. Without
    # `cpu-independent`, or with as many threads as the machine has, the same frames can give other bytes the next time.
    settings = {"crf": "12", "x264-params": "cpu-independent=1"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=settings)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        context = stream.codec_context
        context.thread_count = 4
        # Untagged, players guess the colour matrix from the size. These are FFmpeg's numbers: BT.601, video range.
        context.colorspace, context.color_range = 6, 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT601, dst_color_range=1, interpolation=_SWSCALE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    # One palette for all frames, or colours would flicker; it is made from a sheet of at most 2^18 of the pixels.
    sheet = frames.reshape(-1, 3)[:: max(1, frames.size // 3 >> 18)]
    palette = Image.fromarray(sheet[None]).quantize(256, kmeans=2)
    images = [Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE) for pixels in frames]
    # GIF counts in hundredths of a second: rounding the times, not the durations, keeps the whole on time.
    times = [round(100 * index / fps) for index in range(len(images) + 1)]
    durations = [10 * (after - before) for before, after in zip(times, times[1:], strict=False)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=1)


def save_image(path: Path | str, image: Image.Image | Tensor) -> None:
    """Write a Pillow image, or a tensor (3, H, W) in [-1, 1], as PNG."""
    if isinstance(image, Tensor):
        image = Image.fromarray(_to_bytes(image[:, None])[0])
    with cli.replacing(path) as temporary:
        image.save(temporary, format="PNG")


def filmstrip(
    rows: Sequence[tuple[str, Tensor]],
    marks: Sequence[Sequence[bool] | None] | None = None,
    height: int = 96,
    columns: int = 12,
) -> Image.Image:
    """A contact sheet: one row a video, time from left to right.

    rows     (title, video (3, N, H, W) in [-1, 1]) of each row; the numbers of its frames are written below them.
    marks    for each row whether each of its N frames was given (True) or generated (False), told by the colour of its
             border and number and by a legend; None leaves a row unmarked.
    height   of a frame in the picture, in pixels.
    columns  at most that many frames of each row, evenly spaced, the first and the last among them.
    """
    gap, line, border, grey = 6, 18, 3, (119, 119, 119)
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    marks = marks or [None] * len(rows)
    titles = [textwrap.fill(title, 22, max_lines=4, placeholder=" ...") for title, _ in rows]
    margin = 3 * gap + max(round(font.getlength(text)) for title in titles for text in title.split("\n"))
    legend = [("given", GIVEN), ("generated", GENERATED)] if any(mark is not None for mark in marks) else []
    entry = line + round(font.getlength("generated")) + 2 * gap
    cell_height = height + 2 * border
    right, bottom = margin + entry * len(legend), gap + len(rows) * (cell_height + line + gap)

    cells = []  # (left, top, colour, text, picture)
    for row, (_, video) in enumerate(rows):
        left, top, N = margin, gap + row * (cell_height + line + gap), video.shape[1]
        chosen = np.linspace(0, N - 1, min(N, columns)).round().astype(int).tolist()
        for index, pixels in zip(chosen, _to_bytes(video[:, chosen]), strict=True):
            picture = Image.fromarray(pixels)
            width = max(1, round(height * picture.width / picture.height))
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            colour = None if marks[row] is None else GIVEN if marks[row][index] else GENERATED
            cells.append((left, top, colour, str(index), picture))
            left += width + 2 * border + gap
        right = max(right, left)

    sheet = Image.new("RGB", (right, bottom + (line + gap if legend else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, title in enumerate(titles):
        middle = gap + row * (cell_height + line + gap) + cell_height // 2
        draw.multiline_text((gap, middle), title, fill="black", font=font, anchor="lm")
    for left, top, colour, text, picture in cells:
        cell_width = picture.width + 2 * border
        if colour:
            draw.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), fill=colour)
        sheet.paste(picture, (left + border, top + border))
        draw.text((left + cell_width // 2, top + cell_height + 3), text, fill=colour or grey, font=small, anchor="ma")
    for number, (name, colour) in enumerate(legend):
        left, middle = margin + number * entry, bottom + line // 2
        draw.rectangle((left, middle - 6, left + 12, middle + 6), fill=colour)
        draw.text((left + line, middle), name, fill="black", font=font, anchor="lm")
    return sheet