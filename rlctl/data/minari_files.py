"""Read Minari datasets, in any of the three ways Minari stores them (HDF5, Arrow, Parquet).

No environment is built, so the package that defines it need not be installed. Observations that are a Dict become one
vector by a rule (`OBS_KEYS`, `read_minari`).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlctl.data import arrays, d4rl
from rlctl.data.arrays import Array, DatasetError, Findings, Origin, Table, View, allocate, check_finite, complain
from rlctl.data.flat_files import check_lengths, open_hdf5
from rlctl.data.reference import OWN_MARK

MINARI_ID = re.compile(r"([-\w][-\w/]*[-\w]/)?[-\w]+-v\d+")
"""[NAMESPACE/]NAME-vK."""
OBS_KEYS = {
    "antmaze": ("achieved_goal", "observation"),
    "kitchen": ("observation",),
    "pointmaze": ("observation",),
}
"""By family of tasks, the parts of a Dict observation that make up D4RL's own vector, in its order."""


class Episode(NamedTuple):
    """One stored episode of T steps."""

    name: str
    obs: list[Array]
    """Leaves of the observation, [T + 1, ...] each, in the order in which they are joined."""
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    """As stored: bool, or numbers that should be 0 or 1."""


# -------------------------------------------------------------------------------------------------------- where, what
def minari_root() -> Path:
    """Where Minari keeps its datasets: MINARI_DATASETS_PATH, else ~/.minari/datasets."""
    named = os.environ.get("MINARI_DATASETS_PATH")
    return Path(named).expanduser() if named else Path.home() / ".minari" / "datasets"


def local_ids(root: Path) -> list[str]:
    """Ids of the Minari datasets under `root`, sorted; half-written ones (hidden folders) are left out."""
    found = root.rglob("data/metadata.json") if root.is_dir() else iter(())
    ids = (path.parent.parent.relative_to(root) for path in found)
    return sorted(x.as_posix() for x in ids if not any(part.startswith(".") for part in x.parts))


def find_minari(source: str) -> Path:
    """The `data` folder of a Minari id or of a path to a dataset; DatasetError naming the nearest ids, D4RL's too."""
    root = minari_root()
    for folder in (root / source, Path(source).expanduser()):
        for data in (folder / "data", folder):
            if (data / "metadata.json").is_file():
                return data
            if (data / "main_data.hdf5").is_file():
                raise DatasetError(f"{data} has episodes but no metadata.json: fetch or write the dataset again")
    ids = local_ids(root)
    close = difflib.get_close_matches(source, ids, n=3)
    hint = "there is none; MINARI_DATASETS_PATH names another root"
    if close:
        hint = f"nearest there: {', '.join(close)}"
    elif ids:
        hint = f"none of the {len(ids)} there has a name like it: rlctl data list"
    theirs = [] if "/" in source else difflib.get_close_matches(source, list(d4rl.catalogue()), n=3)
    if theirs:
        hint = f"{hint}; " if close else ""
        hint += f"D4RL has {', '.join(theirs)}"
    public = "`rlctl data list --remote` names the public ones"
    if theirs or MINARI_ID.fullmatch(source):
        public = f"`rlctl data download {theirs[0] if theirs else source}` fetches a public one"
    raise DatasetError(f"no dataset '{source}' in {root} ({hint}); {public}")


def read_metadata(data: Path) -> dict[str, Any]:
    """The metadata of a `data` folder."""
    try:
        meta = json.loads((data / "metadata.json").read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{data / 'metadata.json'} cannot be read ({error}): fetch the dataset again") from None
    if not isinstance(meta, dict):
        raise DatasetError(f"{data / 'metadata.json'} is not a JSON object: fetch the dataset again")
    return meta


def describe(data: Path) -> Origin:
    """What the metadata says, without a look at the data."""
    meta = read_metadata(data)
    spec: dict[str, Any] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError):  # Minari stores none for a task that has none
        spec = dict(json.loads(meta["env_spec"]))
    kwargs, limit = spec.get("kwargs") or {}, spec.get("max_episode_steps") or 0
    for key, value, allowed, good in (
        ("kwargs", kwargs, "a JSON object", isinstance(kwargs, dict)),
        ("max_episode_steps", limit, "a whole number", isinstance(limit, int | float) and limit % 1 == 0),
    ):
        if not good:
            raise DatasetError(f"{data / 'metadata.json'}: {key} of its env_spec is {value!r}, not {allowed}: mend it")
    options = {k: v for k, v in kwargs.items() if k != "render_mode"}
    own = meta[OWN_MARK] if isinstance(meta.get(OWN_MARK), dict) else {}  # knows tasks that Gymnasium has no spec of
    return Origin(
        id=str(meta.get("dataset_id") or data.parent.name),
        format=f"minari-{meta.get('data_format', 'hdf5')}",
        env_id=own.get("env_id", spec.get("id")),
        env_options=own.get("env_options", options),
        episode_len=int(limit) if limit > 0 else None,  # -1 to Gymnasium: no limit
        meta=meta,
    )


