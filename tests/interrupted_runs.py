"""Runs that are stopped on the way and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from rlctl.errors import Interrupted
from rlctl.run import Run, RunConfig
from rlctl.types import Agent, Metrics


class StopAt(Run):
    """Behaves as if a signal came at a given progress."""

    stop_at = -1

    def tick(self, agent: Agent, metrics: list[Metrics], env_steps: int) -> None:  # type: ignore[override]
        if self.progress + (env_steps or len(metrics)) >= self.stop_at > 0:
            self._stop = True
        super().tick(agent, metrics, env_steps)


def assert_resumes_anywhere(train: Callable[[Run], Agent], folder: Path, stops: Iterable[int]) -> None:
    """`train(run)` stopped at each of `stops` and resumed ends as a run that never stopped, bit for bit."""
    options = RunConfig(tensorboard=False, checkpoint_every=37)
    whole = Run(folder / "whole", options)
    expected = {**train(whole).state_dict(), "made": torch.tensor([whole.env_steps, whole.updates])}
    whole.close()
    for at in stops:
        run = StopAt(folder / f"at{at}", options)
        run.stop_at = at
        with pytest.raises(Interrupted):
            train(run)
        assert run.progress == at
        run.close()
        again = StopAt(folder / f"at{at}", options, resume=True)
        got = {**train(again).state_dict(), "made": torch.tensor([again.env_steps, again.updates])}
        again.close()
        assert [k for k, v in expected.items() if not torch.equal(v, got[k])] == [], f"interrupted at {at}"
