"""The pages say what is: what is generated is current, examples run, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import devec
from devec.cli import app
from support.pages import (
    DOCS,
    FURNITURE,
    PAGES,
    ROOT,
    every_block,
    generate,
    in_order,
    pool,
    prose,
    read,
    written_by_hand,
)

GENERATED = [page for page, path in PAGES.items() if list(generate.blocks(path))]
GUIDES = [page for page in PAGES if page.startswith("docs/guides/")]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "default::devec.DevecWarning")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The adapters of the guides, in the current directory."""
    pool.collect(tmp_path)
    monkeypatch.chdir(tmp_path)


def assert_same(got, want):
    """The same words, and the same figures but for rounding on another machine."""
    got, want = got.split(), want.split()
    figure = re.compile(r"-?\d+\.\d+")
    figures = [i for i, word in enumerate(want) if figure.fullmatch(word)]
    assert [re.sub(figure, "#", word) for word in got] == [
        re.sub(figure, "#", word) for word in want
    ]
    numbers = ([float(words[i]) for i in figures] for words in (got, want))
    assert next(numbers) == pytest.approx(next(numbers), rel=2e-3, abs=2e-3)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", GENERATED)
def test_what_is_generated_is_current(page):
    """If this fails, run `make figures`, and read what has changed."""
    for kind, what, text in generate.blocks(PAGES[page]):
        wanted = generate.generated(kind, what)
        if kind == "run":
            assert_same(text, wanted)
        else:
            assert text == wanted, f"{kind}: {what}"


def run_command(line):
    """Run a line of a block of commands; several processes and GPUs become one and the CPU."""
    words = shlex.split(line, comments=True)
    if words[:1] in (["torchrun"], ["accelerate"]):
        words = words[words.index("-m") + 1 :]
    if words[:1] == ["make"]:
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    elif words[:1] == ["python"]:
        assert (ROOT / words[1]).exists()
    elif words[:1] == ["devec"]:
        if not torch.cuda.is_available():
            words = ["cpu" if word == "cuda" else word for word in words]
        if words[1:] != ["demo"]:  # which the test below runs
            ran = CliRunner().invoke(app, words[1:], catch_exceptions=False)
            assert ran.exit_code == 0, ran.output
    else:
        assert words[:1] in ([], ["pip"], ["cd"])


def follow(page):
    """Run all blocks of a page, in order."""
    names = {}
    for language, text in every_block(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "sh":
            for line in text.splitlines():
                run_command(line)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_all_pages_can_be_followed_one_after_the_other_in_one_directory():
    """No output is overwritten, so the pages must not share names of outputs."""
    pages = in_order()
    assert {*pages, "docs/index.md"} == set(PAGES)
    for page in pages:
        follow(page)
    assert Image.open("two-styles/seven.png").size == (24, 24)


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_says_where_its_adapters_come_from(page):
    assert "`python docs/pool.py pool`" in read(page).partition("\n## ")[0]


@pytest.mark.parametrize("page", ["README.md", *GUIDES])
def test_what_needs_diffusers_says_so(page):
    if "from diffusers import" in read(page):
        assert re.search(r"'\.\[diffusers\]'", read(page).partition("from diffusers import")[0])


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_files_of_the_command_are_those_of_decompose_to():
    names = ("ink", "chalk", "sign")
    run_command(f"devec decompose {' '.join(names)} --threshold auto --out command")
    lazy = [devec.Adapter.from_pretrained(name, lazy=True) for name in names]
    devec.decompose_to("python", lazy, threshold="auto")
    files = [path.relative_to("command") for path in Path("command").rglob("*.safetensors")]
    assert len(files) > len(names)
    assert all(
        (Path("python") / file).read_bytes() == (Path("command") / file).read_bytes()
        for file in files
    )


@pytest.mark.slow
def test_the_demo_in_the_quickstart_is_the_demo(capsys):
    """Within rounding: accuracies may differ by a digit image or two between processors."""
    from devec.cli.demo import demo_command

    demo_command(out=None, threshold="auto", method="mean")
    numbers = r"\d+\.\d{3}"
    page = read("docs/quickstart.md")
    shown = re.search(r"<!-- demo -->(.*)<!-- /demo -->", page, flags=re.DOTALL)[1]
    printed = capsys.readouterr().out
    printed = printed[printed.index("Shared subspaces") :]
    got, want = (re.findall(numbers, text) for text in (printed, shown))
    assert [float(x) for x in got] == pytest.approx([float(x) for x in want], abs=0.006)
    words = [re.sub(r"[\d.\s]+", " ", text).strip("` \n") for text in (printed, shown)]
    assert words[0] == words[1].removeprefix("text").strip()


def anchor(heading):
    """The anchor that GitHub and MyST give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", [*PAGES.values(), *FURNITURE], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, part = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_measured_figures_stand_in_generated_blocks(page):
    """A figure with a unit in the text would go stale without anybody noticing."""
    figure = re.compile(r"\d[.,]\d+ ?(s|ms|GB|MB|kB|%|×|°|degrees)(?!\w)")
    assert [line for line in prose(written_by_hand(page)) if figure.search(line)] == []


def files_named_in(text):
    """Paths in code spans, of files or directories."""
    paths = re.findall(r"`(?:[^\s`]+ )*([.\w]+/[\w./]*)`", text)
    return [path for path in paths if not path.startswith((".venv/", "user/"))]


def missing(names):
    """The paths that are in neither the repository nor the package."""
    roots = (ROOT, ROOT / "src" / "devec")
    return [name for name in names if not any((root / name).exists() for root in roots)]


@pytest.mark.parametrize(
    ("page", "least"),
    [("docs/architecture.md", 40), ("CONTRIBUTING.md", 3), ("SECURITY.md", 0), ("README.md", 0)],
)
def test_the_files_that_a_page_names_exist(page, least):
    named = files_named_in((ROOT / page).read_text(encoding="utf-8"))
    assert len(named) >= least
    assert missing(named) == []


def test_the_life_of_an_adapter_is_told_in_few_files():
    section = read("docs/architecture.md").partition("## The life of one adapter")[2]
    named = files_named_in(section.partition("\n## ")[0])
    files = {name for name in named if name.endswith(".py")}
    assert 6 < len(files) <= 12, files
    assert missing(files) == []


def test_every_public_name_is_in_the_reference():
    reference = read("docs/reference/api.md")
    assert [n for n in devec.__all__ if not re.search(rf":: devec\.{n}$", reference, re.M)] == []


def test_every_command_is_in_the_reference():
    helped = [what for kind, what, _ in generate.blocks(DOCS / "reference/command-line.md")]
    assert helped == [command.name for command in app.registered_commands]


def test_the_citation_names_the_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {devec.__version__}\n" in citation
