"""Stable-Baselines3 (TRPO: sb3-contrib) on the same task, budget, physics and evaluation, for the learning table.

    python benchmarks/sb3_learning.py --algo ppo --env Hopper --seed 0

PPO and TRPO get 8 DummyVecEnv worlds x 256 steps and VecNormalize (the peer's own recommendation for these tasks),
otherwise the library's defaults; SAC and TD3 the defaults. The contact margins are halved as in rlctl's published
physics. Evaluation is ours: 100 deterministic episodes at the end, 10 at each tenth of the budget.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parent))
from learning import merge

import rlctl
from rlctl.provenance import git, machine, versions
from rlctl.seeding import derive


class Acting(rlctl.Agent):
    """An SB3 model in the place of an agent."""

    def __init__(self, spec: rlctl.Spec, model: Any, norm: VecNormalize | None) -> None:
        super().__init__(spec, cfg=object())
        self.model, self.norm = model, norm

    def act(self, obs: torch.Tensor, explore: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = obs.numpy().astype(np.float64)
        if self.norm is not None:
            x = self.norm.normalize_obs(x)
        return torch.from_numpy(self.model.predict(x, deterministic=not explore)[0]), {}


class Curve(BaseCallback):
    """Evaluates at each tenth of the budget; the episodes' time is not the peer's."""

    def __init__(self, agent_of: Any, env_name: str, steps: int, seed: int) -> None:
        super().__init__()
        self.agent_of, self.env_name, self.every, self.seed = agent_of, env_name, steps // 10, seed
        self.points: list[list[float]] = []
        self.seconds = 0.0

    def _on_step(self) -> bool:
        if self.num_timesteps // self.every > len(self.points):
            start = time.perf_counter()
            env = rlctl.make_env(self.env_name, 10)
            result = rlctl.evaluate(self.agent_of(self.model), env, 10, seed=derive(self.seed, "eval") % 2**31)
            assert result is not None
            self.points.append([self.num_timesteps, round(result.mean, 1)])
            self.seconds += time.perf_counter() - start
            print(self.points[-1], flush=True)
        return True


def make(name: str) -> gymnasium.Env[Any, Any]:
    env = gymnasium.make(name)
    margins = env.unwrapped.model.geom_margin  # type: ignore[attr-defined]
    if len(np.unique(margins)) == 1:
        margins *= 0.5  # the published contact model, see docs/tasks.md
    return stable_baselines3.common.monitor.Monitor(env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=["ppo", "sac", "td3", "trpo"], required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    env_id = rlctl.make_env(args.env, 1).id
    norm = None
    vec: Any
    if args.algo in ("ppo", "trpo"):
        vec = norm = VecNormalize(DummyVecEnv([lambda: make(env_id)] * 8))
        kwargs: dict[str, Any] = {"n_steps": 256}
    else:
        vec, kwargs = DummyVecEnv([lambda: make(env_id)]), {}
    cls = getattr(sb3_contrib if args.algo == "trpo" else stable_baselines3, args.algo.upper())
    model = cls("MlpPolicy", vec, seed=args.seed, device="cpu", **kwargs)
    probe = rlctl.make_env(args.env, 1)
    spec = rlctl.Spec(probe.obs_dim, probe.act_dim)
    curve = Curve(lambda m: Acting(spec, m, norm), args.env, args.steps, args.seed)
    start = time.perf_counter()
    model.learn(args.steps, callback=curve)
    seconds = time.perf_counter() - start - curve.seconds
    if norm is not None:
        norm.training = False
    final = rlctl.evaluate(
        Acting(spec, model, norm), rlctl.make_env(args.env, 100), 100, seed=derive(args.seed, "final") % 2**31
    )
    assert final is not None
    print(f"final {final.mean:.1f} ± {final.std:.1f}")
    shared = {
        "algo": f"sb3-{args.algo}",
        "env": env_id,
        "data": None,
        "steps": args.steps,
        "physics": "published",
        "config_key": "sb3",
        "agent": {"library": (sb3_contrib if args.algo == "trpo" else stable_baselines3).__version__, **kwargs},
        "machine": {k: v for k, v in machine().items() if k != "host"},
        "versions": versions(),
        "torch_threads": 1,
    }
    result = {
        "final": {"episodes": 100, "return_mean": final.mean, "return_std": final.std},
        "curve": curve.points,
        "git": git(),
        "seconds": {"train": round(seconds)},
    }
    merge(f"sb3-{args.algo}-{env_id}", shared, args.seed, result)


if __name__ == "__main__":
    main()
