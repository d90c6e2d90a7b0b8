"""Mean return of uniform random actions on every MuJoCo task: the zero of the report's scale of online scores.

    python benchmarks/random_returns.py       # -> rlctl/report/online_reference.json

The other end of the scale, the return that scores 100, is a published constant, not a measurement of ours: D4RL's
expert where D4RL has the task, else the threshold in Gymnasium's registry, else none. Neither is a claim about how good
an agent can be; they put tasks on one scale. Physics: published.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import gymnasium
import torch

import rlctl_envs
from rlctl.data.reference import reference_scores
from rlctl.provenance import versions

EPISODES, SEED = 200, 0
TASKS = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum")
TASKS += ("Pusher", "Reacher", "Swimmer", "Walker2d")


def random_return(task: str) -> tuple[float, float]:
    """Mean over the first episode of each of many worlds, and its standard error."""
    env = rlctl_envs.make(task, EPISODES, seed=SEED)
    env.reset()
    rng = torch.Generator().manual_seed(SEED)
    total, alive = torch.zeros(EPISODES, dtype=torch.float64), torch.ones(EPISODES, dtype=torch.bool)
    while alive.any():
        action = torch.rand((EPISODES, env.act_dim), generator=rng) * 2 - 1
        _, reward, terminated, truncated, _ = env.step(action)
        total += reward.double() * alive
        alive &= ~(terminated | truncated)
    env.close()
    return float(total.mean()), float(total.std()) / math.sqrt(EPISODES)


def upper(task: str) -> tuple[float | None, str | None]:
    """The return that scores 100, and where it is from."""
    if (pair := reference_scores().get(task.lower())) is not None:
        return pair[1], "D4RL's expert return for this task (its version 2)"
    spec = gymnasium.spec(f"{task}-v5")
    return spec.reward_threshold, None if spec.reward_threshold is None else "reward_threshold in Gymnasium's registry"


def main() -> None:
    tasks = {}
    for name in TASKS:
        low, error = random_return(name)
        high, source = upper(name)
        tasks[f"{name}-v5"] = {
            "random": round(low, 4),
            "standard_error": round(error, 4),
            "reference": high,
            "reference_source": source,
        }
        print(f"{name}-v5: random {low:.2f} ± {error:.2f}, reference {high}", flush=True)
    record = {
        "about": f"uniform random actions, {EPISODES} episodes, seed {SEED}, published physics",
        "versions": {k: v for k, v in versions().items() if k in ("gymnasium", "mujoco", "numpy", "torch")},
        "tasks": tasks,
    }
    target = Path(__file__).resolve().parents[1] / "rlctl" / "report" / "online_reference.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
