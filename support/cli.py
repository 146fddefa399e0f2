"""What every command of nanoPusa shares: flags made from a config, one-sentence errors, safe writes, progress.

A command's settings are one frozen dataclass whose fields are made with `option`; `parse` turns it into a command
line, so a default is written down once. A user's mistake is a `ValueError` or `OSError` whose message says what was
given, what was expected and what to do; `run` prints it as one sentence and exits with status 2. Ctrl-C exits with 130.
"""

import argparse
import dataclasses
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import types
import typing
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

T = typing.TypeVar("T")
SEED = (-(2**63), 2**64 - 1, "a whole number of 64 bits")  # what torch takes
COUNT, POSITIVE = (1, 10**9, "at least 1"), (1e-9, 1e9, "a number above 0, such as 16")
SHARE = (0, 1, "a number in [0, 1], such as 0.5")


def option(
    default: typing.Any, help: str, within: tuple[float, float, str] | None = None, **argparse_settings: typing.Any
) -> typing.Any:
    """A dataclass field that is also a flag: `shift: float = option(5.0, "shift of the sigma schedule")`.

    within: the least and the greatest value, and how a sentence calls them: `(1, 10**9, "at least 1")`.
    With `positional=True` it is an argument without a flag, which has to be given unless `nargs` is "?" or "*".
    """
    return dataclasses.field(default=default, metadata={"help": help, "within": within, **argparse_settings})


def parse(config_class: type[T], doc: str, argv: list[str] | None = None) -> T:
    """Build the command line of `config_class` from its fields and read `argv` (default: the process's) into it."""
    return check(config_class(**vars(_parser(config_class, doc).parse_intermixed_args(argv))))


def named(config_class: type[T], argv: list[str] | None = None) -> dict[str, typing.Any]:
    """The settings that a command line names, without the defaults of the others."""
    return vars(_parser(config_class, "", with_defaults=False).parse_intermixed_args(argv))


def _parser(config_class: type[T], doc: str, with_defaults: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.strip().partition("\n")[0])
    for field in dataclasses.fields(config_class):
        settings = {name: value for name, value in field.metadata.items() if name != "within"}
        if isinstance(field.default, bool):
            settings["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        elif "action" not in settings:
            kind = (typing.get_args(field.type) or (field.type,))[0]  # of `float | None`, the first
            settings.setdefault("type", kind if kind in (int, float) else str)
        if field.default not in (None, False, ()) and "%(default)s" not in settings["help"]:
            settings["help"] += " (default: %(default)s)"
        name = field.name if settings.pop("positional", False) else "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default if with_defaults else argparse.SUPPRESS, **settings)
    return parser


def check(config: T) -> T:
    """The same config. ValueError for a field with a value of another type, out of its range, or not a choice."""
    for field in dataclasses.fields(config):
        value, (within, choices) = getattr(config, field.name), map(field.metadata.get, ("within", "choices"))
        flag = ("" if field.metadata.get("positional") else "--") + field.name.replace("_", "-")
        got = f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"
        expect(value is field.default or fits(value, field.type), got, inspect.formatannotation(field.type))
        if value is not None and choices:
            expect(value in choices, got, f"one of {', '.join(choices)}")
        if value is not None and within:
            expect(within[0] <= value <= within[1], got, within[2])
    return config


def fits(value: typing.Any, kind: typing.Any) -> bool:
    """Whether a value, of Python or of JSON, is of a type such as int, `float | None` or `tuple[int, int]`."""
    kinds = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, kind) for kind in kinds)
    if typing.get_origin(kind) is tuple:
        kinds = kinds[:1] * len(value) if kinds[-1] is ... and isinstance(value, (tuple, list)) else kinds
        return isinstance(value, (tuple, list)) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return type(value) is kind or kind is float and type(value) is int


def expect(right: typing.Any, got: str, expected: str) -> None:
    """ValueError unless `right` is true."""
    if not right:
        raise ValueError(f"got {got}, expected {expected}")


def run(command: Callable[[], None]) -> None:
    """Run a command's main function; a mistake of the user's ends in one sentence and exit status 2."""
    try:
        return command()
    except KeyboardInterrupt as stop:
        status, sentence = 130, str(stop) or "stopped"  # as a shell expects after Ctrl-C
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        status, sentence, kind = 2, " ".join(str(error).split()), type(error).__name__  # by name: not all are loaded
        if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "DefaultCPUAllocator" in sentence:
            sentence = "the device has not enough memory for this; try a smaller --size or --frames; --offload to "
            sentence += "sample; --gradient-checkpointing or --accumulate to train"
        elif kind in ("InductorError", "TritonMissing", "GPUTooOldForTriton"):
            reason = str(error).splitlines()[0]
            sentence = f"--compile failed ({reason}); leave it out, or install a C++ compiler, for a GPU also Triton"
        elif isinstance(error, RuntimeError) or os.environ.get("NANOPUSA_TRACEBACK"):
            raise
    if len(sentence) > 600:  # it quotes something absurd
        sentence = f"{sentence[:300]} ... {sentence[-200:]}"
    after_progress = "\n" if status == 130 and sys.stderr.isatty() else ""
    *_, package, name = Path(sys.argv[0]).absolute().parts
    print(f"{after_progress}{name if name != '__main__.py' else f'{package}/{name}'}: {sentence}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix) that is moved into place only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")  # nobody else's, on any machine
    try:
        with writing(path):
            yield temporary
            if temporary.is_file():  # some writers make files that only their owner can read
                mask = os.umask(0)
                os.umask(mask)
                temporary.chmod(0o666 & ~mask)
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """OSError in one sentence if the disk is full while the block writes `path`."""
    try:
        yield
    except Exception as error:  # Python, safetensors, torch and PyAV have each their own, and their own words
        if re.search("No space left|File too large|quota exceeded|inline_container|PyAV callback", str(error)):
            advice = "make room, and run the same command again, a training with --resume"
            raise OSError(f"cannot write {path}, as the disk is full; {advice}") from error
        raise


