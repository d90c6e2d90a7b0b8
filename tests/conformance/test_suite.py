"""The conformance suite finds what it is there to find."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rlctl_envs
from rlctl.conformance import check_algo, check_dataset, check_env, names
from rlctl.conformance.env import Subject
from rlctl.conformance.settings import Traits, override, traits
from rlctl.errors import UsageError
from rlctl_envs.probes import ActionReward, TimeLimit


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


QUICK = [c for c in names("algo") if not c.startswith("probe-") and c != "exact-resume"]


@pytest.mark.parametrize(
    ("agent", "check", "reason"),
    [
        ("ReadsOnHost", "host-reads", "reads a tensor on the host"),
        ("NumpyInUpdate", "host-reads", r"\.item\(\)"),
        ("MasksDone", "truncation", "never with ~done"),
        ("MasksDone", "cuts", "truncated"),
        ("MasksNothing", "termination", "mask with ~terminated"),
        ("GlobalNoise", "random-streams", "global generator"),
        ("NoisyMode", "random-streams", "deterministic action"),
        ("ForgetsState", "save-load", "after loading"),
        ("ForgetsState", "exact-resume", "differ"),
        ("ForgetsNormaliser", "weights-alone", "register what it needs"),
        ("Orphan", "optimisers", "in no optimiser: lost"),
        ("WritesBatch", "side-effects", "wrote into reward"),
        ("BatchNorm", "rows-apart", "with the other rows"),
        ("WrongSign", "probe-action", "known 1.000"),
        ("VectorMetric", "metrics", "losses/rows is no 0-dim tensor"),
        ("Loose", "settings", "frozen=True"),
    ],
)
def test_a_broken_agent_is_found(agent: str, check: str, reason: str) -> None:
    solve = {"steps": 200} if check.startswith("probe") else {}
    (result,) = check_algo(f"broken_agents:{agent}", [check], solve=solve)
    assert result.status == "fail"
    assert re.search(reason, result.reason), result.reason
    assert "\n" not in result.line()


def test_a_good_agent_passes() -> None:
    results = list(check_algo("broken_agents:Fine", QUICK))
    assert [r.check for r in results] == QUICK
    assert [r for r in results if not r.ok] == []


def test_a_subclass_is_checked_like_the_algorithm_it_is() -> None:
    assert traits("broken_agents:Fine") == traits("sac")
    assert traits("broken_agents:Fine") != traits("td3")
    with override("broken_agents:Fine", {"steps": 7}):
        assert traits("broken_agents:Fine").solve == {**traits("sac").solve, "steps": 7}
    assert traits("sac").solve["steps"] != 7


def test_unknown_checks_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'save-load'"):
        list(check_algo("sac", ["save-lod"]))


# ------------------------------------------------------------------------------------------------------- environments
class Ticking(TimeLimit):
    """Counts its steps in its observation; sound."""

    def first_obs(self, n: int) -> np.ndarray:
        return self.np_random.uniform(-0.1, 0.1, (n, 1))

    def advance(self, obs: Tensor) -> Tensor:
        return obs + 1


class LosesFinalObs(Ticking):
    """`next_obs` is the next episode's first."""

    def step(self, actions: Any) -> Any:
        obs, *rest, info = super().step(actions)
        return obs, *rest, info | {"next_obs": obs, "final_obs": obs}


class CutsLate(Ticking):
    """One step too long."""

    def step(self, actions: Any) -> Any:
        self.episode_len += 1
        result = super().step(actions)
        self.episode_len -= 1
        return result


class Unseeded(Ticking):
    """Starts by numpy's global generator."""

    def first_obs(self, n: int) -> np.ndarray:
        return np.random.uniform(-0.1, 0.1, (n, 1))  # noqa: NPY002


class HalfState(Ticking):
    """Forgets the clocks of its episodes."""

    def set_state(self, state: Any) -> None:
        super().set_state(state | {"clock": np.zeros_like(state["clock"])})


class OneTensor(Ticking):
    """Returns the same tensor in every step."""

    def step(self, actions: Any) -> Any:
        obs, *rest = super().step(actions)
        self._out = obs.clone() if getattr(self, "_out", None) is None else self._out.copy_(obs)
        self._obs = self._out.clone()
        return self._out, *rest


class Unclipped(ActionReward):
    """An action of 3 is one of 3."""

    def pay(self, obs: Tensor, action: Tensor) -> Tensor:
        return super().pay(obs, self._raw.to(obs.dtype))

    def step(self, actions: Any) -> Any:
        self._raw = torch.as_tensor(actions)
        return super().step(actions)


ENVS = {c.__name__: c for c in (Ticking, LosesFinalObs, CutsLate, Unseeded, HalfState, OneTensor, Unclipped)}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above as environments of an installed package."""

    class Point:
        value = "some_package:Env"

        def __init__(self, cls: Any) -> None:
            self.cls = cls

        def load(self) -> Any:
            return self.cls

    points = {name: Point(cls) for name, cls in ENVS.items()}
    monkeypatch.setattr(rlctl_envs.registry, "_plugins", lambda: points)


@pytest.mark.parametrize(
    ("env", "failing"),
    [
        ("Ticking", set()),
        ("LosesFinalObs", {"true-successor", "autoreset"}),
        ("CutsLate", {"time-limit", "stagger"}),
        ("Unseeded", {"determinism", "state", "actions", "true-successor"}),
        ("HalfState", {"state"}),
        ("OneTensor", {"kept-tensors"}),
        ("Unclipped", {"actions"}),
    ],
)
def test_a_broken_environment_is_found(env: str, failing: set[str], installed: None) -> None:
    results = list(check_env(env))
    assert [r.check for r in results] == names("env")
    found = {r.check: r.reason for r in results if not r.ok}
    assert found.keys() <= failing, found
    assert bool(found) == bool(failing)
    assert all(found.values())


def test_options_reach_the_environment() -> None:
    with Subject("Hopper", {"episode_len": 9}).made() as env:
        assert env.episode_len == 9


# ----------------------------------------------------------------------------------------------------------- datasets
def write(file: Path, **changes: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    n = 200
    obs = rng.normal(size=(n, 3)).astype(np.float32)
    columns = {
        "observations": obs,
        "next_observations": np.roll(obs, -1, 0),
        "actions": rng.uniform(-0.9, 0.9, (n, 2)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.arange(1, n + 1) % 70 == 0,
        "timeouts": np.arange(1, n + 1) % 100 == 0,
    } | changes
    np.savez(file, **columns)  # type: ignore[arg-type]
    return str(file)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({}, None),
        ({"actions": np.full((200, 2), 3.0, np.float32)}, "action"),
        ({"rewards": np.full(200, np.nan, np.float32)}, "finite"),
        ({"rewards": np.zeros(199, np.float32)}, "file"),
        ({"next_observations": np.zeros((200, 3), np.float32)}, "next-obs"),
    ],
)
def test_a_broken_dataset_is_found(changes: dict[str, np.ndarray], check: str | None, tmp_path: Path) -> None:
    results = list(check_dataset(write(tmp_path / "d.npz", **changes)))
    assert [r.check for r in results] == names("dataset")
    found = [r.check for r in results if not r.ok]
    assert (check in found) if check else found == [], [r.line() for r in results]


def test_traits_must_be_traits() -> None:
    with pytest.raises(TypeError, match="Traits"):
        traits("broken_agents:Untraited")
    assert Traits().learns == "values"
