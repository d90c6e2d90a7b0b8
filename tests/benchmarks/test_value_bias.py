"""A critic's values beside the returns of its own policy."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rlctl import experiment

SCRIPT = "value_bias"


def test_returns_are_known_to_the_end_of_a_fall_and_away_from_a_cut(script: ModuleType) -> None:
    # gamma = 0.1: two steps on, a reward weighs 1%
    reward = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    returns, known = script.known_returns(reward, torch.tensor([2, 4]), torch.tensor([True, False]), 0.1)
    torch.testing.assert_close(returns, torch.tensor([[1.2, 1.234], [2.0, 2.34], [0.0, 3.4], [0.0, 4.0]]))
    assert known.tolist() == [[True, True], [True, True], [False, True], [False, False]]


@pytest.mark.parametrize(("gamma", "known"), [(0.0, [True, True]), (1.0, [False, False])])
def test_ends_of_the_discount(script: ModuleType, gamma: float, known: list[bool]) -> None:
    found = script.known_returns(torch.ones(2, 1), torch.tensor([2]), torch.tensor([False]), gamma)[1]
    assert found.squeeze(1).tolist() == known


def train(folder: Path, algo: str, agent: dict[str, object]) -> Path:
    """Two updates of an agent on noise of Hopper's shape."""
    rng, n = np.random.default_rng(0), 64
    rows = {
        "observations": rng.normal(size=(n, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(n, 3)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "next_observations": rng.normal(size=(n, 11)).astype(np.float32),
        "terminals": np.arange(1, n + 1) % 16 == 0,
        "timeouts": np.zeros(n, bool),
    }
    np.savez(folder / "rows.npz", **rows)
    run = {"evaluations": 1, "eval_episodes": 1, "final_episodes": 1, "tensorboard": False}
    layer = {"data": str(folder / "rows.npz"), "env": "Hopper", "seed": 3, "run": run}
    settings = experiment.resolve(algo, [layer, {"agent": {"steps": 2, "batch_size": 8, "hidden": [8, 8], **agent}}])
    experiment.train(settings, folder / "run", quiet=True)
    return folder / "run"


def test_record_of_a_run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = train(tmp_path, "cql", {"num_actions": 2}), tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["x", str(run), "--episodes", "3", "--out", str(out)])
    script.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["algo"], row["seed"], row["progress"], row["terminated"]) == ("cql", 3, 2, 1.0)
    assert row["bias"] == pytest.approx(row["q"] - row["discounted_return"], abs=1e-4)
    assert 0 < row["discounted_return"] < row["return"]  # Hopper pays at least 1 per step it stands
    assert abs(row["q"] - row["q_policy"]) < 1  # of networks hardly trained


def test_returns_are_of_the_rewards_the_critic_learned_from(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, reward in (("plain", "none"), ("tenfold", "10r")):
        (folder := tmp_path / name).mkdir()
        run, out = train(folder, "iql", {"reward": reward, "steps": 1}), folder / "out.json"
        monkeypatch.setattr("sys.argv", ["x", str(run), "--episodes", "3", "--out", str(out)])
        script.main()
        found += json.loads(out.read_text())["rows"]
    plain, tenfold = found
    assert plain["discounted_return"] > 0
    ratio = tenfold["discounted_return"] / plain["discounted_return"]
    assert ratio == pytest.approx(10, rel=0.1)  # the policies are one update apart
    assert tenfold["return"] == pytest.approx(plain["return"], rel=0.1)


def test_an_agent_without_a_critic(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, "bc", {})
    monkeypatch.setattr("sys.argv", ["x", str(run), "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit):
        script.main()
    assert "bc has no critic of (s, a) to ask" in capsys.readouterr().err
