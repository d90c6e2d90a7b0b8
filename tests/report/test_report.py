"""From run directories to statements: what is counted, what is shown, what is not said."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlctl.data.reference import normalized_score
from rlctl.errors import UsageError
from rlctl.report import analysis, charts, grid, page, runs, stats, svg, tables, text
from rlctl.report.charts import Dots, Line, Panel
from rlctl.report.runs import RunRecord, Task
from rlctl.report.scale import scale_of

Write = Callable[..., Path]
DIVERGED = "Diverged: losses/value became non-finite at env step 500,000, update 10"


def analyzed(root: Path, **how: Any) -> analysis.Analysis:
    return analysis.analyze(grid.build(runs.load([root]), **how), replicates=300)


def full_grid(write: Write, seeds: int, algos: dict[str, float], envs: tuple[str, ...] = ("Hopper-v5",)) -> None:
    for algo, level in algos.items():
        for env in envs:
            for seed in range(seeds):
                write(algo, env, seed, level + 37.0 * seed)


# -------------------------------------------------------------------------------------------------------------- loading
def test_a_run_is_read_as_it_was_written(write_run: Write, tmp_path: Path) -> None:
    folder = write_run("ppo", "Hopper-v5", 3, 2000.0)
    (found,) = runs.load([tmp_path / "runs"])
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    final = [r["return"] for r in rows if r["final"]]
    assert found.score == pytest.approx(np.mean(final))
    assert len(found.episodes) == 20
    assert (found.algo, found.task, found.seed, found.status) == (
        "ppo",
        Task("online", "Hopper-v5", "Hopper-v5"),
        3,
        "done",
    )
    assert found.curve[0].tolist() == [250_000, 500_000, 750_000, 1_000_000]
    first = [r["return"] for r in rows if r["env_steps"] == 250_000]
    assert found.curve[1][0] == pytest.approx(np.mean(first))
    assert found.settings["lr"] == 3e-4
    assert found.config == json.loads((folder / "run.json").read_text())["config_key"]
    assert found.seconds["collect"] == pytest.approx(50)
    assert runs.load([folder])[0].score == found.score  # given directly


def test_the_command_is_what_made_the_run(write_run: Write, tmp_path: Path) -> None:
    folder = write_run("ppo", "Hopper-v5", 0, 2000.0)
    record = json.loads((folder / "run.json").read_text())
    (first,) = record["sessions"]
    first["command"] = ["rlctl", "train", "--algo", "ppo", "--steps", "1000"]
    resumed = first | {"command": ["rlctl", "resume", "x"]}
    longer = first | {"command": ["rlctl", "resume", "x", "--steps=5000"]}
    (folder / "run.json").write_text(json.dumps(record | {"sessions": [first, resumed, longer]}))
    (found,) = runs.load([tmp_path / "runs"])
    assert " ".join(found.command) == "rlctl train --algo ppo --steps 1000 && rlctl resume x --steps=5000"


def test_arithmetic_of_its_own_is_a_setting(write_run: Write, tmp_path: Path) -> None:
    for seed, run in enumerate(({"precision": "bf16", "keep": 3}, {"precision": "float32", "compile": False})):
        folder = write_run("ppo", "Hopper-v5", seed, 2000.0)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"run": run}))
    assert [c.name for c in grid.build(runs.load([tmp_path])).columns] == ["ppo", "ppo run.precision=bf16"]


@pytest.mark.parametrize(
    ("more", "status", "counts", "note"),
    [
        ({"status": "failed", "error": "RuntimeError: no more memory", "made": 0.5}, "failed", False, "no more memory"),
        ({"status": "failed", "error": DIVERGED, "made": 0.5}, "diverged", True, "non-finite"),
        ({"status": "failed", "error": DIVERGED, "made": 0.0}, "diverged", False, "never evaluated"),
        ({"status": "running", "made": 0.5}, "unfinished", False, "running, or killed"),
        ({"status": "preempted", "made": 0.5}, "unfinished", False, "rlctl resume"),
    ],
)
def test_states(write_run: Write, tmp_path: Path, more: dict[str, Any], status: str, counts: bool, note: str) -> None:
    write_run("ppo", "Hopper-v5", 0, 1000.0)
    write_run("ppo", "Hopper-v5", 1, 1000.0, **more)
    g = grid.build(runs.load([tmp_path]))
    ((_, trouble),) = g.troubles
    assert trouble.status == status
    assert note in trouble.note
    assert (trouble.score is not None) == counts
    assert len(g.cells["ppo", g.tasks[0]]) == 1 + counts
    shown = page.render(analysis.analyze(g, replicates=300), "x")
    assert status in shown
    assert note in shown


def test_what_a_killed_run_leaves_is_no_obstacle(write_run: Write, tmp_path: Path) -> None:
    folder = write_run("ppo", "Hopper-v5", 0, 1000.0, status="running", made=0.5)
    file = folder / "eval.jsonl"
    file.write_text(file.read_text() + '{"env_steps": 75')
    assert runs.read_run(folder).note.count("damaged") == 0
    file.write_text("\x00\x00\n" + file.read_text())
    assert "1 damaged" in runs.read_run(folder).note
    (folder / "run.json").write_text('{"schema"')
    assert runs.read_run(folder).status == "unreadable"
    (folder / "run.json").unlink()
    (folder / "console.log").touch()
    (early,) = runs.load([tmp_path])
    assert (early.status, early.algo, early.seed) == ("unfinished", "ppo", 0)
    other = write_run("ppo", "Hopper-v5", 1, 1000.0)
    (other / "eval.jsonl").write_text('{"env_steps": 1, "return": NaN, "deterministic": true, "final": true}\n')
    assert runs.read_run(other).status == "failed"


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        runs.load([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="no run in"):
        runs.load([tmp_path])


# ----------------------------------------------------------------------------------------------------------------- grid
def test_settings_make_columns_where_a_task_has_several(write_run: Write, tmp_path: Path) -> None:
    for seed in range(2):
        write_run("ppo", "Hopper-v5", seed, 1000.0)
        write_run("ppo", "Hopper-v5", seed, 1500.0, settings={"lr": 1e-3}, name=f"fast-s{seed}")
        write_run("sac", "Hopper-v5", seed, 1500.0, settings={"hidden": [256]})
        write_run("sac", "Ant-v5", seed, 1500.0, settings={"hidden": [512]})  # tuned per task: still one column
    g = grid.build(runs.load([tmp_path]))
    assert [c.name for c in g.columns] == ["ppo lr=0.0003", "ppo lr=0.001", "sac"]
    assert all(len(cell) == 2 for cell in g.cells.values())
    assert not any("mixes" in w for w in g.warnings)
    mixed = grid.build(runs.load([tmp_path]), by="algo")
    assert [c.name for c in mixed.columns] == ["ppo", "sac"]
    assert any(status == "done" and "not counted" in r.note for _, r in mixed.troubles for status in [r.status])


def test_mixtures_are_warned_of(write_run: Write, tmp_path: Path) -> None:
    a = write_run("ppo", "Hopper-v5", 0, 1000.0)
    b = write_run("ppo", "Hopper-v5", 1, 1000.0, settings={"lr": 1e-3}, steps=400_000)
    other = json.loads((b / "run.json").read_text()) | {"engine": "cpu"}
    (b / "run.json").write_text(json.dumps(other))
    write_run("sac", "Hopper-v5", 0, 1000.0, steps=200_000)
    record = json.loads((a / "run.json").read_text())
    record["sessions"][0]["git"] = {"commit": "f" * 40, "dirty": "abc"}
    record["sessions"][0]["versions"]["mujoco"] = "2.3.7"
    record["physics"] = "native"
    record["engine"] = "warp"
    (a / "run.json").write_text(json.dumps(record))
    warnings = "\n".join(grid.build(runs.load([tmp_path]), by="algo").warnings)
    for expected in (
        "ppo on Hopper-v5 mixes 2 configs",
        "ppo on Hopper-v5 mixes budgets from 400,000 to 1,000,000",
        "ppo on Hopper-v5 mixes physics: native, published",
        "ppo on Hopper-v5 mixes engines: cpu, warp",
        "ppo mixes runs of 2 states of the code",
        "ffffffffff + changes abc",
        "ppo mixes versions of mujoco: 2.3.7",
        "Budgets differ on Hopper-v5 (environment steps): sac: 200,000, ppo: 1,000,000",
        "rest on as few as 20 episodes",
        "Fewer than 3 seeds in 2 of 2 cells",
    ):
        assert expected in warnings


def test_missing_cells_are_listed(write_run: Write, tmp_path: Path) -> None:
    full_grid(write_run, 3, {"ppo": 1000.0}, ("Hopper-v5", "Ant-v5"))
    for seed in (0, 2):
        write_run("sac", "Hopper-v5", seed, 900.0)
    write_run("td3", "Hopper-v5", 0, 900.0)
    write_run("td3", "Ant-v5", 1, 900.0)
    found = {(c, r.task.name, r.seed): r.note for c, r in grid.build(runs.load([tmp_path])).troubles}
    assert found == {
        ("sac", "Ant-v5", None): "no run of this algorithm on this task",
        ("td3", "Ant-v5", 0): "no run of seed 0, which other tasks have",
        ("td3", "Hopper-v5", 1): "no run of seed 1, which other tasks have",
    }


def test_a_suite_names_its_columns_and_misses_its_cells(write_run: Write, tmp_path: Path) -> None:
    """`bench.json` is the contract with `rlctl bench`: cells with their folder, column, source and seed."""
    write_run("sac", "Hopper-v5", 0, 1000.0)
    write_run("sac", "Hopper-v5", 0, 1500.0, settings={"lr": 1e-3}, name="fast-s0")
    sources = [
        ("sac/Hopper-v5/s0", "sac", 0),
        ("sac/Hopper-v5/fast-s0", "sac-fast", 0),
        ("x/s1", "sac-fast", 1),
        ("x/s2", "sac", 2),
    ]
    cells = [
        {"id": id, "algo": "sac", "column": column, "source": "Hopper", "env": "Hopper-v5", "data": None}
        | {"seed": seed, "steps": 1000, "config_key": ""}
        for id, column, seed in sources
    ]
    root = tmp_path / "runs"
    write_run("ppo", "Ant-v5", 0, 1000.0)
    plan = {"suite": "mine", "description": "What it is for.", "command": ["rlctl", "bench", "mine"], "cells": cells}
    (root / "bench.json").write_text(json.dumps(plan))
    lost = {"time": 1.0, "event": "lost", "cell": "x/s2", "error": "the worker was killed"}
    (root / "ledger.jsonl").write_text(json.dumps(lost) + "\n{torn")
    g = grid.build(runs.load([root]))
    assert [c.name for c in g.columns] == ["ppo", "sac", "sac-fast"]
    assert {t.name for t in g.tasks} == {"Hopper-v5", "Ant-v5"}
    assert [(c, r.status, r.seed, r.note) for c, r in g.troubles] == [
        ("ppo", "missing", None, "no run of this algorithm on this task"),  # no suite planned this one
        ("sac", "missing", 2, "lost: the worker was killed"),
        ("sac-fast", "missing", 1, "planned by the suite 'mine', not started"),
    ]
    shown = page.render(analysis.analyze(g, replicates=300), "x")
    assert "3 runs, 3 finished" in shown
    assert "Suite mine: What it is for." in shown
    (root / "bench.json").write_text("{")
    assert [r.status for r in runs.load([root])].count("unreadable") == 1


def test_a_repeated_seed_counts_once(write_run: Write, tmp_path: Path) -> None:
    write_run("ppo", "Hopper-v5", 0, 500.0, status="failed", error="KeyError: 'x'", made=0.5)
    kept = write_run("ppo", "Hopper-v5", 0, 1000.0, name="again")
    g = grid.build(runs.load([tmp_path]))
    assert [r.where for r in g.cells["ppo", g.tasks[0]]] == [str(kept)]
    assert "KeyError: 'x'; not counted" in g.troubles[0][1].note


# ------------------------------------------------------------------------------------------------------------- families
def dataset(id: str, benchmark: str, version: int) -> dict[str, Any]:
    return {"dataset": id, "dataset_version": version, "benchmark": benchmark}


def test_d4rl_and_minari_never_share_a_table(write_run: Write, tmp_path: Path) -> None:
    for seed in range(5):
        for algo in ("iql", "td3bc"):
            d4rl, minari = dataset("hopper-medium-v2", "D4RL", 2), dataset("mujoco/hopper/medium-v0", "Minari", 0)
            more = {"steps": 1000, "evaluations": 3}
            write_run(algo, "Hopper-v5", seed, 1500.0, data="hopper-medium-v2", dataset=d4rl, folder="a", **more)
            write_run(
                algo, "Hopper-v5", seed, 1400.0, data="mujoco/hopper/medium-v0", dataset=minari, folder="b", **more
            )
    a = analyzed(tmp_path)
    assert [(f.name, [t.name for t in f.tasks]) for f in a.families] == [
        ("D4RL", ["hopper-medium-v2"]),
        ("Minari", ["mujoco/hopper/medium-v0"]),
    ]
    for f in a.families:
        assert set(f.aggregates) == {"iql", "td3bc"}
        assert f.curves[f.tasks[0]][0].x[-1] == 1000  # gradient steps
        assert f.tasks[0].unit == "updates"
        cell = f.cells["iql", f.tasks[0]]
        assert cell.normalized is not None
        np.testing.assert_allclose(cell.normalized, 100 * (cell.raw + 20.272305) / (3234.3 + 20.272305))
    assert any("Not D4RL's own data: mujoco/hopper/medium-v0;" in w for w in a.grid.warnings)
    shown = page.render(a, "x")
    assert "Scores: D4RL" in shown
    assert "Scores: Minari" in shown
    md = text.markdown(a, "x")
    assert "What choosing a policy costs: D4RL" in md
    assert "no pool of cloned policies (bc)" in md
    (budget,) = [b for b in a.families[0].budgets[a.families[0].tasks[0]] if b.algo == "iql"]
    assert (budget.policies, budget.configs, len(budget.value)) == (5, 1, analysis.PULLS)
    assert "A pool of one config holds nothing but luck of the seed" in shown


def offline_to_online(folder: Path, stages: list[tuple[int, int, float]], final: float | None, **record: Any) -> None:
    """Turn a made-up run into one from a dataset to its environment: evaluations (env_steps, updates, return)."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["env"], config["agent"]["offline_updates"], config["agent"]["data_share"] = "Hopper-v5", 300, 0.5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = json.loads((folder / "run.json").read_text()) | {"env": "Hopper-v5"} | record
    (folder / "run.json").write_text(json.dumps(run))
    rows = [(s, u, r + d, False) for s, u, r in stages for d in (-1.0, 1.0)]
    rows += [] if final is None else [(*stages[-1][:2], final, True)]
    lines = [
        json.dumps({"env_steps": s, "updates": u, "return": r, "deterministic": True, "final": end})
        for s, u, r, end in rows
    ]
    (folder / "eval.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"env_steps": stages[-1][0], "updates": stages[-1][1]}) + "\n")


def test_from_data_to_its_environment(write_run: Write, tmp_path: Path) -> None:
    """The curve begins at the score of the whole offline part; a run that ended in it stays in its column."""
    more = {"data": "hopper-medium-v2", "dataset": dataset("hopper-medium-v2", "D4RL", 2), "steps": 200}
    offline = [(0, 100, 10.0), (0, 200, 500.0), (0, 300, 900.0)]
    for seed in range(3):
        folder = write_run("iql", "Hopper-v5", seed, 900.0, **more)
        offline_to_online(folder, [*offline, (100, 400, 1000.0), (200, 500, 1100.0)], 1200.0)
    folder = write_run("iql", "Hopper-v5", 3, 900.0, status="failed", error=DIVERGED, **more)
    offline_to_online(folder, offline[:2], None)
    (folder / "metrics.jsonl").unlink()
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"progress": 250}))
    folder = write_run("iql", "Hopper-v5", 4, 900.0, status="failed", error="OSError: gone", **more)
    offline_to_online(folder, offline[:1], None)
    a = analyzed(tmp_path)
    (f,) = a.families
    assert (f.name, [t.name for t in f.tasks]) == ("D4RL, then online", ["Hopper-v5 from hopper-medium-v2"])
    runs_of = a.grid.cells["iql", f.tasks[0]]
    assert [r.score for r in runs_of] == [1200, 1200, 1200, 500]
    assert [r.steps for r in runs_of] == [200, 200, 200, 0]
    assert [c.tolist() for c in runs_of[0].curve] == [[0, 100, 200], [900, 1000, 1100]]
    (band,) = f.curves[f.tasks[0]]
    assert (band.x[0], band.y[0]) == (0, (3 * 900 + 500) / 4)
    assert band.y[-1] == (3 * 1100 + 500) / 4
    assert "Went on online: Hopper-v5 from hopper-medium-v2;" in "".join(a.grid.warnings)
    assert f.budgets == {}  # there is an environment to learn in, so nothing to be chosen by playing
    assert any("offline_updates 300, data_share 0.5" in line for line in tables.setting_lines(a))
    assert [r.status for _, r in a.grid.troubles] == ["diverged", "failed"]


