"""Tables and figures of a benchmark's record; how to measure one is in `bench.py`."""

import copy
import itertools
import os
from typing import Any

import pandas as pd
import torch

from onn_core.record import read_json
from onn_core.run.estimate import geometry_of, predict
from onn_workbench.ceilings import Ceilings
from onn_workbench.figure import Figure, Line, Panel
from onn_workbench.live import phase_bars
from onn_workbench.tables import frame
from onn_workbench.verdicts import judge

BASELINE = "baseline"  # the report's, among the systems
CLAIMED_BATCHES = range(32, 129)
OWN = ("onn", "cached")  # of the systems, those that are this project
IN_MEMORY = ("in_memory", "unbounded")  # those that hold all weights, without a cap


def load_benchmark(path: str | os.PathLike) -> dict[str, Any]:
    """Read a record that `bench` wrote; OnnError if it is not one."""

    def build(record: dict[str, Any]) -> dict[str, Any]:
        if not {"rows", "disturbed"} <= record.keys():
            raise ValueError("its limits were not measured")
        return record

    return read_json(path, build, "a benchmark's record", "measure again")


def speed_table(record: dict[str, Any]) -> pd.DataFrame:
    """One row a measurement: time, throughput, memory, percent of the limit."""
    rows = [
        {
            "system": row["system"],
            "batch": row["batch_size"],
            "tokens": row["sequence"],
            "layers": row["layers"],
            "step (s)": round(row["step_s"], 3),
            "sample (s)": round(row["ms_per_sample"] / 1e3, 3),
            "tokens per s": round(row["tokens_per_s"], 1),
            "peak (GiB)": round(row["peak_memory_bytes"] / 2**30, 2),
            "read a step (GiB)": round(row["bytes_read"] / 2**30, 2),
            "limited by": row["limited_by"],
            "percent of limit": _whole(row["percent_of_limit"]),
            "graphs resident": row["kept_layers"],
            "percent if none": _whole(row["percent_recomputed"]),
        }
        for row in record["rows"]
    ]
    return frame(rows, ["system", "batch", "tokens", "layers"])


def ledger_table(record: dict[str, Any]) -> pd.DataFrame:
    """Where the time of a step of this project goes, in seconds; the median of its timed steps."""
    columns = {"wait_s": "waiting for weights", "forward_s": "forward", "head_s": "head"}
    columns |= {"backward_s": "backward", "optimizer_s": "optimizer", "step_s": "whole step"}
    index = {"system": "system", "batch": "batch_size", "tokens": "sequence", "layers": "layers"}
    rows = [
        {title: row[name] for title, name in index.items()}
        | {title: round(row[name], 2) for name, title in columns.items()}
        for row in record["rows"]
        if "wait_s" in row
    ]
    return frame(rows, list(index))


def pairs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """This project against each other system: at equal batch first, the baseline at batch 1 last.

    Only rows of one depth and one length of a sample meet. "least" and "most": over all pairs of
    steps.
    """
    found = []
    for own, other in itertools.product(record["rows"], repeat=2):
        same = all(own[name] == other[name] for name in ("layers", "sequence"))
        equal = own["batch_size"] == other["batch_size"]
        if own["system"] not in OWN or other["system"] in OWN or not same:
            continue
        if not equal and other["system"] != BASELINE:
            continue
        ours, theirs = ([s / row["batch_size"] for s in row["step_s_all"]] for row in (own, other))
        found.append(
            {
                "own": own,
                "other": other,
                "equal": equal and other["system"] != BASELINE,
                "times": other["ms_per_sample"] / own["ms_per_sample"],
                "least": min(theirs) / max(ours),
                "most": max(theirs) / min(ours),
                "steps": min(len(ours), len(theirs)),
            }
        )
    return sorted(found, key=lambda pair: not pair["equal"])


