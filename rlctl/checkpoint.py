"""Checkpoints: everything a run needs to go on bit for bit, without a single pickle.

    checkpoints/step_000100000/
      manifest.json          format, counters, package versions, SHA-256 of every file and of itself
      agent.safetensors      parameters and buffers (normalisers included)
      optim.safetensors      Adam moments; their hyperparameters are in the manifest
      rng.safetensors        generators of the agent and torch's global one
      run.safetensors        half-filled metric averages, running episode returns
      env/ buffer/           whatever those parts write themselves
    checkpoints/latest       the name of the newest complete checkpoint
    checkpoints/best/        agent only, of the best evaluation so far

A checkpoint is written under a temporary name, synced and renamed: a `kill -9` at any moment leaves the one before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlctl.errors import UsageError
from rlctl.provenance import versions
from rlctl.types import Agent

FORMAT = 2


class Part(Protocol):
    """A piece of a run that saves itself: a buffer, an environment."""

    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Write into the empty `folder`; `previous` holds the same part of an earlier checkpoint, to link from."""

    def load(self, folder: Path) -> None:
        """Undo `save`."""


@dataclass
class Snapshot:
    """A checkpoint in memory, but for the parts."""

    state: dict[str, Any]
    """JSON-able: counters, cadence marks, file offsets."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step that survives a crash."""
    temp = path.with_name(f".{path.name}.tmp")
    with temp.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temp.replace(path)
    _sync_folder(path.parent)


def save(
    root: Path,
    name: str,
    agent: Agent,
    parts: Mapping[str, Part],
    snap: Snapshot,
    keep: int,
    carried: Mapping[str, Path] | None = None,
) -> Path:
    """Write checkpoint `name` under `root`, point `latest` at it, and drop all but the newest `keep`.

    `carried` are folders of parts restored from an earlier checkpoint that nobody has claimed yet (a later stage of the
    run will): they go into this one as they are.
    """
    root.mkdir(parents=True, exist_ok=True)
    previous = latest(root)
    old_manifest = None if previous is None else json.loads((previous / "manifest.json").read_text())
    for abandoned in root.glob(".tmp-*"):  # of a run that was killed while it wrote
        shutil.rmtree(abandoned, ignore_errors=True)
    temp = root / f".tmp-{name}"
    temp.mkdir()

    try:
        _write(temp, agent, parts, snap, carried or {}, previous, old_manifest)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)  # on a full disk it is what takes the rest
        raise
    target = root / name
    if target.exists():  # left by a run that died between the rename and `latest`
        shutil.rmtree(target)
    temp.rename(target)
    _sync_folder(root)
    write_atomically(root / "latest", name)
    for stale in sorted(p for p in root.glob("step_*") if p.is_dir())[:-keep]:
        if stale != target:
            shutil.rmtree(stale)
    return target


