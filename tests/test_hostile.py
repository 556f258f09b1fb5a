"""Mutated real files: a clear OnnError or success, whatever is in them.

Never another exception, a hang, an allocation larger than a few files, a file opened or written
elsewhere, or code run. The fast tier tries a few hundred inputs, `-m faults` over ten thousand.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from ggufs import Type, toy_model, write_gguf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from quantise import quantised
from small import trainer, write_small
from toy import in_memory, streamed, toy_batch, toy_dir, with_lora

import onn_core
from onn_core.adapters import folder as adapters_folder
from onn_core.adapters.folder import load_adapter
from onn_core.data import corpus, load_rows, load_tokenizer, tokenize
from onn_core.errors import OnnError
from onn_core.run.checkpoints import FILES, SUMS, Checkpoints
from onn_core.weights.folder import INDEX_NAME, ModelFolder
from onn_core.weights.gguf import read_header

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs limits and /proc"),
]
ALLOWED_BYTES = 1 << 30  # of addresses beyond those of the start; the files have kilobytes
ALLOWED_S = 20
NUMBERS = itertools.count()  # of inputs
HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30),
    *(10**6, 10**9, "", "x", "../x", "/etc/passwd", "..", "a\0b", "\ud800", "x" * 5000, "(a+)+$"),
    *([], {}, [[]], [None], [0, -1], [2**62, 2**62], {"": {}}, {"a": 1}, {"auto_map": "x.y"}),
    *("os.system", "__main__", "float32", "cuda", "eager", "model.safetensors", "F64", "BF16"),
]


class Watch:
    """What the process does meanwhile, as Python's audit hooks tell."""

    def __init__(self):
        self.folder: Path | None = None
        self.wrong: list[str] = []
        self.bases: tuple[str, ...] = ()  # model folders that are not attacked and may be read
        sys.addaudithook(self.see)

    def see(self, event, args):
        if self.folder is None:
            return
        if event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "subprocess.Popen",
            "socket.connect",
        ) and not (event == "subprocess.Popen" and adapters_folder.MATCH_ALL in args[1]):
            self.wrong.append(f"{event} {args}")
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            mode, flags = args[1] or "", args[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else "w" in mode
            library = path.startswith(
                (sys.base_prefix, sys.prefix, "/proc", "/sys", "/dev", "/usr")
            )
            library |= "site-packages" in path or path.startswith(os.path.dirname(__file__))
            library |= path.startswith(os.path.dirname(onn_core.__file__))
            library |= "onn-toy-" in path  # the base of an adapter
            library |= path.startswith(self.bases) if self.bases else False
            inside = path.startswith(str(self.folder))
            if not inside and (writes and not path.startswith("/dev") or not library):
                self.wrong.append(f"open {path} {mode} {flags}")

    @contextlib.contextmanager
    def watching(self, folder):
        """Inside, only files of `folder` are opened, in bounded memory and time."""
        self.folder, self.wrong = folder.resolve(), []
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + ALLOWED_BYTES
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        handlers = {n: signal.signal(n, _too_long) for n in (signal.SIGPROF, signal.SIGALRM)}
        signal.setitimer(signal.ITIMER_PROF, ALLOWED_S)  # of the processor: it may be shared
        signal.alarm(30 * ALLOWED_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            resource.setrlimit(resource.RLIMIT_AS, before)
            self.folder = None
        assert not self.wrong


class TooLong(BaseException):
    pass


def _too_long(*_):
    raise TooLong(f"more than {ALLOWED_S} s")


WATCH = Watch()

# ---- mutations


def mutate_bytes(draw, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(changed)))
        match draw(st.sampled_from(["set", "text", "cut", "repeat", "end"])):
            case "set":
                changed[start : start + 1] = bytes([draw(st.integers(0, 255))])
            case "text":
                changed[start : start + 1] = bytes([draw(st.sampled_from(b'0129-.eE[]{},:"\\ntf'))])
            case "cut":
                del changed[start : start + draw(st.integers(1, 30))]
            case "repeat":
                changed[start:start] = changed[start : start + draw(st.integers(1, 30))]
            case "end":
                del changed[start:]
    return bytes(changed)


def mutate_json(draw, value):
    """`value` with a few of its parts replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        place = value
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            match draw(st.sampled_from(["replace", "replace", "near", "remove", "rename"])):
                case "near" if type(place[key]) is int:
                    place[key] += draw(st.sampled_from([-1, 1, place[key], 7]))
                case "remove":
                    del place[key]
                case "rename" if isinstance(place, dict):
                    place[draw(st.text(max_size=9))] = place.pop(key)
                case _:
                    place[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            break
    return value


def dumped(value) -> bytes:
    return json.dumps(value).encode()


def mutate_json_file(draw, path: Path) -> None:
    if draw(st.integers(0, 3)) == 0:
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))
    else:
        path.write_bytes(dumped(mutate_json(draw, json.loads(path.read_bytes()))))


def mutate_safetensors(draw, path: Path) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end]
    if draw(st.booleans()):
        header = dumped(mutate_json(draw, json.loads(header)))
    elif draw(st.booleans()):
        header = mutate_bytes(draw, header)
    else:
        path.write_bytes(mutate_bytes(draw, content))
        return
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def mutate_gguf(draw, path: Path) -> None:
    """Its header: a number where one may be, or bytes; or an end too soon."""
    content = path.read_bytes()
    end = min(tensor.offset for tensor in read_header(path).tensors)
    place = draw(st.integers(0, end - 8))
    if draw(st.booleans()):
        kind = draw(st.sampled_from("BIQ"))
        number = draw(st.sampled_from([0, 1, 2, 8, 9, 14, 30, 31, 33, 255, 10**6, 2**31, 2**63]))
        stored = struct.pack(f"<{kind}", number % 256 ** struct.calcsize(f"<{kind}"))
        content = content[:place] + stored + content[place + len(stored) :]
    elif draw(st.integers(0, 4)):
        header = mutate_bytes(draw, content[:end])
        content = header[:end].ljust(end, b"\0") + content[end:]
    else:
        content = content[: draw(st.integers(0, len(content)))]
    path.write_bytes(content)


def mutate(draw, path: Path) -> None:
    if path.suffix == ".safetensors":
        mutate_safetensors(draw, path)
    elif path.suffix == ".gguf":
        mutate_gguf(draw, path)
    elif path.suffix == ".jsonl" and draw(st.booleans()):
        lines = path.read_bytes().splitlines()
        number = draw(st.integers(0, len(lines) - 1))
        lines[number] = dumped(mutate_json(draw, json.loads(lines[number])))
        path.write_bytes(b"\n".join(lines))
    elif path.suffix == ".jsonl":
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))
    else:
        mutate_json_file(draw, path)


# ---- what is attacked: a folder of good files, which of them are mutated, and what reads them


def base_dir(family, shard="5GB"):
    return toy_dir(family, shard=shard, n_layers=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    made = write_small(tmp_path_factory.mktemp("small"), n_layers=2)
    WATCH.bases = (str(made[0].resolve()),)  # of the run whose checkpoints are attacked
    return made


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    with_lora(in_memory(base_dir("llama")), rank_pattern={"q_proj": 2}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(small, folder, max_steps=2, checkpoint_every=1, keep_checkpoints=1).train()
    return folder


def index_and_headers(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    return [folder / INDEX_NAME, shard], lambda: read_all(folder)


def read_all(folder):
    model_folder = ModelFolder.open(folder)
    for name in model_folder.tensors:
        model_folder.read(name)


def configuration(folder):
    def load():  # with a budget all of the config is used, and the load takes four times as long
        budget = None if next(NUMBERS) % 8 else "1GB"
        model = onn_core.from_pretrained(
            folder, device="cpu", dtype="float32", memory_budget=budget
        )
        with torch.no_grad():
            model(**toy_batch(2, 6))
        model.close()

    return [folder / "config.json", folder / "generation_config.json"], load


def quantised_folder(folder):
    """The headers are what says how a matrix is decoded, so they are mutated twice as often."""
    paths, load = configuration(folder)
    return [paths[0], folder / "model.safetensors", folder / "model.safetensors"], load


def gguf_file(folder):
    _, load = configuration(folder)

    def read():
        # transformers is shown the header in a temporary file, which may be written there
        tempfile.tempdir = str(folder.parent)
        try:
            load()
            load_tokenizer(folder)("text")
        finally:
            tempfile.tempdir = None

    return list(folder.iterdir()), read


def adapter_folder(folder):
    return [
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
    ], lambda: load_adapter(streamed(base_dir("llama")), folder)(**toy_batch())


def training_checkpoint(made):
    def attack(folder):
        path = Checkpoints(folder, 1).paths()[-1]

        def resume():
            made.saver.checkpoints = Checkpoints(folder, 1)
            made.saver.output_dir = folder
            record = made.saver.begin(made.record, True)
            made._step(len(record.steps) + 1, next(made._batches(len(record.steps))))

        return [path / name for name in FILES], resume

    return attack


def text(tokenizer):
    def attack(folder):
        path = folder / "sums.jsonl"
        return [path], lambda: tokenize(load_rows(str(path)), tokenizer, 40)

    return attack


def assert_withstood(folder, attack, draw):
    """One mutated copy of `folder` is read, or refused in one clear sentence."""
    with tempfile.TemporaryDirectory() as scratch:
        paths, read = attack(Path(shutil.copytree(folder, Path(scratch) / "copy")))
        path = draw(st.sampled_from(paths))
        mutate(draw, path)
        if (path.parent / SUMS).is_file() and draw(st.integers(0, 4)):  # else the hash tells
            lines = [
                f"{hashlib.sha256((path.parent / n).read_bytes()).hexdigest()}  {n}" for n in FILES
            ]
            (path.parent / SUMS).write_text("\n".join(lines) + "\n")
        with (
            pytest.MonkeyPatch.context() as patch,
            WATCH.watching(Path(scratch)),
            warnings.catch_warnings(),
        ):
            patch.setenv("ONN_CACHE", f"{scratch}/cache")
            warnings.simplefilter("ignore")
            try:
                read()
            except OnnError as error:
                assert 10 < len(str(error)) < 6000


def fuzz(folder, attack, n_inputs):
    @settings(
        max_examples=n_inputs,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        assert_withstood(folder, attack, data.draw)

    with tempfile.TemporaryDirectory() as scratch:  # what is imported at first use, now
        attack(Path(shutil.copytree(folder, Path(scratch) / "copy")))[1]()
    run()


TARGETS = ("index", "llama", "gguf", "adapter", "checkpoint", "text", "tokens")
FAMILIES = ("phi3", "gemma2", "mixtral", "gpt2")
FORMATS = ("nf4-nested", "fp8-ragged", "ct-int4-order", "ct-nvfp4", "gptq4-order", "awq")
TIERS = [
    *((target, 40) for target in TARGETS),
    *((family, 15) for family in FAMILIES),
    *((kind, 30) for kind in FORMATS),
    *(pytest.param(target, 1800, marks=pytest.mark.faults) for target in TARGETS),
    *(pytest.param(family, 600, marks=pytest.mark.faults) for family in FAMILIES),
    *(pytest.param(kind, 600, marks=pytest.mark.faults) for kind in FORMATS),
]


@pytest.mark.parametrize(("target", "n_inputs"), TIERS)
def test_mutated_files_are_read_or_refused(
    target, n_inputs, request, monkeypatch, record_property, tmp_path_factory
):
    small = request.getfixturevalue("small")
    if target == "index":
        folder, attack = base_dir("llama", "20KB"), index_and_headers
    elif target in ("llama", *FAMILIES):
        folder, attack = base_dir(target), configuration
    elif target in FORMATS:
        folder = quantised(base_dir("llama"), target, tmp_path_factory.mktemp("quantised"))[0]
        attack = quantised_folder
    elif target == "gguf":
        folder, attack = tmp_path_factory.mktemp("gguf"), gguf_file
        sizes = {"hidden_size": 32, "intermediate_size": 64}
        write_gguf(folder / "toy.gguf", "llama", Type.Q5_0, toy_model("llama", **sizes))
    elif target == "adapter":
        folder, attack = request.getfixturevalue("adapter_dir"), adapter_folder
    elif target == "checkpoint":
        folder = request.getfixturevalue("run_dir")
        made = trainer(small, folder, max_steps=2, checkpoint_every=1, keep_checkpoints=1)
        made.setup()
        attack = training_checkpoint(made)
    else:
        tokenizer = transformers_tokenizer(small[0])
        folder, attack = small[1].parent, text(tokenizer)
        if target == "tokens":
            attack = cached_tokens(tokenizer, small, monkeypatch)
            folder = attack.folder
    fuzz(folder, attack, n_inputs)
    record_property(f"hostile inputs, {target}", n_inputs)


def transformers_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def cached_tokens(tokenizer, small, monkeypatch):
    model_dir, data = small
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setenv("ONN_CACHE", str(folder))
    paths = {"model_dir": str(model_dir), "data": str(data), "output_dir": str(folder)}
    corpus.tokenize_once(onn_core.TrainConfig(**paths, max_length=40), tokenizer)

    def attack(copy):
        path = next((copy / "tokens").glob("*.safetensors"))
        return [path], lambda: corpus.read_tokens(path)

    attack.folder = folder
    return attack


@torch.no_grad()
def test_the_watch_sees_what_is_forbidden(tmp_path):
    with pytest.raises(AssertionError), WATCH.watching(tmp_path):
        open("/etc/hostname").close()
    with pytest.raises(AssertionError), WATCH.watching(tmp_path):
        os.system("true")
    with pytest.raises(RuntimeError), WATCH.watching(tmp_path):
        torch.empty(2 * ALLOWED_BYTES, dtype=torch.uint8)
