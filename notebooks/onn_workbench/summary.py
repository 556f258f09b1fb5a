"""The original report's claims beside what the records of a profile say of them."""

import dataclasses
import operator
import statistics
from pathlib import Path
from typing import Any

import pandas as pd

from onn_core.weights import geometry
from onn_workbench import curves, pages, speed, stability_report, study
from onn_workbench.stability import FIXES, Outcome
from onn_workbench.study import Study

NOT_MEASURED = "not measured in this profile"
CONFIRMED, REFUTED, DIFFERENT = "confirmed", "refuted", "different"
PHI4_LAYERS = 40
CLAIMED_PEAKS_BYTES = (1_568_000_000, 982_000_000)  # batch 32 to 128, batch 1
# Fused projections of a phi-4 layer, in + out: qkv, o, gate and up, down.
PHI4_WIDTHS = (5120 + 7680, 5120 + 5120, 5120 + 35840, 17920 + 5120)
REPRODUCE = """make report                # this report, quick profile
make report PROFILE=full   # the long one
make track && make aim     # all runs in an AIM dashboard on this machine"""


@dataclasses.dataclass
class Records:
    """What a profile left; None is what it did not measure."""

    learning: Study | None = None
    stability: dict[str, Outcome] | None = None
    benchmark: dict[str, Any] | None = None


@dataclasses.dataclass
class Claim:
    """A claim of the original report, what was measured here, and whether the two agree."""

    claim: str
    original: str
    here: str = NOT_MEASURED
    verdict: str = "none"
    why: str = ""


def read(folder: str | Path) -> Records:
    """The records in `folder`; OnnError for one that cannot be read."""
    folder, found = Path(folder), Records()
    if (path := folder / "learning_results.json").is_file():
        found.learning = Study.load(path)
    if (path := folder / "stability.json").is_file():
        found.stability = stability_report.load(path)
    if (path := folder / "training_benchmark.json").is_file():
        found.benchmark = speed.load_benchmark(path)
    return found


def claims(records: Records) -> list[Claim]:
    """Every claim, in the order of the original report."""
    return [
        *_speed_claims(records.benchmark),
        *_learning_claims(records.learning),
        *_size_claims(),
        *_stability_claims(records.stability),
    ]


def headline_table(records: Records) -> pd.DataFrame:
    """One row a claim."""
    rows = [dataclasses.asdict(claim) for claim in claims(records)]
    names = {"original": "original report", "here": "measured here"}
    return pd.DataFrame(rows).rename(columns=names).set_index("claim")


def settings_table(records: Records) -> pd.DataFrame:
    """Configuration, hardware and versions, a column for each record."""
    columns: dict[str, dict[str, Any]] = {}
    if records.learning:
        runs = list(records.learning.runs.values())
        run = runs[-1][0]
        names = ("chunk_size", "sparse_layers", "lora_rank", "lora_alpha", "max_length")
        columns["learning"] = {
            "model": f"{run.model['name']}, {run.model['parameters']:,} parameters",
            "trained parameters": f"{run.model['trainable']:,}",
            "computed in": run.model["dtype"],
            "data": f"{run.data['name']}: {run.data['train']} + {run.data['held_out']} held out",
            "batch sizes": ", ".join(str(r[0].config["batch_size"]) for r in runs),
            "seeds": len(runs[0]),
            **{name.replace("_", " "): run.config[name] for name in names},
            **_environment(run.environment),
        }
    if records.benchmark:
        rows, cap = records.benchmark["rows"], records.benchmark["cap_bytes"]
        columns["speed"] = {
            "batch sizes": ", ".join(map(str, sorted({row["batch_size"] for row in rows}))),
            "decoder layers": ", ".join(map(str, sorted({row["layers"] for row in rows}))),
            "memory cap (GiB)": "none" if cap is None else f"{cap / 2**30:.1f}",
            **_environment(records.benchmark["environment"]),
        }
    return pd.DataFrame(columns, dtype=object).fillna("").rename_axis("setting")


