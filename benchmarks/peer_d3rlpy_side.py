"""The d3rlpy half of `peer_d3rlpy.py`: runs in an environment that has d3rlpy, and knows nothing of rlctl.

    PYTHON_OF_D3RLPY benchmarks/peer_d3rlpy_side.py DATA.npz ALGO UPDATES SEED WIDTH BATCH

Reads one command per line, answers with one line of JSON each: `go N` makes N updates and gives the seconds they took,
drawing the batches included; then `save FILE` writes the policy as TorchScript, `describe` gives settings and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import d3rlpy
import numpy as np
import torch
from d3rlpy.algos import CQLConfig, IQLConfig, PRDCConfig, TD3PlusBCConfig
from d3rlpy.constants import LoggingStrategy
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.optimizers import AdamFactory
from d3rlpy.optimizers.lr_schedulers import CosineAnnealingLRFactory
from d3rlpy.preprocessing import ReturnBasedRewardScaler, StandardObservationScaler

EVERY = 50
"""Updates between two looks at the clock."""


def config(algo: str, updates: int, width: int, batch: int) -> Any:
    """The learner with two layers of `width`, batches of `batch` rows, and the settings ours has."""
    nets = VectorEncoderFactory([width, width])
    both = {"actor_encoder_factory": nets, "critic_encoder_factory": nets, "batch_size": batch}
    z_score = StandardObservationScaler(eps=1e-3)
    if algo == "td3bc":
        return TD3PlusBCConfig(**both, observation_scaler=z_score)
    if algo == "prdc":
        return PRDCConfig(**both, observation_scaler=z_score)
    if algo == "iql":
        annealed = AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=updates))
        return IQLConfig(
            **both,
            value_encoder_factory=nets,
            actor_optim_factory=annealed,
            reward_scaler=ReturnBasedRewardScaler(multiplier=1000.0),
        )
    if algo == "cql":  # a weight that stays: its learned multiplier is fed no gradient
        return CQLConfig(**both, n_action_samples=4, alpha_learning_rate=0.0, conservative_weight=5.0)
    raise SystemExit(f"no such learner here: {algo}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("algo")
    for number in ("updates", "seed", "width", "batch"):
        parser.add_argument(number, type=int)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    d3rlpy.seed(args.seed)
    rows = np.load(args.data)
    dataset = d3rlpy.dataset.MDPDataset(
        rows["observations"],
        rows["actions"],
        rows["rewards"],
        rows["terminals"].astype(np.float32),
        rows["timeouts"].astype(np.float32),
        action_space=d3rlpy.ActionSpace.CONTINUOUS,
    )
    learner = config(args.algo, args.updates, args.width, args.batch).create(device="cpu:0")
    quiet: dict[str, Any] = {
        "n_steps_per_epoch": EVERY,
        "logging_strategy": LoggingStrategy.EPOCH,
        "logger_adapter": NoopAdapterFactory(),
        "show_progress": False,
    }
    if args.algo == "prdc":  # it indexes its rows in `fit` alone
        learner.fit(dataset, n_steps=EVERY, **quiet)
    steps = learner.fitter(dataset, n_steps=10**9, **quiet)
    for line in sys.stdin:
        command, *rest = line.split()
        answer: dict[str, Any] = {}
        if command == "go":
            start = time.perf_counter()
            for _ in range(int(rest[0]) // EVERY):
                next(steps)
            answer = {"updates": int(rest[0]) // EVERY * EVERY, "seconds": time.perf_counter() - start}
        elif command == "save":
            learner.save_policy(rest[0])
        elif command == "describe":
            answer = {"versions": {name: version(name) for name in ("d3rlpy", "torch", "numpy", "scikit-learn")}}
            answer["settings"] = json.loads(learner.config.serialize())
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