def test_an_online_agent_with_data_stands_beside_those_without(write_run: Write, tmp_path: Path) -> None:
    """The task is the same; what one of them was given besides is part of its name."""
    data = "mine/hopper-v0"
    more = {"data": data, "dataset": dataset(data, "Minari", 0), "steps": 200, "settings": {"learning_starts": 50}}
    for seed in range(3):
        write_run("sac", "Hopper-v5", seed, 500.0, steps=200)
        folder = write_run("expo", "Hopper-v5", seed, 900.0, **more)
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"env": "Hopper-v5"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        run = json.loads((folder / "run.json").read_text()) | {"env": "Hopper-v5", "data": data}
        (folder / "run.json").write_text(json.dumps(run))
        rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
        moved = [json.dumps(row | {"env_steps": row["updates"]}) for row in rows]
        (folder / "eval.jsonl").write_text("\n".join(moved) + "\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"env_steps": 200, "updates": 150}) + "\n")
    a = analyzed(tmp_path)
    (f,) = a.families
    assert (f.name, [t.name for t in f.tasks]) == ("online", ["Hopper-v5"])
    assert {c for c, _ in a.grid.cells} == {"sac", f"expo with {data}"}
    assert max(f.curves[f.tasks[0]], key=lambda band: band.y[-1]).x[-1] == 200  # environment steps, not updates


def test_cells_nobody_started_of_a_suite_with_data_besides(write_run: Write, tmp_path: Path) -> None:
    cells = [
        {"id": f"{algo}/0", "algo": algo, "column": algo, "source": "mine/x-v0", "env": "Hopper-v5", "seed": 0}
        | {"data": "mine/x-v0", "steps": 100, "offline_updates": 0}
        for algo in ("expo", "iql")
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"suite": "mine", "cells": cells}))
    (tmp_path / "s.csv").write_text("algo,task,seed,step,return\nx,T,0,1,2\n")
    lost = [(r.label, r.task.family) for r in runs.load([tmp_path, tmp_path / "s.csv"]) if r.status == "missing"]
    assert lost == [("expo with mine/x-v0", "online"), ("iql", "own data")]


