"""Replay for a learner whose rows carry columns of whole episodes: its next actions, its returns-to-go.

What a dataset computes once for all its episodes (`Dataset.require`) has to be computed for those of an environment as
they come. An episode therefore enters the replay when it is over, complete with its columns; until then its rows wait,
and while there are no others batches come from the dataset alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlctl.data.columns import Request
from rlctl.data.ring import Ring
from rlctl.types import Batch


class EpisodeRing(Ring):
    """A `Ring` that takes vector steps in and stores episodes, each with the columns of `requests`."""

    def __init__(
        self, capacity: int, requests: Sequence[Request], device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        super().__init__(capacity, device, seed)
        self.requests = tuple(requests)
        self.waiting: list[Batch] = []
        """Vector steps of which some world's episode still runs, oldest first."""
        self.began: list[int] = []
        """By world, the place in `waiting` of the first step of its running episode."""

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Take in one step of every world, `[N, ...]`; store the episodes that end with it.

        An episode longer than the ring leaves its last rows.
        """
        self.began = self.began or [0] * len(batch.reward)
        if len(self.began) != len(batch.reward):
            raise ValueError(f"steps of {len(batch.reward)} worlds, where there were {len(self.began)} before")
        self.waiting.append(batch)
        for world in (batch.terminated | batch.truncated).nonzero().flatten().tolist():
            steps = [b.map(lambda x: x[world]).tensors() for b in self.waiting[self.began[world] :]]  # noqa: B023
            rows = Batch.from_tensors({k: torch.stack([s[k] for s in steps]) for k in steps[0]})
            ends = torch.tensor([len(steps)], device=rows.reward.device)
            added = {k: x for r in self.requests for k, x in r.compute(rows, ends).items()}
            episode = rows._replace(extra={**rows.extra, **added})
            super().add(episode.map(lambda x: x[-self.capacity :]))
            self.began[world] = len(self.waiting)
        done_with = min(self.began)
        del self.waiting[:done_with]
        self.began = [b - done_with for b in self.began]

    def save(self, folder: Path, previous: Path | None = None) -> None:
        """The ring, and the rows that wait."""
        super().save(folder, previous)
        state = {"began": torch.tensor(self.began, dtype=torch.int64)}
        steps = [b.tensors() for b in self.waiting]
        if steps:
            state |= {f"row.{k}": torch.stack([s[k] for s in steps]) for k in steps[0]}
        save_file(state, folder / "waiting.safetensors")

    def load(self, folder: Path) -> None:
        """Undo `save`."""
        super().load(folder)
        state = load_file(folder / "waiting.safetensors", device=str(self.device))
        self.began = state.pop("began").tolist()
        rows = Batch.from_tensors({k.removeprefix("row."): x for k, x in state.items()}) if state else None
        length = 0 if rows is None else len(rows.reward)
        self.waiting = [] if rows is None else [rows.map(lambda x, t=t: x[t]) for t in range(length)]  # type: ignore[misc]
