"""SAC and TD3: updates per second, rlctl against Stable-Baselines3, side by side.

    python benchmarks/speed/off_policy.py

Same networks (two critics and an actor of 256-256), batch 256, HalfCheetah's sizes (17 observations, 6 actions), a
full replay buffer of random transitions, sampling included.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.logger import configure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, write

from rlctl import Batch, Ring, Spec, agents

OBS, ACT, ROWS = 17, 6, 50_000


def ours(algo: str) -> Any:
    agent = agents.make(algo, Spec(OBS, ACT))
    ring = Ring(ROWS)
    flags = torch.zeros(ROWS, dtype=torch.bool)
    random = torch.randn(ROWS, OBS), torch.rand(ROWS, ACT) * 2 - 1, torch.randn(ROWS), torch.randn(ROWS, OBS)
    ring.add(Batch(*random, flags, flags.clone()))
    return lambda n: [agent.update(ring.sample(256)) for _ in range(n)]


def sb3(cls: Any) -> Any:
    env = gymnasium.make("HalfCheetah-v5")
    # a copy of NETS: the peer writes into the dict it is given
    model = cls("MlpPolicy", env, batch_size=256, buffer_size=ROWS, policy_kwargs=dict(NETS))
    model.set_logger(configure(None, []))
    model._setup_learn(1)
    rng = np.random.default_rng(0)
    for _ in range(ROWS):
        obs, next_obs = rng.standard_normal((2, 1, OBS), dtype=np.float32)
        action, reward = rng.uniform(-1, 1, (1, ACT)).astype(np.float32), rng.standard_normal(1, dtype=np.float32)
        model.replay_buffer.add(obs, next_obs, action, reward, np.zeros(1), [{}])
    return lambda n: model.train(gradient_steps=n, batch_size=256)


NETS = {"net_arch": [256, 256]}


def measure(update: Any, seconds: float) -> float:
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        update(20)
        done += 20
    return done / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="per contender and round")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="torch threads to measure at")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    result: dict[str, Any] = {}
    for algo, peer in (("sac", SAC), ("td3", TD3)):
        mine, theirs = ours(algo), sb3(peer)
        mine(30), theirs(30)
        for threads in args.threads:
            torch.set_num_threads(threads)
            print(f"{algo}, {threads} threads")
            contenders = {
                f"rlctl {algo}": lambda: measure(mine, args.seconds),  # noqa: B023 - called within this iteration
                f"Stable-Baselines3 {peer.__name__}": lambda: measure(theirs, args.seconds),  # noqa: B023
            }
            result[f"{algo}, {threads} threads"] = interleaved(contenders, args.rounds)
    for name, r in result.items():
        a, b = r.values()
        print(f"{name}: {a['median']:.0f} against {b['median']:.0f} updates/s, ratio {a['ratio']:.2f}")
    write("speed-off-policy", {"unit": "updates/s at batch 256", "results": result}, args.out)


if __name__ == "__main__":
    main()
