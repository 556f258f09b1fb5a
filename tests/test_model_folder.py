import json
import os
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from onn_core.errors import ModelFolderError, OnnError
from onn_core.weights.folder import ModelFolder

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(scope="module")
def llama_dirs(tmp_path_factory):
    """The same small bf16 Llama, saved as one file and as several shards."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    single, sharded = tmp_path_factory.mktemp("single"), tmp_path_factory.mktemp("sharded")
    model.save_pretrained(single)
    model.save_pretrained(sharded, max_shard_size="4KB")
    return {"single": single, "sharded": sharded}


@pytest.fixture(params=["single", "sharded"])
def llama_dir(llama_dirs, request):
    return llama_dirs[request.param]


def reference(model_dir):
    """Tensor name -> (file name, tensor), as the safetensors library reads the folder."""
    tensors = {}
    for path in model_dir.glob("*.safetensors"):
        tensors |= {name: (path.name, tensor) for name, tensor in load_file(path).items()}
    return tensors


def same_bytes(a, b):
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and a.contiguous().view(-1).view(torch.uint8).equal(
        b.contiguous().view(-1).view(torch.uint8)
    )


def write_raw(path, header, data=b"\0" * 8, header_bytes=None):
    """A safetensors file with this header, right or wrong."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(header) if header_bytes is None else header_bytes)
    path.write_bytes(length + header + data)


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


# ---- what is read equals what the safetensors library reads


def test_tensors_equal_safetensors(llama_dir):
    expected = reference(llama_dir)
    model_folder = ModelFolder.open(llama_dir)
    assert model_folder.config.model_type == "llama"
    assert model_folder.tensors.keys() == expected.keys()
    for name, (file_name, tensor) in expected.items():
        entry = model_folder.tensors[name]
        assert (entry.name, entry.path) == (name, llama_dir / file_name)
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        content = entry.path.read_bytes()[entry.offset :][: entry.n_bytes]
        assert content == tensor.view(torch.uint8).numpy().tobytes()
        assert same_bytes(model_folder.read(name), tensor)


def test_sharded_folder_has_several_files(llama_dirs):
    assert len(list(llama_dirs["sharded"].glob("*.safetensors"))) > 2


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    ],
)
def test_dtypes_and_odd_shapes_equal_safetensors(tmp_path, dtype):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    values = torch.arange(6) % 2
    tensors = {
        "matrix": values.to(dtype).reshape(2, 3),
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.empty(0, 5, dtype=dtype),
        "flat": values.to(dtype),
        "cube": values.to(dtype).reshape(3, 2, 1),
    }
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / SINGLE)
    model_folder = ModelFolder.open(tmp_path)
    for name, tensor in tensors.items():
        assert same_bytes(model_folder.read(name), tensor)
    rows = torch.tensor([2, 0])
    assert same_bytes(
        model_folder.read_rows("flat", rows), torch.stack([values[2], values[0]]).to(dtype)
    )
    assert model_folder.read_rows("cube", rows).shape == (2, 2, 1)


def test_read_is_fresh_memory(llama_dir):
    model_folder = ModelFolder.open(llama_dir)
    model_folder.read("model.norm.weight").zero_()
    assert model_folder.read("model.norm.weight").count_nonzero() == 16


@pytest.mark.parametrize("rows", [[], [0], [39], [3, 4, 5], [7, 0, 39, 7, 2], list(range(40))])
def test_read_rows_equals_indexing(llama_dir, rows):
    name = "model.embed_tokens.weight"
    rows = torch.tensor(rows, dtype=torch.int64)
    model_folder = ModelFolder.open(llama_dir)
    assert same_bytes(model_folder.read_rows(name, rows), reference(llama_dir)[name][1][rows])


@pytest.mark.parametrize("rows", [[40], [0, -1], [5, 2**62]])
def test_read_rows_refuses_rows_out_of_range(llama_dir, rows):
    model_folder = ModelFolder.open(llama_dir)
    with pytest.raises(IndexError, match="of 40 in model.embed"):
        model_folder.read_rows("model.embed_tokens.weight", torch.tensor(rows))


# ---- files: descriptors, links, changes


def test_no_shard_stays_open(llama_dirs, tmp_path, monkeypatch):
    """So any number of shards can be used, and what is read is never of a replaced file."""
    before = open_descriptors()
    model_folder = ModelFolder.open(llama_dirs["sharded"])
    model_folder.read("model.norm.weight")
    monkeypatch.setattr("onn_core.weights.folder.BLOCK_BYTES", 1000)
    blocks = list(model_folder.read_blocks("model.embed_tokens.weight"))
    assert [len(block) for block in blocks] == [1000, 280]
    folder = shutil.copytree(llama_dirs["sharded"], tmp_path / "model")
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(ModelFolderError, match=last.name) as caught:
        ModelFolder.open(folder)
    assert caught.value and open_descriptors() == before  # with the frames of the error alive


