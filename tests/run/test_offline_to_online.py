"""From a dataset to an environment with one agent: exact resume on both sides of the boundary, one scale for both."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import assert_same, hdf5, rows, settings, train_in_pieces

from rlctl import agents, experiment
from rlctl.data.episodes import EpisodeRing
from rlctl.data.ring import Mix, Ring
from rlctl.errors import UsageError
from rlctl.experiment import Settings
from rlctl.train import OfflineRLConfig
from rlctl.types import Agent, Batch, Metrics

SMALL: dict[str, Any] = {"hidden": [8, 8], "batch_size": 16, "steps": 60, "offline_updates": 40}
EXTRA: dict[str, dict[str, Any]] = {
    "cql": {"num_actions": 2},
    "cal-ql": {"num_actions": 2, "reward": "2r-1"},
    "famo2o-cql": {"num_actions": 2},
    "edac": {"num_critics": 2},
    "rebrac": {"critic_hidden": [8, 8]},
    "a2pr": {"critic_hidden": [8, 8], "vae_hidden": [8, 8]},
    "odice": {"v_hidden": [8, 8]},
    "pa-rl": {"base_net": "mlp", "base_hidden": [8], "base_steps": 2, "num_candidates": 4, "num_kept": 2}
    | {"search_steps": 1, "num_critics": 2, "num_actions": 2},
    "diffusion-ql": {"num_candidates": 3, "diffusion_steps": 2},
    "fql": {"flow_steps": 2},
    "idql": {"critic_hidden": [8, 8], "width": 8, "blocks": 1, "num_candidates": 3},
    "ifql": {"critic_hidden": [8, 8], "flow_steps": 2, "num_candidates": 3},
}
ONLINE = [n for n in agents.names() if issubclass(agents.get(n).Config, OfflineRLConfig)]
ABLE = [n for n in ONLINE if not agents.get(n).offline_only]


def o2o(algo: str, tmp_path: Path, **layers: Any) -> Settings:
    data = tmp_path / "d.hdf5"
    if not data.exists():
        hdf5(data)
    known = {f.name for f in fields(agents.get(algo).Config)}
    layers = {k: v for k, v in SMALL.items() if k in known} | EXTRA.get(algo, {}) | layers
    return settings(algo, layers.pop("env", "Hopper"), data, **layers)


@pytest.mark.parametrize(
    ("algo", "layers", "pieces"),
    [
        # within the data, at its last update, at the first env step, after it
        ("iql", {}, [25, 15, 1, 20]),
        ("cal-ql", {"num_envs": 3}, [39, 2, 9]),  # rows that wait for the end of their episode
        ("rebrac", {"data_share": None}, [40, 30]),
        ("prdc", {"data_share": 0.25}, [41]),
        ("famo2o-iql", {"offline_updates": 0}, [1, 30]),
        ("pa-rl", {"num_envs": 2}, [29, 11, 1]),  # clones, learns values, then distils
        ("td3bc", {"steps": 30, "buffer_size": 20}, [40, 25]),
        ("diffusion-ql", {"ema_start": 20}, [30, 25]),  # with its slow copy and its fixed noise
    ],
)
def test_resumed_anywhere_it_equals_an_unbroken_run(
    algo: str, layers: dict[str, Any], pieces: list[int], tmp_path: Path
) -> None:
    s = o2o(algo, tmp_path, **layers, run={"log_every": 7, "eval_every": 35})
    experiment.train(s, tmp_path / "whole", quiet=True)
    assert train_in_pieces(s, tmp_path / "pieces", pieces) == len(pieces)
    assert_same(tmp_path / "whole", tmp_path / "pieces")


class Watched:
    """What an agent was taught in a run: (env steps so far, batch) of every update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, algo: str) -> None:
        self.seen: list[tuple[int, Batch]] = []
        cls = agents.get(algo)
        inner = cls.update

        def update(agent: Agent, b: Batch) -> Metrics:
            self.agent = agent
            self.seen.append((agent.counters["env_steps"], b))
            return inner(agent, b)

        monkeypatch.setattr(cls, "update", update)


