"""A sweep: the runs that its text means, which is best, what the pass cost."""

import copy
import dataclasses
import json

import pytest
from small import config, write_small

from onn_core.errors import ConfigError, OnnError
from onn_workbench import sweep
from onn_workbench.report import LiveLine
from onn_workbench.tables import Table

GRID = "{learning_rate: [1e-2, 1e30], lora_rank: [2, 4], seed: [0, 1]}"


def chosen(small, folder, text):
    common = dataclasses.asdict(config(small, folder))
    changes = {"max_grad_norm": None, "loss_scale": None, "eval_every": 3, "lora_dropout": 0.0}
    return sweep.configs(text, **common | changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """A sweep of which half the runs fail, and of each other run the first steps alone."""
    configs = chosen(small, tmp_path_factory.mktemp("sweep"), GRID)
    lines = LiveLine(configs=configs)
    result = sweep.train(configs, lines)
    assert lines.lines.keys() >= result.finished.keys()
    result.alone = {name: sweep.train_alone(configs[name], 2) for name in result.finished}
    return result


def test_text_means_a_grid_or_a_list_of_runs(small, tmp_path):
    grid = chosen(small, tmp_path, "{learning_rate: [1e-3, 2.0e-3], lora_rank: [2, 4]}")
    assert [c.learning_rate for c in grid.values()] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert len({c.output_dir for c in grid.values()}) == 4
    some = chosen(small, tmp_path, "[{lora_rank: 2}, {lora_rank: 4, sparse_layers: [0, 2]}]")
    assert [c.sparse_layers for c in some.values()] == ["all", [0, 2]]
    assert list(some)[0] == "lora_rank=2"
    for text, said in (
        ("3", "a map such as"),
        ("{lora_rank: 3}", "lists of values"),
        ("{rank: [3]}", "rank is no setting"),
        ("{a: [", "write YAML"),
    ):
        with pytest.raises(ConfigError, match=said):
            chosen(small, tmp_path, text)


def test_the_best_is_the_finished_run_whose_loss_falls_most(made):
    assert len(made.finished) == 4 and len(made.runs) == 8
    ends = {name: run.evals[-1].loss - run.evals[0].loss for name, run in made.finished.items()}
    assert list(ends.values()) == sorted(ends.values())
    firsts = {name: run.evals[0].loss for name, run in made.finished.items()}
    assert len(set(firsts.values())) == 2  # each seed holds out samples of its own
    groups = sweep.ranked(made)
    assert [len(names) for names in groups] == [2, 2]
    assert sweep.best(made) == min(groups[0], key=ends.__getitem__)
    assert f"Best of 8 runs: {sweep.best(made)}," in sweep.answer(made)
    assert "over 2 seeds" in sweep.answer(made)
    assert sweep.effects(made).startswith("lora_rank: ")


def test_a_seed_that_begins_lower_is_not_better_for_that(made):
    groups = sweep.ranked(made)
    names = [groups[0][0], groups[1][1]]  # of different settings and seeds: one of each is missing
    two = dataclasses.replace(
        made,
        settings={name: made.settings[name] for name in names},
        runs={name: copy.deepcopy(made.runs[name]) for name in names},
    )
    for name, losses in zip(names, ((5.4, 3.0), (3.0, 2.9)), strict=True):
        evals = two.runs[name].evals
        two.runs[name].evals = [
            dataclasses.replace(done, loss=loss)
            for done, loss in zip((evals[0], evals[-1]), losses, strict=True)
        ]
    assert sweep.best(two) == next(iter(two.finished)) == names[0]


def test_tables_and_figures_hold_every_run(made):
    table = sweep.table(made)
    assert len(table) == 8 and list(table["status"][:4]) == ["finished"] * 4
    assert table["status"][7].startswith("stopped: step 2")
    assert "lora_rank" in repr(Table(table))
    lines = sweep.curves(made).rows[0][0].parts
    assert len(lines) == 4 and lines[-1].label == f"best: {next(iter(made.finished))}"
    (trace,) = sweep.parallel(made).plotly()["data"]
    assert [part["label"] for part in trace["dimensions"]][-1] == "change of held-out loss"
    assert len(trace["line"]["color"]) == 4


def test_the_pass_is_compared_with_the_runs_alone(made):
    assert sweep.equal_to_alone(made)
    reads = [one.bytes_read for one in made.alone.values()]
    assert max(reads) < sweep.cost_table(made)["read (GiB)"].iloc[2] * 2**30 == sum(reads)
    assert "4 runs" not in sweep.cost(made) and "8 runs in one pass read" in sweep.cost(made)
    name = next(iter(made.alone))
    planted = dataclasses.replace(made.alone[name], losses=[0.0, 0.0])
    assert not sweep.equal_to_alone(dataclasses.replace(made, alone=made.alone | {name: planted}))


def test_the_file_comes_back_as_it_was(made, tmp_path):
    made.save(tmp_path / "sweep.json")
    assert sweep.Sweep.load(tmp_path / "sweep.json") == made
    (tmp_path / "sweep.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(OnnError, match="run 07_sweep again"):
        sweep.Sweep.load(tmp_path / "sweep.json")
