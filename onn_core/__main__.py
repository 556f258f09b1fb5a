"""`python -m onn_core train | merge | model | plan`: the command line."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from onn_core.config import TrainConfig, expand_grid
from onn_core.errors import ConfigError, OnnError
from onn_core.weights.geometry import GEOMETRIES
from onn_core.weights.quantise import KINDS


class SettingsLoader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number: PyYAML takes it for text, as YAML 1.1 does."""


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?|\d*\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_settings(path: Path | None, changes: Sequence[str]) -> dict[str, Any]:
    """The settings of a YAML file, then each "key=value" (a YAML value); ConfigError."""
    settings: Any = {}
    try:
        if path is not None:
            settings = yaml.load(path.read_text(encoding="utf-8"), SettingsLoader) or {}
        if not isinstance(settings, dict):
            raise ConfigError(f"{path} must map names of settings to values.")
        for change in changes:
            name, equals, value = change.partition("=")
            if not equals:
                raise ConfigError(f"{change!r} is not key=value.")
            settings[name] = yaml.load(value, SettingsLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the settings cannot be read ({error}): correct them.") from error
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    grid = settings.get("grid")
    named = settings.keys() - {"grid"} | (grid.keys() if isinstance(grid, dict) else set())
    if unknown := sorted(map(str, named - known)):
        raise ConfigError(
            f"{', '.join(unknown)} is no setting of a run: choose among {', '.join(sorted(known))}."
        )
    if missing := [name for name in ("model_dir", "data", "output_dir") if name not in settings]:
        raise ConfigError(f"{', '.join(missing)} must be set, in the file or as key=value.")
    return settings


def train(arguments: argparse.Namespace) -> None:
    """Train a LoRA with the settings of a YAML file, or one for each combination of its grid."""
    from onn_core.many import train_many
    from onn_core.trainer import ChunkedLoraTrainer

    settings = read_settings(arguments.config, arguments.changes)
    configs = [TrainConfig(**own) for own in expand_grid(settings)]
    if "grid" in settings:
        records = train_many(configs, resume=arguments.resume)
    else:
        records = [ChunkedLoraTrainer(configs[0]).train(resume=arguments.resume)]
    for config, record in zip(configs, records, strict=True):
        if os.environ.get("RANK", "0") != "0":  # another process of the run speaks
            break
        loss = f", loss {record.steps[-1].loss:.4f}" if record.steps else ""
        early = f" ({record.stopped_early})" if record.stopped_early else ""
        print(f"{record.status} after {len(record.steps)} steps{loss}{early}")
        print(Path(config.output_dir) / "adapter")


def merge(arguments: argparse.Namespace) -> None:
    """Write a model folder with a LoRA adapter merged into it."""
    import onn_core

    print(onn_core.merge(arguments.model_dir, arguments.adapter_dir, arguments.out_dir))


def model(arguments: argparse.Namespace) -> None:
    """Prepare the default model, or write a random one of a named geometry."""
    from onn_core.weights.random_model import prepare

    if (arguments.name is None) != (arguments.out is None):
        raise ConfigError("a random model needs a geometry and --out DIR.")
    print(prepare(arguments.name or "smollm2", arguments.layers, arguments.out))


def plan(arguments: argparse.Namespace) -> None:
    """Will it fit, and how long does a step take, at the given ceilings."""
    from onn_core.run.estimate import describe_plan

    print(
        describe_plan(
            arguments.model,
            batch_size=arguments.batch_size,
            n_tokens=arguments.tokens,
            layers=arguments.layers,
            sparse_layers=arguments.sparse_layers,
            memory_budget=arguments.budget,
            quantize=arguments.quantize,
            read_bytes_per_s=1e9 * arguments.read,
            flops_per_s=1e9 * arguments.gflops,
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's error is one sentence and status 1."""
    parser = argparse.ArgumentParser(prog="python -m onn_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="train | merge | model | plan")

    def command(run: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    added = command(train)
    added.add_argument("config", type=Path, help="a YAML file of the settings of TrainConfig")
    added.add_argument(
        "changes", nargs="*", metavar="key=value", help="settings that override the file's"
    )
    added.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    added = command(merge)
    for name, meaning in (("model", "the base"), ("adapter", "a PEFT"), ("out", "the new")):
        added.add_argument(f"{name}_dir", type=Path, help=f"{meaning} folder")
    added = command(model)
    added.add_argument("name", nargs="?", choices=GEOMETRIES, help="a geometry to write at random")
    added.add_argument("--layers", type=int, help="decoder layers (default: all of them)")
    added.add_argument("--out", type=Path, help="folder of the random model")
    added = command(plan)
    added.add_argument("model", help=f"a model folder, or one of {', '.join(GEOMETRIES)}")
    added.add_argument("--batch-size", type=int, default=32)
    added.add_argument("--tokens", type=int, default=128, help="of a sample")
    added.add_argument("--layers", type=int, help="decoder layers (default: all of them)")
    added.add_argument("--sparse-layers", default="all", help='"all", "ends:4" or "last:8"')
    added.add_argument("--budget", help='memory such as "4GB" (default: no budget)')
    added.add_argument("--quantize", choices=KINDS, help="of a folder that is not yet quantised")
    added.add_argument("--read", type=float, default=1.0, help="GB/s that the disk sustains")
    added.add_argument("--gflops", type=float, default=100, help="GFLOP/s of the matmul")
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except OnnError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt as error:
        parser.exit(130, f"{error or 'interrupted'}\n")


if __name__ == "__main__":
    sys.exit(main())
