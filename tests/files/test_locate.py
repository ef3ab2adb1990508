"""Adapters on the Hugging Face Hub: from its cache, and through a server that answers like it."""

import base64
import hashlib
import http.server
import json
import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file

from devec import Adapter, DevecError, decompose
from devec.cli import main
from support.adapters.cases import make_base, save_adapter
from support.paths import GOLDEN

KOHYA, FLUX = (GOLDEN / f"{name}.safetensors" for name in ("kohya_sd15", "diffusers_flux"))
MAIN, OLD = "a" * 40, "b" * 40  # commits
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, which is out of reach; the working directory is empty, too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def stored(cache, repo, files, commit=MAIN, ref="main"):
    """Put a repository into the cache, laid out as the Hub's client does."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for name, source in files.items():
        blob = root / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
        link = root / "snapshots" / commit / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, blob)
        link.symlink_to(blob)
    if ref:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return root / "snapshots" / commit


def peft_files(tmp_path):
    folder = save_adapter(tmp_path / "peft", "linear", "plain", 0)
    return {name: folder / name for name in ("adapter_config.json", WEIGHTS)}


def refused(*arguments, parts, **options):
    with pytest.raises(DevecError) as caught:
        Adapter.from_pretrained(*arguments, **options)
    for part in parts:
        assert part in str(caught.value)


def same(adapter, path):
    return adapter.modules.keys() and adapter == Adapter.from_pretrained(path)


def test_a_repository_of_one_file(cache):
    stored(cache, "user/style", {"some-file.safetensors": KOHYA, "README.md": KOHYA})
    adapter = Adapter.from_pretrained("user/style")
    assert same(adapter, KOHYA)
    assert adapter.name == "style"
    assert Adapter.from_pretrained("user/style", "other").name == "other"
    assert Adapter.from_pretrained("user/style", weight_name="some-file.safetensors") == adapter


def test_a_repository_of_peft(cache, tmp_path):
    files = peft_files(tmp_path)
    stored(cache, "user/style", files)
    adapter = Adapter.from_pretrained("user/style")
    assert same(adapter, tmp_path / "peft")
    assert (adapter.name, adapter.layout.about.format) == ("style", "peft")
    stored(cache, "user/both", {**files, "more.safetensors": KOHYA})
    assert Adapter.from_pretrained("user/both") == adapter
    assert same(Adapter.from_pretrained("user/both", weight_name="more.safetensors"), KOHYA)


@pytest.mark.parametrize("usual", [WEIGHTS, "pytorch_lora_weights.safetensors"])
def test_of_several_files_the_one_of_a_usual_name(cache, usual):
    stored(cache, "user/style", {usual: FLUX, "a.safetensors": KOHYA, "b.safetensors": KOHYA})
    assert same(Adapter.from_pretrained("user/style"), FLUX)


def test_several_files_are_listed(cache):
    stored(cache, "user/style", {"one.safetensors": KOHYA, "two.safetensors": FLUX})
    refused(
        "user/style",
        parts=["'user/style'", "'one.safetensors', 'two.safetensors'", "weight_name="],
    )
    adapter = Adapter.from_pretrained("user/style", weight_name="two.safetensors")
    assert same(adapter, FLUX)
    assert adapter.name == "two"


def test_folders_and_files_within(cache):
    files = {"one.safetensors": KOHYA, "sub/deep/two.safetensors": FLUX}
    stored(cache, "user/style", files)
    ways = [
        ("user/style", {"subfolder": "sub/deep"}),
        ("user/style", {"subfolder": "sub/deep", "weight_name": "two.safetensors"}),
        ("user/style", {"weight_name": "sub/deep/two.safetensors"}),
        ("user/style/sub/deep", {}),
        ("user/style/sub/deep/two.safetensors", {}),
        (f"user/style@{MAIN}/sub/deep/two.safetensors", {}),
        ("user/style@main/sub", {"subfolder": "deep"}),
    ]
    for path, options in ways:
        assert same(Adapter.from_pretrained(path, **options), FLUX), (path, options)
    assert Adapter.from_pretrained("user/style/sub/deep/two.safetensors").name == "two"
    refused("user/style", subfolder="sub", parts=["'sub'", "'sub/deep/two.safetensors'"])
    refused("user/style", weight_name="no.safetensors", parts=["no.safetensors", "one.safe"])
    refused("user/style/no.safetensors", parts=["no.safetensors", "one.safe"])


def test_revisions(cache):
    stored(cache, "user/style", {"a.safetensors": KOHYA})
    stored(cache, "user/style", {"a.safetensors": FLUX}, commit=OLD, ref="v1.0")
    for revision in (OLD, "v1.0"):
        assert same(Adapter.from_pretrained("user/style", revision=revision), FLUX)
        assert same(Adapter.from_pretrained(f"user/style@{revision}"), FLUX)
        assert same(Adapter.from_pretrained(f"user/style@{revision}/a.safetensors"), FLUX)
    assert same(Adapter.from_pretrained("user/style"), KOHYA)
    assert same(Adapter.from_pretrained("user/style", revision="main"), KOHYA)
    assert Adapter.from_pretrained("user/style@v1.0").name == "style"
    refused("user/style", revision="v2", parts=["'user/style'", "cache"])


@pytest.mark.parametrize("path", ["user/style", "user/style@v1", "user/style/a.safetensors"])
def test_what_is_not_in_the_cache(cache, path):
    refused(path, parts=["no such file or directory", "'user/style'", "Hub", "cache"])
    assert not cache.exists() or not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "path", ["name", "./user/style", "/user/style", "user/style.safetensors", "user/-x", "a b/c"]
)
def test_what_can_be_no_repository_is_not_looked_for(cache, path):
    stored(cache, "user/style", {"a.safetensors": KOHYA})
    refused(path, parts=["no such file or directory", repr(path), "user/name"])


def test_what_is_on_the_disk_comes_first(cache):
    stored(cache, "user/style", {"a.safetensors": KOHYA})
    here = Path("user/style")
    here.mkdir(parents=True)
    shutil.copy(FLUX, here / "b.safetensors")
    assert same(Adapter.from_pretrained("user/style"), FLUX)
    assert same(Adapter.from_pretrained(here), FLUX)
    refused("user/style", revision="main", parts=["on the disk", "'main'"])


def test_folders_and_files_within_a_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    shutil.copy(KOHYA, tmp_path / "sub" / "one.safetensors")
    shutil.copy(FLUX, tmp_path / "sub" / "two.safetensors")
    read = Adapter.from_pretrained(tmp_path, subfolder="sub", weight_name="two.safetensors")
    assert same(read, FLUX)
    assert read.name == "two"
    refused(tmp_path, subfolder="none", parts=["no such file", str(tmp_path / "none")])


def test_a_pool_of_repositories(cache):
    stored(cache, "one/style", {"a.safetensors": KOHYA})
    stored(cache, "two/style", {"a.safetensors": KOHYA})
    pool = [Adapter.from_pretrained(p, p.partition("/")[0]) for p in ("one/style", "two/style")]
    assert set(decompose(pool).unique) == {"one", "two"}


@pytest.mark.parametrize("path", ["user/style", "user/style@main/a.safetensors", "x=user/style"])
def test_the_command_line_reads_repositories(cache, monkeypatch, capsys, path):
    stored(cache, "user/style", {"a.safetensors": KOHYA})
    monkeypatch.setattr(sys, "argv", ["devec", "inspect", path])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    name = {"user/style": "style", "x=user/style": "x"}.get(path, "a")
    assert capsys.readouterr().out.startswith(f"{name}: adapter in the kohya convention")


# A server that answers as the Hub does


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository; what is pushed is kept."""

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if hub.broken:
            self.answer(b"", hub.broken)
        elif self.path.startswith("/api/models/user/style"):
            siblings = [{"rfilename": name} for name in hub.files]
            self.answer({"id": "user/style", "sha": MAIN, "siblings": siblings})
        elif self.path.startswith(f"/user/style/resolve/{MAIN}/"):
            data = hub.files[self.path.rpartition(MAIN + "/")[2]]
            self.answer(data, ETag=f'"{len(data)}"', X_Repo_Commit=MAIN)
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        hub = self.server
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        url = f"http://127.0.0.1:{hub.server_port}/user/new"
        if hub.broken:
            self.answer({"error": "no"}, hub.broken)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(text))
            self.answer({"url": url})
        elif "/preupload/" in self.path:
            files = json.loads(text)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular",
                                    "shouldIgnore": False} for f in files]})  # fmt: skip
        elif "/commit/" in self.path:
            hub.commits.append([json.loads(line) for line in text.splitlines()])
            self.answer({"commitUrl": f"{url}/commit/{MAIN}", "commitOid": MAIN})
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(cache, monkeypatch):
    """A Hub of our own, within reach."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.created, server.commits, server.broken = {}, [], [], [], 0
    assert not cache.exists()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("devec.files.locate._TIMEOUT", 5, raising=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_repositories_are_downloaded(hub, cache, monkeypatch):
    hub.files = {"a.safetensors": KOHYA.read_bytes(), "other.bin": b"not asked for"}
    adapter = Adapter.from_pretrained("user/style", token="hf_secret")
    assert same(adapter, KOHYA)
    assert {given for _, _, given in hub.asked} == {"Bearer hf_secret"}
    assert not any("other.bin" in path for _, path, _ in hub.asked)
    assert len(list(cache.rglob("*.safetensors"))) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert Adapter.from_pretrained("user/style", revision=MAIN) == adapter
    assert len(hub.asked) == asked


def test_a_directory_of_peft_is_downloaded(hub, tmp_path):
    files = peft_files(tmp_path)
    hub.files = {name: path.read_bytes() for name, path in files.items()} | {"big.bin": b"x"}
    assert same(Adapter.from_pretrained("user/style"), tmp_path / "peft")


@pytest.mark.usefixtures("hub")
def test_repositories_that_do_not_exist():
    refused("user/nothing", parts=["no such file or directory", "'user/nothing'", "Hub"])


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_hub_that_refuses(hub, status):
    hub.broken = status
    refused("user/style", parts=["'user/style'", "Hub"])
    adapter = Adapter.from_pretrained(KOHYA)
    with pytest.raises(DevecError, match="cannot push to 'user/new'"):
        adapter.push_to_hub("user/new", token="hf_secret")


def pushed(hub):
    """Name → content of the files of the last commit, and its message."""
    head, *rest = hub.commits[-1]
    assert head["key"] == "header"
    contents = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in rest}
    return contents, head["value"]["summary"]


def test_files_are_pushed(hub, tmp_path):
    adapter = Adapter.from_pretrained(KOHYA)
    address = adapter.push_to_hub("user/new", token="hf_secret", private=True)
    assert address.endswith(f"/user/new/commit/{MAIN}")
    contents, message = pushed(hub)
    assert list(contents) == ["kohya_sd15.safetensors"]
    assert message == "Upload kohya_sd15"
    want = adapter.save_pretrained(tmp_path / "a").read_bytes()
    assert contents["kohya_sd15.safetensors"] == want
    [created] = hub.created
    assert (created["name"], created["organization"]) == ("new", "user")
    assert "private" in (created.get("visibility"), *[k for k, v in created.items() if v is True])
    assert {given for _, _, given in hub.asked} == {"Bearer hf_secret"}


def test_directories_are_pushed(hub, tmp_path):
    peft_files(tmp_path)
    adapter = 2 * Adapter.from_pretrained(tmp_path / "peft")
    adapter.push_to_hub("user/new", token="hf_secret", commit_message="Twice")
    contents, message = pushed(hub)
    assert set(contents) == {"adapter_config.json", WEIGHTS, "README.md", "devec.json"}
    assert message == "Twice"
    (tmp_path / WEIGHTS).write_bytes(contents[WEIGHTS])
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(tmp_path / "peft" / WEIGHTS).keys()
    assert json.loads(contents["devec.json"])["operation"] == "combine"


@pytest.mark.parametrize("name", ["", "a b", "-x/y", "a/b/c", "x" * 200])
def test_names_that_no_repository_has(hub, name):
    with pytest.raises(DevecError, match="cannot push"):
        Adapter.from_pretrained(KOHYA).push_to_hub(name, token="hf_secret")
    assert not hub.commits


@pytest.fixture
def several(tmp_path):
    """A directory in which PEFT saved two adapters of a model, each in a folder of its name."""
    paths = {
        n: save_adapter(tmp_path / "made" / n, "linear", "plain", i) for i, n in enumerate("ab")
    }
    host = PeftModel.from_pretrained(make_base("linear"), paths["a"], adapter_name="anime")
    host.load_adapter(paths["b"], "pixel")
    host.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/adapter_config.json").exists()
    return tmp_path / "saved"


@pytest.mark.parametrize("levels", [0, 1])
def test_adapters_in_subfolders_are_named_with_how_to_read_one(
    several, levels, capsys, monkeypatch
):
    directory = several if levels == 0 else several.parent
    names = ["anime", "pixel"] if levels == 0 else ["saved/anime", "saved/pixel"]
    if levels:
        shutil.rmtree(directory / "made")
    parts = ("is not an adapter", *names, f"subfolder='{names[0]}'", f"{directory}/{names[0]}")
    refused(directory, parts=parts)
    read = Adapter.from_pretrained(directory, subfolder=names[0])
    assert read == Adapter.from_pretrained(directory / names[0])
    monkeypatch.setattr(sys, "argv", ["devec", "inspect", str(directory)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert all(part in said for part in parts)


def test_a_subfolder_that_is_not_there_is_answered_with_those_that_are(several):
    refused(several, subfolder="anmie", parts=("no such file", "anmie", "'anime', 'pixel'"))


def test_the_default_adapter_is_read_where_others_are_beside_it(several, tmp_path):
    host = PeftModel.from_pretrained(make_base("linear"), several / "anime")
    host.load_adapter(several / "pixel", "pixel")
    host.save_pretrained(tmp_path / "out")
    assert Adapter.from_pretrained(tmp_path / "out") == Adapter.from_pretrained(several / "anime")
    other = Adapter.from_pretrained(tmp_path / "out", subfolder="pixel")
    assert other == Adapter.from_pretrained(several / "pixel")


def test_repositories_with_adapters_in_subfolders_are_answered_alike(cache, several):
    files = {f.relative_to(several).as_posix(): f for f in several.rglob("*") if f.is_file()}
    stored(cache, "user/several", files)
    refused("user/several", parts=("holds no", "'anime', 'pixel'", "user/several/anime"))
    assert Adapter.from_pretrained("user/several/anime") == Adapter.from_pretrained(
        several / "anime"
    )
