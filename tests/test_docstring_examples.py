"""The examples in docstrings run and print what they show, and every public callable has one."""

import ast
import doctest
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

import devec

ROOT = Path(devec.__file__).parent
WITH_EXAMPLES = [
    ".".join(("devec", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
PUBLIC = {name: getattr(devec, name) for name in devec.__all__ if name != "__version__"}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if name not in CLASSES}

WITHOUT_EXAMPLE = {
    # It needs the Hub, where no example can write.
    "Adapter.push_to_hub",
    # Properties that give a field, a shape or the largest of some numbers.
    "Adapter.label",
    "Decomposition.nothing_shared",
    "Decomposition.spectrum",
    "Delta.dtype",
    "Delta.low_rank",
    "Delta.outline",
    "Delta.rank",
    "Delta.shape",
    "ModuleOverlap.largest",
    "ModuleSplit.largest",
    "ModuleSplit.shared_rank",
}


def methods_of(cls):
    """Name → function of the public methods and properties that devec defines, inherited, too."""
    found = {}
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        public = not name.startswith("_") and inspect.isfunction(function)
        if public and function.__module__.partition(".")[0] == "devec":
            found[name] = function
    return found


METHODS = {f"{n}.{m}": f for n, cls in CLASSES.items() for m, f in methods_of(cls).items()}


def example(documented):
    """The lines of code of the examples of a docstring."""
    found = doctest.DocTestParser().get_examples(inspect.getdoc(documented) or "")
    return "".join(one.source for one in found)


def shown_in(cls):
    """The code of all examples of a class and of its methods."""
    return "".join(map(example, (cls, *methods_of(cls).values())))


def statements(function):
    """What a function does itself, without the functions that it defines."""
    pending = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0].body
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of_docstrings_run(module):
    result = doctest.testmod(import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - WITHOUT_EXAMPLE))
def test_public_classes_have_an_example(name):
    assert example(CLASSES[name])


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - WITHOUT_EXAMPLE))
def test_public_functions_are_called_in_their_example(name):
    assert re.search(rf"\b{name}\(", example(FUNCTIONS[name]))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - WITHOUT_EXAMPLE))
def test_public_methods_are_called_in_an_example_of_their_class(name):
    owner, _, method = name.partition(".")
    assert re.search(rf"\.{method}\(", shown_in(CLASSES[owner]))


def test_exceptions_are_public_names():
    assert WITHOUT_EXAMPLE <= PUBLIC.keys() | METHODS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_return_and_raise(name):
    function = FUNCTIONS[name]
    sections = re.findall(r"^(\w+):$", inspect.getdoc(function), flags=re.MULTILINE)
    returns = inspect.signature(function).return_annotation not in (None, "None")
    assert ("Returns" in sections) == returns
    if any(isinstance(node, ast.Raise) for node in statements(function)):
        assert "Raises" in sections


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_what_they_raise(name):
    if any(isinstance(node, ast.Raise) for node in statements(METHODS[name])):
        assert "Raises:" in METHODS[name].__doc__