def test_cells_nobody_started_stand_in_the_family_they_were_planned_for(tmp_path: Path) -> None:
    """As far as it is known: whose data it is, a plan does not say."""
    name = "mujoco/hopper/medium-v0"
    cells = [
        {"id": f"iql/{k}", "algo": "iql", "column": "iql", "source": name, "env": "Hopper-v5", "seed": k}
        | {"data": name, "steps": 100, "offline_updates": updates}
        for k, updates in enumerate((0, 300))
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"suite": "mine", "cells": cells}))
    (tmp_path / "s.csv").write_text("algo,task,seed,step,return\nx,T,0,1,2\n")
    lost = [r.task for r in runs.load([tmp_path, tmp_path / "s.csv"]) if r.status == "missing"]
    assert [(t.family, t.name) for t in lost] == [
        ("own data", name),
        ("own data, then online", f"Hopper-v5 from {name}"),
    ]


def test_few_policies_are_nothing_to_choose_from(write_run: Write, tmp_path: Path) -> None:
    for algo, seeds in (("bc", 3), ("iql", 2)):
        for seed in range(seeds):
            more = {"data": "hopper-medium-v2", "dataset": dataset("hopper-medium-v2", "D4RL", 2), "steps": 1000}
            write_run(algo, "Hopper-v5", seed, 1500.0 + 100 * seed, evaluations=3, **more)
    a = analyzed(tmp_path)
    (f,) = a.families
    ((found,),) = f.budgets.values()
    assert (found.algo, found.policies) == ("bc", 3)
    bandit, known = charts.budget_panels(a, f)
    assert all(line.low is None for p in (bandit, known) for line in p.lines)
    assert known.lines[0].x.tolist() == [1, 2, 3]
    assert known.lines[0].y[0] == pytest.approx(np.mean([found.value[0]]), rel=0.05)  # one draw is one draw
    assert known.lines[0].y[-1] == pytest.approx(bandit.lines[0].y[-1], rel=0.02)  # it has found the best of three
    assert (np.diff(known.lines[0].y) > 0).all()
    assert "No interval" in page.render(a, "x")
    with_csv = tables.budgets(f)
    assert with_csv is not None
    assert [e.text for e in with_csv.rows[0][:3]] == ["hopper-medium-v2", "bc", "3"]


