"""From one format to another: D4RL HDF5, .npz and Minari's three storages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import rlctl_envs
from rlctl.data import minari_files
from rlctl.data.arrays import DatasetError, Origin, Table
from rlctl.data.dataset import is_flat, read
from rlctl.data.flat_files import HDF5, MARK, SUFFIXES, import_h5py
from rlctl.data.reference import OWN_MARK, reference_name, reference_scores
from rlctl.data.write import Played, check_new_id, check_storage, spec_of, to_buffer, write_minari
from rlctl.errors import UsageError


def convert(
    source: str,
    *,
    out: Path | None = None,
    id: str | None = None,
    storage: str = "hdf5",
    env: str | None = None,
    author: str | None = None,
    episode_len: int | None = None,
) -> Path:
    """Write the dataset `source` anew; returns the file or the folder.

    Either `out`, a flat file (.hdf5 or .h5 in D4RL's layout, or .npz), or `id`, a Minari dataset in `storage`.

    - Minari to Minari keeps everything, infos, Dict observations, action units and metadata included.
    - Anything to a flat file: the exact view, observations flattened and actions in [-1, 1], as `read_minari` tells;
      float32. The file keeps the label of its source (D4RL, Minari, own), whatever it is called.
    - A flat file to Minari: the exact view, observations float32, actions a Box of [-1, 1]. `env` names the Gymnasium
      task for the spec. Where the file lacks successors the last row of an episode that timed out is lost, and the
      observation that Minari wants after a terminal row is the last one repeated.

    Either way both flags and all successors that the source knows are kept. UsageError or DatasetError before anything
    is written: no target or two, one that exists, a package that is missing.
    """
    if (out is None) == (id is None):
        raise UsageError("give one target: --out FILE (.hdf5, .npz) or --id NAMESPACE/NAME-vK for a Minari dataset")
    if out is not None:
        if out.suffix not in SUFFIXES:
            raise UsageError(f"{out} should end in .npz or {' or '.join(HDF5)}")
        if out.exists():
            raise UsageError(f"{out} exists: choose another --out")
        if out.suffix in HDF5:
            import_h5py("writing")
        table, origin = read(source, episode_len=episode_len)
        return write_flat(table, out, origin)
    assert id is not None
    check_new_id(id)
    check_storage(storage)
    spec = None
    if env is not None:
        spec = spec_of(rlctl_envs.canonical(env))
    if not is_flat(source):
        return _restore(source, id, storage, spec, author)
    table, origin = read(source, episode_len=episode_len)
    if env is not None:
        _check_fit(source, table, env)
    return _to_minari(table, origin, id, storage, spec, author)


def write_flat(table: Table, path: Path, origin: Origin | None = None) -> Path:
    """Write a table in D4RL's layout: observations, actions, rewards, next_observations, terminals, timeouts.

    An .npz holds the same arrays, uncompressed. `origin` is where the table was read from, None if it was not; the file
    says so (`flat_files.MARK`), lest its name alone make it one of D4RL's. DatasetError without h5py for HDF5.
    """
    mark = {"id": path.stem, "format": "memory"} if origin is None else _source(origin)
    columns = {
        "observations": table.obs,
        "actions": table.action,
        "rewards": table.reward,
        "next_observations": table.next_obs,
        "terminals": table.terminated,
        "timeouts": table.truncated,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent} cannot be made ({error}): choose another --out") from None
    temp = path.with_name(f".{path.name}.tmp")
    try:
        if path.suffix == ".npz":
            with temp.open("wb") as f:
                named = columns | {MARK: np.array(json.dumps(mark))}
                np.savez(f, **named)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
        else:
            with import_h5py("writing").File(temp, "w") as file:
                file.attrs[MARK] = json.dumps(mark)
                for name, x in columns.items():
                    file.create_dataset(name, data=x, compression="gzip", compression_opts=4)
        _sync_and_rename(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    return path


def _check_fit(source: str, table: Table, env: str) -> None:
    try:
        world = rlctl_envs.make(env)
    except ValueError:
        return  # not installed here: it may be named all the same
    world.close()
    dims = table.obs.shape[1], table.action.shape[1]
    if dims != (world.obs_dim, world.act_dim):
        raise UsageError(
            f"{source} has observations of {dims[0]} and actions of {dims[1]} numbers, {world.id} has {world.obs_dim} "
            f"and {world.act_dim}: it was recorded in another task"
        )


def _source(origin: Origin) -> dict[str, str]:
    """What a converted dataset says it was made of."""
    if "converted_from" in origin.meta:
        return dict(origin.meta["converted_from"])
    return {"id": origin.id, "format": OWN_MARK if OWN_MARK in origin.meta else origin.format}


def _sync_and_rename(temp: Path, path: Path) -> None:
    with temp.open("rb") as f:
        os.fsync(f.fileno())
    temp.replace(path)


def _to_minari(table: Table, origin: Origin, id: str, storage: str, spec: Any, author: str | None) -> Path:
    import gymnasium

    box = gymnasium.spaces.Box
    spaces = (
        box(-np.inf, np.inf, (table.obs.shape[1],), np.float32),
        box(-1.0, 1.0, (table.action.shape[1],), np.float32),
    )
    episodes, a = [], 0
    for b in table.ends:
        obs = np.concatenate([table.obs[a:b], table.next_obs[b - 1 : b]])
        parts = (x[a:b] for x in (table.action, table.reward, table.terminated, table.truncated))
        episodes.append(to_buffer(Played(obs, *parts), spaces[1]))
        a = int(b)
    task = reference_name(spec.id if spec is not None else origin.id)
    return write_minari(
        id,
        episodes,
        env=spec,
        spaces=spaces,
        storage=storage,
        metadata={
            "author": author,
            "description": f"Converted from {origin.id} ({origin.format}), exact view, observations float32.",
        },
        marks={"converted_from": _source(origin)},
        ref_scores=reference_scores()[task] if task else None,
    )


def _restore(source: str, id: str, storage: str, spec: Any, author: str | None) -> Path:
    """Minari to Minari, by Minari's own reader and writer."""
    import minari

    data = minari_files.find_minari(source)
    minari_files.read_minari(data)  # a damaged dataset is refused in our words
    try:
        theirs = minari.MinariDataset(data)
        spaces = (theirs.spec.observation_space, theirs.spec.action_space)
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"Minari cannot open {data}: {' '.join(str(error).split())}") from None
    meta = minari_files.read_metadata(data)
    from minari.data_collector import EpisodeBuffer

    episodes = [
        EpisodeBuffer(
            observations=_typed(e.observations, spaces[0]),
            actions=_typed(e.actions, spaces[1]),
            rewards=e.rewards,
            terminations=e.terminations,
            truncations=e.truncations,
            infos=e.infos or None,
        )
        for e in theirs.iterate_episodes()
    ]
    keep = ("algorithm_name", "code_permalink", "description", "requirements")
    people = {k: set(meta[k]) for k in ("author", "author_email") if meta.get(k)}
    low, high = meta.get("ref_min_score"), meta.get("ref_max_score")
    return write_minari(
        id,
        episodes,
        env=spec or theirs.spec.env_spec,
        spaces=spaces,
        storage=storage,
        metadata={k: meta[k] for k in keep if k in meta} | people | ({"author": author} if author else {}),
        marks={k: meta[k] for k in (OWN_MARK, "converted_from") if k in meta},
        ref_scores=None if low is None or high is None else (low, high),
    )


def _typed(values: Any, space: Any) -> Any:
    """Arrays in the type their space declares: Arrow refuses others, HDF5 keeps whatever was recorded."""
    if isinstance(values, dict):
        return {k: _typed(x, space[k]) for k, x in values.items()}
    return values.astype(space.dtype, copy=False) if isinstance(values, np.ndarray) else values
