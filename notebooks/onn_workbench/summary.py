"""The original report's claims beside what the records of a profile say of them."""

import dataclasses
import operator
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from onn_core.run.estimate import geometry_of
from onn_core.weights.geometry import geometry
from onn_workbench import curves, pages, speed, stability_report, study, sweep
from onn_workbench.stability import FIXES, Outcome
from onn_workbench.study import Study
from onn_workbench.sweep import Sweep
from onn_workbench.verdicts import CONFIRMED, NOT_COMPARABLE, REFUTED, RULE, judge

NOT_MEASURED = "not measured in this profile"
PHI4_LAYERS = 40
PHI4_TRAINED = 5_570_560  # rank 8 in 8 layers
REPORT_DEVICE = "GTX 1650"
CLAIMED = range(32, 129)  # batch sizes that the report calls optimised
CLAIMED_PEAKS_BYTES = (1_568_000_000, 982_000_000)  # batch 32 to 128, batch 1
ROOM_BYTES = 1_650_000_000  # the largest memory_budget whose peak can be held against them
REPRODUCE = """make report                # this report, quick profile
make report PROFILE=full   # the long one
make track && make aim     # all runs in an AIM dashboard on this machine"""


@dataclasses.dataclass
class Records:
    """What a profile left; None is what it did not measure."""

    learning: Study | None = None
    stability: dict[str, Outcome] | None = None
    benchmark: dict[str, Any] | None = None
    sweep: Sweep | None = None


@dataclasses.dataclass
class Claim:
    """A claim of the original report, what was measured here, and the verdict of `RULE`."""

    claim: str
    original: str
    here: str = NOT_MEASURED
    verdict: str = "none"
    why: str = ""

    def judge(self, holds: bool, here: str, why: str, missing: Sequence[str] = ()) -> None:
        """Set what was measured, the verdict and its reason: what is missing comes first."""
        self.here, self.verdict = here, judge(holds, missing)
        self.why = "; ".join([*missing, why] if why else missing)


def read(folder: str | Path) -> Records:
    """The records in `folder`; OnnError for one that cannot be read."""
    loaders = {
        "learning_results.json": Study.load,
        "stability.json": stability_report.load,
        "training_benchmark.json": speed.load_benchmark,
        "sweep.json": Sweep.load,
    }
    paths = {Path(folder) / name: load for name, load in loaders.items()}
    return Records(*(load(path) if path.is_file() else None for path, load in paths.items()))


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


def answer(records: Records) -> str:
    """What was measured here, then how many of the claims hold; which were refuted, which open."""
    found = claims(records)
    lines = measured(records)
    counts = Counter(claim.verdict for claim in found if claim.verdict != "none")
    said = [f"{len(found)} claims: {', '.join(f'{n} {word}' for word, n in counts.items())}"]
    if counts.total() < len(found):
        said.append(f"{len(found) - counts.total()} not measured")
    lines.append(", ".join(said) + ".")
    lines += [
        f"Refuted: {claim.claim} ({claim.here})." for claim in found if claim.verdict == REFUTED
    ]
    lines += [
        f"Not comparable: {claim.claim} ({claim.why.partition('; ')[0]})."
        for claim in found
        if claim.verdict == NOT_COMPARABLE
    ]
    return "\n".join(lines)


