"""Replay: a ring of transitions on the device, and a mixture of two sources.

Storage is allocated at the first `add`, when the shapes are known. Rows are raw: no normalisation, no reward scaling.
A checkpoint writes the ring in fixed segments and hard-links those that did not change since the checkpoint before, so
that a checkpoint of a million transitions costs what was added since the last one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlctl.seeding import generator
from rlctl.types import Batch, Spec

SEGMENT = 1 << 16
"""Rows per checkpoint file."""


class Ring:
    """The last `capacity` transitions, sampled uniformly with replacement."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"a replay buffer holds at least one transition, got capacity={capacity}")
        self.capacity = capacity
        self.device = torch.device(device)
        self.rng = generator(seed, "replay", self.device)
        self.size = 0
        self.cursor = 0
        self.added = 0
        """Transitions ever added: tells which segments changed since a checkpoint."""
        self._rows: Batch | None = None
        self._last_index: tuple[int, int] | None = None
        """Device and inode of the index file this very ring wrote or read last."""

    def __len__(self) -> int:
        return self.size

    @property
    def rows(self) -> Batch:
        """The storage itself, `[capacity, ...]`; rows at `len(self)` and beyond are not data yet."""
        if self._rows is None:
            raise RuntimeError("this replay buffer is empty: add transitions before reading from it")
        return self._rows

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Append transitions `[N, ...]`, overwriting the oldest."""
        n = len(batch.reward)
        if n > self.capacity:
            raise ValueError(f"cannot add {n} transitions at once to a ring of {self.capacity}")
        first = min(n, self.capacity - self.cursor)  # rows before the wrap-around
        for dst, src in self._matched(batch):
            dst[self.cursor : self.cursor + first] = src[:first]
            if first < n:
                dst[: n - first] = src[first:]
        self.cursor = (self.cursor + n) % self.capacity
        self.size = min(self.size + n, self.capacity)
        self.added += n

    def sample(self, n: int) -> Batch:
        """`n` transitions drawn uniformly with replacement, `[n, ...]`."""
        rows = self.rows
        index = torch.randint(self.size, (n,), generator=self.rng, device=self.device)
        return rows.map(lambda x: x.index_select(0, index))

    def whole(self) -> Batch:
        """All transitions held, `[len(self), ...]`, in storage order (a view)."""
        return self.rows.map(lambda x: x[: self.size])

    # ---------------------------------------------------------------------------------------------- checkpoint
    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Write everything into `folder`; link unchanged segments from `previous`, an earlier checkpoint's folder.

        A folder that another ring wrote is not linked from, whatever its files are called.
        """
        if previous is not None and _identity(previous / "index.safetensors") != self._last_index:
            previous = None
        before = load_file(previous / "index.safetensors") if previous is not None else None
        index = {
            "capacity": torch.tensor(self.capacity),
            "size": torch.tensor(self.size),
            "cursor": torch.tensor(self.cursor),
            "added": torch.tensor(self.added),
            "rng": self.rng.get_state(),
        }
        save_file(index, folder / "index.safetensors")
        self._last_index = _identity(folder / "index.safetensors")
        dirty = self._dirty_since(None if before is None else int(before["added"]))
        for k, lo in enumerate(range(0, self.size, SEGMENT)):
            name = f"segment-{k:05d}.safetensors"
            old = None if previous is None else previous / name
            if old is not None and k not in dirty and old.exists():
                _link(old, folder / name)
            else:
                hi = min(lo + SEGMENT, self.size)
                save_file({m: x[lo:hi].contiguous() for m, x in self.rows.tensors().items()}, folder / name)

    def load(self, folder: Path) -> None:
        """Undo `save`: contents, cursor and sampling generator."""
        index = load_file(folder / "index.safetensors")
        if int(index["capacity"]) != self.capacity:
            raise ValueError(
                f"the checkpointed replay buffer has capacity {int(index['capacity'])}, this one {self.capacity}: "
                "resume with the buffer_size the run was started with"
            )
        self.size, self.cursor, self.added = (int(index[k]) for k in ("size", "cursor", "added"))
        self.rng.set_state(index["rng"])
        self._last_index = _identity(folder / "index.safetensors")
        for k, lo in enumerate(range(0, self.size, SEGMENT)):
            part = Batch.from_tensors(load_file(folder / f"segment-{k:05d}.safetensors", device=str(self.device)))
            for dst, src in self._matched(part):
                dst[lo : lo + len(src)] = src

    def _matched(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(storage, incoming) pairs, extras by name; allocates the storage when the first batch shows the shapes."""
        if self._rows is None:
            self._rows = batch.map(
                lambda x: torch.empty((self.capacity, *x.shape[1:]), dtype=x.dtype, device=self.device)
            )
        if batch.extra.keys() != self._rows.extra.keys():
            raise ValueError(
                f"this buffer holds the extras {sorted(self._rows.extra)}, the new transitions bring "
                f"{sorted(batch.extra)}: an agent's `act` must return the same ones every time"
            )
        pairs = list(zip(self._rows[:6], batch[:6], strict=True))
        return pairs + [(x, batch.extra[name]) for name, x in self._rows.extra.items()]

    def _dirty_since(self, added: int | None) -> set[int]:
        """Segments holding a row written after the ring had seen `added` transitions (None: all of them)."""
        new = self.added if added is None else self.added - added
        if new >= self.capacity:
            return set(range(-(-self.capacity // SEGMENT)))
        start = (self.cursor - new) % self.capacity
        spans = [(start, start + new)] if start + new <= self.capacity else [(start, self.capacity), (0, self.cursor)]
        return {k for lo, hi in spans if hi > lo for k in range(lo // SEGMENT, (hi - 1) // SEGMENT + 1)}


class Source(Protocol):
    """Anything that gives batches."""

    def sample(self, n: int) -> Batch:
        """`n` transitions, `[n, ...]`."""

    def whole(self) -> Batch:
        """All of them."""


@runtime_checkable
class SavesItself(Protocol):
    """A source that can be part of a checkpoint."""

    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Write into `folder`, linking what has not changed since `previous`."""

    def load(self, folder: Path) -> None:
        """Undo `save`."""


class Mix:
    """Two sources as one: a batch takes `share` of its rows from `fixed` (a dataset), the rest from `ring`.

    New transitions go to `ring`; while it is empty everything comes from `fixed`. With `share` 0.5 and 256 rows this is
    the symmetric sampling of offline-to-online learning (Ball et al. 2023, arXiv:2302.02948). With None each row is
    drawn from all transitions of both, as from one buffer that was filled with the data first. Rows of the two are not
    shuffled: losses are means over rows.
    """

    def __init__(self, fixed: Source, ring: Ring, share: float | None) -> None:
        if share is not None and not 0.0 <= share <= 1.0:
            raise ValueError(f"share is the part of a batch taken from the fixed source, in [0, 1]; got {share}")
        self.fixed, self.ring, self.share = fixed, ring, share

    def __len__(self) -> int:
        return len(self.ring)

    @property
    def holds(self) -> tuple[object, ...]:
        """What it saves and loads along with itself."""
        return self.fixed, self.ring

    def add(self, batch: Batch) -> None:
        """Append to the ring."""
        self.ring.add(batch)

    def sample(self, n: int) -> Batch:
        """`round(share * n)` rows of the fixed source, then the rest from the ring; or `n` of both alike."""
        if len(self.ring) == 0:
            return self.fixed.sample(n)
        if self.share is None:
            return self._sample_alike(n)
        k = round(self.share * n)
        if k == 0:
            return self.ring.sample(n)
        if k == n:
            return self.fixed.sample(n)
        return _joined(self.fixed.sample(k), self.ring.sample(n - k), lambda x, y: torch.cat([x, y]))

    def _sample_alike(self, n: int) -> Batch:
        """Uniformly from both tables, by the ring's generator; nothing is read on the host."""
        a, b = self.fixed.whole(), self.ring.whole()
        held = len(a.reward)
        index = torch.randint(held + len(b.reward), (n,), generator=self.ring.rng, device=self.ring.device)
        left, right = index.clamp(max=held - 1), (index - held).clamp(min=0)
        of_data = index < held

        def pick(x: Tensor, y: Tensor) -> Tensor:
            return torch.where(of_data.view(-1, *[1] * (x.dim() - 1)), x, y)

        return _joined(a.map(lambda x: x.index_select(0, left)), b.map(lambda x: x.index_select(0, right)), pick)

    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Checkpoint both sources (a dataset writes only its generator and fingerprint)."""
        for name, source in (("ring", self.ring), ("fixed", self.fixed)):
            if isinstance(source, SavesItself):
                (folder / name).mkdir()
                source.save(folder / name, None if previous is None else previous / name)

    def load(self, folder: Path) -> None:
        """Undo `save`."""
        for name, source in (("ring", self.ring), ("fixed", self.fixed)):
            if isinstance(source, SavesItself):
                source.load(folder / name)


def _joined(a: Batch, b: Batch, how: Callable[[Tensor, Tensor], Tensor]) -> Batch:
    """`how` of every tensor of `a` and its counterpart of `b`."""
    if a.extra.keys() != b.extra.keys():
        raise ValueError(
            f"the two sources carry different extras, {sorted(a.extra)} and {sorted(b.extra)}: give both the same"
        )
    core = [how(x, y) for x, y in zip(a[:6], b[:6], strict=True)]
    return Batch._make([*core, {name: how(a.extra[name], b.extra[name]) for name in a.extra}])


def planned_bytes(spec: Spec, capacity: int) -> int:
    """Bytes a full ring of `capacity` float32 transitions takes (two observations, an action, a reward, two flags)."""
    return capacity * (4 * (2 * spec.obs_dim + spec.act_dim + 1) + 2)


def refuse_if_too_large(spec: Spec, capacity: int) -> int:
    """The planned bytes of a replay buffer; MemoryError, before anything runs, when the machine lacks them.

    A ring grows page by page as it fills, so without this check the machine would give out hours into the run.
    """
    need = planned_bytes(spec, capacity)
    if spec.device.type == "cuda":
        free = torch.cuda.mem_get_info(spec.device)[0]
    else:
        free = psutil.virtual_memory().available
    if need > 0.9 * free:
        fits = int(0.9 * free / planned_bytes(spec, 1))
        raise MemoryError(
            f"a replay buffer of {capacity:,} transitions needs {need / 2**30:.1f} GiB, {spec.device} has "
            f"{free / 2**30:.1f} GiB free: lower it with --set buffer_size={fits} or less"
        )
    return need


def _identity(file: Path) -> tuple[int, int] | None:
    """What stays the same when a checkpoint is renamed, and differs between any two files."""
    try:
        info = file.stat()
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(old, new)
