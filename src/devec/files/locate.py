"""Where an adapter is: on the disk, in the cache of the Hugging Face Hub, or on the Hub."""

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
_ANSWERS = (400, 401, 403, 404)  # whatever else happens, the cache may still have it
_TIMEOUT = 10.0  # seconds for an answer of the Hub, before its cache is looked at
# Of several files, the one that a library writes by that name.
_USUAL_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_OF_ADAPTERS = (CONFIG, *_USUAL_WEIGHTS)


def locate(
    path: str | Path,
    subfolder: str | None = None,
    weight_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local path of an adapter, downloaded first if it is on the Hub.

    Args:
        path: A path, or ``user/repo``, ``user/repo@revision``, ``user/repo/folder/file``.
        subfolder: Folder within a directory or repository.
        weight_name: File within it.
        revision: Branch, tag or commit of a repository.
        token: Access token for the Hub.

    Returns:
        The file or directory. What exists on the disk comes before the Hub, and what cannot be
        reached on the Hub is looked for in its cache.

    Raises:
        FormatError: If there is no such thing.
        IncompatibleError: If a revision is asked of a local path.
    """
    if exists(path):
        if revision is not None:
            raise IncompatibleError(
                f"{str(path)!r} is a path on the disk, which has no revision {revision!r}"
            )
        found = Path(path).joinpath(*filter(None, (subfolder, weight_name)))
        if not exists(found):
            raise FormatError(
                f"no such file or directory: {str(found)!r}{adapters_inside(Path(path))}"
            )
        return found
    match = _REPOSITORY.fullmatch(str(path))
    if not match or match["repo"].endswith(_FILE_ENDINGS):
        raise FormatError(
            f"no such file or directory: {str(path)!r}; "
            + (_similar(path) or "a repository on the Hugging Face Hub would be 'user/name'")
        )
    inside = PurePosixPath(*filter(None, (match["file"], subfolder, weight_name)))
    if inside.suffix in _FILE_ENDINGS:
        subfolder, weight_name = str(inside.parent), inside.name
    else:
        subfolder, weight_name = str(inside), None
    return _download(match["repo"], subfolder, weight_name, revision or match["revision"], token)


def _similar(path: str | Path) -> str:
    """A question about a file with a similar name, empty if there is none."""
    path = Path(path)
    try:
        names = {file.name: file for file in path.parent.iterdir()}
    except (OSError, ValueError):
        return ""
    stems = {file.stem: file for file in names.values() if file.suffix in _FILE_ENDINGS}
    found = get_close_matches(path.name, [*stems, *names], 1, 0.75)
    return f"did you mean {str({**stems, **names}[found[0]])!r}?" if found else ""


def exists(path: str | Path) -> bool:
    """Whether there is anything at a path, however odd the path."""
    try:
        return bool(str(path).strip()) and Path(path).exists()
    except (OSError, ValueError):
        return False


def adapters_inside(directory: Path) -> str:
    """What to say of a directory whose subfolders hold adapters, empty of others.

    PEFT saves each adapter of a model in a folder of its name, but for the one named ``default``.

    Args:
        directory: The directory, or what else there is or is not at a path.

    Returns:
        The continuation of a message, which names the subfolders.
    """
    for pattern in ("*", "*/*"):
        with suppress(OSError):  # of folders that may not be read
            paths = sorted(directory.glob(pattern))
            folders = [p.relative_to(directory).as_posix() for p in paths if _has_adapter(p)]
            if folders:
                return _one_of(str(directory), folders)
    return ""


def _has_adapter(path: Path) -> bool:
    """Whether a path is a folder with the files of an adapter."""
    return any((path / name).is_file() for name in _OF_ADAPTERS)


def _one_of(place: str, folders: list[str]) -> str:
    """How to read an adapter in one of the subfolders of a directory or repository."""
    return (
        f"; there are adapters in the subfolders {listed(folders)}: name one of them "
        f"(subfolder={folders[0]!r}, or {place}/{folders[0]})"
    )


def default_name(path: Path) -> str:
    """The stem of a file, or the name of a directory, also where the file in it is named."""
    if path.name in ("", ".", ".."):
        path = path.resolve()
    path = path.absolute()  # and no further: the Hub's cache links to files named by their digests
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
    """The files of an adapter in a repository, in the Hub's local cache."""
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    # since version 1 the Hub's client has network errors of its own, which are no OSError
    network = (OSError, getattr(errors, "HTTPError", OSError))
    try:
        info = HfApi(token=token).model_info(repo, revision=revision, timeout=_TIMEOUT)
        files = [sibling.rfilename for sibling in info.siblings or []]
        wanted = _wanted(repo, files, subfolder, weight_name)
        local = [hf_hub_download(repo, f, revision=info.sha, token=token) for f in wanted]
        found = Path(local[-1])
    except FormatError:
        raise
    except (*network, ValueError) as error:
        if isinstance(error, ValueError) or _status(error) in _ANSWERS:
            raise FormatError(_not_had(repo, error)) from error
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except (OSError, ValueError) as missing:
            raise FormatError(
                f"{_not_had(repo, error)}, nor is it in the local cache of the Hub"
            ) from missing
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        wanted = _wanted(repo, files, subfolder, weight_name)
        found = folder / wanted[-1]
    return found.parent if len(wanted) > 1 else found


def _status(error: Exception) -> int:
    """The status with which the Hub answered, 0 if it did not."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _not_had(repo: str, error: Exception) -> str:
    """What to say of a repository that cannot be had, with the first line of the reason."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"no such file or directory: {repo!r}; and it cannot be had from the Hugging Face Hub "
        f"({reason})"
    )


def _wanted(repo: str, files: Sequence[str], subfolder: str, weight_name: str | None) -> list[str]:
    """The files of the adapter among those of a repository: its config, and last its weights."""
    here = {PurePosixPath(f).name: f for f in files if str(PurePosixPath(f).parent) == subfolder}
    weights = [name for name in here if name.endswith(_FILE_ENDINGS)]
    if weight_name is not None:
        chosen = [name for name in weights if name == weight_name]
    else:
        safe = [name for name in weights if name.endswith(".safetensors")] or weights
        chosen = [name for name in _USUAL_WEIGHTS if name in safe] or safe
    if len(chosen) > 1:
        raise FormatError(
            f"repository {repo!r} holds several files, name one of them (weight_name=, or "
            f"{repo}/FILE): {listed(sorted(chosen))}"
        )
    if not chosen:
        folders = {str(p.parent) for p in map(PurePosixPath, files) if p.name in _OF_ADAPTERS}
        folders -= {"."}
        raise FormatError(
            f"repository {repo!r} holds no {weight_name or '.safetensors file'} in "
            f"{'its root' if subfolder == '.' else subfolder!r}; it holds {listed(sorted(files))}"
            + (_one_of(repo, sorted(folders)) if folders else "")
        )
    config = [here[CONFIG]] if CONFIG in here and chosen[0].startswith("adapter_model") else []
    return [*config, here[chosen[0]]]


def upload(
    folder: Path, repo: str, message: str, *, private: bool | None, token: str | bool | None
) -> str:
    """Put a folder's files into a repository on the Hub, which is made if there is none.

    Args:
        folder: The folder.
        repo: Id of the repository.
        message: The commit's message.
        private: Whether a new repository is private.
        token: Access token for the Hub.

    Returns:
        Address of the commit.

    Raises:
        OutputError: If the Hub refuses.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (OSError, ValueError, getattr(errors, "HTTPError", OSError)) as error:
        raise OutputError(f"cannot push to {repo!r}: {error}") from error
    return str(commit.commit_url)
