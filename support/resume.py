"""The folder of a run: what is written there, so that a run that was stopped ends as if it had not been.

    settings.json   the flags                          facts.json      what was trained on what
    metrics.jsonl   a line of figures each step        state-N.pt      weights and optimizers after step N
    .lock           held by the process that writes here, and let go when it ends, however it ends

A step of `train.py` follows from the seed and its own number, so these are all there is to know. Each file but
metrics.jsonl appears whole or not at all. The first of several processes writes; a state does not depend on how many.
"""

import json
import os
import signal
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.optim import Optimizer

from support import cli, distributed, media, report

# Only what is trained, with full tensors, on the first process's CPU.
_TRAINED = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def newest_state(out: Path | str) -> Path | None:
    """The last state in the folder of a run, or None if it has none."""
    return max(Path(out).glob("state-*.pt"), key=_step_of, default=None)


def full_models(models: nn.Module, outline: nn.Module) -> nn.Module:
    """The models; if they are sharded, their outline, with what is trained filled in on the first process's CPU."""
    if distributed.size() > 1:
        weights = state_dict.get_model_state_dict(models, options=_TRAINED)
        outline.load_state_dict(weights, strict=False, assign=True)
    return outline if distributed.size() > 1 else models


@contextmanager
def claim(settings: dict, may_change: set[str]) -> Iterator["Run"]:
    """A run that no other one can disturb: to the end of the block, or of the process, its folder is its own.

    The folder is settings["out"], or else the next free one of runs/pusa-001, runs/pusa-002, ..., or the last of these
    with settings["resume"]. ValueError if it is another run's or cannot be written to, and as by `Run`.
    """
    first = distributed.rank() == 0
    out = Path(distributed.broadcast(settings["out"] or first and str(_numbered(settings["resume"]))))
    with _locked(out) if first else nullcontext():
        yield Run(settings | {"out": str(out)}, may_change)


def _numbered(resume: bool) -> Path:
    """The last of runs/pusa-NNN, or with `resume` false the next one, which is made."""
    number = max((int(path.name[5:]) for path in Path("runs").glob("pusa-[0-9][0-9][0-9]")), default=0)
    while not resume:
        number += 1
        with suppress(FileExistsError):  # another run took it just now
            Path(f"runs/pusa-{number:03d}").mkdir(parents=True)
            break
    return Path(f"runs/pusa-{number:03d}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it; afterwards, remove it if nothing was written."""
    lock = folder / ".lock"
    cli.try_writing(folder, "--out")
    with open(lock, "a", encoding="utf-8") as file:
        try:
            _lock(file)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):  # its holder just removed it
                raise PermissionError
        except (BlockingIOError, PermissionError, FileNotFoundError):
            raise ValueError(f"another run is writing to {folder}; wait for its end, or choose another --out") from None
        except OSError:  # some network drives cannot lock
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
                folder.rmdir()