def test_links_of_the_hugging_face_cache_work(llama_dir, tmp_path):
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(llama_dir.iterdir())):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    model_folder = ModelFolder.open(snapshot)
    for name, (_, tensor) in reference(llama_dir).items():
        assert same_bytes(model_folder.read(name), tensor)


@pytest.mark.parametrize("change", ["touch", "grow", "replace", "remove"])
def test_check_unchanged_names_the_file(llama_dirs, tmp_path, change):
    folder = shutil.copytree(llama_dirs["sharded"], tmp_path / "model")
    model_folder = ModelFolder.open(folder)
    model_folder.check_unchanged()
    path = model_folder.tensors["model.norm.weight"].path
    stamp = path.stat()
    if change == "touch":
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1000))
    elif change == "grow":
        os.truncate(path, stamp.st_size + 1)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif change == "replace":
        other = shutil.copyfile(path, folder / "other")
        os.utime(other, ns=(0, 0))
        os.replace(other, path)
    else:
        path.unlink()
    with pytest.raises(ModelFolderError, match=path.name):
        model_folder.check_unchanged()


def test_file_cut_after_open_is_refused_on_read(llama_dirs, tmp_path):
    folder = shutil.copytree(llama_dirs["single"], tmp_path / "model")
    model_folder = ModelFolder.open(folder)
    entry = model_folder.tensors["model.embed_tokens.weight"]
    os.truncate(entry.path, entry.offset + 3)
    with pytest.raises(ModelFolderError, match="was changed while it was in use"):
        model_folder.read(entry.name)


# ---- bad folders


def one_file(header, **raw):
    return lambda folder: write_raw(folder / SINGLE, header, **raw)


def one_tensor(**info):
    return one_file({"a": TWO | info})


def index(content):
    """A folder of the shards one (tensor "a") and two (tensor "b") with this index."""

    def build(folder):
        write_raw(folder / "one.safetensors", {"a": TWO})
        write_raw(folder / "two.safetensors", {"b": TWO})
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / INDEX).write_bytes(text)

    return build


def weight_map(**names):
    return index({"weight_map": names})


def config(content):
    def build(folder):
        write_raw(folder / SINGLE, {"a": TWO})
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "config.json").write_bytes(text)

    return build


def remote_code(folder):
    config({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})(folder)
    (folder / "mine.py").write_text("raise SystemExit('the code of the folder was run')\n")


def duplicate_shard(folder):
    weight_map(a="one.safetensors", b="two.safetensors")(folder)
    write_raw(
        folder / "two.safetensors", {"b": TWO, "a": TWO | {"data_offsets": [8, 16]}}, b"\0" * 16
    )


def dangling_link(folder):
    weight_map(a="one.safetensors")(folder)
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to("../blobs/gone")


def large_header(folder):
    one_file({"a": TWO}, header_bytes=100_000_001)(folder)
    os.truncate(folder / SINGLE, 100_000_100)  # a hole: takes no disk


def second(**info):
    """Eight bytes for "a", eight more, and a second tensor "b" that should take those."""
    return one_file({"a": TWO, "b": TWO | {"data_offsets": [8, 16]} | info}, data=b"\0" * 16)


