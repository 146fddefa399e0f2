"""What the claims share: scenes whose truth is exact, LoRAs that are trained once and kept, and what was measured.

A claim is a file with `measure(lab)`, `draw(lab, path)` and `rows(lab)`. It calls `lab.figure(name, values)`
for every number; what has been measured is in `paper/results/CLAIM.json` at once, so a run that is stopped goes on.
The first of its rows says the most. Processes that measure different claims may share all folders.
"""

import hashlib
import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import flow
import train
from model import Wan
from support import cli, dataset, plots
from toy import grow, world
from toy.judge import DETERMINED, Judge, centroid_errors, unseen_scenes
from wan import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
STEPS, BATCH, RANK = 800, 32, 32  # of a LoRA, unless its name below says otherwise
BUDGETS = (12, 25, 50, 100, 200, 400, 800, 1600)  # optimizer steps
# Every LoRA that a claim asks for, by its name, and how its training differs from `train.py`'s defaults.
TRAININGS = {
    **{f"steps-{n}": {"steps": n} for n in BUDGETS if n != STEPS},
    **{f"seed-{n}": {"seed": n} for n in (0, 1, 2)},  # seed-0 is meant where nothing else is said
    **{f"rank-{n}": {"rank": n} for n in (4, 128)},
    **{f"async-{n}": {"p_async": n / 100} for n in (0, 50)},
    "two-levels": {"two_levels": True},
}


@dataclass(frozen=True)
class Config:
    names: tuple[str, ...] = cli.option(
        (), "claims, or `train` for the trainings alone (default: all)", nargs="*", positional=True
    )
    quick: bool = cli.option(False, "a few scenes and steps, in a temporary folder, to see that all runs")
    scenes: int = cli.option(256, "scenes of each figure", (4, 10**6, "at least 4: one in four has two shapes"))
    measure: bool = cli.option(False, "write what is measured, and no pictures or report")
    model: str = cli.option("checkpoints/tiny", "the embedded model")
    work: str = cli.option("runs/paper", "folder for what is trained")
    results: str = cli.option("paper/results", "folder for what is measured")
    docs: str = cli.option("docs", "folder for the pictures and the report")
    readme: str = cli.option("README.md", "file that gets the report's short form, where it has a place for it")
    only: str | None = cli.option(None, "with `train`: the names of the trainings, as in rank-4,rank-128")
    commit: str | None = cli.option(None, "name of this state of the code, for the results (default: git's)")
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    dtype: str = cli.option("float32", "type to compute in", choices=("float32", "bfloat16"))
    compile: bool = cli.option(False, "compile the networks: slow to start, then faster (needs a C++ compiler)")


class Row(NamedTuple):
    """A line of the report."""

    claim: str
    paper: str  # the paper's figure
    ours: str
    holds: bool | None  # None: cannot be told at this scale
    short: str = ""  # ours in a few words, for the table of all claims


