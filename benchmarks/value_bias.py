"""How far a critic's values are from what its policy then earns: Q(s, a) along an agent's own episodes beside the
discounted return that followed, and what Q says of the data's, the policy's and uniformly drawn actions.

    python benchmarks/value_bias.py RUN_DIR ...

The comparison is that of Fujimoto et al. 2018 (arXiv:1802.09477), figure 1. Nothing is trained. Deterministic actions
unless `--stochastic`. A state counts if its return is known: every state of an episode that terminated, and those of a
truncated one that lie far enough before its end for the rest to weigh less than 1%. Discounted returns are of the
rewards the critic learned from, after the agent's transform. The values of a critic whose backup holds an entropy bonus
(SAC's) have it in them, the returns have not.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write

import rlctl
from rlctl.agents.offline_learner import OfflineLearner
from rlctl.data.dataset import load_dataset
from rlctl.errors import UsageError
from rlctl.experiment import load_agent, read_json
from rlctl.nets import QEnsemble
from rlctl.types import Agent

NEGLIGIBLE = 0.01
"""Weight below which rewards past a truncation are left out of a return."""
DATA_ROWS = 4096
"""Transitions of the dataset that Q is asked about."""
NAMED = ("algo", "column", "config_key", "seed", "data", "env", "progress", "reward_transform")
"""What a row takes over from run.json."""


def known_returns(reward: Tensor, length: Tensor, terminated: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Discounted returns [T, N] from each step on, and where they are known [T, N].

    reward [T, N] is 0 past an episode's end; length [N] counts an episode's steps, terminated [N] says how it ended.
    """
    returns, after = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        after = reward[t] + gamma * after
        returns[t] = after
    horizon = math.ceil(math.log(NEGLIGIBLE) / math.log(gamma)) if 0 < gamma < 1 else (0 if gamma < 1 else math.inf)
    left = length - torch.arange(len(reward)).unsqueeze(1)
    return returns, (left > 0) & (terminated | (left >= horizon))


def q(agent: Agent, obs: Tensor, action: Tensor) -> Tensor:
    """Smallest Q [...] of an agent's critics at raw observations."""
    critic, seen = agent.q, agent.obs_norm
    assert isinstance(critic, QEnsemble)
    assert isinstance(seen, nn.Module)
    values: Tensor = critic(seen(obs), action).amin(0)
    return values


@torch.no_grad()
def own_episodes(agent: Agent, env: rlctl.VecEnv, gamma: float, *, seed: int, stochastic: bool) -> dict[str, Any]:
    """One episode in every world of `env`: Q of each step beside the return that followed."""
    transform = agent.reward if isinstance(agent, OfflineLearner) else None
    values, rewards, total = [], [], torch.zeros(env.num_envs)
    terminated = torch.zeros(env.num_envs, dtype=torch.bool)
    length, alive = torch.zeros(env.num_envs, dtype=torch.int64), torch.ones(env.num_envs, dtype=torch.bool)
    with agent.borrowed_rng(seed):
        obs, _ = env.reset(seed=seed)
        while alive.any():
            action, _ = agent.act(obs, explore=stochastic)
            values.append(q(agent, obs, action))
            obs, reward, term, trunc, _ = env.step(action)
            total += torch.where(alive, reward, 0.0)
            rewards.append(torch.where(alive, transform(reward) if transform else reward, 0.0))
            length += alive
            terminated |= term & alive
            alive &= ~(term | trunc)
    value, reward = torch.stack(values), torch.stack(rewards)
    returns, known = known_returns(reward, length, terminated, gamma)
    if not known.any():
        raise UsageError(f"gamma={gamma}: no episode of {env.id} terminated or is long enough to know a return")
    over = (value - returns)[known]
    return {
        "return": float(total.mean()),
        "terminated": float(terminated.float().mean()),
        "states": int(known.sum()),
        "q": float(value[known].mean()),
        "discounted_return": float(returns[known].mean()),
        "bias": float(over.mean()),
        "bias_quartiles": [float(x) for x in over.quantile(torch.tensor([0.25, 0.5, 0.75]))],
    }


@torch.no_grad()
def on_data(agent: Agent, data: str) -> dict[str, float]:
    """Mean Q in states of the dataset, of three kinds of actions."""
    rows = load_dataset(data).rows
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(len(rows.obs), (DATA_ROWS,), generator=generator)
    obs, action = rows.obs[i], rows.action[i]
    kinds = {
        "q_data": action,
        "q_policy": agent.act(obs, explore=False)[0],
        "q_random": torch.rand(action.shape, generator=generator) * 2 - 1,
    }
    return {name: float(q(agent, obs, a).mean()) for name, a in kinds.items()}


def row(folder: Path, episodes: int, stochastic: bool) -> dict[str, Any]:
    """The record of one run's last agent. UsageError if it has no values to ask for."""
    agent, settings = load_agent(folder)
    if not isinstance(getattr(agent, "q", None), QEnsemble):
        raise UsageError(f"{folder}: {settings.algo} has no critic of (s, a) to ask")
    run = read_json(folder / "run.json")
    if settings.env is None:
        raise UsageError(f"{folder} was trained without a task (--env), so there is none to roll out in")
    agent.eval()
    env = rlctl.make_env(settings.env, episodes, seed=0)
    try:
        found = own_episodes(agent, env, agent.cfg.gamma, seed=10_000, stochastic=stochastic)
    finally:
        env.close()
    if settings.data is not None:
        found |= on_data(agent, settings.data)
    return {**{key: run.get(key) for key in NAMED}, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="runs of agents with critics of (s, a)")
    parser.add_argument("--episodes", type=int, default=20, help="episodes per run (default: 20)")
    parser.add_argument("--stochastic", action="store_true", help="draw actions instead of taking their mode")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/value-bias.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | steps | return | Q | discounted return | bias | Q of data, policy, random |\n" + "|---" * 7 + "|")
    rows = []
    for folder in args.runs:
        try:
            rows.append(r := row(folder, args.episodes, args.stochastic))
        except UsageError as error:
            parser.error(str(error))
        asked = ", ".join(f"{r[key]:.0f}" for key in ("q_data", "q_policy", "q_random") if key in r)
        name = f"{r['column'] or r['algo']}, seed {r['seed']}"
        cells = f"{r['return']:.0f} | {r['q']:.0f} | {r['discounted_return']:.0f} | {r['bias']:+.0f} | {asked}"
        print(f"| {name} | {r['progress'] or 'under way'} | {cells} |", flush=True)
    write("value-bias", {"episodes": args.episodes, "stochastic": args.stochastic, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
