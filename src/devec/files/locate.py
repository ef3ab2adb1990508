"""Finding the files of an adapter on the disk, on the Hugging Face Hub, or in its local cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from devec.errors import FormatError, IncompatibleError, OutputError, listed

CONFIG = "adapter_config.json"

_REPOSITORY = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?"
)
_FILE_ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
_FINAL_STATUS = (400, 401, 403, 404)  # after any other error the local cache is tried
_TIMEOUT = 10.0  # seconds to wait for the Hub before the local cache is tried
# The names under which PEFT and diffusers save weights; preferred if there are several files.
_STANDARD_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_ADAPTER_FILES = (CONFIG, *_STANDARD_WEIGHTS)


def locate(
    path: str | Path,
    subfolder: str | None = None,
    weight_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local path of an adapter; an adapter on the Hub is downloaded first.

    Args:
        path: A path, or ``user/repo``, ``user/repo@revision``, ``user/repo/folder/file``.
        subfolder: Folder within the directory or repository.
        weight_name: File within the folder.
        revision: Branch, tag or commit of the repository.
        token: Access token for the Hub.

    Returns:
        The file or directory. Paths on the disk take precedence over the Hub; if the Hub cannot be
        reached, its local cache is used.

    Raises:
        FormatError: If there is no such file, directory or repository.
        IncompatibleError: If a revision is given with a path on the disk.
    """
    if exists(path):
        if revision is not None:
            raise IncompatibleError(
                f"{str(path)!r} is a path on the disk, which has no revision {revision!r}"
            )
        local = Path(path).joinpath(*filter(None, (subfolder, weight_name)))
        if not exists(local):
            raise FormatError(
                f"no such file or directory: {str(local)!r}{adapters_inside(Path(path))}"
            )
        return local
    match = _REPOSITORY.fullmatch(str(path))
    if not match or match["repo"].endswith(_FILE_ENDINGS):
        raise FormatError(
            f"no such file or directory: {str(path)!r}; "
            + (_suggestion(path) or "a repository on the Hugging Face Hub would be 'user/name'")
        )
    inside = PurePosixPath(*filter(None, (match["file"], subfolder, weight_name)))
    if inside.suffix in _FILE_ENDINGS:
        subfolder, weight_name = str(inside.parent), inside.name
    else:
        subfolder, weight_name = str(inside), None
    return _download(match["repo"], subfolder, weight_name, revision or match["revision"], token)


def _suggestion(path: str | Path) -> str:
    """A "did you mean" question for a missing path, empty if no file has a similar name."""
    path = Path(path)
    try:
        names = {file.name: file for file in path.parent.iterdir()}
    except (OSError, ValueError):
        return ""
    stems = {file.stem: file for file in names.values() if file.suffix in _FILE_ENDINGS}
    similar = get_close_matches(path.name, [*stems, *names], 1, 0.75)
    return f"did you mean {str({**stems, **names}[similar[0]])!r}?" if similar else ""


def exists(path: str | Path) -> bool:
    """Whether a path exists; False for strings that cannot be paths."""
    try:
        return bool(str(path).strip()) and Path(path).exists()
    except (OSError, ValueError):
        return False


def adapters_inside(directory: Path) -> str:
    """The clause of a message that names subfolders with adapters; empty if there are none."""
    # PEFT saves each adapter of a model in a folder of its name, except for ``default``
    for pattern in ("*", "*/*"):
        with suppress(OSError):  # folders without read permission
            paths = sorted(directory.glob(pattern))
            folders = [p.relative_to(directory).as_posix() for p in paths if _has_adapter(p)]
            if folders:
                return _choose_subfolder(str(directory), folders)
    return ""


def _has_adapter(path: Path) -> bool:
    """Whether a path is a folder with files of an adapter."""
    return any((path / name).is_file() for name in _ADAPTER_FILES)


