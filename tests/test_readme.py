"""README.md: its commands run, its edits apply, its paths and flags exist, and its numbers are those of the code.

How its commands are run, in their order, in a copy of what they need (the code, `clips/`, `checkpoints/`):

    ```sh     `python FILE.py ...` as it stands, in this process, with modules loaded anew from the copy. Two would
              take minutes, and get the flags of `SHORTER` on top: train.py two steps without validation, toy.world two
              clips.
              What sets up or tests (make, venv, activate, pip, ruff, pytest) is not run; its target or file must exist.
    ```diff   an edit of the file that it names: applied to the copy for the next block, then undone.
    ```python run as it stands.
    ```text   commands that need downloads or files of the reader's: their flags are parsed, nothing is run.
"""

import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from small import call, opened

import flow
import sample
import tasks
import train
from paper import ablation, context, efficiency, end_latent, history, lab, retake, stream, vbench, vector, zero_shot
from play.__main__ import PlayConfig
from support import cli, dataset, records, report
from toy import grow, judge, world
from wan import checkpoint, lora_files

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    "sample.py": sample.SampleConfig, "train.py": train.TrainConfig, "tasks.py": tasks.Config,
    "lora.py": lora_files.LoRAConfig, "-m toy.world": world.WorldConfig, "-m toy.grow": grow.TinyConfig,
    "-m toy.judge": judge.JudgeConfig, "-m support.report": report.ReportConfig,
    "-m paper": lab.Config, "-m paper.vbench": vbench.Config, "-m play": PlayConfig,
}  # fmt: skip
SHORTER = {"train.py": ["--steps", "2", "--val-every", "0"], "-m toy.world": ["--count", "2"]}
PACKAGES = ("wan", "support", "toy", "paper", "play")
OTHERS_FLAGS = {"--index-url", "--nproc-per-node"}  # of pip and torchrun

# Named in the README, but made by its commands or by the reader, or part of other people's folders.
MADE_IN = ("outputs/", "runs/", "data/world", ".cache/")
MADE = {
    "a.mp4", "a.txt", "metadata.csv", "metadata.jsonl", "metrics.jsonl", "lora.safetensors", "filmstrip.png",
    "best.safetensors", "report.html", "videos.txt", "prompts.txt", "~/.cache/nanopusa",
    "media → vae/text → flow(model(vta)) → vae → media",
}  # fmt: skip
SUFFIXES = (".py", ".txt", ".toml", ".md", ".png", ".gif", ".mp4", ".json", ".jsonl", ".csv", ".safetensors")


class Block(NamedTuple):
    heading: str
    kind: str
    text: str
    edits: tuple[str, ...]  # the ```diff blocks right before it


def _blocks() -> list[Block]:
    found, edits, heading = [], (), ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", README, re.M | re.S):
        heading = match[1] or heading
        if match[2] == "diff":
            edits += (match[3],)
        elif match[2]:
            found.append(Block(heading, match[2], match[3], edits))
            edits = ()
    assert not edits, "an edit is followed by no block that tries it"
    return found


BLOCKS = _blocks()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
CODE = re.findall(r"`([^`\n]+)`", PROSE)


def _cases(*kinds: str) -> list:
    chosen = [block for block in BLOCKS if block.kind in kinds]
    return [pytest.param(b, id=f"{i:02d}-{b.heading.lower().replace(' ', '-')}") for i, b in enumerate(chosen)]


# Commands


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("clips", "checkpoints", *PACKAGES):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".cache", "__pycache__"))
    return folder


@contextlib.contextmanager
def _edited(folder: Path, edits: tuple[str, ...]):
    """Files of the folder changed as ```diff blocks say, and put back."""
    originals = {}
    try:
        for edit in edits:
            first, *lines = edit.splitlines()
            assert first.startswith("--- "), f"a diff block must begin with the name of its file, got {first!r}"
            path = folder / first[4:]
            text = originals.setdefault(path, path.read_text(encoding="utf-8"))
            before = "".join(line[1:] + "\n" for line in lines if line[0] != "+")
            after = "".join(line[1:] + "\n" for line in lines if line[0] != "-")
            assert text.count(before) == 1, f"{path.name} has these lines {text.count(before)} times:\n{before}"
            path.write_text(text.replace(before, after), encoding="utf-8")
        yield
    finally:
        for path, text in originals.items():
            path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _as_a_process(folder: Path, monkeypatch):
    """The folder as working directory and first place of modules, none of which is loaded yet; yields its output."""
    ours = {path.stem for path in folder.glob("*.py")} | set(PACKAGES)

    def unload() -> dict:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in ours}

    loaded = unload()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            yield out
    finally:
        unload()
        sys.modules.update(loaded)


