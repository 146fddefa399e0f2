"""Rerun the paper, claim by claim: `python -m paper`, or `python -m paper NAME`; `--quick` takes minutes.

Each claim is one file beside this one. It measures, and keeps what it trains in runs/paper/ and what it measures in
paper/results/NAME.json; a run that is stopped goes on. Pictures and `docs/reproduction.md` are made from those files.
"""

import importlib
from pathlib import Path

from paper import lab
from support import cli

CLAIMS = (
    "efficiency", "quality", "zero_shot", "preservation", "ablation", "mechanism", "schedules", "price", "vector",
    "history", "stream",  # beyond the paper
)  # fmt: skip


def main() -> None:
    config = cli.parse(lab.Config, __doc__)
    for name in config.names:
        cli.expect(name in (*CLAIMS, "train"), f"claim {name!r}", f"train, or some of {', '.join(CLAIMS)}")
    if "train" in config.names:
        bench = lab.Lab(config, "train")
        for name in config.only.split(",") if config.only else lab.TRAININGS:
            cli.expect(name in lab.TRAININGS, f"training {name!r}", f"one of {', '.join(lab.TRAININGS)}")
            print(bench.lora(name))
        return
    for name in config.names or CLAIMS:
        claim, bench = importlib.import_module(f"paper.{name}"), lab.Lab(config, name)
        claim.measure(bench)
        claim.draw(bench, Path(config.docs) / f"{name}.png")
    # TODO report


if __name__ == "__main__":
    cli.run(main)
