"""Probe environments pay what they say: values by simulation equal the closed forms."""

from __future__ import annotations

import pytest
import torch

import rlctl_envs
from rlctl_envs.probes import PROBES, ProbeEnv, make_probe

GAMMA = 0.9


@pytest.mark.parametrize("act_dim", [1, 3])
@pytest.mark.parametrize("name", PROBES)
def test_value_is_what_the_best_actions_earn(name: str, act_dim: int) -> None:
    """Discounted return of the best actions, bootstrapped from the value of the successor at a truncation."""
    env = make_probe(name, 16, seed=0, act_dim=act_dim, dtype=torch.float64)
    obs, _ = env.reset()
    stated = env.value(obs, GAMMA)
    total, discount, running = torch.zeros(16).double(), 1.0, torch.ones(16, dtype=torch.bool)
    for _ in range(env.episode_len):
        obs, reward, terminated, truncated, info = env.step(env.optimal_action(obs))
        total += running * discount * reward
        discount *= GAMMA
        bootstrap = running & truncated & ~terminated
        total += bootstrap * discount * env.value(info["next_obs"], GAMMA)
        running &= ~(terminated | truncated)
    assert not running.any()
    torch.testing.assert_close(total, stated)


@pytest.mark.parametrize("name", ["action", "both"])
def test_other_actions_earn_less(name: str) -> None:
    env = make_probe(name, 64, seed=0, act_dim=2)
    obs, _ = env.reset()
    best = env.pay(obs, env.optimal_action(obs))
    for shift in (0.1, -0.1):
        assert bool((env.pay(obs, env.optimal_action(obs) + shift) < best - 0.005).all())


def test_ends() -> None:
    for name, steps in (("constant", 1), ("observation", 1), ("delayed", 2), ("action", 1), ("both", 1)):
        env = rlctl_envs.make(f"probe:{name}", 3)
        env.reset()
        for step in range(1, 2 * steps + 1):
            _, _, terminated, truncated, _ = env.step(torch.zeros(3, 1))
            assert bool(terminated.all()) is (step % steps == 0)
            assert not truncated.any()
    env = rlctl_envs.make("probe:time-limit", 3, episode_len=7)
    env.reset()
    for step in range(1, 22):
        _, _, terminated, truncated, _ = env.step(torch.zeros(3, 1))
        assert not terminated.any()
        assert bool(truncated.all()) is (step % 7 == 0)


def test_known_values() -> None:
    one = torch.ones(1, 1)
    assert make_probe("delayed").value(torch.tensor([[0.0], [1.0]]), 0.9).tolist() == pytest.approx([0.9, 1.0])
    assert make_probe("observation").value(-one, 0.9).item() == -1
    assert make_probe("time-limit").value(one, 0.75).item() == 4
    assert make_probe("action").optimal_action(one).item() == pytest.approx(0.4)
    assert make_probe("both").optimal_action(-one).item() == -0.5


@pytest.mark.parametrize("name", PROBES)
def test_contract(name: str) -> None:
    env = rlctl_envs.make(f"probe:{name}", 8, seed=0)
    assert isinstance(env, ProbeEnv)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(torch.zeros(8, 1))
    env.reset()
    for _ in range(3):
        env.step(torch.zeros(8, 1))
    state = env.state()

    def go_on(e: rlctl_envs.VecEnv) -> torch.Tensor:
        return torch.cat([e.step(torch.full((8, 1), 0.2))[0] for _ in range(15)])

    expected = go_on(env)
    fresh = rlctl_envs.make(f"probe:{name}", 8, seed=1)
    fresh.set_state(state)
    assert torch.equal(go_on(fresh), expected)
    with pytest.raises(ValueError, match="environment 2 is not finite"):
        env.step(torch.where(torch.arange(8)[:, None] == 2, float("nan"), 0.0))
    with pytest.raises(ValueError, match=r"must be \(8, 1\)"):
        env.step(torch.zeros(8, 2))
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()
