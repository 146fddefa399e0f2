"""The house: which files stand where, which way imports run, and how long things may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IDEA, SEVEN = ("vta", "flow", "tasks", "lora"), ("vta", "flow", "tasks", "lora", "model", "sample", "train")
# Each imports from its own floor and from those before it.
FLOORS = ("support", "wan", "seven", "toy", "paper", "play", "benchmarks")
NEVER = {  # what a file must not import, besides what its floor forbids
    "vta": SEVEN, "flow": SEVEN, "tasks": ("model", "lora", "sample", "train"), "lora": ("sample", "train"),
    "model": ("sample", "train", "lora", "flow", "tasks"), "train": ("sample",), "sample": ("train",),
}  # fmt: skip


def _modules() -> dict[str, Path]:
    """Our modules by their dotted names, without tests."""
    files = [*ROOT.glob("*.py"), *(path for floor in FLOORS for path in ROOT.glob(f"{floor}/*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


MODULES = _modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def _imports(tree: ast.AST) -> set[str]:
    """Which of our modules a tree imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


ARROWS = {name: _imports(tree) - {name} for name, tree in TREES.items()}
# Of the paper's claims each stands alone, and the page only uses what is there.
HOUSE = [name for name in MODULES if not name.startswith(("paper.", "play.", "benchmarks."))]


def _floor(name: str) -> int:
    return FLOORS.index(name.partition(".")[0]) if "." in name else FLOORS.index("seven")


def _lines(*names: str) -> int:
    return sum(len(MODULES[name].read_text(encoding="utf-8").splitlines()) for name in names)


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_the_top_level_is_the_seven_files_of_the_paper():
    assert {name for name in MODULES if "." not in name} == set(SEVEN)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    assert all(_floor(other) <= _floor(name) for other in ARROWS[name]), ARROWS[name]
    assert not ARROWS[name].intersection(NEVER.get(name, ()))


def test_the_idea_needs_no_network():
    """But for the command of lora.py, which compares a file with a model, nothing there knows one."""
    for name in IDEA:
        body = [node for node in TREES[name].body if not isinstance(node, ast.If)]
        assert "model" not in _imports(ast.Module(body, [])), name


def test_imports_make_no_circles():
    left = dict(ARROWS)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_there_are_few_imports():
    """Each is a reason to open another file while reading one."""
    assert sum(len(others) for name, others in ARROWS.items() if name in HOUSE) <= 68


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_are_short(name):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in _functions(TREES[name]) if f.end_lineno - f.lineno + 1 > 60}
    assert not long


@pytest.mark.parametrize("name", sorted(MODULES))
def test_public_functions_say_what_they_take_and_give(name):
    public = [node for node in TREES[name].body if not getattr(node, "name", "_").startswith("_")]
    public += [node for kind in public if isinstance(kind, ast.ClassDef) for node in kind.body]
    for function in (node for node in public if isinstance(node, ast.FunctionDef) and node.name[0] != "_"):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [a.arg for a in every if a and a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare and function.returns is not None, f"{function.name}: {bare or 'what it returns'}"


def test_the_training_loop_is_short():
    loops = [node for f in _functions(TREES["train"]) if f.name == "train" for node in ast.walk(f)]
    loops = [node.end_lineno - node.lineno + 1 for node in loops if isinstance(node, (ast.For, ast.While))]
    assert loops and max(loops) <= 30


def test_the_method_is_short():
    assert _lines(*IDEA) <= 420 and _lines(*SEVEN) <= 1500
    assert _lines(*SEVEN, "wan.vae", "wan.text", "wan.checkpoint", "wan.names") <= 2800


def test_the_house_is_small():
    """All but the paper's claims, the page to play with, tests and benchmarks."""
    assert _lines(*HOUSE) <= 6471
