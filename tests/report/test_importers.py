"""Logs of other programs, written here as those programs write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from rlctl.errors import UsageError
from rlctl.report import analysis, grid, importers, page, runs

CLEANRL, EACH = "runs/Hopper-v4__ppo_continuous_action__3__1700000000", "steps of each environment"
ARGS = """!!python/object/apply:collections.OrderedDict
- - - algo
    - ppo
  - - env
    - Hopper-v4
  - - seed
    - 17
"""


def zoo_run(root: Path, number: int, args: str | None = ARGS) -> Path:
    folder = root / "ppo" / f"Hopper-v4_{number}"
    (folder / "Hopper-v4").mkdir(parents=True)
    if args is not None:
        (folder / "Hopper-v4" / "args.yml").write_text(args)
        config = "!!python/object/apply:collections.OrderedDict\n- - - gamma\n    - 0.99\n"
        (folder / "Hopper-v4" / "config.yml").write_text(config)
    return folder


def test_zoo_evaluations(tmp_path: Path) -> None:
    folder = zoo_run(tmp_path, 1)
    results = np.array([[1.0, 3.0], [20.0, 40.0], [10.0, 12.0]])
    np.savez(folder / "evaluations.npz", timesteps=[100, 200, 300], results=results, ep_lengths=results.astype(int))
    (folder / "0.monitor.csv").write_text('#{"t_start": 1.0, "env_id": "Hopper-v4"}\nr,l,t\n1.0,10,5.0\n2.0,10,61.5\n')
    (found,) = runs.load([tmp_path])
    assert (found.algo, found.task.name, found.seed, found.origin) == ("ppo", "Hopper-v4", 17, "SB3 Zoo")
    assert found.score == 11
    assert [c.tolist() for c in found.curve] == [[100, 200, 300], [2, 30, 11]]
    assert found.selection == (30, 6)
    assert found.settings == {"gamma": 0.99}
    assert found.seconds == {"total": 61.5}
    assert "last evaluation" in found.protocol


def test_zoo_monitor_files_of_two_environments(tmp_path: Path) -> None:
    folder = zoo_run(tmp_path, 4, args=None)
    (folder / "0.monitor.csv").write_text("#{}\nr,l,t\n1.0,10,1.0\n3.0,10,3.0\n")
    (folder / "1.monitor.csv").write_text("#{}\nr,l,t\n2.0,5,2.0\n4.0,5\n")  # the last line broke off
    (found,) = runs.load([tmp_path])
    assert found.episodes == (1, 2, 3)  # by time
    assert found.curve[0].tolist() == [10, 15, 25]
    assert (found.algo, found.task.name, found.seed, found.steps) == ("ppo", "Hopper-v4", 4, 25)
    assert "training episodes" in found.protocol


def test_a_yaml_tag_executes_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = zoo_run(tmp_path, 1, args=f"!!python/object/apply:os.system ['touch {mark}']\n")
    np.savez(folder / "evaluations.npz", timesteps=[1], results=[[1.0]], ep_lengths=[[1]])
    assert runs.load([tmp_path])[0].algo == "ppo"
    assert not mark.exists()


def test_a_broken_npz_is_listed(tmp_path: Path) -> None:
    (zoo_run(tmp_path, 1) / "evaluations.npz").write_bytes(b"PK nonsense")
    (found,) = runs.load([tmp_path])
    assert found.status == "unreadable"
    g = grid.build([found])
    assert "evaluations.npz" in page.render(analysis.analyze(g, replicates=300), "x")


@pytest.mark.parametrize(
    ("folder", "tag", "origin", "algo", "task", "seed", "unit"),
    [
        (CLEANRL, "charts/episodic_return", "CleanRL", "ppo", "Hopper-v4", 3, "environment steps"),
        ("logs/rsl_rl/ant/2025-01-01_10-00-00", "Train/mean_reward", "rsl_rl", "rsl_rl", "ant", None, "iterations"),
        ("runs/torch/Ant/ppo_s2", "Reward / Total reward (mean)", "skrl", "torch", "Ant", 2, EACH),
        ("tb/SAC/Hopper-v5/SAC_2", "rollout/ep_rew_mean", "SB3", "SAC", "Hopper-v5", 2, "environment steps"),
    ],
)  # fmt: skip
def test_tensorboard(
    tmp_path: Path, folder: str, tag: str, origin: str, algo: str, task: str, seed: int | None, unit: str
) -> None:
    writer = SummaryWriter(str(tmp_path / folder))
    if origin == "CleanRL":
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n|seed|3|\n|env_id|Hopper-v4|\n|gamma|0.99|")
    for step in range(0, 1001, 10):
        writer.add_scalar(tag, float(step), step)
        writer.add_scalar("losses/other", -1.0, step)
    writer.close()
    (found,) = runs.load([tmp_path])
    assert (found.origin, found.algo, found.task.name, found.seed) == (origin, algo, task, seed)
    assert found.task.unit == unit
    assert found.steps == 1000
    assert found.score == pytest.approx(950)  # steps 900 to 1000
    assert len(found.curve[0]) <= importers.POINTS
    assert found.curve[1][-1] == pytest.approx(found.curve[0][-1], abs=10)
    if origin == "CleanRL":
        assert found.settings["gamma"] == "0.99"


def test_events_without_a_return_are_no_run(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 1.0, 1)
    writer.close()
    with pytest.raises(UsageError, match="no run in"):
        runs.load([tmp_path])


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text(
        "family,algo,task,seed,step,return\n"
        "D4RL,cql,hopper-medium-v2,0,10,100\nD4RL,cql,hopper-medium-v2,0,20,300\nD4RL,cql,hopper-medium-v2,0,20,500\n"
        "D4RL,cql,hopper-medium-v2,1,20,nan\n"
    )
    first, second = runs.load([file])
    assert (first.score, first.task.family, first.task.unit) == (400, "D4RL", "updates")
    assert first.curve[1].tolist() == [100, 400]
    assert (second.status, second.score) == ("failed", None)
    file.write_text("algo,seed\nx,0\n")
    with pytest.raises(UsageError, match="lacks the columns task, step, return"):
        runs.load([file])
    for row in ("x,T,zero,1,2", "x,T,0,nan,2"):
        file.write_text(f"algo,task,seed,step,return\n{row}\n")
        with pytest.raises(UsageError, match="line 2"):
            runs.load([file])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="not a directory or a CSV file"):
        runs.load([tmp_path / "notes.txt"])


@pytest.mark.parametrize("content", [b"", b"not a record of TensorBoard at all"])
def test_events_without_an_event_are_listed(tmp_path: Path, content: bytes) -> None:
    """A run that died at once is not left out of the count of runs."""
    (tmp_path / "PPO_1").mkdir()
    (tmp_path / "PPO_1" / "events.out.tfevents.1.host").write_bytes(content)
    (record,) = runs.load([tmp_path])
    assert record.status == "unreadable"
    assert "events.out.tfevents.1.host, or what lies beside it, cannot be read: ValueError: no event" in record.note


TORN = ["npz cut off", "npz of other arrays", "args.yml", "monitor.csv", "scores.csv", "events"]


@pytest.mark.parametrize("what", TORN)
def test_one_torn_file_costs_one_run(tmp_path: Path, what: str) -> None:
    """The rest of the report stands, and the page says which file it does without."""
    good = zoo_run(tmp_path, 1)
    np.savez(good / "evaluations.npz", timesteps=[1, 2], results=[[1.0], [2.0]], ep_lengths=[[1], [1]])
    bad = zoo_run(tmp_path, 2)
    paths = [tmp_path]
    latin = b"r,l,t\n1.0,10,1.0\n" + b"\xe9,\xff,1\n"
    if what == "npz cut off":
        whole = (good / "evaluations.npz").read_bytes()
        (bad / "evaluations.npz").write_bytes(whole[: len(whole) // 2])
    elif what == "npz of other arrays":
        np.savez(bad / "evaluations.npz", obs_rms=np.zeros(3))
    elif what == "args.yml":
        (bad / "evaluations.npz").write_bytes((good / "evaluations.npz").read_bytes())
        (bad / "Hopper-v4" / "args.yml").write_text("- - - algo\n    - {ppo\n")
    elif what == "monitor.csv":
        (bad / "0.monitor.csv").write_bytes(latin)
    elif what == "events":
        (bad / "events.out.tfevents.1.host").write_bytes(b"\x18\x00\x00\x00\x00\x00\x00\x00torn")
        writer = SummaryWriter(str(bad))
        writer.add_scalar("charts/episodic_return", 3.0, 1)
        writer.close()
        (bad / "Hopper-v4" / "args.yml").write_text("")
    else:
        paths.append(tmp_path / "scores.csv")
        paths[-1].write_bytes(b"algo,task,seed,step,return\ncaf\xe9,T,0,1,2\n")
    first, *others = runs.load(paths)
    assert first.score == 2
    lost = [r for r in others if r.status == "unreadable"]
    if what == "events":  # TensorBoard itself skips what it cannot read
        assert not lost
        return
    (record,) = lost
    assert "cannot be read" in record.note
    assert record.note in page.render(analysis.analyze(grid.build([first, record]), replicates=300), "x").replace(
        "&#39;", "'"
    ).replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", '"').replace("&amp;", "&")


@pytest.mark.parametrize("what", ["npz", "monitor", "csv", "events"])
def test_a_score_that_is_no_number_is_a_failed_run(tmp_path: Path, what: str) -> None:
    folder = zoo_run(tmp_path, 1)
    given = folder
    if what == "npz":
        results = [[1.0, 3.0], [5.0, np.nan]]
        np.savez(folder / "evaluations.npz", timesteps=[1, 2], results=results, ep_lengths=[[1, 1]] * 2)
    elif what == "monitor":
        (folder / "0.monitor.csv").write_text("#{}\nr,l,t\n1.0,10,1.0\nnan,10,2.0\n3.0,nan,3.0\n")
    elif what == "csv":
        given = tmp_path / "scores.csv"
        given.write_text("algo,task,seed,step,return\nx,T,0,1,2\nx,T,0,2,inf\n")
    else:
        writer = SummaryWriter(str(folder))
        for step in range(20):
            writer.add_scalar("charts/episodic_return", 1.0 if step < 19 else float("nan"), step)
        writer.close()
    (found,) = runs.load([given])
    assert (found.status, found.score) == ("failed", None)
    assert "not finite" in found.note
    assert np.isfinite(found.curve[1]).all()
    page.render(analysis.analyze(grid.build([found]), replicates=300), "x")


def test_a_csv_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_bytes(b"\xef\xbb\xbfalgo,task,seed,step,return\r\nx,T,0,1,2\r\n")
    (found,) = runs.load([file])
    assert (found.algo, found.score) == ("x", 2)


def test_imported_columns_are_marked_and_not_compared(tmp_path: Path) -> None:
    rows = [f"ppo,Hopper-v4,{seed},1,{1000 + seed}" for seed in range(5)]
    (tmp_path / "s.csv").write_text("algo,task,seed,step,return\n" + "\n".join(rows) + "\n")
    for n in range(5):
        folder = zoo_run(tmp_path, n, args=None)
        np.savez(folder / "evaluations.npz", timesteps=[1], results=[[10.0 + n]], ep_lengths=[[1]])
    g = grid.build(runs.load([tmp_path, tmp_path / "s.csv"]))
    assert [c.name for c in g.columns] == ["ppo (CSV)", "ppo (SB3 Zoo)"]
    a = analysis.analyze(g, replicates=300)
    assert [p.verdict for p in a.families[0].pairs] == ["protocols differ"]
    assert a.claims == []
    assert any(w.startswith("Imported, under protocols of their own") for w in g.warnings)
    assert "protocols differ" in page.render(a, "x")