def _choose_subfolder(parent: str, folders: list[str]) -> str:
    """The clause of a message that says how to name a subfolder of a directory or repository."""
    return (
        f"; there are adapters in the subfolders {listed(folders)}: name one of them "
        f"(subfolder={folders[0]!r}, or {parent}/{folders[0]})"
    )


def default_name(path: Path) -> str:
    """The stem of a file, or the name of a directory, also for a PEFT directory's weights file."""
    if path.name in ("", ".", ".."):
        path = path.resolve()
    path = path.absolute()  # not resolved: links of the Hub's cache point to digests as names
    if path.is_file() and (path.parent / CONFIG).exists():
        path = path.parent
    return path.stem if path.suffix in _FILE_ENDINGS else path.name


def _download(
    repo: str,
    subfolder: str,
    weight_name: str | None,
    revision: str | None,
    token: str | bool | None,
) -> Path:
    """Download the files of an adapter in a repository; return their path in the local cache."""
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    # the network errors of the Hub's client are no OSError since its version 1
    network = (OSError, getattr(errors, "HTTPError", OSError))
    try:
        info = HfApi(token=token).model_info(repo, revision=revision, timeout=_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or []]
        selected = _select_files(repo, files, subfolder, weight_name)
        local = [hf_hub_download(repo, f, revision=info.sha, token=token) for f in selected]
        weights = Path(local[-1])
    except FormatError:
        raise
    except (*network, ValueError) as error:
        if isinstance(error, ValueError) or _status(error) in _FINAL_STATUS:
            raise FormatError(_unavailable_repository(repo, error)) from error
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except (OSError, ValueError) as missing:
            raise FormatError(
                f"{_unavailable_repository(repo, error)}, nor is it in the local cache of the Hub"
            ) from missing
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        selected = _select_files(repo, files, subfolder, weight_name)
        weights = folder / selected[-1]
    return weights.parent if len(selected) > 1 else weights


def _status(error: Exception) -> int:
    """The HTTP status of an error of the Hub, 0 if there was no response."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _unavailable_repository(repo: str, error: Exception) -> str:
    """The message for a repository that is not available, with the first line of the reason."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"no such file or directory: {repo!r}; and it is not available from the Hugging Face Hub "
        f"({reason})"
    )


def _select_files(
    repo: str, files: Sequence[str], subfolder: str, weight_name: str | None
) -> list[str]:
    """The files of the adapter among those of a repository: its config if any, then its weights."""
    here = {PurePosixPath(f).name: f for f in files if str(PurePosixPath(f).parent) == subfolder}
    weights = [name for name in here if name.endswith(_FILE_ENDINGS)]
    if weight_name is not None:
        chosen = [name for name in weights if name == weight_name]
    else:
        safe = [name for name in weights if name.endswith(".safetensors")] or weights
        chosen = [name for name in _STANDARD_WEIGHTS if name in safe] or safe
    if len(chosen) > 1:
        raise FormatError(
            f"repository {repo!r} holds several files, name one of them (weight_name=, or "
            f"{repo}/FILE): {listed(sorted(chosen))}"
        )
    if not chosen:
        folders = {str(p.parent) for p in map(PurePosixPath, files) if p.name in _ADAPTER_FILES}
        folders -= {"."}
        raise FormatError(
            f"repository {repo!r} holds no {weight_name or '.safetensors file'} in "
            f"{'its root' if subfolder == '.' else subfolder!r}; it holds {listed(sorted(files))}"
            + (_choose_subfolder(repo, sorted(folders)) if folders else "")
        )
    config = [here[CONFIG]] if CONFIG in here and chosen[0].startswith("adapter_model") else []
    return [*config, here[chosen[0]]]


def upload(
    folder: Path, repo: str, message: str, *, private: bool | None, token: str | bool | None
) -> str:
    """Upload a folder to a repository on the Hub, created if needed; return the commit's URL."""
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (OSError, ValueError, getattr(errors, "HTTPError", OSError)) as error:
        raise OutputError(f"cannot push to {repo!r}: {error}") from error
    return str(commit.commit_url)
