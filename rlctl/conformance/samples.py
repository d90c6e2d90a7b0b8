"""Small agents, made-up transitions and comparisons: what the checks (and the tests of the algorithms) work with."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from rlctl import agents
from rlctl.conformance.settings import ACT_DIM, BATCH, OBS_DIM, SMALL, traits
from rlctl.data.dataset import Dataset
from rlctl.types import Agent, Batch, Spec


def config(name: str, *layers: Any) -> Any:
    """The algorithm's config with those of the wanted values it has a field for."""
    cls = agents.get(name).Config
    known = {f.name for f in fields(cls)}
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    return cls(**{k: v for k, v in merged.items() if k in known})


def tiny(name: str, seed: int = 0, *, device: str = "cpu", **overrides: Any) -> Agent:
    """A small agent of the algorithm, for `OBS_DIM` numbers in, `ACT_DIM` out; offline ones have seen a dataset."""
    cfg = config(name, SMALL, traits(name).tiny, overrides)
    spec = Spec(OBS_DIM, ACT_DIM, getattr(cfg, "num_envs", 1), torch.device(device), seed=seed)
    agent: Any = agents.make(name, spec, cfg)
    if other := traits(name).wraps:
        agent.wrap(tiny(other, seed, device=device))
    if agent.regime == "offline":
        rows = transitions(torch.Generator().manual_seed(123), 200)
        agent.prepare(as_dataset(rows.map(lambda x: x.to(device))))
    made: Agent = agent
    return made


def as_dataset(rows: Batch) -> Dataset:
    """Transitions as a dataset of one episode."""
    return Dataset(rows, torch.tensor([len(rows.reward)]), id="made-up")


def transitions(g: torch.Generator, *lead: int, obs_dim: int = OBS_DIM, act_dim: int = ACT_DIM) -> Batch:
    """Made-up transitions [*lead, ...]; about a tenth terminated, a tenth truncated."""
    return Batch(
        obs=torch.randn(*lead, obs_dim, generator=g) + 0.5,
        action=torch.rand(*lead, act_dim, generator=g) * 1.8 - 0.9,
        reward=torch.randn(*lead, generator=g),
        next_obs=torch.randn(*lead, obs_dim, generator=g) + 0.5,
        terminated=torch.rand(*lead, generator=g) < 0.1,
        truncated=torch.rand(*lead, generator=g) < 0.1,
    )


def batch_for(agent: Agent, seed: int = 0) -> Batch:
    """A batch of the agent's regime, with the `extra` that its `act` stores; leaves its generators as they were."""
    g = torch.Generator().manual_seed(seed)
    on_policy = agent.regime == "on_policy"
    lead = (agent.cfg.horizon, agent.cfg.num_envs) if on_policy else (BATCH,)
    batch = transitions(g, *lead)
    with agent.borrowed_rng(seed), torch.no_grad():
        if on_policy:
            acted = [agent.act(obs, explore=True) for obs in batch.obs]
            action = torch.stack([a for a, _ in acted])
            extra = {k: torch.stack([e[k] for _, e in acted]) for k in acted[0][1]}
        else:
            action, extra = batch.action, agent.act(batch.obs, explore=True)[1]
    return batch._replace(action=action, extra=columns(g) if agent.regime == "offline" else extra)


def columns(g: torch.Generator) -> dict[str, Tensor]:
    """Made-up columns of a dataset [BATCH, ...], whether or not the agent asks for them."""
    return {
        "next_action": torch.rand(BATCH, ACT_DIM, generator=g) * 1.8 - 0.9,
        "has_next_action": torch.rand(BATCH, generator=g) < 0.8,
        "mc_return": torch.randn(BATCH, generator=g),
    }


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, by name."""
    return {k: v.clone() for k, v in module.state_dict().items()}


def differing(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit-equal to those of `snapshot`."""
    return differing_keys(module.state_dict(), before)


def differing_keys(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit-equal in two snapshots."""
    return [k for k, v in a.items() if not torch.equal(v, b[k])]
