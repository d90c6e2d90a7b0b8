"""What the tests of the agents share: the package's own checks (`rlctl.conformance`), and stub networks.

A new algorithm is covered as soon as it is registered. If its tiny version needs other settings, give it a row in
`TINY` or `SOLVE` of `rlctl/conformance/settings.py`; if its value is read in another way than by `v` or `q`, extend
`value_of` in `rlctl/conformance/probes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlctl.conformance.host_reads import NoHostReads, host_reads
from rlctl.conformance.probes import probe_dataset, solve, value_of
from rlctl.conformance.samples import (
    as_dataset,
    batch_for,
    config,
    differing,
    differing_keys,
    snapshot,
    tiny,
    transitions,
)
from rlctl.conformance.settings import ACT_DIM, BATCH, HORIZON, NUM_ENVS, OBS_DIM
from rlctl.errors import Interrupted
from rlctl.run import Run, RunConfig
from rlctl.types import Agent, Metrics

__all__ = [
    "ACT_DIM",
    "BATCH",
    "HORIZON",
    "NUM_ENVS",
    "OBS_DIM",
    "NoHostReads",
    "StopAt",
    "Table",
    "as_dataset",
    "assert_resumes_anywhere",
    "batch_for",
    "config",
    "differing",
    "differing_keys",
    "host_reads",
    "probe_dataset",
    "recorded_inputs",
    "snapshot",
    "solve",
    "tiny",
    "transitions",
    "value_of",
    "xavier_uniform",
]


def xavier_uniform(module: nn.Module) -> bool:
    """Whether all linear layers of `module` look Xavier-uniform: they fill the range, and biases are zero."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    filled = [float(m.weight.detach().abs().max()) / (6 / sum(m.weight.shape)) ** 0.5 for m in layers]
    return all(0.8 < x <= 1 for x in filled) and not any(bool(m.bias.any()) for m in layers)


class Table(nn.Module):
    """Returns one given tensor, whatever comes in; remembers its inputs."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, *args: Tensor) -> Tensor:
        self.seen.append(args)
        return self.out


def recorded_inputs(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """A list that fills with the inputs of every call of `module`."""
    seen: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(a.detach().clone() for a in args)))
    return seen


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