# --------------------------------------------------------------------------------------------------------------- read
def read_minari(
    data: Path, view: View = "exact", obs_keys: Sequence[str] | None = None, found: Findings | None = None
) -> tuple[Table, Origin]:
    """Read the `data` folder of a Minari dataset.

    - The successor of row t is `observations[t + 1]`, exact at a truncation too.
    - The last row of an episode that carries neither flag (an unfinished episode) is truncated. A flag in the middle of
      a stored episode ends an episode there.
    - Dict observations are concatenated in sorted key order, nested ones depth first (the order of Gymnasium's
      FlattenObservation). `obs_keys` picks some of the keys (or the one key), in its own order; in the view
      `d4rl_compat` it defaults to what D4RL's vector of that family holds (`OBS_KEYS`).
    - Actions of a bounded Box are mapped to [-1, 1]: the unit in which agents act and in which tasks take actions.

    `view="d4rl_compat"` gives the pairs that D4RL's loader would make of the same episodes. With `found`, damaged
    episodes are noted there and left out instead of refused.
    """
    origin = describe(data)
    if isinstance(obs_keys, str):
        obs_keys = (obs_keys,)
    if obs_keys is not None:
        named = isinstance(obs_keys, Sequence) and all(isinstance(k, str) for k in obs_keys)
        if not named or not obs_keys:
            raise DatasetError(f"obs_keys names keys of a Dict observation, one or a list, got {obs_keys!r}")
    if view != "exact" and obs_keys is None:
        words = re.findall(r"[a-z0-9]+", f"{origin.id} {origin.env_id}".lower())
        obs_keys = next((keys for family, keys in OBS_KEYS.items() if family in words), None)
        if not _is_dict(origin.meta.get("observation_space")):
            obs_keys = None
    _check_space(origin.meta.get("observation_space"), "observation", data, keys=obs_keys, allow_dict=True)
    box = _check_space(origin.meta.get("action_space"), "action", data, keys=None, allow_dict=False)

    with _open(data, origin.format, obs_keys) as store:
        names = store.names()
        if not names:
            raise DatasetError(f"{data} holds no episodes")
        filled = None
        if store.believable(origin.meta.get("total_steps")):
            filled = _fill(store, names, int(origin.meta["total_steps"]), found)
        if filled is None:  # the metadata does not tell the size, or not the right one: count
            filled = _fill(store, names, sum(store.length(name) for name in names), found)
    if filled is None or len(filled.reward) == 0:
        raise DatasetError(f"{data} holds no transitions")
    table, reward, terminal, timeout, last = filled
    if box is not None:
        low, high = box
        act_dim = table.action.shape[1]
        if low.shape not in ((act_dim,), ()):
            raise DatasetError(f"{data}: the action space has shape {low.shape}, the stored actions {act_dim} numbers")
        for lo in range(0, len(reward), arrays.BLOCK):
            block = table.action[lo : lo + arrays.BLOCK]
            block[...] = 2 * (block - low) / (high - low) - 1
    try:
        if view == "exact":
            table = arrays.exact(table, reward, terminal, timeout, successors=True, unflagged_ends=last)
        else:
            table = arrays.d4rl_compat(table, reward, terminal, timeout | (last & ~terminal))
    except DatasetError as error:
        raise DatasetError(f"{data}: {error}") from None
    check_finite(table, str(data), found)
    return table, Origin(**(vars(origin) | {"action_box": box}))


def count_episodes(data: Path) -> int:
    """Episodes that a `data` folder stores, empty and damaged ones included."""
    with _open(data, describe(data).format, None) as store:
        return len(store.names())


def space_width(text: Any) -> int | None:
    """Numbers in a space of the metadata that `read_minari` took; None where there is none."""
    if text is None:
        return None
    space = _load_space(text)
    if space["type"] == "Dict":
        return sum(space_width(x) or 0 for x in space["subspaces"].values())
    return int(np.prod(space["shape"], dtype=np.int64))


class _Filled(NamedTuple):
    table: Table
    """`obs`, `next_obs` and `action` as stored; the rest is still empty."""
    reward: Array
    """[M] float64."""
    terminal: Array
    timeout: Array
    last: Array
    """[M] bool: the last row of a stored episode."""


