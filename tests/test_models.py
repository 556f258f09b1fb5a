"""Default model, geometries and random checkpoints."""

import shutil

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from onn_core.__main__ import main
from onn_core.errors import ConfigError, ModelFolderError
from onn_core.record import new_folder
from onn_core.weights import default_model, geometry, random_model

ENGLISH = (
    "Water moves around the Earth in a cycle. The heat of the sun makes water evaporate from seas, "
    "lakes and rivers. The water vapor rises into the air, where it cools and condenses into tiny "
    "drops that form clouds. When the drops become heavy enough, they fall back to the ground as "
    "rain or snow. Some of this water flows into rivers and returns to the sea, and some of it "
    "soaks into the soil, where plants take it up through their roots."
)
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TOY = {
    "phi3": SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0},
    "llama": SIZES
    | {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


def toy(family):
    return AutoConfig.for_model(family, **TOY[family])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2", 134_515_008),
        ("phi-4", 14_659_507_200),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_geometry_has_the_published_parameters(name, parameters):
    assert geometry.count_parameters(geometry.geometry(name)) == parameters


# PEFT asks for a name that transformers is about to drop.
def test_phi4_adapters_of_the_report():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry.geometry("phi-4"))
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            layers_to_transform=[0, 1, 2, 3, 36, 37, 38, 39],
        ),
    )
    assert model.get_nb_trainable_parameters()[0] == 5_570_560


def test_layers_of_a_geometry_are_alike():
    one, two = (geometry.count_parameters(geometry.geometry("phi-4", layers)) for layers in (1, 2))
    assert one + 39 * (two - one) == 14_659_507_200


@pytest.mark.parametrize("arguments", [("phi-5",), ("phi-4", 0)])
def test_unknown_geometry_is_refused(arguments):
    with pytest.raises(ConfigError):
        geometry.geometry(*arguments)


@pytest.mark.parametrize("family", TOY)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_random_checkpoint_loads(family, shard_bytes, tmp_path):
    folder = random_model.write_random_model(
        tmp_path / "model",
        toy(family),
        dtype=torch.float32,
        shard_bytes=shard_bytes,
        progress=False,
    )
    assert (folder / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    stored = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert stored.keys() == state.keys() - tied
    for name, tensor in stored.items():
        assert torch.equal(tensor, state[name]), name
        if tensor.dim() > 1:
            assert tensor.std() == pytest.approx(0.02, rel=0.1), name
            assert len(torch.unique(tensor, dim=0)) == len(tensor), name
        else:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name
    loss = model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss
    assert loss.item() == pytest.approx(torch.tensor(96.0).log().item(), rel=0.1)


def test_random_checkpoint_is_bf16_and_fixed_by_its_seed(tmp_path):
    def content(name, seed):
        folder = random_model.write_random_model(
            tmp_path / name, toy("llama"), seed=seed, progress=False
        )
        assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
        return (folder / "model.safetensors").read_bytes()

    assert content("a", seed=1) == content("b", seed=1) != content("c", seed=2)


def test_finished_random_checkpoint_is_kept(tmp_path):
    folder = random_model.write_random_model(tmp_path / "model", toy("phi3"), progress=False)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert random_model.write_random_model(folder, toy("phi3"), progress=False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    for config, settings in ((toy("gpt2"), {}), (toy("phi3"), {"seed": 1})):
        with pytest.raises(ModelFolderError, match="something else"):
            random_model.write_random_model(folder, config, progress=False, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_interrupted_random_checkpoint_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(random_model, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        random_model.write_random_model(tmp_path / "model", toy("phi3"), progress=False)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_refused_before_writing(tmp_path):
    config = AutoConfig.for_model("llama", **TOY["llama"] | {"vocab_size": 10**13})
    with pytest.raises(ModelFolderError, match=r"needs 640000.0 GB .* has [0-9.]+ GB free"):
        random_model.write_random_model(tmp_path / "model", config, progress=False)
    assert not list(tmp_path.iterdir())


def test_default_model_is_a_plain_folder(smollm2_dir):
    config = AutoConfig.from_pretrained(smollm2_dir)
    assert (config.model_type, config.num_hidden_layers) == ("llama", 30)
    assert config.tie_word_embeddings and config.dtype == torch.bfloat16
    assert (config.eos_token_id, config.pad_token_id) == (2, 2)
    assert not hasattr(config, "quantization_config")
    with safe_open(smollm2_dir / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert len(file.keys()) == 272
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert "<|im_start|>assistant" in tokenizer.chat_template


def test_default_model_knows_english(smollm2_dir):
    model, report = AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = AutoTokenizer.from_pretrained(smollm2_dir)(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(1.96, abs=0.1)


def test_damaged_default_model_is_noticed(smollm2_dir, tmp_path):
    copy = shutil.copytree(smollm2_dir, tmp_path / "copy")
    assert default_model._is_intact(copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(10**6)
        byte = file.read(1)
        file.seek(10**6)
        file.write(bytes([byte[0] ^ 1]))
    assert not default_model._is_intact(copy)
    (copy / "model.safetensors").unlink()
    assert not default_model._is_intact(copy)


def test_second_of_two_writers_keeps_the_first(tmp_path):
    with new_folder(tmp_path / "model") as slow:
        (slow / "file").write_text("slow")
        with new_folder(tmp_path / "model") as fast:
            (fast / "file").write_text("fast")
    assert (tmp_path / "model" / "file").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_command_wants_a_folder(smollm2_dir, capsys):
    main(["model"])
    assert capsys.readouterr().out.strip() == str(smollm2_dir)
    with pytest.raises(SystemExit):
        main(["model", "phi-4"])
    assert "--out" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONN_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(ModelFolderError, match="cannot be written .*set ONN_CACHE"):
        default_model.prepare_default_model()
