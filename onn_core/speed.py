"""Tables and figures of a benchmark's record; how to measure one is in `bench.py`."""

import json
import os
from pathlib import Path
from typing import Any

from onn_core.errors import OnnError
from onn_core.report import COLOURS, png, show_both

SCHEMA_VERSION = 1
# what a timeline shows -> colour
PHASES = {"read": COLOURS[0], "forward": COLOURS[1], "head": COLOURS[2], "backward": COLOURS[3]}


def load_benchmark(path: str | os.PathLike) -> dict[str, Any]:
    """Read a record that `bench` wrote; OnnError if it is not one."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record["schema_version"] != SCHEMA_VERSION:
            raise OnnError(
                f"{path} has benchmark schema {record['schema_version']}, this version reads "
                f"{SCHEMA_VERSION}: measure again."
            )
        return record | {"rows": list(record["rows"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OnnError(f"{path} is not a benchmark's record ({error}): measure again.") from error


def speed_table(record: dict[str, Any]) -> Any:
    """One row a measurement: time, throughput, memory, percent of the limit."""
    import pandas as pd

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
            "percent of limit": f"{row['percent_of_limit']:.0f}",
            "limited by": row["limited_by"],
        }
        for row in record["rows"]
    ]
    return pd.DataFrame(rows).set_index(["system", "batch", "tokens", "layers"])


def ledger_table(record: dict[str, Any]) -> Any:
    """Where the time of a step of this project goes, in seconds; the median of its timed steps."""
    import pandas as pd

    columns = {"wait_s": "waiting for weights", "forward_s": "forward", "head_s": "head"}
    columns |= {"backward_s": "backward", "optimizer_s": "optimizer", "step_s": "whole step"}
    rows = [
        {"system": row["system"], "batch": row["batch_size"]}
        | {title: round(row[name], 2) for name, title in columns.items()}
        for row in record["rows"]
        if "wait_s" in row
    ]
    return pd.DataFrame(rows, dtype=object).set_index(["system", "batch"])


def overlap_table(record: dict[str, Any]) -> Any:
    """Of a profiled step on a GPU: seconds of copies to the device, of kernels, and of both."""
    import pandas as pd

    rows = [
        {
            "batch": step["batch_size"],
            "tokens": step["sequence"],
            "step (s)": f"{step['step_s']:.2f}",
            "copies (s)": f"{step['copies_s']:.3f}",
            "kernels (s)": f"{step['kernels_s']:.3f}",
            "both at once (s)": f"{step['both_s']:.3f}",
            "waiting for weights (s)": f"{step['waiting_for_weights_s']:.2f}",
        }
        for step in record.get("overlap", [])
    ]
    return pd.DataFrame(rows) if rows else "no trace: this run was on a CPU"


def ratio_table(record: dict[str, Any]) -> Any:
    """How many times faster a sample is in this project than elsewhere, with the range of steps."""
    import pandas as pd

    def per_sample(row: dict[str, Any]) -> list[float]:
        return [step_s / row["batch_size"] for step_s in row["step_s_all"]]

    rows = []
    for other in (row for row in record["rows"] if row["system"] != "onn"):
        for own in (row for row in record["rows"] if row["system"] == "onn"):
            same = own["layers"] == other["layers"] and own["sequence"] == other["sequence"]
            if not same or own["batch_size"] < other["batch_size"]:
                continue
            times, others = per_sample(own), per_sample(other)
            rows.append(
                {
                    "this project": f"batch {own['batch_size']}",
                    "against": f"{other['system']}, batch {other['batch_size']}",
                    "times faster": round(other["ms_per_sample"] / own["ms_per_sample"], 2),
                    "least": round(min(others) / max(times), 2),
                    "most": round(max(others) / min(times), 2),
                }
            )
    return pd.DataFrame(rows, dtype=object).set_index(["this project", "against"])


def ceilings_table(record: dict[str, Any]) -> Any:
    """What the machine sustains, before and after the runs."""
    import pandas as pd

    before, after = record["ceilings"]["before"], record["ceilings"]["after"]
    rows = {"reads from disk (GB/s)": [c["read_bytes_per_s"] / 1e9 for c in (before, after)]}
    if before["copy_bytes_per_s"]:
        rows["copies to the device (GB/s)"] = [c["copy_bytes_per_s"] / 1e9 for c in (before, after)]
    for n_tokens in before["flops_per_s"]:
        rows[f"products at {n_tokens} tokens (GFLOP/s)"] = [
            c["flops_per_s"][n_tokens] / 1e9 for c in (before, after)
        ]
    table = pd.DataFrame(rows, index=["before", "after"]).T
    return table.map(lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}")


def show_timeline(row: dict[str, Any], title: str) -> None:
    """One step: layers against time, the reads of a layer above its compute."""
    depth = row["layers"]
    spans = [(what, min(unit, depth), *times) for what, unit, *times in row["timeline"]]
    names = [f"layer {unit}" for unit in range(depth)] + ["head"]
    show_both(
        _plotly_timeline(spans, names, title),
        _matplotlib_timeline(spans, names, title),
        f"timeline of one step: {title}",
    )


def show_speed(record: dict[str, Any]) -> None:
    """Time of a sample for every system and batch size, beside the limit."""
    rows = record["rows"]
    names = [
        f"{row['system'].replace('_', ' ')}, batch {row['batch_size']} x {row['sequence']} tokens, "
        f"{row['layers']} layers"
        for row in rows
    ]
    times = [row["ms_per_sample"] / 1e3 for row in rows]
    limits = [t * row["percent_of_limit"] / 100 for t, row in zip(times, rows, strict=True)]
    title = "seconds per sample (logarithmic)"
    bars = {"type": "bar", "orientation": "h", "x": times, "y": names, "name": "measured"}
    dots = {"type": "scatter", "mode": "markers", "x": limits, "y": names, "name": "limit"}
    live = {
        "data": [
            bars | {"marker": {"color": COLOURS[0]}},
            dots | {"marker": {"color": "black", "symbol": "line-ns-open", "size": 16}},
        ],
        "layout": {
            "xaxis": {"type": "log", "title": {"text": title}},
            "yaxis": {"autorange": "reversed", "automargin": True},
            "height": 120 + 34 * len(rows),
            "template": "plotly_white",
        },
    }
    figure, axes = _figure(9, 1.2 + 0.34 * len(rows))
    axes.barh(names, times, color=COLOURS[0], label="measured")
    axes.plot(limits, names, "|", color="black", markersize=16, markeredgewidth=2, label="limit")
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(title)
    figure.legend(loc="outside right upper", frameon=False)
    show_both(live, png(figure), "seconds per sample of every system")


def print_verdict(record: dict[str, Any], claimed: tuple[float, float] = (7.0, 13.0)) -> None:
    """The report's claim against this record: confirmed, more, or refuted, and the reason."""
    whole = [row for row in record["rows"] if row["layers"] == _depth(record)]
    baseline = [row for row in whole if row["system"] == "baseline"]
    own = [row for row in whole if row["system"] == "onn" and row["batch_size"] > 1]
    if not baseline or not own:
        print("no verdict: the runs have no baseline, or no batch above 1")
        return
    for row in own:
        times = baseline[0]["ms_per_sample"] / row["ms_per_sample"]
        verdict = "CONFIRMED" if claimed[0] <= times <= claimed[1] else "DIFFERENT HERE"
        verdict = "REFUTED HERE" if times < claimed[0] else verdict
        print(
            f"batch {row['batch_size']}: {times:.1f} times the baseline's samples a second "
            f"(claimed {claimed[0]:.0f} to {claimed[1]:.0f}): {verdict}. Its step is limited by "
            f"{row['limited_by']}, at {row['percent_of_limit']:.0f} % of that limit; the "
            f"baseline's step reaches {baseline[0]['percent_of_limit']:.0f} % of its own."
        )


