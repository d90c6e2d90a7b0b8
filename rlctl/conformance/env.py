"""What every environment must keep: the contract of `rlctl_envs.VecEnv`. Each check takes a `Subject`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

import rlctl_envs
from rlctl.conformance.results import Skip, expect, fail
from rlctl_envs import VecEnv

N = 3
LIMIT = 12
"""Time limit of the short episodes most checks want."""
PATIENCE = 2500
"""Vector steps to wait for an episode to end, where its length cannot be set."""


@dataclass(frozen=True)
class Subject:
    """An environment by name, with the keyword arguments it is made with."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def made(self, num_envs: int = N, seed: int | None = 5, **more: Any) -> Iterator[VecEnv]:
        """The environment, closed afterwards."""
        env = rlctl_envs.make(self.name, num_envs, seed=seed, **{**self.options, **more})
        try:
            yield env
        finally:
            env.close()

    def takes_a_limit(self) -> bool:
        """Whether the length of its episodes can be set (`episode_len`)."""
        try:
            with self.made(1, episode_len=LIMIT) as env:
                return env.episode_len == LIMIT
        except (TypeError, ValueError):
            return False


Check = Callable[[Subject], None]


def actions(env: VecEnv, steps: int, seed: int = 0) -> Tensor:
    """Uniform actions [steps, N, A]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, env.num_envs, env.act_dim, generator=generator) * 2 - 1


def play(env: VecEnv, sequence: Tensor) -> list[Tensor]:
    """All that steps return, as one flat list."""
    seen: list[Tensor] = []
    for action in sequence:
        *first, info = env.step(action)
        seen += [*first, info["next_obs"], info["_final_obs"]]
    return seen


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two such lists are equal bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def attributes(s: Subject) -> None:
    """It is a VecEnv with sizes, spaces and a time limit that agree."""
    with s.made() as env:
        expect(isinstance(env, VecEnv), f"{type(env).__name__} is no rlctl_envs.VecEnv: subclass it")
        expect(env.num_envs == N, f"asked for {N} copies, num_envs is {env.num_envs}")
        mode = env.metadata.get("autoreset_mode")
        expect(mode is AutoresetMode.SAME_STEP, f"metadata['autoreset_mode'] is {mode}, wanted SAME_STEP")
        box = gymnasium.spaces.Box(-1.0, 1.0, (env.act_dim,), np.float32)
        expect(env.single_action_space == box, f"single_action_space is {env.single_action_space}, wanted {box}")
        shape = env.observation_space.shape
        expect(shape == (N, env.obs_dim), f"observation_space has shape {shape}, wanted {(N, env.obs_dim)}")
        expect(isinstance(env.episode_len, int) and env.episode_len >= 1, f"episode_len is {env.episode_len!r}")
        expect(isinstance(env.id, str) and bool(env.id), "it has no id")
    try:
        with s.made(0):
            pass
    except ValueError:
        return
    fail("num_envs=0 was accepted")


def shapes(s: Subject) -> None:
    """reset() and step() return tensors of the promised shapes and types, without NaN."""
    with s.made() as env:
        obs, info = env.reset(seed=1)
        expect(isinstance(info, dict), "reset() returns (observations, dict)")
        _obs_like(env, "observations of reset()", obs)
        for action in actions(env, 5):
            obs, reward, terminated, truncated, info = env.step(action)
            _obs_like(env, "observations", obs)
            missing = [k for k in ("next_obs", "final_obs", "_final_obs") if k not in info]
            expect(not missing, f"info lacks {', '.join(missing)}")
            _obs_like(env, "info['next_obs']", info["next_obs"])
            good = isinstance(reward, Tensor) and reward.shape == (N,) and reward.dtype == env.dtype
            expect(good, f"rewards are not a tensor [N] of {env.dtype}")
            expect(bool(reward.isfinite().all()), "rewards are not finite")
            for what, flag in (
                ("terminated", terminated),
                ("truncated", truncated),
                ("_final_obs", info["_final_obs"]),
            ):
                good = isinstance(flag, Tensor) and flag.shape == (N,) and flag.dtype == torch.bool
                expect(good, f"{what} is not a tensor [N] of bool")
            expect(torch.equal(env.current_obs, obs), "current_obs is not what the last step returned")


def _obs_like(env: VecEnv, what: str, obs: Any) -> None:
    expect(isinstance(obs, Tensor), f"{what} are {type(obs).__name__}, wanted a torch tensor")
    expect(obs.shape == (env.num_envs, env.obs_dim), f"{what} have shape {tuple(obs.shape)}")
    expect(obs.dtype == env.dtype, f"{what} are {obs.dtype}, wanted {env.dtype}")
    expect(bool(obs.isfinite().all()), f"{what} are not finite")


def autoreset(s: Subject) -> None:
    """Same-step autoreset: where an episode ended, and only there, obs is already the next one's first."""
    short = s.takes_a_limit()
    with s.made(**({"episode_len": LIMIT} if short else {})) as env:
        first = env.reset(seed=1)[0].clone()
        ends = 0
        restarted = False
        for action in actions(env, 5 * LIMIT if short else PATIENCE):
            obs, _, terminated, truncated, info = env.step(action)
            done = terminated | truncated
            expect(torch.equal(info["_final_obs"], done), "_final_obs is not where terminated or truncated is set")
            expect(torch.equal(info["final_obs"], info["next_obs"]), "final_obs is not next_obs")
            elsewhere = ~done
            same_there = torch.equal(obs[elsewhere], info["next_obs"][elsewhere])
            expect(same_there, "obs and next_obs differ where no episode ended")
            # a start state that is always the same may also be where an episode ends
            restarted |= bool((obs[done] != info["next_obs"][done]).any()) or torch.equal(obs[done], first[done])
            ends += int(done.sum())
            if ends > 4:
                break
        if not ends:
            raise Skip(f"no episode ended within {PATIENCE} steps of random actions, and episode_len cannot be set")
        expect(restarted, "after an end, obs is still the last one of the old episode")