def test_other_data_and_other_engines_are_warned_of(write_run: Write, tmp_path: Path) -> None:
    about = dataset("hopper-medium-v2", "D4RL", 2)
    for algo, seed, mark, engine in (("iql", 0, "a", "cpu"), ("iql", 1, "b", "cpu"), ("bc", 0, "a", "warp")):
        folder = write_run(algo, "Hopper-v5", seed, 1.0, data="hopper-medium-v2", dataset=about, steps=100)
        record = json.loads((folder / "run.json").read_text()) | {"engine": engine}
        record["dataset"]["sha256"] = mark * 64
        (folder / "run.json").write_text(json.dumps(record))
    warnings = grid.build(runs.load([tmp_path])).warnings
    a, b = "a" * 12, "b" * 12
    assert f"iql on hopper-medium-v2 learned from 2 different sets: {a}, {b}." in warnings
    assert f"Rows of the dataset differ on hopper-medium-v2: {a}, {b}." in warnings
    assert "Engines differ on hopper-medium-v2: cpu, warp." in warnings


def test_all_hours_are_counted(write_run: Write, tmp_path: Path) -> None:
    write_run("ppo", "Hopper-v5", 0, 1000.0)
    write_run("ppo", "Hopper-v5", 1, 1000.0, status="failed", error="OSError: gone", made=0.4)
    a = analyzed(tmp_path)
    each = 1e6 / 2e4 + 1e6 / 1.2e4 + 1e6 / 9e4
    assert a.hours == pytest.approx(1.4 * each / 3600)
    assert sum(row.hours for row in a.compute) == pytest.approx(each / 3600)
    assert "0.06 hours of wall-clock in all" in tables.compute(a).caption
    assert "0.02 in runs that do not count" in tables.compute(a).caption


