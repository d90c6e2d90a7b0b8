"""Offline learners: defaults are the published settings for locomotion; what only published code does is on or off as
its specification sheet says."""

from __future__ import annotations

from typing import Any

import pytest

from rlctl import agents

RUN = {"steps": 1_000_000, "batch_size": 256}
RAW = {"normalize_obs": False, "reward": "none"}
Z_SCORED = {"normalize_obs": True, "reward": "none"}
TD3 = (
    RUN
    | {"gamma": 0.99, "tau": 0.005, "actor_lr": 3e-4, "critic_lr": 3e-4}
    | {"policy_noise": 0.2, "noise_clip": 0.5, "policy_every": 2}
)
CQL = {
    "penalty": "importance",
    "num_actions": 10,
    "temperature": 1.0,
    "gap_floor": None,
    "lagrange_gap": None,
    "backup": "one",
    "entropy_backup": False,
    "target_entropy": None,  # -A
    "batch_size": 256,
    "gamma": 0.99,
    "tau": 0.005,
}
JAX_CQL = CQL | {"simultaneous": True, "bc_share": 0.0, "lagrange_form": "scaled"}
IQL = RUN | {
    "hidden": (256, 256),
    "gamma": 0.99,
    "tau": 0.005,
    "expectile": 0.7,
    "actor_lr": 3e-4,
    "critic_lr": 3e-4,
    "v_lr": 3e-4,
    "reward": "return-range",
    "normalize_obs": False,
    "data_share": None,  # online: one buffer, drawn from uniformly
}
ODICE = {
    "hidden": (1024, 1024),
    "v_hidden": (256, 256),
    "num_v": 2,
    "gamma": 0.99,
    "tau": 0.005,
    "eta": 1.0,
    "divergence": "chi2",
    "gradient": "orthogonal",
    "policy_weight": "residual",  # max(y, 0), not the dual-exact max(y / 2 + 1, 0)
    "max_weight": 100.0,
    "batch_size": 256,
}

SHEETS: dict[str, dict[str, Any]] = {
    "td3bc": TD3 | Z_SCORED | {"alpha": 2.5, "hidden": (256, 256)},
    "prdc": TD3 | Z_SCORED | {"alpha": 2.5, "beta": 2.0, "k": 1, "hidden": (256, 256)},
    "a2pr": TD3
    | Z_SCORED
    | {"hidden": (256,) * 3, "critic_hidden": (256,) * 4, "vae_hidden": (750, 750), "vae_lr": 1e-3}
    | {"alpha": 2.5, "vae_weight": 1.0, "mask": 0.5}
    | {"threshold": 0.0, "fresh_value": False, "detach_target": False},
    "iql": IQL | {"beta": 3.0, "anneal_actor_lr": True, "dropout": 0.0, "head": "gaussian"},
    "cql": CQL
    | RAW
    | {"steps": 3_000_000, "cql_weight": 5.0, "actor_lr": 1e-4, "critic_lr": 3e-4}
    | {"hidden": (256,) * 3, "critic_hidden": None, "layer_norm": False}
    | {"simultaneous": False, "bc_share": 40 / 3000, "lagrange_form": "official"},
    "cal-ql": JAX_CQL
    | RAW
    | {"steps": 1_000_000, "cql_weight": 5.0, "actor_lr": 1e-4, "critic_lr": 3e-4, "hidden": (256, 256)}
    | {"calibrate": True, "calibrate_online": True, "data_share": 0.5},
    "famo2o-cql": JAX_CQL
    | RAW
    | {"steps": 2_000_000, "cql_weight": 1.0, "actor_lr": 3e-4, "critic_lr": 3e-4, "balance_lr": 3e-4}
    | {"hidden": (256, 256), "critic_hidden": None, "layer_norm": True}
    | {"beta_min": 0.5, "beta_max": 1.5, "official_range": False},
    "famo2o-iql": IQL
    | {"beta_min": 1.0, "beta_max": 5.0, "balance_lr": 3e-4, "target_entropy": -0.5, "temperature": 1.0},
    "odice": ODICE
    | {"steps": 1_000_000, "lam": 0.6, "actor_lr": 2e-4, "v_lr": 2e-4, "weight_decay": 1e-4}
    | {"layer_norm": True, "tanh_mean": False, "normalize_obs": False, "reward": "return-range"},
    "odice-il": ODICE
    | {"steps": 500_000, "lam": 0.4, "actor_lr": 1e-4, "v_lr": 1e-4, "weight_decay": 1e-5}
    | {"layer_norm": False, "tanh_mean": True, "normalize_obs": True, "trajectory": 1},
    "cdsa": {"hidden": (256,) * 3, "inverse_hidden": (256, 256), "sigma_min": 0.01, "sigma_max": 1.0}
    | {"separate_state_score": False, "score_steps": 1, "anneal": False},
    "bc": RUN
    | {"hidden": (256, 256), "actor_lr": 3e-4, "head": "deterministic", "best_share": 1.0, "normalize_obs": True},
    "awac": {"hidden": (256,) * 3, "actor_lr": 3e-4, "critic_lr": 3e-4, "batch_size": 256, "tau": 0.005}
    | {"lam": pytest.approx(0.3333, abs=1e-4), "normalize_obs": True},
    "rebrac": TD3
    | RAW
    | {"batch_size": 1024, "actor_lr": 1e-3, "critic_lr": 1e-3, "actor_bc": 0.01, "critic_bc": 0.01}  # hopper-medium's
    | {"hidden": (256,) * 3, "critic_hidden": (256,) * 3, "layer_norm": True},
    "edac": RAW
    | {"steps": 3_000_000, "batch_size": 256, "num_critics": 10, "eta": 1.0, "hidden": (256,) * 3, "tau": 0.005}
    | {"actor_lr": 3e-4, "critic_lr": 3e-4, "alpha_lr": 3e-4, "learn_alpha": True}
    | {"backup": "one", "entropy_backup": True},
}


@pytest.mark.parametrize("name", SHEETS)
def test_defaults_are_those_of_the_sheet(name: str) -> None:
    cfg = agents.get(name).Config()
    assert {k: getattr(cfg, k) for k in SHEETS[name]} == SHEETS[name]
