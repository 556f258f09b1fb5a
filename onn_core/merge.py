"""`python -m onn_core.merge MODEL_DIR ADAPTER_DIR OUT_DIR`: see `onn_core.merging`."""

import argparse
from pathlib import Path

from onn_core.errors import OnnError
from onn_core.merging import merge


def main() -> None:
    """Write a model folder with a LoRA adapter merged into it."""
    parser = argparse.ArgumentParser(prog="python -m onn_core.merge", description=main.__doc__)
    for name, meaning in (("model", "the base"), ("adapter", "a PEFT"), ("out", "the new")):
        parser.add_argument(f"{name}_dir", type=Path, help=f"{meaning} folder")
    try:
        print(merge(**vars(parser.parse_args())))
    except OnnError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
