"""VBench-I2V: videos under the benchmark's names, shared out by claims, and its scores as the paper's table."""

import json
import os
import shlex
import time
from pathlib import Path

import pytest
from small import SCENES, call, count, mistake, model_fixture  # noqa: F401

import sample
from paper import score, vbench
from support import media
from toy import world

PROMPTS = ("a red circle", "a red circle, camera pans left")
ARGUMENTS = ("--samples", 1, "--steps", 2, "--frames", 5, "--guidance", 1)
# The comments say what each becomes once it is normalised.
RESULTS = {
    "i2v_subject": [0.5731, [{"image_path": "a.jpg", "video_path": "a-0.mp4", "video_results": 0.5731}]],  # 0.5
    "i2v_background": [0.63075, []],  # 0.5
    "camera_motion": [0.0, {"pans_left": 0.0}, []],  # 0, of weight 0.1; VBench writes a third entry
    "subject_consistency": [1.0, []],  # 1
    "background_consistency": [0.2615, []],  # 0
    "motion_smoothness": [0.85175, []],  # 0.5
    "dynamic_degree": [1.0, []],  # 1, of weight 0.5
    "aesthetic_quality": [0.5, []],
    "imaging_quality": [0.75, []],
    "temporal_flickering": [0.9, []],  # VBench can measure it; the score leaves it out
}
BY_HAND = {"I2V": 1 / 2.1, "quality": (1 + 0 + 0.5 + 0.5 + 0.5 + 0.75) / 5.5}


