"""Clips and captions: captions are found, and what can be trained on is told from what cannot."""

import json

import numpy as np
import pytest
import torch
from test_media import moving

from support import cli, dataset, media

# Captions


def empty_media(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def found(folder) -> dict[str, str]:
    return {clip.path.relative_to(folder).as_posix(): clip.caption for clip in dataset.find_clips(folder)}


def test_captions_beside_the_clips(tmp_path):
    empty_media(tmp_path, "b.MP4", "a.gif", "train/c.png", "README.md", ".hidden.mp4")
    for name in ("a", "b", "train/c"):
        (tmp_path / f"{name}.txt").write_text(f" caption of\n{name}\n", encoding="utf-8")
    assert list(found(tmp_path).items()) == [
        ("a.gif", "caption of a"), ("b.MP4", "caption of b"), ("train/c.png", "caption of train/c")
    ]  # fmt: skip


def test_clips_in_subfolders_are_found_but_for_hidden_ones(tmp_path):
    for name in ("a/b/c.mp4", ".cache/d.mp4", "a/.hidden/e.mp4", "f.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).with_suffix(".txt").write_text(name)
        (tmp_path / name).touch()
    assert found(tmp_path) == {"a/b/c.mp4": "a/b/c.mp4", "f.mp4": "f.mp4"}


def test_captions_in_csv(tmp_path):
    empty_media(tmp_path, "train/b.mp4", "a.mp4", "unlisted.mp4")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\nb.mp4,"a red, round ball"\na.mp4,ein Öl\n', encoding="utf-8-sig"
    )
    assert list(found(tmp_path).items()) == [("a.mp4", "ein Öl"), ("train/b.mp4", "a red, round ball")]
    (tmp_path / "metadata.csv").write_text("prompt,video\nother keys,a.mp4\n")
    assert found(tmp_path) == {"a.mp4": "other keys"}


@pytest.mark.parametrize("name_key", ["file_name", "video_path", "video", "path"])
@pytest.mark.parametrize("text_key", ["text", "caption", "prompt"])
def test_captions_in_jsonl(tmp_path, name_key, text_key):
    empty_media(tmp_path, "a.mp4", "train/b.mp4")
    rows = [{name_key: "b.mp4", text_key: "two", "seed": 3}, {name_key: "a.mp4", text_key: "one"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,not this one\n")
    (tmp_path / "a.txt").write_text("nor this one")
    assert found(tmp_path) == {"a.mp4": "one", "train/b.mp4": "two"}


def test_a_listed_clip_may_have_its_caption_beside_it(tmp_path):
    empty_media(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text("file_name\na.mp4\n")
    (tmp_path / "a.txt").write_text("beside")
    assert found(tmp_path) == {"a.mp4": "beside"}


def test_caption_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder: expected one with clips"):
        dataset.find_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no clips"):
        dataset.find_clips(tmp_path)
    (tmp_path / "metadata.csv").write_text("clip,text\na.mp4,a ball\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2 names no clip: got clip, text, expected file_name"):
        dataset.find_clips(tmp_path)
    for line in ("{broken", "[1]", '{"text": "a ball"}'):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "one"}\n' + line)
        with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2 names no clip: got .*, expected file_name"):
            dataset.find_clips(tmp_path)


def test_absurd_rows_are_one_sentence(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4," + "x" * 200_000)
    with pytest.raises(ValueError, match=r"metadata\.csv, line \d cannot be read \(field larger than"):
        dataset.find_clips(tmp_path)
    for line in ("[" * 100_000, '{"file_name": 1' + "0" * 5000 + "}"):
        (tmp_path / "metadata.jsonl").write_text(line)
        with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1 names no clip") as error:
            dataset.find_clips(tmp_path)
        assert len(str(error.value)) < 500


def test_captions_line_by_line(tmp_path):
    empty_media(tmp_path, "a.mp4", "train/b.mp4")
    (tmp_path / "videos.txt").write_text("b.mp4\na.mp4\n")
    with pytest.raises(ValueError, match=r"has videos\.txt and no prompts\.txt"):
        dataset.find_clips(tmp_path)
    (tmp_path / "prompt.txt").write_text("two\none\n")
    assert found(tmp_path) == {"a.mp4": "one", "train/b.mp4": "two"}
    (tmp_path / "prompt.txt").write_text("two\n")
    with pytest.raises(ValueError, match=r"videos\.txt has 2 lines and prompt\.txt 1, expected as many"):
        dataset.find_clips(tmp_path)


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red  circle\n\n   \n a blue square\t\r\na red circle", encoding="utf-8")
    assert cli.read_prompts(path) == ["a red circle", "a blue square", "a red circle"]
    for content in ("", " \n\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"prompts.txt is empty, expected a prompt in each line"):
            cli.read_prompts(path)
    with pytest.raises(ValueError, match="cannot read .*none.txt"):
        cli.read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "names", [["a.txt"], ["metadata.csv"], ["metadata.jsonl"], ["videos.txt", "prompts.txt"], ["prompts.txt"]]
)
def test_text_in_another_encoding_is_told_with_its_file(names, tmp_path):
    """PowerShell writes UTF-16, Excel what Windows is set to."""
    (tmp_path / "a.mp4").touch()
    for name in names:
        (tmp_path / name).write_bytes("a.mp4\n".encode("utf-16"))
    with pytest.raises(ValueError, match=f"cannot read .*{names[0]} as UTF-8 .*expected a text file in that encoding"):
        cli.read_prompts(tmp_path / "prompts.txt") if names == ["prompts.txt"] else dataset.find_clips(tmp_path)


def test_a_clip_without_its_caption_is_missing(tmp_path):
    captions = ["a", "b", "c"]
    assert media.missing_clips(tmp_path / "new", captions) == [0, 1, 2]
    for number in (0, 2):
        media.write_clip(tmp_path, number, moving(5), 16, captions[number])
    assert media.missing_clips(tmp_path, captions) == [1]
    assert found(tmp_path) == {"00000.mp4": "a", "00002.mp4": "c"}
    (tmp_path / "00000.txt").unlink()
    (tmp_path / "00002.mp4").unlink()
    assert media.missing_clips(tmp_path, captions) == [0, 1, 2]
    media.write_clip(tmp_path, 1, moving(5), 16, "another")
    with pytest.raises(ValueError, match="00001.txt has the caption of another clip"):
        media.missing_clips(tmp_path, captions)


# What can be trained on


def test_survey_sorts_clips(tmp_path):
    media.write_video(tmp_path / "long.mp4", torch.zeros(3, 23, 32, 64), 16)
    media.write_video(tmp_path / "short.mp4", torch.zeros(3, 4, 32, 32), 16)
    (tmp_path / "broken.mp4").write_text("no video")
    clips = [dataset.Clip(tmp_path / f"{name}.mp4", "a ball") for name in ("broken", "gone", "long", "short")]
    clips.append(dataset.Clip(tmp_path / "long.mp4", ""))
    sources, skipped = dataset.survey(clips, dataset.Cut((64, 64), 5, 16))
    assert sources == [(clips[2], (80, 48), 4, 3)], "23 frames are four windows of 5, and 3 frames are left"
    assert dataset.survey(clips, dataset.Cut((64, 64), 5, 16, False))[0] == [(clips[2], (64, 64), 4, 3)]
    assert [(path.name, reason.partition(":")[0]) for path, reason in skipped] == [
        ("broken.mp4", skipped[0].reason.partition(":")[0]), ("gone.mp4", "no such file"), ("short.mp4", "too short"),
        ("long.mp4", "no caption"),
    ]  # fmt: skip
    assert skipped[0].reason.startswith("cannot be read as a video") and "4 frames at 16 fps" in skipped[2].reason


def test_when_no_clip_can_be_used_the_reason_of_most_comes_first(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "a.txt").write_text("a")
    for name, frames in (("b", 10), ("c", 11)):
        media.write_video(tmp_path / f"{name}.mp4", torch.zeros(3, frames, 32, 32), 16)
        (tmp_path / f"{name}.txt").write_text(name)
    words = r"^3 of 3 clips in .* cannot be used, 2 of them like b.mp4 \(too short: 10 frames at 16 fps, expected 33; "
    with pytest.raises(ValueError, match=words + r"--frames 9 takes it\); mend them"):
        dataset.look_through(tmp_path, dataset.Cut((32, 32), 33, 16), strict=False)
    assert len(dataset.survey(dataset.find_clips(tmp_path), dataset.Cut((32, 32), 9, 16))[0]) == 2, "as it says"


def test_what_is_used_and_what_is_left_over_is_told(tmp_path, capsys):
    for name, frames in (("a", 10), ("b", 9)):
        media.write_video(tmp_path / f"{name}.mp4", torch.zeros(3, frames, 32, 32), 16)
        (tmp_path / f"{name}.txt").write_text(name)
    dataset.look_through(tmp_path, dataset.Cut((32, 32), 9, 16), strict=False)
    first, size, validation = capsys.readouterr().out.splitlines()
    assert first == "2 of 2 clips, 2 windows of 9 frames at 16 fps; frames at the ends of clips that fill no window: 1"
    assert size == "  32x32: 2 windows" and validation.startswith("validation on 2 of the clips that are trained on")
    dataset.look_through(tmp_path, dataset.Cut((32, 32), 1, 16), strict=False)
    assert "no window" not in capsys.readouterr().out


@pytest.mark.parametrize(("clips", "apart"), [(1, 0), (79, 0), (80, 8), (159, 15), (160, 16), (4000, 16)])
def test_clips_are_set_apart_where_eight_can_be_spared(clips, apart):
    assert dataset.held_out(clips) == apart


@pytest.mark.parametrize("size", [(832, 480), (64, 64), (1280, 720)])
def test_buckets_keep_area_and_shape(size):
    assert media.bucket(*size, size) == size and media.bucket(2 * size[0], 2 * size[1], size) == size
    shapes = {media.bucket(w, h, size) for w in range(100, 2000, 90) for h in range(100, 2000, 90)}
    assert len(shapes) < 25 and all(W % 16 == H % 16 == 0 for W, H in shapes)
    if size == (64, 64):
        return
    for w, h in ((1920, 1080), (1080, 1920), (640, 480), (500, 500), (1000, 2000)):
        W, H = media.bucket(w, h, size)
        assert abs(W * H / (size[0] * size[1]) - 1) < 0.06
        assert abs(np.log((W / H) / (w / h))) < np.log(4 / 3) / 2 + 0.05


def test_batches_are_of_one_bucket_and_show_all_equally_often():
    buckets = [[0, 1, 2, 3, 4], [5, 6], [7]]
    batches = [dataset.batch_of(step, 3, buckets, seed=1) for step in range(80)]
    assert all(any(set(batch) <= set(members) for members in buckets) for batch in batches)
    for epoch in range(10):
        shown = [window for batch in batches[8 * epoch : 8 * epoch + 8] for window in batch]
        assert {shown.count(window) for window in range(8)} == {3}
    assert len({str(batches[8 * epoch : 8 * epoch + 8]) for epoch in range(10)}) == 10, "epochs in new orders"
    assert dataset.batch_of(37, 3, buckets, seed=1) == batches[37]
    assert dataset.batch_of(37, 3, buckets, seed=2) != batches[37]
    assert len({tuple(dataset.batch_of(step, 6, [list(range(6))], 0)) for step in range(9)}) > 5, "batches differ"