def time_limit(s: Subject) -> None:
    """An episode is truncated after exactly episode_len steps of its own."""
    short = s.takes_a_limit()
    with s.made(**({"episode_len": LIMIT} if short else {})) as env:
        if not short and env.episode_len > PATIENCE:
            raise Skip(f"episodes of {env.episode_len} steps, and episode_len cannot be set")
        env.reset(seed=1)
        age = torch.zeros(N, dtype=torch.int64)
        for action in actions(env, 5 * LIMIT if short else env.episode_len + 1):
            _, _, terminated, truncated, _ = env.step(action)
            age += 1
            # a task may end and be cut in one step; it may also leave `truncated` unset there
            late = (age >= env.episode_len) & ~truncated & ~terminated
            expect(not bool(late.any()), f"an episode has run {int(age.max())} of {env.episode_len} steps, uncut")
            early = truncated & (age < env.episode_len)
            expect(not bool(early.any()), f"truncated after {int(age.min())} of {env.episode_len} steps")
            age[terminated | truncated] = 0


def true_successor(s: Subject) -> None:
    """next_obs of a truncated step is the state that was cut, not the next episode's first."""
    if not s.takes_a_limit():
        raise Skip("episode_len cannot be set, so a cut cannot be compared with going on")
    for seed in range(20):
        with s.made(1, episode_len=LIMIT) as cut, s.made(1, episode_len=LIMIT + 5) as longer:
            cut.reset(seed=seed)
            longer.reset(seed=seed)
            for action in 0.3 * actions(cut, LIMIT, seed):
                *_, truncated, there = cut.step(action)
                _, _, terminated, _, on = longer.step(action)
                if bool(terminated):
                    break
            if bool(truncated) and not bool(terminated):
                gap = float((there["next_obs"] - on["next_obs"]).abs().max())
                expect(gap == 0, f"next_obs of a cut differs by {gap:.3g} from the state reached without the cut")
                return
    raise Skip(f"random actions end every episode before {LIMIT} steps")


def determinism(s: Subject) -> None:
    """One seed and the same actions give the same numbers; a reset with the seed starts it over."""
    results = []
    with s.made() as env:
        sequence = actions(env, 40)
        for _ in range(2):
            first, _ = env.reset(seed=11)
            results.append([first.clone(), *play(env, sequence)])
    with s.made(seed=99) as env:
        first, _ = env.reset(seed=11)
        results.append([first.clone(), *play(env, sequence)])
    expect(same(results[0], results[1]), "a second reset with the same seed gives another course")
    expect(same(results[0], results[2]), "another instance gives another course from the same seed")


def starts(s: Subject) -> None:
    """A reset without a seed goes on with the random stream."""
    with s.made() as env:
        seeded = [env.reset(seed=k)[0].clone() for k in range(4)]
        if all(torch.equal(x, seeded[0]) for x in seeded):
            raise Skip("every episode starts in the same state")
        env.reset(seed=1)
        following = [env.reset()[0].clone() for _ in range(6)]
        stuck = all(torch.equal(x, following[0]) for x in following)
        expect(not stuck, "six resets without a seed start in the same state")