def ratio_table(record: dict[str, Any]) -> pd.DataFrame:
    """How many times as fast a sample is in this project, with the range over the steps."""
    rows = [
        {
            "layers": pair["own"]["layers"],
            "tokens": pair["own"]["sequence"],
            "this project": f"{pair['own']['system']}, batch {pair['own']['batch_size']}",
            "against": f"{pair['other']['system']}, batch {pair['other']['batch_size']}",
            "times as fast": round(pair["times"], 2),
            "least": round(pair["least"], 2),
            "most": round(pair["most"], 2),
        }
        for pair in pairs(record)
    ]
    return frame(rows, ["layers", "tokens", "this project", "against"])


def headline(record: dict[str, Any]) -> str:
    """A sample's time against the best peer at equal batch, then against the report's baseline.

    The pairs are those of the deepest model with a peer; where this project is slower, it says so.
    Where a peer streams or maps, the best of those with all in memory follows it.
    """
    found, lines = pairs(record), []
    equal = [pair for pair in found if pair["equal"]]
    depth = max((pair["own"]["layers"] for pair in equal), default=0)
    best: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for pair in equal:
        if pair["own"]["layers"] == depth:
            in_memory = pair["other"]["system"] in IN_MEMORY
            place = pair["own"]["batch_size"], pair["own"]["sequence"], in_memory
            best[place] = min(best.get(place, pair), pair, key=lambda one: one["times"])
    for (batch_size, sequence, in_memory), pair in sorted(best.items()):
        own, other = (pair[name]["ms_per_sample"] / 1e3 for name in ("own", "other"))
        slower = " (slower)" if pair["times"] < 1 else ""
        is_second = in_memory and (batch_size, sequence, False) in best
        lines.append(
            f"Batch {batch_size} x {sequence} tokens, {depth} layers: {pair['times']:.2f} times as "
            f"fast as {'all in memory' if is_second else 'the best peer'}{slower}, "
            f"{pair['other']['system']}: {own:.3g} against {other:.3g} s a sample."
        )
    if not lines:
        lines = ["No peer was measured at an equal batch."]
    against = [pair for pair in found if pair["other"]["system"] == BASELINE]
    deepest = max((pair["own"]["layers"] for pair in against), default=0)
    against = [pair for pair in against if pair["own"]["layers"] == deepest]
    if against:
        pair = max(against, key=lambda pair: pair["own"]["batch_size"])
        slower = " (slower)" if pair["times"] < 1 else ""
        lines.append(
            f"Batch {pair['own']['batch_size']}, {deepest} layers: {pair['times']:.1f} times as "
            f"fast{slower} as the report's baseline at batch {pair['other']['batch_size']}."
        )
    if record["disturbed"]:
        lines.append("The machine was disturbed: these figures do not count.")
    return "\n".join(lines)


def ceilings_table(record: dict[str, Any]) -> pd.DataFrame:
    """What the machine sustains, before and after the runs."""
    both = [record["ceilings"][when] for when in ("before", "after")]
    rows = {"reads from disk (GiB/s)": [c["read_bytes_per_s"] / 2**30 for c in both]}
    if both[0]["copy_bytes_per_s"]:
        rows["copies to the device (GiB/s)"] = [c["copy_bytes_per_s"] / 2**30 for c in both]
    for n_tokens in both[0]["flops_per_s"]:
        flops_per_s = [c["flops_per_s"][n_tokens] for c in both]
        rows[f"matmuls at {n_tokens} tokens (GFLOP/s)"] = [rate / 1e9 for rate in flops_per_s]
    table = pd.DataFrame(rows, index=["before", "after"]).T.rename_axis("ceiling")
    return table.map(lambda value: f"{value:.2f}" if value < 100 else f"{value:,.0f}")


def timeline(row: dict[str, Any], title: str) -> Figure:
    """One step: layers against time, the reads of a layer above its compute."""
    depth = row["layers"]

    def row_of(phase: str, unit: int) -> float:
        return min(unit, depth) + (-0.2 if phase == "read" else 0.2)

    names = [*(f"layer {unit}" for unit in range(depth)), "head"]
    bars, height = phase_bars(row["timeline"], row_of, height=0.38), 1.2 + 0.22 * len(names)
    panel = Panel(bars, "seconds in the step", title=title, rows=names, height=height)
    return Figure([[panel]], f"timeline of one step: {title}")