@pytest.fixture
def suite(tmp_path) -> Path:
    """VBench's layout with two prompts, each of an image of its own, in two ratios."""
    folder = tmp_path / "VBench" / "vbench2_beta_i2v"
    entries = []
    for index, prompt in enumerate(PROMPTS):
        name = f"image {index}.png"
        for ratio in ("1-1", "16-9"):
            image = world.render(SCENES[index], 1)[:, 0]
            media.save_image(folder / "data" / "crop" / ratio / name, image)
        entries.append(
            {"prompt_en": prompt, "dimension": ["camera_motion"], "image_type": "abstract", "image_name": name}
        )
    (folder / "vbench2_i2v_full_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture
def made(monkeypatch) -> dict[str, int]:
    counts = {"videos": 0, "models": 0}
    count(monkeypatch, counts, sample.Experts, "walk", "videos")
    count(monkeypatch, counts, sample.checkpoint.Opened, "transformer", "models")
    return counts


def run(suite, model, out, *more):
    return call(vbench, suite, "--model", model, "--out", out, *ARGUMENTS, *more)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_videos_have_vbenchs_names_and_nothing_else_is_beside_them(suite, model, tmp_path, made):
    """VBench takes the suffix of all videos from whichever file of the folder it meets first."""
    result = run(suite, model, tmp_path / "out", "--samples", 2)
    assert result.status == 0, result.err
    videos = tmp_path / "out" / "1-1" / "videos"
    assert names(videos) == sorted(f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in (0, 1))
    assert not names(tmp_path / "out" / "1-1" / "claims")
    assert made == {"videos": 4, "models": 1}


def test_each_is_the_video_of_its_image_prompt_and_seed(suite, model, tmp_path):
    run(suite, model, tmp_path / "out", "--samples", 2, "--seed", 3)
    for number, prompt in enumerate(PROMPTS):
        alone = tmp_path / f"{number}.mp4"
        sample.sample(
            sample.SampleConfig(
                "i2v", str(model), prompt=prompt, image=(str(suite / f"data/crop/1-1/image {number}.png"),), noise="0",
                steps=2, frames=5, guidance=1.0, size="32x32", seed=3_000_009 + 5 * number + 1, out=str(alone),
            )
        )  # fmt: skip
        assert (tmp_path / "out" / "1-1" / "videos" / f"{prompt}-1.mp4").read_bytes() == alone.read_bytes()


def test_what_exists_stays_and_the_rest_is_made(suite, model, tmp_path, made):
    run(suite, model, tmp_path / "out")
    first, second = (tmp_path / "out" / "1-1" / "videos" / f"{prompt}-0.mp4" for prompt in PROMPTS)
    before = first.read_bytes(), second.read_bytes()
    first.write_bytes(b"mine")
    second.unlink()
    run(suite, model, tmp_path / "out")
    assert (first.read_bytes(), second.read_bytes()) == (b"mine", before[1])
    assert made == {"videos": 3, "models": 2}
    run(suite, model, tmp_path / "out")
    assert made["models"] == 2, "nothing is missing, so no model is loaded"


def test_what_another_machine_has_claimed_is_left_to_it(suite, model, tmp_path, made):
    claims = tmp_path / "out" / "1-1" / "claims"
    claims.mkdir(parents=True)
    (claims / f"{PROMPTS[0]}-0").touch()
    result = run(suite, model, tmp_path / "out")
    assert result.status == 0 and "claimed by other runs: 1" in result.err
    assert names(claims.parent / "videos") == [f"{PROMPTS[1]}-0.mp4"] and names(claims) == [f"{PROMPTS[0]}-0"]
    long_ago = time.time() - vbench.STALE - 60
    os.utime(claims / f"{PROMPTS[0]}-0", (long_ago, long_ago))
    result = run(suite, model, tmp_path / "out")
    assert "claimed" not in result.err
    assert len(names(claims.parent / "videos")) == 2 and names(claims) == []


def test_a_claim_is_held_and_fresh_while_its_video_is_made(suite, model, tmp_path, monkeypatch):
    claims, ages, walk = tmp_path / "out" / "1-1" / "claims", [], sample.Experts.walk

    def slow(self, *arguments):
        for claim in claims.iterdir():
            os.utime(claim, (0, 0))
        made = walk(self, *arguments)
        ages.extend(time.time() - claim.stat().st_mtime for claim in claims.iterdir())
        return made

    monkeypatch.setattr(sample.Experts, "walk", slow)
    run(suite, model, tmp_path / "out")
    assert len(ages) == 2 and max(ages) < vbench.STALE


def test_a_run_that_fails_gives_its_claims_back(suite, model, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Experts, "walk", stop)
    assert run(suite, model, tmp_path / "out").status == 130
    assert names(tmp_path / "out" / "1-1" / "claims") == []


def test_a_video_that_another_machine_has_finished_meanwhile_is_not_made_again(
    suite, model, tmp_path, monkeypatch, made
):
    videos = tmp_path / "out" / "1-1" / "videos"

    def late(path):
        videos.mkdir(exist_ok=True)
        (videos / f"{path.name}.mp4").write_bytes(b"theirs")
        return True

    monkeypatch.setattr(vbench, "claim", late)
    assert run(suite, model, tmp_path / "out").status == 0
    assert made["videos"] == 0 and {path.read_bytes() for path in videos.iterdir()} == {b"theirs"}


def test_only_one_gets_a_claim(tmp_path):
    assert vbench.claim(tmp_path / "a") and not vbench.claim(tmp_path / "a")


def test_videos_of_other_settings_are_not_mixed(suite, model, tmp_path):
    run(suite, model, tmp_path / "out")
    mistake(run(suite, model, tmp_path / "out", "--noise", "0.2"), "another noise", "--out")
    assert run(suite, model, tmp_path / "out", "--samples", 2).status == 0


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [
        (None, (832, 480), ("7-4", (832, 480))),
        (None, (1280, 720), ("16-9", (1280, 720))),
        (None, (64, 64), ("1-1", (64, 64))),
        (None, (768, 480), ("8-5", (768, 480))),
        ("16-9", (832, 480), ("16-9", (848, 480))),
        ("1-1", (832, 480), ("1-1", (624, 624))),
        ("16-9", (32, 32), ("16-9", (48, 32))),
    ],
)
def test_shapes(ratio, size, expected):
    assert vbench.shape(ratio, size) == expected


def test_another_ratio_has_its_own_folder_images_and_size(suite, model, tmp_path):
    run(suite, model, tmp_path / "out", "--ratio", "16-9")
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "16-9"
    assert media.read_video(folder / "videos" / f"{PROMPTS[0]}-0.mp4").shape[2:] == (32, 48)


def test_the_command_that_is_printed_is_vbenchs(suite, model, tmp_path):
    words = shlex.split(run(suite, model, tmp_path / "out").out)
    out = tmp_path / "out" / "1-1"
    assert words[:5] == ["cd", str(suite.parent), "&&", "python", "evaluate_i2v.py"]
    flags = dict(zip(words[5:11:2], words[6:11:2], strict=True))
    assert flags == {"--videos_path": str(out / "videos"), "--ratio": "1-1", "--output_path": str(out / "scores")}
    assert words[11] == "--dimension" and set(words[12:]) == set(score.DIMENSIONS) and len(words[12:]) == 9


