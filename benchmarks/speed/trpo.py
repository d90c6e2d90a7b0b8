"""One TRPO update on the same rollout: rlctl against sb3-contrib, side by side.

    python benchmarks/speed/trpo.py

Both with two 64-64 tanh networks on 2048 transitions of Hopper, 15 iterations of conjugate gradient, damping 0.1, up to
10 backtracking candidates (ours always evaluates all ten), then 10 epochs of value steps on minibatches of 128.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sb3_contrib import TRPO as PeerTRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import configure_logger

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, write

import rlctl
from rlctl.agents.trpo import TRPOConfig
from rlctl.data.rollout import Rollout
from rlctl.train import collect


def ours() -> Any:
    """An update of our agent on one fixed rollout."""
    env = rlctl.make_env("Hopper", 8, seed=0)
    agent = rlctl.make_agent("trpo", env, TRPOConfig(num_envs=8, horizon=256))
    run, rollout = rlctl.Run(), Rollout(256)
    obs = run.begin(agent, run.stage(agent, "on_policy"), env=env, left=10**9)
    for _ in range(256):
        obs = collect(agent, env, obs, rollout, run)
    return lambda: agent.update(rollout.whole())


def peer() -> Any:
    """The peer's `train` on its own rollout of the same size."""
    env = make_vec_env("Hopper-v5", n_envs=8)
    nets = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}
    model = PeerTRPO("MlpPolicy", env, n_steps=256, batch_size=128, policy_kwargs=nets, device="cpu")
    model.learn(2048)
    model.set_logger(configure_logger(0))
    return model.train


def rate(update: Any, times: int) -> float:
    """Updates per second."""
    start = time.perf_counter()
    for _ in range(times):
        update()
    return times / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=5, help="updates per contender and round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    contenders, results = {"rlctl trpo": ours(), "sb3-contrib TRPO": peer()}, {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results[f"{threads} threads"] = result = interleaved(
            {name: lambda f=f: rate(f, args.updates) for name, f in contenders.items()}, args.rounds
        )
        for name, r in result.items():
            print(f"{threads} threads   {name:<20} {r['median']:>8.2f} updates/s   {r['ratio']:.2f}")
    write("speed-trpo", {"unit": "updates/s of 2048 transitions", "results": results}, args.out)


if __name__ == "__main__":
    main()
