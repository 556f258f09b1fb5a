"""An embedding whose rows are read from disk by number."""

import sys

import torch
from torch import nn

from onn_core.errors import ConfigError
from onn_core.weights.dequantise import Source
from onn_core.weights.folder import ModelFolder
from onn_core.weights.host import HostMemory, as_seen_by


class EmbeddingRows:
    """Takes the place of an embedding's forward: reads the rows that a batch needs.

    in_memory: read the whole table once, into pinned host memory, and gather rows from there.
    """

    def __init__(
        self,
        module: nn.Embedding,
        model_folder: ModelFolder,
        source: Source,
        device: torch.device,
        host_memory: HostMemory,
        in_memory: bool = False,
    ):
        self.module = module
        self.forward = module.forward  # the class's own: some scale what they look up
        self.n_rows = len(module.weight)
        self.dtype, self.device = module.weight.dtype, device
        self.model_folder, self.source = model_folder, source
        self.in_memory = in_memory
        self._memory = host_memory
        self._table: torch.Tensor | None = None  # (V, C) in host memory
        self._seen: torch.Tensor | None = None  # the same, for the device

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids (B, T) -> (B, T, C)."""
        table = self._on_bus()
        if table is not None:
            return self._look_up(table, input_ids)
        ids, places = input_ids.unique(return_inverse=True)
        if len(ids) and (ids[0] < 0 or ids[-1] >= self.n_rows):
            raise IndexError(f"token ids lie outside the vocabulary of {self.n_rows}.")
        return self._look_up(self._read(ids), places)

    def _look_up(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As the module does with `rows` (U, C) for its weight."""
        module, weight = self.module, self.module._parameters["weight"]  # may be the head's too
        padding_idx, module.padding_idx = module.padding_idx, None
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        try:
            return self.forward(ids)
        finally:
            module._parameters["weight"], module.padding_idx = weight, padding_idx

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop of the weight (V, C)."""
        return self._read(torch.arange(start, stop))

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.in_memory:
            rows = self.model_folder.read_rows(self.source.entry.name, ids.cpu())  # (U, C)
            return self.source.gathered(rows, self.dtype).to(self.device)
        table = self._host_table()
        rows = torch.empty(len(ids), table.shape[1], dtype=table.dtype, pin_memory=True)
        torch.index_select(table, 0, ids.cpu(), out=rows)
        return self.source.gathered(rows.to(self.device, non_blocking=True), self.dtype)

    def _host_table(self) -> torch.Tensor:
        """The whole weight (V, C), as it is stored, in host memory."""
        if self._table is None:
            stored = self.model_folder.read(self.source.entry.name)
            memory = self._memory.take(stored.nbytes)[: stored.nbytes]
            self._table = memory.view(stored.dtype).view(stored.shape).copy_(stored)
        return self._table

    def _on_bus(self) -> torch.Tensor | None:
        """The whole weight as the device reads it over its bus, so that nobody waits for the ids.

        None where the rows are converted, or where a device may see host memory elsewhere.
        """
        if not self.in_memory or sys.platform != "linux":
            return None
        if self._seen is None:
            try:
                self._seen = as_seen_by(self._host_table(), self.device)
            except ConfigError:  # the host refuses to pin it
                self.in_memory = False
                return None
        return self._seen if self._seen.dtype == self.dtype else None
