"""Other systems that stream a frozen base to a GPU, where they are installed: Soup, TrainStream.

Each is opened as its own documentation says, with the LoRA that it is given.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig


def open_soup(folder: Path, lora: peft.LoraConfig) -> nn.Module:
    """Its layers wait in pinned host memory, cut into shards of its own where TMPDIR says."""
    from soup_cli.utils.layer_shard import read_shard_index, shard_checkpoint
    from soup_cli.utils.layer_stream import stream_arch_of
    from soup_cli.utils.layer_stream_runtime import build_streamed_model

    shards = tempfile.TemporaryDirectory()  # it writes only there, or in the home folder
    shard_checkpoint(
        str(folder),
        shards.name,
        dtype="bfloat16",
        arch=stream_arch_of(AutoConfig.from_pretrained(folder)),
        quant="none",
        notify=lambda text: None,
    )
    model, _ = build_streamed_model(
        model_id=str(folder),
        shard_dir=shards.name,
        index=read_shard_index(shards.name),
        lora_config=lora,
        device="cuda",
        dtype="bfloat16",
        pin=True,
        require_pin=True,
        quant="none",
        tier="ram",
    )
    model.shards = shards  # for as long as the model
    return model.train()


class TrainStream(nn.Module):
    """A model that it has wrapped, with the loss as its own trainer takes it."""

    def __init__(self, folder: Path, lora: peft.LoraConfig):
        import trainstream
        from trainstream.integrations import huggingface

        super().__init__()
        base = huggingface.load_model(str(folder), quantize="none")
        base.config.use_cache = False
        base.gradient_checkpointing_enable({"use_reentrant": False})
        adapted = peft.get_peft_model(base, lora).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        self.model, self.optimizer = trainstream.wrap(
            adapted,
            torch.optim.AdamW(trained, lr=1e-4),
            device="cuda",
            blocks=huggingface.decoder_layers(adapted),
            param_offload=True,
            activation_offload=False,
            quantize="none",
            profile=False,
            check_memory=False,
        )
        self.config = adapted.config
        self._library, self._head = huggingface, huggingface.lm_head_of(self.model)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        with self._library._CaptureHidden(self._head) as captured:
            self.model(input_ids=input_ids)
        head = self._head
        return SimpleNamespace(
            loss=self._library.causal_lm_loss(
                captured.hidden, head.weight, labels, head.bias, chunk_size=1024
            )
        )


OPENERS = {"soup": open_soup, "trainstream": TrainStream}
