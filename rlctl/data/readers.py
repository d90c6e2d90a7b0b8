"""Read datasets from disk into flat arrays of transitions: Minari folders and D4RL-style HDF5 files.

Both readers give the exact view: the true successor of every row, `terminated` and `truncated` apart, episodes
contiguous and never a pair that crosses from one episode into the next. Neither builds an environment. What a file
cannot tell: a recorder that set its terminal flag at the time limit looks like a true end, and is read as one.

Memory: the arrays are allocated once, at their final size and type, and filled episode by episode or block by block.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlctl.errors import UsageError

BLOCK = 1 << 14
"""Rows read, or checked, at a time."""
MEBI = 1 << 20

Array = NDArray[Any]


class DatasetError(UsageError):
    """A dataset that is not there, cannot be read or is not what was expected. One line: what came, what to do."""


class Table(NamedTuple):
    """Transitions of whole episodes, one after the other. `M` rows, `E` episodes; floats are float32."""

    obs: Array
    """[M, O] as stored."""
    action: Array
    """[M, A] in units of [-1, 1]."""
    reward: Array
    """[M] as stored."""
    next_obs: Array
    """[M, O] the true successor; where the row terminates and the file lacks it, `obs` again (its value is masked)."""
    terminated: Array
    """[M] bool."""
    truncated: Array
    """[M] bool."""
    ends: Array
    """[E] int64, one past the last row of each episode."""
    returns: Array
    """[E] float64, sum of the stored rewards, those of rows that could not be kept included."""
    env_id: str | None
    """Gymnasium id of the task, where the file names it."""
    action_box: tuple[Array, Array] | None
    """Low and high [A] that the stored actions were mapped from, None where they are as stored."""


# ------------------------------------------------------------------------------------------------------------- Minari
def minari_root() -> Path:
    """Where Minari keeps its datasets: MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    named = os.environ.get("MINARI_DATASETS_PATH")
    return Path(named).expanduser() if named else Path.home() / ".minari" / "datasets"


def local_ids(root: Path) -> list[str]:
    """Ids of the Minari datasets under `root`, sorted."""
    found = root.rglob("data/metadata.json") if root.is_dir() else iter(())
    return sorted(path.parent.parent.relative_to(root).as_posix() for path in found)


def find_minari(source: str) -> Path:
    """The `data` folder of a Minari id or of a path to a dataset; DatasetError naming the nearest local ids."""
    root = minari_root()
    for folder in (root / source, Path(source).expanduser()):
        for data in (folder / "data", folder):
            if (data / "metadata.json").is_file():
                return data
    ids = local_ids(root)
    close = difflib.get_close_matches(source, ids, n=3, cutoff=0.4) or ids[:3]
    hint = f"nearest there: {', '.join(close)}" if close else "there is none; MINARI_DATASETS_PATH names another root"
    raise DatasetError(f"no dataset '{source}' in {root} ({hint}); `minari download {source}` fetches a public one")


def minari_id(data: Path) -> str:
    """The dataset id of a Minari `data` folder, the folder's own name where the metadata has none."""
    return str(_metadata(data).get("dataset_id") or data.parent.name)


