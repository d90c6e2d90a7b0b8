"""Gathering finished runs into result files, and the table made of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

SCRIPT = "learning"


@pytest.fixture(autouse=True)
def results(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(script, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


def made(folder: Path, algo: str, seed: int, key: str, agent: dict[str, Any], score: float = 10.0) -> Path:
    """A finished run on data, as far as it is read."""
    folder.mkdir(parents=True)
    final = {"return_mean": 100 * score, "normalized_score": score}
    run = {
        "algo": algo,
        "status": "done",
        "env": None,
        "eval_env": "Hopper-v5",
        "data": "ladder/hopper-medium-replay-v0",
        "seed": seed,
        "config_key": key,
        "physics": "published",
        "started": "2026-01-01T00:00:00+00:00",
        "spent_s": {"learn": 1.2},
        "final": final,
        "sessions": [
            {"git": {"commit": "c"}, "machine": {"host": "h", "cores": 2}, "versions": {}, "torch_threads": 1}
        ],
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text(yaml.safe_dump({"agent": {"steps": 50, **agent}, "run": {"threads": None}}))
    rows = [
        {"updates": u, "env_steps": 0, "return": r, "final": f, "deterministic": d}
        for u, r, f, d in [
            (25, 1.0, False, True),
            (25, 3.0, False, True),
            (25, 99.0, False, False),
            (50, 7.0, True, True),
        ]
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def held(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json")
    return dict(json.loads(file.read_text()))


def test_seeds_of_one_config_share_a_file(script: ModuleType, tmp_path: Path, results: Path) -> None:
    script.record([made(tmp_path / f"r{s}", "iql", s, "k", {"lr": 1}, 10.0 + s) for s in (1, 0)])
    file = held(results)
    assert list(file["seeds"]) == ["0", "1"]
    assert file["seeds"]["0"]["curve"] == [[25, 2.0]]  # deterministic evaluations in training alone
    assert file["agent"] == {"steps": 50, "lr": 1}
    assert "host" not in file["machine"]
    assert file["column"] == "iql"


def test_curves_of_agents_that_go_online_count_the_updates_before_as_negative(
    script: ModuleType, tmp_path: Path, results: Path
) -> None:
    run = made(tmp_path / "r", "iql", 0, "k", {"offline_updates": 20, "steps": 10})
    with (run / "eval.jsonl").open("w") as file:
        for updates, env_steps, value in [(10, 0, 1.0), (20, 0, 2.0), (25, 5, 3.0), (30, 10, 4.0)]:
            row = {"updates": updates, "env_steps": env_steps, "return": value, "final": False, "deterministic": True}
            file.write(json.dumps(row) + "\n")
    script.record([run])
    file = held(results)
    assert file["seeds"]["0"]["curve"] == [[-10, 1.0], [0, 2.0], [5, 3.0], [10, 4.0]]
    assert script.name_of(file) == "iql offline, then online"
    assert "normalized_score" not in file["seeds"]["0"]["final"]


def test_runs_of_other_settings_are_refused(script: ModuleType, tmp_path: Path, results: Path) -> None:
    script.record([made(tmp_path / "a", "iql", 0, "k", {"lr": 1})])
    before = held(results)
    with pytest.raises(SystemExit, match="runs with another lr"):
        script.record([made(tmp_path / "b", "iql", 1, "k", {"lr": 2})])
    assert held(results) == before


def test_seeds_built_on_runs_of_one_config_share_a_file(script: ModuleType, tmp_path: Path, results: Path) -> None:
    """Wherever those lie; each seed says which of them it had."""
    bases = [made(tmp_path / f"base{s}", "td3bc", s, "t", {}) for s in (3, 4)]
    script.record([made(tmp_path / f"r{s}", "cdsa", s, f"k{s}", {"base": str(b)}) for s, b in enumerate(bases)])
    file = held(results)
    assert (file["agent"]["base"], file["column"], file["config_key"]) == ("td3bc t", "cdsa on td3bc", "td3bc-t")
    assert {k: s["built_on_seed"] for k, s in file["seeds"].items()} == {"0": 3, "1": 4}
    other = made(
        tmp_path / "other", "cdsa", 2, "k2", {"base": str(made(tmp_path / "far", "td3bc", 5, "t", {})), "sigma": 1}
    )
    script.record([other])  # a setting the others do not name is no contradiction
    gone = made(tmp_path / "lost", "cdsa", 9, "k9", {"base": str(tmp_path / "gone")})
    with pytest.raises(SystemExit, match="there is no run any more: put it back"):
        script.record([gone])


def test_a_run_under_way_is_refused(script: ModuleType, tmp_path: Path) -> None:
    folder = made(tmp_path / "r", "iql", 0, "k", {})
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"done"', '"failed"'))
    with pytest.raises(SystemExit, match="is failed, not done"):
        script.record([folder])


def test_the_table_of_learners_by_sets(
    script: ModuleType, tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.record([made(tmp_path / f"r{s}", "iql", s, "k", {}, 10.0 + 2 * s) for s in (0, 1)])
    script.record([made(tmp_path / "b", "bc", 0, "b", {}, 5.0)])
    script.report()
    _, tabulated = capsys.readouterr().out.split("2 seeds\n")
    lines = [line for line in tabulated.splitlines() if line.startswith(("| learner", "| bc", "| iql"))]
    assert lines == [
        "| learner | updates | hopper-medium-replay |",
        "| bc | 50 | 5.0 (1) / 29.8 |",
        "| iql | 50 | 11.0 ± 1.4 (2) / 97.4 |",
    ]
    assert (results / "curves-offline.png").stat().st_size > 1000
    script.record([made(tmp_path / "c", "bc", 0, "other", {})])
    with pytest.raises(SystemExit, match="two configs of bc on hopper-medium-replay"):
        script.report()


def test_tables_take_the_place_of_their_older_selves(script: ModuleType, tmp_path: Path) -> None:
    script.record([made(tmp_path / "r", "iql", 0, "k", {}, 10.0)])
    page = tmp_path / "page.md"
    online = f"{script.ONLINE_HEAD}seeds |\n|---|\n| ppo | old |"
    page.write_text(f"before\n\n{script.OFFLINE_HEAD}x |\n|---|\n| old | 1 |\n\nbetween\n\n{online}\n")
    script.report(page)
    text = page.read_text()
    assert text.startswith(
        f"before\n\n{script.OFFLINE_HEAD}hopper-medium-replay |\n|---|---|---|\n| iql | 50 | 10.0 (1)"
    )
    assert "\n\nbetween\n\n" in text
    assert "old" not in text
    page.write_text("no table")
    with pytest.raises(SystemExit, match=r"page\.md: 0 tables begin with"):
        script.report(page)


def test_the_tables_of_the_readme_are_those_of_the_results(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(script.__file__).parent
    monkeypatch.setattr(script, "FOLDER", folder / "results" / "learning")
    text = (folder / "README.md").read_text()
    offline, online = script.results()
    fresh = script.replaced(text, script.offline_table(offline), script.OFFLINE_HEAD)
    fresh = script.replaced(fresh, script.online_table(online), script.ONLINE_HEAD)
    assert fresh == text, "run `python benchmarks/learning.py report --into benchmarks/README.md`"
