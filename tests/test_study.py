"""The learning study: its rule can say NO, its file comes back, its pages need nothing else."""

import copy
import dataclasses
import math

import pytest

from onn_core import OnnError, TrainConfig, curves, pages, study
from onn_core.record import EvalRecord, RunRecord, StepRecord

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def settings(folder, output_dir, **changes):
    fixed = {"model_dir": str(folder), "data": "chatterbot", "output_dir": str(output_dir)}
    fixed |= {"batch_size": 4, "max_steps": 3, "max_length": 80, "learning_rate": 1e-2}
    fixed |= {"eval_every": 2, "eval_samples": 8, "eval_batch_size": 8, "sparse_layers": "ends:1"}
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
        ([made_run(3, 2.7), made_run(3, 2.6), made_run(3, 2.8)], "YES"),
        ([made_run(3, 2.7), made_run(3, 2.9), made_run(3, 3.1)], "NO"),
        ([made_run(3, 3.3), made_run(3, 3.31)], "NO"),
        ([made_run(3, 3), made_run(3, 3)], "NO"),
        ([made_run(3, 2)], "NO"),
        ([made_run(3, 2.7, norm=0.0), made_run(3, 2.7)], "NO"),
        ([made_run(3, 2.7, norm=math.inf, nonfinite=1), made_run(3, 2.7)], "NO"),
        ([made_run(3, 2.7, status="stopped: NaN"), made_run(3, 2.7)], "NO"),
    ],
    ids=["falls", "noise", "rises", "still", "one seed", "no gradient", "inf", "stopped"],
)
def test_the_rule_says_yes_only_to_a_fall_beyond_the_noise(runs, learned):
    assert study.verdict(runs)["learned"] == learned


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
    in_memory = study.in_memory_losses(settings(toy_with_tokenizer, folder), "float32", 3)
    return study.Study(
        {"batch 4": runs, "again": copy.deepcopy(runs)},
        {"learning rate 0": still},
        {"ends:1": runs, "all": copy.deepcopy(runs)},
        {"batch 4": in_memory},
        [{"prompt": "Who <b>?", "before": "a", "batch 4": "b"}],
    )


def test_streamed_losses_are_those_of_peft_in_memory(real):
    assert len(real.in_memory["batch 4"]) == 3
    assert study.in_memory_difference(real)["batch 4"] < 1e-5
    planted = copy.deepcopy(real)
    planted.runs["batch 4"][0].steps[2].loss += 1e-3
    assert study.in_memory_difference(planted)["batch 4"] > 9e-4


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
    assert "data:image/png;base64," in page and "<td>NO</td>" in page
    assert "Who &lt;b&gt;?" in page
    index = (tmp_path / "index.html").read_text()
    for name in ("learning_results.json", "learning_curves.png", "learning_validation.html"):
        assert f'href="{name}"' in index
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page + index


def test_curves_hold_every_point(real):
    record = real.runs["batch 4"][0]
    held_out = curves.held_out_curve([record], "samples")
    assert [point[0] for point in held_out] == [0, 8, 12]
    assert [point[1] for point in held_out] == [e.loss for e in record.evals]
    training = curves.training_curve([record], "steps")
    assert [point[0] for point in training] == [1, 2.5]
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
    found = study.verdict([record, record])
    assert found["learned"] == "NO" and found["nonfinite"] == 2
