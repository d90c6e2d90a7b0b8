"""Record policies into a Minari dataset: trained runs, mixtures of their checkpoints, random actions.

Every episode begun within the budget of steps is played to its end and kept, so no episode is cut and short ones are
not preferred; a dataset is therefore somewhat longer than asked. Stored are observations, raw rewards, both flags, and
the action as it was executed: clipped, in the units of the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import rlctl_envs
from rlctl.data.arrays import Array
from rlctl.data.reference import is_suite, reference_name, reference_returns
from rlctl.data.write import Played, check_new_id, check_storage, spaces_of, spec_of, to_buffer, write_minari
from rlctl.errors import UsageError
from rlctl.seeding import derive, generator

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
    options = record.get("eval_env_options") or settings.env_options
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
    `seed`. UsageError before anything is simulated: a bad or taken id, no environment, an agent it does not fit.
    """
    check_new_id(id)
    check_storage(storage)
    env = env or next((p.env for p in policies if p.env), None)
    if env is None:
        raise UsageError("no environment: give one with --env, `rlctl envs` lists them")
    env = rlctl_envs.canonical(env)
    own = next((p.env_options for p in policies if p.env == env), {})
    options = dict(own) | dict(env_options or {})
    episodes: list[EpisodeBuffer] = []
    described = []
    total, before = steps, 0
    for k, p in enumerate(policies):
        budget = steps - before if k == len(policies) - 1 else round(p.share * steps)
        if budget < 1:
            raise UsageError(f"{p.name} gets no step: {p.share:g} of {steps}")
        worlds = rlctl_envs.make(env, min(num_envs, budget), seed=derive(seed, f"collect{k}", 31), **options)
        try:
            act = _act(p, worlds, seed, k, stochastic)
            spaces = spaces_of(worlds)
            played = 0
            returns = []
            for e in roll_out(worlds, act, budget, lambda done, _, b=before: progress(b + done, total)):  # type: ignore[misc]
                episodes.append(to_buffer(e, spaces[1], {"policy": np.full((len(e.obs), 1), k, np.int32)}))
                returns.append(float(e.reward.sum(dtype=np.float64)))
                played += len(e.reward)
        finally:
            worlds.close()
        before += budget
        described.append(
            f"{p.name} ({p.algo}): {played} steps, {len(returns)} episodes of mean return {np.mean(returns):.1f}"
        )
    physics = f", '{options.get('physics', 'published')}' physics" if hasattr(worlds, "physics") else ""
    text = (
        f"{description + ' ' if description else ''}{env}{physics}, seed {seed}; whole episodes, "
        f"{'sampled' if stochastic else 'deterministic'} actions as executed. Policies by number (infos/policy): "
        + "; ".join(f"{k} = {d}" for k, d in enumerate(described))
    )
    refs = ref_scores or reference_returns(env)
    if reference_name(env) and ref_scores is None:
        text += f". Reference scores are D4RL's for {reference_name(env)}, measured on its own version of the task."
    return write_minari(
        id,
        episodes,
        env=spec_of(env),
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
        ref_scores=refs or None,
    )


def _act(p: Policy, env: VecEnv, seed: int, number: int, stochastic: bool) -> Act:
    if p.agent is None:
        rng = generator(seed, f"collect{number}")

        def uniform(obs: Tensor) -> Tensor:
            return torch.rand(len(obs), env.act_dim, generator=rng) * 2 - 1

        return uniform
    agent = p.agent
    if (agent.spec.obs_dim, agent.spec.act_dim) != (env.obs_dim, env.act_dim):
        raise UsageError(
            f"{p.name} takes observations of {agent.spec.obs_dim} and gives actions of {agent.spec.act_dim} numbers, "
            f"{env.id} has {env.obs_dim} and {env.act_dim}: it was trained on {p.env or 'another task'}"
        )
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
