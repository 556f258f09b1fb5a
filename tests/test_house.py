"""The house rules of the package: floors, size, imports, safe loading, no machine's own paths."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package, or a module at the top, imports only from the rows below its own.
FLOORS = (
    ("many",),
    ("trainer",),
    ("run",),
    ("evaluate",),
    ("adapters",),
    ("streaming",),
    ("data", "memory"),
    ("weights",),
    ("ops",),
    ("config", "record", "processes"),
    ("errors",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(reversed(FLOORS)) for name in names}
CORE = sorted((ROOT / "onn_core").rglob("*.py"))
WORKBENCH = sorted((ROOT / "notebooks/onn_workbench").rglob("*.py"))
MACHINE_PATH = re.compile(r"(?:file://|(?<![\w+/.~-]))/(?:root|home|work|tmp|opt|Users)/\w+")


def name_of(path):
    """ "onn_core.weights.stream" of its path."""
    parts = path.with_suffix("").relative_to(path.parents[len(path.parts) - 2]).parts
    start = max(i for i, part in enumerate(parts) if part in ("onn_core", "onn_workbench"))
    return ".".join(part for part in parts[start:] if part != "__init__")


def imported(tree):
    """Dotted names that a syntax tree imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the floor"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(name):
    """The package or the top module of onn_core that a dotted name lies in, or None."""
    parts = name.split(".")
    return parts[1] if parts[0] == "onn_core" and parts[1:] and parts[1] in FLOOR_OF else None


every_core_module = pytest.mark.parametrize("path", CORE, ids=name_of)
every_module = pytest.mark.parametrize("path", CORE + WORKBENCH, ids=name_of)


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


@every_core_module
def test_module_imports_only_from_lower_floors(path):
    names = imported(ast.parse(path.read_text()))
    assert not any(name.startswith("onn_workbench") for name in names)
    if path.stem == "__main__" or name_of(path) == "onn_core":
        return
    own = room_of(name_of(path))
    assert own, "give the new package a row in FLOORS"
    rooms = {room_of(name) for name in names} - {None, own}
    upward = {room for room in rooms if FLOOR_OF[room] >= FLOOR_OF[own]}
    assert not upward, f"{name_of(path)} imports {upward} from its own floor or above"


@pytest.mark.parametrize("paths", [CORE, WORKBENCH], ids=["onn_core", "onn_workbench"])
def test_no_module_imports_itself_through_others(paths):
    modules = {name_of(path): imported(ast.parse(path.read_text())) for path in paths}
    graph = {name: names & modules.keys() - {name} for name, names in modules.items()}
    packages = {path.parent for path in paths}
    for package in (name_of(folder / "__init__.py") for folder in packages):
        graph.pop(package, None)  # it only gathers the names of its modules
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_imports_are_found_in_every_form():
    text = "import onn_core.data\nfrom onn_core.ops import norm\n"
    text += "def f():\n    from onn_core.trainer import y\n    import onn_core\n"
    assert {room_of(name) for name in imported(ast.parse(text))} == {"data", "ops", "trainer", None}


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
    names = [name_of(path) for path in CORE if path.stem != "__main__"]
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert set(names) <= set(imported)
    heavy = {"pandas", "plotly", "matplotlib", "IPython", "ipywidgets", "gguf"}
    heavy |= {"datasets", "pyarrow"}
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
