"""What is read, when, and into how much memory; and that nothing of it changes a number."""

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import platform
import random
import re
import shutil
import signal
import struct
import threading
import time
import weakref
from collections import Counter

import pytest
import torch
from toy import (
    FLOAT16_TOLERANCE,
    N_LAYERS,
    assert_same,
    difference,
    in_memory,
    step,
    streamed,
    toy_batch,
    toy_dir,
    with_lora,
)

from onn_core.errors import ModelFolderError
from onn_core.weights.reader import SLICE_NS, ReaderCount, run_at_once
from onn_core.weights.schedule import Use
from onn_core.weights.slots import count_slots
from onn_core.weights.stream import WeightStream


@pytest.fixture(autouse=True)
def no_hang():
    def give_up(*_):
        raise TimeoutError("the stream hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def settle(stream):
    """Wait until the readers have nothing left to do."""
    before = None
    while before != (before := (stream.counts.bytes_read, stream.counts.weight_loads.total())):
        time.sleep(0.03)


def loads_of_a_step(model):
    """Unit -> items fetched by one training step in the steady state."""
    stream = model.base_model.model.streaming.stream
    for _ in range(2):
        step(model, toy_batch())
    settle(stream)
    before = Counter(stream.counts.weight_loads)
    step(model, toy_batch())
    settle(stream)
    return stream.counts.weight_loads - before


def acquire(stream, future):
    """Enter unit future[0]; its items, once all are there."""
    items = stream.enter(list(map(Use, future)))
    for item in items:
        stream.wait(item)
    return items


def by_size(stream):
    """Slot size in bytes -> items of that size in the model."""
    return Counter(item.slot_bytes for unit in stream.units for item in unit)


# --- how much is read -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, N_LAYERS])
def test_a_step_reads_each_item_twice_but_for_what_stays_at_the_two_turns(family, chunk_size):
    model = streamed(toy_dir(family), chunk_size=chunk_size)
    stream = model.streaming.stream
    loads = loads_of_a_step(with_lora(model))
    items = by_size(stream)
    assert loads.total() == 2 * sum(items[size] - stream.schedule.slots[size] for size in items)


def test_the_chunk_at_each_turn_is_not_read_again():
    """Layer 2 of 5 is far from both turns; layers 0 and 4 are read once a step, at the other."""
    model = with_lora(streamed(toy_dir("llama"), chunk_size=1))
    n_items = len(model.base_model.model.streaming.stream.units[0])
    loads = loads_of_a_step(model)
    assert loads[2] == 2 * n_items
    assert loads[0] == loads[4] == n_items
    assert n_items < loads[1] == loads[3] < 2 * n_items  # in part: the look-ahead


def test_a_model_that_fits_is_read_once():
    model = streamed(toy_dir("llama"), chunk_size=N_LAYERS)
    stream = model.streaming.stream
    model = with_lora(model)
    for _ in range(3):
        step(model, toy_batch())
        with torch.no_grad():
            model(**toy_batch())
    settle(stream)
    n_items = sum(by_size(stream).values())
    assert stream.counts.weight_loads.total() == n_items
    needed = sum(item.n_bytes for unit in stream.units for item in unit)
    assert needed <= stream.counts.bytes_read <= needed + 2 * 4096 * n_items


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_backward_visits_and_reads_nothing_below_the_lowest_trained_layer(chunk_size):
    model = streamed(toy_dir("llama"), chunk_size=chunk_size)
    visits = []
    model.on_visit(lambda phase, unit: visits.append((phase, unit)))
    n_items = len(model.streaming.stream.units[0])
    model = with_lora(model, layers_to_transform=[3, 4])
    loads = loads_of_a_step(model)
    forward = [("forward", layer) for layer in range(N_LAYERS)]
    assert visits == 3 * [*forward, ("head", N_LAYERS), ("backward", 4), ("backward", 3)]
    assert all(loads[layer] <= n_items for layer in range(3))


def test_evaluation_reads_each_item_once_at_most():
    model = streamed(toy_dir("llama"))
    stream = model.streaming.stream
    with torch.no_grad():
        for _ in range(4):
            model(**toy_batch())
    settle(stream)
    assert stream.counts.weight_loads.total() <= 5 * sum(by_size(stream).values())


def test_the_next_layer_is_fetched_while_this_one_is_in_use():
    stream = streamed(toy_dir("llama")).streaming.stream
    acquire(stream, [0, 1, 2, 3, 4, 5])
    settle(stream)
    names = [item.source.entry.name for item in stream.units[1] if item.tensor is not None]
    assert [name.split(".")[-2] for name in names] == [*("q_proj", "k_proj", "v_proj", "o_proj")]
    assert all(item.in_use and item.tensor is not None for item in stream.units[0])
    for item in stream.units[0]:
        stream.release(item)
    settle(stream)
    assert all(item.tensor is not None for item in stream.units[1])
    assert any(item.tensor is not None for item in stream.units[2])
    stream.close()


@pytest.mark.parametrize("how", [torch.no_grad, torch.enable_grad])
def test_a_layer_begins_before_its_last_matrix_is_there(how):
    model = with_lora(streamed(toy_dir("llama")))
    core = model.base_model.model
    want = step(model, toy_batch())  # from now on it is known which modules are called
    stream, load, gate = core.streaming.stream, core.streaming.stream.fetch, threading.Event()
    last = stream.units[2][-1]

    def wait_at_the_gate(item, *rest):
        if item is last:
            gate.wait()
        return load(item, *rest)

    stream.fetch = wait_at_the_gate
    layer = core.model.layers[2]
    layer.mlp.up_proj.base_layer.register_forward_hook(lambda *_: gate.set())
    with how():
        assert torch.equal(model(**toy_batch()).loss.detach(), want[0])
    assert gate.is_set() and last.source.entry.name.endswith("down_proj.weight")


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_memory_is_that_of_the_slots_and_weights_in_use_stay_as_they_are(chunk_size):
    folder = toy_dir("llama")
    true_weights = {n: p.detach() for n, p in in_memory(folder).named_parameters()}
    model = streamed(folder, chunk_size=chunk_size)
    stream = model.streaming.stream
    checked = Counter()

    def check(module, *_):
        name = names[module]
        assert torch.equal(module.weight, true_weights[f"{name}.weight"]), name
        assert stream.schedule.made() <= stream.schedule.slots
        checked[name] += 1

    names = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
            names[module] = name
            module.register_forward_pre_hook(check)
            module.register_forward_hook(check)
    model = with_lora(model)
    for _ in range(3):
        step(model, toy_batch())
    assert len(checked) == 7 * N_LAYERS and set(checked.values()) == {3 * 2 * 2}
    assert stream.schedule.made() == stream.schedule.slots


def test_an_absent_weight_is_nan_of_one_element():
    model = streamed(toy_dir("llama"))
    linear = model.model.layers[2].mlp.down_proj
    for _ in range(2):
        assert linear.weight.shape == (32, 64) and linear.weight.isnan().all()
        assert linear.weight.untyped_storage().nbytes() == 4
        assert torch.nn.functional.linear(torch.ones(1, 64), linear.weight).isnan().all()
        model(**toy_batch())
    ends = model.lm_head.weight.data, model.model.embed_tokens.weight.data
    assert all(end.isnan().all() and end.untyped_storage().nbytes() == 4 for end in ends)


def test_random_visits_in_unannounced_order_get_the_right_bytes():
    folder = toy_dir("llama")
    model = streamed(folder)
    true_weights = {n: p.detach() for n, p in in_memory(folder).named_parameters()}
    units = [list(unit) for unit in model.streaming.stream.units[:N_LAYERS]]
    stream = WeightStream(model.model_folder, units, count_slots(units, 1), torch.device("cpu"))
    chance = random.Random(0)
    unit = 0
    for _ in range(300):
        future = [unit, *chance.choices(range(N_LAYERS), k=chance.randrange(8))]
        items = acquire(stream, future)
        if chance.random() < 0.3:
            time.sleep(0.001)
        chance.shuffle(items := list(items))
        for item in items:
            assert torch.equal(item.tensor, true_weights[item.source.entry.name])
            stream.release(item)
        told = future[1] if len(future) > 1 else 0
        unit = told if chance.random() < 0.5 else chance.randrange(N_LAYERS)
    stream.close()


# --- orders that no training step has ---------------------------------------------------------


def two_forwards_then_both_backward(model):
    torch.manual_seed(2)
    first, second = (model(**toy_batch(seed=seed)).loss for seed in (0, 1))
    first.backward()
    second.backward()


def two_backward_in_one(model):
    sum(model(**toy_batch(seed=seed)).loss for seed in (0, 1)).backward()


def abandoned_forward(model):
    model(**toy_batch())


def evaluation(model):
    with torch.no_grad():
        model(**toy_batch(batch_size=2))


def generation(model):
    model.generate(input_ids=toy_batch()["input_ids"], max_new_tokens=2, do_sample=False)


def failed_in_a_layer(model):
    def fail(*_):
        raise ZeroDivisionError

    with contextlib.closing(contextlib.ExitStack()) as stack:
        layer = model.base_model.model.model.layers[2]
        stack.callback(layer.mlp.register_forward_pre_hook(fail).remove)
        with pytest.raises(ZeroDivisionError):
            model(**toy_batch())


def other_layers(model):
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.requires_grad_(".layers.4." in name)
    step(model, toy_batch())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)


