"""The page of `python -m play`: that its command makes its video, that runs take turns, and what a person can press.

The tests marked slow press the buttons of the real page in a real browser; they need

    pip install -r requirements-play.txt playwright        and a Chromium: apt-get install chromium, or the like
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import call, clips_fixture, mistake, model_fixture  # noqa: F401  fixtures

import sample
import tasks
from play import __main__ as play
from play import runs
from support import cli, media, plots, records

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def studio(model, clips, tmp_path, monkeypatch) -> runs.Studio:
    monkeypatch.chdir(tmp_path)
    return runs.Studio(sample.SampleConfig(model=str(model)))


def chosen(studio: runs.Studio, clips: Path, task: str, **changed) -> runs.Choices:
    """A task as the page presets it, on the first two clips."""
    files, start = tuple(str(clips / f"0000{i}.mp4") for i in range(2)), studio.start
    choices = runs.Choices(
        task, "a red circle", files, changed.get("pictures", {}), (), (), start.steps, start.shift,
        start.guidance, start.history_guidance, 0, tuple(strength for _, _, strength in studio.loras),
    )  # fmt: skip
    plan = studio.plan(choices)
    return replace(choices, **{"m": tuple(plan.m.tolist()), "d": tuple(plan.d.tolist()), **changed})


def told(line: str) -> sample.SampleConfig:
    """What `sample.py` understands of a line."""
    words = shlex.split(line)
    assert words[:2] == ["python", "sample.py"]
    return cli.parse(sample.SampleConfig, sample.__doc__, words[2:])


def written(taus: torch.Tensor) -> str:
    return "\n".join(" ".join(map(str, row)) for row in taus.tolist())


def walked(config: sample.SampleConfig, studio: runs.Studio) -> torch.Tensor:
    return sample.lay_out(config, studio.opened.preset.frames).taus[0]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_preset_needs_no_table_and_its_line_tells_sample_the_same(task, studio, clips):
    choices = chosen(studio, clips, task)
    config = studio.settings(choices)
    assert config.tau is None and torch.equal(walked(config, studio), choices.table)
    line = studio.command(config)
    assert sample.resolve(told(line), studio.opened) == config
    assert "--steps" not in line and "--lora" not in line and "--device" not in line, "what is usual is left out"


def test_what_was_changed_is_in_the_line(studio, clips):
    choices = chosen(studio, clips, "i2v", steps=2, shift=1.5, guidance=1.0, history=2.0, seed=3, strengths=(0.5,))
    config = studio.settings(choices)
    assert sample.resolve(told(studio.command(config)), studio.opened) == config
    assert (config.steps, config.shift, config.guidance, config.history_guidance, config.seed) == (2, 1.5, 1.0, 2.0, 3)
    assert config.context_noise == studio.start.context_noise == 0
    config = studio.settings(replace(choices, context=0.3))
    assert config.context_noise == 0.3 and "--context-noise 0.3" in studio.command(config)
    assert sample.lora.parse_entry(config.lora[0])[2] == 0.5
    off = studio.settings(replace(choices, strengths=(0.0,)))
    assert "--no-lora" in studio.command(off) and off.lora == ()


def test_multipliers_of_conditions_are_noise_and_any_other_table_is_a_file(studio, clips):
    m = (0.0, 0.3, 0.4, 0.25, 1.0, 1.0, 1.0)
    noisy = studio.settings(chosen(studio, clips, "extend", m=m))
    assert noisy.noise == "0,0.3,0.4,0.25" and noisy.tau is None
    strong = studio.settings(chosen(studio, clips, "restyle", m=(0.4,) * 7))
    assert strong.strength == 0.4 and strong.tau is None
    choices = chosen(studio, clips, "i2v", d=(0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
    late = studio.settings(choices)
    assert len(choices.table) == 7, "three steps for each frame, of a run that takes twice as long"
    assert torch.equal(walked(late, studio), choices.table) and Path(late.tau).is_file()
    line = studio.command(late)
    assert "--tau" in line and sample.resolve(told(line), studio.opened) == late
    painted = torch.rand(5, 7)
    assert torch.equal(walked(studio.settings(replace(choices, painted=painted)), studio), painted), "to the bit"


def test_pictures_stand_where_they_were_put_and_the_clip_fills_the_others(studio, clips, tmp_path):
    for name in ("a.png", "b.png"):
        media.save_image(tmp_path / name, torch.zeros(3, 32, 32))
    for task, pictures, image in (
        ("i2v", {0: "a.png"}, ("a.png",)),
        ("start-end", {6: "a.png"}, (f"{clips}/00000.mp4@0", "a.png")),
        ("keyframes", {2: "a.png", 5: "b.png"}, ("a.png", "b.png")),
        ("keyframes", {}, tuple(f"{clips}/00000.mp4@{n}" for n in (0, 12, 24))),
        ("loop", {}, (f"{clips}/00000.mp4@0",)),
    ):
        assert studio.settings(chosen(studio, clips, task, pictures=pictures)).image == image, task
    assert studio.settings(chosen(studio, clips, "keyframes", pictures={2: "a.png", 5: "b.png"})).at == "2,5"
    shown = studio.thumbnails(chosen(studio, clips, "i2v", pictures={0: "a.png"}))
    assert list(shown) == [0] and shown[0].startswith("data:image/png;base64,")
    assert sorted(studio.thumbnails(chosen(studio, clips, "extend"))) == [0, 1, 2, 3]
    for task in ("i2v", "extend"):
        with pytest.raises(ValueError, match="clip"):
            studio.settings(replace(chosen(studio, clips, task), clips=("", "")))
    with pytest.raises(ValueError, match="no number as m of frame 1"):
        studio.settings(chosen(studio, clips, "t2v", m=(1.0, None, *[1.0] * 5)))


def test_a_run_shows_every_step_and_makes_the_video_of_its_line(studio, clips, tmp_path):
    config = studio.settings(chosen(studio, clips, "i2v", d=(0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)))
    moments = list(studio.run(config, replace(config, lora=(), no_lora=True)))
    steps = [moment for moment in moments if moment.words.startswith("Denoising")]
    first, second = (moment.files for moment in moments if moment.files)
    assert len(steps) == 2 * 6 and all(moment.video.shape == (3, 25, 32, 32) for moment in steps)
    assert steps[0].given == [True] + [False] * 24
    line = [*shlex.split(studio.command(config))[2:], "--out", "again.mp4"]
    assert call(sample, *line).status == 0
    assert Path("again.mp4").read_bytes() == first["video"].read_bytes() != second["video"].read_bytes()


def test_runs_take_turns_and_say_so_and_one_that_is_left_ends(studio, clips):
    config = studio.settings(chosen(studio, clips, "t2v", steps=200))
    first, second = studio.run(config), studio.run(replace(config, steps=1))
    assert next(first).words == "Reading the model."
    assert "number 2 in line" in next(second).words
    assert next(first).words == "Denoising: step 1 of 200."
    first.close()
    assert list(second)[-1].files and studio.line == []
    assert len(list(Path("outputs").glob("*.mp4"))) == 1


def test_a_mistake_of_a_run_comes_out_of_it(studio, clips):
    config = studio.settings(chosen(studio, clips, "i2v"))
    with pytest.raises(ValueError, match="no such file"):
        list(studio.run(replace(config, image=("missing.png",))))
    assert studio.line == []


def test_what_is_unusual_about_a_table_is_said():
    taus = torch.tensor([[1.0, 1.0, 0.5], [0.4, 0.6, 0.2], [0.5, 0.0, 0.0], [0.1, 0.0, 0.0]])
    said = runs.warnings(taus, [])
    assert len(said) == 3 and "Frame 0 rises from 0.40 to 0.50 at step 1" in said[0]
    assert "Frame 0 ends at 0.10" in said[1] and "Frame 2 begins at 0.50" in said[2]
    assert len(runs.warnings(taus, [2])) == 2 and not runs.warnings(torch.tensor([[1.0, 0.2], [0.0, 0.0]]), [1])


def test_a_table_is_read_to_the_bit_from_numbers_and_from_what_a_dry_run_prints():
    taus = tasks.tau_schedule(torch.rand(9), 10, 3.0)
    assert torch.equal(records.read_table(written(taus), 9), taus)
    printed = records.read_table(plots.table(taus), 9)
    assert printed.shape == taus.shape and (printed - taus).abs().max() <= 0.0051
    assert torch.equal(records.read_table("1 1\n\n0.5, 0\n", 2), torch.tensor([[1.0, 1.0], [0.5, 0.0]]))
    for text, words in (
        ("", "0 lines"), ("1 1", "1 lines of 2"), ("1 1\n0", "2 lines of 1 or 2 numbers"), ("1 x\n0 0", "2 lines"),
        ("1 1\n0 1.5", "2 lines"), ("1 nan\n0 0", "2 lines"), ("1 1 1\n0 0 0", "of 3 numbers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            records.read_table(text, 2)


def test_sample_walks_a_table_of_its_own_and_says_what_is_wrong_with_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual, mine = ["--model", model, "--task", "t2v"], tmp_path / "mine.csv"
    taus = tasks.tau_schedule(torch.ones(7), 3, 3.0)
    mine.write_text(written(taus))
    for name, more in (("usual", []), ("mine", ["--tau", mine]), ("other", ["--tau", "other.csv"])):
        Path("other.csv").write_text(written(taus[[0, 2, 3]]))
        result = call(sample, *usual, *more, "--out", f"{name}.mp4")
        assert result.status == 0
    assert Path("usual.mp4").read_bytes() == Path("mine.mp4").read_bytes() != Path("other.mp4").read_bytes()
    record = json.loads(Path("other.json").read_text())["settings"]
    assert record["steps"] is record["shift"] is None and "levels of other.csv, guidance" in result.err
    again = call(sample, "--from-json", "other.json", "--out", "again.mp4")
    assert again.status == 0 and Path("again.mp4").read_bytes() == Path("other.mp4").read_bytes()
    mistake(call(sample, *usual, "--tau", mine, "--frames", 13), "of 7 numbers", "each of 4 numbers")
    mistake(call(sample, *usual, "--tau", "missing.csv"), "missing.csv")
    mistake(call(sample, *usual, "--tau", model / "lora.safetensors"), "noise levels")
    mistake(call(sample, "--model", model, "--task", "stream", "--tau", mine, "--frames", 41), "--tau", "windows")


def test_without_gradio_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    mistake(call(play), "requirements-play.txt")


# The page itself, in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if BROWSER else ["a Chromium (apt-get install chromium)"]
pressed = pytest.mark.skipif(bool(MISSING), reason=f"to press the page's buttons, install {', '.join(MISSING)}")
PATIENCE = 120_000  # milliseconds for whatever is waited for: two cores may be busy


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder that looks like this one, so that what is written is not written here."""
    folder = tmp_path_factory.mktemp("home")
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in ("outputs", "runs", "data"):
            (folder / path.name).symlink_to(path)
    return folder


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}


