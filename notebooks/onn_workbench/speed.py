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
from onn_workbench.figure import Bars, Figure, Line, Panel
from onn_workbench.live import phase_bars
from onn_workbench.tables import frame

SCHEMA_VERSION = 1
OWN = ("onn", "cached")  # of the systems, those that are this project


def load_benchmark(path: str | os.PathLike) -> dict[str, Any]:
    """Read a record that `bench` wrote; OnnError if it is not one."""

    def build(record: dict[str, Any]) -> dict[str, Any]:
        for row in record["rows"]:  # older records know of no resident graphs
            row.setdefault("kept_layers", 0)
            row.setdefault("percent_recomputed", row["percent_of_limit"])
        return record

    return read_json(path, build, "a benchmark's record", "measure again", SCHEMA_VERSION)


def speed_table(record: dict[str, Any]) -> pd.DataFrame:
    """One row a measurement: time, throughput, memory, percent of the limit."""
    rows = [
        {
            "system": row["system"],
            "batch": row["batch_size"],
            "tokens": row["sequence"],
            "layers": row["layers"],
            "s per step": f"{row['step_s']:.3g}",
            "ms per sample": f"{row['ms_per_sample']:.0f}",
            "samples per s": f"{row['samples_per_s']:.3g}",
            "tokens per s": f"{row['tokens_per_s']:.3g}",
            "peak GiB": f"{row['peak_memory_bytes'] / 2**30:.2f}",
            "GB read per step": f"{row['bytes_read'] / 1e9:.3g}",
            "limited by": row["limited_by"],
            "percent of limit": "" if (of := row["percent_of_limit"]) is None else f"{of:.0f}",
            "graphs resident": row["kept_layers"],
            "percent if none": "" if (of := row["percent_recomputed"]) is None else f"{of:.0f}",
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


def overlap_table(record: dict[str, Any]) -> pd.DataFrame | str:
    """Of a profiled step on a GPU: seconds of the weights' copies, of kernels, and of both."""
    rows = [
        {
            "layers": step["layers"],
            "batch": step["batch_size"],
            "tokens": step["sequence"],
            "dtype": step.get("dtype", "bfloat16"),
            "budget (GiB)": f"{step['budget_bytes'] / 2**30:.2f}",
            "GB to the device": f"{step['bytes_streamed'] / 1e9:.1f}",
            "of them from disk": f"{step['bytes_read'] / 1e9:.1f}",
            "step (s)": f"{step['step_s']:.2f}",
            "copies (s)": f"{step['copies_s']:.3f}",
            "kernels (s)": f"{step['kernels_s']:.3f}",
            "both at once (s)": f"{step['both_s']:.3f}",
            "waiting for weights (s)": f"{step['waiting_for_weights_s']:.2f}",
        }
        for step in record.get("overlap", [])
    ]
    if not rows:
        return "no trace: this run was on a CPU"
    return pd.DataFrame(rows).set_index(["layers", "batch", "tokens"])


def ratio_table(record: dict[str, Any]) -> pd.DataFrame:
    """How many times faster a sample is in this project than elsewhere, with the range of steps."""
    rows = []
    for other, own in itertools.product(record["rows"], repeat=2):
        same = own["layers"] == other["layers"] and own["sequence"] == other["sequence"]
        is_pair = own["system"] in OWN and other["system"] not in OWN
        if not same or not is_pair or own["batch_size"] < other["batch_size"]:
            continue
        ours, theirs = ([s / row["batch_size"] for s in row["step_s_all"]] for row in (own, other))
        rows.append(
            {
                "layers": own["layers"],
                "this project": f"{own['system']}, batch {own['batch_size']}",
                "against": f"{other['system']}, batch {other['batch_size']}",
                "times faster": round(other["ms_per_sample"] / own["ms_per_sample"], 2),
                "least": round(min(theirs) / max(ours), 2),
                "most": round(max(theirs) / min(ours), 2),
            }
        )
    return frame(rows, ["layers", "this project", "against"])


def ceilings_table(record: dict[str, Any]) -> pd.DataFrame:
    """What the machine sustains, before and after the runs."""
    both = [record["ceilings"][when] for when in ("before", "after")]
    rows = {"reads from disk (GB/s)": [c["read_bytes_per_s"] / 1e9 for c in both]}
    if both[0]["copy_bytes_per_s"]:
        rows["copies to the device (GB/s)"] = [c["copy_bytes_per_s"] / 1e9 for c in both]
    for n_tokens in both[0]["flops_per_s"]:
        flops_per_s = [c["flops_per_s"][n_tokens] for c in both]
        rows[f"matmuls at {n_tokens} tokens (GFLOP/s)"] = [rate / 1e9 for rate in flops_per_s]
    table = pd.DataFrame(rows, index=["before", "after"]).T
    return table.map(lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}")


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
    """Time of a sample for every system and batch size, beside the limit."""
    rows = record["rows"]
    names = [
        f"{row['system'].replace('_', ' ')}, batch {row['batch_size']} x {row['sequence']} tokens, "
        f"{row['layers']} layers"
        for row in rows
    ]
    times = [row["ms_per_sample"] / 1e3 for row in rows]
    known = [place for place, row in enumerate(rows) if row["percent_of_limit"] is not None]
    limits = [times[place] * rows[place]["percent_of_limit"] / 100 for place in known]
    bars = Bars("measured", range(len(rows)), [0] * len(rows), times)
    dots = Line("limit", limits, known, mode="ticks", colour="black")
    x, height = "seconds per sample (logarithmic)", 0.8 + 0.34 * len(rows)
    panel = Panel([bars, dots], x, rows=names, log_x=True, height=height)
    return Figure([[panel]], "seconds per sample of every system")


def verdict(times: float) -> str:
    """Of the report's claim: a large batch's samples are 7 to 13 times faster than batch 1's."""
    return "confirmed" if 7 <= times <= 13 else "different" if times > 1 else "refuted"


def print_verdict(record: dict[str, Any]) -> None:
    """The report's claim against every batch of this record, and the reason."""
    whole = [row for row in record["rows"] if row["layers"] == _depth(record)]
    baseline = [row for row in whole if row["system"] == "baseline"]
    own = [row for row in whole if row["system"] == "onn" and row["batch_size"] > 1]
    if not baseline or not own:
        print("no verdict: the runs have no baseline, or no batch above 1")
        return
    for row in own:
        times = baseline[0]["ms_per_sample"] / row["ms_per_sample"]
        print(
            f"batch {row['batch_size']}: {times:.1f} times the baseline's samples a second "
            f"(claimed 7 to 13): {verdict(times).upper()}. Its step is limited by "
            f"{row['limited_by']}, at {row['percent_of_limit']:.0f} % of that limit; the "
            f"baseline's step reaches {baseline[0]['percent_of_limit']:.0f} % of its own."
        )


def smallest_and_largest(record: dict[str, Any]) -> list[dict[str, Any]]:
    """This project's rows of the smallest and the largest batch, of the whole model."""
    own = [row for row in record["rows"] if row["system"] == "onn"]
    own = [row for row in own if row["layers"] == _depth(record) and row["timeline"]]
    own.sort(key=lambda row: row["batch_size"] * row["sequence"])
    return own[:1] + own[1:][-1:]


def growth(record: dict[str, Any], config: Any = None) -> Figure | str:
    """Step time and peak memory of this project against batch, depth and sequence.

    One row of panels for each of them with three measured points or more, all else being equal.
    config: of the measured model, by transformers; with it the predictions are drawn in.
    """
    own = [row for row in record["rows"] if row["system"] == "onn"]
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
            found = [_predicted(record, row, config) for row in rows] if config else []
            known = [(row[against], said) for row, said in zip(rows, found, strict=False) if said]
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
    )
    return found if found["trainable"] == row["trainable"] and "plan" in found else {}


def _depth(record: dict[str, Any]) -> int:
    return max(row["layers"] for row in record["rows"])