def try_writing(folder: Path | str, flag: str) -> None:
    """Make the folder. ValueError if nothing can be written there; flag: what names another one."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another folder by {flag}") from None


def write_json(path: Path | str, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Progress(tqdm):
    """One line on stderr with the share done, the time left, and whatever figures the caller has.

    A terminal redraws it twice a second at most; a log gets a line every 30 seconds, for the first step and the last.
    """

    monitor_interval = 0  # no thread that draws in between

    def __init__(self, total: int, label: str, done: int = 0) -> None:
        pause, line = 0.5 if sys.stderr.isatty() else 30, "{desc} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        # With the smallest of delays nothing is drawn before the first step.
        super().__init__(
            None, label, total, initial=done, mininterval=pause, miniters=1, smoothing=0, delay=1e-9, bar_format=line
        )
        self.last_print_t = 0.0  # long ago: the first step is drawn

    def step(self, **figures: float) -> None:
        """Count one step; redraw the line if it is time."""
        self.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        if self.n + 1 >= self.total:
            self.last_print_t = 0.0
        self.update()

    def tell(self, sentence: str) -> None:
        """Put a line that stays above the one that is redrawn."""
        start = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{start}{sentence}", file=sys.stderr, flush=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        terminal = sys.stderr.isatty()  # it draws over the last line, which a log cannot
        start, end = "\r\033[K" if terminal else "", "" if terminal and self.n < self.total else "\n"
        print(f"{start}{self}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:  # draws no last line: a run that ended early has said why
        self.disable = True


def pick_device(name: str | None) -> str:
    """The device asked for, or a GPU if there is one, or the CPU. ValueError for one that this machine lacks."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    expect(name != "meta", "--device meta", "a device that computes, such as cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"got --device {name}, expected a device of this machine such as cpu: {error}") from None
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The torch dtype to compute in; "auto" is bfloat16 where the hardware multiplies it faster than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else torch.float32


def parse_numbers(flag: str, text: str | None, kind: type) -> list | None:
    """The numbers in `0,4,8`; None for None."""
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"got --{flag} {text}, expected numbers with commas, as in 0,4,8") from None


def nth_seed(seed: int, n: int) -> int:
    """The seed of a run's n-th step, clip or epoch, which for small seeds no other run has."""
    return (seed * 1_000_003 + n) % 2**63


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of `832x480`. ValueError unless both are multiples of 16."""
    width, _, height = text.lower().partition("x")
    expect(width.isdigit() and height.isdigit(), f"size {text!r}", "WIDTHxHEIGHT such as 832x480")
    right = int(width) % 16 == int(height) % 16 == 0 < int(width) * int(height)
    expect(right, f"size {text}", "multiples of 16: 8 pixels a latent, 2 latents a patch")
    return int(width), int(height)


def read_text(path: Path | str) -> str:
    """A text file that a user made: UTF-8, with or without the mark that some editors put first."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path} as UTF-8 ({error}), expected a text file in that encoding") from None


def read_prompts(path: Path | str) -> list[str]:
    """The lines of a text file, without blank ones. ValueError if it cannot be read, or has none."""
    try:
        prompts = [" ".join(line.split()) for line in read_text(path).splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error}), expected a text file with a prompt in each line") from None
    if not prompts:
        raise ValueError(f"{path} is empty, expected a prompt in each line")
    return prompts


def latent_frames(N: int) -> int:
    """How many latent frames F hold N pixel frames, N = 4(F-1) + 1."""
    below = max(1, N - (N - 1) % 4)
    expect(N == below, f"{N} frames", f"4k+1 for a whole k: the nearest are {below} and {below + 4}")
    return (N - 1) // 4 + 1


def pixel_frames(F: int) -> int:
    """How many pixel frames N are in F latent frames, N = 4(F-1) + 1."""
    return 4 * (F - 1) + 1


def duration(seconds: float) -> str:
    """A time in its two largest units, such as `1 h 20 min` or `3 days`; below a minute to two digits, `2.3 s`."""
    units = ("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60), ("s", 1)
    for (large, length), (small, part) in pairwise(units):
        count, rest = divmod(round(seconds / part), length // part)
        if count:
            words = f"{count:,} {large}" + (f" {rest} {small}" if rest else "")
            return re.sub(r"\b1 (year|day)s", r"1 \1", words)
    return f"{seconds:.2g} s"


def size(bytes: float) -> str:
    """An amount of memory: `21.16 GiB`, and below one GiB `19.53 MiB`."""
    return f"{bytes / 2**30:.2f} GiB" if bytes >= 2**30 else f"{bytes / 2**20:.2f} MiB"


def latent_index(position: int, N: int) -> int:
    """The latent frame that holds pixel frame `position`, 0..N-1: the first is alone, the others go in groups of 4."""
    expect(0 <= position < N, f"frame {position}", f"a frame of the video, 0 to {N - 1}")
    return (position + 3) // 4
