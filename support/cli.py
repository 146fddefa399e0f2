"""What every command of nanoPusa shares: flags made from a config, one-sentence errors, safe writes, progress.

A command's settings are one frozen dataclass whose fields are made with `option`; `parse` turns it into a command
line, so a default is written down once. A user's mistake is a `ValueError` or `OSError` whose message says what was
given, what was expected and what to do; `run` prints it as one sentence and exits with status 2. Ctrl-C exits with 130.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
import typing
import uuid
from contextlib import contextmanager
from pathlib import Path


def option(default, help: str, **argparse_settings):
    """A dataclass field that is also a flag: `shift: float = option(5.0, "shift of the sigma schedule")`.

    With `positional=True` it is an argument without a flag, which has to be given unless `nargs="?"`.
    """
    return dataclasses.field(default=default, metadata={"help": help, **argparse_settings})


def parse(config_class, doc: str, argv: list[str] | None = None):
    """Build the command line of `config_class` from its fields and read `argv` (default: the process's) into it."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    for field in dataclasses.fields(config_class):
        settings = dict(field.metadata)
        if isinstance(field.default, bool):
            settings["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        elif "action" not in settings:
            kind = (typing.get_args(field.type) or (field.type,))[0]  # of `float | None`, the first
            settings.setdefault("type", kind if kind in (int, float) else str)
        if field.default not in (None, False, ()) and "%(default)s" not in settings["help"]:
            settings["help"] += " (default: %(default)s)"
        name = field.name if settings.pop("positional", False) else "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, **settings)
    return config_class(**vars(parser.parse_intermixed_args(argv)))


def run(command) -> None:
    """Run a command's main function; a mistake of the user's ends in one sentence and exit status 2."""
    name = Path(sys.argv[0]).name
    try:
        command()
    except KeyboardInterrupt as stop:
        after_progress = "\n" if sys.stderr.isatty() else ""
        print(f"{after_progress}{name}: {str(stop) or 'stopped'}", file=sys.stderr)
        sys.exit(130)  # what a shell expects of a command that Ctrl-C ended
    except (ValueError, OSError) as error:
        if os.environ.get("NANOPUSA_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split())
        print(f"{name}: {sentence}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        kind = type(error).__name__  # torch's, which may not be loaded
        if kind == "OutOfMemoryError":
            sentence = (
                "the device has not enough memory for this; try a smaller --size or --frames; --offload to sample; "
                "--gradient-checkpointing or --accumulate to train"
            )
        elif kind in ("InductorError", "TritonMissing", "GPUTooOldForTriton"):
            reason = str(error).splitlines()[0]
            sentence = f"--compile failed ({reason}); leave it out, or install a C++ compiler, for a GPU also Triton"
        else:
            raise
        print(f"{name}: {sentence}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def replacing(path: Path | str):
    """Yield a temporary path beside `path` (same suffix) that is moved into place only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")  # nobody else's, on any machine
    try:
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


def write_json(path: Path | str, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Progress:
    """One line on stderr with the share done, the time left and whatever figures the caller has."""

    def __init__(self, total: int, label: str, done: int = 0):
        self.total, self.label, self.done, self.first = total, label, done, done
        self.start, self.shown = time.monotonic(), 0.0

    def step(self, **figures: float) -> None:
        """Count one step; redraw at most twice a second on a terminal, every 30 seconds in a log, and at the end."""
        self.done += 1
        now, terminal = time.monotonic(), sys.stderr.isatty()
        last = self.done >= self.total
        if not last and now - self.shown < (0.5 if terminal else 30):
            return
        self.shown = now
        left = (now - self.start) / (self.done - self.first) * (self.total - self.done)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        text = f"{self.label} {self.done}/{self.total}  {shown}  {int(left) // 60}:{int(left) % 60:02d} left"
        print(("\r\033[K" if terminal else "") + text, end="" if terminal and not last else "\n", file=sys.stderr)


def pick_device(name: str | None) -> str:
    """The device asked for, or a GPU if there is one, or the CPU."""
    import torch  # here, so that a wrong flag is answered before torch has loaded

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"got --device {name}, expected a device of this machine such as cpu: {error}") from None
    return name


def pick_dtype(name: str, device: str):
    """The torch dtype to compute in; "auto" is bfloat16 where the hardware multiplies it faster than float32."""
    import torch

    if name == "auto":
        if device.startswith("cuda"):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of `832x480`."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"got size {text!r}, expected WIDTHxHEIGHT such as 832x480")
    if int(width) % 16 or int(height) % 16 or not int(width) * int(height):
        raise ValueError(f"got size {text}, expected multiples of 16: 8 pixels a latent, 2 latents a patch")
    return int(width), int(height)
