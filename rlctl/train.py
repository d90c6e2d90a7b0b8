"""The loops. They own time: who acts, when to learn, when to tick. No loop asks which agent it holds.

Every loop is a plain function you can call or replace; a multi-stage method is a function that calls several.
`steps` and `updates` are totals of the run, not of the call, so a resumed run simply calls its loops again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rlctl.data.ring import Ring, refuse_if_too_large
from rlctl.data.rollout import Rollout
from rlctl.types import Agent, AgentConfig, Batch, Buffer, Regime

if TYPE_CHECKING:
    from rlctl.run import Run
    from rlctl_envs import VecEnv


@dataclass(frozen=True)
class OnPolicyConfig(AgentConfig):
    """What `on_policy` needs to know."""

    num_envs: int = 8
    """Worlds stepped side by side."""
    horizon: int = 256
    """Steps of each world per rollout; one update learns from num_envs * horizon transitions."""


@dataclass(frozen=True)
class OffPolicyConfig(AgentConfig):
    """What `off_policy` needs to know."""

    num_envs: int = 1
    """Worlds stepped side by side."""
    buffer_size: int = 1_000_000
    """Transitions the replay buffer keeps."""
    batch_size: int = 256
    """Transitions per update."""
    learning_starts: int = 10_000
    """Environment steps of uniform random actions before learning starts."""
    updates_per_step: float = 1.0
    """Updates per environment step (the update-to-data ratio)."""


@dataclass(frozen=True)
class OfflineConfig(AgentConfig):
    """What `offline` needs to know; `steps` counts gradient steps."""

    batch_size: int = 256
    """Transitions per update."""


class Dataset(Protocol):
    """What `offline` needs of a dataset."""

    def sample(self, n: int) -> Batch:
        """`n` transitions."""

    def whole(self) -> Batch:
        """All of them."""


@torch.no_grad()
def collect(agent: Agent, env: VecEnv, obs: Tensor, into: Buffer | Rollout, run: Run, random: bool = False) -> Tensor:
    """One vector step: act on `obs` [N, O], step, store. Returns the next observation to act on.

    `random` replaces the action by a uniform one from [-1, 1]^A.
    """
    action, extra = agent.act(obs, explore=True)
    if random:
        action = torch.rand(action.shape, generator=agent.rng["action"], device=action.device) * 2 - 1
    next_obs, reward, terminated, truncated, info = env.step(action)
    into.add(Batch(obs, action, reward, info["next_obs"], terminated, truncated, extra))
    run.episodes.add(reward, terminated | truncated)
    return next_obs


def on_policy(agent: Agent, env: VecEnv, run: Run, *, steps: int, horizon: int) -> None:
    """Roll out `horizon` steps of every world, learn once from them, until the run has taken `steps` env steps."""
    rollout = Rollout(horizon, agent.spec.device)
    obs = run.begin(agent, env=env, total=steps)
    while run.env_steps < steps:
        with run.timed("collect"):
            for _ in range(horizon):
                obs = collect(agent, env, obs, rollout, run)
        with run.timed("learn"):
            metrics = agent.update(rollout.whole())
        run.tick(agent, [metrics], env_steps=horizon * env.num_envs)


def off_policy(
    agent: Agent,
    env: VecEnv,
    buffer: Buffer,
    run: Run,
    *,
    steps: int,
    batch_size: int = 256,
    learning_starts: int = 0,
    updates_per_step: float = 1.0,
) -> None:
    """One vector step into `buffer`, then the updates it is owed, until the run has taken `steps` env steps.

    The first `learning_starts` env steps of the run act uniformly at random and earn no updates.
    """
    obs = run.begin(agent, env=env, buffer=buffer, total=steps)

    def earned(env_steps: int) -> int:
        return int(max(env_steps - learning_starts, 0) * updates_per_step)

    while run.env_steps < steps:
        after = run.env_steps + env.num_envs
        with run.timed("collect"):
            obs = collect(agent, env, obs, buffer, run, random=run.env_steps < learning_starts)
        with run.timed("learn"):
            due = earned(after) - earned(run.env_steps)
            metrics = [agent.update(buffer.sample(batch_size)) for _ in range(due)]
        run.tick(agent, metrics, env_steps=env.num_envs)


def offline(agent: Agent, data: Dataset, run: Run, *, updates: int, batch_size: int = 256) -> None:
    """Learn from `data` alone, until the run has made `updates` updates."""
    agent.prepare(data.whole())
    run.begin(agent, buffer=data, total=updates)
    while run.updates < updates:
        with run.timed("learn"):
            metrics = agent.update(data.sample(batch_size))
        run.tick(agent, [metrics], env_steps=0)


# ---------------------------------------------------------------------------------------------------- schedules
@dataclass
class Job:
    """Everything a schedule may use: the parts of one run, built by `rlctl.experiment`."""

    agent: Agent
    env: VecEnv | None
    data: Any
    run: Run
    cfg: Any
    seed: int = 0


def train_on_policy(job: Job) -> None:
    """The schedule of an on-policy agent."""
    assert job.env is not None
    on_policy(job.agent, job.env, job.run, steps=job.cfg.steps, horizon=job.cfg.horizon)


def train_off_policy(job: Job) -> None:
    """The schedule of an off-policy agent: a fresh replay buffer and the loop."""
    assert job.env is not None
    c = job.cfg
    refuse_if_too_large(job.agent.spec, min(c.buffer_size, c.steps + job.env.num_envs))
    buffer = Ring(c.buffer_size, job.agent.spec.device, job.seed)
    off_policy(
        job.agent,
        job.env,
        buffer,
        job.run,
        steps=c.steps,
        batch_size=c.batch_size,
        learning_starts=c.learning_starts,
        updates_per_step=c.updates_per_step,
    )


def train_offline(job: Job) -> None:
    """The schedule of an offline learner."""
    offline(job.agent, job.data, job.run, updates=job.cfg.steps, batch_size=job.cfg.batch_size)


SCHEDULES: dict[Regime, Callable[[Job], None]] = {
    "on_policy": train_on_policy,
    "off_policy": train_off_policy,
    "offline": train_offline,
}
