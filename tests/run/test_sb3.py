"""Stable-Baselines3 on our tasks: the adapter's contract, its learners under our run directory, both directions."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import assert_same, final_state, interrupted, rows, settings, train_in_pieces

import rlctl
import rlctl_envs
from rlctl import agents, experiment
from rlctl.data.collect import load_policy
from rlctl.errors import UsageError
from rlctl.experiment import Settings

sb3 = pytest.importorskip("stable_baselines3")
pytest.importorskip("sb3_contrib")

from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402

from rlctl.agents.sb3 import OURS, keep_statistics, normalized, wrap  # noqa: E402
from rlctl_envs.adapters.sb3 import SB3VecEnv  # noqa: E402

ON_POLICY = {"n_steps": 16, "num_envs": 3, "batch_size": 16, "hidden": [8, 8], "normalize": True}
OFF_POLICY = {"buffer_size": 100, "learning_starts": 30, "batch_size": 16, "hidden": [8, 8]}


def short(algo: str, steps: int, **keys: Any) -> Settings:
    family = ON_POLICY if algo in ("sb3:ppo", "sb3:trpo") else OFF_POLICY
    return settings(algo, "Hopper", steps=steps, **(family | keys), run={"eval_every": 70, "log_every": 20})


# ---------------------------------------------------------------------------------------------------------- adapter
def test_adapter_keeps_both_flags_and_the_true_successor() -> None:
    env = rlctl_envs.make("Hopper", 4, seed=1, episode_len=25)
    twin = rlctl_envs.make("Hopper", 4, seed=1, episode_len=25)
    adapter, rng = SB3VecEnv(env), np.random.default_rng(0)
    obs = adapter.reset()
    expected, _ = twin.reset()
    total, length, seen = np.zeros(4), np.zeros(4, int), {"cut": 0, "fell": 0}
    for _ in range(120):
        np.testing.assert_array_equal(obs, expected.numpy())
        action = rng.uniform(-1, 1, (4, 3)).astype(np.float32)
        obs, reward, dones, infos = adapter.step(action)
        expected, r, terminated, truncated, info = twin.step(torch.from_numpy(action))
        np.testing.assert_array_equal(reward, r.numpy())
        total += reward
        length += 1
        for i in range(4):
            assert dones[i] == bool(terminated[i] | truncated[i])
            if not dones[i]:
                assert infos[i] == {}
                continue
            np.testing.assert_array_equal(infos[i]["terminal_observation"], info["next_obs"][i].numpy())
            assert infos[i]["TimeLimit.truncated"] == bool(truncated[i] and not terminated[i])
            assert infos[i]["episode"] == {"r": pytest.approx(total[i]), "l": length[i]}
            seen["cut" if infos[i]["TimeLimit.truncated"] else "fell"] += 1
            total[i], length[i] = 0, 0
    assert min(seen.values()) > 0  # the test has met both


def test_adapter_seeds_like_sb3_asks() -> None:
    adapter = SB3VecEnv(rlctl_envs.make("Hopper", 2, seed=1))
    adapter.seed(5)
    first = adapter.reset()
    assert not np.array_equal(first, adapter.reset())  # the stream goes on
    adapter.seed(5)
    np.testing.assert_array_equal(first, adapter.reset())
    assert adapter.env_is_wrapped(Monitor) == [True, True]


# --------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("name", list(agents.BASELINES))
def test_defaults_are_those_of_the_library(name: str) -> None:
    cls: Any = agents.get(name)
    theirs = inspect.signature(getattr(importlib.import_module(cls.library), cls.model_name).__init__).parameters
    ours = {f.name: getattr(cls.Config(), f.name) for f in dataclasses.fields(cls.Config) if f.name not in OURS}
    assert ours == {key: theirs[key].default for key in ours}
    model = cls(rlctl.Spec(4, 2)).model
    plain = getattr(importlib.import_module(cls.library), cls.model_name)("MlpPolicy", model.env, device="cpu")
    assert str(model.policy) == str(plain.policy)  # widths and activations too


def test_refuses_what_does_not_exist() -> None:
    with pytest.raises(UsageError, match="did you mean 'sb3:ppo'"):
        agents.get("sb3:pp0")
    with pytest.raises(UsageError, match="did you mean 'clip_range'"):
        settings("sb3:ppo", "Hopper", clip_rang=0.1)


# ------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("algo", list(agents.BASELINES))
def test_resumes_bit_for_bit(algo: str, tmp_path: Path) -> None:
    on_policy = algo in ("sb3:ppo", "sb3:trpo")
    extra = {} if on_policy else {"action_noise": 0.1}
    s = short(algo, 240 if on_policy else 150, **extra)
    experiment.train(s, tmp_path / "whole", quiet=True)
    # off-policy: while acting at random, just after learning began, after the buffer has wrapped
    pieces = [2, 1] if on_policy else [11, 25, 80]
    assert train_in_pieces(s, tmp_path / "pieces", pieces) == len(pieces)
    assert_same(tmp_path / "whole", tmp_path / "pieces")


def test_trains_on_with_a_longer_budget(tmp_path: Path) -> None:
    # the replay buffer, no larger than the run, grows with it
    short_run, long_run = (short("sb3:sac", steps, buffer_size=1000) for steps in (90, 150))
    experiment.train(short_run, tmp_path / "grown", quiet=True)
    experiment.resume(tmp_path / "grown", 150, quiet=True)
    experiment.train(long_run, tmp_path / "whole", quiet=True)
    grown, whole = (final_state(tmp_path / name) for name in ("grown", "whole"))
    same = ("agent.safetensors", "optim.safetensors", "sb3.buffer/carried.safetensors")
    assert [grown[k] for k in same] == [whole[k] for k in same]


def test_a_run_is_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    experiment.train(short("sb3:ppo", 240), folder, quiet=True)
    record = experiment.read_json(folder / "run.json")
    assert (record["status"], record["progress"], record["final"]["episodes"]) == ("done", 240, 3)
    assert record["sessions"][0]["versions"]["stable-baselines3"] == sb3.__version__
    metrics, episodes = rows(folder / "metrics.jsonl"), rows(folder / "eval.jsonl")
    assert [r["env_steps"] for r in metrics] == [48, 96, 144, 192, 240]
    assert {"losses/value", "losses/policy_gradient", "charts/episodic_return"} <= metrics[-1].keys()
    assert [r["env_steps"] for r in episodes if not r["final"]] == [96, 96, 144, 144, 240, 240]

    # eval and collect meet the trained policy: VecNormalize's statistics included, and frozen
    agent, _ = experiment.load_agent(folder)
    policy = load_policy(str(folder)).agent
    assert policy is not None
    obs = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 3
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    torch.testing.assert_close(agent.act(obs, explore=False)[0], policy.act(obs, explore=False)[0])
    assert float(agent.obs_count) == pytest.approx(240 + 3 + 1e-4)  # every step, and SB3's own reset
    state = torch.get_rng_state()
    a, b = agent.act(obs, explore=True)[0], agent.act(obs, explore=True)[0]
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)  # only the agent's own generator has moved
    assert all(torch.equal(v, before[k]) for k, v in agent.state_dict().items())


def test_divergence_is_reported_and_a_checkpoint_kept(tmp_path: Path) -> None:
    s = short("sb3:sac", 150, learning_rate=1e30)
    with pytest.raises(rlctl.Diverged):
        experiment.train(s, tmp_path / "run", quiet=True)
    assert experiment.read_json(tmp_path / "run" / "run.json")["status"] == "failed"


def test_interruption_comes_between_rollouts(tmp_path: Path) -> None:
    assert interrupted(lambda: experiment.train(short("sb3:ppo", 240), tmp_path / "run", quiet=True), 2)
    assert experiment.read_json(tmp_path / "run" / "run.json")["status"] == "preempted"


# -------------------------------------------------------------------------------------------------- both directions
@pytest.mark.parametrize("normalize", [False, True])
def test_a_model_of_theirs_acts_in_our_tools(normalize: bool) -> None:
    vec: Any = SB3VecEnv(rlctl_envs.make("Hopper", 2, seed=0))
    norm = VecNormalize(vec) if normalize else None
    model = sb3.PPO("MlpPolicy", norm or vec, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu")
    model.learn(128)
    agent = wrap(model, norm)
    ours = rlctl.evaluate(agent, rlctl_envs.make("Hopper", 4), 4, seed=9)
    assert ours is not None
    theirs_env: Any = SB3VecEnv(rlctl_envs.make("Hopper", 4))
    if norm is not None:
        theirs_env = VecNormalize(theirs_env, training=False, norm_reward=False)
        theirs_env.obs_rms = norm.obs_rms
    theirs_env.seed(9)
    returns, lengths = evaluate_policy(model, theirs_env, 4, return_episode_rewards=True)
    assert sorted(ours.lengths) == sorted(lengths)
    assert sorted(ours.returns) == pytest.approx(sorted(returns), rel=1e-5)


@pytest.mark.parametrize(("changed", "refused"), [({"clip_obs": 5.0}, True), ({"epsilon": 1e-4}, True), ({}, False)])
def test_a_normaliser_that_cannot_be_followed_is_refused(changed: dict[str, float], refused: bool) -> None:
    vec: Any = SB3VecEnv(rlctl_envs.make("Hopper", 2, seed=0))
    norm = VecNormalize(vec, **changed)
    model = sb3.PPO("MlpPolicy", norm, n_steps=32, batch_size=32, device="cpu")
    if not refused:
        assert wrap(model, norm).cfg.normalize
        return
    with pytest.raises(ValueError, match=r"supported are clip_obs=10, epsilon=1e-08"):
        wrap(model, norm)


def test_a_normaliser_of_rewards_alone_leaves_observations_alone() -> None:
    vec: Any = SB3VecEnv(rlctl_envs.make("Hopper", 2, seed=0))
    norm = VecNormalize(vec, norm_obs=False, clip_obs=1.0)
    model = sb3.PPO("MlpPolicy", norm, n_steps=32, batch_size=32, device="cpu")
    obs = 40 * torch.ones(3, 11)
    ours = wrap(model, norm).act(obs, explore=False)[0].detach()
    theirs, _ = model.predict(obs.numpy(), deterministic=True)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5)


def test_normalisation_is_vecnormalizes() -> None:
    vec = SB3VecEnv(rlctl_envs.make("Hopper", 3, seed=0))
    norm = VecNormalize(vec)
    norm.reset()
    for _ in range(20):
        norm.step(np.full((3, 3), 0.5, np.float32))
    raw = norm.get_original_obs() * 40  # some of it beyond the clip
    agent = agents.make("sb3:ppo", rlctl.Spec(11, 3, 3), agents.get("sb3:ppo").Config(normalize=True))
    keep_statistics(agent, norm)
    ours = normalized(torch.from_numpy(raw), agent.obs_mean, agent.obs_var)
    np.testing.assert_array_equal(ours.numpy(), norm.normalize_obs(raw))


def test_an_agent_of_ours_answers_predict() -> None:
    agent = agents.make("sac", rlctl.Spec(11, 3))
    env = SB3VecEnv(rlctl_envs.make("Hopper", 2, seed=0, episode_len=30))
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=2)  # type: ignore[arg-type]
    assert np.isfinite(mean)
    action, state = agent.predict(np.zeros((2, 11)), None, np.ones(2, bool), deterministic=True)
    assert action.shape == (2, 3)
    assert state is None
