"""Multi-stage runs: phases that alternate, data then environment; resumed anywhere they equal an unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interrupted_runs import StopAt

from rlctl import agents
from rlctl.agents.ppo import PPOConfig
from rlctl.agents.sac import SACConfig
from rlctl.data import Mix, Ring
from rlctl.errors import Interrupted
from rlctl.run import Run, RunConfig
from rlctl.train import off_policy, offline, on_policy
from rlctl.types import Agent, Batch, Metrics, Spec
from rlctl_envs.probes import make_probe


def made_up_data() -> Ring:
    g = torch.Generator().manual_seed(0)
    ring = Ring(64, seed=5)
    obs = torch.rand(64, 1, generator=g)
    action = torch.rand(64, 1, generator=g) * 2 - 1
    no = torch.zeros(64, dtype=torch.bool)
    ring.add(Batch(obs, action, -((action[:, 0] - obs[:, 0]) ** 2), obs, ~no, no))
    return ring


def offline_then_online(run: Run) -> Agent:
    """SAC on data, then online on a mixture, then on the replay alone, all in one run."""
    env = make_probe("both", 2, seed=1)
    cfg = SACConfig(hidden=(8,), batch_size=8, learning_starts=4, buffer_size=40)
    agent = agents.make("sac", Spec(env.obs_dim, env.act_dim, 2), cfg)
    data = made_up_data()
    offline(agent, data, run, updates=12)
    ring = Ring(40, seed=2)
    off_policy(agent, env, Mix(data, ring, 0.5), run, steps=30, stage="mixed")
    off_policy(agent, env, ring, run, steps=20, learning_starts=0, stage="alone")
    run.finish(agent)
    return agent


def alternating(run: Run) -> Agent:
    """PPO in an environment and a supervised phase on data, three times in turn."""
    env = make_probe("both", 2, seed=1)
    cfg = PPOConfig(hidden=(8,), num_envs=2, horizon=4, minibatch_size=4, epochs=2, anneal_lr=False)
    agent = agents.make("ppo", Spec(env.obs_dim, env.act_dim, 2), cfg)
    data = made_up_data()

    def refit(batch: Batch) -> Metrics:
        loss = (agent.v(batch.obs) - batch.reward).square().mean()
        agent.opt.zero_grad()
        loss.backward()
        agent.opt.step()
        return {"losses/refit": loss.detach()}

    for k in (1, 2, 3):
        on_policy(agent, env, run, steps=16 * k, stage="ppo")
        offline(agent, data, run, updates=5 * k, batch_size=8, learn=refit, stage="refit")
    run.finish(agent)
    return agent


def state(agent: Agent, run: Run) -> list[torch.Tensor]:
    return [*agent.state_dict().values(), torch.tensor([run.env_steps, run.updates, run.progress])]


SCHEDULES = {"offline_then_online": offline_then_online, "alternating": alternating}
BETWEEN = {"offline_then_online": (12, 42), "alternating": (16, 21, 37, 42)}
"""Where one stage is done and the next has not begun."""


@pytest.mark.parametrize("name", SCHEDULES)
def test_resumed_at_any_tick_equals_never_stopped(name: str, tmp_path: Path) -> None:
    schedule = SCHEDULES[name]
    options = RunConfig(tensorboard=False, checkpoint_every=7)
    whole = Run(tmp_path / "whole", options)
    expected = state(schedule(whole), whole)
    total = whole.progress
    whole.close()
    for at in sorted({*range(1, total, 3), *BETWEEN[name]}):
        folder = tmp_path / f"at{at}"
        run = StopAt(folder, options)
        run.stop_at = at
        with pytest.raises(Interrupted):
            schedule(run)
        run.close()
        again = StopAt(folder, options, resume=True)
        again.stop_at = min(at + 9, total - 1) if at + 9 < total - 1 else -1
        try:
            got = state(schedule(again), again)
            again.close()
        except Interrupted:
            again.close()
            last = Run(folder, options, resume=True)
            got = state(schedule(last), last)
            last.close()
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b), f"interrupted at {at}"


def test_every_stage_is_evaluated() -> None:
    """A long second stage after a short first one: its evaluations do not wait for the clock of the whole."""
    run = Run(None, RunConfig(evaluations=10, eval_episodes=2), make_eval_env=lambda n, seed: make_probe("both", n))
    seen: list[int] = []
    original = run._evaluate

    def spy(agent: Agent, episodes: int, stream: str, final: bool = False) -> object:
        seen.append(run.progress)
        return original(agent, episodes, stream, final)

    run._evaluate = spy  # type: ignore[method-assign, assignment]
    env = make_probe("both", 2, seed=1)
    agent = agents.make("sac", Spec(env.obs_dim, env.act_dim, 2), SACConfig(hidden=(8,), batch_size=8))
    offline(agent, made_up_data(), run, updates=20)
    off_policy(agent, env, Ring(400), run, steps=200, learning_starts=1000)
    assert len([p for p in seen if p <= 20]) == 10
    assert len([p for p in seen if p > 20]) >= 9


def test_a_later_stage_goes_on_in_the_same_environment() -> None:
    run = Run()
    env = make_probe("time-limit", 2, seed=1, episode_len=50)
    resets = []
    reset = env.reset
    env.reset = lambda **kw: resets.append(kw) or reset(**kw)  # type: ignore[method-assign, func-returns-value]
    cfg = SACConfig(hidden=(8,), batch_size=8, learning_starts=1000)
    agent = agents.make("sac", Spec(env.obs_dim, env.act_dim, 2), cfg)
    off_policy(agent, env, Ring(100), run, steps=10, stage="a")
    off_policy(agent, env, Ring(100), run, steps=10, stage="b")
    assert len(resets) == 1
    assert agent.counters["env_steps"] == run.env_steps == 20
