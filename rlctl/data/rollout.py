"""A rollout: `horizon` consecutive steps of N worlds, written in place."""

from __future__ import annotations

import torch

from rlctl.types import Batch


class Rollout:
    """`[T, N]` transitions, allocated once and overwritten by each rollout. `whole()` is valid until the next `add`."""

    def __init__(self, horizon: int, device: torch.device | str = "cpu") -> None:
        self.horizon = horizon
        self.device = torch.device(device)
        self.length = 0
        self._rows: Batch | None = None

    def __len__(self) -> int:
        return self.length

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Append one vector step `[N, ...]`; after a full rollout the next one starts."""
        if self._rows is None:
            self._rows = batch.map(lambda x: torch.empty((self.horizon, *x.shape), dtype=x.dtype, device=self.device))
        t = self.length % self.horizon
        for dst, src in zip(self._rows[:6], batch[:6], strict=True):
            dst[t] = src
        for name, src in batch.extra.items():
            self._rows.extra[name][t] = src
        self.length = t + 1

    def whole(self) -> Batch:
        """The full rollout, `[T, N, ...]`."""
        if self._rows is None or self.length != self.horizon:
            raise RuntimeError(f"the rollout holds {self.length} of {self.horizon} steps: fill it before reading it")
        return self._rows