def write_comparison(records: Records, path: str | Path) -> None:
    """The report on one page: every table, and the learning curves."""
    sections = {"Claims": [pages.table(headline_table(records))]}
    sections |= {"Speed": [], "Learning": [], "Stability": []}
    if records.benchmark:
        sections["Speed"] = [pages.table(speed.speed_table(records.benchmark))]
    if found := records.learning:
        verdicts = curves.verdict_table(found.runs | found.controls, found.reference)
        picture = curves.study_figure(found.runs, found.controls).png()
        sections["Learning"] = [
            *(pages.paragraph(study.RULE), pages.table(verdicts)),
            pages.picture(picture, "learning curves"),
            pages.table(curves.layout_table(found.layouts)),
        ]
    if records.stability:
        sections["Stability"] = [pages.table(stability_report.outcome_table(records.stability))]
    sections["Configuration, hardware, versions"] = [pages.table(settings_table(records))]
    sections["How to reproduce"] = [pages.code(REPRODUCE)]
    missing = [pages.paragraph(NOT_MEASURED + ".")]
    shown = {title: parts or missing for title, parts in sections.items()}
    pages.write_page(path, "Original report and this one", shown)


def _speed_claims(benchmark: dict[str, Any] | None) -> list[Claim]:
    ratio = Claim("time per sample, batch 32 to 128 against batch 1", "7 to 13 times less")
    rate = Claim("samples per second, batch 32 to 128", "0.86 to 1.32")
    memory = Claim("peak memory, batch 32 to 128; batch 1", "1528 to 1568 MB; 979 to 982 MB")
    if not benchmark:
        return [ratio, rate, memory]
    first = benchmark["rows"][0]
    found = {  # the report's case: one depth and one length of a sample
        (row["system"], row["batch_size"]): row
        for row in benchmark["rows"]
        if (row["layers"], row["sequence"]) == (first["layers"], first["sequence"])
    }
    single = [found[system, 1] for system in ("baseline", "onn") if (system, 1) in found]
    large = [row for (name, size), row in found.items() if name == "onn" and 32 <= size <= 128]
    if not single or not large:
        return [ratio, rate, memory]
    best, one = min(large, key=lambda row: row["ms_per_sample"]), single[0]
    times = one["ms_per_sample"] / best["ms_per_sample"]
    ratio.here = (
        f"{times:.1f} times less: {best['ms_per_sample']:,.0f} ms at batch {best['batch_size']}, "
        f"{one['ms_per_sample']:,.0f} ms at batch 1"
    )
    ratio.verdict = speed.verdict(times)
    ratio.why = (
        "the ratio of reading to computing time belongs to the machine; "
        f"{best['percent_of_limit']:.0f} % of its limit at batch {best['batch_size']}, "
        f"{one['percent_of_limit']:.0f} % at batch 1"
    )
    if benchmark["disturbed"]:
        ratio.why += "; the machine was disturbed: measure again"
    whole = first["layers"] == PHI4_LAYERS
    other = f"{first['layers']} decoder layers instead of {PHI4_LAYERS}, another machine"
    rate.here = ", ".join(f"{r['samples_per_s']:.2f} (batch {r['batch_size']})" for r in large)
    faster = max(r["samples_per_s"] for r in large) >= 0.86
    rate.verdict = DIFFERENT if not whole else CONFIRMED if faster else REFUTED
    peaks = [max(r["peak_memory_bytes"] for r in large), one["peak_memory_bytes"]]
    memory.here = "; ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks)
    within = all(map(operator.le, peaks, CLAIMED_PEAKS_BYTES))
    as_little = CONFIRMED if within else DIFFERENT
    memory.verdict = DIFFERENT if not whole else as_little if max(peaks) < 4e9 else REFUTED
    rate.why = "another machine" if whole else other
    memory.why = "it fills the budget that it is given, within 4 GB" if whole else other
    return [ratio, rate, memory]


