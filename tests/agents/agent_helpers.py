"""What the tests of the agents share: stub networks, made-up batches, tiny agents, training on probes.

A new algorithm is covered as soon as it is registered. If its tiny version needs other settings, give it a row in
`TINY` or `SOLVE`; if its value is read in another way than by `v` or `q`, extend `value_of`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlctl import agents
from rlctl.data.dataset import Dataset
from rlctl.run import Run
from rlctl.train import SCHEDULES, Job
from rlctl.types import Agent, Batch, Spec
from rlctl_envs.probes import ProbeEnv, make_probe

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
    "flow-bc": {"flow_steps": 4},
    "diffusion-ql": {"num_candidates": 5},
    "fql": {"flow_steps": 4},
    "idql": {"width": 8, "blocks": 1, "num_candidates": 5},
    "ifql": {"flow_steps": 4, "num_candidates": 5},
    "dppo": {"diffusion_steps": 3},
    "pa-rl": {"bc_share": 2e-6, "base_net": "mlp", "base_hidden": (16, 16), "num_critics": 3, "num_actions": 3}
    | {"num_candidates": 5, "num_kept": 3, "search_steps": 2, "search_size": 0.1},
}
"""Overrides of `SMALL` by algorithm."""

CORRECTED = {"cdsa": "td3bc"}
"""What corrects a trained agent, and which agent that is in the tests of all."""

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
    "diffusion-bc": {"steps": 1500, "ema_start": 500, "hidden": (64, 64)},
    "flow-bc": {"steps": 1500, "ema_start": 500, "hidden": (64, 64)},
    # eta, 1 / alpha, expectile large: the point is to solve the task, not to stay near a random policy
    "diffusion-ql": {"steps": 1500, "eta": 20.0, "ema_start": 0, "ema_every": 1, "ema_decay": 0.95, "critic_lr": 2e-3}
    | {"hidden": (64, 64), "num_candidates": 8, "diffusion_steps": 3},
    "fql": {"steps": 1500, "alpha": 0.1, "lr": 2e-3, "hidden": (64, 64), "flow_steps": 4},
    "idql": {"steps": 2500, "expectile": 0.99, "v_lr": 5e-3, "critic_hidden": (64, 64), "critic_lr": 1e-3}
    | {"ema_start": 0, "ema_decay": 0.95, "width": 16, "blocks": 1},
    "ifql": {"steps": 2500, "expectile": 0.99, "v_lr": 5e-3, "critic_hidden": (64, 64), "critic_lr": 1e-3}
    | {"ema_start": 0, "ema_decay": 0.95, "hidden": (32, 32), "flow_steps": 4, "layer_norm": False},
}
"""Overrides of `FAST` by algorithm. `steps` is in the algorithm's own unit."""

REWARD_SCALE: dict[str, float] = {"odice": 100.0}
"""By how much a probe's rewards are multiplied for learning, and values divided. The divergence of ODICE has an
absolute scale: rewards must be large against it (in its authors' runs returns range over 1000) for the value to be that
of the best actions in the data."""

DEFAULT_STEPS = {"on_policy": 8 * 16 * 100, "off_policy": 1500, "offline": 1500}


def config(name: str, *layers: dict[str, Any]) -> Any:
    """The algorithm's config with those of the wanted values it has a field for."""
    cls = agents.get(name).Config
    known = {f.name for f in fields(cls)}
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    return cls(**{k: v for k, v in merged.items() if k in known})


def tiny(name: str, seed: int = 0, **overrides: Any) -> Agent:
    """A small agent of the algorithm, for `OBS_DIM` numbers in, `ACT_DIM` out; offline ones have seen a dataset."""
    cfg = config(name, SMALL, TINY.get(name, {}), overrides)
    spec = Spec(OBS_DIM, ACT_DIM, getattr(cfg, "num_envs", 1), seed=seed)
    agent = agents.make(name, spec, cfg)
    if name in CORRECTED:
        agent.wrap(tiny(CORRECTED[name], seed))
    if agent.regime == "offline":
        agent.prepare(as_dataset(transitions(torch.Generator().manual_seed(123), 200)))
    return agent


def as_dataset(rows: Batch) -> Dataset:
    """Transitions as a dataset of one episode."""
    return Dataset(rows, torch.tensor([len(rows.reward)]), id="made-up")


def transitions(g: torch.Generator, *lead: int, obs_dim: int = OBS_DIM, act_dim: int = ACT_DIM) -> Batch:
    """Made-up transitions [*lead, ...]; about a tenth terminated, a tenth truncated."""
    return Batch(
        obs=torch.randn(*lead, obs_dim, generator=g) + 0.5,
        action=torch.rand(*lead, act_dim, generator=g) * 1.8 - 0.9,
        reward=torch.randn(*lead, generator=g),
        next_obs=torch.randn(*lead, obs_dim, generator=g) + 0.5,
        terminated=torch.rand(*lead, generator=g) < 0.1,
        truncated=torch.rand(*lead, generator=g) < 0.1,
    )


