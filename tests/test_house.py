"""The house rules of the package: floors, size, imports, safe loading, no machine's own paths."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports only from the rows above its own.
FLOORS = (
    ("errors",),
    ("rows", "figure"),
    ("config", "record", "reader", "product", "lazy", "batching", "norm"),
    ("meter", "checkpoint", "data", "loss", "saved", "stopping", "boundaries"),
    ("sources", "models"),
    ("items", "corpus"),
    ("footprint",),
    ("plan",),
    ("stream",),
    ("session",),
    ("visit",),
    ("layer",),
    ("head", "embedding"),
    ("streamed",),
    ("model",),
    ("adapter",),
    ("lora", "merging", "evaluate", "progress", "nonfinite"),
    ("resume",),
    ("trainer", "merge"),
    ("background", "report", "tracking", "peers", "stability", "study", "pages", "sizing"),
    ("speed", "stability_report", "curves", "live", "outline"),
    ("bench", "summary", "explore"),
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = sorted((ROOT / "onn_core").rglob("*.py"))
MACHINE_PATH = re.compile(r"(?:file://|(?<![\w+/.~-]))/(?:root|home|work|tmp|opt|Users)/\w+")

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def imported_siblings(tree):
    """Modules of onn_core that a syntax tree imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["onn_core" if node.level else "", node.module]))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    siblings = {name.split(".")[1] for name in names if name.startswith("onn_core.")}
    return siblings & FLOOR_OF.keys()


def unsafe_loads(tree):
    """Lines of a syntax tree that could run code from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            unsafe = {alias.name for alias in node.names} & {"pickle", "dill", "joblib"}
        elif isinstance(node, ast.ImportFrom):
            unsafe = node.module in ("pickle", "dill", "joblib")
        elif isinstance(node, ast.keyword):
            allowed = isinstance(node.value, ast.Constant) and node.value.value is False
            unsafe = node.arg == "trust_remote_code" and not allowed
        elif isinstance(node, ast.Attribute):
            unsafe = ast.unparse(node) in ("torch.load", "torch.save")
        else:
            unsafe = False
        if unsafe:
            yield node.lineno


@every_module
def test_module_imports_only_from_lower_floors(path):
    siblings = imported_siblings(ast.parse(path.read_text()))
    if path.stem.startswith("__"):
        return
    assert path.stem in FLOOR_OF, "give the new module a row in FLOORS"
    upward = {name for name in siblings if FLOOR_OF[name] >= FLOOR_OF[path.stem]}
    assert not upward, f"{path.stem} imports {upward} from its own floor or above"


def test_imports_are_found_in_every_form():
    text = "import onn_core.data\nfrom onn_core import loss\nfrom .model import x\n"
    text += "from . import lora\ndef f():\n    from onn_core.trainer import y\n"
    assert imported_siblings(ast.parse(text)) == {"data", "loss", "model", "lora", "trainer"}


@every_module
def test_module_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 320


@every_module
def test_module_loads_nothing_that_runs_code(path):
    assert not list(unsafe_loads(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from dill import load", "torch.load(x)", "f(trust_remote_code=True)"],
)
def test_unsafe_load_is_found(line):
    assert list(unsafe_loads(ast.parse(line))) == [1]


def test_import_brings_no_heavy_package():
    """In a fresh interpreter, so that nothing that this session imported counts."""
    names = ["onn_core", *(f"onn_core.{path.stem}" for path in MODULES if path.stem[0] != "_")]
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert set(names) <= set(imported)
    heavy = {"pandas", "plotly", "matplotlib", "IPython", "ipywidgets", "gguf", "datasets"}
    assert not heavy & set(imported)


def test_tracked_files_hold_no_machine_path():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if not listing.stdout:
        pytest.skip("not a git checkout")
    found = {}
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and (matches := MACHINE_PATH.findall(path.read_text(errors="ignore"))):
            found[name] = matches
    assert not found


@pytest.mark.parametrize("folder", ["root", "home", "work", "tmp", "opt", "Users"])
@pytest.mark.parametrize("before", ['"', "'", " ", "=", "file://", ""])
def test_machine_path_is_found(folder, before):
    assert MACHINE_PATH.search(f"{before}/{folder}/someone/model")


@pytest.mark.parametrize(
    "text", ["notebooks/work/x", "iVBORw0KGgo/tmp/AAAA", "a //work", "./home/x"]
)
def test_relative_path_is_no_machine_path(text):
    assert not MACHINE_PATH.search(text)
