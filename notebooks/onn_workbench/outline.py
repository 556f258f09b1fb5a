"""What a choice of settings will take, before anything is trained: an estimate at once."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch

from onn_core.adapters.lora import linear_names, select_layers
from onn_core.config import TrainConfig
from onn_core.errors import ConfigError
from onn_core.run.estimate import Geometry, predict
from onn_core.streaming.loading import from_pretrained
from onn_core.streaming.skeleton import decoder_layers
from onn_workbench.bench import first_layers
from onn_workbench.ceilings import measure_flops, measure_read

PROBE_TOKENS = 128  # in the matmuls that are timed for the prediction
PROBE_SIZE = 4096  # largest side of their matrices
VISIT_TOKENS = 2048  # of the batch with which a real layer is visited


class Outline:
    """The sizes of a model, and what this machine does with them; no weight is read but to time."""

    def __init__(self, model_dir: str | os.PathLike):
        model = from_pretrained(model_dir)
        self.model_dir, self._visits = model_dir, {}
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
        self.dense_bytes = total * model.model_folder.stored_dtype.itemsize
        self.title = f"{model.config.model_type}, {total:,} parameters"
        shapes = [tuple(min(side, PROBE_SIZE) for side in shape) for shape in linears[0]]
        paths = list({entry.path for entry in model.model_folder.tensors.values()})
        self.rates = {
            "read_bytes_per_s": measure_read(paths, n_readers=2, limit_s=0.7),
            "flops_per_s": measure_flops(
                shapes, PROBE_TOKENS, model.dtype, model.device, stored=units[0][0].dtype
            ),
        }

    def visit(self, config: TrainConfig) -> dict[str, float]:
        """Seconds of the first layer alone, and of the head, in a step of full samples.

        Measured once for each size of a batch, on few samples of it. Nothing is drawn at random.
        """
        n_samples = min(config.batch_size, max(1, VISIT_TOKENS // config.max_length))
        key = n_samples, config.max_length, config.lora_rank
        if key not in self._visits:
            with first_layers(self.model_dir, 1) as folder:
                self._visits[key] = _visit(folder, *key)
        return {name: s * config.batch_size / n_samples for name, s in self._visits[key].items()}

    def predict(self, config: TrainConfig, measured: bool = False) -> dict[str, Any]:
        """What `estimate.predict` says of steps of full samples.

        measured: by a visit of a real layer, else by matmuls at their ceiling.
        ConfigError when the layers or the memory budget do not fit the model.
        """
        trained = select_layers(config.sparse_layers, self.n_layers)
        n_trained = config.lora_rank * sum(self.widths[number] for number in trained)
        sizes = dataclasses.replace(
            self.geometry.sizes, n_trained=n_trained, n_back=len(self.widths) - min(trained)
        )
        one = self.visit(config) if measured else {}
        found = predict(
            dataclasses.replace(self.geometry, sizes=sizes),
            config.batch_size,
            config.max_length,
            memory_budget=config.memory_budget,
            chunk_size=config.chunk_size,
            micro_batch_size=config.micro_batch_size,
            one_layer=one or None,
            **self.rates,
        )
        if "refused" in found:
            raise ConfigError(found["refused"])
        forward_s = self.n_layers * one.get("forward_s", 0.0) + one.get("head_s", 0.0)
        n_evals = 1 + config.max_steps // config.eval_every if config.eval_every else 0
        share = config.eval_samples / config.batch_size
        return found | {"measured": measured, "eval_s": n_evals * share * forward_s}

    def limit_s(self, trained: Sequence[int], bytes_read: int, n_tokens: int) -> float:
        """Seconds of a step that this machine cannot go below: it reads, or it multiplies."""
        n_visits = 2 * self.n_layers + 4 * (self.n_layers - min(trained))
        flops = n_visits * self.geometry.layer_parameters + 4 * self.geometry.head_parameters
        read_s = bytes_read / self.rates["read_bytes_per_s"]
        return max(read_s, flops * n_tokens / self.rates["flops_per_s"])


def _visit(model_dir: os.PathLike, n_samples: int, n_tokens: int, rank: int) -> dict[str, float]:
    """The second of two steps on the model in `model_dir`, which has one layer; adapters are 0."""
    base = from_pretrained(model_dir)
    lora = peft.LoraConfig(r=rank, target_modules=linear_names(decoder_layers(base)))
    with warnings.catch_warnings():  # PEFT asks transformers for a property that was renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = peft.get_peft_model(base, lora, low_cpu_mem_usage=True).train()
    adapter = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    zeros = {name: torch.zeros_like(p, device=base.device) for name, p in adapter.items()}
    peft.set_peft_model_state_dict(model, zeros, low_cpu_mem_usage=True)
    ids = torch.ones(n_samples, n_tokens, dtype=torch.int64, device=base.device)  # (B, T)
    for _ in range(2):
        before = base.counts()
        model(input_ids=ids, labels=ids).loss.backward()
    seconds = (base.counts() - before).seconds
    base.close()
    return {f"{phase}_s": seconds[phase] for phase in ("forward", "head", "backward")}