def _check_setup(words: list[str]) -> bool:
    """Whether a line only sets up or tests; then what it names exists."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), words
        return True
    if words[:2] == ["pip", "install"]:
        pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        assert (ROOT / words[3]).is_file() if words[2] == "-r" else words[2] in pinned, words
        return True
    return words in (["python", "-m", "venv", ".venv"], ["source", ".venv/bin/activate"])


def _command(words: list[str]) -> tuple[str, list[str]]:
    """A key of `CONFIGS` and the arguments, of `python FILE.py ...` or `python -m PACKAGE.MODULE ...`."""
    assert words[0] == "python", words
    return (f"-m {words[2]}", words[3:]) if words[1] == "-m" else (words[1], words[2:])


@pytest.mark.parametrize("block", _cases("sh"))
def test_commands_run(block, copy, monkeypatch):
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if _check_setup(words):
            continue
        command, argv = _command(words)
        assert command in CONFIGS, f"no rule how to try {line!r}"
        with _edited(copy, block.edits), _as_a_process(copy, monkeypatch) as out:
            monkeypatch.setattr(sys, "argv", [command.split()[-1], *argv, *SHORTER.get(command, [])])
            try:
                if command.startswith("-m "):
                    runpy.run_module(command[3:], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(copy / command), run_name="__main__")
            except SystemExit as end:
                pytest.fail(f"{line}\nended with status {end.code}; its sentence is in the captured stderr")
        files = [name for name in out.getvalue().splitlines() if name.startswith(("outputs", "runs"))]
        silent = command in ("tasks.py", "-m toy.world") or "--dry-run" in words
        assert files or silent, f"{line}\nnames no file it wrote"
        for name in files:
            assert (copy / name).exists(), f"{line}\nnames {name}, which is not there"


def test_a_run_from_its_json_gave_the_same_video(copy):
    first, second = (copy / "outputs" / f"{name}.mp4" for name in ("first", "second"))
    if not first.exists():
        pytest.skip("the commands of the README were not run before this test")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("block", _cases("python"))
def test_python_runs_and_prints_what_its_comments_say(block, copy, monkeypatch):
    with _edited(copy, block.edits), _as_a_process(copy, monkeypatch) as out:
        exec(compile(block.text, "README.md", "exec"), {"__name__": "readme"})
    said = re.findall(r"^print\(.*\)  # (\S+)$", block.text, re.M)
    assert said and out.getvalue().splitlines()[: len(said)] == said


@pytest.mark.parametrize("block", _cases("text"))
def test_commands_that_are_not_run_have_flags_that_exist(block):
    for line in block.text.splitlines():
        if line.startswith("python "):
            command, argv = _command(shlex.split(line))
            cli.parse(CONFIGS[command], "README", argv)


def test_every_block_is_of_a_kind_that_is_tried():
    assert {block.kind for block in BLOCKS} == {"sh", "python", "text", "bibtex"}


def test_commands_in_the_text_exist():
    known = {"ruff check .", "python -m pytest"}
    for code in CODE:
        words = code.split()
        if words[0] == "python" and code not in known:
            assert _command(words)[0] in CONFIGS, code
        elif words[0] in ("make", "pip"):
            assert _check_setup(words), code


def test_every_flag_exists():
    fields = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)} | {"help"}
    flags = {"--" + name.replace("_", "-") for name in fields} | OTHERS_FLAGS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert len(named) > 20 and named <= flags, named - flags


# Paths


def test_every_path_exists():
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"(?:src|href)=\"([^\"]+)\"", README)
    named = [link for link in links if not link.startswith(("http", "#"))]
    for code in CODE:
        is_path = re.fullmatch(r"[\w./-]+", code) and (code.endswith((*SUFFIXES, "/")) or code.count("/"))
        if is_path and code not in MADE and not code.startswith(MADE_IN) and not code.startswith("."):
            named.append(code)
    named += [word.partition("@")[0] for word in re.findall(r"(?:clips|checkpoints)/[\w./@-]*", README)]
    missing = sorted({name for name in named if not (ROOT / name.partition(":")[0]).exists()})
    assert len(named) > 40 and not missing, f"the README names {missing}, which the repository does not have"


def test_the_tree_is_that_of_the_repository():
    tree = next(block.text for block in BLOCKS if block.heading == "Files")
    lines, named, folder = [line for line in tree.splitlines() if line], [], ""
    for line in lines:
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name if name.endswith("/") else ""
        named.append(folder + name if line.startswith(" ") else name)
    assert all((ROOT / name).exists() for name in named), named
    for package in PACKAGES:
        inside = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
        assert inside == {name.removeprefix(f"{package}/") for name in named if name.startswith(f"{package}/")} - {""}
    try:
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository: what else it has cannot be told from what the reader made")
    top = {path.partition("/")[0] for path in tracked if not path.startswith(".")}
    assert top <= {name.partition("/")[0] for name in named} | {"README.md"}


def test_every_task_has_its_pictures_and_its_command():
    shown = re.findall(r"assets/([\w-]+)\.gif", README)
    beside = [name for task in ("i2v", "extend", "complete") for name in (task, f"{task}-base")]
    assert shown == [*tasks.TASKS, *beside]
    assert re.findall(r"assets/tau/([\w-]+)\.png", README) == list(tasks.TASKS)
    block = next(block.text for block in BLOCKS if block.heading == "The tasks")
    assert re.findall(r"--task ([\w-]+)", block) == list(tasks.TASKS)


def test_the_gallery_is_made_by_the_commands_that_are_shown():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$$", "$")
    script = re.search(r"sed -n '[^']*' README\.md", recipe)[0].replace("\\\n", "")
    printed = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    block = next(block.text for block in BLOCKS if block.heading == "The tasks")
    for line, command, task in zip(printed.splitlines(), block.splitlines(), tasks.TASKS, strict=True):
        assert line == f"{command} --mark --overwrite --out assets/{task}.gif"
        made = records.read(ROOT / f"assets/{task}.json", sample.SampleConfig)
        shown = cli.parse(sample.SampleConfig, "README", shlex.split(command)[2:])
        assert made.mark and made.task == task and shown.prompt in (None, made.prompt), "make gallery"
        assert (made.image, made.video) == (tuple(shown.image or ()), tuple(shown.video or ())), "make gallery"


def test_the_environment_is_entered_before_the_first_command():
    lines = [line for block in BLOCKS if block.kind == "sh" for line in block.text.splitlines()]
    first = next(n for n, line in enumerate(lines) if line.startswith("python sample.py"))
    assert "source .venv/bin/activate" in lines[:first]


def test_no_command_has_a_comment():
    """The shell of macOS takes no comments in what is pasted."""
    assert not [block.text for block in BLOCKS if block.kind == "sh" and "#" in block.text]


# Words and numbers


def test_the_method_is_that_of_flow():
    block = next(block.text for block in BLOCKS if block.heading == "The method in five lines")
    assert len(block.splitlines()) == 5
    for line in block.splitlines():
        assert line in flow.__doc__


def test_the_table_of_tasks_is_that_of_the_code():
    for name, task in tasks.TASKS.items():
        noise = ", ".join(f"{m:g}" for m in task.noise)
        assert f"| `{name}` | {task.given} | {noise}{' ' if noise else ''}| <img" in README


def test_the_table_of_presets_is_that_of_the_code():
    def cell(steps, shift, guidance, guidance_2=None, **_):
        both = f"{guidance:g}" + (f" and {guidance_2:g}" if guidance_2 else "")
        return f"{steps} steps, shift {shift:g}, guidance {both}"

    pusa = cell(**dataclasses.asdict(checkpoint.Preset()))
    for model, name, size in (
        (checkpoint.SMALL, "Wan2.1 1.3B", "832x480"),
        (checkpoint.LARGE, "Wan2.1 14B", "1280x720"),
        (checkpoint.TWO_EXPERTS, "Wan2.2 A14B", "1280x720"),
    ):
        others = " | ".join(cell(**preset[model]) for preset in checkpoint.PRESETS.values())
        assert f"| {name} | {size} | {pusa} | {others} |" in README


@pytest.mark.parametrize("model, name", [(checkpoint.SMALL, "Wan2.1 1.3B"), (checkpoint.LARGE, "Wan2.1 14B")])
def test_the_table_of_memory_is_that_of_a_dry_run(model, name):
    told = call(sample, "--task", "t2v", "--model", model, "--size", "832x480", "--dtype", "bfloat16", "--dry-run").out
    whole, offloaded = (re.findall(r"(\S+ [GM]iB)", line) for line in told.splitlines()[-3:-1])
    assert f"| {name} | {' | '.join([*whole, offloaded[1]])} |" in README


def test_the_evaluation_is_that_of_the_model():
    block = re.search(r"<!-- evaluation -->\n(.*?)\n<!-- /evaluation -->", README, re.S)[1].strip()
    judged = (ROOT / "checkpoints" / "tiny" / "README.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in judged.splitlines() if line.startswith("|"))
    assert block == table, "put the table of checkpoints/tiny/README.md between the README's evaluation comments"


def test_the_table_of_claims_is_that_of_the_report():
    block = re.search(r"<!-- paper -->\n(.*?)\n<!-- /paper -->", README, re.S)[1].strip().splitlines()
    report = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").partition("\n## ")[0]
    lines = [line.rsplit("|", 2) for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    first = {command.split()[-1].strip("`"): f"{told}|" for told, command, _ in lines}
    head, waiting = first.pop("command"), [name for name, row in first.items() if "|  | not run" in row]
    told = [row for name, row in first.items() if name not in waiting]
    told = [head, "| --- | --- | --- | --- |", *told] if told else []
    if waiting:
        told += [""] * bool(told) + [f"Not run yet, or not to the end: {', '.join(f'`{name}`' for name in waiting)}."]
    assert block == told, "`python -m paper` writes both"


def test_the_tables_of_what_was_measured_are_those_of_their_claims():
    def told(bench, name, unit="", digits=1, median=True):
        return f"{bench.middle(name, median):.{digits}f} ± {bench.spread(name, median):.{digits}f}{unit}"

    bench = lab.Lab(lab.Config(), "history")
    for weights in history.WEIGHTS:
        errors = " | ".join(told(bench, f"{task} {{}} {{}}".format(*weights), " px") for task in history.TASKS)
        assert "| {}, {} | {} | {} |".format(*weights, sample.passes_a_step(*weights), errors) in README
    bench = lab.Lab(lab.Config(), "context")
    for n, share in enumerate(context.SHARES):
        errors = " | ".join(told(bench, names[n], " px") for names in context.pairs("embedded").values())
        assert f"| {share:g} | {errors} |" in README
    bench = lab.Lab(lab.Config(), "vector")
    for network, label in vector.NETWORKS.items():
        for heard in (vector.RIGHT, vector.SCALARS[0]):
            errors = " | ".join(told(bench, f"{task}, {network}: {heard}", " px") for task in vector.TASKS)
            assert f"| {label} | {heard} | {errors} |" in README
    bench = lab.Lab(lab.Config(), "stream")
    kinds = ("error", " px"), ("shapes", " %")
    for second in (2, 4, 30):
        names = [(f"{way}: {kind} at {second} s", unit) for kind, unit in kinds for way in stream.METHODS]
        assert f"| {second} s | {' | '.join(told(bench, name, unit, median=False) for name, unit in names)} |" in README
    bench = lab.Lab(lab.Config(), "retake")
    for strength in retake.STRENGTHS:
        error, likeness = (f"embedded {strength:g}: {figure}" for figure in retake.FIGURES)
        assert f"| {strength:g} | {told(bench, error, ' px')} | {told(bench, likeness, ' dB')} |" in README
    bench = lab.Lab(lab.Config(), "end_latent")
    for end in end_latent.ENDS:
        kept, flash, error = (f"start-end, {end}: {figure}" for figure in end_latent.FIGURES)
        row = f"| `{end}` | {told(bench, kept, ' dB')} | {told(bench, flash, digits=2)} | {told(bench, error, ' px')} |"
        assert row in README


def test_captions_in_commands_are_those_of_the_toy_world():
    words = {word for scene in world.scenes(500, seed=0) for word in scene.caption.split()}
    prompts = re.findall(r'--prompt "([^"]+)"', "".join(block.text for block in BLOCKS if block.kind == "sh"))
    for prompt in prompts:
        assert set(prompt.split()) <= words, f"the embedded model does not know every word of {prompt!r}"


def test_every_number_is_that_of_the_code():
    wan, own = checkpoint.Preset(), opened(ROOT / "checkpoints" / "tiny").preset
    size = sum(path.stat().st_size for path in (ROOT / "checkpoints" / "tiny").rglob("*") if path.is_file())
    assert size < 16 * 10**6 and len(dataset.find_clips(ROOT / "clips")) == 16
    assert own.noise == 0 and grow.VAE.patch_size == 2 and grow.TRANSFORMER.text_len == 32
    first, second = ("vta", "flow", "tasks", "lora"), ("model", "sample", "train")
    idea, machine = (
        sum(len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in names)
        for names in (first, second)
    )
    bench = lab.Lab(lab.Config(), "history")
    after, before = (bench.middle("keyframes {} {}".format(*w)) for w in (history.DEFAULT, history.PLAIN))
    titled = lab.Lab(lab.Config(), "efficiency")
    pusa, finetune = (titled.middle(f"{way}, {n[-1]} steps") for way, n in efficiency.budgets(titled).items())
    base, _, kept, lost = (titled.middle(f"T2V: {name}", median=False) for name in efficiency.T2V)
    assert 0.2 < efficiency.ratio(titled).told < 0.3 and 3.5 < pusa / finetune < 4.5
    against = [zero_shot.nearer(lab.Lab(lab.Config(), "zero_shot"), base) for base in (zero_shot.BASE, zero_shot.FLAT)]
    assert [[*each.values()].count(True) for each in against] == [len(against[0]), 0] == [6, 0]
    bench = lab.Lab(lab.Config(), "ablation")
    curves = ablation.curves(bench)
    strength, noise, *best = (ablation.best(bench, curves[n]) for n in ("rank 32", "noise", "sampling", "p_async"))
    assert best == [10, 1]
    spoilt = bench.middle(curves["strength, t2v"][strength].name, median=False)
    usual, two = (bench.middle(run.name) for run in (ablation.Run(), curves["two levels"][0]))
    facts = (
        f"strength {strength:g} (but text-to-video then\nfalls to {spoilt:.0f} %), noise {noise:g} on the image",
        f"two levels alone do not help at {lab.STEPS} steps",
        f"({two:.1f} instead of {usual:.1f} px in `i2v`)",
        f"({finetune:.1f} against {pusa:.1f} px)",
        f"({kept:.0f} % as prompted, where the finetune falls from {base:.0f} to {lost:.0f} %",
        f"{after:.1f} instead of {before:.1f} px",
        f"in {idea} lines",
        f"in {machine:,} lines",
        "less than 16 MB",
        "sixteen captioned clips",
        f"{own.size[0]}x{own.size[1]} pixels, {own.frames} frames at {own.fps:g} a second",
        f"{wan.frames} frames at {wan.fps:g} fps",
        "published for them: 1.4, but 1.5 into",
        "merged at 1 unless",
        "examples are of 832x480",
        "({} and {})".format(*(m.replace(",", ", ") for m in checkpoint.NOISE[checkpoint.TWO_EXPERTS].values())),
    )
    text = README
    for fact in facts:
        assert fact in text, fact
        text = text.replace(fact, "")
    # What is left of digits must be a name, a symbol's definition, a task's noise, or an address.
    apart = r"<!-- evaluation -->.*?<!-- /evaluation -->|^```.*?^```$|^\|.*?$|`[^`\n]+`|<img [^>]*>"
    text = re.sub(apart, "", text, flags=re.M | re.S)
    names = (
        "https://huggingface.co/RaphaelLiu/PusaV1", "https://huggingface.co/RaphaelLiu/Pusa-Wan2.2-V1",
        "https://huggingface.co/lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v", "LightX2V", "TI2V",
        "https://arxiv.org/abs/2410.03160", "arXiv 2410.03160",
        "https://arxiv.org/abs/2507.16116", "PUSA V1.0", "Wan2.1", "Wan2.2", "umT5", "fp32", "Python 3.10", "14B",
        "Apache License 2.0", "folds pixels 2x2", "causal 3D", "(n + 3) // 4", "8x8 pixels", "arXiv 2502.06764",
        "https://arxiv.org/abs/2502.06764", "NVIDIA H200", "torch 2.11", "arXiv 2509.25161", "arXiv 2509.22622",
        "https://arxiv.org/abs/2407.01392", "arXiv 2407.01392", "https://arxiv.org/abs/2509.25161", "https://arxiv.org/abs/2509.22622",
    )  # fmt: skip
    for name in names:
        text = text.replace(name, "")
    left = [line for line in text.splitlines() if re.search(r"\d", re.sub(r"^\*\*\d\.", "", line))]
    assert not left, f"numbers that no test compares with the code: {left}"
