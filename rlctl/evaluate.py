"""Evaluation: frozen agent, environments of its own, every episode kept.

Nothing an evaluation does reaches training: the normalisers stand still (only an agent's `update` moves them), the
agent draws from borrowed generators, and the environments are separate. Episodes start from seeds that depend on the
run's seed alone, so two algorithms with one seed meet the same initial states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch

from rlctl.types import Agent

if TYPE_CHECKING:
    from rlctl_envs import VecEnv


@dataclass(frozen=True)
class Evaluation:
    """Raw (undiscounted, unnormalised) returns, one per episode."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean return."""
        return fmean(self.returns)

    @property
    def std(self) -> float:
        """Sample standard deviation over episodes; 0 for a single one."""
        return stdev(self.returns) if len(self.returns) > 1 else 0.0


@torch.no_grad()
def evaluate(
    agent: Agent,
    env: VecEnv,
    episodes: int,
    *,
    seed: int = 0,
    stochastic: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run `episodes` episodes and return their returns and lengths.

    Worlds run side by side; of each world the first episode after a reset counts, so short episodes are not
    over-represented. `env.num_envs` < `episodes` takes several rounds. Returns None if `interrupted()` turned true.
    """
    if episodes < 1:
        raise ValueError(f"an evaluation needs at least one episode, got {episodes}")
    returns: list[float] = []
    lengths: list[int] = []
    was_training = agent.training
    agent.eval()
    try:
        with agent.borrowed_rng(seed):
            for round_ in range(-(-episodes // env.num_envs)):
                obs, _ = env.reset(seed=seed + round_ * env.num_envs)
                total = torch.zeros(env.num_envs, dtype=torch.float64, device=obs.device)
                length = torch.zeros(env.num_envs, dtype=torch.int64, device=obs.device)
                alive = torch.ones(env.num_envs, dtype=torch.bool, device=obs.device)
                # asking a GPU whether anybody is alive makes it wait: there, some steps too many are cheaper
                every, steps = (1 if obs.device.type == "cpu" else 32), 0
                while steps % every or bool(alive.any()):
                    steps += 1
                    if interrupted():
                        return None
                    action, _ = agent.act(obs, explore=stochastic)
                    obs, reward, terminated, truncated, _ = env.step(action)
                    total += torch.where(alive, reward, 0.0)  # a world past its end may return anything, NaN too
                    length += alive
                    alive &= ~(terminated | truncated)
                returns += total.tolist()
                lengths += length.tolist()
    finally:
        agent.train(was_training)
    return Evaluation(returns[:episodes], lengths[:episodes])
