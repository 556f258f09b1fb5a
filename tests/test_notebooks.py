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


@pytest.mark.parametrize(("planted", "status"), [("5,570,560", 0), ("5,570,561", 1)])
def test_nbval_notices_a_number_changed_in_a_checked_table(planted, status, tmp_path):
    text = (FOLDER / "05_report.ipynb").read_text()
    stored = ["trained parameters of phi-4: 5,570,560", "trained parameters of phi-4: " + planted]
    assert text.count(stored[0]) == 1, "the checked table has another form: plant elsewhere"
    (tmp_path / "05_report.ipynb").write_text(text.replace(*stored))
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "-p", "no:cacheprovider"]
    command += ["--nbval-cell-timeout=100", "05_report.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert status == 0 or planted in done.stdout


def runner_of(folder, name, cell):
    """A copy of run.py in `folder` whose quick profile has one notebook with one cell."""
    (folder / "notebooks/params").mkdir(parents=True)
    runner = folder / "notebooks/run.py"
    runner.write_text((FOLDER / "run.py").read_text())
    (folder / "notebooks/params/quick.yaml").write_text(f"{name}: {{}}\n")
    cells = [
        nbformat.v4.new_code_cell("x: int = 1  # help: x", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(cell),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, folder / f"notebooks/{name}.ipynb")
    return runner


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("assert x == 2, 'planted'", "broken failed in the cell \"assert x == 2, 'planted'\""),
        ("import os; os._exit(1)", "broken: its Python was ended"),
    ],
    ids=["error", "killed"],
)
def test_a_failing_notebook_is_named_and_leaves_nothing(tmp_path, cell, message):
    runner = runner_of(tmp_path, "broken", cell)
    done = subprocess.run([sys.executable, runner, "quick"], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert not list((tmp_path / "results/quick").iterdir())
    unknown = subprocess.run([sys.executable, runner, "nightly"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "choose one of quick" in unknown.stderr


def test_a_run_leaves_pages_that_stand_alone_and_an_index(tmp_path):
    cell = "from onn_core.figure import Figure, Panel\nFigure([[Panel([], 'x')]], 'a figure')"
    runner = runner_of(tmp_path, "00_quickstart", cell)
    done = subprocess.run([sys.executable, runner, "quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "results/quick"
    assert {path.name for path in results.iterdir()} == {
        "00_quickstart.ipynb",
        "00_quickstart.html",
        "index.html",
    }
    page = (results / "00_quickstart.html").read_text()
    assert "data:image/png;base64,iVBORw0KGgo" in page and "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*|@import""", page)
    assert str(tmp_path) not in page + (results / "00_quickstart.ipynb").read_text()
    assert 'href="00_quickstart.html"' in (results / "index.html").read_text()
