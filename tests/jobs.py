"""What children of `forks` do. Every function takes values of JSON."""

import threading
from pathlib import Path

from small import trainer

import onn_core.trainer
from onn_core.reader import DirectFiles


def run(small: list[str], output_dir: str, resume: bool = False, **changes: object) -> None:
    trainer(small, output_dir, **changes).train(resume=resume)


def run_hanging(small: list[str], output_dir: str, close_s: float, **changes: object) -> None:
    """A run whose reads never return after step 3; then the file `hangs` is there."""
    onn_core.trainer.CLOSE_S = close_s
    made = trainer(small, output_dir, **changes)
    read = DirectFiles.read

    def hang(*args: object) -> int:
        if len(made.record.steps) < 3:
            return read(*args)
        Path(output_dir, "hangs").touch()
        threading.Event().wait()

    DirectFiles.read = hang
    made.train()
