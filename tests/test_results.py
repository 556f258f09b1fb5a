"""Every figure in the tables of results/README.md and of README's results stands in a record.

A table is of the records that its section links. A cell of a batch, of layers or of tokens chooses
among a record's entries; every other number of the row is, at the decimals that are shown, a number
of such an entry or simply made from it: other units, percent, seconds a sample, a ratio of two.
"""

import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
LINK = re.compile(r"\]\(((?:full|gpu|results)/[^)]+\.(?:json|ipynb))\)")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
BATCH = re.compile(r"\bbatch (\d+)")
LAYERS = re.compile(r"\b(\d+) layers")
SIZES = re.compile(r"(\d+) x (\d+)")  # samples x tokens
UNITS = (1.0, 1e3, 1e2, 1e-3, 1e-6, 1e-9, 2.0**-20, 2.0**-30)
CHOOSING = {"batch": "batch_size", "layers": "layers", "tokens": "sequence"}
ROWS_SHOWN = 8  # of a longer list in a record, the first and the last


def tables(text):
    """(records' paths, head, rows) of every table; records: those of its part of a section."""
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        links, table = [], []
        for line in [*section.splitlines(), ""]:
            if line.startswith("|"):
                table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            elif table:
                yield links, table[0], table[2:]
                table = []
            links = links + LINK.findall(line)


def entries(found, above=None):
    """The dicts of a record that say of which batch they are."""
    if isinstance(found, list):
        for part in found:
            yield from entries(part, above)
    elif isinstance(found, dict):
        settings = found.get("settings")
        own = (settings if isinstance(settings, dict) else {}) | found
        if "tokens" in own and "sequence" not in own:
            own["sequence"] = own["tokens"]
        if isinstance(own.get("batch_size"), int) and "config" not in own:
            yield own
        else:
            for part in found.values():
                yield from entries(part, own)


def numbers(found):
    """The numbers of a record's part, also inside its texts; of a long list its ends."""
    if isinstance(found, bool) or found is None:
        return
    if isinstance(found, int | float):
        yield float(found)
    elif isinstance(found, str):
        yield from (shown[0] for shown in figures(found))
    elif isinstance(found, dict):
        for part in found.values():
            yield from numbers(part)
    else:
        ends = found if len(found) <= ROWS_SHOWN else [found[0], found[-1]]
        for part in ends:
            yield from numbers(part)


def figures(text):
    """(value, half of its last digit) of every number in a text."""
    for match in NUMBER.finditer(text):
        shown = match[0].replace(",", "")
        decimals = len(shown.partition(".")[2].partition("e")[0])
        yield float(shown), 0.5 * 10.0**-decimals * 10.0 ** int(shown.partition("e")[2] or 0)


def sample_s(entry):
    """Seconds of a sample, or None where the entry was not timed."""
    step_s = entry.get("step_s")
    return step_s / entry["batch_size"] if isinstance(step_s, int | float) else None


def chosen(cells, all_entries):
    """The entries of a row of a table, by its batch, layers and tokens; and its other cells."""
    wanted, others = {}, []
    for number, (title, cell) in enumerate(cells.items()):
        if number == 0 and (depth := LAYERS.search(cell)):
            wanted["layers"] = int(depth[1])
        if sizes := SIZES.search(cell):
            wanted |= {"batch_size": int(sizes[1]), "sequence": int(sizes[2])}
        elif title in CHOOSING and cell.isdigit():
            wanted[CHOOSING[title]] = int(cell)
        elif number > 0:
            others.append(cell)
    found = [e for e in all_entries if all(e.get(k, v) == v for k, v in wanted.items())]
    same = [e for e in all_entries if e.get("layers") == wanted.get("layers", e.get("layers"))]
    return found if wanted else [], same, others


def unfounded(records, cells):
    """The numbers of a row that stand in none of `records`: texts."""
    all_entries = [entry for record in records for entry in entries(record)]
    found, same, others = chosen(cells, all_entries)
    if found:
        around = [x for r in records if isinstance(r, dict) for x in top_numbers(r)]
    else:
        around = [x for record in records for x in numbers(record)]
    wrong = []
    for cell in others:
        named = [int(size) for size in BATCH.findall(cell)]  # a row that it is compared with
        own = found + [entry for entry in same if found and entry["batch_size"] in named]
        against = own + [e for e in same if str(e.get("system", "-")).lower() in cell.lower()]
        times, all_times = ([sample_s(e) for e in some if sample_s(e)] for some in (own, against))
        plain = [*around, *(x for entry in own for x in numbers(entry))]
        values = [x * unit for x in plain for unit in UNITS] + times
        values += [one / other for one, other in itertools.product(all_times, times)]
        for shown, half in figures(BATCH.sub("", cell)):
            if not any(abs(abs(value) - abs(shown)) <= half * 1.001 for value in values):
                wrong.append(f"{shown:g} in {cell!r}")
    return wrong


def top_numbers(record):
    """The numbers of a record itself, beside its entries."""
    for name, part in record.items():
        if not isinstance(part, list) and name != "environment":
            yield from numbers(part)


def load(link):
    """A record, or of a notebook what its cells have shown, as texts."""
    found = json.loads((RESULTS / link.removeprefix("results/")).read_text(encoding="utf-8"))
    if not link.endswith(".ipynb"):
        return found
    outputs = [output for cell in found["cells"] for output in cell.get("outputs", [])]
    texts = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs]
    return dict(enumerate(texts))


def all_tables():
    """(name, records' paths, head, rows) of the tables that hold results."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    for number, (links, head, rows) in enumerate(tables(text)):
        yield f"results-{number}", links, head, rows
    every = list(dict.fromkeys(LINK.findall(text)))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Results$.*?(?=^## )", readme, flags=re.MULTILINE | re.DOTALL)
    for number, (_, head, rows) in enumerate(tables(section[0])):
        yield f"README-{number}", [link for link in every if link.endswith(".json")], head, rows


TABLES = list(all_tables())


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table[0])
def test_every_figure_of_a_table_stands_in_a_record(table):
    name, links, head, rows = table
    assert links, f"the section of the table {head} links no record"
    records, wrong = [load(link) for link in dict.fromkeys(links)], []
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        cells = {title: cell for title, cell in cells.items() if "original" not in title}
        if name.startswith("README"):  # all figures of a row are of one of the records
            missed = min((unfounded([record], cells) for record in records), key=len)
        else:
            missed = unfounded(records, cells)
        wrong += [f"{figure}, row {row[0]!r}" for figure in missed]
    assert not wrong, "\n".join(["no record has:", *wrong])


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        ("1.618, 2.76 GiB", 0),
        ("18 times baseline", 0),
        ("18 times as fast", 1),
        ("18.5 times the baseline (batch 1, 29.9 s)", 0),
        ("1.628", 1),
        ("2.77 GiB", 1),
        ("17 times baseline", 1),
        ("18.5 times (batch 2, 29.9 s)", 2),
    ],
)
def test_a_figure_that_no_record_has_is_found(cell, wrong):
    own = {"batch_size": 32, "sequence": 16, "step_s": 51.776, "peak_memory_bytes": 2963525632}
    baseline = {"system": "baseline", "batch_size": 1, "sequence": 16, "step_s": 29.915}
    record = {"rows": [own, baseline]}
    assert len(unfounded([record], {"system": "onn", "batch": "32 x 16", "s": cell})) == wrong