def read_minari(data: Path) -> Table:
    """Read the `data` folder of a Minari dataset stored as HDF5.

    - The successor of row t is `observations[t + 1]`, exact at a truncation too.
    - The last row of an episode that carries neither flag (an unfinished episode) is truncated. A flag in the middle of
      a stored episode ends an episode there.
    - Dict observations are concatenated in sorted key order, nested ones depth first.
    - Actions of a bounded Box are mapped to [-1, 1]: the unit in which agents act and in which tasks take actions.
    """
    meta = _metadata(data)
    fmt = meta.get("data_format", "hdf5")
    if fmt != "hdf5":
        raise DatasetError(f"{data} is stored as {fmt}; only Minari's HDF5 format is read: convert the dataset to hdf5")
    _check_space(meta.get("observation_space"), "observation", data, allow_dict=True)
    box = _check_space(meta.get("action_space"), "action", data, allow_dict=False)

    with _open(data / "main_data.hdf5") as file:
        names = sorted((n for n in file if n.startswith("episode_")), key=lambda n: int(n.removeprefix("episode_")))
        if not names:
            raise DatasetError(f"{data} holds no episodes")
        lengths = [len(_get(file, f"{name}/rewards", data)) for name in names]
        m = sum(lengths)
        names = [name for name, t in zip(names, lengths, strict=True) if t]
        if m == 0:
            raise DatasetError(f"{data} holds no transitions")
        obs_dim = sum(_width(leaf) for leaf in _leaves(file, f"{names[0]}/observations", data))
        act_dim = _width(_get(file, f"{names[0]}/actions", data))
        out = _allocate(m, obs_dim, act_dim)
        reward64 = np.empty(m, np.float64)
        stop = np.zeros(m, bool)
        a = 0
        for name in names:
            episode = _get(file, name, data)
            reward = _read(_get(episode, "rewards", data)).reshape(-1)
            leaves = [_read(leaf) for leaf in _leaves(episode, "observations", data)]
            t = len(reward)
            obs = np.concatenate([x.reshape(len(x), -1) for x in leaves], 1) if len(leaves) > 1 else leaves[0]
            action = _read(_get(episode, "actions", data))
            terminated, truncated = (_read(_get(episode, k, data)) for k in ("terminations", "truncations"))
            steps = {"actions": action, "terminations": terminated, "truncations": truncated}
            _check_lengths(steps, t, f"{data}: {name}")
            for leaf in leaves:
                _check_lengths({"observations": leaf}, t + 1, f"{data}: {name}")
            b = a + t
            obs, action = obs.reshape(t + 1, -1), action.reshape(t, -1)
            if obs.shape[1] != obs_dim or action.shape[1] != act_dim:
                raise DatasetError(
                    f"{data}: {name} has observations of {obs.shape[1]} and actions of {action.shape[1]} numbers, "
                    f"the first episode {obs_dim} and {act_dim}"
                )
            out.obs[a:b], out.next_obs[a:b] = obs[:-1], obs[1:]
            out.action[a:b], reward64[a:b] = action, reward
            out.terminated[a:b], out.truncated[a:b] = terminated, truncated
            stop[b - 1] = True
            a = b
    stop |= out.terminated | out.truncated
    out.truncated[stop & ~out.terminated] = True
    out.reward[:] = reward64
    if box is not None:
        low, high = box
        if low.shape not in ((act_dim,), ()):
            raise DatasetError(f"{data}: the action space has shape {low.shape}, the stored actions {act_dim} numbers")
        out.action[:] = 2 * (out.action - low) / (high - low) - 1
    ends = np.flatnonzero(stop) + 1
    return _finish(out._replace(env_id=_env_id(meta), action_box=box), ends, _sums(reward64, ends), str(data))


