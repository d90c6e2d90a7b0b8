"""What the loops promise: when learning starts, how many updates a step earns, which episodes an evaluation counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlctl
from rlctl.ops import adam, minimize
from rlctl.train import OffPolicyConfig
from rlctl.types import Agent, Batch, Metrics, Spec
from rlctl_envs.probes import make_probe


class Counting(Agent):
    """Counts its calls; acts with zeros."""

    regime = "off_policy"
    Config = OffPolicyConfig

    def __init__(self, spec: Spec, cfg: Any = None) -> None:
        super().__init__(spec, cfg)
        self.acted = 0
        self.at: list[int] = []

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        self.acted += 1
        return torch.zeros(len(obs), self.spec.act_dim), {"step": torch.full((len(obs),), self.acted)}

    def random_act(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return super().random_act(obs)[0], {"step": torch.zeros(len(obs), dtype=torch.int64)}

    def update(self, batch: Batch) -> Metrics:
        self.at.append(self.counters["env_steps"])
        return {"losses/none": torch.zeros(())}


@pytest.mark.parametrize(
    ("num_envs", "starts", "ratio", "steps", "updates"),
    [(1, 10, 1.0, 30, 20), (1, 0, 0.25, 20, 5), (3, 10, 1.0, 30, 20), (4, 8, 2.0, 24, 32), (7, 5, 0.5, 21, 8)],
)
def test_updates_earned(num_envs: int, starts: int, ratio: float, steps: int, updates: int) -> None:
    """(steps - learning_starts) * updates_per_step, rounded down, however many worlds step at once."""
    env = make_probe("both", num_envs, seed=0)
    agent = Counting(Spec(env.obs_dim, env.act_dim, num_envs))
    ring, run = rlctl.Ring(100), rlctl.Run()
    rlctl.off_policy(agent, env, ring, run, steps=steps, batch_size=2, learning_starts=starts, updates_per_step=ratio)
    assert len(agent.at) == run.updates == updates
    assert min(agent.at) > starts
    assert run.env_steps == agent.counters["env_steps"] == steps
    warm = -(-starts // num_envs)  # vector steps of warm-up: random actions, and their own extra
    stored = ring.whole()
    assert int((stored.extra["step"] == 0).sum()) == warm * num_envs
    assert bool((stored.action[: warm * num_envs] != 0).all())
    assert agent.acted == steps // num_envs - warm


def test_loops_take_what_is_not_given_from_the_config() -> None:
    env = make_probe("both", 2, seed=0)
    cfg = OffPolicyConfig(num_envs=2, steps=12, learning_starts=4, batch_size=3, updates_per_step=0.5)
    agent, run = Counting(Spec(env.obs_dim, env.act_dim, 2), cfg), rlctl.Run()
    rlctl.off_policy(agent, env, rlctl.Ring(50), run)
    assert (run.env_steps, run.updates) == (12, 4)


def test_rounds_of_an_evaluation_meet_different_episodes() -> None:
    """More episodes than worlds: every one has a start of its own, on native tasks and behind the adapter."""
    for name in ("Hopper", "Pendulum-v1"):
        env = rlctl.make_env(name, 4)
        agent = Counting(Spec(env.obs_dim, env.act_dim, 4))
        result = rlctl.evaluate(agent, env, 10, seed=3)
        assert result is not None
        assert len(result.returns) == len(result.lengths) == 10
        assert len(set(result.returns)) == 10
        env.close()


def test_an_evaluation_counts_the_first_episode_of_each_world() -> None:
    env = make_probe("time-limit", 3, episode_len=7)
    result = rlctl.evaluate(Counting(Spec(env.obs_dim, env.act_dim, 3)), env, 5)
    assert result is not None
    assert result.returns == [7.0] * 5
    assert result.lengths == [7] * 5


def test_a_loss_from_before_a_step_cannot_be_differentiated_after_it() -> None:
    """The fused optimiser writes behind autograd's back; `minimize` tells it, so a stale graph is an error."""
    layer = torch.nn.Linear(3, 3)
    opt = adam(layer.parameters(), 0.1)
    x = torch.randn(5, 3)
    stale = layer(layer(x)).square().mean()
    minimize(layer(x).square().mean(), opt)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(stale, list(layer.parameters()))


def test_a_parameter_without_an_optimiser_is_refused() -> None:
    env = make_probe("both", 1)
    agent = Counting(Spec(env.obs_dim, env.act_dim))
    agent.forgotten = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="no optimiser of Counting holds forgotten"):
        rlctl.off_policy(agent, env, rlctl.Ring(10), rlctl.Run(), steps=4, learning_starts=0)
