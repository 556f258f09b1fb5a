"""Self-contained HTML pages: no script, no link to another host, readable offline and in print."""

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image  # matplotlib brings it

from onn_core.record import write_atomic
from onn_workbench.tables import to_html

THUMBNAIL_PIXELS = 260  # wide

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.7rem; text-align: left;
         vertical-align: top }
thead th { border-bottom: 2px solid #444 }
img { max-width: 100%; height: auto } .wide { overflow-x: auto } a { color: #00568a }
.small img { width: 16rem; max-width: none }
pre { background: #f4f4f4; padding: 0.6rem; overflow-x: auto }
"""
CONTENTS = {  # what a file of results/<profile>/ is, in the order of the index
    "05_report.html": "the summary: every claim, what was measured, the verdict",
    "comparison.html": "the summary's tables on one page",
    "00_quickstart.html": "a LoRA in about a minute, answers before and after",
    "01_sizing.html": "will it fit, how long will a step take",
    "02_learning_curves.html": "does it learn, as well in large batches",
    "learning_validation.html": "the learning study's verdicts and curves on one page",
    "learning_curves.png": "the learning curves as a picture",
    "03_stability.html": "where NaN comes from and which fix matters",
    "04_speed.html": "time per sample, memory, percent of the limit",
    "07_sweep.html": "many runs in one pass over the weights, and the best of them",
    "06_your_own_loop.html": "Trainer, TRL, perplexity with and without the adapter, merge",
    "learning_results.json": "every run of the learning study",
    "sweep.json": "every run of the sweep",
    "stability.json": "every run of the stability study",
    "training_benchmark.json": "every row of the speed benchmark",
}
SAID = {
    "Records": "JSON with a schema version; others are one run each: its first steps one by one, "
    "then stretches of steps.",
    "Metrics": "A number a line: name, value, step, epoch, context; the arguments of AIM's track.",
    "Notebooks": "As they were executed; JupyterLab shows their figures live.",
}


def write_page(
    path: str | os.PathLike,
    title: str,
    sections: dict[str, Sequence[str]],
    before: Sequence[str] = (),
) -> None:
    """Write a page, whole or not at all. sections: heading -> parts of HTML; before: them all."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = [f"<h1>{html.escape(title)}</h1>", *before]
    for name, parts in sections.items():
        body += [f"<h2>{html.escape(name)}</h2>", *parts]
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
    write_atomic(path, f"{text}{chr(10).join(body)}\n</body></html>\n".encode())


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def table(frame: Any) -> str:
    """A pandas frame as a table whose index is a column like the others."""
    return f'<div class="wide">{to_html(frame)}</div>'


def picture(png: bytes, text: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def write_index(folder: str | os.PathLike, title: str) -> None:
    """Write index.html: links to all results in `folder`, what each is, the summary first.

    The page of a notebook has the lines of its cell tagged "headline" and a small picture.
    """
    folder = Path(folder)
    files = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    names = {path.name for path in files} - {"index.html"}
    kinds = {".json": "Records", ".jsonl": "Metrics", ".ipynb": "Notebooks"}
    rows: dict[str, list[str]] = {kind: [] for kind in ("Pages", *kinds.values())}
    order = [name for name in CONTENTS if name in names]
    for name in order + sorted(names - {*order}):
        link, said = html.escape(name), html.escape(CONTENTS.get(name, ""))
        kind, small = kinds.get(Path(name).suffix, "Pages"), ""
        notebook = (folder / name).with_suffix(".ipynb")
        if kind == "Pages" and notebook.is_file():
            lines, png = summary_of(notebook)
            said += "".join(f"<br><strong>{html.escape(line)}</strong>" for line in lines)
            small = f'<a href="{link}">{picture(png, "")}</a>' if png else ""
        cells = f'<td><a href="{link}">{link}</a></td><td>{said}</td>'
        cells = f'<td class="small">{small}</td>{cells}' if kind == "Pages" else cells
        rows[kind].append(f"<tr>{cells}</tr>")
    sections = {
        kind: ["<table><tbody>", *of, "</tbody></table>", paragraph(SAID.get(kind, ""))]
        for kind, of in rows.items()
        if of
    }
    before = [paragraph("All of it can be read offline.")]
    write_page(folder / "index.html", title, sections, before)


def summary_of(notebook: Path) -> tuple[list[str], bytes]:
    """The lines of a notebook's headline, and its first picture made small; empty without one."""
    lines, png = [], b""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if "headline" in cell["metadata"].get("tags", []):
                lines += "".join(output.get("text", "")).splitlines()
            if not png and "image/png" in output.get("data", {}):
                png = base64.b64decode("".join(output["data"]["image/png"]))
    if not png:
        return lines, b""
    small = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.thumbnail((THUMBNAIL_PIXELS, picture.height))
        picture.save(small, "png")
    return lines, small.getvalue()
