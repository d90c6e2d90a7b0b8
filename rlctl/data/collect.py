"""Record policies into a Minari dataset: trained runs, mixtures of their checkpoints, random actions.

Every episode begun within the budget of steps is played to its end and kept, so no episode is cut and short ones are
not preferred; a dataset is therefore somewhat longer than asked. Stored are observations, raw rewards, both flags, the
action as it was executed (clipped, in the units of the environment), and the settings of the task.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import rlctl_envs
from rlctl.data.arrays import Array
from rlctl.data.reference import OWN_MARK, is_suite, reference_name, reference_returns
from rlctl.data.write import Played, check_new_id, check_storage, make_root, spaces_of, spec_of, to_buffer, write_minari
from rlctl.errors import UsageError
from rlctl.seeding import derive, generator
from rlctl_envs.registry import WARP_OPTIONS

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

    from rlctl.types import Agent
    from rlctl_envs import VecEnv

Act = Callable[[Tensor], Tensor]
"""Observations [N, O] to actions [N, A] in [-1, 1]."""
Progress = Callable[[int, int], None]
"""Called with (steps done, steps asked for)."""


@dataclass(frozen=True)
class Policy:
    """Somebody who acts, and the part of the steps that is his."""

    name: str
    """What was asked for: `random`, RUN_DIR or RUN_DIR@CHECKPOINT."""
    share: float
    agent: Agent | None = None
    """None: uniform random actions."""
    algo: str = "random"
    env: str | None = None
    env_options: dict[str, Any] = field(default_factory=dict)


def roll_out(env: VecEnv, act: Act, steps: int, progress: Progress = lambda done, total: None) -> Iterator[Played]:
    """Whole episodes of one policy, those begun in the first `steps` transitions, by the order of their ends.

    Worlds run side by side; `env` is reset first.
    """
    n = env.num_envs
    obs, _ = env.reset()
    log: list[tuple[Array, ...]] = []  # vector steps, of which the oldest is number `first`
    first, now = 0, 0
    began = np.zeros(n, np.int64)  # the step at which each world's running episode began
    wanted = np.ones(n, bool)  # that was within the budget
    while wanted.any():
        action = act(obs).clamp(-1, 1)
        following, reward, terminated, truncated, info = env.step(action)
        log.append(tuple(x.cpu().numpy() for x in (obs, action, reward, terminated, truncated)))
        now += 1
        progress(min(now * n, steps), steps)
        done = info["_final_obs"].cpu().numpy()
        for i in np.flatnonzero(done & wanted):
            o, a, r, term, trunc = (
                np.stack(x) for x in zip(*([y[i] for y in x] for x in log[began[i] - first :]), strict=True)
            )
            yield Played(np.concatenate([o, info["next_obs"][i : i + 1].cpu().numpy()]), a, r, term, trunc)
        began[done] = now
        wanted[done] &= now * n < steps
        keep_from = int(began[wanted].min(initial=now))
        if keep_from - first > 1000:  # in slices: each costs a pass over what is left
            del log[: keep_from - first]
            first = keep_from
        obs = following


def load_policy(name: str, share: float = 1.0) -> Policy:
    """`random`, RUN_DIR (its latest checkpoint), RUN_DIR@best, RUN_DIR@STEP; UsageError where there is none."""
    from rlctl import experiment

    if name == "random":
        return Policy(name, share)
    folder, _, which = name.partition("@")
    run = Path(folder)
    agent, settings = experiment.load_agent(run, which or "latest")
    record = experiment.read_json(run / "run.json")
    options = record.get("eval_env_options")
    options = settings.env_options if options is None else options
    return Policy(name, share, agent, settings.algo, settings.env or record.get("eval_env"), options)


def parse_policies(policy: str, mix: Sequence[str]) -> list[Policy]:
    """`policy`, and POLICY=SHARE each of `mix`: those take their shares of the steps, `policy` the rest."""
    out: list[Policy] = []
    for item in mix:
        name, sep, text = item.rpartition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not sep or not 0 < share < 1:
            raise UsageError(f"--mix takes POLICY=SHARE with a share between 0 and 1, got '{item}'")
        out.append(load_policy(name, share))
    rest = 1 - sum(p.share for p in out)
    if rest <= 1e-9:
        raise UsageError(f"the shares of --mix add up to {1 - rest:g}: nothing is left for --policy {policy}")
    return [load_policy(policy, rest), *out]


def collect(
    env: str | None,
    policies: Sequence[Policy],
    steps: int,
    id: str,
    *,
    num_envs: int = 16,
    seed: int = 0,
    stochastic: bool = True,
    env_options: dict[str, Any] | None = None,
    author: str = "anonymous",
    author_email: str | None = None,
    code_permalink: str | None = None,
    description: str | None = None,
    ref_scores: tuple[float, float] | None = None,
    storage: str = "hdf5",
    progress: Progress = lambda done, total: None,
) -> Path:
    """Roll `policies` out in `env` (None: the first run's own) into the Minari dataset `id`; returns its folder.

    `ref_scores` are the returns that score 0 and 100; None takes D4RL's where it has the task. `stochastic` draws from
    the policies, else they take their deterministic actions. The random streams of policy and simulator follow from
    `seed`. At most `num_envs` worlds run side by side, fewer where that many would play far more than `steps`.
    UsageError before anything is simulated: a bad or taken id, no environment, an agent it does not fit, a share of no
    step, equal reference scores.
    """
    check_new_id(id)
    check_storage(storage)
    if ref_scores is not None and ref_scores[0] == ref_scores[1]:
        raise UsageError(f"reference scores are two different returns, for 0 and for 100; got {ref_scores[0]:g} twice")
    env = env or next((p.env for p in policies if p.env), None)
    if env is None:
        raise UsageError("no environment: give one with --env, `rlctl envs` lists them")
    env = rlctl_envs.canonical(env)
    own = next((p.env_options for p in policies if p.env == env), {})
    options = dict(own) | dict(env_options or {})
    budgets = [round(p.share * steps) for p in policies[:-1]]
    budgets.append(steps - sum(budgets))
    world = rlctl_envs.make(env, **options)
    limit = world.episode_len
    world.close()
    for p, budget in zip(policies, budgets, strict=True):
        _check_fit(p, world)
        if budget < 1:
            raise UsageError(f"{p.name} gets no step: {p.share:g} of {steps}")
    make_root()
    episodes: list[EpisodeBuffer] = []
    described = []
    before = 0
    for k, (p, budget) in enumerate(zip(policies, budgets, strict=True)):
        worlds = rlctl_envs.make(
            env, num_worlds(budget, limit, num_envs), seed=derive(seed, f"collect{k}", 31), **options
        )
        try:
            act = _act(p, worlds, seed, k, stochastic)
            spaces = spaces_of(worlds)
            played = 0
            returns = []
            for e in roll_out(worlds, act, budget, lambda done, _, b=before: progress(b + done, steps)):  # type: ignore[misc]
                episodes.append(to_buffer(e, spaces[1], {"policy": np.full((len(e.obs), 1), k, np.int32)}))
                returns.append(float(e.reward.sum(dtype=np.float64)))
                played += len(e.reward)
        finally:
            worlds.close()
        before += budget
        described.append(
            f"{p.name} ({p.algo}): {played} steps, {len(returns)} episodes of mean return {np.mean(returns):.1f}"
        )
    settings = {k: v for k, v in options.items() if k not in (*WARP_OPTIONS, "backend", "threads", "workers")}
    altered = {k: v for k, v in settings.items() if k != "physics"}
    told = ({"physics": "published"} if hasattr(worlds, "physics") else {}) | settings
    task = ", ".join([env, *(f"{k}={v}" for k, v in told.items())])
    text = (
        f"{description + ' ' if description else ''}{task}, seed {seed}; "
        f"whole episodes, {'sampled' if stochastic else 'deterministic'} actions as executed. "
        "Policies by number (infos/policy): " + "; ".join(f"{k} = {d}" for k, d in enumerate(described))
    )
    refs = ref_scores
    if refs is None and not altered:  # returns of a task with other settings are on no known scale
        refs = reference_returns(env)
        if reference_name(env):
            text += f". Reference scores are D4RL's for {reference_name(env)}, measured on its own version of the task."
    return write_minari(
        id,
        episodes,
        env=_with_settings(spec_of(env), altered),
        spaces=spaces,
        storage=storage,
        metadata={
            "algorithm_name": "+".join(dict.fromkeys(p.algo for p in policies)),
            "author": author,
            "author_email": author_email,
            "code_permalink": code_permalink,
            "description": text,
            "requirements": _requirements(env),
        },
        marks={OWN_MARK: {"env_id": env, "env_options": settings}},
        ref_scores=refs,
    )


def num_worlds(budget: int, limit: int, most: int) -> int:
    """How many worlds, at most `most`, play `budget` steps: so that full episodes of `limit` steps come out even.

    All worlds play their episodes to the end. Sixteen that begin a second one for the last tenth of the budget would
    play twice what was asked.
    """
    rounds = math.ceil(budget / (most * limit))
    return min(most, math.ceil(budget / (rounds * limit)))


def _with_settings(spec: Any, settings: Mapping[str, Any]) -> Any:
    """Gymnasium's spec of the task as it was played."""
    if spec is None or not settings:
        return spec
    spec = copy.deepcopy(spec)
    spec.kwargs = spec.kwargs | {k: v for k, v in settings.items() if k != "episode_len"}
    spec.max_episode_steps = settings.get("episode_len", spec.max_episode_steps)
    return spec


def _check_fit(p: Policy, env: VecEnv) -> None:
    if p.agent is not None and (p.agent.spec.obs_dim, p.agent.spec.act_dim) != (env.obs_dim, env.act_dim):
        raise UsageError(
            f"{p.name} takes observations of {p.agent.spec.obs_dim} and gives actions of {p.agent.spec.act_dim} "
            f"numbers, {env.id} has {env.obs_dim} and {env.act_dim}: it was trained on {p.env or 'another task'}"
        )


def _act(p: Policy, env: VecEnv, seed: int, number: int, stochastic: bool) -> Act:
    if p.agent is None:
        rng = generator(seed, f"collect{number}")

        def uniform(obs: Tensor) -> Tensor:
            return torch.rand(len(obs), env.act_dim, generator=rng) * 2 - 1

        return uniform
    agent = p.agent
    agent.eval()
    agent.rng = {name: generator(seed, f"collect{number}/{name}", agent.spec.device) for name in agent.rng}

    @torch.no_grad()
    def act(obs: Tensor) -> Tensor:
        return agent.act(obs.to(agent.spec.device), explore=stochastic)[0].to(obs.device)

    return act


def _requirements(env: str) -> list[str]:
    from importlib.metadata import version

    simulated = any(row["id"] == env and row["engine"] == "mujoco" for row in rlctl_envs.task_table())
    names = ["gymnasium", "mujoco"] if simulated else ["gymnasium"]
    names += ["dm_control"] if is_suite(env) else []
    return [f"{name}=={version(name)}" for name in names]
