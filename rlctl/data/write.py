"""Write Minari datasets that Minari itself opens: complete, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlctl.data.arrays import Array, DatasetError
from rlctl.data.minari_files import local_ids, minari_root
from rlctl.errors import UsageError

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

    from rlctl_envs import VecEnv

FORMATS = ("hdf5", "arrow", "parquet")
"""Minari's ways of storing a dataset; the last two need pyarrow."""


@dataclass(frozen=True)
class Played:
    """One finished episode of T steps."""

    obs: Array
    """[T + 1, O], the last one the true successor of the last action."""
    action: Array
    """[T, A] as executed, in [-1, 1]."""
    reward: Array
    """[T]"""
    terminated: Array
    """[T] bool."""
    truncated: Array
    """[T] bool."""


def spaces_of(env: VecEnv) -> tuple[Any, Any]:
    """Observation and action space, the latter in the environment's own units where Gymnasium knows them."""
    import gymnasium

    action = env.single_action_space
    if spec_of(env.id) is not None:
        made: Any = gymnasium.make(env.id)
        action = made.action_space
        made.close()
    return env.single_observation_space, action


def spec_of(env_id: str) -> Any:
    """Gymnasium's spec of an environment, None where it has none."""
    import gymnasium

    try:
        return gymnasium.spec(env_id)
    except gymnasium.error.Error:
        return None  # a probe, or an environment of an installed package: Gymnasium has no spec of it


def to_buffer(e: Played, space: Any, infos: dict[str, Array] | None = None) -> EpisodeBuffer:
    """An episode in Minari's terms; actions are mapped from [-1, 1] to the bounds of `space`."""
    from minari.data_collector import EpisodeBuffer

    low, high = space.low, space.high
    unit = bool((low == -1).all() and (high == 1).all())
    action = e.action if unit else (low + (e.action + 1) * (high - low) / 2).astype(space.dtype).clip(low, high)
    return EpisodeBuffer(
        observations=e.obs,
        actions=action,
        rewards=e.reward,
        terminations=e.terminated,
        truncations=e.truncated,
        infos=infos,
    )


def check_new_id(id: str) -> None:
    """UsageError unless `id` is NAMESPACE/NAME-vK and free."""
    if not re.fullmatch(r"([-\w][-\w/]*[-\w]/)?[-\w]+-v\d+", id):
        raise UsageError(
            f"'{id}' is not a dataset id: NAMESPACE/NAME-vK with two letters or more before each '/', "
            "e.g. mine/hopper-medium-v0"
        )
    root = minari_root()
    if (root / id).exists():
        stem, _, version = id.rpartition("-v")
        versions = [int(i.rpartition("-v")[2]) for i in local_ids(root) if i.rpartition("-v")[0] == stem]
        free = max([int(version), *versions]) + 1
        raise UsageError(f"there is a dataset '{id}' in {root}: take the next version, {stem}-v{free}")


def make_root() -> Path:
    """`minari_root()`, which is there then; UsageError where it cannot be made or written to."""
    root = minari_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(root, os.W_OK) else "it may not be written to"
    except OSError as error:
        reason = str(error)
    if reason:
        raise UsageError(f"no dataset can be written into {root} ({reason}): MINARI_DATASETS_PATH names another folder")
    return root


def check_storage(storage: str) -> None:
    """UsageError for a storage Minari does not have, or whose package is missing."""
    if storage not in FORMATS:
        raise UsageError(f"no storage '{storage}': allowed are {', '.join(FORMATS)}")
    if storage != "hdf5":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise DatasetError(f"storage {storage} needs the package pyarrow: pip install 'rlctl[arrow]'") from None


def write_minari(
    id: str,
    episodes: Sequence[EpisodeBuffer],
    *,
    env: Any,
    spaces: tuple[Any, Any],
    storage: str,
    metadata: dict[str, Any],
    marks: Mapping[str, Any] | None = None,
    ref_scores: tuple[float, float] | None = None,
) -> Path:
    """Write a Minari dataset under `minari_root()`, complete or not at all; returns its folder.

    `env` is Gymnasium's spec of the task (None: it has none), `spaces` its observation and action space, `metadata` in
    Minari's words, `marks` what of ours goes beside them (JSON). Minari writes into a hidden root beside the real one,
    from where the result is renamed.
    """
    import minari

    root = make_root()
    target, hidden = root / id, root / f".writing-{id.replace('/', '-')}"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        with _root_is(hidden), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Minari asks for an e-mail address and a permalink
            written = minari.create_dataset_from_buffers(
                id,
                list(episodes),
                env=env,
                observation_space=spaces[0],
                action_space=spaces[1],
                data_format=storage,
                **metadata,
            )
            more = dict(marks or {})
            if ref_scores is not None:
                more |= {"ref_min_score": float(ref_scores[0]), "ref_max_score": float(ref_scores[1])}
            if more:
                written.storage.update_metadata(more)
        for file in (hidden / id).rglob("*"):
            _sync(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        for made in hidden.rglob("namespace_metadata.json"):
            there = root / made.relative_to(hidden)
            if not there.exists():
                shutil.copyfile(made, there)
        (hidden / id).rename(target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def _sync(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as f:
            os.fsync(f.fileno())


@contextmanager
def _root_is(folder: Path) -> Iterator[None]:
    """Within the block Minari's root is `folder`."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