def sample_times(record: dict[str, Any]) -> Figure:
    """Time of a sample, a point a run: by depth, length and batch, then by system; its limit."""
    rows = sorted(
        record["rows"],
        key=lambda row: (-row["layers"], row["sequence"], row["batch_size"], row["ms_per_sample"]),
    )
    names = [
        f"{row['layers']} layers, {row['batch_size']} x {row['sequence']}: "
        f"{row['system'].replace('_', ' ')}"
        for row in rows
    ]
    times = [row["ms_per_sample"] / 1e3 for row in rows]
    parts = []
    for number, system in enumerate(dict.fromkeys(row["system"] for row in record["rows"])):
        places = [place for place, row in enumerate(rows) if row["system"] == system]
        x, label = [times[place] for place in places], system.replace("_", " ")
        parts.append(Line(label, x, places, number, mode="markers", width=3))
    known = [place for place, row in enumerate(rows) if row["percent_of_limit"] is not None]
    limits = [times[place] * rows[place]["percent_of_limit"] / 100 for place in known]
    parts.append(Line("limit", limits, known, mode="ticks", colour="black"))
    x, height = "seconds per sample (logarithmic)", 0.8 + 0.26 * len(rows)
    panel = Panel(parts, x, rows=names, log_x=True, height=height)
    return Figure([[panel]], "seconds per sample of every system")