BAD = {
    # what is in the folder
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "has no config.json",
    ),
    "no weights": (lambda folder: None, "has neither model.safetensors nor"),
    "pickle": (lambda folder: (folder / "pytorch_model.bin").touch(), "safe_serialization"),
    "pt": (lambda folder: (folder / "model.pt").touch(), "safe_serialization"),
    "weights are a fifo": (lambda folder: os.mkfifo(folder / SINGLE), "has neither"),
    # configuration
    "config not JSON": (config(b"{"), "not a configuration that transformers"),
    "config not UTF-8": (config(b"\xff\xfe"), "not a configuration that transformers"),
    "config is a list": (config([]), "not a configuration that transformers"),
    "config too deep": (config(b"[" * 200_000), "not a configuration that transformers"),
    "config empty": (config({}), "not a configuration that transformers"),
    "unknown model": (config({"model_type": "nope"}), "model type `nope`"),
    "model type a list": (config({"model_type": []}), "not a configuration that transformers"),
    "wrong type": (config(CONFIG | {"hidden_size": "x"}), "hidden_size"),
    "wrong size": (config(CONFIG | {"hidden_size": 9}), "not a multiple"),
    "remote code": (remote_code, "which is never done"),
    # index
    "index not JSON": (index(b"{"), "JSON is invalid"),
    "index not UTF-8": (index(b"\xff"), "JSON is invalid"),
    "index is a list": (index([]), "not an object"),
    "index too deep": (index(b'{"weight_map":' + b"[" * 200_000), "JSON is invalid"),
    "index twice": (index(b'{"weight_map":{"a":"one.safetensors","a":"x"}}'), "there twice"),
    "no weight_map": (index({}), "weight_map does not map"),
    "weight_map a list": (index({"weight_map": ["one.safetensors"]}), "weight_map does not map"),
    "weight_map empty": (weight_map(), "weight_map does not map"),
    "shard a number": (weight_map(a=1), "not the name of"),
    "shard a list": (weight_map(a=["one.safetensors"]), "not the name of"),
    "shard missing": (weight_map(a="one.safetensors", b="gone.safetensors"), "finish the download"),
    "shard a dangling link": (dangling_link, "finish the download"),
    "shard name empty": (weight_map(a=""), "not the name of"),
    "shard name long": (weight_map(a="x" * 5000 + ".safetensors"), "finish the download"),
    "shard name NUL": (weight_map(a="one\0.safetensors"), "finish the download"),
    "shard absolute": (weight_map(a="/one.safetensors"), "not the name of"),
    "shard above": (weight_map(a="../one.safetensors"), "not the name of"),
    "shard below": (weight_map(a="x/../one.safetensors"), "not the name of"),
    "shard backslash": (weight_map(a="..\\one.safetensors"), "not the name of"),
    "shard dots": (weight_map(a=".."), "not the name of"),
    "shard a pickle": (weight_map(a="pytorch_model.bin"), "not the name of"),
    "not in shard": (weight_map(a="one.safetensors", z="one.safetensors"), "has no tensor 'z'"),
    "in another": (weight_map(a="two.safetensors", b="one.safetensors"), "has no tensor 'a'"),
    "in two shards": (duplicate_shard, "as well"),
    # header as a whole
    "file empty": (lambda folder: (folder / SINGLE).touch(), "header too small"),
    "7 bytes": (lambda folder: (folder / SINGLE).write_bytes(b"\0" * 7), "header too small"),
    "header too long": (one_file({"a": TWO}, header_bytes=2**60), "header too large"),
    "header 2^64": (one_file({"a": TWO}, header_bytes=2**64 - 1), "header too large"),
    "header over the limit": (large_header, "header too large"),
    "header past the end": (one_file({"a": TWO}, header_bytes=1000), "invalid header length"),
    "header too short": (one_file({"a": TWO}, header_bytes=10), "invalid JSON"),
    "header of no bytes": (one_file({"a": TWO}, header_bytes=0), "invalid JSON"),
    "header not JSON": (one_file(b"{'a'}"), "invalid JSON"),
    "header not UTF-8": (one_file(b'{"\xff": 1}'), "invalid UTF-8"),
    "header too deep": (one_file(b"[" * 200_000), "invalid JSON"),
    "header a list": (one_file([TWO]), "invalid JSON"),
    "header a number of many digits": (one_file(b'{"a":' + b"9" * 9999 + b"}"), "invalid JSON"),
    "tensor twice": (
        one_file(b'{"a":%s,"a":%s}' % ((json.dumps(TWO).encode(),) * 2)),
        "there twice",
    ),
    "metadata a list": (one_file({"__metadata__": [], "a": TWO}), "expected a map"),
    "metadata a number": (one_file({"__metadata__": {"format": 1}, "a": TWO}), "expected a string"),
    # one tensor
    "tensor null": (one_file({"a": None}), "expected struct TensorInfo"),
    "tensor a list": (one_file({"a": []}), "expected struct TensorInfo"),
    "dtype unknown": (one_tensor(dtype="F4", shape=[16]), "of dtype F4, which cannot be read: use"),
    "dtype a list": (one_tensor(dtype=["F32"]), "invalid JSON"),
    "dtype too wide": (one_tensor(dtype="F64"), "invalid shape"),
    "shape missing": (one_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "invalid JSON"),
    "shape negative": (one_tensor(shape=[-2]), "invalid JSON"),
    "shape two negatives": (one_tensor(shape=[-2, -1]), "invalid JSON"),
    "shape float": (one_tensor(shape=[2.0]), "invalid JSON"),
    "shape bool": (one_tensor(shape=[True, 2]), "invalid JSON"),
    "shape text": (one_tensor(shape="2"), "invalid JSON"),
    "shape huge": (one_tensor(shape=[2**64]), "invalid JSON"),
    "shape wraps": (one_tensor(shape=[2**62, 2, 2]), "overflow"),
    "shape wraps, empty": (
        one_file({"a": TWO | {"shape": [0, 2**62, 2], "data_offsets": [0, 0]}, "b": TWO}),
        "torch cannot have",
    ),
    "shape of many": (one_tensor(shape=[1] * 100 + [2]), "torch cannot have"),
    "shape too large": (one_tensor(shape=[3]), "invalid shape"),
    "shape too small": (one_tensor(shape=[1]), "invalid shape"),
    "offsets missing": (one_file({"a": {"dtype": "F32", "shape": [2]}}), "invalid JSON"),
    "offsets one": (one_tensor(data_offsets=[8]), "invalid JSON"),
    "offsets three": (one_tensor(data_offsets=[0, 8, 8]), "invalid JSON"),
    "offsets negative": (one_tensor(data_offsets=[-8, 0]), "invalid JSON"),
    "offsets float": (one_tensor(data_offsets=[0.0, 8.0]), "invalid JSON"),
    "offsets bool": (
        one_tensor(dtype="U8", shape=[1], data_offsets=[False, True]),
        "invalid JSON",
    ),
    "offsets huge": (one_tensor(data_offsets=[2**70, 2**70 + 8]), "invalid JSON"),
    "offsets backwards": (one_tensor(data_offsets=[8, 0]), "invalid offset"),
    # tensors together
    "past the end": (one_tensor(shape=[4], data_offsets=[0, 16]), "not fully covered"),
    "bytes left over": (one_tensor(shape=[1], data_offsets=[0, 4]), "not fully covered"),
    "gap at the start": (one_tensor(shape=[1], data_offsets=[4, 8]), "invalid offset"),
    "gap": (second(shape=[1], data_offsets=[12, 16]), "invalid offset"),
    "overlap": (second(shape=[3], data_offsets=[4, 16]), "invalid offset"),
    "same place": (second(data_offsets=[0, 8]), "invalid offset"),
    "far away": (second(data_offsets=[2**62, 2**62 + 8]), "invalid offset"),
}


