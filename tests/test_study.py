"""The learning study: its rule can say NO, its file comes back, its pages need nothing else."""

import copy
import dataclasses
import math
import re

import pytest

from onn_core import OnnError, TrainConfig
from onn_core.record import EvalRecord, RunRecord, StepRecord, describe_environment, write_json
from onn_workbench import curves, pages, speed, stability, stability_report, study, summary


def settings(folder, output_dir, **changes):
    fixed = {"model_dir": str(folder), "data": "chatterbot", "output_dir": str(output_dir)}
    fixed |= {"batch_size": 4, "max_steps": 3, "max_length": 80, "learning_rate": 1e-2}
    fixed |= {"eval_every": 2, "eval_samples": 4, "eval_batch_size": 4, "sparse_layers": "ends:1"}
    return TrainConfig(**fixed | {"device": "cpu", "progress": False} | changes)


def made_run(before, after, norm=1.0, nonfinite=0, status="finished"):
    """A record of one step whose numbers are known."""
    times = {name.name: 1.0 for name in dataclasses.fields(StepRecord) if name.name.endswith("_s")}
    counts = {"samples": 4, "tokens": 40, "counted_tokens": 20, "bytes_read": 0, "layer_loads": 0}
    step = StepRecord(
        step=1,
        loss=3.0,
        learning_rate=1e-3,
        grad_norm=norm,
        grad_norm_by_layer={"0": norm},
        nonfinite=nonfinite,
        **counts,
        **times,
    )
    evals = [EvalRecord(0, 0, 0.0, before), EvalRecord(1, 4, 2.0, after)]
    model = {"name": "made", "trainable": 8, "parameters": 80}
    return RunRecord({}, model, steps=[step], evals=evals, status=status)


@pytest.mark.parametrize(
    ("runs", "learned"),
    [
        ([made_run(3, 2.7), made_run(3, 2.65), made_run(3, 2.72)], "YES"),
        ([made_run(3, 2.7), made_run(3, 2.9), made_run(3, 3.1)], "NO"),
        ([made_run(3, 2.89), made_run(3, 2.9), made_run(3, 2.88)], "NO"),
        ([made_run(3, 2.95), made_run(3, 2.95), made_run(3, 2.95)], "NO"),
        ([made_run(3, 3.3), made_run(3, 3.31)], "NO"),
        ([made_run(3, 3), made_run(3, 3)], "NO"),
        ([made_run(3, 2)], "NO"),
        ([made_run(3, 2.7, norm=0.0), made_run(3, 2.7)], "NO"),
        ([made_run(3, 2.7, norm=math.inf, nonfinite=1), made_run(3, 2.7)], "NO"),
        ([made_run(3, 2.7, status="stopped: NaN"), made_run(3, 2.7)], "NO"),
    ],
)
def test_the_rule_says_yes_only_to_a_fall_beyond_the_noise(runs, learned):
    shuffled = [made_run(3, after) for after in (2.9, 2.88, 2.89)][: len(runs)]
    assert study.verdict(runs, shuffled)["learned"] == learned


def test_seeds_are_compared_in_pairs():
    """Held-out sets differ far more than the two configurations do."""
    one = [made_run(3, 2.5), made_run(4, 3.5)]
    assert study.compare(one, [made_run(3, 2.4), made_run(4, 3.41)])[2] == "lower"
    assert study.compare(one, [made_run(3, 2.6), made_run(4, 3.6)])[2] == "higher"
    assert study.compare(one, [made_run(3, 2.4), made_run(4, 3.6)])[2].startswith("no difference")