def _write(
    temp: Path,
    agent: Agent,
    parts: Mapping[str, Part],
    snap: Snapshot,
    carried: Mapping[str, Path],
    previous: Path | None,
    old_manifest: dict[str, Any] | None,
) -> None:
    """All of a checkpoint, into the empty folder `temp`."""
    moments, groups = pack_optimizers(agent)
    save_file(_flat(agent.state_dict()), temp / "agent.safetensors")
    save_file(moments, temp / "optim.safetensors")
    rng = {f"agent.{k}": g.get_state() for k, g in agent.rng.items()} | {"torch": torch.get_rng_state()}
    save_file(rng, temp / "rng.safetensors")
    save_file(_flat(snap.tensors), temp / "run.safetensors")
    for part_name, part in parts.items():
        (temp / part_name).mkdir()
        before = None if previous is None else previous / part_name
        part.save(temp / part_name, before if before is not None and before.exists() else None)
    for part_name, folder in carried.items():
        shutil.copytree(folder, temp / part_name)

    manifest = {
        "format": FORMAT,
        "agent": type(agent).__name__,
        "versions": versions(),
        "counters": agent.counters,
        "optim": groups,
        "parts": list(parts),
        "state": snap.state,
        "files": _hashes(temp, previous, old_manifest),
    }
    manifest["digest"] = _digest(manifest)
    (temp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in temp.rglob("*"):
        _sync_file(file)
    _sync_folder(temp)


def disk_full(e: BaseException) -> bool:
    """Whether an error of writing says that there is no room."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(e, SafetensorError):  # tells the number in words alone
        return any(f"os error {code}" in str(e) for code in codes)
    return isinstance(e, OSError) and e.errno in codes


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, or None."""
    pointer = root / "latest"
    if pointer.exists() and (root / pointer.read_text().strip() / "manifest.json").exists():
        return root / pointer.read_text().strip()
    complete = sorted(p.parent for p in root.glob("step_*/manifest.json"))
    return complete[-1] if complete else None


def newest_intact(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files match their hashes, None if nothing was ever saved.

    Says through `warn` which ones it had to pass over and sets them aside as `damaged-*`, so that no later checkpoint
    links to their files. UsageError, with everything left in place, if there are checkpoints and none is intact.
    """
    pointer = root / "latest"
    named = pointer.read_text().strip() if pointer.exists() else ""
    folders = sorted((p for p in root.glob("step_*") if p.is_dir()), key=lambda p: (p.name == named, p.name))
    passed: list[Path] = []
    for folder in reversed(folders):
        bad = damaged(folder)
        if not bad:
            for p in passed:
                aside = root / f"damaged-{p.name}"
                shutil.rmtree(aside, ignore_errors=True)
                p.rename(aside)
            if passed:
                write_atomically(root / "latest", folder.name)
            return folder
        warn(f"checkpoint {folder.name} is damaged ({', '.join(bad)}); trying the one before")
        passed.append(folder)
    if passed:
        raise UsageError(f"every checkpoint in {root} is damaged: train anew, or restore one from a backup")
    return None


def progress(root: Path) -> int:
    """Steps made at the newest checkpoint under `root`; 0 if there is none that can be read."""
    folder = latest(root)
    try:
        return 0 if folder is None else int(json.loads((folder / "manifest.json").read_text())["state"]["progress"])
    except (ValueError, KeyError):
        return 0


def damaged(folder: Path) -> list[str]:
    """Files of a checkpoint that are missing or differ from their recorded hash."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, digest = manifest["files"], manifest.pop("digest", None)
    except (OSError, ValueError, KeyError):
        return ["manifest.json"]
    if digest is not None and digest != _digest(manifest):
        return ["manifest.json"]
    return [name for name, digest in files.items() if not (folder / name).is_file() or _sha256(folder / name) != digest]


def load(folder: Path, agent: Agent) -> Snapshot:
    """Restore agent, optimisers and generators from `folder`; parts are loaded by their owners."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != FORMAT:
        raise UsageError(f"{folder} has checkpoint format {manifest['format']}, this version reads {FORMAT}")
    if manifest["agent"] != type(agent).__name__:
        raise UsageError(f"{folder} holds an agent of class {manifest['agent']}, not {type(agent).__name__}")
    load_agent(folder, agent)
    unpack_optimizers(agent, load_file(folder / "optim.safetensors"), manifest["optim"])
    agent.counters.update(manifest["counters"])
    rng = load_file(folder / "rng.safetensors")
    for name, g in agent.rng.items():
        g.set_state(rng[f"agent.{name}"])
    torch.set_rng_state(rng["torch"])
    return Snapshot(manifest["state"], load_file(folder / "run.safetensors", device=str(agent.spec.device)))


def save_agent(folder: Path, agent: Agent, note: dict[str, Any]) -> None:
    """Write the agent alone (for acting, not for resuming) with a JSON note, atomically."""
    temp = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    save_file(_flat(agent.state_dict()), temp / "agent.safetensors")
    record = note | {"sha256": _sha256(temp / "agent.safetensors")}
    (temp / "note.json").write_text(json.dumps(record, indent=1))
    for file in temp.iterdir():
        _sync_file(file)
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_agent(folder: Path, agent: Agent) -> None:
    """Load parameters and buffers into `agent`; UsageError when they do not fit it, or are not what was written."""
    file = folder / "agent.safetensors"
    written = _recorded_hash(folder)
    if written is not None and file.is_file() and _sha256(file) != written:
        raise UsageError(f"{file} is damaged: it differs from what was written; name another checkpoint of the run")
    try:
        weights = load_file(folder / "agent.safetensors", device=str(agent.spec.device))
    except (OSError, SafetensorError) as e:
        raise UsageError(f"{folder / 'agent.safetensors'} is missing or damaged: {e}") from e
    try:
        agent.load_state_dict(weights)
    except RuntimeError as e:
        raise UsageError(f"{folder} does not fit {type(agent).__name__} as configured: {e}") from e


def _recorded_hash(folder: Path) -> str | None:
    """SHA-256 of a checkpoint's agent as it was written; None where nobody recorded one."""
    try:
        if (folder / "manifest.json").exists():
            found = json.loads((folder / "manifest.json").read_text())["files"]["agent.safetensors"]
        else:
            found = json.loads((folder / "note.json").read_text()).get("sha256")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{folder} is damaged: its record of what was written cannot be read ({e})") from e
    return None if found is None else str(found)


def pack_optimizers(agent: Agent) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimiser state as (flat tensors, JSON-able hyperparameters)."""
    tensors: dict[str, Tensor] = {}
    groups: dict[str, Any] = {}
    for name, opt in agent.optimizers().items():
        state = opt.state_dict()
        groups[name] = state["param_groups"]
        for index, slots in state["state"].items():
            tensors |= {f"{name}.{index}.{slot}": value for slot, value in slots.items()}
    return _flat(tensors), groups


def unpack_optimizers(agent: Agent, tensors: dict[str, Tensor], groups: dict[str, Any]) -> None:
    """Undo `pack_optimizers`."""
    for name, opt in agent.optimizers().items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, index, slot = key.rsplit(".", 2)
            if owner == name:
                state.setdefault(int(index), {})[slot] = value
        opt.load_state_dict({"state": state, "param_groups": groups[name]})


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share or do not fill their storage
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


def _hashes(folder: Path, previous: Path | None, old: dict[str, Any] | None) -> dict[str, str]:
    """SHA-256 by relative path; a file hard-linked from the previous checkpoint keeps the hash recorded there."""
    out = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        known = None if old is None else old["files"].get(name)
        linked = previous is not None and (previous / name).exists() and file.samefile(previous / name)
        out[name] = known if linked and known is not None else _sha256(file)
    return out


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync_file(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as f:
            os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
