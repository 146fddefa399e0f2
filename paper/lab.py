"""What the claims share: scenes whose truth is exact, LoRAs that are trained once and kept, and what was measured.

A claim is a file with `TITLE`, `measure(lab)`, `draw(lab, path)` and `rows(lab)`. It calls `lab.figure(name, values)`
for every number; what has been measured is in `paper/results/CLAIM.json` at once, so a run that is stopped goes on.
"""

import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import train
from model import Wan
from support import cli
from toy import grow, world
from toy.judge import DETERMINED, Judge, centroid_errors, unseen_scenes
from wan import checkpoint

STEPS, BATCH, RANK = 800, 32, 32  # of a LoRA, unless its name below says otherwise
BUDGETS = (25, 50, 100, 200, 400, 800, 1600, 3200)  # optimizer steps
# Every LoRA that a claim asks for, by its name, and how its training differs from `train.py`'s defaults.
TRAININGS = {
    **{f"steps-{n}": {"steps": n} for n in BUDGETS if n != STEPS},
    **{f"seed-{n}": {"seed": n} for n in (0, 1, 2)},  # seed-0 is Pusa's LoRA wherever nothing else is said
    **{f"rank-{n}": {"rank": n} for n in (2, 8, 128)},
    **{f"async-{n}": {"p_async": n / 100} for n in (0, 25, 50, 75)},
    "two-levels": {"two_levels": True},
}


@dataclass(frozen=True)
class Config:
    names: tuple[str, ...] = cli.option(
        (), "claims, or `train` for the trainings alone (default: all)", nargs="*", positional=True
    )
    quick: bool = cli.option(False, "a few scenes and steps: the order of the outcomes, in minutes")
    model: str = cli.option("checkpoints/tiny", "the embedded model")
    work: str = cli.option("runs/paper", "folder for what is trained")
    results: str = cli.option("paper/results", "folder for what is measured")
    docs: str = cli.option("docs", "folder for the pictures and the report")
    only: str | None = cli.option(None, "with `train`: the names of the trainings, as in rank-2,rank-8")
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")


class Row(NamedTuple):
    """A line of the report."""

    claim: str
    paper: str  # the paper's figure
    ours: str
    holds: bool | None  # None: cannot be told at this scale


class Lab:
    """One claim's bench: its models, its scenes and what it has measured."""

    def __init__(self, config: Config, claim: str):
        self.config, self.claim, self.device = config, claim, cli.pick_device(config.device)
        self.opened = checkpoint.open(config.model, Wan)
        self.scenes, self.seeds = (32, (0,)) if config.quick else (256, (0, 1, 2))
        self.path = Path(config.results) / f"{claim}.json"
        self.figures: dict[str, list[list[float]]] = {}  # by name, for each seed the value of every scene
        if self.path.exists():
            record = json.loads(self.path.read_text(encoding="utf-8"))
            if record["scenes"] == self.scenes:
                self.figures = record["figures"]

    @cached_property
    def judge(self) -> Judge:
        """Scenes that neither training nor any choice of settings has seen, three in four with one shape."""
        return Judge(self.opened, unseen_scenes(self.scenes, seed=100), self.device)

    def lora(self, name: str) -> Path:
        """The file of a LoRA of `TRAININGS`, which is trained now if it has not been."""
        out = Path(self.config.work) / ("quick" if self.config.quick else "") / name
        if not (out / "lora.safetensors").exists():
            settings = {"steps": STEPS, "batch": BATCH, "rank": RANK} | TRAININGS[name]
            settings["steps"] = max(2, settings["steps"] // 20) if self.config.quick else settings["steps"]
            count, folder = 200 if self.config.quick else 6000, Path(self.config.work)
            train.train(
                train.TrainConfig(
                    data=str(folder), model=self.config.model, out=str(out), device=self.device,
                    resume=(out / "settings.json").exists(), val_every=10**6, **settings,
                ), partial(grow.rendered_clips, count=count, folder=folder),
            )  # fmt: skip
        return out / "lora.safetensors"

    def pusa(self, name: str = "seed-0", strength: float = 1.0) -> Wan:
        """The embedded base with a LoRA of `TRAININGS` merged."""
        return self.judge.transformer(self.lora(name), strength)

    def error(self, network: nn.Module, task: str, seed: int, **settings) -> Tensor:
        """For each scene, the mean distance in pixels of its shapes from where the conditions say they must be."""
        readings = world.measure(self.judge.videos(network, task, seed, **settings))
        return centroid_errors(self.judge.scenes, readings, DETERMINED[task]).mean(1)

    def figure(self, name: str, values: Callable[[int], Tensor]) -> None:
        """Measure values(seed) → (scenes,) for every seed, unless they have been measured, and write them."""
        done = self.figures.setdefault(name, [])
        for seed in self.seeds[len(done) :]:
            done.append([round(value, 3) for value in values(seed).tolist()])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
            facts = {"claim": self.claim, "scenes": self.scenes, "seeds": list(self.seeds), "commit": commit}
            cli.write_json(self.path, facts | {"torch": torch.__version__, "figures": self.figures})
            print(f"{self.claim}: {name}, seed {seed}: {self.told(name)}", flush=True)

    def each(self, name: str, median: bool = True) -> list[float]:
        """A figure for each seed: the median, or the mean, over the scenes."""
        return [(statistics.median if median else statistics.fmean)(values) for values in self.figures[name]]

    def middle(self, name: str, median: bool = True) -> float:
        """A figure over all scenes and seeds: the mean over the seeds of `each`."""
        return statistics.fmean(self.each(name, median))

    def spread(self, name: str, median: bool = True) -> float:
        """The standard deviation over the seeds of `each`."""
        return statistics.pstdev(self.each(name, median))

    def told(self, name: str, unit: str = "px", median: bool = True) -> str:
        return f"{self.middle(name, median):.2f} ± {self.spread(name, median):.2f} {unit}"