@pytest.fixture(scope="module")
def address(home):
    """The page, served."""
    command = [sys.executable, "-u", "-m", "play", "--device", "cpu"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=home, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        for _ in range(600):
            found = re.search(r"http://\S+", (home / "log").read_text())
            if found or server.poll() is not None:
                break
            time.sleep(0.2)
        assert found, (home / "log").read_text()
        yield found[0]
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened_page(browser, address: str, width: int = 1280):
    """A tab of its own; nothing may be fetched from elsewhere, and no script may fail."""
    context, elsewhere, broken = browser.new_context(viewport={"width": width, "height": 900}), [], []
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    tab.on("request", lambda request: request.url.startswith(("http", "ws")) and address not in request.url
           and elsewhere.append(request.url))  # fmt: skip
    tab.on("pageerror", lambda error: broken.append(str(error)))
    try:
        tab.goto(address)
        tab.wait_for_selector(".taus td")
        yield tab
    finally:
        context.close()
    assert not elsewhere and not broken


def levels(tab, row: int = 0) -> list[str]:
    return tab.eval_on_selector_all(f".taus td[data-k='{row}']", "cells => cells.map(cell => cell.textContent)")


def until(tab, script: str, *argument) -> None:
    tab.wait_for_function(script, arg=argument[0] if argument else None)


def said(tab, selector: str, words: str) -> None:
    try:
        until(tab, "([at, words]) => document.querySelector(at)?.innerText.includes(words)", [selector, words])
    except Exception as error:
        raise AssertionError(f"{selector} says {tab.inner_text(selector)!r}, and not {words!r}") from error


def choose(tab, task: str) -> None:
    tab.locator("#task label", has_text=re.compile(rf"^\s*{task}\s*$")).click()


def fill(tab, selector: str, value) -> None:
    tab.fill(selector, str(value))
    tab.locator(selector).press("Tab")


def run(tab, steps: int = 2) -> str:
    """Press Run and wait for the video; returns the line that makes it too."""
    fill(tab, "#steps input[type=number]", steps)
    until(tab, "steps => document.querySelectorAll('.taus tr').length >= steps + 1", steps)
    tab.click("#run")
    said(tab, "#status", "Denoising")
    said(tab, "#status", "Done.")
    return tab.input_value("#line textarea")


def same_video(home: Path, line: str) -> bool:
    """Whether the line makes the newest video that the page made."""
    newest = max((home / "outputs").glob("*.mp4"), key=lambda path: path.stat().st_mtime)
    words = [sys.executable, *shlex.split(line)[1:], "--out", "again.mp4", "--overwrite"]
    subprocess.run(words, cwd=home, check=True, env=ENVIRONMENT, capture_output=True)
    return (home / "again.mp4").read_bytes() == newest.read_bytes()


@pressed
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_every_preset_fills_the_table(browser, address, width):
    with opened_page(browser, address, width) as tab:
        for name in (*tasks.TASKS, "t2v"):
            choose(tab, name)
            plan = tasks.plan(
                name, 9, videos=1 if name == "stream" else None, at=(0, 4, 8) if name == "keyframes" else (),
                noise=(0.0,) if tasks.TASKS[name].noise else None, stretch=(8, 20) if name == "retake" else None,
            )  # fmt: skip
            filled = {i for slot in plan.slots for i in slot.positions}
            marks = "".join(str(int(i in filled)) for i in range(9))
            row = tasks.tau_schedule(plan.m, 10, 3.0, plan.d)[0]
            wanted = [f"{tau:.2f}".lstrip("0") if tau else "0" for tau in row.tolist()]
            until(tab, """([marks, wanted]) => {
                const texts = (at) => [...document.querySelectorAll(at)];
                return texts('.pictures td').map((cell) => +cell.classList.contains('given')).join('') === marks
                    && texts(".taus td[data-k='0']").map((cell) => cell.textContent).join() === wanted;
            }""", [marks, ",".join(wanted)])  # fmt: skip
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"


@pressed
@pytest.mark.slow
def test_the_table_changes_as_one_types_and_a_mistake_is_a_sentence(browser, address):
    with opened_page(browser, address) as tab:
        tab.fill("[aria-label='multiplier of frame 3']", "0.25")
        until(tab, "() => document.querySelector(\".taus td[data-k='0'][data-i='3']\").textContent === '.25'")
        tab.fill("[aria-label='delay of frame 8']", "0.5")
        until(tab, "() => document.querySelectorAll('.taus tr').length === 21")
        said(tab, "#note", "Frame 3 begins at 0.25, but nothing is given there")
        tab.fill("[aria-label='multiplier of frame 3']", "7")
        said(tab, "#note", "got noise 7 for latent frame 3")
        tab.fill("[aria-label='multiplier of frame 3']", "")
        said(tab, "#note", "no number as m of frame 3")
        tab.click("#run")
        said(tab, "#status", "no number as m of frame 3")
        tab.fill("#prompt textarea", "a cat and a large red circle")
        said(tab, "#unknown", "does not know: cat.")


@pressed
@pytest.mark.slow
def test_a_run_is_shown_and_its_line_makes_the_same_video(browser, address, home):
    with opened_page(browser, address) as tab:
        choose(tab, "i2v")
        until(tab, "() => document.querySelector('.pictures .given')")
        line = run(tab)
        assert "--task i2v" in line and "--steps 2" in line and "--tau" not in line and same_video(home, line)
        assert tab.locator("#video-0 video").count() == 1 and tab.locator("#strip img").is_visible()
        tab.fill("[aria-label='delay of frame 8']", "0.5")
        until(tab, "() => document.querySelectorAll('.taus tr').length === 5")
        tab.check("#both input")
        line = run(tab)
        assert "--tau" in line
        for i in range(3):  # this run, the run before, the LoRA off
            tab.wait_for_selector(f"#video-{i} video")
        made = sorted((home / "outputs").glob("i2v-*.mp4"), key=lambda path: path.stat().st_mtime)[-3:]
        assert len({path.read_bytes() for path in made}) == 3
        made[-1].unlink()  # without the LoRA: the line is that of the one before
        assert same_video(home, line)
        tab.click("#open-json button")
        said(tab, "#json", '"task": "i2v"')


@pressed
@pytest.mark.slow
def test_pictures_dropped_drawn_and_bad(browser, address, home):
    for name in ("bad.png", "bad.mp4"):
        (home / name).write_text("no picture")
    Image.new("RGB", (64, 64), "red").save(home / "red.png")
    with opened_page(browser, address) as tab:
        tab.set_input_files("[aria-label='picture of frame 3']", home / "bad.png")
        said(tab, "#note", "bad.png cannot be read as an image")
        assert tab.locator(".dropped").count() == 0
        tab.set_input_files("[aria-label='picture of frame 3']", home / "red.png")
        tab.wait_for_selector(".pictures td[data-i='3'].dropped")
        assert tab.locator("#task input:checked").get_attribute("value") == "keyframes"
        line = run(tab)
        assert "--at 3" in line and "red.png" in line and same_video(home, line)
        tab.click("[aria-label='no picture on frame 3']")
        until(tab, "() => !document.querySelector('.dropped')")
        tab.click("#draw button")
        tab.locator("#canvas img").click(position={"x": 60, "y": 180})
        until(tab, "() => document.querySelector('#prompt textarea').value.startsWith('a small red circle')")
        tab.wait_for_selector(".pictures td[data-i='0'].dropped")
        with tab.expect_file_chooser() as chooser:
            tab.click("#own")
        chooser.value.set_files(home / "bad.mp4")
        said(tab, "#note", "bad.mp4 cannot be read as a video")
        tab.click("[aria-label='no picture on frame 0']")
        with tab.expect_file_chooser() as chooser:
            tab.click("#own")
        chooser.value.set_files(ROOT / "clips" / "00001.mp4")
        until(tab, "() => document.querySelector('#clip input').value.includes('outputs/page')")
        choose(tab, "extend")
        until(tab, "() => document.querySelectorAll('.pictures .given').length === 4")


@pressed
@pytest.mark.slow
def test_any_table_is_painted_or_pasted(browser, address, home):
    with opened_page(browser, address) as tab:
        tab.click("#any button")
        tab.check("#free input")
        tab.wait_for_selector(".board.free")
        tab.locator(".taus").scroll_into_view_if_needed()
        first, last = (tab.locator(f".taus td[data-k='{n}'][data-i='{n}']").bounding_box() for n in (4, 6))
        tab.mouse.move(first["x"] + 5, first["y"] + 5)
        tab.mouse.down()
        tab.mouse.move(last["x"] + 5, last["y"] + 5, steps=10)
        tab.mouse.up()
        said(tab, "#note", "rises from")
        assert levels(tab, 4)[4] == ".50" == levels(tab, 6)[6]
        tab.fill("#pasted textarea", "1 1 1")
        said(tab, "#note", "got 1 lines")
        tab.fill("#pasted textarea", "\n".join(" ".join([tau] * 9) for tau in ("1", "0.7", "0")))
        until(tab, "() => document.querySelectorAll('.taus tr').length === 3")
        tab.click("#run")
        said(tab, "#status", "Done.")
        line = tab.input_value("#line textarea")
        assert "--tau" in line and same_video(home, line)


@pressed
@pytest.mark.slow
def test_two_tabs_take_turns_and_a_closed_one_gives_its_turn_away(browser, address, home):
    with opened_page(browser, address) as second:
        with opened_page(browser, address) as first:
            choose(second, "extend")
            fill(first, "#steps input[type=number]", 50)
            until(first, "() => document.querySelectorAll('.taus tr').length === 51")
            first.click("#run")
            said(first, "#status", "Denoising")
            before = set((home / "outputs").glob("*.mp4"))
            fill(second, "#steps input[type=number]", 2)
            until(second, "() => document.querySelectorAll('.taus tr').length === 3")
            second.click("#run")
            said(second, "#status", "number 2 in line")
            assert "step" in first.inner_text("#status") and levels(first, 0)[0] == "1.00", "tabs do not mix"
        said(second, "#status", "Done.")
        (made,) = set((home / "outputs").glob("*.mp4")) - before
        assert made.name.startswith("extend"), "the run of the closed tab has ended, without a video"


@pressed
@pytest.mark.slow
def test_the_guided_steps_run_and_stop(browser, address):
    with opened_page(browser, address) as tab:
        usual, context = (tab.input_value(f"#{name} input[type=number]") for name in ("strength-0", "context"))
        assert float(usual) >= 1 and float(context) > 0
        for name, task, strength, noise in (
            ("2 ·", "i2v", "0", "0"),
            ("3 ·", "i2v", usual, "0"),
            ("4 ·", "i2v", usual, context),
            ("1 ·", "t2v", usual, context),
        ):
            tab.get_by_role("button", name=name).click()
            said(tab, "#status", "Denoising")
            assert tab.locator("#task input:checked").get_attribute("value") == task
            assert tab.input_value("#strength-0 input[type=number]") == strength
            assert tab.input_value("#context input[type=number]") == noise
            tab.click("#stop")
            said(tab, "#status", "Stopped.")
            assert (len(set(levels(tab, 8))) > 2) == (name == "4 ·")
