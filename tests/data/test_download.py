"""Downloads against a server of our own: listing, hashes, resume, and every way to fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from dataset_files import Write, episode

from rlctl.data import download as d
from rlctl.data.arrays import DatasetError
from rlctl.data.dataset import load_dataset
from rlctl.errors import UsageError

BODY = bytes(range(256)) * 400


class Server:
    """Answers what `answers` holds, with ranges and ETags; breaks connections off where `breaks` says."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.breaks: dict[str, int] = {}
        """Bytes after which the next answer of a path is cut off, once."""
        self.etags = True
        self.log: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                path = unquote(self.path)
                want = self.headers.get("Range")
                outer.log.append((path, want))
                body = outer.answers.get(path)
                if body is None:
                    self.send_error(404)
                    return
                etag = f'"{hashlib.md5(body).hexdigest()}"'
                start = int(re.findall(r"bytes=(\d+)-", want)[0]) if want else 0
                if start and self.headers.get("If-Range", etag) != etag:
                    start = 0
                if start and start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                if outer.etags:
                    self.send_header("ETag", etag)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                part = body[start : start + outer.breaks.pop(path, len(body))]
                self.wfile.write(part)
                if start + len(part) < len(body):
                    self.close_connection = True

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    s = Server()
    for name in ("HF_ENDPOINT", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, s.url)
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(d, "CHUNK", 1000)
    yield s
    s.http.shutdown()
    s.http.server_close()


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# ------------------------------------------------------------------------------------------------------------ one file
def test_fetch_checks_and_reports(server: Server, tmp_path: Path) -> None:
    server.answers["/x"] = BODY
    seen: list[tuple[int, int | None]] = []
    file = d.RemoteFile(f"{server.url}/x", "x", len(BODY), ("sha256", sha(BODY)))
    assert d.fetch(file, tmp_path / "sub" / "x", lambda a, b: seen.append((a, b))) == sha(BODY)
    assert (tmp_path / "sub" / "x").read_bytes() == BODY
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["x"]
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert [a for a, _ in seen] == sorted(a for a, _ in seen)


@pytest.mark.parametrize("more", [b"", b"of a longer file"])
def test_what_was_stopped_after_its_last_byte_is_taken(server: Server, tmp_path: Path, more: bytes) -> None:
    server.answers["/x"] = BODY
    etag = f'"{hashlib.md5(BODY).hexdigest()}"'
    (tmp_path / ".x.part").write_bytes(BODY + more)
    (tmp_path / ".x.etag").write_text(etag)
    assert d.fetch(d.RemoteFile(f"{server.url}/x", "x"), tmp_path / "x") == sha(BODY)
    assert [want for _, want in server.log] == [f"bytes={len(BODY + more)}-"] + ([None] if more else [])