def state(s: Subject) -> None:
    """state() and set_state() continue bit for bit, in the same environment and in a new one."""
    short = {"episode_len": LIMIT} if s.takes_a_limit() else {}
    with s.made(**short) as env:
        env.reset(seed=3)
        if not env.can_checkpoint:
            try:
                env.state()
            except NotImplementedError:
                raise Skip("it cannot be checkpointed (can_checkpoint): a resumed run starts new episodes") from None
            fail("can_checkpoint is False, yet state() returns something")
        play(env, actions(env, LIMIT + 5, 1))
        kept = {k: np.array(v, copy=True) for k, v in env.state().items()}
        loose = [k for k, v in kept.items() if v.dtype == object]
        expect(not loose, f"state() holds objects in {', '.join(loose)}: plain arrays only")
        then, after = env.current_obs.clone(), actions(env, 2 * LIMIT + 5, 2)
        course = play(env, after)
        env.set_state(kept)
        expect(torch.equal(env.current_obs, then), "current_obs is another one after set_state()")
        expect(same(play(env, after), course), "it goes on otherwise after set_state()")
    with s.made(seed=77, **short) as fresh:
        fresh.set_state(kept)
        expect(same(play(fresh, after), course), "a new instance goes on otherwise after set_state()")
        broken = dict(kept)
        broken.pop(next(iter(broken)))
        try:
            fresh.set_state(broken)
        except (ValueError, KeyError):
            return
        fail("a state with an array missing was accepted")


def kept_tensors(s: Subject) -> None:
    """What a step returned is never overwritten by a later one."""
    with s.made() as env:
        held = [env.reset(seed=0)[0]]
        copies = [held[0].clone()]
        for action in actions(env, 30):
            *first, info = env.step(action)
            for tensor in (*first, info["next_obs"], info["_final_obs"]):
                held.append(tensor)
                copies.append(tensor.clone())
        expect(same(held, copies), "a tensor returned earlier has changed: return new ones")


def action_range(s: Subject) -> None:
    """Actions beyond [-1, 1] count as the bound; numpy arrays are taken as well as tensors."""
    courses = []
    for scale, kind in ((1.0, "tensor"), (3.0, "tensor"), (1.0, "numpy")):
        with s.made() as env:
            first, _ = env.reset(seed=2)
            sequence = scale * actions(env, 10).sign()
            seen = [first.clone()]
            for action in sequence:
                obs, reward, *_ = env.step(action if kind == "tensor" else action.numpy())
                seen += [obs, reward]
            courses.append(seen)
    expect(same(courses[0], courses[1]), "an action of 3 is not taken as 1")
    expect(same(courses[0], courses[2]), "a numpy action gives another result than a tensor")


def bad_actions(s: Subject) -> None:
    """NaN and actions of a wrong shape are refused with a ValueError."""
    with s.made() as env:
        env.reset(seed=2)
        wrong = {
            "NaN": torch.full((N, env.act_dim), float("nan")),
            "one action for all": torch.zeros(env.act_dim),
            "a row too many": torch.zeros(N + 1, env.act_dim),
            "a column too many": torch.zeros(N, env.act_dim + 1),
        }
        for what, action in wrong.items():
            try:
                env.step(action)
            except ValueError:
                continue
            fail(f"{what} was accepted as an action")
        env.step(torch.zeros(N, env.act_dim))  # and it goes on


def stagger(s: Subject) -> None:
    """stagger() spreads the ages of the first episodes over the time limit."""
    if not s.takes_a_limit():
        raise Skip("episode_len cannot be set")
    with s.made(4, episode_len=LIMIT) as env:
        env.reset(seed=0)
        if not env.can_stagger:
            raise Skip("it cannot be staggered (can_stagger)")
        env.stagger()
        ages = torch.arange(4) * LIMIT // 4
        for step in range(1, LIMIT + 1):
            _, _, terminated, truncated, _ = env.step(torch.zeros(4, env.act_dim))
            ages += 1
            wrong = truncated != (ages >= LIMIT)
            expect(not bool((wrong & ~terminated).any()), f"in step {step} other episodes are cut than should be")
            ages[terminated | truncated] = 0


CHECKS: Mapping[str, Check] = {
    "attributes": attributes,
    "shapes": shapes,
    "actions": action_range,
    "bad-actions": bad_actions,
    "autoreset": autoreset,
    "time-limit": time_limit,
    "true-successor": true_successor,
    "determinism": determinism,
    "starts": starts,
    "state": state,
    "kept-tensors": kept_tensors,
    "stagger": stagger,
}
"""Every check by name."""