def test_the_control_suite_has_the_scale_of_its_definition() -> None:
    scale = scale_of(Task("online", "dmc:hopper-stand", "dmc:hopper-stand"))
    assert scale is not None
    assert scale(np.array([0.0, 730.0])).tolist() == [0, 73]  # as a run scores itself
    assert normalized_score("dmc:hopper-stand", 730.0) == 73
    assert "not a random policy's" in scale.source
    assert scale_of(Task("online", "dmc:hopper-stand (physics=native)", "dmc:hopper-stand")) is None


# ----------------------------------------------------------------------------------------------------- what may be said
def test_one_run_claims_nothing(write_run: Write, tmp_path: Path) -> None:
    write_run("ppo", "Hopper-v5", 0, 1000.0)
    a = analyzed(tmp_path)
    assert a.claims == []
    shown = page.render(a, "x")
    assert "No claim." in shown
    assert "±" not in re.sub(r"<p class=\"caption\">.*?</p>", "", shown)
    assert 'class="band"' not in shown
    assert "Aggregates over tasks" in shown
    assert "fewer than 5 seeds: Hopper-v5 1" in shown


@pytest.mark.parametrize(
    ("seeds", "interval", "aggregate"), [(2, False, False), (3, True, False), (4, True, False), (5, True, True)]
)
def test_seeds_decide_what_is_shown(
    write_run: Write, tmp_path: Path, seeds: int, interval: bool, aggregate: bool
) -> None:
    full_grid(write_run, seeds, {"ppo": 1000.0, "sac": 3000.0})
    a = analyzed(tmp_path)
    (f,) = a.families
    cell = f.cells["ppo", f.tasks[0]]
    assert (cell.mean is not None) == interval
    assert ("±" in tables.results(a, f).rows[0][1].text) == interval
    assert (f.curves[f.tasks[0]][0].low is not None) == interval
    assert bool(f.aggregates) == bool(f.pairs) == bool(f.profiles) == aggregate
    assert bool(a.claims) == aggregate
    assert any("ewer than 5 seeds" in w for w in a.grid.warnings) != aggregate
    for content in (page.render(a, "x"), text.markdown(a, "x")):
        assert ("scores higher than" in content) == aggregate
        assert ("No claim" in content) != aggregate


def test_known_values(tmp_path: Path) -> None:
    """A table worked out by hand: three seeds each, two tasks on a given scale."""
    file = tmp_path / "scores.csv"
    scores = {("a", "T1"): [10, 20, 30, 40, 50], ("a", "T2"): [100, 100, 100, 100, 100]}
    scores |= {("b", "T1"): [60, 70, 80, 90, 100], ("b", "T2"): [100, 100, 100, 100, 100]}
    rows = [f"{algo},{task},{seed},1000,{s}" for (algo, task), each in scores.items() for seed, s in enumerate(each)]
    file.write_text("algo,task,seed,step,return\n" + "\n".join(rows) + "\n")
    given = {"T1": (0.0, 100.0), "T2": (0.0, 200.0)}
    g = grid.build(runs.load([file]))
    a = analysis.analyze(g, given=given, replicates=2000)
    (f,) = a.families
    assert [e.text for e in tables.results(a, f).rows[0]] == ["T1", "30.0 ± 19.6", "80.0 ± 19.6"]  # 2.776 * 15.81 / √5
    found = {m: i.value for m, i in f.aggregates["a (CSV)"].items()}
    assert found["mean"] == pytest.approx((30 + 50) / 2)
    assert found["median"] == pytest.approx(40)
    assert found["IQM"] == pytest.approx((30 + 40 + 50 + 50 + 50 + 50) / 6)  # 10 values, 2 cut at either end
    assert found["optimality gap"] == pytest.approx(100 - 40)
    (pair,) = f.pairs
    assert pair.probability.value == pytest.approx((0 + 0.5) / 2)  # always worse on T1, ties on T2
    matrix = tables.improvement(a, f)
    assert matrix is not None
    assert [row[3 - i].text for i, row in enumerate(matrix.rows, 1)] == ["0.25", "0.75"]
    data = json.loads(text.as_json(a))
    assert data["families"][0]["pairs"][0]["verdict"] == "worse"
    assert data["families"][0]["aggregates"]["b (CSV)"]["mean"]["value"] == pytest.approx((80 + 50) / 2)