class Lab:
    """One claim's bench: its models, its scenes and what it has measured."""

    def __init__(self, config: Config, claim: str):
        self.config, self.claim, self.device = config, claim, cli.pick_device(config.device)
        self.opened = checkpoint.open(config.model, Wan)
        self.opened.preset = replace(self.opened.preset, history_guidance=1.0, context_noise=0.0)  # not the paper's
        self.scenes, self.seeds = (4, (0,)) if config.quick else (config.scenes, (0, 1, 2))
        self.seed = 0  # of the figure that is being measured
        self.path = Path(config.results) / f"{claim}.json"
        self.network = lru_cache(maxsize=4)(self._network)  # figures ask for the same ones again
        self.judge_of, self.latents_of = lru_cache(self._judge_of), lru_cache(maxsize=3)(self._latents_of)
        preset = self.opened.preset
        self.terms = {  # on which figures can be compared
            "scenes": self.scenes, "seeds": list(self.seeds), "model": config.model, "dtype": config.dtype,
            "weights": {"base": digest(config.model, "*/*"), "LoRA": digest(config.model, "*")},
            "settings": {name: getattr(preset, name) for name in ("steps", "shift", "guidance", "history_guidance")},
            "training": {"steps": STEPS, "batch": BATCH, "rank": RANK},  # where a figure's name says no other
        }  # fmt: skip
        record = self._record(self.path)
        self.commits: list[str] = record.get("commits", [])  # those whose code has measured, in their order
        self.figures: dict[str, list[list[float]]] = record.get("figures", {})  # by seed, the value of every scene

    def _record(self, path: Path) -> dict:
        """What has been measured into a file, if it is there; ValueError if that was on other terms."""
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else self.terms
        for term, ours in self.terms.items():
            got = f"{term} {ours} for {path}, which was measured with {record.get(term)}"
            cli.expect(record.get(term) == ours, got, "the same, or another folder for --results")
        return record

    @property
    def judge(self) -> Judge:
        """Scenes that neither training nor any choice of settings has seen, three in four with one shape.

        While a figure is measured they are those of its seed: each seed makes its share of all.
        """
        return self.judge_of(self.seed)

    def _judge_of(self, seed: int) -> Judge:
        scenes, share = unseen_scenes(self.scenes, seed=100), slice(seed, None, len(self.seeds))
        return Judge(self.opened, scenes, self.device, self.config.dtype, share, self.config.compile)

    def few(self, values: Sequence[T]) -> Sequence[T]:
        """The values, of which a quick pass takes only the first and the last."""
        return (values[0], values[-1]) if self.config.quick else values

    @cached_property
    def work(self) -> Path:
        """The folder of what is trained. ValueError if that was trained on a base with other weights."""
        folder, weights = Path(self.config.work), self.terms["weights"]["base"]
        with alone(known := folder / "base.json"):
            if not known.exists():
                cli.write_json(known, {"weights": weights})
            trained = json.loads(known.read_text(encoding="utf-8"))["weights"]
        got = f"{folder}, where what was trained on a {self.config.model} with other weights is"
        cli.expect(trained == weights, got, "another folder for --work")
        return folder

    def lora(self, name: str) -> Path:
        """The file of a LoRA of `TRAININGS`, which is trained now if it has not been.

        A quick pass takes the model's own for seed-0, as it needs one that is good, and trains the others for so few
        steps that they only show that it works.
        """
        if name == "seed-0" and self.config.quick:
            return Path(self.config.model) / "lora.safetensors"
        out = self.work / name
        settings = {"steps": STEPS, "batch": BATCH, "rank": RANK} | TRAININGS[name]
        settings |= {"steps": 2, "batch": 4} if self.config.quick else {}
        training = train.TrainConfig(
            data=self.config.work, model=self.config.model, out=str(out), device=self.device, dtype=self.config.dtype,
            val_every=0, compile=self.config.compile, **settings,
        )  # fmt: skip
        with alone(out):
            grow.train_or_resume(training, self.training_data, out / "lora.safetensors")
        return out / "lora.safetensors"

    def training_data(
        self, opened: checkpoint.Opened, config: train.TrainConfig, encoder: nn.Module | None
    ) -> dataset.Dataset:
        """The scenes that every training learns from, rendered and encoded once: what `train.train` calls `prepare`."""
        with alone(self.work / "latents"):
            return grow.rendered_clips(opened, config, encoder, 64 if self.config.quick else 6000, self.work)

    def pusa(self, name: str = "seed-0", strength: float = 1.0) -> Wan:
        """The embedded base with a LoRA of `TRAININGS` merged."""
        return self.judge.transformer(self.lora(name), strength)

    def _network(self, name: str, strength: float = 1.0) -> Wan:
        """The embedded base with a LoRA of `TRAININGS`, or alone ("base"), or as it is used ("embedded": with its own
        LoRA at its own strength); not to be changed."""
        if name == "embedded":
            return self.judge.transformer(Path(self.config.model) / "lora.safetensors")
        return self.judge.transformer() if name == "base" else self.pusa(name, strength)

    @property
    def latents(self) -> Tensor:
        """The latents of the judge's true clips, (scenes, 16, F, H, W)."""
        return self.latents_of(self.seed)

    def _latents_of(self, seed: int) -> Tensor:
        judge = self.judge_of(seed)
        return judge.encode(judge.truth)

    @torch.no_grad()
    def velocity(self, network: nn.Module, tau: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What a network predicts where the true clips are noised to tau (F,), and what is right, x1 - x0.

        Both (scenes, 16, F, H, W), one forward pass without guidance; the noise x1 is that of the seed.
        """
        x1 = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        tau, predicted = tau.to(self.device)[None], []
        noisy = flow.interpolate(self.latents, x1, tau).split(self.judge.batch)
        for z, context in zip(noisy, self.judge.context.split(self.judge.batch), strict=True):
            predicted.append(network(z, tau.expand(len(z), -1), context).float())
        return torch.cat(predicted), x1 - self.latents

    def error(self, network: nn.Module, task: str, seed: int, **settings: float | Tensor | None) -> Tensor:
        """For each scene, the mean distance in pixels of its shapes from where the conditions say they must be.

        settings: those of `Judge.videos`.
        """
        readings = world.measure(self.judge.videos(network, task, seed, **settings))
        return centroid_errors(self.judge.scenes, readings, DETERMINED[task]).mean(1)

    def figure(self, name: str, values: Callable[[int], Tensor], same: str = "") -> None:
        """Measure values(seed) → (scenes,) for every seed, unless they have been measured, and write them.

        same: "CLAIM: NAME", the figure of another claim that is the same, which is copied if it is there.
        """
        missing = self.seeds[len(self.figures.get(name, ())) :]
        copied = self._of_another(*same.split(": ", 1)) if same and missing else []
        for seed in missing:
            self.seed, known = seed, seed < len(copied)
            measured = copied[seed] if known else [float(f"{value:.4g}") for value in values(seed).tolist()]
            self.figures.setdefault(name, []).append(measured)
            self.write()
            print(f"{self.claim}: {name}, seed {seed}: {statistics.median(measured):.4g}", flush=True)

    def _of_another(self, claim: str, name: str) -> list[list[float]]:
        """The figure of another claim, as far as it has been measured on these scenes; its commits become ours, too."""
        record = self._record(self.path.with_name(f"{claim}.json"))
        if name not in record.get("figures", {}):
            return []
        self.commits = list(dict.fromkeys([*self.commits, *record["commits"]]))
        return record["figures"][name]

    def write(self) -> None:
        """Write what has been measured, a figure a line."""
        self.commits = list(dict.fromkeys([*self.commits, self.commit]))
        ran = {"commits": self.commits, "torch": torch.__version__, "device": self.device}
        facts = {"claim": self.claim, **self.terms, **ran}
        lines = [f"{json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts.items()]
        figures = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in self.figures.items()]
        lines.append('"figures": {\n' + ",\n".join(figures) + "\n}")
        with cli.replacing(self.path) as path:
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @cached_property
    def commit(self) -> str:
        """The name of this state of the code; "unknown" where nobody and no git tells."""
        if self.config.commit or not shutil.which("git"):
            return self.config.commit or "unknown"
        told = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        return told.stdout.strip() or "unknown"

    def values(self, name: str) -> list[list[float]]:
        """A figure for each seed and scene. LookupError if a seed is missing."""
        if len(self.figures[name]) < len(self.seeds):
            raise LookupError(f"{name} was measured for {len(self.figures[name])} of {len(self.seeds)} seeds")
        return self.figures[name]

    def each(self, name: str, median: bool = True) -> list[float]:
        """A figure for each seed: the median, or the mean, over the scenes."""
        return [(statistics.median if median else statistics.fmean)(values) for values in self.values(name)]

    def middle(self, name: str, median: bool = True) -> float:
        """A figure over all scenes and seeds: the mean over the seeds of `each`."""
        return statistics.fmean(self.each(name, median))

    def spread(self, name: str, median: bool = True) -> float:
        """The standard deviation over the seeds of `each`."""
        return statistics.pstdev(self.each(name, median))

    def luck(self, names: Iterable[str]) -> float:
        """The standard deviation of the logarithm of a figure over trainings that differ in their seed alone."""
        return statistics.stdev(math.log(np.median(np.concatenate(self.values(name)))) for name in names)

    def below(self, a: str, b: str, median: bool = True, factor: float = 1.0, luck: float = 0.0) -> bool | None:
        """Whether figure `a` is below `factor` times `b`; None if its scenes cannot tell.

        A paired bootstrap: scenes are drawn anew, with replacement and with both their values, two thousand times.
        They tell it if all but one in forty of the draws agree, which is a two-sided test at 5 %. With `luck`, where
        the two come from trainings of their own, each draw has other luck with either.
        """
        pairs, random = np.array([np.concatenate(self.values(name)) for name in (a, b)]), np.random.default_rng(0)
        drawn = pairs[:, random.integers(pairs.shape[1], size=(2000, pairs.shape[1]))]
        low, high = (np.median if median else np.mean)(drawn, axis=2) * np.exp(random.normal(0, luck, (2, 2000)))
        least, most = np.quantile(factor * high - low, (0.025, 0.975))
        return True if least > 0 else False if most < 0 else None

    def told(self, name: str, unit: str = "px", median: bool = True) -> str:
        return f"{self.middle(name, median):.2f} ± {self.spread(name, median):.2f} {unit}"


@lru_cache
def digest(model: str, pattern: str) -> str:
    """A fingerprint of those weights in a model's folder that match a pattern."""
    found = hashlib.sha256()
    for path in sorted(Path(model).glob(f"{pattern}.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def every(verdicts: Iterable[bool | None]) -> bool | None:
    """Whether all of these hold; None if none fails, but some cannot be told."""
    known = set(verdicts)
    return False if False in known else None if None in known else True


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let other processes of this machine that come to the same path wait (not on Windows, which lacks such locks)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def sheet(path: Path | str, title: str, height: float) -> Iterator["Figure"]:
    """A figure to be drawn on, which is then written as a PNG for a page's width.

    title: what the figure says; height: in inches, of which it is 8 wide, so letters are 10 pt at 800 px.
    """
    from matplotlib import figure, style

    with style.context([*plots.STYLE, {"font.size": 10}]):
        drawn = figure.Figure(figsize=(8, height), layout="constrained")
        drawn.suptitle(title, x=0.01, ha="left", fontsize=13, color="#222222")
        yield drawn
        with cli.replacing(path) as out:
            drawn.savefig(out, dpi=200, metadata={"Software": None})


@contextmanager
def page(path: Path | str, title: str, widths: Sequence[float] = (1,), height: float = 3.6) -> Iterator[Sequence]:
    """Axes side by side on a `sheet`, as wide in proportion as `widths`."""
    with sheet(path, title, height) as drawn:
        yield drawn.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
