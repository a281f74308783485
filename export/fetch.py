"""One file of a Hugging Face hub repository, resumed where it broke off and checked by its digest."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from edge.errors import MissingExtra
from export.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_EXAMPLE = "ruv/ruvltra:ruvltra-claude-code-0.5b-q4_k_m.gguf"
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
# As huggingface_hub checks it, and with an owner.
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?(?<!\.git)", re.ASCII)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is on disk and has the digest that the hub states.

    Attributes:
        file: Where it lies.
        bytes: Its size.
        sha256: Its digest, of the bytes on disk.
        repository: ``owner/name`` on the hub.
        revision: The commit that it belongs to.
        downloaded: False if it was there before.
    """

    file: Path
    bytes: int
    sha256: str
    repository: str
    revision: str
    downloaded: bool


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked for, of which hub, and where it is to lie."""

    endpoint: str
    repository: str
    file: str
    revision: str | None
    path: Path

    @property
    def page(self) -> str:
        return f"{self.endpoint}/{self.repository}"

    @property
    def address(self) -> str:
        return f"{self.page}/resolve/{quote(self.revision or 'main', safe='')}/{quote(self.file)}"

    def __str__(self) -> str:
        return f"{self.repository}:{self.file}" if self.file else self.repository

    def by_hand(self) -> str:
        """How to go on without the hub."""
        if not self.file:
            return f"look at {self.page}/tree/{self.revision or 'main'} elsewhere and give OWNER/NAME:FILE"
        path = self.path.absolute()
        bundle = f"ruvltra-export bundle {shlex.quote(str(path))} --out DIR"
        return f"download {self.address} elsewhere, put it at {path} and go on with `{bundle}`"


def fetch(
    source: str,
    out: str | Path = ".",
    *,
    revision: str | None = None,
    sha256: str | None = None,
    force: bool = False,
    quiet: bool = True,
    endpoint: str | None = None,
) -> Fetched:
    """Download a file of a model repository; a download that broke off goes on where it stopped.

    What has arrived waits in a hidden folder beside the file and takes its name only once it has the
    digest that the hub states: sha256 for large files, the id of its git blob for small ones.

    Args:
        source: ``OWNER/NAME:FILE``; FILE may lie in folders of the repository.
        out: Folder for the file, which is made if need be.
        revision: Branch, tag or commit (default: the repository's main branch).
        sha256: The digest that the file must have as well.
        force: Replace another file of this name.
        quiet: No progress bar and no warnings of the network.
        endpoint: Address of the hub (default: HF_ENDPOINT, or else huggingface.co).

    Raises:
        MissingExtra: huggingface_hub is not installed.
        CheckpointError: The name is none, the hub does not give the file, its digest is another, or
            another file has its place.
        OSError: The folder cannot be written to.
    """
    repository, file = _split(source)
    if revision is not None and not revision.strip():
        raise CheckpointError(f"{source}: the revision is empty. Give a branch, a tag or a commit.")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise CheckpointError(f"{sha256!r} is no sha256. Give its 64 hexadecimal digits.")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder. Choose another one with --out.")
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        raise MissingExtra("ruvltra-export fetch", "hub") from None
    # Read anew, since huggingface_hub reads it once, when it is imported.
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    request = _Request(endpoint, repository, file, revision, folder / file.rpartition("/")[2])
    api = HfApi(endpoint=endpoint)
    with _silenced(quiet):
        info = _ask(api, request, constants.HF_HUB_ETAG_TIMEOUT)
        commit, entry = str(info.sha), _entry(info, request)
        wanted = _wanted(entry, request, commit, sha256.lower() if sha256 else None)
        if request.path.exists():
            found = {} if request.path.is_dir() else _digests(request.path, wanted)
            if wanted.items() <= found.items():
                size = request.path.stat().st_size
                return Fetched(request.path, size, found["sha256"], repository, commit, downloaded=False)
            if not force or not found:
                raise CheckpointError(
                    f"{request.path}: exists and is not {request} of revision {commit}. Choose another folder with "
                    + ("--out, or replace it with --force." if found else "--out.")
                )
        folder.mkdir(parents=True, exist_ok=True)
        staging = folder / f".{request.path.name}.partial"
        arrived = _download(api, request, commit, entry.size, staging)
    found = _digests(arrived, wanted)
    for kind, digest in wanted.items():
        if found[kind] != digest:
            shutil.rmtree(staging)
            raise CheckpointError(
                f"{request}: {kind} is to be {digest}, but {found[kind]} has arrived. Nothing was kept: fetch it "
                f"again, and if that comes out alike, compare with {request.page}/blob/{commit}/{quote(file)}."
            )
    size = arrived.stat().st_size
    arrived.replace(request.path)
    shutil.rmtree(staging, ignore_errors=True)
    return Fetched(request.path, size, found["sha256"], repository, commit, downloaded=True)


def _split(source: str) -> tuple[str, str]:
    """Repository and file; the file is empty where none is named."""
    repository, colon, file = source.partition(":")
    if not _REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"{source!r} names no repository of a hub. Give OWNER/NAME:FILE, for example {_EXAMPLE}.")
    odd = [part for part in file.split("/") if part in ("", ".", "..")]
    if colon and (odd or not file.isprintable() or set(file) & set(":\\")):
        raise CheckpointError(
            f"{source!r}: {file!r} is no path within a repository. Give OWNER/NAME:FILE with one colon, no '..' and no "
            f"absolute path, for example {_EXAMPLE}."
        )
    return repository, file


def _ask(api: HfApi, request: _Request, timeout: float) -> ModelInfo:
    """What the hub says of the repository: the commit, and every file with its size and digest."""
    address = f"{request.endpoint}/api/models/{request.repository}"
    if request.revision is not None:
        address += f"/revision/{quote(request.revision, safe='')}"
    try:
        info = api.model_info(request.repository, revision=request.revision, files_metadata=True, timeout=timeout)
        if not info.sha:
            raise ValueError("it names no commit")
        return info
    except Exception as error:  # the hub's own, those of the network, and of what is no hub's answer
        raise _refusal(error, request, address) from None


def _refusal(error: Exception, request: _Request, address: str) -> CheckpointError:
    """Why the hub did not give what was asked for, and what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = request.repository
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{name}: is gated, which means that its files are given to those only who accepted its terms. Accept them "
            f"at {request.page}, then {_LOG_IN}."
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{name}: {request.endpoint} has no such repository, or it is private. Check the name, or {_LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"{name}: has no revision {request.revision!r}. Give a branch, a tag or a commit of {request.page}/commits."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return CheckpointError(
            f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, and {address} is not asked. Unset it, or "
            f"{request.by_hand()}."
        )
    reason = _reason(error)
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        reason = f"{error.response.status_code} {error.server_message or error.response.reason}"
        if error.response.status_code in (401, 403):
            return CheckpointError(
                f"{name}: {request.endpoint} refuses access ({_line(reason)}). With an account that may read it, "
                f"{_LOG_IN}."
            )
    return CheckpointError(
        f"{address} did not answer as a hub does ({_line(reason)}). Check the network and HF_ENDPOINT, or "
        f"{request.by_hand()}."
    )


def _reason(error: BaseException) -> str:
    """The innermost of what requests and urllib3 have wrapped."""
    while error.args and isinstance(error.args[0], Exception):
        error = getattr(error.args[0], "reason", None) or error.args[0]
    return f"{type(error).__name__}: {error.args[0] if error.args else 'no reason given'}"


def _line(text: str) -> str:
    return " ".join(text.split())[:250].rstrip(".")


def _entry(info: ModelInfo, request: _Request) -> RepoSibling:
    """The file in the list of the repository."""
    entries = {entry.rfilename: entry for entry in info.siblings or []}
    if request.file in entries:
        return entries[request.file]
    if request.file:
        near = difflib.get_close_matches(request.file, entries, n=5, cutoff=0)
        raise CheckpointError(
            f"{request.repository}: has no file {request.file!r} at revision {info.sha}. Give one that it has: "
            f"{', '.join(near) or 'there is none'}."
        )
    models = [f"{request.repository}:{name}" for name in entries if name.endswith((".gguf", ".safetensors"))]
    raise CheckpointError(
        f"{request.repository}: no file of it is named. Give one of its models: "
        f"{', '.join(models) or 'it has no .gguf or .safetensors file'}."
    )


def _wanted(entry: RepoSibling, request: _Request, commit: str, sha256: str | None) -> dict[str, str]:
    """The digests that the file must have, by kind."""
    stated = entry.lfs.sha256 if entry.lfs else None
    if sha256 and stated and sha256 != stated:
        raise CheckpointError(
            f"{request}: --sha256 is {sha256}, but revision {commit} has {stated}. Give --revision of the one that you "
            "mean, or the digest of this one."
        )
    wanted = {"sha256": stated or sha256, "git blob id": None if stated else entry.blob_id}
    if not any(wanted.values()):
        raise CheckpointError(
            f"{request}: {request.endpoint} states no digest of it. Give the one that it must have with --sha256."
        )
    return {kind: digest for kind, digest in wanted.items() if digest}


def _digests(path: Path, wanted: dict[str, str]) -> dict[str, str]:
    """The sha256 of a file, and the id that git has for its content where that is wanted."""
    with path.open("rb") as stream:
        found = {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        if "git blob id" in wanted:
            stream.seek(0)
            blob = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
            found["git blob id"] = hashlib.file_digest(stream, lambda: blob).hexdigest()
    return found


def _download(api: HfApi, request: _Request, commit: str, size: int | None, staging: Path) -> Path:
    """The file in ``staging``; whatever breaks the download, it goes on as long as it gets further.

    huggingface_hub keeps what has arrived and asks for the rest, but by itself tries again only after some failures.
    """
    while True:
        before = _arrived(staging)
        if size is not None and before > size:  # no part of this file: the rest could never be asked for
            shutil.rmtree(staging)
            before = 0
        free = shutil.disk_usage(staging.parent).free
        if size is not None and size - before > free:
            raise CheckpointError(
                f"{staging.parent}: {request} needs {size - before} bytes, {free} are free. Make room, or choose "
                "another folder with --out."
            )
        try:
            return Path(
                # Its own cache stays aside, or a broken file in there would come back each time.
                api.hf_hub_download(
                    request.repository, request.file, revision=commit, local_dir=staging, cache_dir=staging
                )
            )
        except Exception as error:  # as for _ask, and hf_xet's
            arrived = _arrived(staging)
            # Old releases append all of a file to its part where a server sends all; that is begun anew, once.
            too_long = size is not None and arrived > size
            if arrived <= before or (too_long and before == 0):
                raise _broken(error, request, arrived, size) from None


def _broken(error: Exception, request: _Request, arrived: int, size: int | None) -> Exception:
    """Why the download went no further, and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _refusal(error.__cause__, request, request.address)
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, request, request.address)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return CheckpointError(
            f"{request.path.parent}: {error.strerror} after {arrived} of {size} bytes. Make room and run this again, "
            "or choose another folder with --out."
        )
    if isinstance(error, OSError) and error.errno is not None:  # the system's own; it names the file
        return error
    return CheckpointError(
        f"{request}: broke off after {arrived} of {size} bytes ({_line(_reason(error))}). Run this again, which goes "
        f"on where it can, or {request.by_hand()}."
    )


def _arrived(staging: Path) -> int:
    """Bytes of the download that broke off last; huggingface_hub has one file for each content."""
    parts = [part.stat() for part in staging.rglob("*.incomplete")]
    return max(parts, key=lambda part: part.st_mtime_ns).st_size if parts else 0


@contextlib.contextmanager
def _silenced(quiet: bool) -> Iterator[None]:
    """No progress bars and warnings of huggingface_hub, which has them for the whole process."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet:
        yield
        return
    logger, bars = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    if bars:
        disable_progress_bars("huggingface_hub")
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars("huggingface_hub")
