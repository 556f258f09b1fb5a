"""When visits are captured, replayed and dropped; a CUDA graph here is the function that it is of.

That graphs replay the kernels is for `test_cuda.py`.
"""

import gc
import types
import weakref

import pytest
import torch
from toy import (
    N_LAYERS,
    assert_same,
    change_plan,
    step,
    streamed,
    take_gradients,
    toy_batch,
    toy_dir,
    with_lora,
)

from onn_core.streaming import call, captured

N_GRAPHS = 2 * N_LAYERS  # of a layer one for forward, one for backward
# A step; a step on shorter samples; an evaluation; a forward, an evaluation, then the backward.
STEP, SHORT, EVALUATION, BETWEEN = "step", "short", "evaluation", "between"


@pytest.fixture
def captures(monkeypatch):
    """Captures on a CPU, and how many graphs were made."""
    for name in ("synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(captured, "capture_stream", lambda device: None)
    state = (torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(call, "random_state", lambda device: state)
    monkeypatch.setattr(call, "set_random_state", lambda *_: None)
    made = captured.Captures(torch.device("cpu"))
    made.n = 0

    def capture(self, run):
        run()
        self.n += 1
        return types.SimpleNamespace(replay=run)

    monkeypatch.setattr(captured.Captures, "capture", capture)
    return made


def do(model, what):
    batch = toy_batch(batch_size=4, n_tokens=7 if what == SHORT else 10)
    if what in (STEP, SHORT):
        return step(model, batch)
    if what == EVALUATION:
        with model.disable_adapter(), torch.no_grad():
            loss = model(**batch).loss
        return loss, {"loss again": loss}
    loss = model(**batch).loss
    with torch.no_grad():
        model(**batch)
    loss.backward()
    return loss.detach(), take_gradients(model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("resident", [True, False])
def test_graphs_are_dropped_for_an_evaluation_and_for_another_shape(
    family, micro_batch_size, resident, captures
):
    course = [STEP, STEP, STEP, EVALUATION, STEP, STEP, SHORT, STEP, STEP, BETWEEN, STEP, STEP]
    new = {1, 8} if resident else {1, 5, 8, 11}  # a second step of one shape
    model = with_lora(streamed(toy_dir(family), micro_batch_size=micro_batch_size))
    want = [do(model, what) for what in course]
    base = streamed(toy_dir(family), micro_batch_size=micro_batch_size)
    base.streaming.captures = captures
    model = with_lora(change_plan(base, captured=True, captures_resident=resident))
    for number, what in enumerate(course):
        before = captures.n
        assert_same(do(model, what), want[number])
        assert captures.n - before == (N_GRAPHS if number in new else 0), (number, what)
    assert captures.impossible is None


def test_dropped_graphs_leave_no_memory_while_a_loss_is_there(captures, monkeypatch):
    fixed = []
    make = captured.Captures.fixed

    def noted(self, *given):
        made = make(self, *given)
        fixed.append(weakref.ref(made))
        return made

    monkeypatch.setattr(captured.Captures, "fixed", noted)
    base = streamed(toy_dir("llama"))
    base.streaming.captures = captures
    model = with_lora(change_plan(base, captured=True))
    do(model, STEP)
    loss = model(**toy_batch(batch_size=4)).loss
    loss.backward()
    assert captures.layers and any(memory() is not None for memory in fixed)
    do(model, EVALUATION)
    gc.collect()
    assert loss.grad_fn is not None and not any(memory() is not None for memory in fixed)


def test_what_is_more_than_lora_ends_the_captures(captures):
    base = streamed(toy_dir("llama"))
    base.streaming.captures = captures
    model = with_lora(change_plan(base, captured=True))
    want = [do(model, STEP) for _ in range(2)][1]
    assert captures.n == N_GRAPHS
    layer = base.streamed_layers[-1].module
    layer.mlp.register_forward_hook(lambda *_: None)
    for _ in range(3):
        assert_same(do(model, STEP), want)
    assert "more than its own code" in captures.impossible and not captures.layers
    assert captures.n == N_GRAPHS
