"""The loops. They own time: who acts, when to learn, when to tick. No loop asks which agent it holds.

Every loop is a plain function you can call or replace; a multi-stage method is a function that calls several. `steps`
and `updates` are totals of the named stage, not of the call: a loop whose stage has made them returns at once, so a
resumed run simply calls its loops again from the first, and phases that alternate give growing totals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rlctl import parallel
from rlctl.data.episodes import EpisodeRing
from rlctl.data.reward import RewardName
from rlctl.data.ring import Mix, Ring, refuse_if_too_large
from rlctl.data.rollout import Rollout
from rlctl.types import Agent, AgentConfig, Batch, Buffer, Count, Fraction, Metrics, Positive, Regime

if TYPE_CHECKING:
    from rlctl.run import Run
    from rlctl_envs import VecEnv


@dataclass(frozen=True)
class OnPolicyConfig(AgentConfig):
    """What `on_policy` needs to know."""

    num_envs: Count = 8
    """Worlds stepped side by side."""
    horizon: Count = 256
    """Steps of each world per rollout; one update learns from num_envs * horizon transitions."""
    stagger: bool = True
    """Spread the worlds' time limits evenly: otherwise a rollout sees them all at the same age of their episodes."""


@dataclass(frozen=True)
class OffPolicyConfig(AgentConfig):
    """What `off_policy` needs to know."""

    num_envs: Count = 1
    """Worlds stepped side by side."""
    buffer_size: Count = 1_000_000
    """Transitions the replay buffer keeps."""
    batch_size: Count = 256
    """Transitions per update."""
    learning_starts: Annotated[int, Field(ge=0)] = 10_000
    """Environment steps of uniform random actions before learning starts."""
    updates_per_step: Positive = 1.0
    """Updates per environment step (the update-to-data ratio)."""


@dataclass(frozen=True)
class OfflineConfig(AgentConfig):
    """What `offline` needs to know; `steps` counts gradient steps."""

    batch_size: Count = 256
    """Transitions per update."""


@dataclass(frozen=True)
class OfflineRLConfig(OfflineConfig):
    """What a learner of values from data needs to know: how it sees the data, and how it goes on in an environment."""

    normalize_obs: bool = False
    """z-score observations with the dataset's mean and std (+ 1e-3)."""
    reward: RewardName = "none"
    """Reward transform: none, return-range, standardise, or a formula like 10r-5 (see docs/data.md)."""
    offline_updates: Annotated[int, Field(ge=0)] | None = None
    """Gradient steps on the data alone, after which the run goes online for `steps` environment steps; null: `steps`
    gradient steps on the data, and no environment."""
    data_share: Fraction | None = 0.5
    """Online: part of each batch that comes from the dataset; null draws from dataset and replay as from one table."""
    num_envs: Count = 1
    """Online: worlds stepped side by side."""
    buffer_size: Count = 1_000_000
    """Online: transitions the replay buffer keeps, besides the dataset."""
    updates_per_step: Positive = 1.0
    """Online: updates per environment step."""

    @property
    def updates_on_data(self) -> int:
        """Gradient steps of the part of the run without an environment."""
        return self.steps if self.offline_updates is None else self.offline_updates


class Dataset(Protocol):
    """What `offline` needs of a dataset."""

    def sample(self, n: int) -> Batch:
        """`n` transitions."""

    def whole(self) -> Batch:
        """All of them."""


@torch.no_grad()
def collect(agent: Agent, env: VecEnv, obs: Tensor, into: Buffer | Rollout, run: Run, random: bool = False) -> Tensor:
    """One vector step: act on `obs` [N, O], step, store. Returns the next observation to act on.

    `random` asks the agent for a warm-up action (`Agent.random_act`) instead of one of its policy.
    """
    action, extra = agent.random_act(obs) if random else agent.act(obs, explore=True)
    next_obs, reward, terminated, truncated, info = env.step(action)
    into.add(Batch(obs, action, reward, info["next_obs"], terminated, truncated, extra))
    run.episodes.add(reward, terminated | truncated)
    agent.counters["env_steps"] += env.num_envs * parallel.world_size()
    return next_obs


Learn = Callable[[Batch], Metrics]
"""What a loop calls on a batch; `agent.update` unless a phase of its own is wanted (pre-training, refitting)."""


def on_policy(
    agent: Agent,
    env: VecEnv,
    run: Run,
    *,
    steps: int | None = None,
    horizon: int | None = None,
    stagger: bool | None = None,
    learn: Learn | None = None,
    stage: str = "on_policy",
) -> None:
    """Roll out `horizon` steps of every world, learn once from them, until the stage has taken `steps` env steps.

    Steps are those of all processes that share the update (`rlctl.parallel`). What is not given comes from the agent's
    config.
    """
    steps, horizon = agent.cfg.steps if steps is None else steps, agent.cfg.horizon if horizon is None else horizon
    stagger = getattr(agent.cfg, "stagger", False) if stagger is None else stagger
    learn = learn or agent.update
    now = run.stage(agent, stage)
    if now.env_steps >= steps:
        run.pass_over(now, env=env)
        return
    rollout = Rollout(horizon, agent.spec.device)
    obs = run.begin(agent, now, env=env, left=steps - now.env_steps, stagger=stagger)
    while now.env_steps < steps:
        with run.timed("collect"):
            for _ in range(horizon):
                obs = collect(agent, env, obs, rollout, run)
        env.report()  # a full buffer or a bad action on a GPU is told before anything is learned from it
        with run.timed("learn"):
            metrics = learn(rollout.whole())
        run.tick(agent, [metrics], env_steps=horizon * env.num_envs * parallel.world_size())


