"""Fetch public datasets: Minari's from its remotes, D4RL's from its mirrors.

Plain HTTP with resume: an interrupted download goes on where it was when the command is given again. What the server
publishes a hash of is checked against it; the SHA-256 of every file is written beside it either way.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rlctl.data import d4rl
from rlctl.data.arrays import DatasetError
from rlctl.data.minari_files import MINARI_ID, minari_root, read_metadata
from rlctl.errors import RlctlError, UsageError

DEFAULT_REMOTE = "hf://farama-minari"
"""Minari's own choice; the environment variable MINARI_REMOTE names another (`hf://ORG`, `gcp://BUCKET`)."""
CHUNK = 1 << 20
TIMEOUT = 30.0
"""Seconds a server may stay silent."""

Progress = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all where known)."""


class NetworkError(RlctlError):
    """A server that cannot be reached, or a connection that broke. Worth another try."""


class NotThere(NetworkError):
    """The server answers, and has no such thing."""


class _PastTheEnd(NetworkError):
    """The server has nothing after the bytes that are here: `size` of the file there, None if it does not say."""

    def __init__(self, message: str, size: int | None) -> None:
        super().__init__(message)
        self.size = size


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch."""

    url: str
    path: str
    """Where it belongs, relative to the dataset."""
    size: int | None = None
    digest: tuple[str, str] | None = None
    """(algorithm, hex digest) as published: sha256, md5, or git (SHA-1 of a git blob)."""


# ---------------------------------------------------------------------------------------------------------- one file
def fetch(file: RemoteFile, target: Path, progress: Progress = lambda done, total: None) -> str:
    """Fetch one file to `target`, going on with what an earlier call left; returns its SHA-256.

    NetworkError when the connection fails (what has come is kept), DatasetError when the hash is not the published one
    (what has come is thrown away).
    """
    part, tag = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.etag")
    target.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {}
    etag = tag.read_text() if tag.exists() else ""
    if have and (etag or file.digest):
        headers["Range"] = f"bytes={have}-"
        if etag:
            headers["If-Range"] = etag  # the server sends all of it if the file is another by now
    if not have or have != file.size:
        try:
            _receive(file, part, tag, have, headers, progress)
        except _PastTheEnd as error:
            if error.size != have:  # what was there belongs to another file
                part.unlink()
                return fetch(file, target, progress)
    sha256 = _check(part, file)
    part.replace(target)
    tag.unlink(missing_ok=True)
    return sha256


def _receive(file: RemoteFile, part: Path, tag: Path, have: int, headers: dict[str, str], progress: Progress) -> None:
    """Append to `part`, which has `have` bytes, what the server sends, or write it anew if it sends all."""
    with _opened(file.url, headers) as answer:
        going_on = answer.status == 206 and _range_start(answer) == have
        length = answer.headers.get("Content-Length")
        have = have if going_on else 0
        total = have + int(length) if length else file.size
        new = answer.headers.get("ETag", "")
        tag.write_text("" if new.startswith("W/") else new)  # a weak one does not promise the same bytes
        with part.open("ab" if going_on else "wb") as out:
            progress(have, total)
            while chunk := _read(answer, file.url, have, total):
                out.write(chunk)
                have += len(chunk)
                progress(have, total)
            out.flush()
            os.fsync(out.fileno())
    if total is not None and have < total:
        raise _broken(file.url, have, total)


def _check(part: Path, file: RemoteFile) -> str:
    """SHA-256 of a complete file; DatasetError if size or published digest differ."""
    size = part.stat().st_size
    sha256 = hashlib.sha256()
    kind, want = file.digest or ("sha256", None)
    other: Any = {"md5": hashlib.md5, "git": hashlib.sha1}.get(kind, hashlib.sha256)(usedforsecurity=False)
    if kind == "git":
        other.update(f"blob {size}\0".encode())
    with part.open("rb") as f:
        while chunk := f.read(CHUNK):
            sha256.update(chunk)
            other.update(chunk)
    got = other.hexdigest()
    if (want is not None and got != want) or (file.size is not None and size != file.size):
        part.unlink()
        what = f"{kind} {got[:12]}, published is {want[:12]}" if want else f"{size} bytes, published are {file.size}"
        raise DatasetError(f"{file.url} arrived damaged ({what}): thrown away, run the command again")
    return sha256.hexdigest()


def _read(answer: Any, url: str, have: int, total: int | None) -> bytes:
    try:
        return bytes(answer.read(CHUNK))
    except (OSError, http.client.HTTPException):
        raise _broken(url, have, total) from None


def _broken(url: str, have: int, total: int | None) -> NetworkError:
    of = "" if total is None else f" of {total:,}"
    return NetworkError(
        f"the connection to {_host(url)} broke after {have:,}{of} bytes: run the command again to go on"
    )


