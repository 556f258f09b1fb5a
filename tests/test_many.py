"""Several runs in one pass over the weights: each is equal, bit for bit, to the run alone."""

import dataclasses
import os
import re
import signal
import threading
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import DIFFERENT, config, require_equal, write_small

import onn_core
from onn_core import many
from onn_core.__main__ import main
from onn_core.errors import ConfigError, NonFiniteError, TooManyRunsError
from onn_core.ops import matmul
from onn_core.run.checkpoints import Checkpoints
from onn_core.streaming.together import Together
from onn_core.weights.reader import DirectFiles

MIXTRAL = {"num_local_experts": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))


def together(small, folder, runs, resume=False, **changes):
    configs = [config(small, folder / n, **changes | own) for n, own in runs.items()]
    return onn_core.train_many(configs, resume)


def alone(small, folder, runs, **changes):
    for name, own in runs.items():
        onn_core.ChunkedLoraTrainer(config(small, folder / name, **changes | own)).train()


@pytest.fixture(scope="module")
def each_alone(small, tmp_path_factory):
    """The folder in which each of DIFFERENT was trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    alone(small, folder, DIFFERENT)
    return folder


def count_reads(monkeypatch):
    """A function that says how many bytes of weights were read since it was last called."""
    read, reads = DirectFiles.read, []

    def counted(*arguments):
        n_read = read(*arguments)
        reads.append(n_read)  # several readers at once: a sum of their own would lose some
        return n_read

    def taken():
        n_bytes = sum(reads)
        reads.clear()
        return n_bytes

    monkeypatch.setattr(DirectFiles, "read", counted)
    return taken


def test_eight_different_runs_are_equal_to_each_alone(small, each_alone, tmp_path):
    records = together(small, tmp_path / "many", DIFFERENT)
    for name, record in zip(DIFFERENT, records, strict=True):
        require_equal(tmp_path / "many" / name, each_alone / name)
        assert record == onn_core.RunRecord.load(tmp_path / "many" / name / "record.json")
    assert [len(record.steps) for record in records] == [7, 7, 4, 7, 9, 7, 7, 7]
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("onn", "Thread"))]


@pytest.mark.parametrize(
    ("family", "own"), [("mixtral", MIXTRAL), ("gpt2", {}), ("gemma2", {"sliding_window": 4})]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT sets it for GPT-2
def test_families(family, own, tmp_path):
    """A mixture of experts, and a family with dropout of its own."""
    model = write_small(tmp_path, family=family, **own)
    names, quick = ("everything", "seed", "last", "short"), {"max_steps": 2, "eval_samples": 2}
    runs = {name: DIFFERENT[name] | quick for name in names}
    together(model, tmp_path / "many", runs)
    alone(model, tmp_path / "alone", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights(kind, small, tmp_path, monkeypatch):
    """Each run's modules multiply by the weights that all share."""
    monkeypatch.setenv("ONN_CACHE", str(tmp_path / "cache"))
    quick = {"max_steps": 2, "eval_samples": 2, "quantize": kind}
    runs = {name: DIFFERENT[name] | quick for name in ("everything", "last", "targets")}
    together(small, tmp_path / "many", runs)
    alone(small, tmp_path / "alone", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)