def off_policy(
    agent: Agent,
    env: VecEnv,
    buffer: Buffer,
    run: Run,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_starts: int | None = None,
    updates_per_step: float | None = None,
    learn: Learn | None = None,
    stage: str = "off_policy",
) -> None:
    """One vector step into `buffer`, then the updates it is owed, until the stage has taken `steps` env steps.

    The first `learning_starts` env steps of the stage act at random and earn no updates. What is not given comes from
    the agent's config.
    """
    cfg = agent.cfg
    steps = cfg.steps if steps is None else steps
    batch_size = cfg.batch_size if batch_size is None else batch_size
    starts = cfg.learning_starts if learning_starts is None else learning_starts
    ratio = cfg.updates_per_step if updates_per_step is None else updates_per_step
    learn = learn or agent.update
    now = run.stage(agent, stage)
    if now.env_steps >= steps:
        run.pass_over(now, env=env, buffer=buffer)
        return
    obs = run.begin(agent, now, env=env, buffer=buffer, left=steps - now.env_steps)

    def earned(env_steps: int) -> int:
        return int(max(env_steps - starts, 0) * ratio)

    while now.env_steps < steps:
        with run.timed("collect"):
            obs = collect(agent, env, obs, buffer, run, random=now.env_steps < starts)
        with run.timed("learn"):
            due = earned(now.env_steps + env.num_envs) - earned(now.env_steps)
            metrics = [learn(buffer.sample(batch_size)) for _ in range(due)]
        run.tick(agent, metrics, env_steps=env.num_envs)


def offline(
    agent: Agent,
    data: Dataset,
    run: Run,
    *,
    updates: int | None = None,
    batch_size: int | None = None,
    learn: Learn | None = None,
    stage: str = "offline",
) -> None:
    """Learn from `data` alone, until the stage has made `updates` updates (the config's `steps` if not given)."""
    updates = agent.cfg.steps if updates is None else updates
    batch_size = agent.cfg.batch_size if batch_size is None else batch_size
    learn = learn or agent.update
    agent.prepare(data)
    now = run.stage(agent, stage)
    if now.updates >= updates:
        run.pass_over(now, buffer=data)
        return
    run.begin(agent, now, buffer=data, left=updates - now.updates)
    while now.updates < updates:
        with run.timed("learn"):
            metrics = learn(data.sample(batch_size))
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
    on_policy(job.agent, job.env, job.run, steps=job.cfg.steps)


def replay(job: Job) -> Buffer:
    """A fresh replay buffer; mixed with the dataset, `data_share` of each batch, where there is one."""
    assert job.env is not None
    refuse_if_too_large(job.agent.spec, min(job.cfg.buffer_size, job.cfg.steps + job.env.num_envs))
    ring = Ring(job.cfg.buffer_size, job.agent.spec.device, job.seed)
    return ring if job.data is None else Mix(job.data, ring, job.cfg.data_share)


def train_off_policy(job: Job) -> None:
    """The schedule of an off-policy agent: a fresh replay buffer and the loop."""
    assert job.env is not None
    off_policy(job.agent, job.env, replay(job), job.run)


def train_offline(job: Job) -> None:
    """The schedule of an offline learner: the data alone, or first the data and then an environment."""
    if getattr(job.cfg, "offline_updates", None) is None:
        offline(job.agent, job.data, job.run)
    else:
        offline_to_online(job)


def offline_to_online(job: Job) -> None:
    """`offline_updates` updates on the data, then `steps` env steps with batches of both: one agent, one run.

    Statistics of observations and rewards are those of the data throughout. No action is uniformly random: the policy
    is trained. Columns that the agent asked of its dataset are computed for the environment's episodes too.
    """
    cfg, agent, data = job.cfg, job.agent, job.data
    assert job.env is not None
    refuse_if_too_large(agent.spec, min(cfg.buffer_size, cfg.steps + job.env.num_envs))
    job.run.plan(cfg.offline_updates + cfg.steps)
    offline(agent, data, job.run, updates=cfg.offline_updates)
    ring = (
        EpisodeRing(cfg.buffer_size, list(data.requests.values()), agent.spec.device, job.seed)
        if data.requests
        else Ring(cfg.buffer_size, agent.spec.device, job.seed)
    )
    off_policy(agent, job.env, Mix(data, ring, cfg.data_share), job.run, learning_starts=0, stage="online")


SCHEDULES: dict[Regime, Callable[[Job], None]] = {
    "on_policy": train_on_policy,
    "off_policy": train_off_policy,
    "offline": train_offline,
}
