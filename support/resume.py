"""Stopping and going on: what a run keeps in its folder, so that it ends as if it had never stopped.

    settings.json   the flags                          facts.json      what was trained on what
    metrics.jsonl   a line of figures each step        state-N.pt      weights and optimizers after step N

A step of `train.py` follows from the seed and its own number, so these are all there is to know. Each file appears
whole or not at all, and lines after the step from which a run goes on are taken out: it will write them again.
Of several processes the first one writes. A state does not know how many they were.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from support import cli, distributed
from support.report import read_metrics


def newest_state(out: Path | str) -> Path | None:
    """The last state in the folder of a run, or None if it has none."""
    return max(Path(out).glob("state-*.pt"), key=_step_of, default=None)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def load_state(out: Path, settings: dict, may_change: set[str]) -> dict | None:
    """The last state of a run, its tensors on the CPU, or None if it stopped before its first save.

    Raises ValueError if there is no run, if the state cannot be read, and if a setting outside of `may_change` is
    another than when the run began: it could not end as it would have. More `steps` are no mistake: nobody who asks for
    them wants the same end.
    """
    path = newest_state(out)
    if path is None:
        if (out / "settings.json").is_file():
            return None
        raise ValueError(f"got --resume, but there is no run in {out} to go on from; start without --resume")
    try:
        # Several processes map the file: each needs a slice of every tensor, and copies would take the memory of all.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=distributed.size() > 1)
    except Exception as error:  # over damaged bytes the unpickler stumbles in every way there is
        reason = str(error).splitlines()[0][:100]
        raise ValueError(
            f"cannot read {path} ({reason}); delete it to go on from the one before, or start again with another --out"
        ) from error
    for name in settings.keys() & state["settings"].keys() - may_change:
        longer = name == "steps" and settings[name] > state["settings"][name]
        if settings[name] != state["settings"][name] and not longer:
            raise ValueError(
                f"got --resume with {settings[name]} as --{name.replace('_', '-')}, but the run in {out} began with "
                f"{state['settings'][name]}, and must end as if it had never stopped; repeat its flags, which are in "
                "settings.json, or start anew with another --out"
            )
    return state


def restore(state: dict, inputs: dict[str, str], trained: Sequence[nn.Parameter], optimizers: Sequence) -> dict:
    """Put a state back into parameters and optimizers, and return the figures of the run so far.

    `inputs` names what the run is made from, by its content; ValueError if it is not what the state was made from.
    """
    for name, content in inputs.items():
        if state["inputs"][name] != content:
            raise ValueError(
                f"got --resume, but the {name} changed since the run began, and it must end as if it had never "
                "stopped; put back what was there, or start anew with another --out"
            )
    for parameter, value in zip(trained, state["trained"], strict=True):
        parameter.data.copy_(distributed.sliced(value, parameter))
    for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for i, moments in content["state"].items():
            content["state"][i] = {name: distributed.sliced(value, parameters[i]) for name, value in moments.items()}
        optimizer.load_state_dict(content)
    return state["figures"]


def save_state(
    out: Path, keep: int, settings: dict, inputs: dict[str, str], figures: dict, trained: Sequence[nn.Parameter],
    optimizers: Sequence,
) -> None:  # fmt: skip
    """Write `state-N.pt` for N = figures["step"], and delete all but the last `keep` states."""
    state = {"settings": settings, "inputs": inputs, "figures": figures, "trained": [p.data for p in trained]}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    state = distributed.whole(state)
    if distributed.rank() > 0:
        return
    with cli.replacing(out / f"state-{figures['step']:06d}.pt") as path:
        torch.save(state, path)
    for old in sorted(out.glob("state-*.pt"), key=_step_of)[:-keep]:
        old.unlink()


def open_folder(out: Path, settings: dict, facts: dict, step: int) -> None:
    """Write what a run is, and clear its folder of what a killed one left behind after `step`."""
    if distributed.rank() > 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    for unfinished in out.glob(".*.tmp*"):
        if unfinished.is_file():
            unfinished.unlink()
    for name, content in (("settings.json", settings), ("facts.json", facts)):
        cli.write_json(out / name, content)
    lines = [line for line in read_metrics(out) if line["step"] <= step]
    with cli.replacing(out / "metrics.jsonl") as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def log(out: Path, board, figures: dict[str, float]) -> None:
    """Add the figures of a step to `metrics.jsonl`, and to TensorBoard if there is a `board`."""
    if distributed.rank() > 0:
        return
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
    if board is not None:
        for name, value in figures.items():
            if name != "step" and value is not None:
                board.add_scalar(name, value, figures["step"])


@contextmanager
def tensorboard(out: Path, step: int) -> Iterator:
    """Yields TensorBoard's writer where it is installed, else None; what it has of steps after `step` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    if SummaryWriter is None or distributed.rank() > 0:
        yield None
        return
    board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
    try:
        yield board
    finally:
        board.close()  # it writes every two minutes, and now


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yields a question: has Ctrl-C, or a scheduler's SIGTERM, asked the run to end? So a step is never cut in two.

    The second signal does not wait: what was done since the last save is then lost.
    """
    asked = []

    def ask(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt("stopped at once; go on from the last save with the same command and --resume")
        asked.append(number)
        message = b"\nstopping after this step; once more to stop at once\n" if distributed.rank() == 0 else b""
        os.write(2, message)  # print could be what was interrupted

    mine = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in mine}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
