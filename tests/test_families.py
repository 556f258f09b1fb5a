"""Families of models: the walk itself is in `families.py`."""

import families
import pytest
import torch
from families import outcome_of
from toy import assert_same, in_memory, step, streamed, toy_batch, toy_dir, with_lora

from onn_core import OnnError

pytestmark = pytest.mark.filterwarnings("ignore")
# ALiBi, tuples, old stacks, merged experts, per-layer kinds, hybrids, state spaces, soft caps,
# layers shared, a decoder of an encoder-decoder, a transform before the head.
DOZEN = ["bloom", "bart", "ctrl", "ernie4_5_moe", "gemma4_text", "jamba", "falcon", "cohere2"]
DOZEN += ["mamba", "qwen3_next", "gpt_oss", "bert", "granite"]


@pytest.mark.parametrize("family", DOZEN)
def test_family_trains_streamed_as_in_memory(family):
    outcome = outcome_of(family)
    assert outcome.what == "equal", outcome.why


@pytest.mark.families
@pytest.mark.parametrize("family", families.families())
def test_every_family_is_equal_or_refused(family):
    outcome = outcome_of(family)
    assert outcome.what != "WRONG", outcome.why


@pytest.mark.parametrize("batch_size", [10, 4, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_sizes_that_happen_to_be_the_same(family, batch_size):
    """As many samples as tokens, as heads, or as anything else: only the batch is cut."""
    batch = toy_batch(batch_size, n_tokens=10)
    batch["position_ids"] = torch.arange(10)[None]
    got = step(with_lora(streamed(toy_dir(family), micro_batch_size=1)), batch)
    assert_same(got, step(with_lora(in_memory(toy_dir(family))), batch), 5e-6)


def test_another_length_and_batch_size_each_step():
    model, plain = with_lora(streamed(toy_dir("llama"), micro_batch_size=2)), None
    plain = with_lora(in_memory(toy_dir("llama")))
    for seed, (batch_size, n_tokens) in enumerate([(5, 10), (2, 7), (3, 12), (5, 10)]):
        batch = toy_batch(batch_size, n_tokens, seed)
        assert_same(step(model, batch), step(plain, batch), 5e-6)


def test_the_loss_of_the_routers_is_refused():
    model = with_lora(streamed(toy_dir("mixtral")))
    model.config.output_router_logits = True
    with pytest.raises(OnnError, match="output_router_logits"):
        step(model, toy_batch())
    model.config.output_router_logits = False
    step(model, toy_batch())
