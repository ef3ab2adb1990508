"""Files that change, full disks, too little memory, signals: one message and no half output."""

import dataclasses
import os
import resource
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import WithHead, make_pool, save_adapter, save_kohya
from children import at_work, dawdle, die, linger, little_memory, run, start
from safetensors.torch import save_file
from streamed import contents, from_files, from_files_to_files, tree

from devec import Adapter, DevecError
from devec.errors import FormatError, OutputError
from devec.files import random_access
from devec.files.digest import sha256
from devec.files.safetensors_writer import TensorWriter
from devec.files.staging import Staging
from devec.lazy import LazyMapping, outlines
from devec.streaming import sinks
from devec.streaming.decompose_to import decompose_to
from devec.streaming.output_options import OutputOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="open files are not replaced there"),
]

WEIGHTS = "adapter_model.safetensors"

FORMS = {
    "direct": OutputOptions(),
    "spooled": OutputOptions(compact=True),
    "converted": OutputOptions(dtype=torch.float64),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool of each kind of input, never changed."""
    root = tmp_path_factory.mktemp("made")
    for index, name in enumerate("ab"):
        save_kohya(root / "kohya" / f"{name}.safetensors", index)
    make_pool(root / "peft")
    return root


@pytest.fixture(params=["peft", "kohya"])
def pool(made, tmp_path, request):
    """Inputs that may be spoiled."""
    shutil.copytree(made / request.param, tmp_path / "in")
    return sorted((tmp_path / "in").iterdir())


@pytest.fixture
def plain(made, tmp_path):
    """The inputs of PEFT alone."""
    shutil.copytree(made / "peft", tmp_path / "in")
    return sorted((tmp_path / "in").iterdir())


def weights(path):
    """The file of tensors of an adapter."""
    return path / WEIGHTS if path.is_dir() else path


def module_of(adapter):
    """The last of its modules."""
    return list(adapter.modules)[-1]


def assert_nothing_but(directory, *names):
    """That is in a directory, hidden or not."""
    assert sorted(path.name for path in Path(directory).iterdir()) == sorted(names)


# --- inputs -------------------------------------------------------------------------------------


def later(path):
    """Make a file younger than the clock of the file system may miss."""
    stamp = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    path.write_bytes(b"")


def grown(path):
    with path.open("ab") as file:
        file.write(b"more")


def rewritten(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    later(path)


def touched(path):
    later(path)


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"something else")
    other.rename(path)


def deleted(path):
    path.unlink(missing_ok=True)


WRITTEN_TO = [truncated, emptied, grown, rewritten, touched]
MOVED = [replaced, deleted]


@pytest.mark.parametrize("change", WRITTEN_TO)
def test_a_file_that_is_written_to_is_not_read_on(pool, change):
    adapter = Adapter.from_pretrained(pool[0], lazy=True)
    change(weights(pool[0]))
    with pytest.raises(FormatError, match="was changed while it was being read") as error:
        adapter.modules[module_of(adapter)]
    assert str(weights(pool[0])) in str(error.value)


@pytest.mark.parametrize("change", MOVED)
def test_a_file_that_is_replaced_or_deleted_is_read_as_it_was(pool, change):
    want = Adapter.from_pretrained(pool[0])
    adapter = Adapter.from_pretrained(pool[0], lazy=True)
    change(weights(pool[0]))
    for module, delta in adapter.modules.items():
        assert delta.same_as(want.modules[module])


@pytest.mark.parametrize("change", [later, replaced])
def test_a_digest_is_not_that_of_another_file(pool, monkeypatch, change):
    def meanwhile(path):
        change(path)
        return sha256(path)

    monkeypatch.setattr("devec.files.safetensors_reader.sha256", meanwhile)
    with pytest.raises(FormatError, match="was replaced while it was being opened; run again"):
        Adapter.from_pretrained(pool[0], lazy=True)


@pytest.mark.parametrize("change", WRITTEN_TO)
@pytest.mark.parametrize("form", ["direct", "spooled"])
def test_nothing_is_written_of_inputs_that_change(tmp_path, plain, change, form):
    original = weights(plain[1]).read_bytes()
    adapters = from_files(plain)
    change(weights(plain[1]))
    with pytest.raises(FormatError, match="was changed while it was being read") as error:
        decompose_to(tmp_path / "out", adapters, **vars(FORMS[form]))
    assert str(weights(plain[1])) in str(error.value)
    assert_nothing_but(tmp_path, "in")
    weights(plain[1]).write_bytes(original)
    assert from_files_to_files(tmp_path / "out", plain, FORMS[form]).written.keys() >= {"a-unique"}


@pytest.mark.parametrize("change", MOVED)
def test_inputs_that_are_moved_away_are_decomposed_as_they_were(tmp_path, pool, change):
    from_files_to_files(tmp_path / "want", pool)
    adapters = from_files(pool)
    change(weights(pool[1]))
    decompose_to(tmp_path / "out", adapters)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def before_reading(adapter, module, act):
    """The adapter, with something that happens before a module is read."""

    def read(name):
        if name == module:
            act()
        return adapter.modules[name]

    return dataclasses.replace(adapter, modules=LazyMapping(outlines(adapter.modules), read))


def test_a_change_in_the_middle_of_the_work_is_seen(tmp_path, pool):
    first, second = from_files(pool)
    spoiled = before_reading(second, module_of(second), lambda: truncated(weights(pool[1])))
    with pytest.raises(FormatError, match="was changed while it was being read"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


@pytest.mark.parametrize("change", [truncated, deleted])
def test_a_carried_tensor_that_cannot_be_read_is_an_error_too(tmp_path, change):
    """It is read last, when all modules are written."""
    fields = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
    pool = [
        save_adapter(tmp_path / "in" / name, "linear", "plain", index, WithHead(), **fields)
        for index, name in enumerate("ab")
    ]
    first, second = from_files(pool)
    assert second.carried

    class Carried(LazyMapping):
        def __getitem__(self, key):
            change(weights(pool[1]))
            return super().__getitem__(key)

    carried = Carried(outlines(second.carried), second.carried.__getitem__)
    spoiled = dataclasses.replace(second, carried=carried)
    if change is deleted:
        decompose_to(tmp_path / "out", [first, spoiled])
        got = Adapter.from_pretrained(tmp_path / "out" / "b-unique")
        assert got.carried.keys() == second.carried.keys()
        return
    with pytest.raises(FormatError, match="was changed while it was being read"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_when_they_are_read(tmp_path, value):
    pool = [save_kohya(tmp_path / "in" / f"{n}.safetensors", i) for i, n in enumerate("ab")]
    adapter = Adapter.from_pretrained(pool[1])
    module = module_of(adapter)
    adapter.modules[module].A[0, 0] = value
    tensors = {}
    for name, delta in adapter.modules.items():
        tensors[f"{name}.lora_up.weight"] = delta.B
        tensors[f"{name}.lora_down.weight"] = delta.A
    save_file(tensors, pool[1])
    adapters = from_files(pool)
    with pytest.raises(FormatError, match=r"holds NaN or infinity in 1 of its values") as error:
        decompose_to(tmp_path / "out", adapters)
    assert module in str(error.value)
    assert str(pool[1]) in str(error.value)
    assert_nothing_but(tmp_path, "in")


def test_an_input_that_is_not_there_any_more_is_an_error_of_one_line(tmp_path, plain):
    weights(plain[1]).unlink()
    code, printed = run(tmp_path / "log", "decompose", *plain, "--out", tmp_path / "out")
    assert code == 2
    [message] = printed.splitlines()
    assert message.startswith(f"error: {plain[1]} has adapter_config.json but no {WEIGHTS}")
    assert_nothing_but(tmp_path, "in", "log")


# --- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [0, 100, 1024])
def test_a_limit_of_the_size_of_files_leaves_nothing(tmp_path, plain, form, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OutputError, match=r"cannot write .*File too large.*nothing was changed"
        ):
            from_files_to_files(tmp_path / "out", plain, FORMS[form])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert_nothing_but(tmp_path, "in")
    assert from_files_to_files(tmp_path / "out", plain, FORMS[form]).written.keys() >= {"common"}


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync", "mkdir"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_leaves_nothing(tmp_path, plain, monkeypatch, call, after):
    """The system fails some of the calls that take room."""
    original, calls = getattr(os, call), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    adapters = from_files(plain)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(
            OutputError, match=r"cannot write .*No space left on device.*nothing was"
        ):
            decompose_to(tmp_path / "out", adapters)
    assert_nothing_but(tmp_path, "in")
    assert decompose_to(tmp_path / "out", adapters).written.keys() >= {"common"}


def test_an_error_that_the_system_tells_once_is_not_lost(tmp_path, plain, monkeypatch):
    """Whoever flushes first hears of it, which is the thread that does so beside the work."""
    original, told = os.fsync, []

    def failing(file):
        if not told:
            told.append(threading.current_thread().name)
            raise OSError(5, "Input/output error")
        original(file)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(sinks, "_PAUSE", 0)
    first, second = from_files(plain)
    slow = before_reading(second, module_of(second), lambda: time.sleep(0.3))
    with pytest.raises(OutputError, match=r"cannot write .*Input/output error.*nothing was"):
        decompose_to(tmp_path / "out", [first, slow])
    assert told == ["devec-flush"]
    assert_nothing_but(tmp_path, "in")


def test_a_file_that_cannot_be_made_as_large_is_let_go_of(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", failing)
    closed, close = [], os.close
    monkeypatch.setattr(os, "close", lambda file: closed.append(file) or close(file))
    with pytest.raises(OSError, match="No space left"):
        TensorWriter(tmp_path / "x", {"w": torch.zeros(3, device="meta")}, {}, create=True)
    assert len(closed) == 1


def test_what_is_not_finite_is_not_written_in_any_type(tmp_path, plain):
    """Half precision, in which nothing is computed, may have been made by anybody."""
    original = Adapter.from_pretrained(plain[0])
    module = module_of(original)
    for value in (float("inf"), float("nan")):
        A = original.modules[module].A.half()
        A[0, 0] = value
        spoiled = {**original.modules, module: dataclasses.replace(original.modules[module], A=A)}
        adapter = dataclasses.replace(original, modules=spoiled)
        with pytest.raises(OutputError, match="holds NaN or infinity in 1 of its values"):
            adapter.save_pretrained(tmp_path / "out", dtype=torch.float16)
    assert_nothing_but(tmp_path, "in")


def test_where_files_have_one_place_only_the_same_is_written(tmp_path, pool, monkeypatch):
    """As on Windows, which has no calls that say where to read and write."""
    from_files_to_files(tmp_path / "want", pool)
    monkeypatch.setattr(random_access, "_HAS_POSITIONED_CALLS", False)
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    from_files_to_files(tmp_path / "out", pool)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_outputs_that_were_there_stay_as_they_were(tmp_path, plain, monkeypatch):
    from_files_to_files(tmp_path / "out", plain, threshold=0.3)
    before = contents(tmp_path)

    def failing(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(OutputError, match="No space left"):
            from_files_to_files(tmp_path / "out", plain, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_appears_in_the_place_of_an_output_meanwhile_is_not_replaced(tmp_path, plain, kind):
    first, second = from_files(plain)
    mine = tmp_path / "out" / "common"
    text = mine / "thesis.tex" if kind == "directory" else mine

    def act():
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("years")

    with pytest.raises(OutputError, match="common"):
        decompose_to(tmp_path / "out", [first, before_reading(second, module_of(second), act)])
    assert_nothing_but(tmp_path, "in", "out")
    assert_nothing_but(tmp_path / "out", "common")
    assert text.read_text() == "years"


def test_outputs_of_a_run_at_the_same_time_are_not_replaced(tmp_path, plain):
    """Both began when there was nothing; that which ends first keeps its outputs."""
    first, second = from_files(plain)
    before = {}

    def act():
        if not before:
            from_files_to_files(tmp_path / "out", plain, threshold=0.3)
            before.update(contents(tmp_path / "out"))

    with pytest.raises(OutputError, match="output exists"):
        decompose_to(tmp_path / "out", [first, before_reading(second, module_of(second), act)])
    assert contents(tmp_path / "out") == before


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="has no directory that none may write to"
)
@pytest.mark.parametrize("out", ["/proc/out", "/proc/self/out", "/sys/out"])
def test_where_nothing_can_be_written_it_is_said(plain, out):
    with pytest.raises(OutputError, match=f"cannot write '{out}/.*nothing was changed"):
        from_files_to_files(out, plain)
    assert not Path(out).exists()


def test_in_the_place_of_a_file_it_is_said(tmp_path, plain):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="it is a file, expected a directory"):
        from_files_to_files(tmp_path / "out", plain)
    assert (tmp_path / "out").read_text() == "mine"
    assert_nothing_but(tmp_path, "in", "out")


@pytest.mark.parametrize("form", ["direct", "spooled"])
def test_if_the_place_of_the_work_is_taken_away_it_is_said(tmp_path, plain, form):
    first, second = from_files(plain)

    def act():
        for path in tmp_path.glob(".devec-*"):
            shutil.rmtree(path)

    with pytest.raises(OutputError, match="cannot write"):
        decompose_to(
            tmp_path / "out",
            [first, before_reading(second, module_of(second), act)],
            **vars(FORMS[form]),
        )
    assert_nothing_but(tmp_path, "in")


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path, plain):
    def report(_):
        def write(path):
            path.write_text("half")
            raise OSError(28, "No space left on device")

        return write

    with pytest.raises(OutputError, match="No space left"):
        from_files_to_files(tmp_path / "out", plain, report=(tmp_path / "r.json", report))
    assert_nothing_but(tmp_path, "in")


# --- memory -------------------------------------------------------------------------------------

NO_MEMORY = {
    "of the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 123456 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "of Python": MemoryError,
    "of a GPU": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB.\n"
    ),
}


def _raise(error):
    raise error


@pytest.mark.parametrize("lacking", NO_MEMORY)
def test_too_little_memory_for_a_module_is_said(tmp_path, pool, lacking):
    first, second = from_files(pool)
    module = module_of(second)
    spoiled = before_reading(second, module, lambda: _raise(NO_MEMORY[lacking]()))
    with pytest.raises(DevecError, match=r"too little memory for .*MB.*OMP_NUM_THREADS") as error:
        decompose_to(tmp_path / "out", [first, spoiled])
    assert any(module in str(error.value) for module in second.modules)
    assert len(str(error.value).splitlines()) == 1
    assert_nothing_but(tmp_path, "in")


@pytest.mark.parametrize("lacking", NO_MEMORY)
def test_too_little_memory_for_what_is_carried_is_said(tmp_path, plain, lacking):
    first, second = from_files(plain)
    known = {"head": torch.empty(3, device="meta")}
    spoiled = dataclasses.replace(
        second, carried=LazyMapping(known, lambda _: _raise(NO_MEMORY[lacking]()))
    )
    with pytest.raises(DevecError, match="too little memory"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


def test_other_errors_are_not_taken_for_lack_of_memory(tmp_path, plain):
    first, second = from_files(plain)
    spoiled = before_reading(second, "first.layer", lambda: _raise(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        decompose_to(tmp_path / "out", [first, spoiled])
    assert_nothing_but(tmp_path, "in")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory hold on Linux only")
def test_a_limit_of_memory_below_that_of_one_module_is_said(tmp_path):
    pool = [tmp_path / "in" / f"{name}.safetensors" for name in "ab"]
    pool[0].parent.mkdir()
    for index, path in enumerate(pool):
        B = torch.randn(200_000, 16, generator=torch.Generator().manual_seed(index))
        tensors = {"lora_unet_large.lora_up.weight": B.half()}
        tensors["lora_unet_large.lora_down.weight"] = torch.randn(16, 20).half()
        save_file(tensors, path)
    code, printed = run(
        tmp_path / "log",
        *("decompose", *pool, "--out", tmp_path / "out"),
        before=partial(little_memory, 25_000_000),
    )
    assert code == 2, printed
    assert "error: too little memory for 'lora_unet_large', which need about 115 MB" in printed
    assert "Traceback" not in printed
    assert_nothing_but(tmp_path, "in", "log")


# --- signals and what they leave ------------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_leaves_nothing_to_be_seen(tmp_path, plain, sign):
    arguments = ("decompose", *plain, "--out", tmp_path / "out")
    child = start(tmp_path / "log", *arguments, before=partial(at_work, dawdle)).until("at work")
    code = child.send(sign).ends()
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[sign]
    assert "Traceback" not in child.printed
    hidden = list(tmp_path.glob(".devec-*"))
    assert bool(hidden) == (sign is signal.SIGKILL)
    assert_nothing_but(tmp_path, "in", "log", *(path.name for path in hidden))
    if sign is not signal.SIGKILL:
        assert child.printed.count("error: ") == 1
        assert child.printed.endswith("ed; nothing was written\n")
    from_files_to_files(tmp_path / "out", plain)
    assert_nothing_but(tmp_path, "in", "log", "out")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_after_writing_says_what_it_has_written(tmp_path, plain, sign):
    arguments = ("decompose", *plain, "--out", tmp_path / "out")
    child = start(tmp_path / "log", *arguments, before=linger).until("all is written")
    assert child.send(sign).ends() == 128 + sign
    (message,) = [line for line in child.printed.splitlines() if "error: " in line]
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert "nothing was written" not in message
    assert "; written: " in message
    assert any(f"{name}'" in message for name in names)
    assert_nothing_but(tmp_path, "in", "log", "out")


def test_a_process_that_dies_by_itself_is_cleaned_up_after(tmp_path, plain):
    arguments = ("decompose", *plain, "--out", tmp_path / "out")
    code, _ = run(tmp_path / "log", *arguments, before=partial(at_work, die))
    assert code == -signal.SIGKILL
    assert len(list(tmp_path.glob(".devec-*"))) == 1
    code, printed = run(tmp_path / "log", *arguments)
    assert code == 0, printed
    assert_nothing_but(tmp_path, "in", "log", "out")


def test_what_another_process_works_on_is_left_alone(tmp_path, plain):
    target = tmp_path / "other" / "a"
    target.parent.mkdir()
    with Staging([tmp_path / "mine"], overwrite=False) as staging:
        staging.staged_path(tmp_path / "mine").write_text("mine")
        from_files_to_files(tmp_path / "out", plain)
        assert len(list(tmp_path.glob(".devec-*"))) == 1
        staging.commit([tmp_path / "mine"])
    assert (tmp_path / "mine").read_text() == "mine"
    assert_nothing_but(tmp_path, "in", "mine", "other", "out")


def test_abandoned_directories_are_taken_away_and_others_are_not(tmp_path):
    for name in (".devec-abandoned", ".devec-begun", ".other", "devec-visible"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("half")
    for name in (".devec-abandoned", ".other", "devec-visible"):
        (tmp_path / name / ".lock").touch()
    (tmp_path / ".devec-file").write_text("no directory")
    with Staging([tmp_path / "a"], overwrite=False):
        assert not (tmp_path / ".devec-abandoned").exists()
    left = (".devec-begun", ".devec-file", ".other", "devec-visible")
    assert_nothing_but(tmp_path, *left)  # that without a lock may be on its way to be locked
    assert tree(tmp_path).keys() >= {".other/a", "devec-visible/a"}
