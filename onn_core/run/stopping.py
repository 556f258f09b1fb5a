"""Stopping a run: between two layers, where nothing is half done, or early, by its evaluations."""

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from onn_core.record import EvalRecord

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def early_stop(evals: Sequence[EvalRecord], patience: int | None, threshold: float) -> str:
    """Why a run with these evaluations stops early; "" if it goes on.

    The rule of transformers' EarlyStoppingCallback: an evaluation whose loss is not below the best
    before it by more than `threshold` uses up patience, and one that is gives all of it back. It
    depends on the evaluations alone, so that a resumed run stops where a whole one would.
    """
    best, n_worse = None, 0
    for done in evals:
        better = best is None or best.loss - done.loss > threshold
        n_worse = 0 if better else n_worse + 1
        best = done if best is None or done.loss < best.loss else best
    if patience is None or n_worse < patience:
        return ""
    return (
        f"the held-out loss was not below its best by more than {threshold:g} in {n_worse} "
        f"evaluations; the best was {best.loss:.4f} after step {best.step}"
    )


class Stop:
    """While it is entered, the first SIGINT or SIGTERM is a request; a second acts at once.

    Signals reach Python's main thread only: in another thread, `request` is the way. Runs of one
    pass enter the one that their caller has entered: it asks all of them.
    """

    def __init__(self):
        self.requested = False
        self.at_once = False
        self._signal: int | None = None
        self._n_inside = 0
        self._before: dict[int, object] = {}

    def request(self) -> None:
        """Ask for a stop at the next layer; from any thread."""
        self.requested = True

    def check(self) -> None:
        """KeyboardInterrupt if a stop was asked for; called where a step can be abandoned."""
        if self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> "Stop":
        self._n_inside += 1
        if self._n_inside > 1:
            return self
        self.requested = self.at_once = False
        self._signal = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._n_inside -= 1
        if self._n_inside:
            return
        self._give_back()
        if self._signal == signal.SIGTERM and not self.at_once:
            print(error, file=sys.stderr, flush=True)
            signal.raise_signal(signal.SIGTERM)  # what it would have done, now that all is saved

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.at_once = True
            self._give_back()
            signal.raise_signal(number)
        self._signal = number
        self.request()

    def _give_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
