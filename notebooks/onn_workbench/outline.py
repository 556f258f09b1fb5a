"""What a choice of settings will take, before anything is trained: an estimate at once."""

import dataclasses
import os
from typing import Any

from onn_core.adapters.lora import linear_names, select_layers
from onn_core.config import TrainConfig
from onn_core.errors import ConfigError
from onn_core.run.estimate import Geometry, predict
from onn_core.streaming.loading import decoder_layers, from_pretrained
from onn_workbench.ceilings import measure_flops, measure_read

PROBE_TOKENS = 128  # in the matmuls that are timed for the prediction
PROBE_SIZE = 4096  # largest side of their matrices


class Outline:
    """The sizes of a model, and what this machine does with them; no weight is read but to time."""

    def __init__(self, model_dir: str | os.PathLike):
        model = from_pretrained(model_dir)
        self.n_layers = model.config.num_hidden_layers
        units = [*model.sizes.layers, *model.sizes.head]
        layers = decoder_layers(model)
        names = linear_names(layers)
        linears = [  # of each layer: (out, in) of what gets an adapter
            [tuple(m.weight.shape) for n, m in layer.named_modules() if n.split(".")[-1] in names]
            for layer in layers
        ]
        self.widths = [sum(map(sum, shapes)) for shapes in linears]
        parameters = [sum(item.shape[0] * item.shape[1] for item in unit) for unit in units]
        head = sum(parameters[self.n_layers :])
        total = model.num_parameters()
        self.geometry = Geometry(model.sizes, total, parameters[0], head)
        self.title = f"{model.config.model_type}, {total:,} parameters"
        shapes = [tuple(min(side, PROBE_SIZE) for side in shape) for shape in linears[0]]
        paths = list({entry.path for entry in model.model_folder.tensors.values()})
        self.rates = {
            "read_bytes_per_s": measure_read(paths, n_readers=2, limit_s=0.7),
            "flops_per_s": measure_flops(
                shapes, PROBE_TOKENS, model.dtype, model.device, stored=units[0][0].dtype
            ),
        }

    def predict(self, config: TrainConfig) -> dict[str, Any]:
        """What `estimate.predict` says of steps of full samples.

        ConfigError when the layers or the memory budget do not fit the model.
        """
        trained = select_layers(config.sparse_layers, self.n_layers)
        n_trained = config.lora_rank * sum(self.widths[number] for number in trained)
        sizes = dataclasses.replace(
            self.geometry.sizes, n_trained=n_trained, n_back=len(self.widths) - min(trained)
        )
        found = predict(
            dataclasses.replace(self.geometry, sizes=sizes),
            config.batch_size,
            config.max_length,
            memory_budget=config.memory_budget,
            chunk_size=config.chunk_size,
            micro_batch_size=config.micro_batch_size,
            **self.rates,
        )
        if "refused" in found:
            raise ConfigError(found["refused"])
        return found
