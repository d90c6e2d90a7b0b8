"""Read files of flat arrays: D4RL's HDF5 layout and plain .npz.

Both hold one array per quantity, `N` rows, episodes one after the other. A white list of names is read; anything else,
metadata of other lengths included, is ignored.
"""

from __future__ import annotations

import difflib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlctl.data import arrays
from rlctl.data.arrays import Array, DatasetError, Findings, Origin, Table, View, allocate, check_finite, complain

HDF5 = (".hdf5", ".h5")
MARK = "rlctl_origin"
"""Attribute of an HDF5 file, array of an .npz: JSON with `id` and `format` of the dataset it was converted from. A file
that has it is no benchmark's by its name."""
SUFFIXES = (*HDF5, ".npz")
NAMES = {
    "observations": ("observations", "observation", "obs"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "terminals": ("terminals", "terminated", "terminations"),
    "next_observations": ("next_observations", "next_observation", "next_obs"),
    "timeouts": ("timeouts", "truncated", "truncations"),
}
"""Our name for an array (D4RL's), and the names it is looked for under. The last two may be missing."""
OPTIONAL = ("next_observations", "timeouts")
PASS_EPISODE_LEN = (
    "pass episode_len, the step limit of the task (rlctl train: --set data_options.episode_len=1000; "
    "rlctl data: --episode-len 1000)"
)
MEBI = 1 << 20


class Column(Protocol):
    """One array of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: Any

    def fill(self, out: Array) -> None:
        """Read all of it into `out`, of the same shape, in the type of `out`."""


def find_file(source: str) -> Path:
    """The path of a flat file; DatasetError naming the nearest files of its folder."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=3)
    kind = "npz" if path.suffix == ".npz" else "HDF5"
    hint = f"no {kind} file is in that folder"
    if close:
        hint = f"nearest there: {', '.join(close)}"
    elif beside:
        hint = f"nothing there has a name like it; the first of {len(beside)}: {', '.join(beside[:3])}"
    raise DatasetError(f"no file {path} ({hint})")


def read_flat(
    path: Path, view: View = "exact", episode_len: int | None = None, found: Findings | None = None
) -> tuple[Table, Origin]:
    """Read a D4RL-style HDF5 file or an .npz: flat arrays of N rows, episodes one after the other.

    Read are `observations` [N, O], `actions` [N, A], `rewards` and `terminals` ([N] or [N, 1]) and, where present,
    `next_observations` [N, O] and `timeouts`, under these names or ours (`NAMES`).

    An episode ends at a terminal, at a timeout and at the last row. It also ends where `next_observations[i]` is not
    `observations[i + 1]` (`arrays.jumps`), or, in a file that has neither them nor `timeouts`, `episode_len` steps
    after it began (DatasetError when that is not given). Where they differ in more than half of the rows without a
    flag, `next_observations` tell no episodes (a copy of `observations`, garbage, rows in no order): `timeouts` alone
    count, and in a file without them `episode_len` is asked for. What is kept: `arrays.exact`.

    `view="d4rl_compat"` gives D4RL's pairs instead (`arrays.d4rl_compat`); `next_observations` is ignored, and without
    `timeouts` D4RL's own count of `episode_len` steps stands in for them.
    """
    where = str(path)
    if episode_len is not None:
        arrays.check_limit(episode_len)
    with _columns(path) as columns:
        n = _check_columns(columns, where)
        table = allocate(n, columns["observations"].shape[1], columns["actions"].shape[1])
        columns["observations"].fill(table.obs)
        columns["actions"].fill(table.action)
        successors = "next_observations" in columns and view == "exact"
        if successors:
            columns["next_observations"].fill(table.next_obs)
        reward = _vector(columns["rewards"], np.float64)
        terminal = _flags(columns["terminals"], f"{where}: terminals", found)
        timeout = _flags(columns["timeouts"], f"{where}: timeouts", found) if "timeouts" in columns else None

    flagged, unflagged = timeout is not None, np.zeros(n, bool)
    if timeout is None:
        timeout = np.zeros(n, bool)
    if successors:
        unflagged = arrays.jumps(table.obs, table.next_obs) & ~terminal & ~timeout
        inner = n - 1 - int((terminal | timeout)[:-1].sum())
        if int(unflagged.sum()) > 0.5 * inner:
            if flagged:
                unflagged[:] = False
            elif episode_len is None:
                follow = 1 - int(unflagged.sum()) / inner
                complain(
                    found,
                    f"{where} has no timeouts, and its next_observations are the observation of the row that "
                    f"follows in only {follow:.0%} of the rows, so episodes cannot be told: add timeouts, or "
                    f"{PASS_EPISODE_LEN}; 1 if its rows are in no order",
                )
            else:
                unflagged = arrays.step_limit(terminal, episode_len) & ~terminal
    elif not flagged:
        if episode_len is None:
            raise DatasetError(
                f"{where} has {'no timeouts' if view != 'exact' else 'neither timeouts nor next_observations'}, so "
                f"where an episode was cut cannot be told: {PASS_EPISODE_LEN}"
            )
        if view == "exact":
            unflagged = arrays.step_limit(terminal, episode_len) & ~terminal
        else:
            timeout = arrays.d4rl_step_limit(terminal, episode_len)
    try:
        if view == "exact":
            table = arrays.exact(table, reward, terminal, timeout, successors=successors, unflagged_ends=unflagged)
        else:
            table = arrays.d4rl_compat(table, reward, terminal, timeout)
    except DatasetError as e:
        raise DatasetError(f"{where}: {e}") from None
    check_finite(table, where, found)
    mark = _mark(path)
    meta = {} if mark is None else {"converted_from": mark}
    kind = "npz" if path.suffix == ".npz" else "d4rl-hdf5"
    missed = int(unflagged.sum()) if flagged else 0
    return table, Origin(path.stem, kind, episode_len=episode_len, unflagged_ends=missed, meta=meta)


def _mark(path: Path) -> dict[str, str] | None:
    """What a file says it was converted from; None for one that `convert` has not written."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            text = str(archive[MARK]) if MARK in archive else None
    else:
        with open_hdf5(path) as file:
            text = file.attrs.get(MARK)
    if text is None:
        return None
    try:
        mark = json.loads(text)
        return {"id": str(mark["id"]), "format": str(mark["format"])}
    except (ValueError, TypeError, KeyError):
        raise DatasetError(f"{path}: its {MARK} is not what rlctl data convert writes: convert it again") from None


def check_lengths(shapes: Mapping[str, tuple[int, ...]], want: int, where: str, found: Findings | None = None) -> None:
    """Refuse arrays that do not have `want` rows."""
    for name, shape in shapes.items():
        if shape[:1] != (want,):
            complain(found, f"{where}: {name} has shape {shape}, expected {want} rows: the file is damaged")


def unequal_lengths(path: Path) -> list[str]:
    """One line for every array whose number of rows is not that of the observations."""
    found = Findings()
    with _columns(path) as columns:
        shapes = {k: tuple(c.shape) for k, c in columns.items()}
        check_lengths(shapes, columns["observations"].shape[0], str(path), found)
    return found


def _check_columns(columns: Mapping[str, Column], where: str) -> int:
    """The number of rows; DatasetError when the shapes do not belong together."""
    n = columns["rewards"].shape[0] if columns["rewards"].shape else 0
    check_lengths({k: tuple(c.shape) for k, c in columns.items()}, n, where)
    if n == 0:
        raise DatasetError(f"{where} holds no transitions")
    for k, c in columns.items():
        vector = k in ("observations", "next_observations", "actions")
        if (len(c.shape) != 2) if vector else (int(np.prod(c.shape)) != n):
            raise DatasetError(f"{where}: {k} has shape {c.shape}, expected {'[N, D]' if vector else '[N] or [N, 1]'}")
    shapes = [columns[k].shape for k in ("observations", "next_observations") if k in columns]
    if len(set(shapes)) > 1:
        raise DatasetError(f"{where}: next_observations has shape {shapes[1]}, observations {shapes[0]}")
    return int(n)


def _vector(column: Column, dtype: Any) -> Array:
    """[N] of a column of [N] or [N, 1]."""
    out = np.empty(column.shape, dtype)
    column.fill(out)
    return out.reshape(-1)


def _flags(column: Column, what: str, found: Findings | None) -> Array:
    return arrays.as_flags(_vector(column, column.dtype), what, found)


@contextmanager
def _columns(path: Path) -> Iterator[dict[str, Column]]:
    """The arrays of the white list that the file has, by our names."""
    with _open_npz(path) if path.suffix == ".npz" else _open_flat_hdf5(path) as have:
        columns = {}
        for name, aliases in NAMES.items():
            there = next((a for a in aliases if a in have), None)
            if there is not None:
                columns[name] = have[there]
            elif name not in OPTIONAL:
                present = ", ".join(sorted(have)[:8])
                hint = "; 'dones' does not tell a true end from a time limit" if "dones" in have else ""
                raise DatasetError(f"{path} has no '{name}' in / (present: {present}{hint})")
        for name, column in columns.items():
            if column.dtype.kind not in "fiub":
                raise DatasetError(f"{path}: {name} holds {column.dtype}, not numbers")
        yield columns


# --------------------------------------------------------------------------------------------------------------- HDF5
def import_h5py(why: str) -> Any:
    """The module h5py, which is optional; `why` ("reading", "writing") for the DatasetError where it is missing."""
    try:
        import h5py
    except ImportError:
        raise DatasetError(f"{why} a dataset needs the package h5py: pip install 'minari[hdf5]'") from None
    return h5py


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """An HDF5 file to read from; what goes wrong while it is open becomes a DatasetError of one line."""
    h5py = import_h5py("reading")
    if not path.is_file():
        raise DatasetError(f"no file {path}: the dataset is incomplete, fetch it again")
    try:
        # every chunk is read once, so few are worth keeping: HDF5 2 would keep 8 MiB of each array
        with h5py.File(path, "r", rdcc_nbytes=MEBI) as file:
            # By default HDF5 keeps the layout of thousands of episodes it will not be asked for again.
            cache = file.id.get_mdc_config()
            cache.set_initial_size, cache.initial_size = True, MEBI
            cache.min_size, cache.max_size = MEBI, 2 * MEBI
            file.id.set_mdc_config(cache)
            yield file
    except OSError as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is not a whole HDF5 file ({reason}): fetch it again") from None


class _Hdf5Column:
    def __init__(self, node: Any) -> None:
        self.node, self.shape, self.dtype = node, tuple(node.shape), node.dtype

    def fill(self, out: Array) -> None:
        if not out.size:
            return
        if self.dtype.kind == "b" and out.dtype != bool:  # an enum to HDF5, which it will not turn into a number
            out[...] = self.node[()]
        else:
            rows = self.node.chunks[0] if self.node.chunks else arrays.BLOCK
            rows *= max(1, arrays.BLOCK // rows)  # every chunk is unpacked once, and converted on the way
            for lo in range(0, self.shape[0], rows):  # in one go HDF5 would hold the layout of all chunks
                part = slice(lo, lo + rows)
                self.node.read_direct(out, part, part)


@contextmanager
def _open_flat_hdf5(path: Path) -> Iterator[dict[str, Column]]:
    with open_hdf5(path) as file:
        yield {k: _Hdf5Column(x) for k, x in file.items() if hasattr(x, "dtype")}


# ---------------------------------------------------------------------------------------------------------------- npz
class _NpyColumn:
    """An array of an .npz, read block by block: `np.load` would hold all of it beside the result."""

    def __init__(self, archive: zipfile.ZipFile, member: str) -> None:
        self.archive, self.member = archive, member
        with archive.open(member) as stream:
            self.shape, self.fortran, self.dtype = _npy_header(stream)

    def fill(self, out: Array) -> None:
        with self.archive.open(self.member) as stream:
            _npy_header(stream)
            if self.fortran and len(self.shape) > 1:
                out[...] = np.frombuffer(stream.read(), self.dtype).reshape(self.shape[::-1]).T
                return
            width = int(np.prod(self.shape[1:], dtype=np.int64))
            for lo in range(0, self.shape[0], arrays.BLOCK):
                rows = min(arrays.BLOCK, self.shape[0] - lo)
                data = stream.read(rows * width * self.dtype.itemsize)
                out[lo : lo + rows] = np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, Any]:
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran, dtype = readers[version](stream)
    return shape, fortran, dtype


@contextmanager
def _open_npz(path: Path) -> Iterator[dict[str, Column]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".npy")]
            yield {n.removesuffix(".npy"): _NpyColumn(archive, n) for n in names}
    except DatasetError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is not a whole .npz file ({reason}): fetch it again") from None