def _range_start(answer: Any) -> int:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or url


@contextlib.contextmanager
def _opened(url: str, headers: dict[str, str]) -> Iterator[Any]:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"{url}: only http and https can be fetched")
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404, 410):
            raise NotThere(f"{_host(url)} has no {url} (HTTP {error.code})") from None
        message = f"{_host(url)} answered HTTP {error.code} to {url}: try again later"
        if error.code == 416 and "Range" in headers:
            size = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            raise _PastTheEnd(message, int(size[1]) if size else None) from None
        raise NetworkError(message) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise NetworkError(f"no network: {_host(url)} cannot be reached ({reason})") from None
    with answer:
        yield answer


def _json(url: str) -> tuple[Any, str | None]:
    """A JSON answer, and the address of its next page."""
    with _opened(url, {"Accept": "application/json"}) as answer:
        link = re.search(r'<([^>]+)>;\s*rel="next"', answer.headers.get("Link") or "")
        try:
            return json.loads(answer.read()), link[1] if link else None
        except (OSError, ValueError, http.client.HTTPException):
            raise NetworkError(f"{_host(url)} gave no JSON at {url}: try again later") from None


# ----------------------------------------------------------------------------------------------------------- remotes
def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _bucket_host() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com").rstrip("/")
    return host if "://" in host else f"http://{host}"


def _hub_files(repo: str, folder: str) -> list[RemoteFile]:
    """Files of a dataset repository under `folder`, with SHA-256 for the large and git's hash for the small ones."""
    url: str | None = f"{_hub()}/api/datasets/{repo}/tree/main/{urllib.parse.quote(folder)}?recursive=true"
    out = []
    while url is not None:
        entries, url = _json(url)
        for e in entries:
            if e.get("type") != "file":
                continue
            large = e.get("lfs")
            digest = ("sha256", large["oid"].removeprefix("sha256:")) if large else ("git", e["oid"])
            where = f"{_hub()}/datasets/{repo}/resolve/main/{urllib.parse.quote(e['path'])}"
            out.append(RemoteFile(where, _inside(e["path"], folder), int(e["size"]), digest))
    return out


def _bucket_files(bucket: str, prefix: str) -> list[RemoteFile]:
    """Objects of a bucket under `prefix`, with MD5."""
    base = f"{_bucket_host()}/storage/v1/b/{bucket}/o?prefix={urllib.parse.quote(prefix, safe='')}"
    url: str | None = base
    out = []
    while url is not None:
        page, _ = _json(url)
        for o in page.get("items", []):
            where = f"{_bucket_host()}/{bucket}/{urllib.parse.quote(o['name'])}"
            digest = ("md5", base64.b64decode(o["md5Hash"]).hex()) if "md5Hash" in o else None
            out.append(RemoteFile(where, _inside(o["name"], prefix), int(o["size"]), digest))
        token = page.get("nextPageToken")
        url = f"{base}&pageToken={urllib.parse.quote(token)}" if token else None
    return out


def _inside(path: str, folder: str) -> str:
    """`path` relative to `folder`; a path that leads out of it is refused."""
    relative = PurePosixPath(path).relative_to(folder) if folder else PurePosixPath(path)
    if ".." in relative.parts or relative.is_absolute():
        raise DatasetError(f"the server lists a file outside its dataset: {path}")
    return relative.as_posix()


def _remote(remote: str | None) -> tuple[str, str]:
    name = remote or os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE)
    kind, sep, rest = name.partition("://")
    if not sep or kind not in ("hf", "gcp") or not rest:
        raise UsageError(f"unknown remote '{name}': hf://ORG or gcp://BUCKET")
    return kind, rest.rstrip("/")


def remote_ids(prefix: str, remote: str | None = None) -> list[str]:
    """Ids of the Minari datasets whose id begins with `prefix` ("" for all), sorted."""
    kind, name = _remote(remote)
    if kind == "gcp":
        tail = "/data/metadata.json"
        files = _bucket_files(name, "")
        found = [f.path.removesuffix(tail) for f in files if f.path.endswith(tail)]
    else:
        head = prefix.partition("/")[0]
        repos = [head] if "/" in prefix else [r["id"].partition("/")[2] for r in _json(_authored(name))[0]]
        found = []
        for repo in repos:
            with contextlib.suppress(NotThere):
                meta, _ = _json(f"{_hub()}/datasets/{name}/{repo}/resolve/main/namespace_metadata.json")
                found += meta.get("datasets", [])
    return sorted(i for i in set(found) if i.startswith(prefix))


def _authored(org: str) -> str:
    return f"{_hub()}/api/datasets?author={urllib.parse.quote(org)}&limit=1000"


