"""A dataset: a full, device-resident table of transitions, with statistics.

`load_dataset` reads a Minari dataset, a D4RL-style HDF5 file or an .npz once (the rules of each are in
`rlctl.data.minari_files` and `rlctl.data.flat_files`); from then on nothing leaves the device. Rows are raw: no
normalisation, no reward scaling.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlctl.data import arrays, columns, d4rl, flat_files, minari_files
from rlctl.data.arrays import DatasetError, Findings, Origin, Table, View
from rlctl.data.reference import dataset_labels
from rlctl.data.reward import RewardTransform
from rlctl.ops import column_moments
from rlctl.seeding import generator
from rlctl.types import Batch

__all__ = ["Dataset", "DatasetError", "Stats", "load_dataset"]


@dataclass(frozen=True)
class Stats:
    """What a dataset holds. Returns are undiscounted sums of raw rewards over one episode; std divides by the count."""

    transitions: int
    episodes: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    obs_mean: Tensor
    """[O] float32, over `obs` of all transitions."""
    obs_std: Tensor
    """[O] float32; 0 for a number that never changes."""


class Dataset:
    """Transitions of whole episodes, one episode after the other, sampled uniformly with replacement.

    A full `Ring` that cannot be added to: it goes wherever a source of batches does, `Mix` included.
    """

    def __init__(
        self,
        rows: Batch,
        episode_ends: Tensor,
        *,
        id: str,
        env_id: str | None = None,
        returns: Tensor | None = None,
        action_box: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
        view: View = "exact",
        origin: Origin | None = None,
    ) -> None:
        """Hold `rows` ([M, ...], float32 and bool, all on one device), cut at `episode_ends` ([E] int64).

        `returns` [E] default to the sums of `reward`; ValueError when the ends do not ascend to M.
        """
        m = len(rows.reward)
        steps = episode_ends.diff(prepend=episode_ends.new_zeros(1))
        if m == 0 or len(steps) == 0 or int(episode_ends[-1]) != m or not bool((steps > 0).all()):
            raise ValueError(f"episode_ends must ascend to the number of transitions, {m}")
        self.rows = rows
        """All transitions, [M, ...]."""
        self.device = rows.reward.device
        self.id = id
        """Minari id, or the file name without its suffix."""
        self.env_id = env_id
        """Gymnasium id of the task it was recorded on ("Hopper-v5"), None where the source does not say."""
        self.episode_ends = episode_ends.to(self.device)
        """[E] int64, one past the last row of each episode."""
        self.action_box = action_box
        """Low and high [A] that the stored actions were mapped to [-1, 1] from; None: they are as stored."""
        self.view: View = view
        """Which pairs it holds, see `rlctl.data.arrays`."""
        self.origin = origin or Origin(id, "memory", env_id)
        """Where it comes from: format, the task's options, metadata."""
        self.requests: dict[tuple[str, ...], columns.Request] = {}
        """What `require` was asked for: the rows of an environment that join this data need the same."""
        self.share = 1.0
        """Share of its source's episodes that it holds, the best ones (`best_episodes`)."""
        self.seed = seed
        self.rng = generator(seed, "dataset", self.device)
        self._returns = None if returns is None else returns.to(self.device, torch.float64)

    def __len__(self) -> int:
        return len(self.rows.reward)

    def __repr__(self) -> str:
        return f"Dataset({self.id!r}, {len(self):,} transitions, {len(self.episode_ends):,} episodes, {self.device})"

    @property
    def spec_dims(self) -> tuple[int, int]:
        """(O, A): numbers in an observation and in an action."""
        return self.rows.obs.shape[1], self.rows.action.shape[1]

    def sample(self, n: int) -> Batch:
        """`n` transitions drawn uniformly with replacement, `[n, ...]`."""
        index = torch.randint(len(self), (n,), generator=self.rng, device=self.device)
        return self.rows.map(lambda x: x.index_select(0, index))

    def whole(self) -> Batch:
        """All transitions, `[M, ...]`, in order of recording (the storage itself)."""
        return self.rows

    def require(
        self,
        *names: str,
        gamma: float | None = None,
        reward: RewardTransform | None = None,
        extend_truncated: bool = False,
    ) -> Dataset:
        """Add columns to `extra` of every batch, and return self; one that is there already is computed anew.

        `names` are of `rlctl.data.columns`: `timestep`, `next_action` (brings `has_next_action`), `episode_return`,
        `mc_return`, `row` (the place in this dataset). `mc_return` needs `gamma`, and takes the same `reward` transform
        the learner's critic sees; `extend_truncated` lets an episode that was cut go on for ever with its last reward.
        An agent calls this in its `prepare`. ValueError for an unknown name or a missing `gamma`.
        """
        request = columns.Request(names, gamma, reward, extend_truncated)
        added = request.compute(self.rows, self.episode_ends, self.episode_returns())
        self.rows = self.rows._replace(extra={**self.rows.extra, **added})
        if later := tuple(n for n in names if n not in columns.OF_A_DATASET):
            self.requests[later] = request._replace(names=later)
        return self

    def labels(self) -> dict[str, Any]:
        """What every row about this data carries: id, version, benchmark (see `dataset_labels`)."""
        return dataset_labels(self.id, self.origin.format, self.origin.meta)

    def record(self) -> dict[str, Any]:
        """What a run writes down about its data: id, version, benchmark, format, view, size, fingerprint."""
        return self.labels() | {
            "format": self.origin.format,
            "view": self.view,
            "transitions": len(self),
            "episodes": len(self.episode_ends),
            "sha256": self.sha256,
        }

    @property
    def boundary(self) -> Tensor:
        """[M] bool: the last row of an episode."""
        out = torch.zeros(len(self), dtype=torch.bool, device=self.device)
        out[self.episode_ends - 1] = True
        return out

    def episode(self, index: int, seed: int = 0) -> Dataset:
        """The one episode `index` (0 is the first recorded) as a dataset of its own; its rows are views."""
        ends = self.episode_ends.tolist()
        if not 0 <= index < len(ends):
            raise IndexError(f"no episode {index}: '{self.id}' has {len(ends)}, so it is in 0..{len(ends) - 1}")
        start, stop = (0, *ends)[index], ends[index]
        return Dataset(
            self.rows.map(lambda x: x[start:stop]),
            torch.tensor([stop - start]),
            id=self.id,
            env_id=self.env_id,
            returns=self.episode_returns()[index : index + 1],
            action_box=self.action_box,
            seed=seed,
        )

    def episode_returns(self) -> Tensor:
        """[E] float64: the undiscounted return of each episode, in the environment's own reward."""
        if self._returns is None:
            lengths = self.episode_ends.diff(prepend=self.episode_ends.new_zeros(1))
            self._returns = torch.segment_reduce(self.rows.reward.double(), "sum", lengths=lengths)
        return self._returns

    def best_episodes(self, share: float) -> Dataset:
        """The ceil(share * E) episodes of the largest returns, whole and in their order; of equals the earlier ones.

        ValueError unless 0 < share <= 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share of the episodes is above 0 and at most 1, not {share}")
        returns, lengths = self.episode_returns(), self.episode_ends.diff(prepend=self.episode_ends.new_zeros(1))
        num = math.ceil(share * len(returns) - 1e-9)  # 0.1 * 30 is a little more than 3
        best = returns.argsort(descending=True, stable=True)[:num].sort().values
        kept = torch.zeros(len(returns), dtype=torch.bool, device=self.device)
        kept[best] = True
        rows = self.rows.map(lambda x: x[kept.repeat_interleave(lengths)])
        ends = lengths[best].cumsum(0)
        chosen = Dataset(
            rows,
            ends,
            id=self.id,
            env_id=self.env_id,
            returns=returns[best],
            action_box=self.action_box,
            seed=self.seed,
            view=self.view,
            origin=self.origin,
        )
        chosen.share = self.share * share
        return chosen

    def stats(self) -> Stats:
        """Counts, returns and the moments of the observations."""
        return self._stats

    @cached_property
    def _stats(self) -> Stats:
        returns = self.episode_returns()
        mean, std = column_moments(self.rows.obs, arrays.BLOCK)
        return Stats(
            transitions=len(self),
            episodes=len(returns),
            return_mean=float(returns.mean()),
            return_std=float(returns.std(correction=0)),
            return_min=float(returns.min()),
            return_max=float(returns.max()),
            obs_mean=mean.float(),
            obs_std=std.float(),
        )

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the transitions and episode ends as held; the same whatever file or folder they came from."""
        digest = hashlib.sha256()
        core = self.rows._replace(extra={})  # what was derived from the rows says nothing more about them
        for name, x in (core.tensors() | {"episode_ends": self.episode_ends}).items():
            digest.update(f"{name}:{tuple(x.shape)}:{x.dtype};".encode())
            digest.update(x.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    # ---------------------------------------------------------------------------------------------- checkpoint
    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Write the sampling generator and the fingerprint into `folder`; the rows stay in their source.

        `previous` is there for the sake of `Ring.save`; there is nothing to link.
        """
        mark = torch.frombuffer(bytearray.fromhex(self.sha256), dtype=torch.uint8)
        save_file({"rng": self.rng.get_state(), "sha256": mark}, folder / "dataset.safetensors")

    def load(self, folder: Path) -> None:
        """Undo `save`: restore the sampling generator; DatasetError when the checkpoint was made with other data."""
        saved = load_file(folder / "dataset.safetensors")
        was = bytes(saved["sha256"].tolist()).hex()
        if was != self.sha256:
            raise DatasetError(
                f"the checkpoint was made with a dataset of sha256 {was[:12]}, '{self.id}' has {self.sha256[:12]}: "
                "resume with the data the run was started with"
            )
        self.rng.set_state(saved["rng"])


def load_dataset(
    source: str,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    view: View = "exact",
    episode_len: int | None = None,
    obs_keys: Sequence[str] | None = None,
) -> Dataset:
    """Read a dataset once and keep it on `device`.

    `source` is one of
    - a Minari id (`mujoco/hopper/medium-v0`), looked up in MINARI_DATASETS_PATH or ~/.minari/datasets;
    - the path of a Minari dataset's folder;
    - the path of a D4RL-style file ending in .hdf5 or .h5, or of an .npz with the same arrays;
    - a D4RL id (`hopper-medium-v2`) whose file is in D4RL_DATASET_DIR or ~/.d4rl/datasets.

    An id wins over a path of the same name. Nothing is downloaded and no environment is built. `seed` is the root of
    the sampling generator. `view` is `exact` or `d4rl_compat`, see `rlctl.data.arrays`. `episode_len` (steps) serves
    only a flat file from which it cannot be told where an episode was cut. `obs_keys` picks parts of a Dict
    observation. Raises DatasetError, a ValueError of one line: nothing found (names the nearest), a damaged file,
    missing keys, unequal lengths, numbers that are not finite, spaces that are not vectors, no h5py or pyarrow.
    """
    table, origin = read(source, view=view, episode_len=episode_len, obs_keys=obs_keys)
    sizes = table.obs.shape[1], table.action.shape[1]
    if 0 in sizes:
        raise DatasetError(f"{source} has observations of {sizes[0]} and actions of {sizes[1]} numbers: both need one")
    obs, action, reward, next_obs, terminated, truncated = (torch.from_numpy(x).to(device) for x in table[:6])
    box = origin.action_box
    return Dataset(
        Batch(obs, action, reward, next_obs, terminated, truncated),
        torch.from_numpy(table.ends),
        id=origin.id,
        env_id=origin.env_id,
        returns=torch.from_numpy(table.returns),
        action_box=None if box is None else (torch.from_numpy(box[0]), torch.from_numpy(box[1])),
        seed=seed,
        view=view,
        origin=origin,
    )


def read(
    source: str,
    *,
    view: View = "exact",
    episode_len: int | None = None,
    obs_keys: Sequence[str] | None = None,
    found: Findings | None = None,
) -> tuple[Table, Origin]:
    """The arrays of a dataset, in host memory; parameters as of `load_dataset`.

    With `found`, what can be passed over (a damaged episode, a NaN) is noted there instead of raised.
    """
    arrays.check_view(view)
    file = locate(source)
    if file.is_dir():
        return minari_files.read_minari(file, view, obs_keys, found)
    if obs_keys is not None and is_flat(source):
        raise DatasetError(f"{source} holds flat observations: leave obs_keys out")
    return flat_files.read_flat(file, view, episode_len, found)


def locate(source: str) -> Path:
    """Where `read` takes a dataset from: a flat file, or the data folder of a Minari dataset.

    DatasetError, with what to do, if it is nowhere.
    """
    if is_flat(source):
        return flat_files.find_file(source)
    if source in d4rl.catalogue() and source not in minari_files.local_ids(minari_files.minari_root()):
        file = d4rl.local_file(source)
        if file is None:
            raise DatasetError(f"no file of '{source}' in {d4rl.d4rl_root()}: rlctl data download {source}")
        return file
    return minari_files.find_minari(source.removesuffix("/main_data.hdf5"))


def named_task(source: str) -> str | None:
    """The id of the environment that a dataset's metadata names, without reading its data; None for flat files.

    DatasetError when there is no such dataset.
    """
    file = locate(source)
    return minari_files.describe(file).env_id if file.is_dir() else None


def is_flat(source: str) -> bool:
    """Whether `source` names a file of flat arrays rather than a Minari dataset."""
    return source.endswith(flat_files.SUFFIXES) and Path(source).name != "main_data.hdf5"
