"""The notebooks keep their form; nbval notices a changed number; a failing run leaves nothing."""

import copy
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from small import write_small

from onn_workbench.study import Study

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_every_numbered_notebook_has_a_headline_for_the_index(path):
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if "headline" in cell.metadata.get("tags", [])]
    assert [bool(cell.outputs) for cell in tagged] == [True] * path.stem[0].isdigit()


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
    # JupyterLab shows a widget without its state as an error, and else the page that is stored
    assert "widget-view+json" not in path.read_text()


def test_nbval_notices_a_number_changed_in_a_checked_table(tmp_path):
    """The cell stands there twice, once as it is and once with another number."""
    notebook = nbformat.read(FOLDER / "05_report.ipynb", as_version=4)
    stored = "trained parameters of phi-4: 5,570,560"
    found = [n for n, cell in enumerate(notebook.cells) if stored in str(cell.get("outputs"))]
    assert len(found) == 1, "the checked table has another form: plant elsewhere"
    changed = nbformat.from_dict(copy.deepcopy(notebook.cells[found[0]]))
    changed.id = "changed"
    assert changed.outputs[0].text.count(stored) == 1
    changed.outputs[0].text = changed.outputs[0].text.replace(stored, stored[:-1] + "1")
    notebook.cells.insert(found[0] + 1, changed)
    nbformat.write(notebook, tmp_path / "05_report.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "-p", "no:cacheprovider"]
    command += ["--nbval-cell-timeout=100", "05_report.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    n_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    assert done.returncode == 1 and f"1 failed, {n_cells - 1} passed" in done.stdout, done.stdout
    assert "5,570,561" in done.stdout


def runner_of(folder, name, cell):
    """A copy of run.py in `folder` whose quick profile has one notebook with one cell."""
    (folder / "notebooks/params").mkdir(parents=True)
    runner = folder / "notebooks/run.py"
    runner.write_text((FOLDER / "run.py").read_text())
    (folder / "notebooks/params/quick.yaml").write_text(f"{name}: {{}}\n")
    cells = [
        nbformat.v4.new_code_cell("x: int = 1  # help: x", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(cell, metadata={"tags": ["headline"]}),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, folder / f"notebooks/{name}.ipynb")
    return runner


def report_of(runner, profile, monkeypatch):
    """What `python RUNNER PROFILE` ends with, in this process: it need not import all again."""
    monkeypatch.setattr(sys, "argv", [str(runner), profile])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        runpy.run_path(str(runner), run_name="__main__")
    except SystemExit as error:
        return error.code
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_failing_notebook_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    runner = runner_of(tmp_path, "broken", "assert x == 2, 'planted'")
    message = "broken failed in the cell \"assert x == 2, 'planted'\""
    assert message in report_of(runner, "quick", monkeypatch)
    assert not list((tmp_path / "results/quick").iterdir())
    assert "choose one of quick" in report_of(runner, "nightly", monkeypatch)


def test_a_notebook_whose_python_ends_is_named_and_the_report_fails(tmp_path):
    runner = runner_of(tmp_path, "broken", "import os; os._exit(1)")
    done = subprocess.run([sys.executable, runner, "quick"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "broken: its Python was ended" in done.stderr
    assert not list((tmp_path / "results/quick").iterdir())


def test_a_run_leaves_pages_that_stand_alone_and_an_index(tmp_path, monkeypatch):
    cell = "from onn_workbench.figure import Figure, Panel\nprint('loss 5 to 4')\n"
    cell += "Figure([[Panel([], 'x')]], 'a figure')"
    runner = runner_of(tmp_path, "00_quickstart", cell)
    assert report_of(runner, "quick", monkeypatch) is None
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
    assert page.count("<details><summary>code</summary>") == 2  # both inputs are folded
    index = (results / "index.html").read_text()
    assert 'href="00_quickstart.html"' in index and "<strong>loss 5 to 4</strong>" in index
    assert index.count("data:image/png;base64,iVBORw0KGgo") == 1


@pytest.mark.faults
def test_a_report_that_was_killed_goes_on(tmp_path):
    """What it finished, notebooks and runs, is not made again; its numbers are a whole one's."""
    model_dir, data = write_small(tmp_path, n_layers=8)
    values = {"model_dir": str(model_dir), "data": str(data), "output_dir": "../runs"}
    values |= {"n_samples": 16, "layout_seconds": 0.2}
    name, studies = "02_learning_curves", []
    for end in ("whole", "killed"):
        folder = tmp_path / end
        runner = runner_of(folder, "00_first", "open('count', 'a').write('x')")
        shutil.copy(FOLDER / f"{name}.ipynb", folder / "notebooks")
        profile = {"00_first": {}, name: values}
        (folder / "notebooks/params/quick.yaml").write_text(yaml.safe_dump(profile))
        command, first = [sys.executable, runner, "quick"], folder / "runs/4-0/record.json"
        if end == "killed":
            report = subprocess.Popen(command)
            while not first.exists():
                assert report.poll() is None
                time.sleep(0.01)
            for process in [*psutil.Process(report.pid).children(recursive=True), report]:
                process.kill()
                process.wait()
            written = first.stat().st_mtime_ns
            command.append("resume=true")
        subprocess.run(command, check=True)
        assert (folder / "notebooks/count").read_text() == "x"
        assert not (folder / "results/quick/.finished.json").exists()
        studies.append(Study.load(folder / "results/quick/learning_results.json"))
    assert first.stat().st_mtime_ns == written
    whole, resumed = (
        [
            ([step.loss for step in run.steps], run.evals[-1].loss)
            for runs in (study.runs | study.controls).values()
            for run in [*runs, *study.reference]
        ]
        for study in studies
    )
    assert whole == resumed and len(whole) > 8
    assert studies[0].answers == studies[1].answers
