"""docs/lesson.ipynb runs from top to bottom, as do its solutions, and defines nothing that the seven files define."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSON = ROOT / "docs" / "lesson.ipynb"
CELLS = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
PROSE = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
SOLUTIONS = re.findall(r"<details><summary>Solution</summary>\n\n```python\n(.*?)```.*?</details>", PROSE, re.S)


def _defined(source: str) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and node.name[:2] != "__"}


def test_nothing_is_defined_twice():
    ours = set().union(*(_defined(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")))
    assert not _defined("\n".join(CODE)) - {"forward"} & ours - {"forward"}


def test_it_is_committed_as_it_ran_and_is_small():
    assert LESSON.stat().st_size < 10**6
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8, "its pictures are there to be seen"


def test_its_chapters_and_exercises_are_there():
    listed = re.findall(r"^(\d)\. (.+)$", "".join(CELLS[0]["source"]), re.M)
    assert listed == re.findall(r"^## (\d)\. (.+)$", PROSE, re.M) and len(listed) == 9
    assert len(SOLUTIONS) == len(re.findall(r"^\*\*Exercise \d\.\*\*", PROSE, re.M)) == 3


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_so_do_its_solutions(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("clips", "checkpoints", "support", "wan", "toy", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    lesson = nbformat.read(LESSON, 4)
    lesson.cells += [nbformat.v4.new_code_cell(solution) for solution in SOLUTIONS]
    client = nbclient.NotebookClient(lesson, timeout=1800, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    text = "".join(output.get("text", "") for cell in lesson.cells for output in cell.get("outputs", []))
    assert "equal levels, equal output: True" in text
    off, mine, shipped = map(float, re.search(r"LoRA off (\S+) px, a .* (\S+) px, the .* (\S+) px", text).groups())
    assert shipped < off and mine < off, "the LoRAs learn what the base does not know"
    errors = [float(error) for error in re.findall(r"^p_async \S+: (\S+)$", text, re.M)]
    assert len(errors) == 4 and errors[0] > 2 * errors[-1], "a level for each teaches the plane to complete"