def _metadata(data: Path) -> dict[str, Any]:
    try:
        meta = json.loads((data / "metadata.json").read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{data / 'metadata.json'} cannot be read ({error}): fetch the dataset again") from None
    if not isinstance(meta, dict):
        raise DatasetError(f"{data / 'metadata.json'} is not a JSON object: fetch the dataset again")
    return meta


def _env_id(meta: dict[str, Any]) -> str | None:
    try:
        return str(json.loads(meta["env_spec"])["id"])
    except (KeyError, TypeError, ValueError):
        return None


def _check_space(text: Any, what: str, where: Path, *, allow_dict: bool) -> tuple[Array, Array] | None:
    """Refuse a space that does not flatten to one vector; low and high of a bounded Box other than [-1, 1]."""
    if text is None:  # files written before Minari stored the spaces
        return None
    space = json.loads(text) if isinstance(text, str) else text
    kind = space["type"]
    if kind == "Dict" and allow_dict:
        for key, sub in space["subspaces"].items():
            _check_space(sub, f"{what} '{key}'", where, allow_dict=True)
        return None
    allowed = "vectors (Box, or Dict of Box)" if allow_dict else "vectors (Box)"
    if kind != "Box":
        raise DatasetError(f"{where}: the {what} space is {kind}; only {allowed} can be read")
    if len(space["shape"]) > 1:
        raise DatasetError(f"{where}: the {what} space is a Box of shape {tuple(space['shape'])}; only {allowed}")
    low, high = (np.asarray(space[k], np.float32) for k in ("low", "high"))
    if allow_dict or not (np.isfinite(low) & np.isfinite(high) & (high > low)).all():
        return None
    return None if (low == -1).all() and (high == 1).all() else (low, high)


def _leaves(file: Any, name: str, where: Path) -> list[Any]:
    """The arrays of a (nested) Dict in sorted key order, or the one array itself."""
    node = _get(file, name, where)
    if hasattr(node, "dtype"):
        return [node]
    return [leaf for key in sorted(node) for leaf in _leaves(node, key, where)]


# --------------------------------------------------------------------------------------------------------------- D4RL
def find_hdf5(source: str) -> Path:
    """The path of an HDF5 file; DatasetError naming the nearest files of its folder."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.4) or beside[:3]
    hint = f"nearest there: {', '.join(close)}" if close else "no HDF5 file is in that folder"
    raise DatasetError(f"no file {path} ({hint})")


SUFFIXES = (".hdf5", ".h5")


def read_d4rl(path: Path, episode_len: int | None = None) -> Table:
    """Read a D4RL-style HDF5 file: flat arrays of N rows, episodes one after the other.

    Read are `observations` [N, O], `actions` [N, A], `rewards` and `terminals` ([N] or [N, 1]) and, where present,
    `next_observations` [N, O] and `timeouts`; other keys are ignored (metadata arrays have lengths of their own).

    An episode ends at a terminal, at a timeout and at the last row. In a file without `timeouts` it also ends where
    `next_observations[i]` differs from `observations[i + 1]` by more than 1e-6, or, in a file without either,
    `episode_len` steps after it began (DatasetError when that is not given).

    With `next_observations` every row is kept, and the last row of an episode that is not terminal is truncated.
    Without, the successor is the next row of the same episode: the last row of an episode that is not terminal has none
    and is dropped, the row before it carries `truncated`; a terminal row is kept with `next_obs` = `obs`, as its value
    is masked. `returns` count the dropped rewards. Where a terminal and a timeout coincide both flags are kept.
    """
    where = str(path)
    with _open(path) as file:
        keys = {k: _get(file, k, path) for k in ("observations", "actions", "rewards", "terminals")}
        keys |= {k: _get(file, k, path) for k in ("next_observations", "timeouts") if k in file}
        n = len(keys["rewards"])
        _check_lengths(keys, n, where)
        if n == 0:
            raise DatasetError(f"{where} holds no transitions")
        for k, x in keys.items():
            vector = k in ("observations", "next_observations", "actions")
            if (len(x.shape) != 2) if vector else (x.size != n):
                raise DatasetError(
                    f"{where}: {k} has shape {x.shape}, expected {'[N, D]' if vector else '[N] or [N, 1]'}"
                )
        observations, actions = keys["observations"], keys["actions"]
        successors = keys.get("next_observations")
        if successors is not None and successors.shape != observations.shape:
            raise DatasetError(
                f"{where}: next_observations has shape {successors.shape}, observations {observations.shape}"
            )
        reward = np.asarray(keys["rewards"][()], np.float64).reshape(-1)
        terminal = np.asarray(keys["terminals"][()]).reshape(-1) != 0
        if "timeouts" in keys:
            timeout = np.asarray(keys["timeouts"][()]).reshape(-1) != 0
        elif successors is not None:
            timeout = _jumps(observations, successors) & ~terminal
        elif episode_len is not None:
            timeout = _step_limit(terminal, episode_len) & ~terminal
        else:
            raise DatasetError(
                f"{where} has neither timeouts nor next_observations, so where an episode was cut cannot be told: "
                "pass episode_len, the step limit of the task"
            )
        stop = terminal | timeout
        stop[-1] = True
        keep = np.ones(n, bool) if successors is not None else ~stop | terminal

        out = _allocate(int(keep.sum()), observations.shape[1], actions.shape[1])
        a = 0
        for lo in range(0, n, BLOCK):
            hi = min(lo + BLOCK, n)
            kept = keep[lo:hi]
            b = a + int(kept.sum())
            obs = np.asarray(observations[lo : min(hi + 1, n)], np.float32)
            out.obs[a:b] = obs[: hi - lo][kept]
            if successors is not None:
                out.next_obs[a:b] = successors[lo:hi]
            else:
                after = np.append(obs[1:], obs[-1:], 0)[: hi - lo]
                last = terminal[lo:hi]
                after[last] = obs[: hi - lo][last]
                out.next_obs[a:b] = after[kept]
            out.action[a:b] = actions[lo:hi][kept]
            a = b

    out.reward[:] = reward[keep]
    out.terminated[:] = terminal[keep]
    out.truncated[:] = timeout[keep]
    stops = np.flatnonzero(stop) + 1
    rows = np.add.reduceat(keep, np.append(0, stops[:-1]), dtype=np.int64)  # kept, per episode
    held = rows > 0  # an episode of one row without a successor leaves nothing
    ends, returns = np.cumsum(rows)[held], _sums(reward, stops)[held]
    if len(ends) == 0:
        raise DatasetError(f"{where} holds no transition whose successor is known")
    last = ends - 1
    out.truncated[last] |= ~out.terminated[last]
    return _finish(out, ends, returns, where)


def _jumps(observations: Any, successors: Any) -> Array:
    """[N] bool: the stored successor is not the next row's observation (the last row: False)."""
    n = len(observations)
    jump = np.zeros(n, bool)
    for lo in range(0, n - 1, BLOCK):
        hi = min(lo + BLOCK, n - 1)
        gap = np.abs(successors[lo:hi] - observations[lo + 1 : hi + 1])
        jump[lo:hi] = (gap > 1e-6).any(1)
    return jump


def _step_limit(terminal: Array, episode_len: int) -> Array:
    """[N] bool: the `episode_len`-th step after the last end."""
    if episode_len < 1:
        raise DatasetError(f"an episode has at least one step, got episode_len={episode_len}")
    n = len(terminal)
    starts = np.concatenate([[0], np.flatnonzero(terminal) + 1])
    step = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
    out: Array = step % episode_len == episode_len - 1
    return out


# -------------------------------------------------------------------------------------------------------------- parts
@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An HDF5 file to read from; what goes wrong while it is open becomes a DatasetError of one line."""
    try:
        import h5py
    except ImportError:
        raise DatasetError("reading a dataset needs the package h5py: pip install 'minari[hdf5]'") from None
    if not path.is_file():
        raise DatasetError(f"no file {path}: the dataset is incomplete, fetch it again")
    try:
        with h5py.File(path, "r") as file:
            # By default HDF5 keeps the layout of thousands of episodes it will not be asked for again.
            cache = file.id.get_mdc_config()
            cache.set_initial_size, cache.initial_size = True, MEBI
            cache.min_size, cache.max_size = MEBI, 2 * MEBI
            file.id.set_mdc_config(cache)
            yield file
    except OSError as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is not a whole HDF5 file ({reason}): fetch it again") from None


def _get(node: Any, name: str, where: Path) -> Any:
    try:
        found = node[name]
    except KeyError:
        present = ", ".join(sorted(node)[:8])
        raise DatasetError(f"{where} has no '{name}' in {node.name} (present: {present})") from None
    if hasattr(found, "dtype") and found.dtype.kind not in "fiub":
        raise DatasetError(f"{where}: {found.name} holds {found.dtype}, not numbers")
    return found


def _read(node: Any) -> Array:
    """All of an HDF5 array, by the low-level call: half the time of `node[()]`, which counts with many episodes."""
    from h5py.h5s import ALL

    out = np.empty(node.shape, node.dtype)
    if out.size:
        node.id.read(ALL, ALL, out)
    return out


def _width(node: Any) -> int:
    return int(np.prod(node.shape[1:], dtype=np.int64))


def _check_lengths(arrays: dict[str, Any], want: int, where: str) -> None:
    for name, array in arrays.items():
        if array.shape[:1] != (want,):
            raise DatasetError(f"{where}: {name} has shape {array.shape}, expected {want} rows: the file is damaged")


def _allocate(m: int, obs_dim: int, act_dim: int) -> Table:
    none = np.empty(0)
    return Table(
        np.empty((m, obs_dim), np.float32),
        np.empty((m, act_dim), np.float32),
        np.empty(m, np.float32),
        np.empty((m, obs_dim), np.float32),
        np.empty(m, bool),
        np.empty(m, bool),
        ends=none,
        returns=none,
        env_id=None,
        action_box=None,
    )


def _sums(reward: Array, ends: Array) -> Array:
    """[E] sum of `reward` [N] over each episode."""
    return np.add.reduceat(reward, np.append(0, ends[:-1]))


def _finish(table: Table, ends: Array, returns: Array, where: str) -> Table:
    """Refuse numbers that are not finite, then add the episodes."""
    for name in ("obs", "action", "reward", "next_obs"):
        array = getattr(table, name)
        for lo in range(0, len(array), BLOCK):
            block = array[lo : lo + BLOCK]
            bad = ~np.isfinite(block.reshape(len(block), -1)).all(1)
            if bad.any():
                row = lo + int(bad.argmax())
                episode = int(np.searchsorted(ends, row, side="right"))
                raise DatasetError(f"{where}: {name} of transition {row} (episode {episode}) is NaN or infinite")
    return table._replace(ends=ends.astype(np.int64), returns=returns)
