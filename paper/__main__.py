"""Rerun the paper, claim by claim: `python -m paper`, or `python -m paper NAME`; `--quick` takes minutes.

Each claim is one file beside this one. It measures, and keeps what it trains in runs/paper/ and what it measures in
paper/results/NAME.json; a run that is stopped goes on. Pictures, `docs/reproduction.md` and the table in README.md are
made from those files alone. A claim that ends in an error does not stop the others.

    python -m paper ablation vector            two claims
    python -m paper train --only rank-4        one training; several processes may share the folders
    python -m paper vector --measure           numbers alone, no pictures and no report
"""

import dataclasses
import importlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from paper import lab
from support import cli

CLAIMS = (
    "efficiency", "quality", "zero_shot", "preservation", "ablation", "mechanism", "schedules", "price", "vector",
    "history", "context", "stream", "retake", "end_latent",  # beyond the paper
)  # fmt: skip
HOLDS = {True: "yes", False: "no", None: "cannot be told"}
HEAD = ["claim", "the paper", "here", "holds"]
PAGE = """# The paper, claim by claim

`python -m paper` writes this page from `paper/results/`; `python -m paper.vbench`, for the published weights, is apart.
Each of the seeds makes its share of the scenes. A figure is the median over the scenes of a seed (the mean for shares
of clips, scores, diversity and streams), averaged over the seeds, ± its standard deviation over them, of scenes and
noise alike. What is compared has the same scenes and noise. Each claim's file says under `rows` when it holds: most
must hold as well if the scenes are drawn anew (a paired bootstrap, two-sided, at 5 %). Where that is open, it cannot be
told. That speaks of the networks that were trained, which is one of a kind where nothing else is said: `efficiency` and
`ablation` alone allow for the luck of a training.
"""
Line = list[str]  # a row of a table, as long as its head


def run(config: lab.Config) -> list[str]:
    """Measure the claims of the config, or all, and tell of them; returns the names of those that failed."""
    failed = []
    for name in config.names or CLAIMS:
        done = attempt(measure, config, name)
        if not config.measure:
            done &= attempt(draw, config, name) & attempt(report, config)
        failed += [] if done else [name]
    return failed


def attempt(action: Callable[..., None], *arguments: lab.Config | str) -> bool:
    """Whether an action came to its end; if it failed, what went wrong is printed."""
    try:
        action(*arguments)
    except Exception:
        traceback.print_exc()
        return False
    return True


def measure(config: lab.Config, name: str) -> None:
    claim(name).measure(lab.Lab(config, name))


def draw(config: lab.Config, name: str) -> None:
    claim(name).draw(lab.Lab(config, name), picture(config, name))


def claim(name: str) -> ModuleType:
    return importlib.import_module(f"paper.{name}")


def picture(config: lab.Config, name: str) -> Path:
    return Path(config.docs) / f"{name}.png"


def report(config: lab.Config) -> None:
    """Write what the results of the folder say: a page with a line and a table for each claim, and a README's lines."""
    benches = {name: lab.Lab(config, name) for name in CLAIMS}
    told = {name: lines(name, bench) for name, bench in benches.items()}
    first, measured = {name: line for name, (line, _) in told.items()}, [name for name in CLAIMS if told[name][1]]
    page = [PAGE, *table([*HEAD, "command"], [[*first[name], f"`python -m paper {name}`"] for name in CLAIMS])]
    for name, bench in benches.items():
        page += ["", f"## {name}", "", claim(name).__doc__.strip(), ""]
        page += [f"![{name}]({name}.png)", ""] if picture(config, name).exists() else []
        page += table(HEAD, told[name][1]) if name in measured else [f"{first[name][2].capitalize()}."]
        if bench.figures:
            seeds, commits = max(map(len, bench.figures.values())), ", ".join(commit[:12] for commit in bench.commits)
            page += ["", f"{bench.scenes} scenes, shared out to {seeds} seeds; measured at {commits}."]
    with cli.replacing(Path(config.docs) / "reproduction.md") as path:
        path.write_text("\n".join(page) + "\n", encoding="utf-8")
    left = [f"Not run yet, or not to the end: {', '.join(f'`{name}`' for name in CLAIMS if name not in measured)}."]
    short = table(HEAD, [first[name] for name in measured]) if measured else []
    fill(Path(config.readme), [*short, *([""] * bool(short)), *(left if len(measured) < len(CLAIMS) else [])])


def lines(name: str, bench: lab.Lab) -> tuple[Line, list[Line]]:
    """What a claim's results say, in one line and in one for each of its rows: none if there is nothing to tell yet."""
    state = "not run"
    if bench.figures:
        try:
            rows = claim(name).rows(bench)
            every = [[row.claim, row.paper, row.ours, HOLDS[row.holds]] for row in rows]
            return [*every[0][:2], rows[0].short or rows[0].ours, every[0][3]], every
        except LookupError:  # a figure is missing
            state = "not run to its end"
    return [claim(name).__doc__.partition("\n")[0], "", state, ""], []


def table(head: Line, body: Sequence[Line]) -> list[str]:
    """The lines of a Markdown table."""
    rows = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in line] for line in body)]
    return [f"| {' | '.join(row)} |" for row in rows]


def fill(readme: Path, short: list[str]) -> None:
    """Put the lines of a table where a README has a place for them; without a place, or a README, nothing happens."""
    start, end = "<!-- paper -->\n", "\n<!-- /paper -->"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if found and closed:
        with cli.replacing(readme) as path:
            path.write_text("".join([before, start, "\n", "\n".join(short), "\n", end, after]), encoding="utf-8")


def apart(config: lab.Config) -> lab.Config:
    """The config of a pass whose figures are not to be kept: temporary folders take the place of the usual ones.

    What is trained for a quick pass is not to be kept either.
    """
    usual, names = lab.Config(), ("results", "docs", "readme", *(("work",) if config.quick else ()))
    moved = [name for name in names if getattr(config, name) == getattr(usual, name)]
    folder = Path(tempfile.mkdtemp(prefix="nanopusa-paper-")) if moved else Path()
    return dataclasses.replace(config, **{name: str(folder / name) for name in moved})


def train(config: lab.Config) -> None:
    """Run the trainings of the config, or all; those that are done are not run again."""
    chosen = config.only.split(",") if config.only else list(lab.TRAININGS)
    for name in chosen:
        cli.expect(name in lab.TRAININGS, f"training {name!r}", f"one of {', '.join(lab.TRAININGS)}")
    bench = lab.Lab(config, "train")
    for name in chosen:
        print(bench.lora(name))


def main() -> None:
    config = cli.parse(lab.Config, __doc__)
    training = list(config.names) == ["train"]
    for name in config.names if not training else ():
        cli.expect(name in CLAIMS, f"claim {name!r}", f"`train` alone, or some of {', '.join(CLAIMS)}")
    cli.expect(training or not config.only, f"--only {config.only} without train", "`python -m paper train --only ...`")
    config = apart(config) if config.quick or config.scenes != lab.Config.scenes else config
    if training:
        return train(config)
    for name in CLAIMS:
        lab.Lab(config, name)  # what is wrong with model, device or results is said once, and at once
    failed = run(config)
    print(config.results if config.measure else Path(config.docs) / "reproduction.md")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command goes on where it stopped")


if __name__ == "__main__":
    cli.run(main)
