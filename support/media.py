"""Reads images and videos; writes videos, images and contact sheets.

In memory a video is a float32 tensor (3, N, H, W) in [-1, 1], where here, and only here, H and W count pixels.
"""

import re
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from itertools import chain, groupby, islice, pairwise, repeat
from math import floor, log
from pathlib import Path
from typing import NamedTuple

import av
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as functional
from einops import rearrange
from imageio.plugins.pyav import PyAVPlugin
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from support import cli

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Size = tuple[int, int]  # width and height in pixels
GIVEN, GENERATED = (31, 95, 168), (232, 119, 34)  # blue and orange: told apart by colour-blind readers and in grey

# swscale's bicubic (4) with full chroma both ways, exact rounding and the same bits on every processor. Its default
# darkens a video by half a level each time it is written and read again, which shows once a clip is extended often.
_SWSCALE = 4 | 0x2000 | 0x4000 | 0x40000 | 0x80000
_HERTZ = 48000  # of sound that is written


class Sound(NamedTuple):
    """The sound of a clip, to be written beside a video that shows the clip after `delay` seconds."""

    clip: str
    start: float  # seconds of the clip that are left out at its start
    seconds: float  # of the clip that are shown
    delay: float = 0.0


class _Video(PyAVPlugin):
    """imageio's plugin for FFmpeg, and what it has no setting for: a frame's own time and rotation, exact colours."""

    def timed(self, packets: bool = False) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame | av.Packet]]:
        """(start, end, frame or packet) of each, in seconds; exact, so that ties are ties. OSError if there is none."""
        stream, start, end = self._video_stream, None, Fraction(0)
        stream.thread_type = "AUTO"
        usual = 1 / (stream.average_rate or Fraction(25))
        for item in (self._container.demux if packets else self._container.decode)(stream):
            if packets and (item.size == 0 or item.is_discard):
                continue
            tick = item.dts if item.pts is None else item.pts
            start = end if tick is None else tick * item.time_base
            end = start + (item.duration * item.time_base if item.duration else usual)
            yield start, end, item
        if start is None:
            raise OSError

    def convert(self, frame: av.VideoFrame, size: Size | None) -> Tensor:
        pixels = frame.to_ndarray(format="rgb24", interpolation=_SWSCALE)
        return _from_bytes(pixels, size, frame.rotation)  # phones store sideways pictures, and how to turn them

    def close(self) -> None:
        """Close the file, without collecting the garbage of the whole process: beside torch that takes 0.1 s a clip."""
        if self._container is not None:
            self._container.close()
        self.request.finish()


def _pieces(file: av.container.InputContainer, sound: Sound) -> Iterator[av.AudioFrame]:
    """The samples of a sound, 1024 at a time, stereo; what lies in time between or before them is silence."""
    source, pictures = file.streams.audio[0], file.streams.video
    began = float((pictures[0].start_time or 0) * pictures[0].time_base) if pictures else 0.0
    graph = av.filter.Graph()
    steps = {
        "aresample": f"{_HERTZ}:async=1:first_pts=0", "aformat": "sample_fmts=fltp:channel_layouts=stereo",
        "atrim": f"start={began + sound.start:f}:duration={sound.seconds:f}", "asetpts": "PTS-STARTPTS",
        "adelay": f"{round(1000 * sound.delay)}:all=1", "asetnsamples": "1024:p=0", "abuffersink": None,
    }  # fmt: skip
    graph.link_nodes(graph.add_abuffer(template=source), *(graph.add(*step) for step in steps.items())).configure()
    with suppress(av.InvalidDataError):  # damaged: it ends early
        for frame in chain(file.decode(source), [None]):
            with suppress(av.EOFError):  # all that is to be heard has gone in
                graph.push(frame)
            with suppress(av.BlockingIOError, av.EOFError):
                while True:
                    yield graph.pull()


_STRETCH = re.compile(r"(.+)@(\d{1,9})-(\d{1,9})", re.DOTALL)


def stretch_of(name: Path | str) -> tuple[str, int, int | None]:
    """The file, first frame and number of frames that a clip's name says: FILE@A-B is frames A to B, FILE all of it."""
    match = _STRETCH.fullmatch(str(name))
    if not match:
        return str(name), 0, None
    first, last = int(match[2]), int(match[3])
    cli.expect(first <= last, f"the frames {first} to {last} of {match[1]}", "the first before the last")
    return match[1], first, last - first + 1


def part(name: str, start: int, frames: int) -> str:
    """The name of so many frames of a clip, or of a stretch of one."""
    file, first, _ = stretch_of(name)
    return f"{file}@{first + start}-{first + start + frames - 1}"


