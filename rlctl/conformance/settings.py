"""With which settings an algorithm is checked, and what can be asked of it.

An algorithm of this package is covered as soon as it is registered; if its tiny version needs other settings, give it a
row in `TINY` or `SOLVE`. A plug-in says the same on its class:

    class MyAgent(Agent):
        conformance = Traits(solve={"steps": 3000, "alpha": 0.01})

A subclass of an algorithm of this package is checked like that one, unless it has traits of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlctl import agents

OBS_DIM, ACT_DIM, NUM_ENVS, HORIZON, BATCH = 3, 2, 4, 16, 32

SMALL: dict[str, Any] = {
    "v_minibatch_size": 16,
    "fixup_minibatch_size": 32,
    "hidden": (16, 16),
    "critic_hidden": (16, 16),
    "v_hidden": (16, 16),
    "vae_hidden": (16, 16),
    "inverse_hidden": (16, 16),
    "num_envs": NUM_ENVS,
    "horizon": HORIZON,
    "minibatch_size": 16,
    "epochs": 2,
    "batch_size": BATCH,
    "buffer_size": 4096,
    "learning_starts": 64,
    "base_net": "mlp",
    "base_hidden": (16, 16),
    "base_steps": 3,
    "decoder_hidden": (16, 16),
    "decoder_steps": 3,
    "decoder_batch_size": 64,
    "reward": "none",
}
"""Config fields of every tiny agent, taken where a config has them."""

FAST: dict[str, Any] = SMALL | {
    "hidden": (32,),
    "num_envs": 8,
    "horizon": 16,
    "minibatch_size": 32,
    "epochs": 4,
    "batch_size": 64,
    "lr": 3e-3,
    "actor_lr": 3e-3,
    "critic_lr": 5e-3,
    "gamma": 0.8,
    "tau": 0.1,
    "anneal_lr": False,
    "normalize_reward": False,
}
"""The same for solving a probe."""

TINY: dict[str, dict[str, Any]] = {
    "cql": {"bc_share": 2 / 3_000_000, "num_actions": 3},
    "cal-ql": {"num_actions": 3},
    "famo2o-cql": {"num_actions": 3},
    "edac": {"num_critics": 3},
    "rlpd": {"num_critics": 3, "policy_every": 2, "updates_per_step": 2.0},
    "expo": {
        "num_critics": 3,
        "policy_every": 2,
        "updates_per_step": 2.0,
        "num_actions": 3,
        "num_edits": 2,
        "beta": 0.3,
    },
    "diffusion-bc": {"diffusion_steps": 5},
    "flow-bc": {"flow_steps": 4},
    "gorl": {"rollout_steps": 100, "decoder_updates": 6},
    "gorl-sac": {"recent_steps": 100, "decoder_updates": 6},
    "diffusion-ql": {"num_candidates": 5},
    "fql": {"flow_steps": 4},
    "idql": {"width": 8, "blocks": 1, "num_candidates": 5, "diffusion_steps": 5},
    "ifql": {"flow_steps": 4, "num_candidates": 5},
    "dppo": {"diffusion_steps": 3},
    "pa-rl": {"bc_share": 2e-6, "base_net": "mlp", "base_hidden": (16, 16), "num_critics": 3, "num_actions": 3}
    | {"num_candidates": 5, "num_kept": 3, "search_steps": 2, "search_size": 0.1},
}
"""Overrides of `SMALL` by algorithm."""

LIGHT: dict[str, Any] = {
    "cql_weight": 0.002,
    "num_actions": 4,
    "critic_hidden": None,
    "alpha": 0.005,
    "learn_alpha": False,
    "bc_share": 0.0,
    "steps": 1500,
}
"""Little pessimism, for the data hold every action."""

SOLVE: dict[str, dict[str, Any]] = {
    "ppo": {"steps": 8 * 16 * 60, "log_std": -1.0},
    "trpo": {"steps": 8 * 16 * 60, "log_std": -1.0, "delta": 0.03, "v_lr": 1e-2, "v_minibatch_size": 32},
    "mdpo": {"steps": 8 * 16 * 100, "log_std": -1.0, "lr": 1e-2, "v_lr": 1e-2, "v_clip": 0.0, "v_minibatch_size": 32},
    "spo": {"steps": 8 * 16 * 60, "log_std": -1.0},
    "pmoe-ppo": {"steps": 8 * 16 * 60, "log_std": -1.0, "num_components": 3},
    "fixpo": {"steps": 8 * 16 * 60, "log_std": -1.0, "vf_coef": 0.5},
    "sac": {"steps": 1500, "num_envs": 1, "alpha": 0.005, "learn_alpha": False},
    "mdpo-off": {"steps": 1500, "num_envs": 1, "alpha": 0.005, "kl_coef": 0.02, "anchor_every": 20},
    "pmoe-sac": {"steps": 1500, "num_envs": 1, "alpha": 0.005, "learn_alpha": False},
    # a deterministic actor finds the maximum of the fitted Q: a parabola needs more than a few linear pieces
    "td3": {"steps": 1500, "num_envs": 1, "hidden": (64, 64), "critic_lr": 2e-3},
    "rlpd": {"steps": 1000, "policy_every": 2, "updates_per_step": 1, "num_critics": 3}
    | {"alpha": 0.005, "learn_alpha": False},
    # the base imitates what was done, random actions at first: several draws and wide edits find the best one
    "expo": {"steps": 700, "policy_every": 1, "updates_per_step": 1, "num_critics": 2, "num_actions": 4, "beta": 0.5}
    | {"alpha": 0.005, "learn_alpha": False, "hidden": (64, 64), "critic_lr": 2e-3, "base_lr": 3e-3, "base_tau": 0.05},
    "gorl": {"steps": 8 * 16 * 60, "log_std": -1.0, "clip": 0.2, "stage_weights": (1.0, 1.0)}
    | {"rollout_steps": 2000, "decoder_updates": 300, "decoder_lr": 3e-3},
    "gorl-sac": {"steps": 1000, "num_envs": 1, "alpha": 0.005, "learn_alpha": False, "stage_weights": (2.0, 1.0)}
    | {"recent_steps": 400, "decoder_updates": 200, "decoder_lr": 3e-3},
    # alpha large: the point is to solve the task, not to stay near a random policy
    "td3bc": {"steps": 1500, "alpha": 100.0, "hidden": (64, 64), "critic_lr": 2e-3},
    # the data hold every action in every state, so its own alpha will do
    "prdc": {"steps": 1500, "hidden": (64, 64), "critic_lr": 2e-3},
    "odice-il": {"steps": 1000, "trajectory": 0, "v_lr": 1e-2},
    # lam 1/2 makes a reward of 1 in every step worth 1; see REWARD_SCALE for the rest
    "odice": {"steps": 1500, "lam": 0.5, "v_hidden": (64, 64), "v_lr": 3e-2, "layer_norm": False},
    "a2pr": {"steps": 1500, "alpha": 100.0, "hidden": (64, 64), "critic_hidden": (64, 64), "critic_lr": 2e-3},
    # near the best action in the data: a high expectile, sharp weights
    "iql": {"steps": 3000, "expectile": 0.99, "beta": 30.0, "v_lr": 5e-3, "hidden": (64, 64), "critic_lr": 1e-3},
    "awac": {"steps": 1500, "lam": 0.02, "hidden": (64, 64), "critic_lr": 2e-3},
    "cql": LIGHT,
    "cal-ql": LIGHT,
    "famo2o-cql": LIGHT,
    "rebrac": {
        "steps": 1500,
        "actor_bc": 0.001,
        "critic_bc": 0.0,
        "hidden": (64, 64),
        "critic_hidden": (64, 64),
        "critic_lr": 2e-3,
    },
    "famo2o-iql": {
        "steps": 3000,
        "expectile": 0.99,
        "beta_min": 20.0,
        "beta_max": 30.0,
        "v_lr": 5e-3,
        "hidden": (64, 64),
        "critic_lr": 1e-3,
    },
    "edac": {"steps": 1500, "num_critics": 4, "eta": 0.01, "alpha": 0.005, "learn_alpha": False},
    "dppo": {"steps": 8 * 16 * 60, "diffusion_steps": 2, "min_std": 0.1, "clip": 0.2, "minibatch_size": 64}
    | {"critic_hidden": (32,)},
    # few candidates: the policy is a clone of random data, the search finds the best action
    "pa-rl": {"steps": 1200, "bc_share": 0.1, "base_net": "mlp", "base_hidden": (32,), "base_steps": 2}
    | {"num_candidates": 4, "num_kept": 2, "search_steps": 5, "search_size": 0.2, "num_critics": 2}
    | {"hidden": (64, 64), "critic_lr": 2e-3, "layer_norm": False, "cql_weight": 0.0},
    "bc": {"steps": 1000},
    "diffusion-bc": {"steps": 1500, "ema_start": 500, "hidden": (64, 64), "diffusion_steps": 5},
    "flow-bc": {"steps": 1500, "ema_start": 500, "hidden": (64, 64)},
    # eta and the expectile large, alpha small: the point is to solve the task, not to stay near a random policy
    "diffusion-ql": {"steps": 700, "eta": 20.0, "ema_start": 0, "ema_every": 1, "ema_decay": 0.95, "critic_lr": 3e-3}
    | {"hidden": (48, 48), "num_candidates": 8, "diffusion_steps": 3},
    "fql": {"steps": 800, "alpha": 0.1, "lr": 3e-3, "hidden": (48, 48), "flow_steps": 3},
    "idql": {"steps": 1000, "expectile": 0.99, "v_lr": 5e-3, "critic_hidden": (64, 64), "critic_lr": 2e-3}
    | {"ema_start": 0, "ema_decay": 0.95, "width": 16, "blocks": 1, "diffusion_steps": 5},
    "ifql": {"steps": 1000, "expectile": 0.99, "v_lr": 5e-3, "critic_hidden": (64, 64), "critic_lr": 2e-3}
    | {"ema_start": 0, "ema_decay": 0.95, "hidden": (32, 32), "flow_steps": 4, "layer_norm": False},
}
"""Overrides of `FAST` by algorithm. `steps` is in the algorithm's own unit."""

