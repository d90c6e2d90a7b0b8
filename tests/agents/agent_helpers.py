"""What the tests of the agents share: the package's own checks (`rlctl.conformance`), and stub networks.

A new algorithm is covered as soon as it is registered. If its tiny version needs other settings, give it a row in
`TINY` or `SOLVE` of `rlctl/conformance/settings.py`; if its value is read in another way than by `v` or `q`, extend
`value_of` in `rlctl/conformance/probes.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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

__all__ = [
    "ACT_DIM",
    "BATCH",
    "HORIZON",
    "NUM_ENVS",
    "OBS_DIM",
    "NoHostReads",
    "Table",
    "as_dataset",
    "batch_for",
    "config",
    "differing",
    "differing_keys",
    "host_reads",
    "probe_dataset",
    "recorded_inputs",
    "silence",
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


class CriticTable(Table):
    """The same in the place of a QEnsemble, of which few members may be asked for."""

    def forward(self, obs: Tensor, action: Tensor, members: Tensor | None = None) -> Tensor:  # type: ignore[override]
        q = super().forward(obs, action)
        return q if members is None else q[members]


def silence(agent: Any, losses: Iterable[str]) -> None:
    """Multiply these losses of `agent` by 0: an update then computes them and takes no step along them."""
    for name in losses:
        inner = getattr(agent, name)
        setattr(agent, name, lambda *args, inner=inner, **kw: 0 * inner(*args, **kw))


def recorded_inputs(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """A list that fills with the inputs of every call of `module`."""
    seen: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(a.detach().clone() for a in args)))
    return seen