def _learning_claims(found: Study | None) -> list[Claim]:
    baseline = Claim("learning, baseline (batch 1)", "loss falls by 3.2 %")
    optimised = Claim("learning, optimised (batch 32)", "loss falls by 2.2 %")
    alike = Claim("both configurations learn alike", "yes")
    evidence = Claim("gradients are non-zero, no NaN or Inf", "yes")
    ends = Claim("the first and last layers matter most", "layers 0 to 3 and 36 to 39 of 40")
    rows = [baseline, optimised, alike, evidence, ends]
    if not found:
        return rows
    controls = {study.verdict(r, found.reference)["learned"] for r in found.controls.values()}
    of_controls = "the controls do not learn" if controls == {"NO"} else "A CONTROL LEARNED"
    for label, claim in (("baseline", baseline), ("optimised", optimised)):
        label = next(name for name in found.runs if name.startswith(label))
        said = study.verdict(found.runs[label], found.reference)
        claim.here = (
            f"held-out loss {said['loss_before']:.3f} to {said['loss_after']:.3f}: "
            f"falls by {100 * said['fall']:.1f} % ({label})"
        )
        learned = said["learned"] == "YES"
        claim.verdict = CONFIRMED if learned else REFUTED if said["fall"] <= 0 else DIFFERENT
        against, noise = said["against_shuffled"], said["against_shuffled_noise"]
        claim.why = (
            f"noise of {said['seeds']} seeds {100 * said['noise']:.1f} %; "
            f"{against:+.3f} ± {noise:.3f} against shuffled targets; {of_controls}"
        )
    first = next(label for label in found.runs if label.startswith("baseline"))
    last = next(label for label in found.runs if label.startswith("optimised"))
    mean, noise, words = study.compare(found.runs[first], found.runs[last])
    alike.here = f"final held-out loss {mean:+.3f} (optimised less baseline)"
    alike.verdict = CONFIRMED if words.startswith("no") or mean < 0 else REFUTED
    alike.why = f"{words} ({noise:.3f})" if words.startswith("no") else f"{words} than the baseline"
    norms = [study.verdict(runs, found.reference) for runs in found.runs.values()]
    least = min(said["grad_norm_least"] for said in norms)
    bad = sum(said["nonfinite"] for said in norms)
    evidence.here = f"least gradient norm of a layer {least:.2g}, {bad} NaN or Inf"
    evidence.verdict = CONFIRMED if least > 0 and not bad else REFUTED
    evidence.why = "every trained layer, every step, every seed"
    if found.layouts:
        falls = {k: statistics.fmean(map(study.fall, runs)) for k, runs in found.layouts.items()}
        each = (f"{100 * value:.1f} % ({label})" for label, value in falls.items())
        ends.here = f"at equal time loss falls by {', '.join(each)}"
        best, second = sorted(falls, key=falls.__getitem__, reverse=True)[:2]
        settled = study.compare(found.layouts[second], found.layouts[best])[2] == "lower"
        of_best = CONFIRMED if best.startswith("ends") else REFUTED
        ends.verdict = of_best if settled else DIFFERENT
        reading = curves.layout_reading(found.layouts)
        ends.why = reading.split("; ")[-1].removeprefix("but ").rstrip(".")
    return rows


def _size_claims() -> list[Claim]:
    trained = 8 * 8 * sum(PHI4_WIDTHS)  # rank 8, 8 layers
    total = geometry.count_parameters(geometry.geometry("phi-4"))
    layers = "rank 8 on the four fused projections of 8 layers"
    heads = "the report counts each attention projection as 5120 x 5120, without grouped KV heads"
    share = f"{total:,} ({100 * trained / total:.3f} % trained)"
    original = "16.23 B (0.034 % trained)"
    return [
        Claim("trained parameters of phi-4", "5.57 M", f"{trained:,}", CONFIRMED, layers),
        Claim("all parameters of phi-4", original, share, REFUTED, heads),
    ]


def _stability_claims(outcomes: dict[str, Outcome] | None) -> list[Claim]:
    broken = Claim("float16 weights with LoRA become NaN", "yes")
    fixed = Claim("four fixes make it sound", "yes, all four")
    if not outcomes:
        return [broken, fixed]
    found = outcomes["broken"]
    broken.here = str(found.first[0]) if found.first else "every tensor stays finite"
    broken.verdict = REFUTED if found.adapter_finite else CONFIRMED
    broken.why = "the first of the tensors watched; the adapters end as NaN"
    needed = [name for name in FIXES if not outcomes[f"sound - {name}"].learned]
    spare = [name for name in FIXES if name not in needed]
    sound = outcomes["sound"].learned
    fixed.here = "sound with all four" if sound else "not sound with all four"
    fixed.verdict = REFUTED if not sound else DIFFERENT if spare else CONFIRMED
    fixed.why = f"missed when taken away: {', '.join(needed) or 'none'}"
    fixed.why += f"; not missed: {', '.join(spare)}" if spare else ""
    return [broken, fixed]


def _environment(found: dict[str, Any]) -> dict[str, Any]:
    names = ("processor", "cores", "memory_gib", "device", "python", "date")
    plain = {name.replace("_gib", " (GiB)"): found[name] for name in names}
    return plain | found["versions"]
