"""Folders that the formats' own libraries wrote, and the weights that they read from them.

bitsandbytes and compressed-tensors are in the extra `formats`; nothing else needs them.
"""

import pytest
import torch
from quantise import FORMATS, Format, quantised
from toy import assert_same, in_memory, step, streamed, toy_batch, toy_dir, with_lora
from transformers import BitsAndBytesConfig, FineGrainedFP8Config

pytestmark = pytest.mark.filterwarnings("ignore")
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "nf4-in-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
WHOLE = {"type": "int", "num_bits": 8, "strategy": "channel"}
FOUR = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 16}
FLOAT = {"type": "float", "num_bits": 8}
COMPRESSED = {
    "int8": ("int-quantized", WHOLE),
    "int8-packed": ("pack-quantized", WHOLE | {"symmetric": False}),
    "int4": ("pack-quantized", FOUR),
    "int4-zeros": ("pack-quantized", FOUR | {"symmetric": False}),
    "fp8-tensor": ("float-quantized", FLOAT | {"strategy": "tensor"}),
    "fp8-row": ("float-quantized", FLOAT | {"strategy": "channel"}),
    "fp8-block": ("float-quantized", FLOAT | {"strategy": "block", "block_structure": [16, 16]}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16},
    ),
}


@pytest.mark.parametrize("kind", BITSANDBYTES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral"])
def test_bitsandbytes(family, kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[formats]'")
    settings = BitsAndBytesConfig(**BITSANDBYTES[kind])
    base = toy_dir(family, n_layers=2)
    in_memory(base, quantization_config=settings, device_map="cpu").save_pretrained(tmp_path)
    dense = in_memory(tmp_path, device_map="cpu").dequantize().requires_grad_(False)
    want = step(with_lora(dense.float()), toy_batch())
    assert_same(step(with_lora(streamed(tmp_path, dtype="float32")), toy_batch()), want)


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_compressed_tensors(family, kind, tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors", reason="pip install -e '.[formats]'")
    monkeypatch.setitem(FORMATS, "library", compressed_tensors(*COMPRESSED[kind]))
    packed, dense = quantised(toy_dir(family, n_layers=2), "library", tmp_path)
    want = step(with_lora(in_memory(dense)), toy_batch())
    assert_same(step(with_lora(streamed(packed)), toy_batch()), want)


def compressed_tensors(name: str, weights: dict) -> Format:
    """The library's own compressor; scales in float32, so that nothing is rounded twice."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(name)

    def quantise(matrix):
        strategy, size = weights["strategy"], weights.get("group_size") or matrix.shape[1]
        parts = matrix.unflatten(1, (-1, size))
        low, high = parts.amin(2), parts.amax(2)
        if strategy == "tensor":
            low, high = matrix.min().view(1), matrix.max().view(1)
        if strategy == "block":
            parts = matrix.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
            low, high = parts.amin((1, 3)), parts.amax((1, 3))
        state, more = {"weight": matrix}, {}
        if strategy == "tensor_group":
            divisor = generate_gparam(matrix.min(), matrix.max()).view(1)
            more = {"global_scale": divisor}
            state["weight_global_scale"] = divisor
        state["weight_scale"], zero = calculate_qparams(low, high, arguments, **more)
        state["weight_zero_point"] = zero.to(torch.int8)
        stored = compressor.compress(state, scheme)
        if strategy == "tensor_group":  # its own decompressor multiplies in bfloat16
            packed = stored["weight_packed"]
            values = unpack_fp4_from_uint8(packed, *matrix.shape, dtype=torch.float32)
            scale = stored["weight_scale"].float()
            dense = dequantize(values, scale, args=arguments, global_scale=divisor)
        else:
            dense = compressor.decompress(stored, scheme)["weight"].float()
        return {f".{part}": tensor for part, tensor in stored.items()}, dense

    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": name}}
    settings = {"quant_method": "compressed-tensors", "config_groups": groups, "format": name}
    return Format(settings | {"quantization_status": "compressed"}, quantise)


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-e8m0", "fp8-tensor"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_fp8_as_transformers_reads_it(family, kind, tmp_path):
    packed, _ = quantised(toy_dir(family, n_layers=2), kind, tmp_path)
    settings = FineGrainedFP8Config(dequantize=True)
    want = step(with_lora(in_memory(packed, quantization_config=settings)), toy_batch())
    assert_same(step(with_lora(streamed(packed)), toy_batch()), want)
