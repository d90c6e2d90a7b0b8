"""`rlctl report`, `compare` and `plot` from the command line, on real runs and made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Cli


def scores(
    file: Path, columns: dict[str, float], seeds: int = 5, tasks: tuple[str, ...] = ("Hopper-v5", "Ant-v5")
) -> Path:
    """A CSV of runs whose seeds are 10 apart."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{algo},{task},{seed},{step},{level * step / 1000 + 10 * seed}"
        for algo, level in columns.items()
        for task in tasks
        for seed in range(seeds)
        for step in (500, 1000)
    ]
    file.write_text("algo,task,seed,step,return\n" + "\n".join(rows) + "\n")
    return file


def test_report_of_real_runs(cli: Cli, ppo_run: Path, sac_run: Path) -> None:
    r = cli("report", ppo_run, sac_run, "-o", "page.html")
    assert (r.code, r.err) == (0, "")
    assert "2 found, 2 counted, 0 need attention" in r.out
    assert "says:      No claim is made" in r.out
    assert "warning:   Budgets differ on Hopper-v5 (environment steps): sac: 120, ppo: 200" in r.out
    page = Path("page.html").read_text()
    final = json.loads((ppo_run / "run.json").read_text())["final"]["return_mean"]
    assert f"{final:,.1f}" in page or f"{final:,.2f}" in page
    assert cli("report", ppo_run).code == 0
    assert Path("report.html").exists()


def test_report_formats(cli: Cli, tmp_path: Path) -> None:
    file = scores(tmp_path / "s.csv", {"a": 1000, "b": 3000})
    assert "| task | a (CSV) | b (CSV) |" in cli("report", file, "--format", "md").out
    assert cli("report", file, "--format", "csv").out.startswith("family,task,column,")
    assert json.loads(cli("report", file, "--format", "json").out)["claims"]
    assert cli("report", file, "-o", "t.md", "--quiet").out == ""
    assert Path("t.md").read_text().startswith("# Benchmark report")
    pytest.importorskip("matplotlib")
    assert cli("report", file, "-o", "all.png").code == 0
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")


def test_report_selects(cli: Cli, tmp_path: Path) -> None:
    file = scores(tmp_path / "s.csv", {"a": 1000, "b": 3000, "c": 2000})
    out = cli("report", file, "--algo", "a", "--algo", "b", "--task", "Ant-v5", "--format", "csv").out
    assert out.count("\n") == 11
    Path("scale.json").write_text('{"Hopper-v5": [0, 1000], "Ant-v5": [0, 1000]}')
    data = json.loads(cli("report", file, "--scale", "scale.json", "--format", "json").out)
    mean = np.mean([1000 + 10 * s for s in range(5)]) / 10
    assert data["families"][0]["aggregates"]["a (CSV)"]["mean"]["value"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report", "nowhere"], "nowhere does not exist"),
        (["report", "s.csv", "-o", "x.pdf"], "unknown format 'x.pdf': allowed are html, md, csv, json, png"),
        (["report", "s.csv", "-o", "no/such/x.html"], "no/such does not exist: create it"),
        (["report", "s.csv", "--algo", "zzz"], "no run of algorithm zzz: there are a"),
        (["report", "s.csv", "--scale", "s.csv"], "does not hold {task:"),
        (["plot", "s.csv", "-o", "x.html"], "unknown format '.html': allowed are .svg and .png"),
        (["compare", "s.csv", "t.csv"], "holds 2 columns (b (CSV), c (CSV))"),
        (["compare", "s.csv", "u.csv"], "share no task"),
    ],
)
def test_refusals_are_one_line(cli: Cli, tmp_path: Path, args: list[str], message: str) -> None:
    scores(tmp_path / "s.csv", {"a": 1000}, 2)
    scores(tmp_path / "t.csv", {"b": 1000, "c": 1000}, 2)
    scores(tmp_path / "u.csv", {"b": 1000}, 2, ("Pusher-v5",))
    r = cli(*args)
    assert (r.code, r.out) == (2, "")
    assert r.err.count("\n") == 1
    assert message in r.err


def test_compare_says_where(cli: Cli, tmp_path: Path) -> None:
    a = scores(tmp_path / "a.csv", {"x": 1000}, 8)
    b = scores(tmp_path / "b.csv", {"y": 1000}, 8, ("Ant-v5",))
    b.write_text(
        b.read_text() + scores(tmp_path / "c.csv", {"y": 2000}, 8, ("Hopper-v5",)).read_text().split("\n", 1)[1]
    )
    r = cli("compare", a, b)
    assert (r.code, r.err) == (0, "")
    assert "Task by task: better on Hopper-v5; elsewhere not separated." in r.out
    found = cli("compare", a, b, "--json").json
    rows = {t["task"]: t for t in found["tasks"]}
    assert rows["Hopper-v5"]["verdict"] == "yes"
    assert rows["Ant-v5"]["verdict"] == "not separated"
    assert rows["Hopper-v5"]["probability_b_beats_a"]["value"] == 1
    assert rows["Ant-v5"]["probability_b_beats_a"]["value"] == 0.5
    assert found["overall"]["probability_b_beats_a"]["value"] == 0.75
    assert "no, worse" in cli("compare", b, a).out


def test_compare_says_what_it_leaves_out_and_what_differs(cli: Cli, tmp_path: Path) -> None:
    a = scores(tmp_path / "a.csv", {"x": 1000}, 8)
    more = scores(tmp_path / "c.csv", {"x": 2000}, 5, ("Hopper-v5",)).read_text().split("\n", 1)[1]
    text = scores(tmp_path / "b.csv", {"x": 1000}, 5, ("Ant-v5",)).read_text() + more
    (tmp_path / "b.csv").write_text(text.replace(",1000,", ",500,"))
    r = cli("compare", a, tmp_path / "b.csv")
    assert r.code == 0
    assert "warning: Budgets differ on Ant-v5" in r.out
    assert "Their budgets differ: that may be all there is to it." in r.out
    (tmp_path / "d.csv").write_text(a.read_text() + scores(tmp_path / "e.csv", {"x": 9}, 9).read_text().split("\n")[-2])
    r = cli("compare", tmp_path / "d.csv", a)
    assert "; over all tasks the first 8 of each count." in r.out


def test_compare_of_two_runs_gives_no_verdict(cli: Cli, ppo_run: Path, sac_run: Path) -> None:
    r = cli("compare", ppo_run, sac_run)
    assert r.code == 0
    assert "No verdict: that takes 5 seeds of either side on a task. One run is one draw of luck." in r.out
    assert cli("compare", ppo_run, sac_run, "--json").json["overall"] is None


def test_plot(cli: Cli, ppo_run: Path, sac_run: Path) -> None:
    r = cli("plot", ppo_run, sac_run, "-o", "curves.svg")
    assert r.code == 0
    assert "tasks: 1, columns: 2" in r.out
    drawn = Path("curves.svg").read_text()
    assert drawn.count('class="mean"') == 4  # two curves and two keys
    assert drawn.count("<svg") == drawn.count("</svg>") == 2
    pytest.importorskip("matplotlib")
    assert cli("plot", ppo_run, "-o", "curves.png").code == 0
    assert Path("curves.png").stat().st_size > 10_000