def ratio_claim(record: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """What the report's 7 to 13 times is judged by, and which of its conditions are missing.

    The pair of the fastest batch within 32 to 128 and the baseline at batch 1, of the deepest model
    measured; None where there is none.
    """
    found = [pair for pair in pairs(record) if pair["other"]["system"] == BASELINE]
    found = [pair for pair in found if pair["own"]["system"] == "onn"]
    found = [pair for pair in found if pair["own"]["layers"] == _depth(record)]
    claimed = [pair for pair in found if pair["own"]["batch_size"] in CLAIMED_BATCHES]
    claimed = [pair for pair in claimed if pair["other"]["batch_size"] == 1]
    missing = [] if claimed else ["no batch of 32 to 128 beside a baseline at batch 1"]
    if record["disturbed"]:
        missing.append("the machine was disturbed")
    if any(pair["steps"] < 2 for pair in found):
        missing.append("one timed step")
    best = max(claimed or found, key=lambda pair: pair["times"], default=None)
    return best, missing


def reading(record: dict[str, Any]) -> str:
    """What the benchmark says, in words: the claim of a large batch, the wall, the reserve."""
    pair, missing = ratio_claim(record)
    lines = []
    if pair is None:
        lines.append("The runs have no baseline of this depth beside this project: no verdict.")
    else:
        own, times = pair["own"], pair["times"]
        said = judge(pair["least"] > 1, missing)
        lines.append(
            f"A large batch makes a sample cheaper: {said.upper()}"
            + (f" ({'; '.join(missing)})" if missing else "")
            + f". Batch {own['batch_size']} takes {times:.1f} times less than the baseline "
            f"({pair['least']:.1f} to {pair['most']:.1f} over the steps); the report claims "
            "7 to 13 on its machine."
        )
    for row in smallest_and_largest(record):
        wall = {"read": "reading", "compute": "computing", "copy": "copying"}
        limit = wall.get(row["limited_by"], row["limited_by"])
        waited = 100 * row["wait_s"] / row["step_s"] if "wait_s" in row else 0
        percent = row["percent_of_limit"]
        reached = "" if percent is None else f", reaches {percent:.0f} % of that limit"
        lines.append(
            f"Batch {row['batch_size']} x {row['sequence']}: {limit} is the limit{reached}, and "
            f"{waited:.0f} % of the step is spent waiting for weights."
        )
    return "\n".join(lines)


def own_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """This project's, from a disk if there are such, else those with memory for the files."""
    rows = {name: [row for row in record["rows"] if row["system"] == name] for name in OWN}
    return next(filter(None, rows.values()), [])


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def smallest_and_largest(record: dict[str, Any]) -> list[dict[str, Any]]:
    """This project's rows of the smallest and the largest batch, of the whole model."""
    own = own_rows(record)
    own = [row for row in own if row["layers"] == _depth(record) and row["timeline"]]
    own.sort(key=lambda row: row["batch_size"] * row["sequence"])
    return own[:1] + own[1:][-1:]


def growth(record: dict[str, Any], config: Any) -> Figure | str:
    """Step time and peak memory of this project against batch, depth and sequence.

    One row of panels for each of them with three measured points or more, all else being equal.
    config: of the measured model, by transformers, for the predictions.
    """
    own = own_rows(record)
    titles = {"layers": "decoder layers", "batch_size": "batch size", "sequence": "tokens a sample"}
    short = {"layers": "{} layers", "batch_size": "batch {}", "sequence": "{} tokens"}
    panels = []
    for against, title in titles.items():
        others = [name for name in titles if name != against]
        groups: dict[str, list] = {}
        for row in sorted(own, key=lambda row: row[against]):
            fixed = ", ".join(short[name].format(row[name]) for name in others)
            groups.setdefault(fixed, []).append(row)
        groups = {fixed: rows for fixed, rows in groups.items() if len(rows) >= 3}
        times, memory = [], []
        alone = len(groups) == 1
        for number, (fixed, rows) in enumerate(groups.items()):
            of = "" if alone else f": {fixed}"
            found = [(row[against], _predicted(record, row, config)) for row in rows]
            known = [(at, said) for at, said in found if said]
            for parts, measured, predicted, unit in (
                (times, "step_s", "step_s", 1),
                (memory, "peak_memory_bytes", "peak_bytes", 2**30),
            ):
                x, y = [row[against] for row in rows], [row[measured] / unit for row in rows]
                parts.append(Line(f"measured{of}", x, y, number, mode="markers", width=3))
                if known:
                    x, y = zip(*((at, said[predicted] / unit) for at, said in known), strict=True)
                    parts.append(Line(f"predicted{of}", x, y, number, mode="lines"))
        if groups:
            axes = {"x": title, "from_zero": True, "title": next(iter(groups)) if alone else ""}
            left = Panel(times, y="seconds per step", **axes)
            panels.append([left, Panel(memory, y="peak memory (GiB)", **axes)])
    if not panels:
        return "fewer than three depths, batches or sequences were measured: nothing to draw"
    return Figure(panels, "time and memory of a step against depth, batch and sequence")


def _predicted(record: dict[str, Any], row: dict[str, Any], config: Any) -> dict[str, Any]:
    """What is predicted of a measured row from the ceilings; empty for another model."""
    if row["system"] == "cached":  # its weights are copied from the host, which is not predicted
        return {}
    config = copy.deepcopy(config)
    config.num_hidden_layers = row["layers"]
    both = [Ceilings(**record["ceilings"][when]) for when in ("before", "after")]
    ceilings = both[0].mean(both[1])
    flops_per_s = {int(n): rate for n, rate in ceilings.flops_per_s.items()}  # JSON: text
    geometry = geometry_of(
        config,
        sparse_layers=row["trained_layers"],
        compute_dtype=getattr(torch, row["dtype"]),
        on_cpu=record["environment"]["device"] == "cpu",
    )
    found = predict(
        geometry,
        row["batch_size"],
        row["sequence"],
        read_bytes_per_s=ceilings.read_bytes_per_s,
        flops_per_s=flops_per_s[row["batch_size"] * row["sequence"]],
        memory_budget=record["budget_bytes"],
        micro_batch_size=row.get("micro_batch_size"),  # how fast one is was measured there
    )
    return found if found["trainable"] == row["trainable"] and "plan" in found else {}


def _depth(record: dict[str, Any]) -> int:
    return max(row["layers"] for row in record["rows"])