@pytest.mark.parametrize("algo", ABLE)
def test_every_learner_that_can_goes_on(algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its updates, what it was taught, and statistics that are the data's to the end."""
    watched = Watched(monkeypatch, algo)
    s = o2o(algo, tmp_path, num_envs=2, normalize_obs=True)
    folder, result = experiment.train(s, tmp_path / "run", quiet=True)
    assert result is not None
    before = [b for n, b in watched.seen if n == 0]
    after = [b for n, b in watched.seen if n > 0]
    assert (len(before), len(after)) == (40, 60)
    assert all(len(b.reward) == 16 for b in before + after)
    assert all(set(b.extra) == set(before[0].extra) for b in after)
    record = json.loads((folder / "run.json").read_text())
    assert record["progress"] == 100
    assert rows(folder / "metrics.jsonl")[-1]["env_steps"] == 60
    # the same agent that only saw the data has the same statistics
    only = o2o(algo, tmp_path, normalize_obs=True, offline_updates=None, steps=3)
    experiment.train(only, tmp_path / "only", quiet=True)
    ours, theirs = experiment.load_agent(folder)[0], experiment.load_agent(tmp_path / "only")[0]
    for name in ("obs_norm", "reward"):
        for a, b in zip(getattr(ours, name).buffers(), getattr(theirs, name).buffers(), strict=True):
            assert torch.equal(a, b)
    assert float(ours.obs_norm.std.min()) < 0.998  # type: ignore[union-attr, operator]


def test_who_does_not_and_why(tmp_path: Path) -> None:
    for algo, why in (
        ("bc", "sees no reward"),
        ("odice-il", "imitates one trajectory"),
        ("cdsa", "corrects a trained policy"),
        ("sac", "learns in its environment from the start"),
    ):
        data = None if algo == "sac" else hdf5(tmp_path / "d.hdf5")
        with pytest.raises(UsageError, match=f"{algo} does not go from a dataset .*{why}.*leave --offline-updates out"):
            settings(algo, "Hopper", data, offline_updates=10)
    gaussian = ["td3bc", "prdc", "a2pr", "iql", "cql", "cal-ql", "awac", "edac", "rebrac", "odice"]
    gaussian += ["famo2o-iql", "famo2o-cql"]
    assert sorted(ABLE) == sorted([*gaussian, "diffusion-ql", "fql", "idql", "ifql", "pa-rl"])


def test_an_environment_is_needed(tmp_path: Path) -> None:
    s = settings("iql", None, hdf5(tmp_path / "d.hdf5"), **SMALL)
    with pytest.raises(UsageError, match="iql is to go on in an environment: the dataset does not name"):
        experiment.train(s, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("share", "of_data"), [(0.25, 4), (1.0, 16), (0.0, 0)])
def test_the_share_of_the_data(share: float, of_data: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, "iql")
    experiment.train(o2o("iql", tmp_path, data_share=share), tmp_path / "run", quiet=True)
    stored = {round(float(x), 5) for b in (watched.seen[k][1] for k in range(40)) for x in b.obs[:, 0]}
    full = {round(float(x), 5) for x in _data_obs(tmp_path)}
    assert stored <= full
    for n, b in watched.seen:
        if n > 0:
            assert sum(round(float(x), 5) in full for x in b.obs[:, 0]) == of_data


def _data_obs(tmp_path: Path) -> torch.Tensor:
    from rlctl.data.dataset import load_dataset

    return load_dataset(str(tmp_path / "d.hdf5")).whole().obs[:, 0]


def test_which_replay_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners with columns of episodes get theirs from whole episodes; the others learn from each step at once."""
    from rlctl import train

    kinds: dict[str, type[Ring]] = {}

    def spy(agent: Agent, env: Any, buffer: Any, run: Any, **kw: Any) -> None:
        assert isinstance(buffer, Mix)
        kinds[type(agent).__name__] = type(buffer.ring)

    monkeypatch.setattr(train, "off_policy", spy)
    for algo in ("iql", "cal-ql", "rebrac"):
        experiment.train(o2o(algo, tmp_path), tmp_path / algo, quiet=True)
    assert kinds == {"IQL": Ring, "CalQL": EpisodeRing, "ReBRAC": EpisodeRing}


def test_returns_of_online_rows_are_of_transformed_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In probe:constant every reward is 1 and ends its episode: 2r - 1 = 1 online, from one env step on."""
    watched = Watched(monkeypatch, "cal-ql")
    data = hdf5(tmp_path / "small.hdf5", obs_dim=1, act_dim=1)
    layers = SMALL | EXTRA["cal-ql"] | {"steps": 10, "data_share": 0.5, "reward": "3r-1"}
    experiment.train(settings("cal-ql", "probe:constant", data, **layers), tmp_path / "run", quiet=True)
    last = watched.seen[-1][1]
    assert last.reward[8:].tolist() == [1.0] * 8  # raw
    assert last.extra["mc_return"][8:].tolist() == [2.0] * 8


def test_a_longer_run_goes_on_online(tmp_path: Path) -> None:
    short, long = (o2o("td3bc", tmp_path, steps=n, run={"log_every": 10, "eval_every": 50}) for n in (30, 60))
    experiment.train(long, tmp_path / "long", quiet=True)
    experiment.train(short, tmp_path / "short", quiet=True)
    with pytest.raises(UsageError, match="has made 30 steps already"):
        experiment.resume(tmp_path / "short", 30, quiet=True)
    experiment.resume(tmp_path / "short", 60, quiet=True)
    assert_same(tmp_path / "long", tmp_path / "short")


def test_refused_before_the_data_phase_when_the_replay_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match="buffer_size="):
        experiment.train(o2o("iql", tmp_path, steps=10**13, buffer_size=10**13), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