def _fill(store: _Store, names: Sequence[str], m: int, found: Findings | None) -> _Filled | None:
    """Read the episodes into arrays of `m` rows; None if they hold more."""
    table: Table | None = None
    reward, last = np.empty(m, np.float64), np.zeros(m, bool)
    terminal, timeout = np.zeros(m, bool), np.zeros(m, bool)
    noted = Findings()
    a = 0
    for name in names:
        e = store.episode(name)
        per_step = {"rewards": e.reward, "actions": e.action, "terminations": e.terminated, "truncations": e.truncated}
        if not any(len(x) for x in per_step.values()):
            continue
        t, where, bad = _steps(e), f"{store.data}: {e.name}", Findings()
        check_lengths({k: x.shape for k, x in per_step.items()}, t, where, bad)
        for leaf in e.obs:
            check_lengths({"observations": leaf.shape}, t + 1, where, bad)
        terminated = arrays.as_flags(e.terminated, f"{where}: terminations", bad)
        truncated = arrays.as_flags(e.truncated, f"{where}: truncations", bad)
        if bad:
            complain(noted if found is not None else None, bad[0])
            noted += bad[1:]
            continue
        if found is not None and (early := terminated[:-1] | truncated[:-1]).any():
            noted.append(
                f"{where}: terminations or truncations are set before its last step, first in step {early.argmax()} of "
                f"{t}: each is read as the end of an episode"
            )
        joined = e.obs[0] if len(e.obs) == 1 else np.concatenate([x.reshape(t + 1, -1) for x in e.obs], 1)
        obs, action = joined.reshape(t + 1, -1), e.action.reshape(t, -1)
        if a + t > m:
            return None
        if table is None:
            table = allocate(m, obs.shape[1], action.shape[1])
        widths, first = (obs.shape[1], action.shape[1]), (table.obs.shape[1], table.action.shape[1])
        if widths != first:
            complain(
                noted if found is not None else None,
                f"{where} has observations of {widths[0]} and actions of {widths[1]} numbers, "
                f"the first episode {first[0]} and {first[1]}",
            )
            continue
        b = a + t
        table.obs[a:b], table.next_obs[a:b] = obs[:-1], obs[1:]
        table.action[a:b], reward[a:b] = action, e.reward
        terminal[a:b], timeout[a:b], last[b - 1] = terminated, truncated, True
        a = b
    if found is not None:
        found += noted
    if table is None:
        return _Filled(allocate(0, 0, 0), reward[:0], terminal[:0], timeout[:0], last[:0])
    table = table._replace(**{k: getattr(table, k)[:a] for k in Table._fields[:6]})
    return _Filled(table, reward[:a], terminal[:a], timeout[:a], last[:a])


def _steps(e: Episode) -> int:
    """Steps of an episode: what most of its arrays say, so that one damaged array is found to be the wrong one."""
    said = [*map(len, (e.reward, e.action, e.terminated, e.truncated)), *(len(leaf) - 1 for leaf in e.obs)]
    return max(said, key=said.count)


def _load_space(text: Any) -> Any:
    return json.loads(text) if isinstance(text, str) else text


def _is_dict(text: Any) -> bool:
    with contextlib.suppress(KeyError, TypeError, ValueError):  # a damaged one is `_check_space`'s to refuse
        return bool(_load_space(text)["type"] == "Dict")
    return False


def _check_space(
    text: Any, what: str, where: Path, *, keys: Sequence[str] | None, allow_dict: bool
) -> tuple[Array, Array] | None:
    """Refuse a space that does not flatten to one vector; low and high of a bounded Box other than [-1, 1]."""
    if text is None:  # files written before Minari stored the spaces
        return None
    try:
        return _walk_space(text, what, where, keys, allow_dict)
    except DatasetError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(
            f"{where / 'metadata.json'}: the {what} space is damaged ({reason}): fetch the dataset again"
        ) from None


