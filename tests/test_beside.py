"""A run and what else one process does meanwhile: predictions, evaluations, other models."""

import threading

import pytest
import torch
from small import config, require_equal, trainer, write_small
from toy import assert_same, step, streamed, toy_batch, toy_dir, with_lora
from transformers import AutoTokenizer

import onn_core
from onn_workbench.outline import Outline


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    trainer(small, folder).train()
    return folder


class Others:
    """What an explorer does beside a run."""

    def __init__(self, small, adapter_dir):
        self.model_dir, self.data = small
        self.adapter_dir = adapter_dir
        self.config = config(small, adapter_dir)
        self.outline = Outline(self.model_dir)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        self.length = 100

    def time_and_predict(self):
        Outline(self.model_dir)
        self.length = 100 + self.length % 300  # a new length is traced anew
        self.outline.predict(
            onn_core.TrainConfig(**self.config.to_dict() | {"max_length": self.length})
        )

    def evaluate(self):
        base = onn_core.from_pretrained(self.model_dir, device="cpu", dtype="bfloat16")
        model = onn_core.load_adapter(base, self.adapter_dir / "adapter")
        onn_core.perplexity(model, self.tokenizer, str(self.data), batch_size=8)
        onn_core.answers(model, self.tokenizer, ["What is one and two?"], max_new_tokens=2)


def test_a_run_is_equal_bit_for_bit_whatever_goes_on_beside_it(small, alone, tmp_path):
    others, errors, n_done = Others(small, alone), [], [0]
    over = threading.Event()

    def busy():
        try:
            while not over.is_set():
                others.time_and_predict()
                others.evaluate()
                n_done[0] += 1
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        while n_done[0] < 3 and not errors:
            trainer(small, tmp_path).train()
            require_equal(tmp_path, alone)
    finally:
        over.set()
        thread.join()
    assert not errors


@pytest.mark.parametrize("act", [Others.time_and_predict, Others.evaluate])
def test_nothing_draws_from_the_generator_of_a_run(small, alone, act):
    others = Others(small, alone)
    before = torch.get_rng_state()
    act(others)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_step_does_not_depend_on_the_default_dtype(family):
    """transformers changes it for all threads while it makes a model."""
    model = with_lora(streamed(toy_dir(family)))
    expected = step(model, toy_batch())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = step(model, toy_batch())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)