def write_mixtral(folder, **own):
    """The folder of a model that is stored in bfloat16, and a .jsonl file."""
    model_dir, data = write_small(folder, family="mixtral", **MIXTRAL | own)
    for path in model_dir.glob("*.safetensors"):
        tensors = {name: x.bfloat16() for name, x in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return model_dir, data


def test_one_run_adapts_experts_that_the_others_multiply_as_stored(tmp_path, monkeypatch):
    """In several blocks, which round otherwise than a matrix that is made as a whole."""
    monkeypatch.setattr("onn_core.ops.matmul.BLOCK_BYTES", 4 * 32 * 16)
    model = write_mixtral(tmp_path)
    quick = {"max_steps": 2, "eval_samples": 2, "dtype": "float32", "lora_dropout": 0.0}
    runs = {name: DIFFERENT[name] | quick for name in ("everything", "last", "short")}
    runs["experts"] = quick | {"target_parameters": ["experts.gate_up_proj"]}
    together(model, tmp_path / "many", runs)
    alone(model, tmp_path / "alone", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)


def test_a_run_that_would_need_dense_experts_and_does_not_fit_leaves_the_others(tmp_path):
    model = write_mixtral(tmp_path, hidden_size=256)
    quick = {"max_steps": 1, "eval_every": 0, "dtype": "float32", "lora_dropout": 0.0}
    runs = {"experts": {"target_parameters": ["experts.gate_up_proj"]}, "plain": {}}
    first, second = together(model, tmp_path / "many", runs, memory_budget="72MiB", **quick)
    assert "memory_budget" in first.status and second.status == "finished"


def count_rows(monkeypatch):
    """A list of the rows of every product of a frozen weight that is made."""
    rows, multiply = [], matmul._matmul

    def counted(x, *given):
        rows.append(x.numel() // x.shape[-1])
        return multiply(x, *given)

    monkeypatch.setattr(matmul, "_matmul", counted)
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_runs_share_their_products_and_keep_their_bits(dtype, small, tmp_path, monkeypatch):
    """Rows of three runs, each at most 4 x 13, are one matrix, forward and in every recompute."""
    same = {
        "batch_size": 4,
        "max_length": 16,
        "packing": True,
        "completion_only": False,
        "micro_batch_size": None,
    }
    same |= {"max_steps": 4, "eval_every": 0, "dtype": dtype, "lora_dropout": 0.0}
    runs = {str(seed): same | {"seed": seed, "learning_rate": 0.01 * seed} for seed in (1, 2, 3)}
    alone(small, tmp_path / "alone", runs)
    rows = count_rows(monkeypatch)
    together(small, tmp_path / "many", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)
    if dtype != "bfloat16":  # whose toy matrices may be multiplied in another order
        assert max(rows) > 2 * 52
        monkeypatch.setattr("onn_core.streaming.together.SHARED_ROWS", 110)
        rows.clear()
        together(small, tmp_path / "two", runs)
        assert 52 < max(rows) <= 128


def test_products_whose_bits_would_change_are_made_apart(small, tmp_path, monkeypatch):
    """A product that depends on the number of its rows, as libraries' do for very few."""
    multiply = matmul._matmul

    def uneven(x, weight, bias=None):
        n_rows = x.numel() // x.shape[-1]
        return multiply(x, weight, bias) * (1 + n_rows / 1e4)

    monkeypatch.setattr(matmul, "_matmul", uneven)
    same = {"batch_size": 4, "max_length": 16, "packing": True, "completion_only": False}
    same |= {"max_steps": 3, "dtype": "float16"}  # which a run alone multiplies by it, too
    runs = {str(seed): same | {"seed": seed} for seed in (1, 2)}
    alone(small, tmp_path / "alone", runs)
    together(small, tmp_path / "many", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)


def test_a_shared_product_that_fails_is_made_apart(small, tmp_path, monkeypatch):
    """As where there is no memory for the rows of all."""
    multiply = matmul._matmul

    def fails(x, *given):
        if x.numel() // x.shape[-1] > 64:
            raise MemoryError("no room for the rows")
        return multiply(x, *given)

    monkeypatch.setattr(matmul, "_matmul", fails)
    same = {"batch_size": 4, "max_length": 16, "packing": True, "completion_only": False}
    runs = {str(seed): same | {"seed": seed, "max_steps": 3} for seed in (1, 2)}
    alone(small, tmp_path / "alone", runs)
    together(small, tmp_path / "many", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)


def test_runs_in_a_budget_whose_micro_batches_and_evaluations_differ(small, tmp_path):
    same = {"batch_size": 2, "max_steps": 3, "memory_budget": "70MB", "eval_every": 1}
    same |= {"micro_batch_size": None}
    runs = {
        "wide": same | {"eval_batch_size": 12, "eval_samples": 12},
        "narrow": same | {"batch_size": 8, "micro_batch_size": 1, "eval_every": 0, "seed": 1},
        "third": same | {"batch_size": 8, "eval_every": 0, "seed": 2},
    }
    together(small, tmp_path / "many", runs)
    alone(small, tmp_path / "alone", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)


def test_the_order_of_runs_and_their_neighbours_change_nothing(small, tmp_path):
    runs = {name: DIFFERENT[name] for name in ("short", "everything", "last")}
    together(small, tmp_path / "a", runs)
    together(small, tmp_path / "b", dict(reversed(runs.items())))
    for name in runs:
        require_equal(tmp_path / "a" / name, tmp_path / "b" / name)


def test_a_run_that_fails_leaves_the_others_going(small, each_alone, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": \n')
    steep = {"learning_rate": 1e30, "max_grad_norm": None, "loss_scale": None}
    runs = {"steep": steep, "good": {}, "bad": {"data": str(bad)}}
    records = together(small, tmp_path / "many", runs)
    require_equal(tmp_path / "many/good", each_alone / "everything")
    assert records[0].status.startswith("stopped: step 2: ") and len(records[0].steps) == 1
    assert "line 1 is not JSON" in records[2].status and not records[2].steps
    assert (tmp_path / "many/steep/adapter/adapter_model.safetensors").exists()
    with pytest.raises(NonFiniteError, match="step 2"):
        together(small, tmp_path / "all", {"steep": steep})


def test_an_error_of_ours_is_raised_when_the_others_have_ended(small, each_alone, tmp_path):
    def fail(record):
        if len(record.steps) == 2 and record.config["seed"] == 4:
            raise RuntimeError("planted")

    names = ("everything", "seed")
    configs = [config(small, tmp_path / "many" / name, **DIFFERENT[name]) for name in names]
    with pytest.raises(RuntimeError, match="planted"):
        onn_core.train_many(configs, on_step=fail)
    require_equal(tmp_path / "many/everything", each_alone / "everything")
    onn_core.train_many(configs, resume=True)  # from step 2, and from its end
    require_equal(tmp_path / "many/seed", each_alone / "seed")


@pytest.fixture
def heeds_interrupts():
    """Processes in the background of a shell ignore SIGINT, and so would a run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_stops_all_and_resume_continues_all(
    small, each_alone, tmp_path, heeds_interrupts
):
    runs = {name: DIFFERENT[name] for name in ("everything", "last", "short")}

    def interrupt(record):
        if len(record.steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the main thread handles it

    configs = [config(small, tmp_path / "many" / name, **own) for name, own in runs.items()]
    with pytest.raises(KeyboardInterrupt, match="stopped after step .*resume=True"):
        onn_core.train_many(configs, on_step=interrupt)
    for name in runs:
        assert Checkpoints(tmp_path / "many" / name, 9).paths()
    onn_core.train_many(configs, resume=True)
    for name in runs:
        require_equal(tmp_path / "many" / name, each_alone / name)


def test_one_pass_reads_what_the_hungriest_run_reads_alone(small, tmp_path, monkeypatch):
    names = ("everything", "last", "short", "shuffled")
    runs = {name: DIFFERENT[name] | {"max_steps": 5} for name in names}
    n_bytes, each = count_reads(monkeypatch), []
    for name, own in runs.items():
        alone(small, tmp_path / "alone", {name: own})
        each.append(n_bytes())
    together(small, tmp_path / "many", runs)
    assert n_bytes() <= 1.1 * max(each) < 0.6 * sum(each)


EARLY = {"early_stopping_patience": 2, "early_stopping_threshold": 10}  # no loss falls so far


def test_a_run_that_stops_early_leaves_the_others_going(small, tmp_path):
    runs = {"early": EARLY, "going": {"early_stopping_patience": 2}, "last": DIFFERENT["last"]}
    records = together(small, tmp_path / "many", runs)
    alone(small, tmp_path / "alone", runs)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)
    assert [len(record.steps) for record in records] == [4, 7, 4]
    assert [record.status for record in records] == 3 * ["finished"]
    assert "by more than 10 in 2 evaluations; the best was" in records[0].stopped_early
    assert not records[1].stopped_early and not records[2].stopped_early


def test_a_run_that_stops_early_is_resumed_to_the_same_end(small, each_alone, tmp_path):
    def fail(record):
        if len(record.steps) == 3:
            raise RuntimeError("planted")

    early = config(small, tmp_path / "early", **EARLY)
    with pytest.raises(RuntimeError, match="planted"):
        onn_core.train_many([early], on_step=fail)
    assert len(onn_core.train_many([early], resume=True)[0].steps) == 4
    alone(small, tmp_path, {"alone": EARLY})
    require_equal(tmp_path / "early", tmp_path / "alone")
    assert len(onn_core.train_many([early], resume=True)[0].steps) == 4
    patient = dataclasses.replace(early, early_stopping_patience=9)  # goes on, as if always so
    record = onn_core.ChunkedLoraTrainer(patient).train(resume=True)
    require_equal(tmp_path / "early", each_alone / "everything")
    assert len(record.steps) == 7 and not record.stopped_early


def test_every_run_has_a_line_of_the_bar(small, tmp_path, capsys):
    runs = {"first": {"max_steps": 1}, "second": {"max_steps": 2}}
    together(small, tmp_path, runs, progress=True, eval_every=0)
    shown = capsys.readouterr().err
    for name, own in runs.items():
        n_steps = own["max_steps"]
        assert re.search(rf"\b{name}\b[^\r\n]*{n_steps}/{n_steps}", shown)
    assert "\n" in shown[: shown.index("second")] and "\x1b[A" in shown  # down a line, and up again


def test_evaluations_of_runs_share_passes(small, tmp_path, monkeypatch):
    """Most passes evaluate; runs that do so at other times or in other batches add next to none."""
    fixed = {"max_steps": 3, "eval_every": 1, "eval_batch_size": 1, "held_out_fraction": 0.2}
    fixed |= {"gradient_accumulation_steps": 1}
    runs = {"a": {}, "seed": {"seed": 1}, "rank": {"lora_rank": 2}}
    others = {
        "rarely": {"eval_every": 2},
        "whole": {"eval_batch_size": 3},
        "never": {"eval_every": 0},
    }
    n_bytes = count_reads(monkeypatch)
    alone(small, tmp_path / "alone", {"a": {}}, **fixed)
    one = n_bytes()
    together(small, tmp_path / "same", runs, **fixed)
    assert n_bytes() <= 1.3 * one  # what is prefetched at the end of a run is a matter of time
    together(small, tmp_path / "others", {"a": {}} | others, **fixed)
    assert n_bytes() <= 1.3 * one
    require_equal(tmp_path / "same/a", tmp_path / "alone/a")
    require_equal(tmp_path / "others/a", tmp_path / "alone/a")


@pytest.mark.parametrize("name", ["model_dir", "dtype", "device", "memory_budget", "output_dir"])
def test_what_runs_must_share_is_named(name, small, tmp_path):
    other = {"dtype": "bfloat16", "memory_budget": "4GB", "output_dir": str(tmp_path / "a")}
    first = config(small, tmp_path / "a")
    second = dataclasses.replace(first, output_dir=str(tmp_path / "b"))
    configs = [first, dataclasses.replace(second, **{name: other.get(name, str(tmp_path))})]
    with pytest.raises(ConfigError, match=f"{name}.* (train these runs apart|its own)"):
        onn_core.train_many(configs)
    with pytest.raises(ConfigError, match="at least one"):
        onn_core.train_many([])


def test_the_random_state_of_the_caller_is_what_it_was(small, tmp_path):
    before = torch.get_rng_state()
    together(small, tmp_path, {"a": {"max_steps": 1}, "b": {"max_steps": 1, "seed": 1}})
    assert torch.equal(before, torch.get_rng_state())


def test_more_runs_than_fit_go_one_group_after_another(small, tmp_path, monkeypatch):
    """The sum that has no room is said; alone, each run would have it."""
    groups, refused = [], []
    plan, run_group = Together.plan, many._run_group

    def noted(group, resume):
        terms = group[0].trainer.base.plan.terms
        assert not group[0].trainer.base.plan.n_reserved  # graphs of one would be room of another
        groups.append((len(group), terms.adapters, terms.total * 1.05))
        run_group(group, resume)

    def refusing(self):
        try:
            plan(self)
        except TooManyRunsError as error:
            refused.append(str(error))
            raise

    monkeypatch.setattr(many, "_run_group", noted)
    monkeypatch.setattr(Together, "plan", refusing)
    large = {"lora_rank": 512, "max_steps": 2, "memory_budget": 100_000_000}
    large["micro_batch_size"] = None  # the plan's
    runs = {"a": {}, "b": {"batch_size": 6}, "c": {"eval_batch_size": 13}, "d": {"seed": 1}}
    together(small, tmp_path / "many", runs, **large)
    (n, adapters, total), (rest, of_one, _) = groups
    assert (n, rest) == (3, 1) and adapters == 3 * of_one and total <= 100_000_000
    assert "4 runs in one pass need" in refused[0] and "at most 3 fit" in refused[0]
    alone(small, tmp_path / "alone", runs, **large)
    for name in runs:
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)


def test_a_run_that_fits_by_no_plan_says_so(small, tmp_path):
    with pytest.raises(ConfigError, match="memory_budget of 1 MiB is too small"):
        together(small, tmp_path, {"a": {}, "b": {}}, memory_budget="1MiB")


def test_a_grid_in_a_file_of_settings(small, tmp_path, capsys):
    quick = {"max_steps": 1, "max_length": 80, "device": "cpu", "progress": False}
    paths = {"model_dir": str(small[0]), "data": str(small[1]), "output_dir": str(tmp_path / "out")}
    grid = {"learning_rate": [1e-3, 1e-2], "sparse_layers": ["last:1", [0, 2]]}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(quick | paths | {"grid": grid}))
    main(["train", str(file), "batch_size=3"])
    shown = capsys.readouterr().out.splitlines()
    rates, layers = ("0.001", "0.01"), ("last-1", "0,2")
    names = [f"learning_rate={r},sparse_layers={n}" for r in rates for n in layers]
    assert shown[1::2] == [str(tmp_path / "out" / name / "adapter") for name in names]
    assert all(line.startswith("finished after 1 steps, loss") for line in shown[::2])
    for wrong in ("grid={lora_rank: 4}", "grid={rank: [4]}", "grid={seed: []}"):
        with pytest.raises(SystemExit):
            main(["train", str(file), wrong])
        assert re.search("grid must map|rank is no setting", capsys.readouterr().err)


@pytest.mark.heavy
def test_eight_runs_of_smollm2_are_equal_to_each_alone(smollm2_dir, tmp_path, monkeypatch):
    """The real model, and what the pass reads of it against the hungriest run alone."""
    n_bytes = count_reads(monkeypatch)
    fixed = {"batch_size": 4, "max_steps": 3, "max_length": 48, "learning_rate": 1e-3}
    fixed |= {"eval_every": 3, "eval_samples": 4, "gradient_accumulation_steps": 1}
    changes = [
        {"micro_batch_size": None, "lora_dropout": 0.0},
        {"seed": 1, "lora_rank": 4, "batch_size": 3},
        {"sparse_layers": "ends:4", "lora_dropout": 0.1},
        {"sparse_layers": "last:8", "max_length": 64, "max_steps": 2},
        {"gradient_accumulation_steps": 2, "batch_size": 3},
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32},
        {"loss_scale": None, "lr_schedule": "constant"},
        {"packing": True, "shuffle_targets": 1, "eval_every": 0},
    ]
    runs = {str(number): fixed | own for number, own in enumerate(changes)}
    model = smollm2_dir, "chatterbot"
    together(model, tmp_path / "many", runs)
    in_pass, each = n_bytes(), []
    for name, own in runs.items():
        alone(model, tmp_path / "alone", {name: own})
        each.append(n_bytes())
        require_equal(tmp_path / "many" / name, tmp_path / "alone" / name)
    print(f"{in_pass / 1e9:.2f} GB in one pass, {sum(each) / 1e9:.2f} GB one after another")
    assert in_pass <= 1.1 * max(each)