def test_a_pair_needs_both_tests_and_one_protocol() -> None:
    better = analysis.Pair("a", "b", [], stats.Interval(0.9, 0.7, 1.0), 0.01, 1.0, True)
    assert better.verdict == "better"
    assert better._replace(p=0.06).verdict == "not separated"
    assert better._replace(probability=stats.Interval(0.7, 0.45, 0.9)).verdict == "not separated"
    assert better._replace(comparable=False).verdict == "protocols differ"
    assert better._replace(unequal="budgets and physics").verdict == "budgets and physics differ"
    worse = stats.Interval(0.1, 0.0, 0.3)
    assert better._replace(probability=worse, difference=-1.0).verdict == "worse"
    assert better._replace(probability=worse).verdict == "not separated"


def test_winning_most_draws_is_not_better_where_the_mean_says_otherwise() -> None:
    """A beats three of four runs of B by a little, and the fourth outdoes all of A by far."""
    g = np.random.default_rng(0)
    a, b = 10 + 0.1 * g.normal(size=20), np.concatenate([9 + 0.1 * g.normal(size=15), 1000 + g.normal(size=5)])
    probability, p, difference = analysis.compare([a], [b], g)
    assert probability.low > 0.5 and p < 0.05 and difference < 0
    assert analysis.separated(probability, p, difference) == 0


def test_a_claim_over_several_tasks_is_none_about_each(tmp_path: Path) -> None:
    """One side wins on three tasks and loses on the fourth: together it is better, and the sentence says where not."""
    g = np.random.default_rng(0)
    file, rows = tmp_path / "scores.csv", []
    for k, task in enumerate(("T1", "T2", "T3", "T4")):
        for algo in ("low", "high"):
            level = 10.0 if (algo == "high") == (k < 3) else 0.0
            rows += [f"{algo},{task},{seed},1000,{level + g.normal()}" for seed in range(10)]
    file.write_text("algo,task,seed,step,return\n" + "\n".join(rows) + "\n")
    (claim,) = analysis.analyze(grid.build(runs.load([file])), replicates=200).claims
    assert claim.startswith("high (CSV) scores higher than low (CSV) over T1, T2, T3, T4 taken together: probability")
    assert claim.endswith(" On T4 its mean return is lower.")


def test_a_column_that_only_failed_keeps_its_place(write_run: Write, tmp_path: Path) -> None:
    for seed in range(3):
        write_run("ppo", "Hopper-v5", seed, 1000.0)
        write_run("sac", "Hopper-v5", seed, 1000.0, status="failed", error="OSError: gone", made=0.5)
    write_run("ppo", "Hopper-v5", 0, 1000.0, status="failed", error="OSError: gone", name="first-try")
    write_run("ppo", "Hopper-v5", 3, 1000.0, status="running", made=0.5)
    a = analyzed(tmp_path)
    results = tables.results(a, a.families[0])
    assert [e.text for e in results.header] == ["task", "ppo", "sac"]
    _, ppo, sac = results.rows[0]
    assert ppo.small.endswith("3 seeds, 1 unfinished")  # a seed that has a score is not lost, whatever went before
    assert (sac.text, sac.small) == ("–", "3 failed")


def test_a_plan_not_begun_is_listed_by_cell_and_budgets_stand_at_the_columns(write_run: Write, tmp_path: Path) -> None:
    ids = [str(write_run("ppo", "Hopper-v5", 0, 1000.0).relative_to(tmp_path / "runs"))]
    ids += [str(write_run("sac", "Hopper-v5", 0, 1000.0, steps=100_000).relative_to(tmp_path / "runs"))]
    more = {"source": "Hopper-v5", "env": "Hopper-v5", "data": None, "steps": 100_000, "offline_updates": 0}
    cells = [{"id": id, "algo": id[:3], "column": id[:3], "seed": 0} | more for id in ids]
    cells += [{"id": f"sac/Hopper-v5/s{k}", "algo": "sac", "column": "sac", "seed": k} | more for k in (1, 2, 4)]
    plan = {"suite": "x", "command": ["rlctl", "bench", "x.yaml"], "cells": cells}
    (tmp_path / "runs" / "bench.json").write_text(json.dumps(plan))
    for id, command in zip(ids, (["worker.py"], ["rlctl", "bench", "other.yaml"]), strict=True):
        file = tmp_path / "runs" / id / "run.json"
        record = json.loads(file.read_text())
        record["sessions"][0]["command"] = command
        file.write_text(json.dumps(record))
    a = analyzed(tmp_path)
    results = tables.results(a, a.families[0])
    assert [e.text for e in results.header] == ["task", "ppo", "sac"]
    assert [e.small.splitlines()[-1] for e in results.rows[0][1:]] == ["1 seed", "1 seed, 3 missing"]
    (row,) = tables.troubles(a).rows
    assert [e.text for e in row[:4]] == ["missing", "sac", "Hopper-v5", "1–2, 4"]
    assert [e.small for e in results.header] == ["", "1,000,000 steps", "100,000 steps"]
    commands = {row[0].text: row[-1].text for row in tables.commands(a).rows}
    assert commands == {"ppo": "rlctl bench x.yaml", "sac": "rlctl bench other.yaml"}


def test_what_is_true_of_several_tasks_is_said_once(write_run: Write, tmp_path: Path) -> None:
    for task in ("Hopper-v5", "Walker2d-v5"):
        write_run("ppo", task, 0, 1000.0)
        write_run("sac", task, 0, 1000.0, steps=100_000)
    warnings = analyzed(tmp_path).grid.warnings
    assert "Scores on Hopper-v5, Walker2d-v5 rest on as few as 20 episodes; 100 are the rule." in warnings
    both = "Budgets differ on Hopper-v5, Walker2d-v5 (environment steps): sac: 100,000, ppo: 1,000,000."
    assert [w for w in warnings if w.startswith("Budgets")] == [both]


