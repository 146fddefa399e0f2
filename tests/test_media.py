"""Clips in and out: what is written is what is read, time is kept, captions are found."""

import struct
import wave
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from support import media


def moving(N: int = 9, H: int = 32, W: int = 32) -> torch.Tensor:
    """A soft bright disc that crosses a dark frame, (3, N, H, W): smooth, so that 4:2:0 keeps its colours."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    centre = torch.linspace(8, W - 8, N)[:, None, None]
    blob = torch.exp(-((x - centre) ** 2 + (y - H / 2) ** 2) / 40)  # (N, H, W)
    return torch.stack((1.6 * blob - 0.8, 0.9 * blob - 0.6, -0.8 * blob))


def counting(N: int) -> torch.Tensor:
    """Frames whose grey level tells their own index, 6 levels of 255 apart."""
    return (-0.9 + torch.arange(N) * 12 / 255)[None, :, None, None].expand(3, N, 32, 32)


def indices(video: torch.Tensor) -> list[int]:
    return ((video.mean((0, 2, 3)) + 0.9) * 255 / 12).round().int().tolist()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (10 * torch.log10(4 / (a - b).pow(2).mean())).item()


def written(path, fps=16, N=9):
    media.write_video(path, moving(N), fps)
    return path


# Videos and images


@pytest.mark.parametrize("suffix, bound", [(".mp4", 36), (".gif", 34)])
def test_round_trip(tmp_path, suffix, bound):
    video, path = moving(), tmp_path / f"a{suffix}"
    media.write_video(path, video, 20)
    read = media.read_video(path)
    assert read.shape == video.shape and read.dtype == torch.float32 and read.abs().max() <= 1
    assert psnr(read, video) > bound
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([index / 20 for index in range(9)])
    before = path.read_bytes()
    media.write_video(path, video, 20)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_writing_and_reading_again_does_not_darken(tmp_path):
    media.write_video(tmp_path / "a.mp4", counting(16), 16)
    assert (media.read_video(tmp_path / "a.mp4") - counting(16)).mean().abs() < 0.25 / 127.5


def test_gif_keeps_the_mean_rate_and_loops(tmp_path):
    media.write_video(tmp_path / "a.gif", counting(16), 16)  # 6.25 hundredths of a second do not fit the format
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
    assert sum(durations) == 1000 and set(durations) == {60, 70}
    assert indices(media.read_video(tmp_path / "a.gif", fps=16)) == list(range(16))


def test_still_gif_keeps_its_length(tmp_path):
    media.write_video(tmp_path / "a.gif", torch.zeros(3, 8, 16, 16), 16)
    assert media.read_video(tmp_path / "a.gif", fps=16).shape[1] == 8


def test_odd_sizes_are_padded(tmp_path):
    video = moving(3, 31, 33)
    media.write_video(tmp_path / "a.mp4", video, 8)
    read = media.read_video(tmp_path / "a.mp4")
    assert read.shape == (3, 3, 32, 34) and psnr(read[..., :31, :33], video) > 36


def test_resampling_takes_the_nearest_frame(tmp_path):
    media.write_video(tmp_path / "fast.mp4", counting(13), 24)
    media.write_video(tmp_path / "slow.mp4", counting(9), 8)
    read = media.read_video
    # 24 to 16: targets are 1.5 source frames apart, and of two equally near frames the earlier is taken.
    assert indices(read(tmp_path / "fast.mp4", fps=16)) == [0, 1, 3, 4, 6, 7, 9, 10, 12]
    assert indices(read(tmp_path / "slow.mp4", fps=16)) == [index // 2 for index in range(18)]
    assert indices(read(tmp_path / "fast.mp4")) == list(range(13))
    assert indices(read(tmp_path / "slow.mp4", fps=16, first=13, last=5)) == [4, 4, 5, 5, 6]
    assert indices(read(tmp_path / "slow.mp4", first=4, last=2)) == [2, 3]


def test_uneven_timestamps_are_respected(tmp_path):
    images = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 100, 200)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 400, 100])
    levels = (media.read_video(tmp_path / "a.gif", fps=10).mean((0, 2, 3)) + 1) * 127.5
    assert levels.round().int().tolist() == [0, 100, 100, 100, 200, 200]  # they start at 0, 0.1 and 0.5 s


def test_time_counts_from_the_first_frame(tmp_path):
    with av.open(str(tmp_path / "late.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        for index, pixels in enumerate(media._to_bytes(counting(8))):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index + 24, Fraction(1, 8)  # as a recording that starts at 3 s
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert indices(media.read_video(tmp_path / "late.mkv", fps=4, first=3)) == [0, 2, 4]


def test_reading_stops_once_there_are_enough_frames(tmp_path):
    path = written(tmp_path / "a.mkv.mp4", N=64)
    content = path.read_bytes()
    start = content.index(b"mdat")
    path.write_bytes(content[: start + (len(content) - start) // 2])  # the second half is lost
    assert media.read_video(path, first=4).shape[1] == 4
    assert media.read_image(f"{path}@4").shape == (3, 32, 32)


def test_first_and_last_frames_alone(tmp_path):
    media.write_video(tmp_path / "a.mp4", counting(16), 16)
    for fps in (16, 24, 8):
        video = media.read_video(tmp_path / "a.mp4", fps=fps)
        N = video.shape[1]
        for first, last in ((5, None), (None, 5), (7, 3), (1, 1), (99, 99)):
            part = media.read_video(tmp_path / "a.mp4", fps=fps, first=first, last=last)
            assert torch.equal(part, video[:, : first or N][:, -(last or N) :])
    whole = media.read_video(tmp_path / "a.mp4")
    assert torch.equal(media.read_image(f"{tmp_path / 'a.mp4'}@11"), whole[:, 11])
    with pytest.raises(ValueError, match=r"a\.mp4 has frames 0 to 15, and not 16"):
        media.read_image(f"{tmp_path / 'a.mp4'}@16")


def test_a_sideways_phone_clip_is_read_upright(tmp_path):
    video = torch.full((3, 3, 16, 32), -0.9)
    video[..., :16] = 0.9  # bright on the left
    media.write_video(tmp_path / "a.mp4", video, 8)
    content = (tmp_path / "a.mp4").read_bytes()
    one = 1 << 16
    matrix = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # x to the bottom, y to the left: clockwise
    head, track, rest = content.partition(b"tkhd")
    assert rest.count(matrix) == 1
    (tmp_path / "a.mp4").write_bytes(head + track + rest.replace(matrix, turned))
    read = media.read_video(tmp_path / "a.mp4")
    assert read.shape == (3, 3, 32, 16)
    assert read[..., :14, :].mean() > 0.8 and read[..., 18:, :].mean() < -0.8


def test_images(tmp_path):
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, :6] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = media.read_image(tmp_path / "a.png")
    assert image.shape == (3, 12, 8) and image[:, :6].eq(1).all() and image[:, 6:].eq(-1).all()
    assert media.read_video(tmp_path / "a.png", size=(4, 4)).shape == (3, 1, 4, 4)
    Image.new("LA", (4, 4), (255, 255)).save(tmp_path / "grey.png")
    assert media.read_image(tmp_path / "grey.png").eq(1).all()
    media.save_image(tmp_path / "sub" / "b.png", image)
    assert media.read_image(tmp_path / "sub" / "b.png").equal(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_and_mirrored_in_every_mode(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)).convert(mode)
    original.save(tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png")).convert("RGB")
    assert (media._to_bytes(media.read_image(tmp_path / "a.png")[:, None])[0] == np.asarray(upright)).all()


def test_resize_crop(tmp_path):
    video = moving(2, 32, 48)
    assert media.resize_crop(video, (48, 32)) is video
    assert media.resize_crop(video, (32, 32)).equal(video[..., 8:40])  # covers already: a crop alone, in the centre
    assert media.resize_crop(video, (24, 8)).shape == (3, 2, 8, 24)
    grid = torch.arange(75)
    board = ((grid[:, None] + grid) % 2 * 2.0 - 1).expand(3, 1, 75, 75)
    assert board[..., 2::5, 2::5].abs().min() == 1  # the pixels under the centres of the new ones: black and white
    assert media.resize_crop(board, (15, 15))[..., 2:-2, 2:-2].abs().max() < 0.02  # antialiased: grey
    edge = (grid >= 32).float() * 2 - 1
    assert media.resize_crop(edge.expand(3, 1, 75, 75), (150, 150)).abs().max() <= 1
    media.write_video(tmp_path / "a.mp4", video, 8)
    assert media.read_video(tmp_path / "a.mp4", size=(16, 24)).shape == (3, 2, 24, 16)


def test_unreadable_files_and_impossible_wishes(tmp_path):
    (tmp_path / "broken.mp4").write_text("not a video at all")
    (tmp_path / "broken.png").write_text("not an image at all")
    for name in ("broken.mp4", "missing.mp4"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a video"):
            media.read_video(tmp_path / name)
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    for read in (media.read_video, lambda path: media.read_image(f"{path}@0"), lambda path: media.probe(path, 16)):
        with pytest.raises(ValueError, match=r"sound\.mp4 cannot be read as a video \(damaged, or without pictures\)"):
            read(tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image \(damaged"):
        media.read_image(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"missing\.png cannot be read as an image \(no such file\)"):
        media.read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"cannot write a\.webm: expected a name that ends in \.mp4 or \.gif"):
        media.write_video(tmp_path / "a.webm", moving(), 8)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("source_fps, N", [(16, 33), (24, 50), (25, 9), (30, 31), (8, 17), (15, 2)])
def test_probe_counts_the_frames_that_are_read(tmp_path, source_fps, N, suffix):
    media.write_video(tmp_path / f"a{suffix}", torch.zeros(3, N, 16, 32), source_fps)
    for fps in (16, 12.5, 60):
        expected = media.read_video(tmp_path / f"a{suffix}", fps=fps).shape[1]
        assert media.probe(tmp_path / f"a{suffix}", fps) == (32, 16, expected)


def test_probe_of_images_and_of_what_is_none(tmp_path):
    media.save_image(tmp_path / "a.png", torch.zeros(3, 16, 32))
    assert media.probe(tmp_path / "a.png", 16) == (32, 16, 1)
    (tmp_path / "b.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        media.probe(tmp_path / "b.mp4", 16)


def test_windows_follow_one_another(tmp_path):
    media.write_video(tmp_path / "a.mp4", counting(23), 16)
    windows = [indices(window) for window in media.read_windows(tmp_path / "a.mp4", (32, 32), 16, 5)]
    assert windows == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]
    assert list(media.read_windows(tmp_path / "a.mp4", (32, 32), 16, 25)) == []


def test_stretches_of_a_clip(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, counting(16), 16)
    assert indices(media.read_video(f"{path}@3-6")) == [3, 4, 5, 6]
    assert indices(media.read_video(f"{path}@3-6", fps=8)) == [6, 8, 10, 12], "counted at the rate asked for"
    assert indices(media.read_video(f"{path}@3-9", first=4, last=2)) == [5, 6]
    assert indices(media.read_video(media.part(media.part(str(path), 3, 9), 2, 3))) == [5, 6, 7]
    counts = [media.count(f"{path}{part}", fps) for part in ("", "@3-6", "@12-40") for fps in (16, 8)]
    assert counts == [16, 8, 4, 4, 4, 0]
    assert media.stretch_of(path) == (str(path), 0, None) and media.stretch_of("a@1.mp4") == ("a@1.mp4", 0, None)
    with pytest.raises(ValueError, match="ends before those frames"):
        media.read_video(f"{path}@16-20")
    with pytest.raises(ValueError, match="got the frames 6 to 3 of .*, expected the first before the last"):
        media.read_video(f"{path}@6-3")


def test_a_video_that_changes_its_size(tmp_path):
    parts = b""
    for width, height in ((32, 32), (48, 64)):
        with av.open(str(tmp_path / "part.mpg"), "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for _ in range(5):
                pixels = np.zeros((height, width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        parts += (tmp_path / "part.mpg").read_bytes()
    (tmp_path / "a.mpg").write_bytes(parts)
    assert media.read_video(tmp_path / "a.mpg", size=(32, 32)).shape[2:] == (32, 32)
    with pytest.raises(ValueError, match=r"a\.mpg has frames of several sizes, expected frames of one size"):
        media.read_video(tmp_path / "a.mpg")


def test_a_title_need_not_be_utf_8(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["title"] = "caption of the clip"
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    assert b"caption of the clip" in content
    (tmp_path / "a.mp4").write_bytes(content.replace(b"caption of", b"\xff\xfe\xc3\x28aa of"))
    assert media.read_video(tmp_path / "a.mp4").shape == (3, 1, 32, 32)


def test_an_image_whose_text_is_a_bomb(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content, text = (tmp_path / "a.png").read_bytes(), b"a\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        media.read_image(tmp_path / "a.png")


def test_a_name_is_no_protocol_of_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:1.mp4", "concat:a.mp4"):
        media.write_video(name, moving(), 8)
        assert media.read_video(name).shape == (3, 9, 32, 32) and (tmp_path / name).stat().st_size > 500


# Filmstrips


def test_filmstrip(tmp_path):
    black = torch.full((3, 33, 32, 48), -1.0)
    plain = media.filmstrip([("a row", black)])
    marked = media.filmstrip([("a row", black), ("another", black[:, :5])], marks=[[i < 17 for i in range(33)], None])
    assert marked.height > 2 * plain.height - 30 and plain.height > 96
    assert 12 * 144 < plain.width < 12 * 144 + 300  # twelve frames of 144 × 96
    middle = np.asarray(marked)[6 + 48]  # a line of pixels through the first row of frames
    given = np.flatnonzero((middle == media.GIVEN).all(-1))
    generated = np.flatnonzero((middle == media.GENERATED).all(-1))
    assert len(given) == len(generated) == 6 * 2 * 3  # six frames, left and right, three pixels wide
    assert given.max() < generated.min()
    assert not any((np.asarray(plain) == colour).all(-1).any() for colour in (media.GIVEN, media.GENERATED))


@pytest.mark.parametrize("caption", ["кошка", "一只猫", "고양이 ねこ", "قطة", "แมว", "बिल्ली", "חתול", "émeute", "🐈🐕"])
def test_a_caption_in_any_script_is_drawn(caption):
    """Not as boxes: two letters that a font lacks look alike, those that it has do not."""
    (ascii_run, plain), (run, font) = media._runs(f"t2v: {caption}")
    assert (ascii_run, run) == ("t2v: ", caption) and plain.getname() == media.ImageFont.load_default(14).getname()
    missing = bytes(font.getmask("\U0010ffff"))
    letters = {bytes(font.getmask(letter)) for letter in caption.replace(" ", "")}
    assert missing not in letters and len(letters) > 1
    black = torch.full((3, 5, 32, 32), -1.0)
    titled, other = (np.asarray(media.filmstrip([(f"t2v: {text}", black)])) for text in (caption, caption[::-1]))
    assert titled.shape != other.shape or (titled != other).any()


def test_heads_stand_above_their_part_of_the_columns():
    black = torch.full((3, 6, 32, 48), -1.0)
    plain, headed = (np.asarray(media.filmstrip([("a", black)], heads=heads)) for heads in ((), ("one", "two", "")))
    top = len(headed) - len(plain)
    assert top > 14 and (headed[top + 6 :] == plain[6:]).all()
    ink = np.flatnonzero((headed[: top + 6] < 128).any((0, 2)))
    margin = headed.shape[1] - 6 * (144 + 12)
    parts = [ink[(ink - margin) // (2 * (144 + 12)) == part] for part in range(3)]
    assert len(ink) == sum(map(len, parts)) and all(part[-1] - part[0] > 200 for part in parts), "a line below each"
    texts = [(headed[:18, part[0] : part[-1]] < 128).sum() for part in parts]
    assert texts[0] > 50 and texts[1] > 50 and texts[2] == 0


def test_filmstrip_shows_first_and_last():
    video = counting(16)
    strip = np.asarray(media.filmstrip([("", video)], columns=4))
    levels = [((video[0, index, 0, 0] + 1) * 127.5).round().item() for index in (0, 5, 10, 15)]
    line = strip[6 + 48, :, 0].tolist()
    assert [line.count(level) for level in levels] == [96] * 4
    assert [line.index(level) for level in levels] == sorted(line.index(level) for level in levels)
