"""Train LoRA adapters of language models that are many times larger than the memory at hand."""

from onn_core.config import TrainConfig
from onn_core.errors import OnnError
from onn_core.evaluate import answers, perplexity
from onn_core.merging import merge
from onn_core.model import from_pretrained
from onn_core.record import RunRecord
from onn_core.trainer import ChunkedLoraTrainer

__all__ = [
    "ChunkedLoraTrainer",
    "OnnError",
    "RunRecord",
    "TrainConfig",
    "answers",
    "from_pretrained",
    "merge",
    "perplexity",
]