def read_video(
    path: Path | str, size: Size | None = None, fps: float | None = None,
    first: int | None = None, last: int | None = None,
) -> Tensor:  # fmt: skip
    """Read a video, an animated GIF or a still image (one frame) → (3, N, H, W) in [-1, 1]. ValueError if it cannot be.

    path    a file, or FILE@A-B for frames A to B of it, counted at `fps`.
    size    (width, height) in pixels, reached by `resize_crop`; None keeps the file's.
    fps     frames per second of the result, above 0: each takes the file's frame that is shown nearest to its time, by
            the file's own timestamps; None keeps the file's frames.
    first   at most that many frames from the start, and reading stops there; None reads to the end.
    last    at most that many frames from the end of what is read. No more are held in memory.
    """
    frames = list(pictures(path, size, fps, first, last))
    if not frames or len({frame.shape for frame in frames}) > 1:
        got = "has frames of several sizes" if frames else "ends before those frames"
        raise ValueError(f"{path} {got}, expected frames of one size; give another clip, or another stretch of it")
    return torch.stack(frames, dim=1)


def read_windows(path: Path | str, size: Size, fps: float, frames: int) -> Iterator[Tensor]:
    """Cut a clip into windows (3, N, H, W) of N = `frames`, one in memory at a time; a shorter rest is dropped."""
    every = pictures(path, size, fps)
    while len(window := list(islice(every, frames))) == frames:
        yield torch.stack(window, dim=1)


def probe(path: Path | str, fps: float) -> tuple[int, int, int]:
    """Width and height of a clip, upright, and how many frames it has at `fps`, without decoding more than one.

    The number is that of `read_video` where the packets tell the truth about their times. ValueError as there.
    """
    height, width = read_video(path, first=1).shape[2:]
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        return width, height, 1
    with _opened(path, _Video) as file:
        starts, ends = zip(*((start, end) for start, end, _ in file.timed(packets=True)), strict=True)
    return width, height, max(1, floor((max(ends) - min(starts)) * Fraction(fps) + Fraction(1, 2)))


@contextmanager
def _opened(path: Path | str, plugin: type | str) -> Iterator:
    """Open a file with an imageio plugin; whatever fails while it is read is a ValueError that names it."""
    of_video, of_image = ("a video", "a file that FFmpeg reads"), ("an image", "a PNG, JPEG or the like")
    kind, expected = of_image if plugin == "pillow" else of_video
    try:
        settings = {} if plugin == "pillow" else {"metadata_errors": "ignore"}  # titles need not be UTF-8
        with iio.imopen(Path(path), "r", plugin=plugin, **settings) as file:
            yield file
    except (OSError, UnicodeDecodeError, SyntaxError, av.FFmpegError) as error:
        why = getattr(error, "strerror", None) or "damaged, or without pictures"
        reason = "no such file" if isinstance(error, FileNotFoundError) else why
        raise ValueError(f"{path} cannot be read as {kind} ({reason}): expected {expected}") from error