@pytest.mark.parametrize("published", [True, False])
def test_resume_goes_on_where_it_broke(server: Server, tmp_path: Path, published: bool) -> None:
    server.answers["/x"], server.breaks["/x"] = BODY, 30_000
    file = d.RemoteFile(f"{server.url}/x", "x", len(BODY), ("sha256", sha(BODY)) if published else None)
    with pytest.raises(d.NetworkError, match=r"broke after 30,000 of 102,400 bytes: run the command again"):
        d.fetch(file, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    d.fetch(file, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.log == [("/x", None), ("/x", "bytes=30000-")]


def test_resume_starts_anew_when_the_file_has_changed(server: Server, tmp_path: Path) -> None:
    server.answers["/x"], server.breaks["/x"] = BODY, 30_000
    file = d.RemoteFile(f"{server.url}/x", "x")
    with pytest.raises(d.NetworkError):
        d.fetch(file, tmp_path / "x")
    server.answers["/x"] = BODY[::-1]
    assert d.fetch(file, tmp_path / "x") == sha(BODY[::-1])


def test_without_etag_or_hash_nothing_is_trusted(server: Server, tmp_path: Path) -> None:
    server.etags = False
    server.answers["/x"], server.breaks["/x"] = BODY, 30_000
    file = d.RemoteFile(f"{server.url}/x", "x")
    with pytest.raises(d.NetworkError):
        d.fetch(file, tmp_path / "x")
    d.fetch(file, tmp_path / "x")
    assert server.log[-1] == ("/x", None)


@pytest.mark.parametrize("kind", ["sha256", "md5", "git"])
def test_hashes(server: Server, tmp_path: Path, kind: str) -> None:
    digests = {
        "sha256": sha(BODY),
        "md5": hashlib.md5(BODY).hexdigest(),
        "git": hashlib.sha1(b"blob 102400\0" + BODY).hexdigest(),
    }
    server.answers["/x"] = BODY
    good = d.RemoteFile(f"{server.url}/x", "x", len(BODY), (kind, digests[kind]))
    assert d.fetch(good, tmp_path / "x") == sha(BODY)
    bad = d.RemoteFile(f"{server.url}/x", "x", len(BODY), (kind, digests[kind][::-1]))
    with pytest.raises(DatasetError, match=f"arrived damaged .{kind} .*thrown away"):
        d.fetch(bad, tmp_path / "y")
    assert [p.name for p in tmp_path.iterdir() if "y" in p.name and p.suffix == ".part"] == []


def test_a_wrong_size_is_damage(server: Server, tmp_path: Path) -> None:
    server.answers["/x"] = BODY
    with pytest.raises(DatasetError, match="102400 bytes, published are 5"):
        d.fetch(d.RemoteFile(f"{server.url}/x", "x", 5), tmp_path / "x")


def test_only_http(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only http and https"):
        d.fetch(d.RemoteFile("file:///etc/hostname", "x"), tmp_path / "x")


# ---------------------------------------------------------------------------------------------------------------- D4RL
def d4rl_body(write_d4rl: Write) -> bytes:
    return write_d4rl("source.hdf5", [episode(0, 4, "terminated"), episode(1, 3)]).read_bytes()


def test_d4rl_from_its_mirror(server: Server, write_d4rl: Write, tmp_path: Path) -> None:
    body = d4rl_body(write_d4rl)
    server.answers["/base/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"] = body
    target = d.download("hopper-medium-replay-v2", mirror=f"{server.url}/base/")
    assert target == tmp_path / "d4rl" / "hopper-medium-replay-v2.hdf5"
    assert (target.parent / "hopper-medium-replay-v2.hdf5.sha256").read_text() == f"{sha(body)}  {target.name}\n"
    data = load_dataset("hopper-medium-replay-v2")
    assert (len(data), data.record()["benchmark"]) == (7, "D4RL")
    with pytest.raises(UsageError, match="here already"):
        d.download("hopper-medium-replay-v2")


def test_d4rl_with_a_hash_of_ones_own(server: Server, write_d4rl: Write) -> None:
    body = d4rl_body(write_d4rl)
    server.answers["/ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"] = body
    with pytest.raises(DatasetError, match="arrived damaged"):
        d.download("antmaze-umaze-v2", mirror=server.url, sha256="0" * 64)
    d.download("antmaze-umaze-v2", mirror=server.url, sha256=sha(body).upper())


def test_d4rl_mirror_that_publishes_hashes(server: Server, write_d4rl: Write) -> None:
    body = d4rl_body(write_d4rl)
    entry = {"type": "file", "path": "hopper_medium-v2.hdf5", "size": len(body), "oid": "0", "lfs": {"oid": sha(body)}}
    server.answers["/api/datasets/imone/D4RL/tree/main/?recursive=true"] = json.dumps([entry]).encode()
    server.answers["/datasets/imone/D4RL/resolve/main/hopper_medium-v2.hdf5"] = body
    d.download("hopper-medium-v2")  # the default for MuJoCo v2
    assert len(load_dataset("hopper-medium-v2")) == 7


def test_mirrors_are_tried_in_turn(server: Server, write_d4rl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/gym_mujoco_v2/hopper_medium-v2.hdf5"] = d4rl_body(write_d4rl)
    monkeypatch.setattr("rlctl.data.d4rl.MIRROR", server.url)
    d.download("hopper-medium-v2")
    assert [p for p, _ in server.log] == [
        "/api/datasets/imone/D4RL/tree/main/?recursive=true",
        "/gym_mujoco_v2/hopper_medium-v2.hdf5",
    ]


# -------------------------------------------------------------------------------------------------------------- Minari
def serve_minari(server: Server, write_minari: Write, root: Path, kind: str) -> str:
    folder = write_minari("toy/hopper/set-v0", [episode(0, 4, "terminated"), episode(1, 3)], env="Hopper-v5")
    want = load_dataset("toy/hopper/set-v0").sha256
    hub, bucket = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        body, relative = path.read_bytes(), path.relative_to(root / "toy").as_posix()
        large = path.suffix == ".hdf5"
        oid = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
        hub.append({"type": "file", "path": relative, "size": len(body), "oid": oid})
        if large:
            hub[-1]["lfs"] = {"oid": sha(body), "size": len(body)}
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        bucket.append({"name": f"toy/{relative}", "size": str(len(body)), "md5Hash": md5})
        server.answers[f"/datasets/farama-minari/toy/resolve/main/{relative}"] = body
        server.answers[f"/some-bucket/toy/{relative}"] = body
    hub.append({"type": "directory", "path": "hopper/set-v0/data", "size": 0, "oid": "0"})
    server.answers["/api/datasets/farama-minari/toy/tree/main/hopper/set-v0?recursive=true"] = json.dumps(hub).encode()
    server.answers["/storage/v1/b/some-bucket/o?prefix=toy/hopper/set-v0/"] = json.dumps({"items": bucket}).encode()
    server.answers["/storage/v1/b/some-bucket/o?prefix="] = json.dumps({"items": bucket}).encode()
    names = {"datasets": ["toy/hopper/set-v0", "toy/other-v1"]}
    server.answers["/datasets/farama-minari/toy/resolve/main/namespace_metadata.json"] = json.dumps(names).encode()
    server.answers["/api/datasets?author=farama-minari&limit=1000"] = b'[{"id": "farama-minari/toy"}]'
    shutil.rmtree(root)
    return want


@pytest.mark.parametrize("remote", ["hf://farama-minari", "gcp://some-bucket"])
def test_minari_with_resume(server: Server, write_minari: Write, root: Path, remote: str) -> None:
    import minari

    want = serve_minari(server, write_minari, root, remote)
    main = next(p for p in server.answers if p.endswith("main_data.hdf5") and ("bucket" in p) == ("gcp" in remote))
    server.breaks[main] = 2000
    with pytest.raises(d.NetworkError, match="broke after 2,000 of"):
        d.download("toy/hopper/set-v0", remote=remote)
    with pytest.raises(DatasetError, match="no dataset"):
        load_dataset("toy/hopper/set-v0")  # half a dataset is none
    target = d.download("toy/hopper/set-v0", remote=remote)
    assert (main, "bytes=2000-") in server.log
    assert load_dataset("toy/hopper/set-v0").sha256 == want
    assert minari.load_dataset("toy/hopper/set-v0").total_steps == 7
    assert "toy/hopper/set-v0" in minari.list_local_datasets()
    sums = (target / "SHA256SUMS").read_text()
    assert f"{sha((target / 'data/main_data.hdf5').read_bytes())}  data/main_data.hdf5\n" in sums
    assert d.remote_ids("toy/", remote)[0] == "toy/hopper/set-v0"
    assert "toy/hopper/set-v0" in d.remote_ids("", remote)
    with pytest.raises(UsageError, match="here already"):
        d.download("toy/hopper/set-v0", remote=remote)


def test_unknown_ids_name_the_nearest(server: Server, write_minari: Write, root: Path) -> None:
    serve_minari(server, write_minari, root, "hf")
    with pytest.raises(DatasetError, match=r"no dataset 'toy/hoper/set-v0' \(nearest there: toy/hopper/set-v0"):
        d.download("toy/hoper/set-v0")
    with pytest.raises(DatasetError, match="D4RL has hopper-medium-v2"):
        d.download("hoper-medium-v2")
    for bad, match in (("toy", "neither a D4RL id nor a Minari id"), ("../x-v0", "neither")):
        with pytest.raises(UsageError, match=match):
            d.download(bad)
    with pytest.raises(UsageError, match="unknown remote 's3://x'"):
        d.download("toy/set-v0", remote="s3://x")
    with pytest.raises(UsageError, match="for D4RL's single files"):
        d.download("toy/set-v0", sha256="00")


def test_a_listing_cannot_lead_out_of_the_dataset(server: Server) -> None:
    entry = {"type": "file", "path": "set-v0/../../evil", "size": 1, "oid": "0"}
    server.answers["/api/datasets/farama-minari/toy/tree/main/set-v0?recursive=true"] = json.dumps([entry]).encode()
    with pytest.raises(DatasetError, match="outside its dataset"):
        d.download("toy/set-v0")


def test_no_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("rlctl.data.d4rl.MIRROR", "http://127.0.0.1:9/x")
    for name in ("mujoco/hopper/medium-v0", "hopper-medium-v2"):
        with pytest.raises(d.NetworkError, match=r"no network: 127.0.0.1 cannot be reached \(.*refused\)") as caught:
            d.download(name)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1
