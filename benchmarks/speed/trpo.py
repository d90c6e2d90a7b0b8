"""One TRPO update on one and the same rollout: rlctl against sb3-contrib, side by side.

    python benchmarks/speed/trpo.py

Both with two 64-64 tanh networks of the same weights, on the same 2048 transitions of Hopper (ours, seeded; raw
observations and rewards, no normalisation on either side), 15 iterations of conjugate gradient, up to 10 backtracking
candidates (ours always evaluates all ten), then 10 epochs of value steps on minibatches of 128. The peer averages its
divergence over the action dimensions where ours sums: its 0.01 nats and damping 0.1 are ours times their number. Every
update starts again from those weights; putting them back is not timed. The peer computes values, log-densities and
advantages while it collects, so its part of that is not in its time; ours is.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sb3_contrib import TRPO as PeerTRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import configure_logger
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved, write

import rlctl
from rlctl.agents.actor_critic import rows_of
from rlctl.agents.trpo import TRPO, TRPOConfig
from rlctl.data.rollout import Rollout
from rlctl.train import collect
from rlctl.types import Batch

WORLDS, HORIZON = 8, 256
DELTA, DAMPING = 0.01, 0.1
"""Of the peer, per action dimension."""


class Contender(NamedTuple):
    """What is timed, and how its networks and optimiser are put back before each update."""

    update: Callable[[], Any]
    restore: Callable[[], Any]


def collected() -> tuple[TRPO, Batch]:
    """A fresh agent of ours and the rollout [HORIZON, WORLDS] it has collected."""
    env = rlctl.make_env("Hopper", WORLDS, seed=0)
    plain = {"normalize_obs": False, "normalize_reward": False}
    cfg = TRPOConfig(
        num_envs=WORLDS, horizon=HORIZON, delta=DELTA * env.act_dim, damping=DAMPING * env.act_dim, **plain
    )
    agent = rlctl.make_agent("trpo", env, cfg)
    assert isinstance(agent, TRPO)
    run, rollout = rlctl.Run(), Rollout(HORIZON)
    obs = run.begin(agent, run.stage(agent, "on_policy"), env=env, left=10**9)
    for _ in range(HORIZON):
        obs = collect(agent, env, obs, rollout, run)
    return agent, rollout.whole()


def ours(agent: TRPO, batch: Batch) -> Contender:
    """An update of `agent` on `batch`."""
    start = copy.deepcopy((agent.state_dict(), agent.opt_v.state_dict()))

    def restore() -> None:
        agent.load_state_dict(start[0])
        agent.opt_v.load_state_dict(copy.deepcopy(start[1]))

    return Contender(lambda: agent.update(batch), restore)


def peer(agent: TRPO, batch: Batch) -> tuple[PeerTRPO, Contender]:
    """The peer with the weights of `agent`, and its `train` on `batch`.

    Its buffer is filled with what it would have recorded while collecting. Advantages and value targets are written in
    as ours (the peer's own are equal, but it needs the true successors to bootstrap truncations from).
    """
    env = make_vec_env("Hopper-v5", n_envs=WORLDS)
    nets = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": nn.Tanh}
    model = PeerTRPO(
        "MlpPolicy",
        env,
        n_steps=HORIZON,
        batch_size=128,
        target_kl=DELTA,
        cg_damping=DAMPING,
        policy_kwargs=nets,
        device="cpu",
        seed=0,
    )
    model.set_logger(configure_logger(0))
    policy = model.policy
    towers = policy.mlp_extractor
    for theirs, mine in (
        ([*towers.policy_net, policy.action_net], agent.pi.mean),
        ([*towers.value_net, policy.value_net], agent.v),
    ):
        layers = [[m for m in modules if isinstance(m, nn.Linear)] for modules in (theirs, mine.modules())]
        for their_layer, my_layer in zip(*layers, strict=True):
            their_layer.load_state_dict(my_layer.state_dict())
    policy.log_std.data.copy_(agent.pi.log_std.data)

    c = agent.cfg
    rows = rows_of(batch, agent.pi, agent.v, agent.obs_norm, agent.reward_scale, c.gamma, c.lam)
    buffer = model.rollout_buffer
    buffer.observations[:], buffer.actions[:] = batch.obs.numpy(), batch.action.numpy()
    for name, values in (
        ("values", rows.v_old),
        ("log_probs", rows.logp_old),
        ("advantages", rows.adv),
        ("returns", rows.ret),
    ):
        getattr(buffer, name)[:] = values.unflatten(0, (HORIZON, WORLDS)).numpy()
    buffer.pos, buffer.full = HORIZON, True
    start = copy.deepcopy((policy.state_dict(), policy.optimizer.state_dict()))

    def restore() -> None:
        policy.load_state_dict(start[0])
        policy.optimizer.load_state_dict(copy.deepcopy(start[1]))

    return model, Contender(model.train, restore)


def rate(contender: Contender, times: int) -> float:
    """Updates per second."""
    spent = 0.0
    for _ in range(times):
        contender.restore()
        start = time.perf_counter()
        contender.update()
        spent += time.perf_counter() - start
    return times / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=5, help="updates per contender and round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    agent, batch = collected()
    _, theirs = peer(agent, batch)
    contenders, results = {"rlctl trpo": ours(agent, batch), "sb3-contrib TRPO": theirs}, {}
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
