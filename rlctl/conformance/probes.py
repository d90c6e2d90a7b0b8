"""Training on the probe environments, whose values and best actions are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlctl import agents
from rlctl.conformance.samples import config
from rlctl.conformance.settings import DEFAULT_STEPS, FAST, traits
from rlctl.data.dataset import Dataset
from rlctl.run import Run
from rlctl.train import SCHEDULES, Job
from rlctl.types import Agent, Batch, Spec
from rlctl_envs.probes import ProbeEnv, make_probe

STARTS: dict[str, list[list[float]]] = {
    "observation": [[-1.0], [1.0]],
    "both": [[-1.0], [1.0]],
    "delayed": [[0.0], [1.0]],
}
"""Every observation of a probe; those not named have only 0."""


def probe_dataset(env: ProbeEnv, steps: int, seed: int = 0, expert: bool = False) -> Dataset:
    """What a uniformly random policy meets in `steps` vector steps, world after world.

    `expert`: what the best policy meets, put together as the one episode of a demonstration.
    """
    g = torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    rows = []
    for _ in range(steps):
        action = torch.rand(env.num_envs, env.act_dim, generator=g) * 2 - 1
        action = env.optimal_action(obs) if expert else action
        following, reward, terminated, truncated, info = env.step(action)
        rows.append(Batch(obs, action, reward, info["next_obs"], terminated, truncated))
        obs = following
    stacked = Batch._make([*(torch.stack(x, 1).flatten(0, 1) for x in list(zip(*rows, strict=True))[:6]), {}])
    ends = (stacked.terminated | stacked.truncated).clone()
    ends[steps - 1 :: steps] = True  # the last row of each world
    if expert:
        ends[:-1] = False
    return Dataset(stacked, ends.nonzero()[:, 0] + 1, id=f"made-up-{env.id}", seed=seed)


def write_dataset(file: Path, probe: str = "both") -> Path:
    """What a random policy meets in a probe, as an .npz file of 200 rows."""
    rows = probe_dataset(make_probe(probe, 4), 50).rows
    columns = {
        "observations": rows.obs,
        "next_observations": rows.next_obs,
        "actions": rows.action,
        "rewards": rows.reward,
        "terminals": rows.terminated,
        "timeouts": rows.truncated,
    }
    np.savez(file, **{k: v.numpy() for k, v in columns.items()})  # type: ignore[arg-type]
    return file


def solve(name: str, probe: str, seed: int = 0, **overrides: Any) -> tuple[Agent, ProbeEnv]:
    """Train the algorithm on a probe, through the schedule a run would use; an imitator from the best actions' data."""
    cls, known = agents.get(name), traits(name)
    cfg = config(name, FAST, {"steps": DEFAULT_STEPS[cls.regime]}, known.solve, overrides)
    num_envs = getattr(cfg, "num_envs", 8)
    env = make_probe(probe, num_envs, seed=seed)
    spec = Spec(env.obs_dim, env.act_dim, num_envs, env.device, env.episode_len, seed)
    agent = agents.make(name, spec, cfg)
    expert = known.learns == "actions"
    data = probe_dataset(make_probe(probe, 8), 100, expert=expert) if "data" in cls.sources() else None
    if data is not None:
        data.rows = data.rows._replace(reward=known.reward_scale * data.rows.reward)
    schedule = cls.schedule or SCHEDULES[cls.regime]
    schedule(Job(agent, env if "env" in cls.sources() else None, data, Run(seed=seed), cfg, seed))
    return agent, env


def knows_values(agent: Agent) -> bool:
    """Whether `value_of` finds what the agent thinks a state is worth."""
    return hasattr(agent, "v") or hasattr(agent, "q")


@torch.no_grad()
def value_of(agent: Agent, obs: Tensor) -> Tensor:
    """The agent's own estimate [N] of the value of raw observations [N, O] under its deterministic action.

    Read from `v(obs)` or, without one, from `q(obs, action)`; both may be ensembles [E, N]. Observations are
    normalised by `normalize` or `obs_norm`, where the agent has one.
    """
    normalise = getattr(agent, "normalize", None) or getattr(agent, "obs_norm", None) or torch.nn.Identity()
    v, q = getattr(agent, "v", None), getattr(agent, "q", None)
    value: Tensor
    if v is not None:
        value = v(normalise(obs))
    elif q is not None:
        value = q(normalise(obs), agent.act(obs, explore=False)[0])
    else:
        raise NotImplementedError(f"value_of does not know where {type(agent).__name__} keeps its value")
    value = value.mean(0) if value.dim() == 2 else value  # an ensemble
    assert value.shape == obs.shape[:1], f"a value per observation is [N], got {tuple(value.shape)} for N={len(obs)}"
    return value
