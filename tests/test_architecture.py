"""The house: imports point downwards, the package imports light, the public names are there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import devec

ROOT = Path(devec.__file__).parent

# From the ground up; a module may import what stands on a lower line, or beside it in its folder.
LAYERS = [
    {"digest", "errors", "lazy", "positions", "precision", "random_subspaces", "threads"},
    {"arguments", "_version"},
    {"reuse"},
    {"linalg", "open_file", "output", "sources"},
    {"bases", "change", "device", "subspace", "weights", "layout", "products"},
    {"exponents", "gain"},
    {"delta"},
    {"dora", "joint", "spool"},
    {"algebra", "stack"},
    {"findings", "parallel", "weighted_mean"},
    {"split"},
    {"adapter"},
    {"pool", "processes"},
    {"combine", "compress", "overlap", "formats"},
    {"as_lora", "decompose", "plots", "report"},
    {"form", "taking"},
    {"job"},
    {"stream"},
    {"hosts"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"peft", "transformers", "diffusers", "accelerate", "matplotlib", "scipy", "numpy"}


def source_files():
    return sorted(ROOT.rglob("*.py"))


def room(path):
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Full names of all that a file imports, wherever in the file, and whether for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in for_types
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((f"{node.module}.{a.name}", id(node) in for_types) for a in node.names)


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = room(path)
    assert own in LEVEL, f"{own} has no layer"
    for name, for_types in imports(path):
        if not name.startswith("devec.") or for_types:
            continue
        other = name.split(".")[1]
        if other not in LEVEL:
            # a public name of the package: the command line and the demo use it as users do
            assert own in ("cli", "demo"), name
            assert other in devec.__all__, name
        elif other != own:
            assert LEVEL[other] < LEVEL[own], f"{path} imports {name}, which stands above it"


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_formats_and_operations_do_not_know_each_other(path):
    operations = {"combine", "compress", "decompose", "overlap", "split", "subspace"}
    named = {name.split(".")[1] for name, _ in imports(path) if name.startswith("devec.")}
    if room(path) == "formats":
        assert not named & operations
    if room(path) in operations:
        assert "formats" not in named


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_used(path):
    at_the_top = ast.parse(path.read_text(encoding="utf-8")).body
    named = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in at_the_top
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    if room(path) != "demo":
        assert not {name.split(".")[0] for name in named} & HEAVY


def run(code):
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.strip()


def test_importing_devec_loads_neither_peft_nor_transformers():
    code = (
        "import sys, devec; devec.decompose, devec.Adapter; "
        f"print(sorted({HEAVY - {'numpy'}} & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_the_command_line_answers_without_torch():
    code = (
        "import sys\nfrom devec.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    assert run(code).splitlines()[-1] == "False"


@pytest.mark.parametrize("name", devec.__all__)
def test_public_names_are_there_and_documented(name):
    value = getattr(devec, name)
    assert value is not None
    assert name == "__version__" or value.__doc__


def test_functions_are_not_shadowed_by_modules_of_their_name():
    code = (
        "import devec.decompose, devec.compress, devec\n"
        "from devec.overlap import Overlap\n"
        "print(callable(devec.decompose), callable(devec.compress), callable(devec.overlap))"
    )
    assert run(code) == "True True True"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        _ = devec.merge
