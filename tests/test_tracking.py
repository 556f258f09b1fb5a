"""Records as metric rows: in JSONL, AIM and TensorBoard."""

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from browser import chromium, free_port, text, wait_for

import onn_core
from onn_core.errors import OnnError
from onn_workbench import tracking

browser = pytest.mark.browser
needs_aim = pytest.mark.skipif(
    not importlib.util.find_spec("aim"), reason="AIM is not installed (Python 3.11 or 3.12 only)"
)


@pytest.fixture(scope="module")
def results(toy_with_tokenizer, tmp_path_factory):
    """A folder results/quick with the record of a real run, and a JSON file that is none."""
    folder = tmp_path_factory.mktemp("tracked")
    sums = [{"prompt": f"{n} and {n}?", "response": f"{2 * n}."} for n in range(20)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    config = onn_core.TrainConfig(
        model_dir=str(toy_with_tokenizer),
        data=str(folder / "sums.jsonl"),
        output_dir=str(folder / "run"),
        batch_size=12,  # more than an epoch in three steps
        max_length=64,
        max_steps=3,
        eval_every=1,
        eval_samples=8,
        device="cpu",
        progress=False,
    )
    quick = folder / "results" / "quick"
    quick.mkdir(parents=True)
    onn_core.ChunkedLoraTrainer(config).train().save(quick / "02_toy.json")
    (quick / "learning_results.json").write_text('{"schema_version": 1}')
    return folder


def read_metrics(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row | {"value": float(row["value"])} for row in rows]


def values(rows, name, **context):
    return [row["value"] for row in rows if (row["name"], row["context"]) == (name, context)]


def run_tracking(folder, *arguments):
    command = [sys.executable, "-m", "onn_workbench.tracking", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_jsonl_holds_what_the_record_holds(results):
    quick = results / "results" / "quick"
    record = onn_core.RunRecord.load(quick / "02_toy.json")
    (path,) = tracking.write_metrics(quick)
    assert path.name == "learning_02_toy.jsonl"
    rows = read_metrics(path)
    assert rows == list(tracking.metric_rows(record))
    assert all(row.keys() == {"name", "value", "step", "epoch", "context"} for row in rows)
    assert values(rows, "loss", subset="train") == [step.loss for step in record.steps]
    assert values(rows, "loss", subset="held_out") == [held.loss for held in record.evals]
    norms = [step.grad_norm_by_layer["1"] for step in record.steps]
    assert values(rows, "grad_norm", subset="train", layer="1") == norms
    assert values(rows, "samples_seen", subset="train") == [12, 24, 36]
    assert values(rows, "peak_memory_bytes") == [record.peak_memory_bytes]
    epochs = {row["step"]: row["epoch"] for row in rows if row["name"] == "step_s"}
    assert epochs == {1: 0, 2: 0, 3: 1}
    assert record.data["train"] == 18


def test_runs_inside_a_study_and_a_benchmark_are_found_once(results, tmp_path):
    path = results / "results" / "quick" / "02_toy.json"
    record = onn_core.RunRecord.load(path)
    again = onn_core.RunRecord.load(path)
    again.wall_s += 1
    folder = tmp_path / "quick"
    (folder / "checkpoints").mkdir(parents=True)
    record.save(folder / "02_toy.json")
    record.save(folder / "checkpoints" / "record.json")
    study = {"schema_version": 1, "runs": {"toy, batch 12": [record.to_dict(), again.to_dict()]}}
    (folder / "learning_results.json").write_text(json.dumps(study))
    row = {"system": "onn", "layers": 3, "batch_size": 8, "sequence": 16, "step_s": 2.5}
    bench = {"schema_version": 1, "environment": {"cores": 2}, "ceilings": {}, "rows": [row]}
    (folder / "training_benchmark.json").write_text(json.dumps(bench))
    runs = {run.name: run for run in tracking.load_runs(tmp_path)}
    second = "learning_results/runs/toy, batch 12/2"
    assert list(runs) == ["02_toy", second, "training_benchmark"]
    assert {run.group for run in runs.values()} == {"quick"}
    assert values(runs[second].rows, "wall_s") == [again.wall_s]
    context = {"system": "onn", "layers": 3, "batch_size": 8, "sequence": 16}
    assert values(runs["training_benchmark"].rows, "step_s", **context) == [2.5]


def test_jsonl_holds_a_nan_as_text(results, tmp_path):
    record = onn_core.RunRecord.load(results / "results" / "quick" / "02_toy.json")
    record.steps[1].loss = math.nan
    record.save(tmp_path / "02_toy.json")
    (path,) = tracking.write_metrics(tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert math.isnan(values(read_metrics(path), "loss", subset="train")[1])


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(OnnError, match="no run record under .*: make report"):
        tracking.load_runs(tmp_path)
    code = "import sys; sys.modules['aim'] = None; from onn_workbench import tracking; "
    code += "tracking.show_aim('.')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AIM is not installed" in done.stderr


@browser
def test_tensorboard_reads_the_run_back(results):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    assert run_tracking(results, "tensorboard").stdout == "1 runs, 1 of them new: 02_toy\n"
    assert run_tracking(results, "tensorboard").stdout == "1 runs, 0 of them new: none\n"
    (folder,) = (results / "tensorboard" / "quick").iterdir()
    code = "import sys, json\n"
    code += "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
    code += "events = EventAccumulator(sys.argv[1]).Reload()\n"
    code += "print(json.dumps([[e.step, e.value] for e in events.Scalars('loss/held_out')]))\n"
    code += "print(events.Tags()['tensors'])"
    command = [sys.executable, "-W", "ignore", "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    record = onn_core.RunRecord.load(results / "results" / "quick" / "02_toy.json")
    assert json.loads(done[0]) == [[e.step, pytest.approx(e.loss)] for e in record.evals]
    assert "parameters" in done[1]


@browser
@needs_aim
def test_aim_reads_the_run_back_and_chromium_sees_it(results):
    assert (
        run_tracking(results, "show").stderr
        == ". has no AIM repository yet: make track fills one.\n"
    )
    assert run_tracking(results, "aim").stdout == "1 runs, 1 of them new: 02_toy\n"
    assert run_tracking(results, "aim").stdout == "1 runs, 0 of them new: none\n"
    code = "import aim, json\n"
    code += "(run,) = aim.Repo.from_path('.').iter_runs()\n"
    code += "held_out = {'subset': 'held_out'}\n"
    code += "(curve,) = [m for m in run.metrics() if m.context.to_dict() == held_out]\n"
    code += "told = [run.name, run.experiment, run['config'], curve.data.items_list()[1][0]]\n"
    code += "print(json.dumps(told))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=results, capture_output=True, text=True)
    record = onn_core.RunRecord.load(results / "results" / "quick" / "02_toy.json")
    held_out = [held.loss for held in record.evals]
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["02_toy", "quick", record.config, held_out]

    port = free_port()
    command = [sys.executable, "-m", "onn_workbench.tracking", "show", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"

    def answers():
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200

    with subprocess.Popen(command, cwd=results, start_new_session=True) as server:
        try:
            wait_for(answers, "AIM")
            taken = run_tracking(results, "show", "--port", str(port))
            assert "address already in use" in taken.stdout + taken.stderr
            look_at_aim(address, record)
        finally:
            os.killpg(server.pid, signal.SIGINT)  # Ctrl-C reaches all that AIM has started
        server.wait(timeout=30)
    wait_for(lambda: not answers(), "the end of AIM")


def look_at_aim(address, record):
    """The run's name, its curves and its parameters, as a browser draws them."""
    with chromium() as page:
        page.get(f"{address}/runs")
        link = "a[href*='/runs/']"
        found = wait_for(lambda: page.find_elements("css selector", link), "the run")
        assert found[0].text == "02_toy"
        run_address = found[0].get_attribute("href").rstrip("/")
        page.get(f"{run_address}/metrics")
        curves = "path.Line[d*='L']"  # with more than one point
        wait_for(lambda: len(page.find_elements("css selector", curves)) > 3, "the curves")
        assert "grad_norm" in text(page)
        page.get(f"{run_address}/params")
        size = f"config.batch_size {record.config['batch_size']}"
        wait_for(lambda: size in " ".join(text(page).split()), "the parameters")
