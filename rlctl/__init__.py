"""rlctl: train and compare continuous-control reinforcement-learning agents.

import rlctl

env = rlctl.make_env("Hopper", num_envs=8, seed=1)
agent = rlctl.make_agent("ppo", env, seed=1)
run = rlctl.Run("runs/mine")
rlctl.on_policy(agent, env, run, steps=100_000, horizon=256)
print(rlctl.evaluate(agent, rlctl.make_env("Hopper", num_envs=10), episodes=10).mean)
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

    from rlctl import agents
    from rlctl.types import Spec

    cls = agents.get(algo) if isinstance(algo, str) else algo
    spec = Spec(env.obs_dim, env.act_dim, env.num_envs, env.device, env.episode_len, seed)
    if cfg is None:
        cfg = cls.Config()
        if any(f.name == "num_envs" for f in fields(cfg)):
            cfg = replace(cfg, num_envs=env.num_envs)
    return agents.make(cls, spec, cfg)


_HOMES = {
    "rlctl.accelerate": ["accelerate"],
    "rlctl.data": ["Mix", "Ring", "Rollout"],
    "rlctl.errors": ["Diverged", "Interrupted", "RlctlError", "UsageError"],
    "rlctl.evaluate": ["Evaluation", "evaluate"],
    "rlctl.experiment": ["load_agent"],
    "rlctl.run": ["Run", "RunConfig"],
    "rlctl.train": [
        "OffPolicyConfig",
        "OfflineConfig",
        "OnPolicyConfig",
        "collect",
        "off_policy",
        "offline",
        "on_policy",
    ],
    "rlctl.types": ["Agent", "AgentConfig", "Batch", "Metrics", "Spec"],
    "rlctl_envs": ["VecEnv"],
}


def __getattr__(name: str) -> Any:
    """Public names come when they are first used: torch takes seconds to load, and `rlctl --help` needs none of it."""
    if name == "make_env":
        found = import_module("rlctl_envs").make
    elif home := next((module for module, names in _HOMES.items() if name in names), None):
        found = getattr(import_module(home), name)
    else:
        raise AttributeError(f"module 'rlctl' has no attribute '{name}'")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`rlctl.evaluate` and `rlctl.accelerate` are functions, in modules of the same names.

    Loading such a module sets the package's attribute to it; here the function takes its place.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("accelerate", "evaluate") and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


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