@pytest.mark.parametrize("build, message", BAD.values(), ids=BAD)
def test_bad_folder_is_refused(tmp_path, build, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    build(tmp_path)
    with pytest.raises(ModelFolderError, match=message) as caught:
        ModelFolder.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("build", [one_tensor(), second(), weight_map(a="one.safetensors")])
def test_the_same_folder_without_the_fault_is_read(tmp_path, build):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    build(tmp_path)
    model_folder = ModelFolder.open(tmp_path)
    assert model_folder.read("a").tolist() == [0, 0]


@pytest.mark.parametrize("model_dir", ["gone", "microsoft/phi-4", "x" * 5000, __file__])
def test_missing_folder_is_refused(model_dir):
    with pytest.raises(ModelFolderError, match="is not a folder"):
        ModelFolder.open(model_dir)


def test_a_path_that_no_system_takes_is_refused():
    with pytest.raises(OnnError, match="is no path"):
        ModelFolder.open("a\0b")


def test_random_headers_are_refused_or_read_as_safetensors_reads_them(tmp_path):
    rng = random.Random(0)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / SINGLE
    save_file(
        {"a": torch.rand(2, 3), "b": torch.rand(4).half(), "c": torch.empty(0, 2)},
        path,
        metadata={"format": "pt"},
    )
    original = path.read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    accepted = 0
    for _ in range(600):
        content = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(header_end)
            kind = rng.randrange(4)
            if kind == 0:
                content[start] = rng.randrange(256)
            elif kind == 1:
                content[start] = rng.choice(b'0123456789-.eE[]{},:"\\ntf')
            elif kind == 2:
                del content[start : start + rng.randint(1, 20)]
            else:
                content[start:start] = content[start : start + rng.randint(1, 20)]
        if rng.random() < 0.5:  # otherwise most changes of length die at the first check
            length = len(content) - (len(original) - header_end) - 8
            content[:8] = struct.pack("<Q", max(length, 0))
        path.write_bytes(content)
        try:
            model_folder = ModelFolder.open(tmp_path)
        except ModelFolderError:
            continue
        accepted += 1
        expected = reference(tmp_path)
        assert model_folder.tensors.keys() == expected.keys()
        for name, (_, tensor) in expected.items():
            assert same_bytes(model_folder.read(name), tensor)
    assert 0 < accepted < 600