def pictures(
    path: Path | str, size: Size | None = None, fps: float | None = None,
    first: int | None = None, last: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The frames of `read_video`, each (3, H, W), decoded as they are asked for."""
    file, start, number = stretch_of(path)
    if Path(file).suffix.lower() in IMAGE_SUFFIXES:
        yield read_image(file, size)
        return
    with _opened(file, _Video) as video:
        latest = None
        for frame in _chosen(video, fps, start, number, first, last):
            if frame is not latest:  # a frame that is shown twice is converted once
                image, latest = video.convert(frame, size), frame
            yield image


def count(path: Path | str, fps: float) -> int:
    """How many frames `read_video` would give. All are decoded, as packets may not tell the truth about their times."""
    file, start, number = stretch_of(path)
    if Path(file).suffix.lower() in IMAGE_SUFFIXES:
        return 1
    with _opened(file, _Video) as video:
        return sum(1 for _ in _chosen(video, fps, start, number))


def _chosen(video: _Video, fps: float | None, start: int, number: int | None, first=None, last=None) -> Iterable:
    frames = (frame for _, _, frame in video.timed()) if fps is None else _pick(video.timed(), Fraction(fps))
    frames = islice(islice(frames, start, None if number is None else start + number), first)
    return frames if last is None else deque(frames, maxlen=last)


def _pick(timed: Iterable, fps: Fraction) -> Iterator[av.VideoFrame]:
    """The frame to show at each of 0, 1/fps, 2/fps, ... from the first: the nearest, of two as near the earlier."""
    first, shown = None, 0
    for (start, end, frame), following in pairwise(chain(timed, [None])):
        first = start if first is None else first
        # The last frame stays on until it ends; a time counts if most of its own interval lies inside the clip.
        until = (start + following[0]) / 2 if following else end - 1 / (2 * fps)
        count = max(1, floor((until - first) * fps) + 1)  # of times up to then
        yield from repeat(frame, count - shown)
        shown = max(shown, count)


def read_image(name: Path | str, size: Size | None = None) -> Tensor:
    """Read an image upright, as its EXIF orientation says → (3, H, W) in [-1, 1]; `size` as in `read_video`.

    FILE@N is frame N, from 0, of a video. ValueError if the file cannot be read, or has no such frame.
    """
    path, _, index = str(name).rpartition("@")
    if index.isdecimal() and Path(path).suffix.lower() in VIDEO_SUFFIXES:
        with _opened(path, _Video) as file:
            for number, (_, _, frame) in enumerate(file.timed()):
                if number == int(index):
                    return file.convert(frame, size)
        raise ValueError(f"{path} has frames 0 to {number}, and not {index}; choose one of them")
    with _opened(name, "pillow") as file:
        image = Image.fromarray(file.read(index=0, mode="RGB"))
        orientation = file.metadata(index=0, exclude_applied=False).get("Orientation", 1)
    # The plugin's own `rotate` mirrors the colours of a grey picture instead of its columns.
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return _from_bytes(np.array(ImageOps.exif_transpose(image)), size)


def _from_bytes(pixels: np.ndarray, size: Size | None, degrees: int = 0) -> Tensor:
    """(h, w, 3) of 0..255, to be turned anticlockwise by `degrees` → (3, H, W) in [-1, 1]."""
    upright = torch.rot90(torch.from_numpy(pixels), round(degrees / 90))
    image = rearrange(upright, "h w c -> c 1 h w") / 127.5 - 1
    return (image if size is None else resize_crop(image, size))[:, 0]


def _to_bytes(video: Tensor) -> np.ndarray:
    """(3, N, H, W) in [-1, 1] → (N, H, W, 3) of 0..255."""
    pixels = ((video.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "c n h w -> n h w c").contiguous().numpy()


def resize_crop(video: Tensor, size: Size) -> Tensor:
    """(3, N, h, w) → (3, N, H, W) for size = (W, H): scaled to cover it, antialiased, and cropped around the centre."""
    W, H = size
    h, w = video.shape[-2:]
    if (h, w) == (H, W):
        return video
    scale = max(W / w, H / h)
    inner = (max(H, round(h * scale)), max(W, round(w * scale)))
    images = functional.interpolate(video.transpose(0, 1), inner, mode="bicubic", align_corners=False, antialias=True)
    top, left = (inner[0] - H) // 2, (inner[1] - W) // 2
    return images[..., top : top + H, left : left + W].transpose(0, 1).clamp(-1, 1)  # bicubic overshoots at edges


def write_video(path: Path | str, video: Tensor | Iterable[Tensor], fps: float, sound: Sound | None = None) -> None:
    """Write a video as .mp4 (H.264) or a looping .gif, by the suffix; same input, same bytes.

    video: (3, N, H, W) in [-1, 1], or its frames (3, H, W), of which an .mp4 has few in memory; a .gif has no sound. An
    odd width or height of an .mp4 grows by one repeated pixel, as H.264's 4:2:0 needs even ones.
    """
    if Path(path).suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"cannot write {Path(path).name}: expected a name that ends in .mp4 or .gif")
    frames = (_to_bytes(frame[:, None])[0] for frame in (video.unbind(1) if isinstance(video, Tensor) else video))
    with cli.replacing(path) as temporary:
        if Path(path).suffix.lower() == ".gif":
            _write_gif(temporary, np.stack(list(frames)), Fraction(fps).limit_denominator(1001))
        else:
            _write_mp4(temporary, frames, Fraction(fps).limit_denominator(1001), sound)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: Fraction, sound: Sound | None) -> None:
    """Frames (H, W, 3) of 0..255 as H.264, and a clip's sound, if it has any, as AAC."""
    # PyAV: imageio has no setting for colours, equal bytes, sound. With the index in front, browsers start at once.
    # Sound is written first: without a limit (0), packets wait until players can read both streams side by side.
    with av.open(str(path.resolve()), "w", options={"movflags": "faststart", "max_interleave_delta": "0"}) as file:
        first = next(frames)
        height, width = first.shape[:2]
        stream = file.add_stream("libx264", fps)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", height + height % 2, width + width % 2
        # crf is from 0 (lossless) to 51. Without `cpu-independent` and a fixed number of threads, bytes can differ.
        context, options = stream.codec_context, {"crf": "12", "x264-params": "cpu-independent=1"}
        context.options, context.thread_count = options, 4
        # Untagged, players guess the colour matrix from the size. BT.601 is FFmpeg's 6 and swscale's 5, video range 1.
        context.colorspace, context.color_range = 6, 1
        exact = {"format": "yuv420p", "dst_colorspace": 5, "dst_color_range": 1, "interpolation": _SWSCALE}
        if sound is not None:
            _write_sound(file, sound)
        for pixels in chain([first], frames):
            even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            file.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24").reformat(**exact)))
        file.mux(stream.encode())


def _write_sound(file: av.container.OutputContainer, sound: Sound) -> None:
    """A clip's sound as AAC, if it has any."""
    with av.open(str(Path(sound.clip).resolve()), metadata_errors="ignore") as clip:
        if not clip.streams.audio:
            return
        stream, done = file.add_stream("aac", rate=_HERTZ, layout="stereo"), 0
        for piece in _pieces(clip, sound):
            piece.pts, piece.time_base, done = done, Fraction(1, _HERTZ), done + piece.samples
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))