def measured(records: Records) -> list[str]:
    """In sentences, what this profile measured on this machine, whatever the report claims."""
    lines = []
    if found := records.benchmark:
        environment = found["environment"]
        place = f"{environment['cores']} cores" if environment["device"] == "cpu" else ""
        depth = max(row["layers"] for row in found["rows"])
        where = f"a model of {depth} layers on {place or environment['device']}"
        lines += [f"Speed, {where}:", *speed.headline(found).splitlines()]
    if found := records.learning:
        name = next(iter(found.runs.values()))[0].model["name"].partition("-instruct")[0]
        lines += [f"Learning, {name}:"]
        lines += curves.answer(found.runs, found.controls, found.reference).splitlines()
        runs = [run for own in found.runs.values() for run in own]
        n_steps = sum(run.steps[-1].step for run in runs)
        n_bad = sum(step.nonfinite for run in runs for step in run.steps)
        lines.append(f"NaN or Inf in {n_steps} optimizer steps of {len(runs)} runs: {n_bad}.")
    if found := records.stability:
        ends = {True: "learns", False: "does not learn"}
        broken = "stays finite" if found["broken"].adapter_finite else "becomes NaN"
        lines.append(
            f"Stability, float16: without the four fixes the adapter {broken}, with them the "
            f"model {ends[found['sound'].learned]}."
        )
    if (found := records.sweep) and found.alone:
        lines.append(f"Sweep: {sweep.cost(found)}")
    return lines


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
    claimed = [pages.code(answer(records)), pages.paragraph(RULE)]
    sections = {"Claims": [*claimed, pages.table(headline_table(records))]}
    sections |= {"Speed": [], "Learning": [], "Stability": [], "Sweep": []}
    if found := records.benchmark:
        sections["Speed"] = [
            pages.code(speed.headline(found)),
            pages.table(speed.speed_table(found)),
        ]
    if found := records.sweep:
        sections["Sweep"] = [pages.code(sweep.answer(found)), pages.table(sweep.table(found))]
    if found := records.learning:
        verdicts = curves.verdict_table(found.runs | found.controls, found.reference)
        picture = curves.study_figure(found.runs, found.controls).png()
        sections["Learning"] = [
            *(pages.paragraph(study.RULE), pages.table(verdicts)),
            pages.picture(picture, "learning curves"),
            *([pages.table(curves.layout_table(found.layouts))] if found.layouts else []),
        ]
    if records.stability:
        sections["Stability"] = [pages.table(stability_report.outcome_table(records.stability))]
    sections["Configuration, hardware, versions"] = [pages.table(settings_table(records))]
    sections["How to reproduce"] = [pages.code(REPRODUCE)]
    missing = [pages.paragraph(NOT_MEASURED + ".")]
    shown = {title: parts or missing for title, parts in sections.items()}
    pages.write_page(path, "Original report and this one", shown)


def _speed_claims(benchmark: dict[str, Any] | None) -> list[Claim]:
    cheaper = Claim(
        "a large batch makes a sample cheaper than the baseline's", "yes, 7 to 13 times"
    )
    ratio = Claim(
        "phi-4: 7 to 13 times less time per sample, batch 32 to 128", "7 to 13 times less"
    )
    rate = Claim("phi-4: samples per second, batch 32 to 128", "0.86 to 1.32")
    memory = Claim("phi-4: peak memory, batch 32 to 128; batch 1", "1568 MB; 982 MB at most")
    rows = [cheaper, ratio, rate, memory]
    pair, missing = speed.ratio_claim(benchmark) if benchmark else (None, [])
    if pair is None:
        return rows
    own, other = pair["own"], pair["other"]
    other_model = own["layers"] != PHI4_LAYERS or own.get("trainable") != PHI4_TRAINED
    of_phi4 = [f"measured on {own['layers']} layers, not on phi-4's 40"] if other_model else []
    here = (
        f"{pair['times']:.1f} times less: {own['ms_per_sample']:,.0f} ms at batch "
        f"{own['batch_size']}, {other['ms_per_sample']:,.0f} ms at batch {other['batch_size']}"
    )
    percents = [
        f"{row['percent_of_limit']:.0f} % of its limit at batch {row['batch_size']}"
        for row in (own, other)
        if row["percent_of_limit"] is not None
    ]
    spread = f"{pair['least']:.1f} to {pair['most']:.1f} over the steps"
    cheaper.judge(pair["least"] > 1, here, spread, missing)
    ratio.judge(pair["times"] >= 7, here, ", ".join(percents), missing + of_phi4)
    machine = f"measured on another machine than the report's {REPORT_DEVICE}"
    elsewhere = [] if REPORT_DEVICE in benchmark["environment"]["device"] else [machine]
    fast = f"{own['samples_per_s']:.2f} (batch {own['batch_size']})"
    rate.judge(own["samples_per_s"] >= 0.86, fast, "", missing + of_phi4 + elsewhere)
    peaks = [own["peak_memory_bytes"], other["peak_memory_bytes"]]
    budget = benchmark.get("budget_bytes")
    wide = (
        []
        if budget is not None and budget <= ROOM_BYTES
        else [
            "it was given more memory" if budget is None else f"it was given {budget / 1e6:,.0f} MB"
        ]
    )
    shown = "; ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks)
    within = all(map(operator.le, peaks, CLAIMED_PEAKS_BYTES))
    memory.judge(within, shown, "", missing + of_phi4 + wide)
    return rows