def _walk_space(
    text: Any, what: str, where: Path, keys: Sequence[str] | None, allow_dict: bool
) -> tuple[Array, Array] | None:
    space = _load_space(text)
    kind = space["type"]
    if kind == "Dict" and allow_dict:
        subspaces = space["subspaces"]
        for key in subspaces if keys is None else keys:
            if key not in subspaces:
                raise DatasetError(f"{where}: the {what} has no key '{key}'; it has {', '.join(sorted(subspaces))}")
            _walk_space(subspaces[key], f"{what} '{key}'", where, None, True)
        return None
    if keys is not None:
        raise DatasetError(f"{where}: the {what} space is {kind}, not Dict: leave obs_keys out")
    allowed = "vectors (Box, or Dict of Box)" if allow_dict else "vectors (Box)"
    if kind != "Box":
        raise DatasetError(f"{where}: the {what} space is {kind}; only {allowed} can be read")
    shape = tuple(int(n) for n in space["shape"])
    if len(shape) > 1:
        raise DatasetError(f"{where}: the {what} space is a Box of shape {shape}; only {allowed}")
    low, high = (np.asarray(space[k], np.float32) for k in ("low", "high"))
    if allow_dict or not (np.isfinite(low) & np.isfinite(high) & (high > low)).all():
        return None
    return None if (low == -1).all() and (high == 1).all() else (low, high)