def _write_gif(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    # One palette for all frames, or colours would flicker; it is made from a sheet of at most 2^18 of the pixels.
    sheet = frames.reshape(-1, 3)[:: max(1, frames.size // 3 >> 18)]
    palette = Image.fromarray(sheet[None]).quantize(256, kmeans=2)
    indices = [Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE) for pixels in frames]
    # GIF counts in hundredths of a second: rounding the times, not the durations, lets no error add up.
    times = [round(100 * index / fps) for index in range(len(frames) + 1)]
    settings = {"palette": bytes(palette.getpalette()), "duration": [10 * (b - a) for a, b in pairwise(times)]}
    settings |= {"plugin": "pillow", "extension": ".gif", "mode": "P", "loop": 0, "disposal": 1}
    path.write_bytes(iio.imwrite("<bytes>", np.stack(indices), **settings))


def save_image(path: Path | str, image: Image.Image | Tensor) -> None:
    """Write a Pillow image, or a tensor (3, H, W) in [-1, 1], as PNG."""
    pixels = _to_bytes(image[:, None])[0] if isinstance(image, Tensor) else np.asarray(image)
    with cli.replacing(path) as temporary:
        temporary.write_bytes(iio.imwrite("<bytes>", pixels, plugin="pillow", extension=".png"))


def bordered(frame: Tensor, given: bool) -> Tensor:
    """A frame (3, H, W) in [-1, 1] in a border of 2 pixels, whose colour says whether it was given."""
    colour = (torch.tensor(GIVEN if given else GENERATED) / 127.5 - 1)[:, None, None]
    return functional.pad(frame - colour, (2, 2, 2, 2)) + colour


def filmstrip(
    rows: Sequence[tuple[str, Tensor]], marks: Sequence[Sequence[bool] | None] = (), height: int = 96,
    columns: int = 12, numbers: Sequence[int] | None = None, heads: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """A contact sheet: one row a video, time from left to right.

    rows     (title, video (3, N, H, W) in [-1, 1]) of each row; the numbers of its frames are written below them.
    marks    for each row whether each of its N frames was given (True) or generated (False), told by colour and by a
             legend; None leaves a row unmarked, and without marks all rows are.
    height   of a frame, in pixels; columns: at most that many frames a row, chosen by `evenly`.
    numbers  of a row's frames, if they are not 0, 1, 2, ...
    heads    titles above as many equal parts of the columns.
    """
    font, gap, line = ImageFont.load_default(size=14), 6, 18
    top = gap + (gap + line) * bool(heads)
    marks = marks or [None] * len(rows)
    titles = [textwrap.fill(title, 22, max_lines=4, placeholder=" ...") for title, _ in rows]
    widths = [sum(font.getlength(run) for run, font in _runs(line)) for title in titles for line in title.split("\n")]
    margin = 3 * gap + round(max(widths))
    strips = [_strip(video, mark, height, columns, numbers) for (_, video), mark in zip(rows, marks, strict=True)]
    legend = [("given", GIVEN), ("generated", GENERATED)] if any(mark is not None for mark in marks) else []
    entry = 2 * line + round(font.getlength("generated"))
    across, pitch = max(len(legend) * entry, *(strip.width for strip in strips)), strips[0].height + gap
    sheet = Image.new("RGB", (margin + across, top + len(rows) * pitch + len(legend) // 2 * (line + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, head in enumerate(heads):
        left, right = (margin + strips[0].width * n // len(heads) for n in (number, number + 1))
        draw.text((left, gap), head, fill="black", font=font)
        draw.line((left, line + gap, right - 2 * gap, line + gap), fill="black")
    for row, (title, strip) in enumerate(zip(titles, strips, strict=True)):
        sheet.paste(strip, (margin, top + row * pitch))
        lines, below = title.split("\n"), draw.textbbox((0, 0), "A", font=font)[3] + 4
        for number, text in enumerate(lines):
            left, middle = gap, top + row * pitch + height // 2 + (number - (len(lines) - 1) / 2) * below
            for run, own in _runs(text):
                draw.text((left, middle), run, fill="black", font=own, anchor="lm")
                left += own.getlength(run)
    for number, (name, colour) in enumerate(legend):
        left, middle = margin + number * entry, sheet.height - gap - line // 2
        draw.rectangle((left, middle - 6, left + 12, middle + 6), fill=colour)
        draw.text((left + line, middle), name, fill="black", font=font, anchor="lm")
    return sheet


def _runs(line: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """A line of a title in pieces, each of words in one font."""
    runs = groupby(re.findall(r"\S+\s*", line), _font_file)
    fonts = ((words, ImageFont.truetype(file, 14) if file else ImageFont.load_default(14)) for file, words in runs)
    return [("".join(words), font) for words, font in fonts]


@cache
def _font_file(word: str) -> str | None:
    """None, Pillow's own font, for ASCII; else the first that has most of it: matplotlib's, a package's, the system's.

    The packages are those of requirements.txt: Noto Sans for Chinese, Japanese and Korean, and for other scripts.
    """
    if word.isascii():
        return None
    from matplotlib import font_manager, ft2font, get_data_path  # here, as captions rarely need it

    packages = filter(None, map(find_spec, ("manimgx_fonts", "noto_cjk_sans_otc")))
    folders = [Path(folder) for package in packages for folder in package.submodule_search_locations]
    files = [str(path) for folder in folders for path in sorted(folder.glob("*.tt*"))]
    files.insert(0, f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf")

    def missing(file: str) -> int:
        with suppress(OSError, RuntimeError):
            return len(set(map(ord, word.strip())) - ft2font.FT2Font(file).get_charmap().keys())
        return len(word)

    best = min(files, key=missing)
    return min([best, *font_manager.findSystemFonts()], key=missing) if missing(best) else best


def evenly(N: int, columns: int = 12) -> list[int]:
    """At most so many of N frames, evenly spaced, from the first to the last."""
    return np.linspace(0, N - 1, min(N, columns)).round().astype(int).tolist()


def _strip(video: Tensor, mark: Sequence[bool] | None, height: int, columns: int, numbers=None) -> Image.Image:
    """One row of a contact sheet: frames in borders, and their numbers below."""
    N, font = video.shape[1], ImageFont.load_default(size=12)
    width = max(1, round(height * video.shape[3] / video.shape[2]))
    chosen = evenly(N, columns)
    strip = Image.new("RGB", (len(chosen) * (width + 12), height + 24), "white")
    draw = ImageDraw.Draw(strip)
    for left, index, pixels in zip(range(0, strip.width, width + 12), chosen, _to_bytes(video[:, chosen]), strict=True):
        colour = (119, 119, 119) if mark is None else GIVEN if mark[index] else GENERATED
        if mark is not None:
            draw.rectangle((left, 0, left + width + 5, height + 5), fill=colour)
        strip.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS), (left + 3, 3))
        number = str(numbers[index] if numbers else index)
        draw.text((left + 3 + width // 2, height + 9), number, fill=colour, font=font, anchor="ma")
    return strip


def bucket(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size (W, H) for a clip of width x height: about the area of `size`, about the clip's shape, multiples of 16.

    Shapes go in steps of 4/3 from that of `size`: from 16:9 they are 4:3, 1:1, 3:4 and 9:16, or nearly so.
    """
    W, H = size
    steps = round(log((width / height) / (W / H)) / log(4 / 3))
    stretch = (4 / 3) ** (steps / 2)
    return 16 * max(1, round(W * stretch / 16)), 16 * max(1, round(H / stretch / 16))


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
    write_video(clip, video, fps)
    with cli.replacing(clip.with_suffix(".txt")) as beside:
        beside.write_text(caption + "\n", encoding="utf-8")