def test_mistakes_end_in_a_sentence_and_leave_nothing(suite, model, tmp_path):
    out = tmp_path / "out"
    mistake(call(vbench), "both or neither", "DIR")
    mistake(run(tmp_path, model, out), str(tmp_path), "vbench2_beta_i2v")
    mistake(run(suite, model, out, "--steps", 0), "steps")
    mistake(run(suite, model, out, "--lora", tmp_path / "none.safetensors"), "none.safetensors")
    (suite / "data" / "crop" / "1-1" / "image 1.png").unlink()
    mistake(run(suite, model, out), "image 1.png", "download_data.sh")
    (suite / "vbench2_i2v_full_info.json").write_text("[]")
    mistake(run(suite, model, out), "a prompt", "download_data.sh")
    (suite / "vbench2_i2v_full_info.json").write_text('[{"prompt_en": "a"}]')
    mistake(run(suite, model, out), "image_name")
    assert not out.exists()


# The table.


def written(path: Path, results: dict) -> Path:
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


def row(text: str, name: str) -> dict[str, str]:
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines())
    return dict(zip(head[-12:], next(cells[1:] for cells in rows if cells[0] == name), strict=True))


def test_the_total_is_the_one_worked_out_by_hand(tmp_path):
    total, i2v, quality = score.means(score.read([written(tmp_path / "a.json", RESULTS)]))
    assert i2v == pytest.approx(BY_HAND["I2V"]) and quality == pytest.approx(BY_HAND["quality"])
    assert total == pytest.approx(0.5 * (1 / 2.1 + 3.25 / 5.5))


@pytest.mark.parametrize("name", score.PAPER)
def test_the_papers_means_follow_from_its_dimensions(name):
    """To what rounding to 0.01 leaves open: at most 0.013 of quality, whose scores are stretched up to 3.4 times."""
    (*means,) = score.PAPER[name][:3]
    dimensions = dict(zip(score.DIMENSIONS, (value / 100 for value in score.PAPER[name][3:]), strict=True))
    assert [100 * mean for mean in score.means(dimensions)] == pytest.approx(means, abs=0.013)


def test_the_table_has_the_papers_rows_and_ours(tmp_path):
    half = {name: RESULTS[name] for name in list(RESULTS)[:4]}
    rest = {name: RESULTS[name] for name in list(RESULTS)[4:]}
    files = written(tmp_path / "a.json", half), written(tmp_path / "b.json", rest)
    table = call(vbench, "--scores", *files).out
    ours = row(table, "ours")
    assert ours["total"] == "53.35" and ours["I2V"] == "47.62" and ours["quality"] == "59.09"
    assert ours["I2V-S"] == "57.31" and ours["CM"] == "0.00" and ours["IQ"] == "75.00"
    assert row(table, "Pusa, paper")["total"] == "87.32" and row(table, "Wan-I2V, paper")["I2V-B"] == "96.44"


def test_without_a_dimension_there_is_no_total(tmp_path):
    del (results := dict(RESULTS))["camera_motion"]
    ours = row(call(vbench, "--scores", written(tmp_path / "a.json", results)).out, "ours")
    assert (ours["total"], ours["I2V"], ours["CM"], ours["quality"]) == ("-", "-", "-", "59.09")


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([{"prompt_en": "a"}], ["_eval_results.json"]),  # the other file that VBench writes there
        ({"i2v_subject": 0.5}, ["_eval_results.json"]),
        ({"temporal_flickering": [0.5, []]}, ["i2v_subject"]),
        ({"imaging_quality": [68.3, []]}, ["imaging_quality 68.3", "[0, 1]"]),
        ({"imaging_quality": [float("nan"), []]}, ["imaging_quality nan"]),
        ({"imaging_quality": ["0.5", []]}, ["imaging_quality"]),
    ],
)
def test_files_that_are_no_results(tmp_path, results, words):
    mistake(call(vbench, "--scores", written(tmp_path / "a.json", results)), "a.json", *words)


def test_a_dimension_scored_twice_is_refused(tmp_path):
    files = [written(tmp_path / name, RESULTS) for name in ("a.json", "b.json")]
    mistake(call(vbench, "--scores", *files), "again in", "b.json")