def _learning_claims(found: Study | None) -> list[Claim]:
    baseline = Claim("the baseline (batch 1) learns", "yes, loss falls by 3.2 %")
    optimised = Claim("optimised (batch 32) learns", "yes, loss falls by 2.2 %")
    alike = Claim("large batches learn as well as the baseline", "yes")
    evidence = Claim("gradients are non-zero, no NaN or Inf", "yes")
    ends = Claim("the first and last layers matter most", "layers 0 to 3 and 36 to 39 of 40")
    rows = [baseline, optimised, alike, evidence, ends]
    if not found:
        return rows
    first = next(label for label in found.runs if label.startswith("baseline"))
    last = next(label for label in found.runs if label.startswith("optimised"))
    controls = {study.verdict(r, found.reference)["learned"] for r in found.controls.values()}
    seeds = ["one seed has no noise"] if len(found.runs[first]) < 2 else []
    fooled = [] if controls == {"NO"} else ["a control learned"]
    for label, claim, claimed in ((first, baseline, range(1, 2)), (last, optimised, CLAIMED)):
        said = study.verdict(found.runs[label], found.reference)
        size = found.runs[label][0].config.get("batch_size")
        other = [] if size is None or size in claimed else [f"measured at batch {size}"]
        here = (
            f"held-out loss {said['loss_before']:.3f} to {said['loss_after']:.3f}: "
            f"{-100 * said['fall']:+.1f} % ({label})"
        )
        against, noise = said["against_shuffled"], said["against_shuffled_noise"]
        why = (
            f"noise of {said['seeds']} seeds {100 * said['noise']:.1f} %; {against:+.3f} ± "
            f"{noise:.3f} against shuffled targets; how far it falls belongs to model and data"
        )
        claim.judge(said["learned"] == "YES", here, why, seeds + fooled + other)
    mean, noise, words = study.compare(found.runs[first], found.runs[last])
    size = found.runs[last][0].config.get("batch_size")
    other = [] if size is None or size in CLAIMED else [f"measured at batch {size}"]
    here = f"final held-out loss {mean:+.3f} (optimised less baseline)"
    alike.judge(words != "higher", here, f"{words}, noise {noise:.3f}", seeds + other)
    norms = [study.verdict(runs, found.reference) for runs in found.runs.values()]
    least = min(said["grad_norm_least"] for said in norms)
    bad = sum(said["nonfinite"] for said in norms)
    here = f"least gradient norm of a layer {least:.2g}, {bad} NaN or Inf"
    evidence.judge(least > 0 and not bad, here, "every trained layer, every step, every seed")
    if found.layouts:
        falls = {k: statistics.fmean(map(study.fall, runs)) for k, runs in found.layouts.items()}
        each = (f"{100 * value:.1f} % ({label})" for label, value in falls.items())
        best, second = sorted(falls, key=falls.__getitem__, reverse=True)[:2]
        settled = study.compare(found.layouts[second], found.layouts[best])[2] == "lower"
        noisy = (
            [] if settled else [curves.layout_reading(found.layouts).split("; ")[-1].rstrip(".")]
        )
        here = f"at equal time loss falls by {', '.join(each)}"
        ends.judge(best.startswith("ends"), here, "" if noisy else f"{best} is best", noisy)
    return rows


def _size_claims() -> list[Claim]:
    phi_4 = geometry_of(geometry("phi-4"), sparse_layers="ends:4")
    trained, total = phi_4.sizes.n_trained, phi_4.n_parameters
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
    fixed = Claim("four fixes together make it sound", "yes")
    needed = Claim("each of the four fixes is needed", "yes, all four")
    if not outcomes:
        return [broken, fixed, needed]
    found, sound = outcomes["broken"], outcomes["sound"].learned
    first = str(found.first[0]) if found.first else "every tensor stays finite"
    why = (
        "" if found.adapter_finite else "the first of the tensors watched; the adapters end as NaN"
    )
    broken.judge(not found.adapter_finite, first, why)
    fixed.judge(
        sound, "it learns with all four" if sound else "it does not learn with all four", ""
    )
    missed = [name for name in FIXES if not outcomes[f"sound - {name}"].learned]
    spare = [name for name in FIXES if name not in missed]
    here = f"missed when taken away: {', '.join(missed) or 'none'}"
    why = f"not missed: {', '.join(spare)}" if spare else ""
    needed.judge(not spare, here, why, [] if sound else ["not sound with all four"])
    return [broken, fixed, needed]


def _environment(found: dict[str, Any]) -> dict[str, Any]:
    names = ("processor", "cores", "memory_gib", "device", "python", "date")
    plain = {name.replace("_gib", " (GiB)"): found[name] for name in names}
    return plain | found["versions"]
