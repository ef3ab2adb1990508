"""Warnings name the user's line, whichever part of devec raises them."""

import json
import subprocess
import sys

import pytest

# In a process of its own: the checks of shapes put frames between the user's and devec's.
SCRIPT = """
import json, sys, warnings
import torch
from safetensors.torch import save_file
import devec
from devec.linalg.precision import full_precision

def factors():
    return {"A": torch.eye(2, 3), "B": torch.eye(4, 2)}

def adapter(name, module):
    return devec.Adapter(name=name, modules={module: devec.Delta(**factors())})

unrelated = [adapter("a", "q"), adapter("b", "k")]
path = "unknown.safetensors"  # with a key of no known kind
tensors = {f"unet.conv_in.lora_{side}.weight": factor for side, factor in factors().items()}
save_file({**tensors, "unknown": torch.ones(1)}, path)
combine = full_precision(devec.combine)

warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    devec.decompose(unrelated)  # CALL decompose
    devec.Adapter.from_pretrained(path)  # CALL from_pretrained
    combine(unrelated, [1.0, 1.0])  # CALL combine
print(json.dumps([(w.category.__name__, w.filename, w.lineno) for w in caught]))
"""
CALLS = {
    line.split("# CALL ")[1]: number
    for number, line in enumerate(SCRIPT.splitlines(), start=1)
    if "# CALL " in line
}


@pytest.fixture(scope="module")
def caught(tmp_path_factory):
    """The script and the warnings of each of its lines."""
    path = tmp_path_factory.mktemp("warnings") / "script.py"
    path.write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, path], cwd=path.parent, capture_output=True, text=True, check=True
    )
    return str(path), json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_warning_names_the_line_that_called_devec(call, caught):
    path, warnings = caught
    assert ["DevecWarning", path, CALLS[call]] in warnings


@pytest.mark.slow
def test_no_warning_names_another_line(caught):
    path, warnings = caught
    assert {(file, line) for _, file, line in warnings} == {(path, n) for n in CALLS.values()}