def batch_for(agent: Agent, seed: int = 0) -> Batch:
    """A batch of the agent's regime, with the `extra` that its `act` stores; leaves its generators as they were."""
    g = torch.Generator().manual_seed(seed)
    on_policy = agent.regime == "on_policy"
    lead = (agent.cfg.horizon, agent.cfg.num_envs) if on_policy else (BATCH,)
    batch = transitions(g, *lead)
    with agent.borrowed_rng(seed), torch.no_grad():
        if on_policy:
            acted = [agent.act(obs, explore=True) for obs in batch.obs]
            action = torch.stack([a for a, _ in acted])
            extra = {k: torch.stack([e[k] for _, e in acted]) for k in acted[0][1]}
        else:
            action, extra = batch.action, agent.act(batch.obs, explore=True)[1]
    return batch._replace(action=action, extra=columns(g) if agent.regime == "offline" else extra)


def columns(g: torch.Generator) -> dict[str, Tensor]:
    """Made-up columns of a dataset [BATCH, ...], whether or not the agent asks for them."""
    return {
        "next_action": torch.rand(BATCH, ACT_DIM, generator=g) * 1.8 - 0.9,
        "has_next_action": torch.rand(BATCH, generator=g) < 0.8,
        "mc_return": torch.randn(BATCH, generator=g),
    }


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def differing(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit-equal to those of `snapshot`."""
    return [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]


# -------------------------------------------------------------------------------------------------------------- stubs
class Table(nn.Module):
    """Returns one given tensor, whatever comes in; remembers its inputs."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, *args: Tensor) -> Tensor:
        self.seen.append(args)
        return self.out


def recorded_inputs(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """A list that fills with the inputs of every call of `module`."""
    seen: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(a.detach().clone() for a in args)))
    return seen


# ----------------------------------------------------------------------------------------------------- no host reads
FORBIDDEN = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique",
    "_unique2",
    "unique_consecutive",
}


class NoHostReads(TorchDispatchMode):
    """Raises where an operation needs the value of a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in FORBIDDEN or boolean_index:
            raise AssertionError(f"update reads a tensor on the host: {func}")
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------------------- probes
IMITATORS = {"bc", "diffusion-bc", "flow-bc", "odice-il"}
"""They copy the data's actions and know of no reward: random data teaches them nothing, an expert's everything."""


def probe_dataset(env: ProbeEnv, steps: int, seed: int = 0, expert: bool = False) -> Dataset:
    """What a uniformly random policy meets in `steps` vector steps, world after world.

    `expert`: what the best policy meets, put together as the one episode of a demonstration.
    """
    g = torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    rows = []
    for _ in range(steps):
        action = torch.rand(env.num_envs, env.act_dim, generator=g) * 2 - 1
        action = env.optimal_action(obs) if expert else action
        following, reward, terminated, truncated, info = env.step(action)
        rows.append(Batch(obs, action, reward, info["next_obs"], terminated, truncated))
        obs = following
    stacked = Batch(*[torch.stack(x, 1).flatten(0, 1) for x in list(zip(*rows, strict=True))[:6]])
    ends = (stacked.terminated | stacked.truncated).clone()
    ends[steps - 1 :: steps] = True  # the last row of each world
    if expert:
        ends[:-1] = False
    return Dataset(stacked, ends.nonzero()[:, 0] + 1, id=f"made-up-{env.id}", seed=seed)


def solve(name: str, probe: str, seed: int = 0, **overrides: Any) -> tuple[Agent, ProbeEnv]:
    """Train the algorithm on a probe, through the schedule a run would use; an imitator from the best actions' data."""
    cls = agents.get(name)
    cfg = config(name, FAST, {"steps": DEFAULT_STEPS[cls.regime]}, SOLVE.get(name, {}), overrides)
    num_envs = getattr(cfg, "num_envs", 8)
    env = make_probe(probe, num_envs, seed=seed)
    spec = Spec(env.obs_dim, env.act_dim, num_envs, env.device, env.episode_len, seed)
    agent = agents.make(name, spec, cfg)
    offline = cls.regime == "offline"
    data = probe_dataset(make_probe(probe, 8), 100, expert=name in IMITATORS) if offline else None
    if data is not None and name in REWARD_SCALE:
        data.rows = data.rows._replace(reward=REWARD_SCALE[name] * data.rows.reward)
    schedule = cls.schedule or SCHEDULES[cls.regime]
    schedule(Job(agent, None if offline else env, data, Run(seed=seed), cfg, seed))
    return agent, env


@torch.no_grad()
def value_of(agent: Agent, obs: Tensor) -> Tensor:
    """The agent's own estimate [N] of the value of raw observations [N, O] under its deterministic action."""
    seen = obs
    for normalise in ("normalize", "obs_norm"):
        if hasattr(agent, normalise):
            seen = getattr(agent, normalise)(obs)
            break
    if hasattr(agent, "v"):
        value: Tensor = agent.v(seen)
        value = value.mean(0) if value.dim() == 2 else value  # an ensemble
    elif hasattr(agent, "q"):
        value = agent.q(seen, agent.act(obs, explore=False)[0]).mean(0)
    else:
        raise NotImplementedError(f"value_of does not know where {type(agent).__name__} keeps its value")
    assert value.shape == obs.shape[:1]
    return value
