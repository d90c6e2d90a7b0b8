"""rlctl: train and compare continuous-control reinforcement-learning agents.

import rlctl

env = rlctl.make_env("Hopper", num_envs=8, seed=1)
agent = rlctl.make_agent("ppo", env, seed=1)
run = rlctl.Run("runs/mine")
rlctl.on_policy(agent, env, run, steps=100_000, horizon=256)
print(rlctl.evaluate(agent, rlctl.make_env("Hopper", num_envs=10), episodes=10).mean)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rlctl import agents
from rlctl.accelerate import accelerate
from rlctl.data import Mix, Ring, Rollout
from rlctl.errors import Diverged, Interrupted, RlctlError, UsageError
from rlctl.evaluate import Evaluation, evaluate
from rlctl.experiment import load_agent
from rlctl.run import Run, RunConfig
from rlctl.train import OfflineConfig, OffPolicyConfig, OnPolicyConfig, collect, off_policy, offline, on_policy
from rlctl.types import Agent, AgentConfig, Batch, Metrics, Spec
from rlctl_envs import VecEnv
from rlctl_envs import make as make_env

try:
    __version__ = version("rlctl")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "unknown"


def make_agent(algo: str | type[Agent], env: VecEnv, cfg: Any = None, *, seed: int = 0) -> Agent:
    """An agent for `env`: `algo` is a name of `rlctl algos`, a `package.module:Class`, or a class.

    `cfg` is an instance of the agent's config dataclass (None: its defaults, with the environment's number of worlds).
    """
    from dataclasses import fields, replace

    cls = agents.get(algo) if isinstance(algo, str) else algo
    spec = Spec(env.obs_dim, env.act_dim, env.num_envs, env.device, env.episode_len, seed)
    if cfg is None:
        cfg = cls.Config()
        if any(f.name == "num_envs" for f in fields(cfg)):
            cfg = replace(cfg, num_envs=env.num_envs)
    return agents.make(cls, spec, cfg)


__all__ = [
    "Agent",
    "AgentConfig",
    "Batch",
    "Diverged",
    "Evaluation",
    "Interrupted",
    "Metrics",
    "Mix",
    "OffPolicyConfig",
    "OfflineConfig",
    "OnPolicyConfig",
    "Ring",
    "RlctlError",
    "Rollout",
    "Run",
    "RunConfig",
    "Spec",
    "UsageError",
    "VecEnv",
    "accelerate",
    "collect",
    "evaluate",
    "load_agent",
    "make_agent",
    "make_env",
    "off_policy",
    "offline",
    "on_policy",
]