def smallest_and_largest(record: dict[str, Any]) -> list[dict[str, Any]]:
    """This project's rows of the smallest and the largest batch, of the whole model."""
    own = [row for row in record["rows"] if row["system"] == "onn"]
    own = [row for row in own if row["layers"] == _depth(record) and row["timeline"]]
    own.sort(key=lambda row: row["batch_size"] * row["sequence"])
    return own[:1] + own[1:][-1:]


def show_growth(record: dict[str, Any]) -> None:
    """Step time and peak memory of this project against batch, depth and sequence."""
    own = [row for row in record["rows"] if row["system"] == "onn"]
    titles = {"batch_size": "batch size", "layers": "decoder layers", "sequence": "tokens a sample"}
    for against, title in titles.items():
        others = [name for name in titles if name != against]
        groups: dict[tuple, list] = {}
        for row in own:
            groups.setdefault(tuple(row[name] for name in others), []).append(row)
        rows = max(groups.values(), key=len)
        if len(rows) > 1:
            fixed = ", ".join(f"{titles[name]} {rows[0][name]}" for name in others)
            _show_growth(sorted(rows, key=lambda row: row[against]), against, title, fixed)


def _show_growth(rows: list[dict[str, Any]], against: str, title: str, fixed: str) -> None:
    x = [row[against] for row in rows]
    measured = [row["step_s"] for row in rows]
    limit = [row["step_s"] * row["percent_of_limit"] / 100 for row in rows]
    memory = [row["peak_memory_bytes"] / 2**30 for row in rows]
    dash = {"dash": "dash", "color": "black"}
    lines = [
        {"y": measured, "name": "measured", "line": {"color": COLOURS[0]}},
        {"y": limit, "name": "limit", "line": dash},
    ]
    live = {
        "data": [line | {"type": "scatter", "x": x} for line in lines],
        "layout": {
            "title": {"text": fixed},
            "xaxis": {"title": {"text": title}},
            "yaxis": {"title": {"text": "seconds per step"}, "rangemode": "tozero"},
            "height": 360,
            "template": "plotly_white",
        },
    }
    figure, axes = _figure(9, 3.4, columns=2)
    axes[0].plot(x, measured, marker="o", color=COLOURS[0], label="measured")
    axes[0].plot(x, limit, linestyle="--", color="black", label="limit")
    axes[0].set_ylabel("seconds per step")
    axes[1].plot(x, memory, marker="o", color=COLOURS[1])
    axes[1].set_ylabel("peak memory (GiB)")
    for part in axes:
        part.set_xlabel(title)
        part.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    figure.suptitle(fixed, fontsize=10)
    show_both(live, png(figure), f"time and memory of a step against {title}; {fixed}")


