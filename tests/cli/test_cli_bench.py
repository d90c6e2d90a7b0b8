"""`rlctl bench` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import PPO, Cli

from rlctl.config import parse_overrides

SUITE: dict[str, Any] = {
    "description": "One cell.",
    "seeds": 1,
    "budgets": {"on_policy": 80},
    "evaluation": {"evaluations": 1, "episodes": 2, "final_episodes": 2},
    "tasks": ["probe:both"],
    "algorithms": [{"algo": "ppo", "set": parse_overrides(PPO)}],
}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(SUITE))
    return file


def test_dry_run_shows_the_plan_and_starts_nothing(cli: Cli, suite: Path) -> None:
    r = cli("bench", suite, "--dry-run", "--seeds", "3")
    assert r.code == 0
    assert "to do: 3 runs, 240 steps" in r.out
    assert "time unknown, never measured here: ppo on probe:both" in r.out
    plan = cli("bench", suite, "--dry-run", "--json", "--seeds", "4,7").json
    assert [c["id"].split("/")[-1].split("-")[0] for c in plan["cells"]] == ["s4", "s7"]
    assert plan["cost"] == {"runs": 2, "steps": 160, "seconds": 0.0, "unknown": ["ppo on probe:both"]}
    assert not Path("runs").exists()


def test_a_grid_from_start_to_status(cli: Cli, suite: Path) -> None:
    r = cli("bench", suite, "--jobs", "1")
    assert r.code == 0, r.err
    assert "1 of 1 cells done in runs/one" in r.out
    assert [line.split()[0] for line in r.err.splitlines() if "/s0-" in line] == ["start", "done"]
    again = cli("bench", suite, "--json").json
    assert (again["done"], again["left"]) == (1, 0)
    for place in (["runs/one"], ["one"], [suite], [], ["--out", "runs/one"]):
        assert cli("bench", "--status", *place).out.startswith("suite one: 1 cells")
    status = cli("bench", "--status", "runs/one")
    assert "no driver at work" in status.out
    assert "●" in status.out
    (cell,) = cli("bench", "--status", "runs/one", "--json").json["cells"]
    assert (cell["status"], cell["attempts"], cell["share_done"]) == ("done", 1, 1.0)
    assert "cells done" in cli("bench", suite).out
    cost = cli("bench", suite, "--dry-run", "--seeds", "2", "--json").json["cost"]
    assert cost["runs"] == 1
    assert cost["seconds"] > 0
    # another protocol is another cell, and the old one is pointed out
    suite.write_text(yaml.safe_dump(SUITE | {"evaluation": SUITE["evaluation"] | {"final_episodes": 3}}))
    assert cli("bench", suite, "--jobs", "1", "--quiet").code == 0
    assert "1 runs are not in the last plan" in cli("bench", "--status", "runs/one").out


def test_what_has_used_up_its_retries_is_not_to_do(cli: Cli, suite: Path) -> None:
    assert cli("bench", suite, "--jobs", "1", "--quiet").code == 0
    (run,) = Path("runs/one").glob("*/*/s0-*")
    (run / "run.json").unlink()
    ledger = Path("runs/one/ledger.jsonl")
    cell = run.relative_to("runs/one").as_posix()
    rows = [{"time": 0, "event": e, "cell": cell} for e in ("start", "failed") * 3]
    ledger.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "1 failed with their retries used up (--retry-failed), 0 to do" in cli("bench", suite, "--dry-run").out
    assert "1 cells, 1 to do" in cli("bench", suite, "--dry-run", "--retry-failed").out
    assert "1 cells, 1 to do" in cli("bench", suite, "--dry-run", "--retries", "3").out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no suite given"),
        (["smoek"], "did you mean 'smoke'"),
        (["--status", "nowhere"], "no folder of `rlctl bench`"),
        (["--status"], "no grid under runs/"),
        (["--status", "a", "--out", "b"], "no folder of `rlctl bench`"),
        (["one.yaml", "--seeds", "1,x"], "--seeds takes"),
        (["one.yaml", "--executor", "lokal"], "did you mean 'local'"),
        (["one.yaml", "--option", "partition=x"], "local has no option 'partition'"),
        (["data.yaml"], "not here"),
        (["data.yaml", "--dry-run"], "rlctl data download hopper-medium-v2"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, cli: Cli, suite: Path, tmp_path: Path) -> None:
    changes = {"tasks": [], "datasets": ["hopper-medium-v2"], "algorithms": ["bc"], "budgets": {}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(SUITE | changes))
    r = cli("bench", *args)
    assert r.code == 2
    assert message in r.err
    assert r.err.count("\n") == 1