@pytest.fixture(scope="module")
def real(toy_with_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    runs = [study.train(settings(toy_with_tokenizer, folder, seed=seed)) for seed in (0, 1)]
    still = [study.train(settings(toy_with_tokenizer, folder, learning_rate=0.0))] * 2
    shuffled = [
        study.train(settings(toy_with_tokenizer, folder, shuffle_targets=number))
        for number in (1, 2)
    ]
    assert shuffled[0].steps[0].loss != shuffled[1].steps[0].loss
    assert shuffled[0].evals[0].loss == runs[0].evals[0].loss
    in_memory = study.in_memory_losses(settings(toy_with_tokenizer, folder), "float32", 3)
    return study.Study(
        {"batch 4": runs, "again": copy.deepcopy(runs)},
        {"learning rate 0": still},
        shuffled,
        {"ends:1": runs, "all": copy.deepcopy(runs)},
        {"batch 4": in_memory},
        [{"prompt": "Who <b>?", "before": "a", "batch 4": "b"}],
    )


def test_streamed_losses_are_those_of_peft_in_memory(real):
    assert len(real.in_memory["batch 4"]) == 3

    def apart(study):
        said = curves.exactness(study)
        if "equal to the last bit" in said:
            return 0.0
        return float(re.search(r"are (\S+) apart at most", said)[1])

    assert apart(real) < 1e-5
    planted = copy.deepcopy(real)
    planted.runs["batch 4"][0].steps[2].loss += 1e-3
    assert apart(planted) > 9e-4


def test_the_file_comes_back_as_it_was(real, tmp_path):
    curves.write_files(real, tmp_path)
    assert study.Study.load(tmp_path / "learning_results.json") == real
    text = (tmp_path / "learning_results.json").read_text()
    for changed in (text.replace('"schema_version": 1', '"schema_version": 99'), text[:500], "{}"):
        (tmp_path / "bad.json").write_text(changed)
        with pytest.raises(OnnError, match="run 02_learning_curves again"):
            study.Study.load(tmp_path / "bad.json")


def test_pages_stand_alone_and_the_index_links_what_is_there(real, tmp_path):
    curves.write_files(real, tmp_path)
    pages.write_index(tmp_path, "Results")
    page = (tmp_path / "learning_validation.html").read_text()
    assert "data:image/png;base64," in page and ">NO</td>" in page
    assert "Who &lt;b&gt;?" in page
    index = (tmp_path / "index.html").read_text()
    for name in ("learning_results.json", "learning_curves.png", "learning_validation.html"):
        assert f'href="{name}"' in index
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page + index


def test_curves_hold_every_point(real):
    record = real.runs["batch 4"][0]
    held_out = curves.held_out_curve([record], "samples_seen")
    assert [point[0] for point in held_out] == [0, 8, 12]
    first = record.evals[0].loss
    assert [point[1] for point in held_out] == [e.loss - first for e in record.evals]
    training = curves.training_curve([record], "step")
    assert [point[0] for point in training] == [2, 3]
    assert training[1][1] == pytest.approx(record.steps[2].loss)


def test_a_time_limit_ends_a_run_with_an_evaluation(toy_with_tokenizer, tmp_path):
    config = settings(toy_with_tokenizer, tmp_path, max_steps=1000, eval_every=1000)
    record = study.train(config, seconds=1e-9)
    assert record.status == "finished" and len(record.steps) == 1
    assert [e.step for e in record.evals] == [0, 1]
    assert record.evals[1].loss != record.evals[0].loss


def test_a_nan_ends_a_run_with_a_no(toy_with_tokenizer, tmp_path):
    changes = {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 9}
    record = study.train(settings(toy_with_tokenizer, tmp_path, **changes))
    found = study.verdict([record, record], [record, record])
    assert found["learned"] == "NO" and found["nonfinite"] == 2


def made_benchmark(baseline_ms=8000.0, n_steps=2, disturbed=False, batch_size=32, **changes):
    def row(system, batch_size, ms):
        fields = {"system": system, "batch_size": batch_size, "layers": 40, "sequence": 16}
        fields |= {"step_s": ms * batch_size / 1e3, "ms_per_sample": ms, "bytes_read": 10**9}
        fields |= {"step_s_all": [ms * batch_size / 1e3] * n_steps, "trainable": 5_570_560}
        fields |= {"samples_per_s": 1e3 / ms, "tokens_per_s": 16e3 / ms, "limited_by": "read"}
        fields |= {"kept_layers": 0, "percent_of_limit": 90.0, "percent_recomputed": 90.0}
        return fields | {"peak_memory_bytes": 9 * 10**8, "timeline": []} | changes

    peers = [("onn", 1, 7000.0), ("onn", batch_size, 800.0), ("baseline", 1, baseline_ms)]
    peers += [("mapped", batch_size, 700.0), ("offload", batch_size, 900.0)]
    return {
        "schema_version": 1,
        "environment": describe_environment(),
        "cap_bytes": 4 << 30,
        "budget_bytes": 1_500_000_000,
        "disturbed": disturbed,
        "rows": [row(*peer) for peer in peers],
    }


def made_outcomes(*learned):
    """Outcomes of all variants; only the `learned` ones stay finite and learn."""
    step = {"step": 1, "loss": 3.0, "grad_norm": 1.0, "largest_activation": 9.0, "skipped": False}
    step["cross_entropy"] = 3.0
    event = stability.Event(1, "loss", None, "sum loss", "Inf", 1.0, 0.0)
    return {
        label: stability.Outcome(
            dataclasses.asdict(variant),
            [step],
            [] if label in learned else [event],
            {},
            label in learned,
            2.0 if label in learned else math.nan,
        )
        for label, variant in stability.variants().items()
    }


def verdicts(records):
    return {claim.claim: claim.verdict for claim in summary.claims(records)}


def test_what_was_not_measured_has_no_verdict():
    found = verdicts(summary.Records())
    assert set(found.values()) == {"none", "confirmed", "refuted"}
    assert found.pop("trained parameters of phi-4") == "confirmed"
    assert found.pop("all parameters of phi-4") == "refuted"
    assert set(found.values()) == {"none"}


CHEAPER = "a large batch makes a sample cheaper than the baseline's"
RATIO = "phi-4: 7 to 13 times less time per sample, batch 32 to 128"
MEMORY = "phi-4: peak memory, batch 32 to 128; batch 1"


def verdicts_of_speed(*arguments, **changes):
    found = verdicts(summary.Records(benchmark=made_benchmark(*arguments, **changes)))
    return found[CHEAPER], found[RATIO], found[MEMORY]


def test_claims_of_speed_can_be_confirmed_or_refuted():
    assert verdicts_of_speed(8000.0) == ("confirmed", "confirmed", "confirmed")
    assert verdicts_of_speed(3000.0) == ("confirmed", "refuted", "confirmed")
    assert verdicts_of_speed(700.0, peak_memory_bytes=10**9)[::2] == ("refuted", "refuted")


@pytest.mark.parametrize(
    "condition", [{"n_steps": 1}, {"disturbed": True}, {"batch_size": 8}], ids=str
)
def test_no_claim_of_speed_is_judged_outside_its_conditions(condition):
    assert set(verdicts_of_speed(**condition)) == {"not comparable"}
    record = made_benchmark(**condition)
    assert "CONFIRMED" not in speed.reading(record) and "NOT COMPARABLE" in speed.reading(record)


def test_another_model_is_judged_only_where_the_claim_names_none():
    found = verdicts_of_speed(layers=8)
    assert found == ("confirmed", "not comparable", "not comparable")
    assert verdicts_of_speed(trainable=1)[1:] == ("not comparable", "not comparable")


def test_the_report_says_first_what_was_measured_here_whatever_is_comparable():
    runs = {"baseline, batch 1": [made_run(3, 2.7), made_run(3, 2.6)]}
    runs["optimised, batch 32"] = runs["baseline, batch 1"]
    still = [made_run(3, 3), made_run(3, 3.001)]
    learning = study.Study(runs, {"control": still}, still, {}, {})
    records = summary.Records(learning, made_outcomes("sound"), made_benchmark(layers=30))
    said = summary.answer(records).splitlines()
    assert said[0].startswith("Speed, a model of 30 layers on ")
    assert "0.88 times as fast as the best peer (slower), mapped" in said[1]
    assert "Does it learn? baseline, batch 1: YES" in said[4]
    assert "NaN or Inf in 4 optimizer steps of 4 runs: 0." in said
    assert any("becomes NaN, with them the model learns" in line for line in said)
    assert said[-1].startswith("Not comparable: phi-4: peak memory")
    assert said[-1].endswith("(measured on 30 layers, not on phi-4's 40).")
    learning.runs["optimised, batch 32"][0].steps[0].nonfinite = 3
    assert "NaN or Inf in 4 optimizer steps of 4 runs: 6." in summary.answer(records)


def test_the_headline_is_at_equal_batch_against_the_best_peer_also_where_it_is_slower():
    first, second = speed.headline(made_benchmark()).splitlines()
    assert "0.88 times as fast as the best peer (slower), mapped" in first
    assert "10.0 times as fast as the report's baseline at batch 1" in second
    others = [name[-1] for name in speed.ratio_table(made_benchmark()).index]
    assert others == ["mapped, batch 32", "offload, batch 32"] + ["baseline, batch 1"] * 2


def test_claims_of_stability_can_be_confirmed_or_refuted():
    fixed, needed = "four fixes together make it sound", "each of the four fixes is needed"
    spare = "sound - inputs cast to float32"
    for learned, expected in (
        (["sound"], ("confirmed", "confirmed")),
        (["sound", spare], ("confirmed", "refuted")),
        ([spare], ("refuted", "not comparable")),
    ):
        found = verdicts(summary.Records(stability=made_outcomes(*learned)))
        assert (found[fixed], found[needed]) == expected
    assert found["float16 weights with LoRA become NaN"] == "confirmed"
    fine = summary.Records(stability=made_outcomes("broken"))
    assert verdicts(fine)["float16 weights with LoRA become NaN"] == "refuted"


def test_claims_of_learning_can_be_confirmed_refuted_or_not_comparable():
    falls = [made_run(3, 2.7), made_run(3, 2.6)]
    rises = [made_run(3, 3.2), made_run(3, 3.3)]
    still = [made_run(3, 3), made_run(3, 3.001)]
    claim = "optimised (batch 32) learns"
    for optimised, control, expected in (
        (falls, still, "confirmed"),
        (rises, still, "refuted"),
        (falls, [made_run(3, 2.4), made_run(3, 2.3)], "not comparable"),
    ):
        runs = {"baseline, batch 1": falls, "optimised, batch 32": optimised}
        made = study.Study(runs, {"control": control}, still, {}, {})
        assert verdicts(summary.Records(made))[claim] == expected
    one = {label: records[:1] for label, records in runs.items()}
    made = study.Study(one, {"control": still[:1]}, still[:1], {}, {})
    found = verdicts(summary.Records(made))
    assert found[claim] == found["large batches learn as well as the baseline"] == "not comparable"


def test_the_answer_names_the_worse_batch_and_by_how_much():
    worse = [made_run(3, 2.8), made_run(3, 2.7)]
    runs = {"baseline, batch 1": [made_run(3, 2.7), made_run(3, 2.6)], "batch 8": worse}
    still = [made_run(3, 3), made_run(3, 3.001)]
    said = curves.answer(runs, {"control": still}, still)
    assert "batch 8: NO, worse by 0.100 ± 0.000 than baseline, batch 1." in said
    assert said.endswith("No control learned.")


def test_thinned_records_hold_what_the_study_reads():
    steps = [
        dataclasses.replace(
            made_run(3, 2).steps[0],
            step=number,
            loss=4 - number / 200,
            grad_norm_by_layer={"0": 1 + number % 7, "1": 0.01 if number == 333 else 2.0},
            nonfinite=int(number == 222),
        )
        for number in range(1, 401)
    ]
    evals = [EvalRecord(n, 4 * n, 0.0, 4 - n / 200) for n in (0, 130, 260, 400)]
    whole = RunRecord({}, {"layers": 2}, steps=steps, evals=evals, status="finished")
    thin = study.thinned(whole)
    assert len(thin.steps) < 80 and thin.steps[:8] == steps[:8] and thin.steps[-1].step == 400
    for name in ("samples", "counted_tokens", "bytes_read", "step_s"):
        assert sum(getattr(s, name) for s in thin.steps) == sum(getattr(s, name) for s in steps)
    still = [made_run(3, 3), made_run(3, 3)]
    assert study.verdict([thin] * 2, still) == study.verdict([whole] * 2, still)
    for curve in (curves.training_curve, curves.held_out_curve):
        for ours, theirs in zip(curve([thin], "step"), curve([whole], "step"), strict=True):
            assert ours == pytest.approx(theirs)
    assert study.thinned(dataclasses.replace(whole, steps=steps[:40])).steps == steps[:40]


def test_runs_of_a_study_in_one_pass_are_those_alone(real, toy_with_tokenizer, tmp_path):
    configs = [settings(toy_with_tokenizer, tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    together = study.train_all(configs)
    for one, other in zip(real.runs["batch 4"], together, strict=True):
        assert [step.loss for step in one.steps] == [step.loss for step in other.steps]
        assert [done.loss for done in one.evals] == [done.loss for done in other.evals]
    assert not (tmp_path / "0/checkpoints").exists()
    steps = []
    assert str(study.train_all(configs, steps.append, resume=True)) == str(together)
    assert not steps  # finished before
    steep = {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 9}
    (failed,) = study.train_all([settings(toy_with_tokenizer, tmp_path / "steep", **steep)])
    assert failed.status.startswith("stopped")


def test_the_comparison_page_shows_all_records_and_what_is_missing(real, tmp_path):
    labels = {"baseline, batch 4": "batch 4", "optimised, batch 4": "again"}
    named = dataclasses.replace(
        real, runs={label: real.runs[old] for label, old in labels.items()}, in_memory={}
    )
    curves.write_files(named, tmp_path)
    outcomes = made_outcomes("sound")
    stability_report.save(tmp_path / "stability.json", outcomes)
    write_json(tmp_path / "training_benchmark.json", made_benchmark())
    records = summary.read(tmp_path)
    assert records.learning == named and records.benchmark == made_benchmark()
    assert records.stability.keys() == outcomes.keys()
    summary.write_comparison(records, tmp_path / "comparison.html")
    page = (tmp_path / "comparison.html").read_text()
    assert ">confirmed</td>" in page and page.count(f"<p>{summary.NOT_MEASURED}.</p>") == 1
    (tmp_path / "stability.json").unlink()
    summary.write_comparison(summary.read(tmp_path), tmp_path / "comparison.html")
    assert summary.NOT_MEASURED in (tmp_path / "comparison.html").read_text()
    (tmp_path / "training_benchmark.json").write_text("{}")
    with pytest.raises(OnnError, match="measure again"):
        summary.read(tmp_path)


def test_a_run_that_was_cut_goes_on_and_a_finished_one_is_read(real, toy_with_tokenizer, tmp_path):
    def cut(record):
        if len(record.steps) == 2:
            raise KeyboardInterrupt

    def went_on(**changes):
        steps.clear()
        changed = dataclasses.replace(config, **changes)
        return study.train(changed, lambda record: steps.append(len(record.steps)), resume=True)

    config, steps = settings(toy_with_tokenizer, tmp_path / "cut"), []
    with pytest.raises(KeyboardInterrupt):
        study.train(config, cut)
    resumed, whole = went_on(), real.runs["batch 4"][0]
    assert steps == [3]
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    assert [done.loss for done in resumed.evals] == [done.loss for done in whole.evals]
    assert str(went_on()) == str(resumed) and steps == [3]
    assert not (tmp_path / "cut/checkpoints").exists()
    went_on(learning_rate=2e-2)
    assert steps == [1, 2, 3]