def _depth(record: dict[str, Any]) -> int:
    return max(row["layers"] for row in record["rows"])


def _plotly_timeline(spans: list[tuple], names: list[str], title: str) -> dict[str, Any]:
    traces = []
    for what, colour in PHASES.items():
        own = [span for span in spans if span[0] == what]
        bars = {"type": "bar", "orientation": "h", "name": what, "marker": {"color": colour}}
        bars |= {"base": [start for *_, start, _ in own]}
        bars |= {"x": [stop - start for *_, start, stop in own]}
        bars |= {"y": [names[unit] for _, unit, *_ in own]}
        bars |= {"offset": 0.0 if what != "read" else -0.4, "width": 0.4}
        traces.append(bars)
    layout = {
        "title": {"text": title},
        "xaxis": {"title": {"text": "seconds in the step"}},
        "yaxis": {"categoryarray": names, "categoryorder": "array", "autorange": "reversed"},
        "height": 160 + 24 * len(names),
        "template": "plotly_white",
    }
    return {"data": traces, "layout": layout}


def _matplotlib_timeline(spans: list[tuple], names: list[str], title: str) -> bytes:
    figure, axes = _figure(9, 1.5 + 0.24 * len(names))
    for what, colour in PHASES.items():
        own = [span for span in spans if span[0] == what]
        places = [unit - 0.2 if what == "read" else unit + 0.2 for _, unit, *_ in own]
        widths = [stop - start for *_, start, stop in own]
        starts = [start for *_, start, _ in own]
        axes.barh(places, widths, left=starts, height=0.38, color=colour, label=what)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds in the step")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for part in [axes] if columns == 1 else axes:
        part.grid(alpha=0.3)
        part.set_axisbelow(True)
        part.spines[["top", "right"]].set_visible(False)
    return figure, axes
