"""The processes of one run, as torchrun or accelerate launch starts them, and what they agree on.

Each has the same adapters and a part of every batch. torch.distributed carries their gradients:
NCCL between GPUs, gloo between CPUs. Before anything is exchanged they meet: each says, over gloo,
whether it goes on or why it cannot, so that all stop at the same step with the same sentence. A
process that was killed closes its connections, which ends the meeting for the others at once.
"""

import atexit
import contextlib
import datetime
import fcntl
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onn_core import errors
from onn_core.errors import ConfigError, OnnError

MESSAGE_BYTES = 1024  # of what each says where they meet
LOOK_S = 5e-4  # between two looks at whether all have come; signals are handled meanwhile
# Between GPUs that have met, or exchange weights in a step: then only one that is lost makes them
# wait. NCCL ends a process that has waited so long.
GPUS_TIMEOUT = datetime.timedelta(seconds=30)
# Of a machine that vanished and closed no connection. Steps may take long, and differ in length.
MEETING_TIMEOUT = datetime.timedelta(minutes=30)


def local_rank() -> int:
    """The number of this process among those of its host; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def n_local() -> int:
    """How many processes the launcher started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def chooses_gather() -> bool:
    """Whether the user wants GPUs to exchange parts of the weights."""
    return os.environ.get("ONN_GATHER") == "1"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process of this host is inside with the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Processes:
    """The processes of a run; without arguments, this one alone, for which nothing costs anything.

    meeting: a gloo group of this run's own, so that runs of one pass do not hear each other.
    gradients: the group that sums them; runs of one pass come to that in one order.
    """

    def __init__(self, meeting: Any = None, gradients: Any = None):
        self.rank = 0 if meeting is None else dist.get_rank(meeting)
        self.size = 1 if meeting is None else dist.get_world_size(meeting)
        self.lost = False  # one of them has ended without a word
        self._meeting, self._gradients = meeting, gradients
        self._ended = False  # one of them has stopped: they meet no more
        self._told: Any = None

    @classmethod
    def of_run(cls, device: torch.device) -> "Processes":
        """Those that the launcher started; every one of them calls this at the same place.

        ConfigError if the environment says that there are several, but not how they meet.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if dist.is_initialized():
            size = dist.get_world_size()
        if size == 1:
            return cls()
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
            if missing := [name for name in needed if name not in os.environ]:
                raise ConfigError(
                    f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start several "
                    "processes with torchrun or accelerate launch, or unset WORLD_SIZE."
                )
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
            atexit.register(_leave_all)
        meeting = dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT)
        return cls(meeting, _nccl_group(dist.group.WORLD) if on_gpu else meeting)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, warns and shows progress."""
        return self.rank == 0

    @functools.cached_property
    def gather_group(self) -> Any:
        """The NCCL group of all, if they shall exchange weights: ONN_GATHER=1 says so.

        They are on one host then, whose GPUs reach each other's memory; else None.
        """
        if self.size == 1 or not chooses_gather():
            return None
        on_gpus = self._gradients is not self._meeting
        if not on_gpus or not self.size == n_local() <= torch.cuda.device_count():
            return None
        pairs = itertools.permutations(range(self.size), 2)
        reach = all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
        return self._gradients if reach else None

    # --- whether all go on --------------------------------------------------------------------

    def meet(self, said: str = "") -> list[str]:
        """Wait for all; what each has said.

        Where one has stopped instead, its OnnError or KeyboardInterrupt is raised in the others.
        """
        if self.size == 1:
            return [said]
        if self._ended:
            raise OnnError("the other processes of this run have stopped: start all of them again.")
        heard = self._heard(self._say(f" {said}"))
        for rank, words in enumerate(heard):
            if not words.startswith(" "):
                self._ended = True
                name, _, text = words.partition(": ")
                if name == "KeyboardInterrupt":
                    raise KeyboardInterrupt
                if name in vars(errors):
                    raise getattr(errors, name)(text)
                raise OnnError(f"process {rank} stopped: {words}")
        return [words[1:] for words in heard]

    def tell(self, error: BaseException) -> None:
        """Stop: say why to the others, which hear it where they meet next."""
        if self.size > 1 and not self._ended:
            self._ended = True
            with contextlib.suppress(OnnError), self._connected():
                self._told = self._say(f"{type(error).__name__}: {error}")

    def wait_until_told(self) -> None:
        """Return when the others have heard why this one stopped, or have ended themselves."""
        told, self._told = self._told, None
        if told is not None:
            with contextlib.suppress(OnnError):
                self._heard(told)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside is done in every process, or has failed in every process.

        Not to be mistaken for `streaming.together`: several runs in one process.
        """
        try:
            yield
        except BaseException as error:
            self.tell(error)
            self.wait_until_told()
            raise
        self.meet()

    def _say(self, words: str) -> tuple[Any, list[torch.Tensor]]:
        content = words.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        heard = [torch.empty_like(mine) for _ in range(self.size)]
        return dist.all_gather(heard, mine, group=self._meeting, async_op=True), heard

    def _heard(self, said: tuple[Any, list[torch.Tensor]]) -> list[str]:
        work, heard = said
        with self._connected():
            while not work.is_completed():
                time.sleep(LOOK_S)
            work.wait()
        return [bytes(x.tolist()).rstrip(b"\0").decode(errors="ignore") for x in heard]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """OnnError if a connection to another process is closed inside."""
        try:
            yield
        except RuntimeError as error:
            self._ended = self.lost = True
            raise OnnError(
                "another process of this run has ended without a word, perhaps for memory: see "
                "what the launcher says of it."
            ) from error

    # --- what they exchange -------------------------------------------------------------------

    def share(self, make: Callable[[], bytes]) -> bytes:
        """What `make` returns in the first process, in all; its OnnError is raised in all."""
        content = b""
        with self.together():
            if self.is_first:
                content = make()
        if self.size == 1:
            return content
        size = torch.tensor([len(content)])
        with self._connected():
            dist.broadcast(size, 0, group=self._meeting)
            values = torch.tensor(bytearray(content).ljust(int(size)), dtype=torch.uint8)
            if len(values):
                dist.broadcast(values, 0, group=self._meeting)
        return values.numpy().tobytes()

    def sum(self, number: float) -> float:
        """The sum of all processes' numbers; call it after they have met."""
        if self.size == 1:
            return number
        total = torch.tensor([number], dtype=torch.float64)
        with self._connected():
            dist.all_reduce(total, group=self._meeting)
        return float(total)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: float) -> float:
        """Sum every gradient over all processes, in float32, in one go; returns the losses' sum.

        What has no gradient in any process has none afterwards.
        """
        if self.size == 1:
            return loss
        self.meet()
        device, n = parameters[0].device, len(parameters)
        grads = [p.new_zeros(()).expand_as(p) if p.grad is None else p.grad for p in parameters]
        have = torch.tensor([*(float(p.grad is not None) for p in parameters), loss])
        flat = torch.cat([*(g.flatten().float() for g in grads), have.to(device).float()])
        *values, have = flat.split([*(p.numel() for p in parameters), n + 1])
        with self._connected():
            dist.all_reduce(flat, group=self._gradients)
            *have, loss = have.tolist()
        for parameter, value, has in zip(parameters, values, have, strict=True):
            if has:
                parameter.grad = value.view_as(parameter).to(parameter.dtype)
        return loss

    # --- who writes ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, folder: Path) -> Iterator[bool]:
        """Inside, this process alone writes to `folder`, if it yields True.

        The first one does; when one is lost, which may be the first, those that are left do, one
        after the other: they hold the same numbers.
        """
        if not self.is_first and not self.lost:
            yield False
            return
        if self.size == 1:
            yield True
            return
        with alone_in(folder):
            yield True


ALONE = Processes()


@functools.cache
def _nccl_group(world: Any) -> Any:
    """One for all runs of the processes of `world`: each takes memory of the device."""
    return dist.new_group(backend="nccl", timeout=GPUS_TIMEOUT)


def _leave_all() -> None:
    with contextlib.suppress(Exception):  # the others may have gone before
        dist.destroy_process_group()
