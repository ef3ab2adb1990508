"""Importing devec is cheap, its packages, files and functions are small, its public names exist.

The contracts of import-linter (``.importlinter``) say which package may import which.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import devec
from support import paths
from support.patience import patience

ROOT = Path(devec.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
LINES, BODY = 400, 40  # of a file and of a function's body, at most
HEAVY = {"peft", "transformers", "diffusers", "accelerate", "matplotlib", "scipy", "numpy"}


def imported_at_the_top(path):
    """The packages that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_optional_packages_are_imported_where_used():
    heavy = {
        str(path.relative_to(ROOT)): names
        for path in SOURCES
        if (names := HEAVY & set(imported_at_the_top(path))) and "demo" not in path.parts
    }
    assert not heavy


def test_packages_are_small():
    packages = [path.parent for path in SOURCES if path.name == "__init__.py"]
    siblings = {
        package: len([*package.glob("*.py"), *package.glob("*/__init__.py")])
        for package in packages
        if package != ROOT
    }
    assert max(siblings.values()) <= 13, siblings
    assert len([*ROOT.glob("*.py")]) <= 8
    assert len([*ROOT.glob("*/__init__.py")]) <= 13


def test_files_are_short():
    folders = ("src", "tests", "benchmarks", "examples", "experiments", "notebooks", "docs")
    files = [path for folder in folders for path in (paths.ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {str(path): lines for path, lines in lengths.items() if lines > LINES}


def body_lines(function):
    """The number of lines of a function below its docstring."""
    first, *rest = function.body
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    body = rest if documented and rest else function.body
    return body[-1].end_lineno - body[0].lineno + 1


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and body_lines(node) > BODY
    ]
    assert not long


ENTERED = """
import os, sys, threading
import devec
root, packages = os.path.dirname(devec.__file__) + os.sep, {}

def enter(frame, event, _):
    file = frame.f_code.co_filename
    if event == "call" and file.startswith(root) and frame.f_code.co_name != "<module>":
        packages[file.removeprefix(root).split(os.sep)[0]] = None

threading.setprofile(enter)
sys.setprofile(enter)
from devec import cli
cli.main()
sys.setprofile(None)
print(*packages)
"""


@pytest.mark.slow
def test_a_decomposition_enters_few_packages(tmp_path):
    pool = ROOT / "demo" / "pool"
    arguments = ["decompose", pool / "ink", pool / "chalk", "--out", tmp_path / "out"]
    code = f"import sys; sys.argv = {['devec', *map(str, arguments)]}\n" + ENTERED.replace(
        "cli.main()", "try:\n    cli.main()\nexcept SystemExit:\n    pass"
    )
    packages = run(code).splitlines()[-1].split()
    assert "decomposition" in packages
    assert len(packages) <= 16, packages


def run(code):
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=patience()
    )
    return result.stdout.strip()


@pytest.mark.slow
def test_importing_devec_loads_neither_peft_nor_transformers():
    code = (
        "import sys, devec; devec.decompose, devec.Adapter; "
        f"print(sorted({HEAVY - {'numpy'}} & set(sys.modules)))"
    )
    assert run(code) == "[]"


@pytest.mark.slow
def test_the_command_line_answers_without_torch():
    code = (
        "import sys\nfrom devec.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    assert run(code).splitlines()[-1] == "False"


@pytest.mark.slow
def test_adapters_are_read_whatever_else_was_imported():
    pool = ROOT / "demo" / "pool"
    code = (
        "from devec.adapters.adapter import Adapter\n"
        f"print(Adapter.from_pretrained({str(pool / 'ink')!r}).name)"
    )
    assert run(code) == "ink"


@pytest.mark.parametrize("name", devec.__all__)
def test_public_names_are_there_and_documented(name):
    value = getattr(devec, name)
    assert value is not None
    assert name == "__version__" or value.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        _ = devec.merge
