"""Train LoRA adapters of language models that are many times larger than the memory at hand."""

from onn_core.adapters.folder import load_adapter
from onn_core.adapters.merging import merge
from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.evaluate import answers, perplexity
from onn_core.many import train_many
from onn_core.record import RunRecord
from onn_core.streaming.loading import from_pretrained
from onn_core.trainer import ChunkedLoraTrainer
from onn_core.weights.default_model import prepare_default_model

__all__ = [
    "ChunkedLoraTrainer",
    "OnnError",
    "RunRecord",
    "TrainConfig",
    "answers",
    "from_pretrained",
    "load_adapter",
    "merge",
    "perplexity",
    "prepare_default_model",
    "train_many",
]
