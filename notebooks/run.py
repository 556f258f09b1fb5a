"""Run the notebooks of a profile through papermill into results/<profile>/.

`run.py PROFILE NAME=VALUE ...` changes parameters of all of them; `resume=true` goes on with a
report that was cut: what it finished is not run again, and the runs of the others continue.
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from jinja2 import DictLoader
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from traitlets.config import Config

from onn_core import record
from onn_workbench import pages, tracking

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
FOLDED = """{%- extends "lab/index.html.j2" -%}
{%- block header -%}{{ super() }}
<style>
summary { color: #666; cursor: pointer; font-size: 0.8rem; margin-left: 5rem }
.jp-RenderedImage img { max-width: 100%; height: auto }
</style>
{%- endblock header -%}
{%- block input_group -%}
<details><summary>code</summary>{{ super() }}</details>
{%- endblock input_group -%}
"""


def execute(path: Path, parameters: dict, folder: Path) -> None:
    """Execute one notebook into `folder`, under a temporary name until it has finished."""
    output, temporary = folder / path.name, folder / f".{path.name}"
    sockets = tempfile.TemporaryDirectory(prefix="onn")  # no port or name that another may take
    kernel = {"transport": "ipc", "ip": f"{sockets.name}/kernel"}
    try:
        papermill.execute_notebook(
            path,
            temporary,
            parameters | {"record_dir": str(folder)},
            kernel_name="python3",
            cwd=str(HERE),
            progress_bar=sys.stderr.isatty(),
            log_output=False,
            config=Config(KernelManager=kernel),
        )
        notebook = without_traces(nbformat.read(temporary, as_version=4))
        page = self_contained(notebook, path.stem)
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        output.with_suffix(".html").write_text(page, encoding="utf-8")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
        sockets.cleanup()


def self_contained(notebook: nbformat.NotebookNode, title: str) -> str:
    """The notebook as a page without scripts, which would be fetched from other hosts.

    Its code is folded away, and its headline follows its title: a reader of the page wants what
    came of it.
    """
    title_cell, *cells = notebook.cells
    cells.sort(key=lambda cell: "headline" not in cell.metadata.get("tags", []))
    notebook = nbformat.from_dict(notebook | {"cells": [title_cell, *cells]})
    resources = {"metadata": {"name": title}}
    exporter = HTMLExporter(extra_loaders=[DictLoader({"folded": FOLDED})], template_file="folded")
    page = exporter.from_notebook_node(notebook, resources=resources)[0]
    return re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)


def without_traces(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without the times, paths and random ids of the run that made it."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        cell.source = "\n".join(line for line in lines if not line.startswith("record_dir = "))
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip() != "# Parameters"]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
    return notebook


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    profile = sys.argv[1] if len(sys.argv) > 1 else "quick"
    chosen = HERE / "params" / f"{profile}.yaml"
    if not chosen.is_file():
        known = ", ".join(sorted(path.stem for path in chosen.parent.glob("*.yaml")))
        sys.exit(f"there is no profile {profile!r}: choose one of {known}")
    folder = RESULTS / profile
    folder.mkdir(parents=True, exist_ok=True)
    parameters = yaml.safe_load(chosen.read_text())
    given = yaml.safe_load("\n".join(text.replace("=", ": ", 1) for text in sys.argv[2:])) or {}
    resume = given.pop("resume", False)
    parameters = {name: (values or {}) | given for name, values in parameters.items()}
    finished = folder / ".finished.json"
    if not resume:
        finished.unlink(missing_ok=True)
    done = json.loads(finished.read_text()) if finished.is_file() else {}
    for number, (name, values) in enumerate(parameters.items(), start=1):
        print(f"{number}/{len(parameters)} {name}: {json.dumps(values)}", flush=True)
        if done.get(name) == values:
            print("    done before", flush=True)
            continue
        started, path = time.perf_counter(), HERE / f"{name}.ipynb"
        again = {"resume": True} if resume and "resume" in papermill.inspect_notebook(path) else {}
        try:
            execute(path, values | again, folder)
        except papermill.PapermillExecutionError as error:
            cell = error.source.strip().splitlines()[0]
            sys.exit(f"{name} failed in the cell {cell!r}: {error.ename}: {error.evalue}")
        except DeadKernelError:
            sys.exit(f"{name}: its Python was ended, perhaps for memory: lower batch_size")
        tracking.write_metrics(folder)
        pages.write_index(folder, f"Results of the {profile} profile")
        record.write_json(finished, done := done | {name: values})
        print(f"    done in {time.perf_counter() - started:.0f} s", flush=True)
    finished.unlink()
    print(f"see results/{profile}/index.html")


if __name__ == "__main__":
    main()
