"""An embedding whose rows are read from disk by number."""

import torch
from torch import nn

from onn_core.weights.folder import ModelFolder
from onn_core.weights.formats import Source


class EmbeddingRows:
    """Takes the place of an embedding's forward: reads the rows that a batch needs.

    in_memory: read the whole table once, into host memory, and gather rows from there.
    """

    def __init__(
        self,
        module: nn.Embedding,
        model_folder: ModelFolder,
        source: Source,
        device: torch.device,
        in_memory: bool = False,
    ):
        self.module = module
        self.forward = module.forward  # the class's own: some scale what they look up
        self.n_rows = len(module.weight)
        self.dtype, self.device = module.weight.dtype, device
        self.model_folder, self.source = model_folder, source
        self.in_memory = in_memory
        self._table: torch.Tensor | None = None  # (V, C) in host memory

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, T) -> (B, T, C)."""
        ids, places = input_ids.unique(return_inverse=True)
        if len(ids) and (ids[0] < 0 or ids[-1] >= self.n_rows):
            raise IndexError(f"token ids lie outside the vocabulary of {self.n_rows}.")
        module, weight = self.module, self.module._parameters["weight"]  # may be the head's too
        padding_idx, module.padding_idx = module.padding_idx, None
        module._parameters["weight"] = nn.Parameter(self._read(ids), requires_grad=False)
        try:
            return self.forward(places)
        finally:
            module._parameters["weight"], module.padding_idx = weight, padding_idx

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop of the weight (V, C)."""
        return self._read(torch.arange(start, stop))

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.in_memory:
            rows = self.model_folder.read_rows(self.source.entry.name, ids.cpu())  # (U, C)
            return self.source.gathered(rows, self.dtype).to(self.device)
        if self._table is None:
            self._table = self.model_folder.read(self.source.entry.name)
        rows = torch.empty(len(ids), self._table.shape[1], dtype=self._table.dtype, pin_memory=True)
        torch.index_select(self._table, 0, ids.cpu(), out=rows)
        return self.source.gathered(rows.to(self.device, non_blocking=True), self.dtype)
