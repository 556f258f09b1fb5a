"""Train LoRA adapters of language models that are many times larger than the memory at hand."""

from onn_core.errors import OnnError
from onn_core.model import from_pretrained

__all__ = ["OnnError", "from_pretrained"]
