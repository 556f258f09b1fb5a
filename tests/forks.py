"""A process that has imported everything and forks a child for each job: kills cost no imports."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

PATIENCE_S = 300  # a child that is not done by then hangs


class Forks:
    """`start` a function of `jobs` in a process of its own; `wait` for its exit code."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = 0

    def start(self, job: str, errors: Path, **arguments: object) -> int:
        """Start a job, whose standard error goes to a file; returns its process id."""
        line = json.dumps([job, str(errors), arguments], default=str)
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        self.pid = int(self._answer())
        return self.pid

    def wait(self) -> int:
        """The exit code of the job: -9 if it was killed by signal 9."""
        return int(self._answer())

    def _answer(self) -> str:
        if not select.select([self._server.stdout], [], [], PATIENCE_S)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError("a child hangs")
        return self._server.stdout.readline()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def serve() -> None:
    import jobs
    import torch

    while line := os.read(0, 1 << 16):
        name, errors, arguments = json.loads(line)
        pid = os.fork()
        if pid:
            os.write(1, f"{pid}\n".encode())
            os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
            continue
        nowhere = os.open(os.devnull, os.O_RDWR)
        file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, target in ((nowhere, 0), (nowhere, 1), (file, 2)):
            os.dup2(descriptor, target)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it is ignored
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        getattr(jobs, name)(**arguments)
        return


if __name__ == "__main__":
    serve()