REWARD_SCALE: dict[str, float] = {"odice": 100.0}
"""By how much a probe's rewards are multiplied for learning, and values divided. The divergence of ODICE has an
absolute scale: rewards must be large against it (in its authors' runs returns range over 1000) for the value to be that
of the best actions in the data."""

DEFAULT_STEPS = {"on_policy": 8 * 16 * 100, "off_policy": 1500, "offline": 1500}
"""Length of a probe run by regime, in the regime's own unit."""

IMITATORS = {"bc", "diffusion-bc", "flow-bc", "odice-il"}
"""They copy the data's actions and know of no reward: random data teaches them nothing, an expert's everything."""

WRAPPERS = {"cdsa": "td3bc"}
"""What corrects a trained agent (`agent.wrap(other)`), and which algorithm's agent that is in the checks."""

BACKUP_ALONE: dict[str, dict[str, Any]] = {n: {"cql_weight": 0.0} for n in ("cql", "cal-ql", "famo2o-cql", "pa-rl")}
"""Settings that leave the backup as the only use of a successor: CQL's penalty takes some of its actions from pi(s'),
whether or not the episode went on."""

ELSEWHERE = {"gorl": ("decoders.next.",), "gorl-sac": ("decoders.next.",)}
"""Beginnings of names of parameters that another phase than `update` learns."""

