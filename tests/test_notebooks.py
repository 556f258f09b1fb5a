"""The notebooks keep their form; nbval notices a changed number; a failing run leaves nothing."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_parameters_are_typed_and_explained(path):
    cells = nbformat.read(path, as_version=4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: (int|float|str|bool) = .+  # help: .+", line), line


@every_notebook
def test_notebook_is_executed_and_small(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(o.output_type == "error" for cell in code for o in cell.outputs)
    assert any("NBVAL_CHECK_OUTPUT" in cell.source and cell.outputs for cell in code)
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize(("planted", "status"), [("4\n", 0), ("5\n", 1)])
def test_nbval_notices_a_changed_number(planted, status, tmp_path):
    output = nbformat.v4.new_output("stream", name="stdout", text=planted)
    source = "# NBVAL_CHECK_OUTPUT\nprint(2 + 2)"
    cell = nbformat.v4.new_code_cell(source, execution_count=1, outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "table.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "table.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("assert x == 2, 'planted'", "broken failed in the cell \"assert x == 2, 'planted'\""),
        ("import os; os._exit(1)", "broken: its Python was ended"),
    ],
    ids=["error", "killed"],
)
def test_a_failing_notebook_is_named_and_leaves_nothing(tmp_path, cell, message):
    (tmp_path / "notebooks/params").mkdir(parents=True)
    runner = tmp_path / "notebooks/run.py"
    runner.write_text((FOLDER / "run.py").read_text())
    (tmp_path / "notebooks/params/quick.yaml").write_text("broken: {}\n")
    cells = [
        nbformat.v4.new_code_cell("x: int = 1  # help: x", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(cell),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, tmp_path / "notebooks/broken.ipynb")
    done = subprocess.run([sys.executable, runner, "quick"], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert not list((tmp_path / "results/quick").iterdir())
    unknown = subprocess.run([sys.executable, runner, "nightly"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "choose one of quick" in unknown.stderr
