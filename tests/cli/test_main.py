"""Help, version, usage, and the command line in a process of its own."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import devec
from devec.cli import app
from devec.cli.shared.tables import module_type
from support.checks.command_line import (
    COMBINE,
    COMPRESS,
    DECOMPOSE,
    WARNINGS_ARE_LINES,
    names,
    snapshot,
)
from support.patience import patience

pytestmark = WARNINGS_ARE_LINES

OPTIONS = {
    "decompose": "out threshold method scope target base compact dtype device json overwrite",
    "combine": "weights out base dtype overwrite",
    "negate": "scale out base dtype overwrite",
    "compress": "rank energy out base dtype device overwrite",
    "overlap": "device json overwrite",
    "inspect": "json overwrite",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_and_says_what_it_does(command):
    text = CliRunner().invoke(app, [command, "--help"]).output
    described = dict(re.findall(r"^  --([a-z-]+)(?: [A-Z.,]+)? +(\S.*)$", text, re.M))
    assert set(OPTIONS[command].split()) <= described.keys()
    assert "SOURCE" in text.splitlines()[0] + text.splitlines()[1]


@pytest.mark.parametrize("default", ["0.85", "chain", "all"])
def test_help_names_the_defaults_of_decompose(default):
    text = CliRunner().invoke(app, ["decompose", "--help"]).output
    assert f"[default: {default}]" in " ".join(text.split())


def test_help_lists_every_command(run):
    text = run("--help").wrote().out
    assert set(OPTIONS) <= set(re.findall(r"^  ([a-z]+)  ", text, re.M))


def test_version(run):
    assert run("--version").wrote().out == f"devec {devec.__version__}\n"


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("layers.12.self_attn.q_proj", "layers.*.self_attn.q_proj"),
        ("0.block.1", "*.block.*"),
        ("experts.up[2]", "experts.up[*]"),
        ("conv1.fc2", "conv1.fc2"),
    ],
)
def test_types_of_modules(module, kind):
    assert module_type(module) == kind


def process(*arguments, command=(sys.executable, "-m", "devec"), **options):
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=patience(), **options
    )


def cost(*arguments, **options):
    """Seconds of the processor that a process takes, and what it did."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = process(*arguments, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, result


@pytest.mark.slow
def test_help_answers_at_once():
    """Before torch alone is imported."""
    seconds, result = cost("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "decompose" in result.stdout
    assert seconds < cost("import torch", command=(sys.executable, "-c"))[0]


@pytest.mark.slow
def test_a_process_writes_and_warns(here):
    result = process("decompose", "based0", "based1", "--out", "out", cwd=here)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert re.search(r"^warning: .*'org/base0', 'org/base1'", result.stderr, re.M)
    assert "largest cos²" in result.stdout
    assert len(names("out")) == 5


@pytest.mark.slow
def test_the_installed_script_refuses(here):
    script = Path(sys.executable).with_name("devec")
    if not script.exists():
        pytest.skip("devec is not installed as a script here")
    result = process("negate", "missing", "--out", "out", command=[script], cwd=here)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: no such file or directory: 'missing'; ")
    assert not Path("out").exists()


@pytest.mark.slow
def test_output_is_read_to_its_first_line_only(here):
    shell = f"'{sys.executable}' -m devec inspect a | head -n 1"
    result = process(shell, command=["sh", "-c"], cwd=here)
    assert result.stdout.startswith("a: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["merge"], "merge"),
        (["decompose", "a", "b"], "--out"),
        (["decompose", "--out", "out"], "SOURCE"),
        ([*COMBINE], "--weights"),
        ([*COMPRESS, "--rank", "two"], "--rank"),
        ([*DECOMPOSE, "--treshold", "1"], "--treshold"),
        (["negate", "a", "b", "--out", "out"], "b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_points_at_help(here, run, arguments, part):
    before = snapshot(here)
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert part in result.err.splitlines()[-1]
    assert "--help" in result.err
    assert snapshot(here) == before


@pytest.mark.parametrize("options", [(), ("--threshold", "0")])
def test_standard_error_holds_messages_only(run, options):
    assert "" not in run(*DECOMPOSE, *options).err.splitlines()


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_only(here):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = process(*DECOMPOSE, cwd=here, env=environment)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