Learns = Literal["values", "actions", "neither"]


@dataclass(frozen=True)
class Traits:
    """What the checks must know of an algorithm."""

    tiny: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the small agent, over `SMALL`."""
    solve: Mapping[str, Any] = field(default_factory=dict)
    """Settings that solve the probes, over `FAST`; `steps` is in the algorithm's own unit."""
    reward_scale: float = 1.0
    """By how much a probe's rewards are multiplied for learning (offline), and values divided."""
    learns: Learns = "values"
    """values: from rewards, the values and best actions of the probes; actions: to copy those of the data, with no use
    for rewards; neither: nothing of the probes can be asked of it, and it has no use for rewards."""
    backup_alone: Mapping[str, Any] = field(default_factory=dict)
    """Settings that leave the backup as the only use of a successor."""
    elsewhere: tuple[str, ...] = ()
    """Beginnings of the names of parameters that another phase than `update` learns."""
    wraps: str = ""
    """The algorithm whose trained agent it corrects (`agent.wrap(other)`), if it does that."""


_overrides: dict[str, Mapping[str, Any]] = {}


@contextmanager
def override(name: str, solve: Mapping[str, Any]) -> Iterator[None]:
    """Within, `name` solves the probes with these settings over its traits'."""
    _overrides[name] = solve
    try:
        yield
    finally:
        del _overrides[name]


def traits(name: str) -> Traits:
    """Those of the algorithm `name`: its class's own, or those of the nearest algorithm of this package it is."""
    cls = agents.get(name)
    own = getattr(cls, "conformance", None)
    if own is None:
        ours = {e.target: e.name for e in agents.ENTRIES.values()}
        path = (ours.get(f"{base.__module__}:{base.__qualname__}") for base in cls.__mro__)
        own = _of_ours(next((n for n in path if n is not None), ""))
    if not isinstance(own, Traits):
        raise TypeError(f"{cls.__name__}.conformance is a rlctl.conformance.Traits, got {own!r}")
    changed = _overrides.get(name)
    return own if not changed else replace(own, solve={**own.solve, **changed})


def _of_ours(name: str) -> Traits:
    return Traits(
        tiny=TINY.get(name, {}),
        solve=SOLVE.get(name, {}),
        reward_scale=REWARD_SCALE.get(name, 1.0),
        learns="actions" if name in IMITATORS else "neither" if name in WRAPPERS else "values",
        backup_alone=BACKUP_ALONE.get(name, {}),
        elsewhere=ELSEWHERE.get(name, ()),
        wraps=WRAPPERS.get(name, ""),
    )
