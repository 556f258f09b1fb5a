"""Self-contained HTML pages: no script, no link to another host, readable offline and in print."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onn_core.record import write_atomic

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.7rem; text-align: left;
         vertical-align: top }
thead th { border-bottom: 2px solid #444 }
img { max-width: 100% } .wide { overflow-x: auto } a { color: #00568a }
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
    "06_your_own_loop.html": "Trainer, TRL, perplexity with and without the adapter, merge",
    "learning_results.json": "every run of the learning study, step by step",
    "stability.json": "every run of the stability study",
    "training_benchmark.json": "every row of the speed benchmark",
}
SAID = {
    "Records": "JSON with a schema version; the others are one run each, step by step.",
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
    return f'<div class="wide">{frame.reset_index().to_html(index=False, border=0)}</div>'


def picture(png: bytes, text: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def write_index(folder: str | os.PathLike, title: str) -> None:
    """Write index.html: links to all results in `folder`, what each is, the summary first."""
    files = [path for path in Path(folder).iterdir() if path.is_file() and path.name[0] != "."]
    names = {path.name for path in files} - {"index.html"}
    kinds = {".json": "Records", ".jsonl": "Metrics", ".ipynb": "Notebooks"}
    rows: dict[str, list[str]] = {kind: [] for kind in ("Pages", *kinds.values())}
    order = [name for name in CONTENTS if name in names]
    for name in order + sorted(names - {*order}):
        link, said = html.escape(name), html.escape(CONTENTS.get(name, ""))
        row = f'<tr><td><a href="{link}">{link}</a></td><td>{said}</td></tr>'
        rows[kinds.get(Path(name).suffix, "Pages")].append(row)
    sections = {
        kind: ["<table><tbody>", *of, "</tbody></table>", paragraph(SAID.get(kind, ""))]
        for kind, of in rows.items()
        if of
    }
    before = [paragraph("All of it can be read offline.")]
    write_page(Path(folder) / "index.html", title, sections, before)
