"""How far exported ONNX policies are from the agents they come from, run by onnxruntime.

    python benchmarks/onnx_parity.py                 # -> results/onnx-parity.json, a few minutes on a core

Agents of the default sizes on Hopper, trained for moments (the online ones on the task, the others on random
rollouts): what is measured is arithmetic, not skill. Generative policies are exported twice: the deterministic action,
and the draw that noise given as an input decides. Each export compares 512 observations, 16 of them blown up twenty
times.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write

import rlctl_envs
from rlctl import experiment
from rlctl.cli.output import print_table
from rlctl.experiment import read_json
from rlctl.export import export

ENV = "Hopper-v5"
ONLINE: dict[str, dict[str, Any]] = {"ppo": {"steps": 4096}, "sac": {"steps": 1200, "learning_starts": 1000}}
OFFLINE: dict[str, dict[str, Any]] = {name: {"steps": 100} for name in ("flow-bc", "diffusion-bc", "fql")}
QUIET = {"run": {"tensorboard": False, "evaluations": 1, "eval_episodes": 1, "final_episodes": 1, "threads": 1}}


def random_rollouts(file: Path, steps: int) -> None:
    """Transitions of uniform actions, as a flat file."""
    env = rlctl_envs.make(ENV, 1, seed=0)
    g = torch.Generator().manual_seed(0)
    rows: dict[str, list[np.ndarray]] = {k: [] for k in ("observations", "actions", "rewards", "terminals", "timeouts")}
    obs, _ = env.reset(seed=0)
    for _ in range(steps):
        action = 2 * torch.rand(1, env.act_dim, generator=g) - 1
        before = obs.clone()
        obs, reward, terminated, truncated, _ = env.step(action)
        for key, value in zip(rows, (before, action, reward, terminated, truncated), strict=True):
            rows[key].append(value[0].numpy().copy())
    env.close()
    np.savez(file, **{k: np.stack(v) for k, v in rows.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "random.npz"
        random_rollouts(data, 2000)
        for algo, agent in (ONLINE | OFFLINE).items():
            layer = {"env": ENV, "agent": agent, **({"data": str(data)} if algo in OFFLINE else {})}
            run, _ = experiment.train(experiment.resolve(algo, [layer, QUIET]), Path(place) / algo, quiet=True)
            assert run is not None
            for sampled in (False, True) if algo in OFFLINE else (False,):
                record = read_json(Path(f"{export(run, 'onnx', sampled=sampled, out=run / 'policy.onnx')}.json"))
                parity = record["parity"]
                inputs = ", ".join(f"{i['name']} {i['shape']}" for i in record["inputs"])
                found.append({"algo": algo, "action": "of given noise" if sampled else "deterministic"})
                found[-1] |= {"inputs": inputs, **parity}
                print(f"{algo:<14} {found[-1]['action']:<15} {parity['max_difference']:.2g}", flush=True)
    print_table(
        ["ALGO", "ACTION", "LARGEST", "MEAN"],
        [[r["algo"], r["action"], f"{r['max_difference']:.2g}", f"{r['mean_difference']:.2g}"] for r in found],
    )
    write(
        "onnx-parity",
        {"env": ENV, "opset": record["opset"], "onnx": record["versions"]["onnx"], "exports": found},
        args.out,
    )


if __name__ == "__main__":
    main()
