"""PPO on Hopper: environment steps per second of training, rlctl against Stable-Baselines3, side by side.

    python benchmarks/speed/ppo.py

All with two 64-64 tanh networks and 10 epochs, collecting and learning included, evaluation and logging off:
  rlctl, same minibatches   8 worlds x 256 steps, minibatches of 64: the peer's own numbers
  rlctl, packaged           configs/ppo/Hopper-v5.yaml
  Stable-Baselines3         8 DummyVecEnv worlds x 256 steps, minibatches of 64

Ours run with one torch thread, which is what `rlctl train` picks for networks of this size (the simulation uses all
cores); the peer with one and with as many as there are cores, torch's default.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO as PeerPPO
from stable_baselines3.common.env_util import make_vec_env

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, write

import rlctl
from rlctl.agents.ppo import PPOConfig
from rlctl.experiment import resolve


class Ours:
    """Trains on in slices, as a run in memory."""

    def __init__(self, cfg: PPOConfig) -> None:
        self.cfg = replace(cfg, steps=10**9)
        self.env = rlctl.make_env("Hopper", cfg.num_envs, seed=0)
        self.agent = rlctl.make_agent("ppo", self.env, self.cfg)
        rlctl.accelerate(self.agent)  # as the command line does
        self.slice(1)

    def slice(self, rollouts: int) -> float:
        steps = rollouts * self.cfg.num_envs * self.cfg.horizon
        run = rlctl.Run()
        start = time.perf_counter()
        rlctl.on_policy(self.agent, self.env, run, steps=steps, horizon=self.cfg.horizon)
        return steps / (time.perf_counter() - start)


class Peer:
    """Stable-Baselines3's PPO, also in slices."""

    def __init__(self) -> None:
        env = make_vec_env("Hopper-v5", n_envs=8)
        nets = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}
        self.model = PeerPPO(
            "MlpPolicy", env, n_steps=256, batch_size=64, n_epochs=10, policy_kwargs=nets, device="cpu"
        )
        self.model.learn(2048)

    def slice(self, rollouts: int) -> float:
        start = time.perf_counter()
        self.model.learn(2048 * rollouts)
        return 2048 * rollouts / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rollouts", type=int, default=5, help="rollouts per contender and round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    packaged: Any = resolve("ppo", [{"env": "Hopper"}]).agent
    same = PPOConfig(num_envs=8, horizon=256, minibatch_size=64, epochs=10)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    a, b, c = Ours(same), Ours(packaged), Peer()

    def at(threads: int, contender: Ours | Peer) -> float:
        torch.set_num_threads(threads)
        return contender.slice(args.rollouts)

    contenders = {
        "rlctl, the peer's minibatches": lambda: at(1, a),
        "rlctl, packaged Hopper config": lambda: at(1, b),
        "Stable-Baselines3 PPO, 1 thread": lambda: at(1, c),
        f"Stable-Baselines3 PPO, {cores} threads": lambda: at(cores, c),
    }
    result = interleaved(contenders, args.rounds)
    for name, r in result.items():
        print(f"{name:<36} {r['median']:>8,.0f} steps/s   {r['ratio']:.2f}")
    write("speed-ppo", {"unit": "environment steps/s", "results": result}, args.out)


if __name__ == "__main__":
    main()