def closed(model):
    model.base_model.model.close()


ORDERS = [two_forwards_then_both_backward, two_backward_in_one, abandoned_forward, evaluation]
ORDERS += [generation, failed_in_a_layer, other_layers, closed]


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_after_any_order_a_step_is_exact(order, chunk_size):
    model = with_lora(streamed(toy_dir("llama"), chunk_size=chunk_size))
    want = step(with_lora(in_memory(toy_dir("llama"))), toy_batch())
    for _ in range(2):
        order(model)
        model.zero_grad()
        assert_same(step(model, toy_batch()), want)


@pytest.mark.parametrize("order", [two_forwards_then_both_backward, two_backward_in_one])
def test_two_steps_in_one_are_exact(order):
    gradients = []
    for load in (in_memory, streamed):
        model = with_lora(load(toy_dir("llama")), lora_dropout=0.3)
        torch.manual_seed(2)
        order(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        gradients.append((torch.ones(()), {n: p.grad for n, p in trained}))
    assert_same(gradients[1], gradients[0])


@pytest.fixture
def interruptible():
    """A job that a shell started in the background would ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("unit", [0, 3, N_LAYERS], ids=["bottom", "middle", "head"])
def test_an_interrupted_wait_can_be_followed_by_a_step(unit, interruptible):
    """The stop button of a notebook, while weights are on their way."""
    model = with_lora(streamed(toy_dir("llama")))
    stream = model.base_model.model.streaming.stream
    reached, gate, load = threading.Event(), threading.Event(), stream.fetch

    def wait_at_the_gate(item, *rest):
        if item.unit == unit:
            reached.set()
            gate.wait()
        return load(item, *rest)

    def interrupt():
        reached.wait()
        time.sleep(0.2)  # until the compute waits as well
        os.kill(os.getpid(), signal.SIGINT)

    stream.fetch = wait_at_the_gate
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        step(model, toy_batch())
    gate.set()
    model.zero_grad()
    want = step(with_lora(in_memory(toy_dir("llama"))), toy_batch())
    assert_same(step(model, toy_batch()), want)


# --- threads, descriptors, garbage ------------------------------------------------------------


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("onn-reader")]


def n_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def clean():
    gc.collect()
    assert readers() == []


@pytest.mark.usefixtures("clean")
def test_logits_that_outlive_their_model_leave_no_reader():
    with torch.no_grad():
        outputs = streamed(toy_dir("llama"))(**toy_batch())
    assert outputs.logits.isfinite().all()
    del outputs
    gc.collect()
    assert readers() == []


@pytest.mark.usefixtures("clean")
def test_close_stops_the_readers_and_closes_files_and_the_model_works_again():
    model = with_lora(streamed(toy_dir("llama")))
    before = n_descriptors()
    want = step(model, toy_batch())
    assert len(readers()) > 0 and n_descriptors() > before
    for _ in range(2):  # closing twice is harmless
        model.base_model.model.close()
        assert readers() == [] and n_descriptors() == before
    stream = model.base_model.model.streaming.stream
    assert not stream.schedule._made and all(
        i.tensor is None for unit in stream.units for i in unit
    )
    assert_same(step(model, toy_batch()), want)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("family", ["llama", "mixtral"])  # mixtral's tensors are converted
def test_a_model_that_is_no_longer_used_takes_its_readers_along(family):
    model = with_lora(streamed(toy_dir(family)))
    step(model, toy_batch())
    stream, core = (weakref.ref(x) for x in (model.base_model.model.streaming.stream, model))
    assert readers()
    del model
    gc.collect()
    assert core() is None and stream() is None and readers() == []


@pytest.mark.usefixtures("clean")
def test_garbage_collection_in_a_reader_thread_closes_as_well():
    model = streamed(toy_dir("llama"))
    object.__setattr__(model, "itself", model)
    gate, stream = threading.Event(), model.streaming.stream
    load = stream.fetch

    def collect(item, *rest):
        if item.unit == 1:
            gate.wait()
            gc.collect()
        return load(item, *rest)

    stream.fetch = collect
    acquire(stream, [0, 1, 2])
    gc.disable()
    try:
        alive = weakref.ref(model)
        del model
        assert alive() is not None
        gate.set()
        while readers() or stream.files._opened:
            time.sleep(0.01)
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("clean")
def test_fifty_loads_leave_nothing_behind():
    def load_and_use():
        model = streamed(toy_dir("llama"))
        with torch.no_grad():
            model(**toy_batch(batch_size=1))

    load_and_use()
    gc.collect()
    before = n_descriptors(), threading.active_count()
    for _ in range(50):
        load_and_use()
    gc.collect()
    assert (n_descriptors(), threading.active_count()) == before


# --- files that change --------------------------------------------------------------------------


def test_a_file_that_is_gone_is_an_error_and_can_be_restored(tmp_path):
    folder = copied(toy_dir("llama"), tmp_path)
    model = with_lora(streamed(folder))
    path = folder / "model.safetensors"
    path.rename(folder / "elsewhere")
    with pytest.raises(ModelFolderError, match=r"model\.safetensors .*restore"):
        step(model, toy_batch())
    with pytest.raises(ModelFolderError):
        step(model, toy_batch())
    (folder / "elsewhere").rename(path)
    model.base_model.model.close()
    assert_same(step(model, toy_batch()), step(with_lora(in_memory(folder)), toy_batch()))


@pytest.mark.parametrize("left", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_that_is_cut_in_use_is_an_error(tmp_path, left, dtype):
    folder = copied(toy_dir("llama"), tmp_path)
    model = with_lora(streamed(folder, dtype=dtype))
    step(model, toy_batch())
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(ModelFolderError, match="model.safetensors"):
        for _ in range(2):
            step(model, toy_batch())


# --- bytes as they may lie ------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_cast_on_the_way(stored, dtype):
    folder = toy_dir("llama", stored)
    got, want = (
        step(with_lora(load(folder, dtype=dtype)), toy_batch()) for load in (streamed, in_memory)
    )
    assert_same(got, want, FLOAT16_TOLERANCE if dtype == torch.float16 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [4096, 3 * 4096])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pieces_smaller_than_a_tensor(family, piece_bytes, dtype, monkeypatch):
    monkeypatch.setattr("onn_core.weights.slots.READ_BYTES", piece_bytes)
    folder = toy_dir(family)
    model = streamed(folder, dtype=dtype)
    pieces = [item.reads() for unit in model.streaming.stream.units for item in unit]
    assert max(map(len, pieces)) > 1
    want = step(with_lora(in_memory(folder, dtype=dtype)), toy_batch())
    assert_same(step(with_lora(model), toy_batch()), want)


def shifted(folder, tmp_path, header_pad=0, first_bytes=0):
    """A copy whose header is `header_pad` bytes longer, its data after a tensor of a few bytes."""
    folder = copied(folder, tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    for name, info in header.items():
        if name != "__metadata__":
            info["data_offsets"] = [offset + first_bytes for offset in info["data_offsets"]]
    if first_bytes:
        header["pad"] = {"dtype": "U8", "shape": [first_bytes], "data_offsets": [0, first_bytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + header_pad)
    data = b"\xff" * first_bytes + content[stop:]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float64"])
@pytest.mark.parametrize(
    ("header_pad", "first_bytes"), [(1, 0), (2, 0), (4, 0), (0, 1), (3, 5), (8, 4096 - 24)]
)
def test_tensors_at_odd_offsets(tmp_path, stored, dtype, header_pad, first_bytes):
    plain = toy_dir("llama", stored)
    folder = shifted(plain, tmp_path, header_pad, first_bytes)
    model = streamed(folder, dtype=dtype)
    entry = model.streaming.stream.units[0][0].source.entry
    assert entry.offset % 8 == (header_pad + first_bytes) % 8
    assert_same(
        step(with_lora(model), toy_batch()),
        step(with_lora(streamed(plain, dtype=dtype)), toy_batch()),
    )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_many_shards(family):
    folder = toy_dir(family, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > N_LAYERS
    want = step(with_lora(in_memory(folder)), toy_batch())
    assert_same(step(with_lora(streamed(folder)), toy_batch()), want)


def test_through_the_page_cache():
    """As on CUDA in a host with memory to spare."""
    want = step(with_lora(streamed(toy_dir("llama"))), toy_batch())
    model = with_lora(streamed(toy_dir("llama")))
    files = model.base_model.model.streaming.stream.files
    files.cached = True
    assert_same(step(model, toy_batch()), want)
    flags = [fcntl.fcntl(descriptor, fcntl.F_GETFL) for descriptor, _ in files._opened.values()]
    assert flags and not any(f & os.O_DIRECT for f in flags)


@pytest.mark.parametrize("how", ["not there", "refused at opening", "refused at reading"])
def test_without_direct_reads(how, monkeypatch):
    """Some systems and file systems have none; the page cache then does."""
    open_, preadv, direct = os.open, os.preadv, os.O_DIRECT
    if how == "not there":
        monkeypatch.setattr("onn_core.weights.reader.O_DIRECT", 0)
    refused = Counter()

    def refuse_open(path, flags, *rest):
        refused["open"] += bool(flags & direct)
        if flags & direct and how == "refused at opening":
            raise OSError(22, "Invalid argument")
        return open_(path, flags, *rest)

    def refuse_read(descriptor, *rest):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & direct and how == "refused at reading":
            refused["read"] += 1
            raise OSError(22, "Invalid argument")
        return preadv(descriptor, *rest)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)
    got = step(with_lora(streamed(toy_dir("llama"))), toy_batch())
    monkeypatch.undo()
    assert (refused["open"], refused["read"]) == {
        "not there": (0, 0),
        "refused at opening": (1, 0),
        "refused at reading": (1, 1),
    }[how]
    assert_same(got, step(with_lora(in_memory(toy_dir("llama"))), toy_batch()))


def test_weights_differ_where_the_file_differs(tmp_path):
    """The file is what is computed with: one byte changed in one layer changes the loss."""
    folder = copied(toy_dir("llama"), tmp_path)
    model = with_lora(streamed(folder))
    before, _ = step(model, toy_batch())
    item = model.base_model.model.streaming.stream.units[2][3]
    model.base_model.model.close()
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(item.source.entry.offset + 3)
        file.write(b"\x3f")
    with pytest.raises(ModelFolderError, match="was changed while it was in use"):
        step(model, toy_batch())
    after, _ = step(with_lora(streamed(folder)), toy_batch())
    assert difference(after, before) > 1e-6


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_products", [True, False])
def test_auto_computes_in_float32_where_the_cpu_has_no_products_of_the_stored_dtype(
    stored, has_products, monkeypatch
):
    monkeypatch.setattr("onn_core.streaming.skeleton.has_fast_matmul", lambda dtype: has_products)
    expected = stored if has_products else torch.float32
    assert streamed(toy_dir("llama", stored), dtype="auto").dtype == expected


def kernel_release():
    return tuple(map(int, re.findall(r"\d+", platform.release())[:2]))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or kernel_release() < (6, 12), reason="needs Linux 6.12"
)
def test_a_reader_has_a_short_slice_and_the_niceness_that_it_had():
    def attributes():  # of the calling thread: sched_getattr
        found = ctypes.create_string_buffer(48)
        assert ctypes.CDLL(None).syscall(315, 0, found, len(found), 0) == 0
        _, policy, _, niceness, _, slice_ns, _, _ = struct.unpack("IIQiIQQQ", found.raw)
        return policy, niceness, slice_ns

    def run():
        os.setpriority(os.PRIO_PROCESS, 0, 3)
        run_at_once()
        seen.append(attributes())

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    policy, _, slice_ns = attributes()  # this thread is as it was
    assert seen == [(policy, 3, SLICE_NS)] and slice_ns > SLICE_NS


@pytest.mark.parametrize(
    "gb_s, best",
    [
        ({1: 2.8, 2: 2.8, 4: 2.7, 8: 2.6}, 1),
        ({1: 1.5, 2: 2.0, 4: 2.2, 8: 2.25}, 4),
        ({1: 1.5, 2: 2.0, 4: 2.2, 8: 2.9}, 8),
        ({1: 4.0, 2: 3.0, 4: 5.0, 8: 2.0}, 4),
    ],
)
def test_as_many_readers_as_the_disk_is_fastest_with(gb_s, best):
    count, now, n_bytes = ReaderCount(tuple(gb_s)), 0.0, 8 << 20
    n_under_way = 0
    for number in range(1000):
        while n_under_way < count.now:
            count.begin(now)
            n_under_way += 1
        now += n_bytes / (1e9 * gb_s[count.now])  # seconds between the ends of two reads
        count.end(now, n_bytes)
        n_under_way -= 1
        if number % 50 == 0:  # no read is under way for a while
            for _ in range(n_under_way):
                count.end(now, 0)
            n_under_way = 0
            now += 10 / count.now
    assert count.now == best
    assert ReaderCount((2,)).now == 2


def test_reads_that_end_out_of_order_count_as_long_as_any_was_under_way(monkeypatch):
    monkeypatch.setattr("onn_core.weights.reader.TRIAL_BYTES", 2)
    count = ReaderCount((1, 2))
    for now in (0.0, 10.0, 20.0, 30.0):  # the first trial is made twice
        count.begin(now)
        count.end(now + 10, 1)
    assert count.now == 2
    count.begin(40.0)
    count.begin(49.0)
    count.end(50.0, 1)
    count.end(61.0, 1)
    assert count.now == 1  # two readers took 21 s, not the 20 of one, nor 12


@pytest.mark.parametrize("trial_bytes", [1, 1 << 12, 1 << 15, 1 << 40])
def test_a_changing_number_of_readers_changes_no_number(monkeypatch, trial_bytes):
    monkeypatch.setattr("onn_core.weights.reader.TRIAL_BYTES", trial_bytes)
    monkeypatch.setattr("onn_core.weights.stream.N_READERS", {"cpu": (1, 4, 2)})
    expected = step(with_lora(in_memory(toy_dir("llama"))), toy_batch())
    base = streamed(toy_dir("llama"))
    model = with_lora(base)
    for _ in range(3):
        assert_same(step(model, toy_batch()), expected)
        base.close()