# ----------------------------------------------------------------------------------------------------------- datasets
def download(
    name: str,
    *,
    remote: str | None = None,
    mirror: str | None = None,
    sha256: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Fetch a dataset; returns its file or folder.

    `name` is a D4RL id (`hopper-medium-v2`), fetched into `d4rl.d4rl_root()`, or a Minari id, fetched into
    `minari_root()`. `remote` (`hf://ORG`, `gcp://BUCKET`) and `mirror` (a URL under which D4RL's files lie as on the
    authors' server, or `hf://ORG/REPO`) name other sources; `sha256` is what a D4RL file must hash to. UsageError when
    it is here already, DatasetError for an unknown name (naming the nearest) or a damaged file, NetworkError.
    """
    if name in d4rl.catalogue():
        return _download_d4rl(name, mirror, sha256, progress)
    if "/" not in name:
        close = difflib.get_close_matches(name, list(d4rl.catalogue()), n=3, cutoff=0.6)
        if close:
            raise DatasetError(f"no dataset '{name}': D4RL has {', '.join(close)}")
    if sha256 is not None or mirror is not None:
        raise UsageError(f"--sha256 and --mirror are for D4RL's single files; '{name}' is a Minari id, see --remote")
    return _download_minari(name, remote, progress)


def _download_d4rl(name: str, mirror: str | None, sha256: str | None, progress: Progress) -> Path:
    here = d4rl.local_file(name)
    if here is not None:
        raise UsageError(f"{name} is here already: {here}")
    path = d4rl.catalogue()[name]
    defaults = [d4rl.MIRROR]
    if path.startswith("gym_mujoco_v2/"):
        defaults.insert(0, d4rl.MUJOCO_V2_MIRROR)
    target = d4rl.d4rl_root() / f"{name}.hdf5"
    failures = []
    for source in [mirror] if mirror else defaults:
        try:
            file = _d4rl_file(source, path)
            if sha256 is not None:
                file = RemoteFile(file.url, file.path, file.size, ("sha256", sha256.lower()))
            got = fetch(file, target, progress)
        except NetworkError as error:
            failures.append(str(error))
            continue
        target.with_suffix(".hdf5.sha256").write_text(f"{got}  {target.name}\n")
        return target
    raise NetworkError("; ".join(dict.fromkeys(failures)) + ("" if mirror else "; --mirror names another source"))


def _d4rl_file(source: str, path: str) -> RemoteFile:
    if not source.startswith("hf://"):
        return RemoteFile(f"{source.rstrip('/')}/{path}", path)
    wanted = PurePosixPath(path).name
    for file in _hub_files(source.removeprefix("hf://"), ""):
        if PurePosixPath(file.path).name == wanted:
            return file
    raise NotThere(f"{source} has no {wanted}")


def _download_minari(name: str, remote: str | None, progress: Progress) -> Path:
    if not MINARI_ID.fullmatch(name):
        raise UsageError(f"'{name}' is neither a D4RL id nor a Minari id (NAMESPACE/NAME-vK)")
    kind, where = _remote(remote)
    root = minari_root()
    target = root / name
    if target.exists():
        raise UsageError(f"{name} is here already: {target}")
    try:
        if kind == "gcp":
            files = _bucket_files(where, f"{name}/")
        else:
            repo, _, folder = name.partition("/")
            files = _hub_files(f"{where}/{repo}", folder)
    except NotThere:
        files = []
    if not files:
        raise DatasetError(f"{kind}://{where} has no dataset '{name}'{_nearest(name, remote)}")
    # a folder of its own until all is there: what an interrupted download leaves is no dataset yet
    hidden = root / f".downloading-{name.replace('/', '-')}"
    total = sum(f.size or 0 for f in files)
    done, lines = 0, []
    for file in files:
        there = hidden / file.path
        before = done
        if there.is_file() and (file.size is None or there.stat().st_size == file.size):
            with there.open("rb") as f:
                got = hashlib.file_digest(f, "sha256").hexdigest()
        else:
            got = fetch(file, there, lambda have, _, before=before: progress(before + have, total))  # type: ignore[misc]
        done += there.stat().st_size
        progress(done, total)
        lines.append(f"{got}  {file.path}\n")
    read_metadata(hidden / "data")
    (hidden / "SHA256SUMS").write_text("".join(lines))
    target.parent.mkdir(parents=True, exist_ok=True)
    for space in [p for p in target.parents if root in p.parents]:  # Minari wants every namespace marked
        if not (space / "namespace_metadata.json").exists():
            (space / "namespace_metadata.json").write_text("{}")
    hidden.rename(target)
    return target


def _nearest(name: str, remote: str | None) -> str:
    """What to say about names like it; nothing if the server will not tell."""
    try:
        ids = remote_ids(name.partition("/")[0] + "/" if "/" in name else "", remote)
    except NetworkError:
        return ""
    close = difflib.get_close_matches(name, ids, n=3, cutoff=0.4)
    return f" (nearest there: {', '.join(close)})" if close else ""
