"""Whatever AutoModelForCausalLM loads from a folder is loaded with the same weights."""

import json

import pytest
import torch
import transformers
from toy import GROUPED, assert_same, in_memory, step, streamed, toy_batch, with_lora
from transformers import AutoModelForCausalLM, LlamaConfig

TIED = GROUPED | {"tie_word_embeddings": True}


def llama(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED | changes))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def untied_head(folder):
    """The config says tied, and the folder has a head of its own."""
    llama().save_pretrained(folder)
    edit_config(folder, tie_word_embeddings=True)


def equal_head(folder):
    """The folder stores the tied head a second time."""
    model = llama()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    edit_config(folder, tie_word_embeddings=True)


def base_model(folder):
    """The folder holds the model without its head, whose names have no prefix."""
    llama(tie_word_embeddings=True).model.save_pretrained(folder)


def other_architecture(folder):
    llama(tie_word_embeddings=True).save_pretrained(folder)
    edit_config(folder, architectures=["LlamaModel"])


def no_architecture(folder):
    llama().save_pretrained(folder)
    edit_config(folder, architectures=None)


def attention_dropout(folder):
    llama(attention_dropout=0.5).save_pretrained(folder)


FOLDERS = [
    untied_head,
    equal_head,
    base_model,
    other_architecture,
    no_architecture,
    attention_dropout,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", FOLDERS, ids=lambda write: write.__name__)
def test_a_folder_is_loaded_as_transformers_loads_it(write, tmp_path):
    write(tmp_path)
    want = step(with_lora(in_memory(tmp_path)), toy_batch())
    assert_same(step(with_lora(streamed(tmp_path)), toy_batch()), want)


def test_the_text_part_of_a_multimodal_folder(tmp_path):
    text = GROUPED | {"head_dim": 8, "sliding_window": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    marks = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, eoi_token_index=7, **marks
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = streamed(tmp_path)
    assert len(model.streamed_layers) == text["num_hidden_layers"]
    assert isinstance(model, transformers.Gemma3ForConditionalGeneration)
    ids = toy_batch()["input_ids"].clamp(min=8)
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=ids).logits + 0, in_memory(tmp_path).eval()(input_ids=ids).logits
        )
        vision_tower = model.model.vision_tower  # its matrices are read at each use
        own = in_memory(tmp_path).model.vision_tower
        pixels = torch.randn(1, 3, 32, 32)
        seen, expected = (tower(pixels).last_hidden_state for tower in (vision_tower, own))
    assert torch.equal(seen, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_masked_model_is_no_causal_one(tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="not a causal language model"):
        streamed(tmp_path)