def test_a_shorter_budget_cuts_no_other_columns_curve(write_run: Write, tmp_path: Path) -> None:
    for seed in range(5):
        write_run("ppo", "Hopper-v5", seed, 1000.0 + seed)
        write_run("sac", "Hopper-v5", seed, 1000.0 + seed, steps=100_000)
    (f,) = analyzed(tmp_path).families
    assert {b.column: b.x[-1] for b in f.efficiency} == {"ppo": 1_000_000, "sac": 100_000}


def test_a_much_shorter_budget_is_drawn_once_more() -> None:
    task, x = Task("online", "T"), np.array([10.0, 30.0, 50.0])
    curves = {"long": (2 * x, x), "short": (x / 10, 4 * x), "late": (10 * x, x)}
    records = [RunRecord(c, c, task, 0, "done", episodes=(1.0,), curve=y) for c, y in curves.items()]
    g = grid.build(records)
    (whole, start), legend = charts.plain_curves(g, analysis.curves(g))
    assert (whole.title, start.title) == ("T", "T: the first 5")
    assert [line.label for line in whole.lines] == [name for name, _ in legend] == ["late", "long", "short"]
    assert [line.label for line in start.lines] == ["short"]  # the others begin later
    g = grid.build([replace(r, curve=(np.append(0.0, r.curve[0]), np.append(0.0, r.curve[1]))) for r in records])
    (_, start), _ = charts.plain_curves(g, analysis.curves(g))
    ends = {line.label: (line.x[-1], line.y[-1]) for line in start.lines}
    assert ends == {"late": (5.0, 0.5), "long": (5.0, 2.5), "short": (5.0, 200.0)}


def test_unequal_budgets_forbid_a_claim(write_run: Write, tmp_path: Path) -> None:
    for seed in range(5):
        write_run("ppo", "Hopper-v5", seed, 1000.0 + seed, steps=200_000)
        write_run("sac", "Hopper-v5", seed, 3000.0 + seed)
    a = analyzed(tmp_path)
    assert a.families[0].pairs[0].unequal == "budgets"
    assert a.families[0].pairs[0].verdict == "budgets differ"
    assert a.claims == []
    assert "Not compared, because they were given different budgets: ppo and sac." in a.cautions
    f = a.families[0]
    matrix, results, aggregates = tables.improvement(a, f), tables.results(a, f), tables.aggregates(a, f)
    assert matrix is not None
    assert aggregates is not None
    assert not any(e.strong or e.shade for row in matrix.rows + results.rows for e in row)
    assert "no evidence about the algorithms" in matrix.caption
    assert "budgets differ among ppo, sac" in aggregates.caption
    (line,) = tables.setting_lines(a)
    assert "200,000 environment steps (ppo); 1,000,000 environment steps (sac)" in line
    assert line in page.render(a, "x")
    assert line in text.markdown(a, "x")


def test_equal_algorithms_are_rarely_separated() -> None:
    """The verdict holds its level over many made-up studies of two equal algorithms on three tasks.

    And is not to be had by never separating anything: twice the spread apart, the better one is found.
    """
    g = np.random.default_rng(0)
    wrong = right = 0
    for _ in range(60):
        x, y = ([g.normal(1000 * 10.0**t, 200 * 10.0**t, size=5) for t in range(3)] for _ in range(2))
        wrong += analysis.Pair("a", "b", [], *analysis.compare(x, y, g), True).verdict != "not separated"
        higher = [s + 400 * 10.0**t for t, s in enumerate(x)]
        right += analysis.Pair("a", "b", [], *analysis.compare(higher, y, g), True).verdict == "better"
    assert wrong <= 7  # 5% of 60 are 3; more than 7 has probability 0.01
    assert right >= 55


def test_a_diverged_seed_lowers_its_column(write_run: Write, tmp_path: Path) -> None:
    for seed in range(4):
        write_run("ppo", "Hopper-v5", seed, 2000.0)
    write_run("ppo", "Hopper-v5", 4, 2000.0, status="failed", error=DIVERGED, made=0.3)
    a = analyzed(tmp_path)
    (f,) = a.families
    cell = f.cells["ppo", f.tasks[0]]
    assert len(cell.raw) == 5
    assert cell.diverged == 1
    assert cell.raw[4] < 0.8 * cell.raw[:4].mean()
    (curve,) = f.curves[f.tasks[0]]
    assert curve.x[-1] == 1_000_000  # the curve of the others is not cut short
    ends = [r.curve[1][-1] for r in a.grid.cells["ppo", f.tasks[0]]]
    assert curve.y[-1] == pytest.approx(np.mean(ends))  # the diverged one's last value carried on
    assert (curve.seeds, curve.diverged, curve.without) == (5, 1, 0)
    (efficiency,) = f.efficiency
    assert (efficiency.seeds, efficiency.diverged) == (5, 1)
    assert efficiency.y[-1] == pytest.approx(float(stats.iqm(f.scales[f.tasks[0]](np.array(ends))[:, None])))
    shown = page.render(a, "x")
    assert "5 runs, 4 finished, 1 diverged, 1 column" in shown
    assert shown.count("1 diverged run among them, each with its last value carried on to the end.") == 2
    assert "1 diverged †" in shown
    assert "1 diverged; 1 of them count" in shown