@contextlib.contextmanager
def _open(data: Path, fmt: str, keys: Sequence[str] | None) -> Iterator[_Store]:
    if fmt == "minari-hdf5":
        with open_hdf5(data / "main_data.hdf5") as file:
            yield _Hdf5Store(file, data, keys)
    elif fmt in ("minari-arrow", "minari-parquet"):
        store = _ArrowStore(data, fmt.removeprefix("minari-"), keys)
        try:
            yield store
        except (OSError, store.arrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DatasetError(f"{data}: {store.current} cannot be read ({reason}): fetch it again") from None
    else:
        raise DatasetError(f"{data} is stored as {fmt.removeprefix('minari-')}; known are hdf5, arrow and parquet")


# ------------------------------------------------------------------------------------------------------------ storage
class _Store:
    """Where the episodes of one dataset are."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def names(self) -> list[str]:
        """The episodes, in the order of their numbers ("episode_10" comes after "episode_2")."""
        raise NotImplementedError

    def length(self, name: str) -> int:
        """Steps of an episode."""
        raise NotImplementedError

    def episode(self, name: str) -> Episode:
        """Read one."""
        raise NotImplementedError

    def believable(self, total: Any) -> bool:
        """Whether to allocate on the word of the metadata: a step takes more than a byte."""
        if not isinstance(total, int) or total < 1:
            return False
        main = self.data / "main_data.hdf5"
        return total < (main.stat().st_size if main.is_file() else 1 << 31)


class _Hdf5Store(_Store):
    """`main_data.hdf5`: a group per episode.

    Episodes are read by h5py's low-level calls: with tens of thousands of them its objects cost more than the data.
    """

    def __init__(self, file: Any, data: Path, keys: Sequence[str] | None) -> None:
        super().__init__(data)
        self.file, self.keys = file, keys
        self.leaves: list[str] = []
        """Paths of the arrays that make up an observation, as found in the first episode."""
        self.types: dict[str, Any] = {}
        """HDF5's and NumPy's type of the last array of a name: translating takes longer than reading a short one."""

    def names(self) -> list[str]:
        found = [n for n in self.file if n.startswith("episode_")]
        for name in found:
            if not re.fullmatch(r"episode_\d+", name):
                raise DatasetError(f"{self.data}: '{name}' has no number, as in episode_0: rename it or take it out")
        return sorted(found, key=lambda n: int(n.removeprefix("episode_")))

    def length(self, name: str) -> int:
        return len(self._get(self.file, f"{name}/rewards"))

    def episode(self, name: str) -> Episode:
        from h5py import h5d, h5g

        if not self.leaves:
            self.leaves = self._leaves(self._get(self.file, name), "observations", self.keys)
        paths = [*self.leaves, "actions", "rewards", "terminations", "truncations"]
        try:
            group = h5g.open(self.file.id, name.encode())
            nodes = [h5d.open(group, path.encode()) for path in paths]
        except (KeyError, TypeError, ValueError):
            nodes = [self._get(self.file, f"{name}/{path}").id for path in paths]  # says which one is missing
        read = (self._read(node, f"/{name}/{path}") for node, path in zip(nodes, paths, strict=True))
        *obs, action, reward, terminated, truncated = read
        return Episode(name, obs, action, reward.reshape(-1), terminated, truncated)

    def _read(self, node: Any, path: str) -> Array:
        from h5py.h5s import ALL

        stored, name = node.get_type(), path.rpartition("/")[2]
        known, dtype = self.types.get(name, (None, None))
        if known != stored:
            known, dtype = self.types[name] = stored, stored.dtype
        out = np.empty(node.shape, dtype)
        if out.dtype.kind not in "fiub":
            raise DatasetError(f"{self.data}: {path} holds {out.dtype}, not numbers")
        if out.size:
            node.read(ALL, ALL, out, known)
        return out

    def _leaves(self, node: Any, name: str, keys: Sequence[str] | None = None) -> list[str]:
        """Paths of the arrays of a (nested) Dict in sorted key order (or that of `keys`), or of the one array."""
        child = self._get(node, name)
        if hasattr(child, "dtype"):
            return [name]
        return [
            leaf for key in (sorted(child) if keys is None else keys) for leaf in self._leaves(node, f"{name}/{key}")
        ]

    def _get(self, node: Any, name: str) -> Any:
        try:
            return node[name]
        except (KeyError, ValueError):  # ValueError: an array where a group should be
            parent, _, child = f"{node.name}/{name}".replace("//", "/").rpartition("/")
            there = node.file.get(parent or "/")
            present = ", ".join(sorted(there)[:8]) if there is not None and not hasattr(there, "dtype") else "nothing"
            raise DatasetError(f"{self.data} has no '{child}' in {parent} (present: {present})") from None


class _ArrowStore(_Store):
    """A folder per episode with files `part-0.arrow` or `part-0.parquet`.

    All columns have T + 1 rows; the last of actions, rewards and flags is padding.
    """

    def __init__(self, data: Path, fmt: str, keys: Sequence[str] | None) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DatasetError(
                f"{data} is stored as {fmt}, which needs the package pyarrow: pip install 'rlctl[arrow]'"
            ) from None
        super().__init__(data)
        self.arrow, self.fmt, self.keys = pyarrow, fmt, keys
        self.current = "it"

    def names(self) -> list[str]:
        return sorted((p.name for p in self.data.iterdir() if p.is_dir() and p.name.isdigit()), key=int)

    def length(self, name: str) -> int:
        return max(self._rows(name) - 1, 0)

    def episode(self, name: str) -> Episode:
        columns = self._columns(name)
        obs = self._leaves(columns["observations"], f"{name}/observations", self.keys)
        action, reward, terminated, truncated = (
            self._leaves(columns[k], f"{name}/{k}")[0][:-1]
            for k in ("actions", "rewards", "terminations", "truncations")
        )
        return Episode(f"episode {name}", obs, action, reward, terminated, truncated)

    def _parts(self, name: str) -> list[Path]:
        self.current = f"episode {name}"
        parts = list((self.data / name).glob(f"part-*.{self.fmt}"))
        if not parts:
            raise DatasetError(f"{self.data}: episode {name} has no file part-0.{self.fmt}: fetch the dataset again")
        return sorted(parts, key=lambda p: int(re.sub(r"\D", "", p.stem) or 0))

    def _rows(self, name: str) -> int:
        if self.fmt == "parquet":
            return sum(self.arrow.parquet.read_metadata(p).num_rows for p in self._parts(name))
        total = 0
        for part in self._parts(name):
            with self.arrow.memory_map(str(part)) as source:
                total += self.arrow.ipc.open_file(source).read_all().num_rows  # maps the file, copies nothing
        return total

    def _columns(self, name: str) -> dict[str, Any]:
        tables = []
        for part in self._parts(name):
            if self.fmt == "parquet":
                tables.append(self.arrow.parquet.ParquetFile(part).read())
            else:
                tables.append(self.arrow.ipc.open_file(self.arrow.memory_map(str(part))).read_all())
        whole = self.arrow.concat_tables(tables)
        columns = {}
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            if key not in whole.column_names:
                present = ", ".join(sorted(whole.column_names)[:8])
                raise DatasetError(f"{self.data} has no '{key}' in episode {name} (present: {present})")
            column = whole.column(key).combine_chunks()
            columns[key] = column.chunk(0) if hasattr(column, "chunk") else column
        return columns

    def _leaves(self, column: Any, name: str, keys: Sequence[str] | None = None) -> list[Array]:
        """The arrays of a (nested) struct in sorted key order (or that of `keys`), or the one array itself."""
        types = self.arrow.types
        if types.is_struct(column.type):
            present = sorted(column.type.field(i).name for i in range(column.type.num_fields))
            out = []
            for key in present if keys is None else keys:
                if key not in present:
                    raise DatasetError(f"{self.data} has no '{key}' in {name} (present: {', '.join(present[:8])})")
                out += self._leaves(column.field(key), f"{name}/{key}")
            return out
        rows, inner = len(column), column
        if types.is_fixed_size_list(column.type):
            inner = column.flatten()
        kind = inner.type
        if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
            raise DatasetError(f"{self.data}: {name} holds {column.type}, not numbers")
        flat: Array = inner.to_numpy(zero_copy_only=False)
        return [flat.reshape(rows, -1) if inner is not column else flat]
