"""What the commands share: flags from a config, one sentence for a mistake, whole files or none, an honest clock."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import tqdm
from small import call, mistake, model_fixture  # noqa: F401 (a fixture)
from torch._inductor.exc import InductorError

import sample
from support import cli


@dataclass(frozen=True)
class Config:
    name: str = cli.option("a", "a string", choices=("a", "b"))
    count: int = cli.option(3, "a whole number")
    share: float = cli.option(0.5, "a number")
    limit: float | None = cli.option(None, "a number or none")
    size: int | None = cli.option(None, "a whole number or none")
    path: str | None = cli.option(None, "a string or none")
    p_async: float = cli.option(1.0, "a name of two words")
    fast: bool = cli.option(False, "off unless asked for")
    tidy: bool = cli.option(True, "on unless told otherwise")
    again: tuple[str, ...] | None = cli.option(None, "may be given again", action="append")
    several: tuple[str, ...] | None = cli.option(None, "takes several", nargs="+")


def test_without_flags_a_config_has_its_defaults():
    assert cli.parse(Config, "Doc.", []) == Config() and cli.named(Config, []) == {}
    assert cli.named(Config, ["--count", "3", "--name", "a"]) == {"count": 3, "name": "a"}, "as the defaults are, too"


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ("--name b", "name", "b"),
        ("--count 7", "count", 7),
        ("--share 2", "share", 2.0),
        ("--limit 1e-3", "limit", 1e-3),
        ("--size 4", "size", 4),
        ("--path 4", "path", "4"),
        ("--p-async 0", "p_async", 0.0),
        ("--fast", "fast", True),
        ("--no-tidy", "tidy", False),
        ("--again x --again y:2", "again", ["x", "y:2"]),
        ("--several x y", "several", ["x", "y"]),
    ],
)
def test_a_flag_sets_its_field_in_its_type(argv, field, value):
    config = cli.parse(Config, "Doc.", argv.split())
    got = getattr(config, field)
    assert got == value and type(got) is type(value)
    assert cli.named(Config, argv.split()) == {field: value}, "whatever is the default"
    others = {name: v for name, v in vars(config).items() if name != field}
    assert others == {name: v for name, v in vars(Config()).items() if name != field}


@pytest.mark.parametrize("argv", ["--count 1.5", "--share x", "--limit x", "--name c", "--nonsense 1", "--several"])
def test_a_wrong_flag_ends_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Config, "Doc.", argv.split())
    assert end.value.code == 2
    assert argv.split()[0] in capsys.readouterr().err


def test_help_shows_the_first_line_of_the_doc_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Config, "What it is for.\n\nMore of it.", ["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "What it is for." in out and "More" not in out
    assert "a whole number (default: 3)" in out and "default: None" not in out and "default: False" not in out


@dataclass(frozen=True)
class WithFile:
    file: str = cli.option(None, "what to read", positional=True, choices=("a", "b"))
    copy: str | None = cli.option(None, "where to write", positional=True, nargs="?")
    count: int = cli.option(3, "a whole number")


def test_positional_arguments_stand_without_flags(capsys):
    assert cli.parse(WithFile, "Doc.", ["a"]) == WithFile("a", None, 3)
    assert cli.parse(WithFile, "Doc.", ["b", "--count", "4", "c"]) == WithFile("b", "c", 4)
    for argv in ([], ["c"], ["a", "b", "c"]):
        with pytest.raises(SystemExit) as end:
            cli.parse(WithFile, "Doc.", argv)
        assert end.value.code == 2
    with pytest.raises(SystemExit):
        cli.parse(WithFile, "Doc.", ["--help"])
    assert "default: None" not in capsys.readouterr().out


# Errors.


def _failing(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize("error", [ValueError("got 3,\n  expected 4"), FileNotFoundError("got 3, expected 4")])
def test_a_mistake_is_one_line_and_status_2(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/sample.py"])
    monkeypatch.delenv("NANOPUSA_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.run(_failing(error))
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "sample.py: got 3, expected 4\n")


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("NANOPUSA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="got 3"):
        cli.run(_failing(ValueError("got 3")))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "not enough memory"),
        (InductorError(RuntimeError("No working C++ compiler found"), None), "leave it out"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence_and_other_faults_are_not(error, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(_failing(error))
    assert end.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.run(_failing(RuntimeError("a fault of ours")))


def test_an_interrupt_is_one_sentence_and_status_130(capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        monkeypatch.setattr("sys.argv", ["train.py"])
        cli.run(_failing(KeyboardInterrupt()))
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "train.py: stopped\n")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError):
        cli.run(_failing(TypeError("a fault")))


def test_a_mistake_from_the_shell(model, tmp_path):
    """Once in a process of its own: what the other tests run in theirs is what a user runs."""
    flags = ["--model", str(model), "--frames", "30", "--task", "t2v", "--out", str(tmp_path / "a.mp4")]
    ended = subprocess.run([sys.executable, "sample.py", *flags], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "sample.py: got 30 frames, expected 4k+1 for a whole k: the nearest are 29 and 33\n"
    result = call(sample, *flags)
    mistake(result)
    assert result.err == ended.stderr
    assert not list(tmp_path.iterdir())


# Files.


def test_replacing_moves_a_whole_file_into_place(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    with cli.replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json" and not path.exists()
        temporary.write_text("new")
    assert path.read_text() == "new"
    with cli.replacing(str(path)) as temporary:
        temporary.write_text("newer")
        assert path.read_text() == "new"
    assert path.read_text() == "newer"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), cli.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "the temporary file is gone"


def test_replacing_cleans_up_a_folder_and_nothing(tmp_path):
    with pytest.raises(ValueError), cli.replacing(tmp_path / "a") as temporary:
        (temporary / "inner").mkdir(parents=True)
        raise ValueError
    with pytest.raises(ValueError), cli.replacing(tmp_path / "a"):
        raise ValueError
    assert not list(tmp_path.iterdir())


# Progress.


class _Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


def test_time_left_is_that_of_the_steps_so_far(clock, capsys):
    progress = cli.Progress(10, "denoising")
    clock.now += 40
    progress.step(loss=0.123456, psnr=20.0)
    assert capsys.readouterr().err == "denoising 1/10, 06:00 left, loss=0.1235, psnr=20\n"
    clock.now += 40
    progress.step()
    assert capsys.readouterr().err == "denoising 2/10, 05:20 left\n"


def test_steps_of_an_earlier_run_do_not_count_as_fast(clock, capsys):
    progress = cli.Progress(10, "training", done=4)
    clock.now += 35
    progress.step()
    assert capsys.readouterr().err == "training 5/10, 02:55 left\n"


def test_a_log_gets_a_line_every_30_seconds_and_the_last(clock, capsys):
    progress = cli.Progress(100, "x")
    for _ in range(100):
        clock.now += 1
        progress.step()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1].rstrip(",") for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert lines[-1].endswith("0:00 left")


def test_a_terminal_gets_one_line_that_is_redrawn(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = cli.Progress(100, "x")
    for _ in range(100):
        clock.now += 0.1
        progress.step()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("100/100, 00:00 left\n")
    assert 10 < err.count("\r") <= 25, "twice a second"


# What several commands ask for.


def test_sizes():
    assert cli.parse_size("832x480") == (832, 480)
    assert cli.parse_size("64X32") == (64, 32)


@pytest.mark.parametrize("text", ["", "64", "64x", "x64", "axb", "64x32x16", "-64x64", "6.4x64", "64×64"])
def test_a_size_that_is_none(text):
    with pytest.raises(ValueError, match="expected WIDTHxHEIGHT such as 832x480"):
        cli.parse_size(text)


@pytest.mark.parametrize("text", ["832x481", "8x64", "0x0", "64x0"])
def test_a_size_that_does_not_fit_the_patches(text):
    with pytest.raises(ValueError, match="expected multiples of 16"):
        cli.parse_size(text)


def test_devices():
    assert cli.pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="got --device nonsense, expected a device of this machine such as cpu"):
        cli.pick_device("nonsense")
    with pytest.raises(ValueError, match="got --device cuda:99"):
        cli.pick_device("cuda:99")


def test_a_gpu_is_taken_if_there_is_one(monkeypatch):
    assert cli.pick_device(None) == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cli.pick_device(None) == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.pick_device(None) == "cuda"


def test_dtypes(monkeypatch):
    assert cli.pick_dtype("float32", "cpu") == torch.float32
    assert cli.pick_dtype("bfloat16", "cpu") == torch.bfloat16
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):  # a T4 would emulate bf16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast)
        assert cli.pick_dtype("auto", "cuda") == cli.pick_dtype("auto", "cuda:1") == dtype
    assert cli.pick_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_is_written_can_be_read_by_whom_the_umask_allows(tmp_path):
    with cli.replacing(tmp_path / "a.txt") as path:
        path.touch(0o600)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (2.34, "2.3 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3599.8, "1 h"),
        (4800, "1 h 20 min"), (86400 * 1.5, "1 day 12 h"), (86400 * 3, "3 days"), (86400 * 366, "1 year 1 day"),
        (86400 * 365 * 2150, "2,150 years"), (86400 * 21, "21 days"),
    ],
)  # fmt: skip
def test_a_time_is_told_in_its_two_largest_units(seconds, words):
    assert cli.duration(seconds) == words


def test_memory_is_told_in_mib_or_gib():
    assert [cli.size(n) for n in (0, 20 * 2**20, 2**30, 21.16 * 2**30)] == [
        "0.00 MiB", "20.00 MiB", "1.00 GiB", "21.16 GiB"
    ]  # fmt: skip