def _lock(file: IO) -> None:
    try:
        import fcntl
    except ImportError:  # on Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Run:
    """A run in its folder, and its figures so far. It knows no model: it is handed what it writes."""

    def __init__(self, settings: dict, may_change: set[str]):
        """Check the folder settings["out"], and with settings["resume"] read its last state.

        Raises ValueError if the folder holds another run or result, or none to go on from, or if a setting outside of
        `may_change` differs from when the run began, except for `steps`, which may grow.
        """
        self.settings, self.out, self.steps = settings, Path(settings["out"]), settings["steps"]
        self.figures = {"step": 0, "smooth": None, "best": None, "seconds": 0.0, "flops": 0.0}
        self.best: dict[str, Tensor] = {}  # the losses of the best validation, by kind
        newest, out = newest_state(self.out), self.out
        if newest and not settings["resume"]:
            raise ValueError(f"got --out {out}, which holds a run; go on with --resume, or choose another folder")
        if settings["resume"] and not newest and not (out / "settings.json").is_file():
            raise ValueError(f"got --resume, but there is no run in {out} to go on from; start without --resume")
        for path in (out / "lora.safetensors", out / "model"):
            if path.exists() and not newest:
                raise ValueError(f"{path} is there, but no state to go on from; choose another --out, or move it away")
        self.state = _read_state(newest) if newest else None
        before = self.state["settings"] if newest else _read_settings(out) if settings["resume"] else {}
        for name in settings.keys() & before.keys() - may_change:
            longer = name == "steps" and settings[name] > before[name]
            flag = f"--{name.replace('_', '-')}, but the run in {out} began with {before[name]}"
            again = "the flags in its settings.json, as it must end as if it had never stopped; or another --out"
            cli.expect(longer or settings[name] == before[name], f"--resume with {settings[name]} as {flag}", again)

    @contextmanager
    def open(self, model: nn.Module, optimizers: Sequence[Optimizer], inputs: dict, facts: dict) -> Iterator[range]:
        """Go on from the last state: yields the steps to do. In the block, Ctrl-C does not cut a step in two.

        inputs: fingerprints of what the run is made from, as the first process knows them; ValueError if one changed
        since the run began. facts: for facts.json, which tells of parameters and device too.
        """
        self.model, self.optimizers, self.stop = model, optimizers, False
        self.inputs = distributed.broadcast(inputs)
        if self.state:
            self._restore()
        if distributed.rank() == 0:
            self._prepare_folder(facts)
        step = self.figures["step"]
        self.progress = cli.Progress(self.steps, "training", step)
        with ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler sends the second
                    stack.callback(signal.signal, number, signal.signal(number, self._ask_to_stop))
            self.board = _tensorboard(self.out, step) if distributed.rank() == 0 else None
            if self.board:
                stack.callback(self.board.close)  # it writes every two minutes, and now
            yield range(step, self.steps)

    def _restore(self) -> None:
        for name, content in self.inputs.items():
            if self.state["inputs"].get(name) != content:
                raise ValueError(
                    f"got --resume, but the {name} changed since the run began, and it must end as if it had never "
                    "stopped; put back what was there, or start anew with another --out"
                )
        several = distributed.size() > 1
        options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
        weights = {"model_state_dict": self.state["model"], "optim_state_dict": self.state["optimizers"]}
        state_dict.set_state_dict(self.model, self.optimizers, **weights, options=options)
        self.figures, self.best, self.state = self.state["figures"], self.state["best"], None
        print(f"going on from step {self.figures['step']}")

    def _prepare_folder(self, facts: dict) -> None:
        """Write what the run is, and clear what a killed one left behind."""
        self.out.mkdir(parents=True, exist_ok=True)
        for unfinished in self.out.glob(".*.tmp*"):
            if unfinished.is_file():
                unfinished.unlink()
        cli.write_json(self.out / "settings.json", self.settings)
        cli.write_json(self.out / "facts.json", facts | self._facts())
        step = self.figures["step"]
        lines = [line for line in report.read_metrics(self.out) if line["step"] <= step > 0]
        with cli.replacing(self.out / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _facts(self) -> dict:
        device, many, parameters = self.settings["device"], distributed.size(), list(self.model.parameters())
        on_gpu = torch.device(device).type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else f"{device.upper()}, threads: {torch.get_num_threads()}"
        return {
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "device": f"{many} x {name}" if many > 1 else name,
        }

    def _ask_to_stop(self, number: int, frame) -> None:
        """Ctrl-C once: stop after this step. Twice: stop now, and lose what was done since the last save."""
        if self.stop:
            raise KeyboardInterrupt("stopped at once; go on from the last save with the same command and --resume")
        self.stop = True
        message = b"\nstopping after this step; once more to stop at once\n" if distributed.rank() == 0 else b""
        os.write(2, message)  # print could be what was interrupted

    def count(self, loss: float, seconds: float, tokens: int, flops: float) -> dict[str, float]:
        """Add a step to the figures so far, and return its own. seconds: it took; tokens, flops: of each window."""
        batch, smooth = self.settings["batch"], self.figures["smooth"]
        self.figures["step"] += 1
        self.figures["smooth"] = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        self.figures["seconds"] += seconds
        self.figures["flops"] += batch * flops
        return {"loss": loss, "samples/s": batch / seconds, "tokens/s": batch / seconds * tokens}

    def judge(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The means of a validation's losses, (triples,) of each kind; the step of the best is noted.

        A validation is better if the mean of `sync`, `async` and `clean` is lower by more than the standard error of
        the difference, taken triple by triple: triples differ in difficulty far more than training changes.
        """
        before = self.best or losses
        gain = sum(before[name] - losses[name] for name in ("sync", "async", "clean")) / 3
        if not self.best or gain.mean() > gain.std() / len(gain) ** 0.5:
            self.best, self.figures["best"] = losses, self.figures["step"]
        return {name: loss.mean().item() for name, loss in losses.items()}

    def due(self, every: int, at_end: bool = False) -> bool:
        """Whether this step is one of every `every`; 0 is never. at_end: the last step is one too."""
        return every > 0 and (self.figures["step"] % every == 0 or at_end and self.figures["step"] == self.steps)

    def log(self, figures: dict[str, float]) -> None:
        """Add a step's figures to metrics.jsonl and, where it is installed, to TensorBoard; tell a validation's."""
        step, best = self.figures["step"], self.figures["best"]
        if "loss" in figures:
            self.progress.step(smooth=self.figures["smooth"], **figures)
        if "sync" in figures:
            told = (f"{name} {figures[name]:.4f}" for name in ("sync", "async", "clean", "copy") if name in figures)
            self.progress.tell(f"step {step}: {', '.join(told)}" + f"; best: step {best}" * (step > 0))
        if distributed.rank() > 0:
            return
        line = {name: value for name, value in (self.figures | figures).items() if value is not None}
        path = self.out / "metrics.jsonl"
        with cli.writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if self.board and name != "step":
                self.board.add_scalar(name, value, self.figures["step"])

    def save(self) -> None:
        """Write `state-N.pt` if it is due after step N. Raises KeyboardInterrupt if the run was asked to stop."""
        step = self.figures["step"]
        stop = distributed.all_reduce(self.stop, self.settings["device"])  # if one process is asked to, all do
        if stop or step == self.steps or self.due(self.settings["save_every"]):
            weights, moments = state_dict.get_state_dict(self.model, self.optimizers, options=_TRAINED)
            if distributed.rank() == 0:
                state = {"settings": self.settings, "inputs": self.inputs, "figures": self.figures, "best": self.best}
                with cli.replacing(self.out / f"state-{step:06d}.pt") as path:
                    torch.save({**state, "model": weights, "optimizers": moments}, path)
                for old in sorted(self.out.glob("state-*.pt"), key=_step_of)[: -self.settings["keep"]]:
                    old.unlink()
        if stop and step < self.steps:
            raise KeyboardInterrupt(f"stopped after step {step}; go on with the same command and --resume")

    def save_filmstrip(self, name: str, rows: Sequence[tuple[str, Tensor]], marks: Sequence[Sequence[bool]]) -> None:
        if distributed.rank() == 0:
            media.save_image(self.out / name, media.filmstrip(rows, marks=marks))

    def finish(self, result: Path) -> None:
        """Write report.html, and tell where everything is."""
        if distributed.rank() == 0:
            print(f"{result}\n{self.out / 'filmstrip.png'}\n{report.write(self.out)}")


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def _read_state(path: Path) -> dict:
    try:
        if distributed.rank() == 0:
            with zipfile.ZipFile(path) as archive:  # torch writes checksums but reads whatever there is
                if broken := archive.testzip():
                    raise ValueError(f"{broken} is damaged")
        # Only the first of several processes needs the tensors: the others map the file and read none of them.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=distributed.size() > 1)
        parts = ("settings", "inputs", "figures", "best", "model", "optimizers")
        if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in parts):
            raise ValueError("it holds something else than a state as it is written today")
        return state
    except Exception as error:  # over damaged bytes the unpickler stumbles in every way there is
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise ValueError(
            f"cannot read {path} ({reason}); delete it to go on from the one before, or start again with another --out"
        ) from error


def _read_settings(out: Path) -> dict:
    """What a run began with that was stopped before its first save; empty if even that was not written whole."""
    try:
        return dict(json.loads((out / "settings.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}


def _tensorboard(out: Path, step: int):
    """TensorBoard's writer where it is installed, else None; what it has of steps after `step` is hidden."""
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