def test_aggregates_take_only_shared_tasks(write_run: Write, tmp_path: Path) -> None:
    full_grid(write_run, 5, {"ppo": 1000.0, "sac": 2000.0}, ("Hopper-v5", "Walker2d-v5"))
    full_grid(write_run, 5, {"ppo": 1000.0}, ("Ant-v5",))
    full_grid(write_run, 2, {"td3": 500.0}, ("Hopper-v5",))
    (f,) = analyzed(tmp_path).families
    assert [t.name for t in f.aggregate_tasks] == ["Hopper-v5", "Walker2d-v5"]
    assert set(f.aggregates) == {"ppo", "sac"}
    assert f.not_aggregated == {"td3": "fewer than 5 seeds: Hopper-v5 2"}
    assert f.tasks_left_out == {"Ant-v5": "not enough seeds of sac (0)"}
    assert {b.column for b in f.efficiency} == {"ppo", "sac"}


def test_curves_stand_on_a_shared_grid() -> None:
    task = Task("online", "T")
    curve = [
        (np.array([100.0, 300.0, 500.0]), np.array([1.0, 3.0, 5.0])),
        (np.array([200.0, 400.0]), np.array([4.0, 8.0])),
    ]
    records = [RunRecord(str(i), "a", task, i, "done", episodes=(1.0,), curve=c) for i, c in enumerate(curve)]
    ((band,),) = analysis.curves(grid.build(records)).values()
    assert (band.x[0], band.x[-1]) == (200, 400)
    np.testing.assert_allclose(band.y, (band.x / 100 + band.x / 50) / 2)


# ----------------------------------------------------------------------------------------------------------------- page
class Checker(HTMLParser):
    """Well-formedness, and every address a browser would fetch."""

    VOID = ("meta", "br", "link", "img", "path", "line", "circle", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(attrs)

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def test_page_is_valid_and_alone(write_run: Write, tmp_path: Path) -> None:
    full_grid(write_run, 5, {"ppo": 1000.0, "sac": 3000.0}, ("Hopper-v5", "Ant-v5"))
    write_run("<b>&", "Hopper-v5", 0, 10.0, status="failed", error='OSError: "<script>alert(1)</script>"')
    shown = page.render(analyzed(tmp_path), "A & B <report>")
    checker = Checker()
    checker.feed(shown)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert checker.addresses
    assert all(a.startswith("#") and a[1:] in checker.ids for a in checker.addresses)
    assert not checker.tags & {"script", "link", "img", "iframe"}
    assert "http" not in shown
    assert "url(" not in shown
    assert "@import" not in shown
    assert "A &amp; B &lt;report&gt;" in shown
    for needed in ("prefers-color-scheme:dark", "@media print", "width=device-width", 'role="img"', "aria-label"):
        assert needed in shown
    for section in (
        "What these runs say",
        "Protocol warnings",
        "Scores",
        "Aggregates",
        "Learning curves",
        "profiles",
        "Probability of improvement",
        "Wall-clock",
        "Failed, diverged",
        "Commands",
        "Versions",
    ):
        assert section in shown
    assert "rlctl train --algo ppo --env Hopper-v5 --seed SEED" in shown
    assert len(shown) < 150_000


def test_csv_and_json_hold_every_run(write_run: Write, tmp_path: Path) -> None:
    full_grid(write_run, 2, {"ppo": 1000.0})
    write_run("ppo", "Hopper-v5", 2, 10.0, status="failed", error="OSError: gone")
    a = analyzed(tmp_path)
    rows = list(csv.DictReader(io.StringIO(text.comma_separated(a))))
    assert [(r["algo"], r["seed"], r["status"]) for r in rows] == [
        ("ppo", "0", "done"),
        ("ppo", "1", "done"),
        ("ppo", "2", "failed"),
    ]
    assert rows[2]["return"] == ""
    first = float(rows[0]["return"])
    assert float(rows[0]["normalized_score"]) == pytest.approx(100 * (first - 18.3039) / (3234.3 - 18.3039), abs=0.01)
    data = json.loads(text.as_json(a))
    assert [r["return"] for r in data["runs"]][:2] == pytest.approx([float(r["return"]) for r in rows[:2]])
    assert data["attention"][0]["note"] == "OSError: gone"


# ------------------------------------------------------------------------------------------------------------------ svg
def test_ticks_are_round() -> None:
    assert svg.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert svg.ticks(-37, 260) == [0, 100, 200]
    assert svg.ticks(0.0031, 0.0047, 4) == pytest.approx([0.0035, 0.004, 0.0045])
    assert svg.number_labels([0, 500_000, 1_000_000]) == ["0", "0.5M", "1M"]
    assert svg.number_labels([0, 0.5, 1], percent=True) == ["0%", "50%", "100%"]
    assert svg.number_labels([-20, 0, 20]) == ["−20", "0", "20"]


@pytest.mark.parametrize(("low", "high"), [(24.0, 58.1), (41.8, 48.2), (0.0, 100.0), (-3.0, 2.0), (99.0, 99.5)])
def test_an_axis_of_dots_has_two_numbers(low: float, high: float) -> None:
    drawn = svg.dots(Dots("IQM", [("a", 0, stats.Interval((low + high) / 2, low, high))]))
    assert len(re.findall(r'text-anchor="middle">([^<]+)<', drawn)) > 1


def test_a_flat_line_and_a_single_point_can_be_drawn() -> None:
    flat = Line("a", 0, np.array([0.0, 1.0]), np.array([5.0, 5.0]))
    point = Line("b", 12, np.array([1.0]), np.array([5.0]))
    drawn = svg.sheet([Panel("t", "x", "y", [flat, point])], [("a", 0), ("b", 12)])
    assert "nan" not in drawn
    assert drawn.count("<circle") == 1
    checker = Checker()
    checker.feed(drawn)
    assert checker.open == []
