"""Pictures of reports of made-up runs in a real browser, to be looked at: three widths, few runs and broken ones.

    python benchmarks/look_at_reports.py FOLDER          # -> FOLDER/<case>-<width>.png

Needs Chromium (`chromium`, `chromium-browser` or `google-chrome`; Debian: apt-get install chromium). The cases: one
run; a grid with a missing, a failed, a diverged and an unfinished cell, unequal budgets included; data, and data
followed by its environment. No test looks at these pictures: a person does, and docs/report.md says when and at what.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report_scale import write_run

WIDTHS = (390, 820, 1400)
"""A phone, a tablet, a screen."""
SMALL: dict[str, Any] = {"evaluations": 20, "final": 100, "metric_rows": 5}
DIVERGED = "Diverged: losses/value became non-finite at env step 610,000, update 297"


def one_run(root: Path) -> None:
    """Nothing to compare, nothing to claim."""
    write_run(root / "ppo/s0", "ppo", "Hopper-v5", 0, 2500.0, rng=np.random.default_rng(0), **SMALL)


def broken_grid(root: Path) -> None:
    """Three columns, three tasks; a cell that nobody started, seeds that failed, diverged and were interrupted."""
    rng = np.random.default_rng(0)
    trouble: dict[tuple[str, str, int], dict[str, Any]] = {
        ("ppo", "Hopper-v5", 1): {"status": "failed", "error": DIVERGED, "made": 0.6},
        ("trpo", "Walker2d-v5", 2): {"status": "failed", "error": "RuntimeError: the simulator died", "made": 0.4},
        ("trpo", "Walker2d-v5", 3): {"status": "preempted", "made": 0.7},
    }
    levels = {"Hopper-v5": 2500.0, "HalfCheetah-v5": 5000.0, "Walker2d-v5": 3500.0}
    for k, algo in enumerate(("ppo", "trpo", "sac")):
        for env, level in levels.items():
            for seed in range(6):
                if (algo, env) == ("sac", "Walker2d-v5"):
                    continue
                more = {**SMALL, **trouble.get((algo, env, seed), {})}
                if algo == "sac":
                    more["steps"] = 200_000
                reached = level * (0.7 + 0.2 * k) * float(rng.lognormal(0, 0.1))
                write_run(root / algo / env / f"s{seed}", algo, env, seed, reached, rng=rng, **more)


def from_data(root: Path) -> None:
    """Three offline learners on two sets, one of them diverged; the same learners going on in the environment."""
    rng = np.random.default_rng(0)
    for k, algo in enumerate(("bc", "iql", "td3bc")):
        for level, name in ((1600.0, "hopper-medium-v2"), (3000.0, "walker2d-medium-v2")):
            env = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5"}[name.partition("-")[0]]
            labels = {"dataset": name, "dataset_version": 2, "benchmark": "D4RL"}
            for seed in range(5):
                more: dict[str, Any] = {**SMALL, "steps": 100_000, "data": name, "dataset": labels}
                if (algo, name, seed) == ("td3bc", "hopper-medium-v2", 4):
                    more |= {"status": "failed", "error": DIVERGED, "made": 0.5}
                reached = level * (0.8 + 0.15 * k) * float(rng.lognormal(0, 0.1))
                folder = root / algo / name / f"s{seed}"
                write_run(folder, algo, env, seed, reached, rng=rng, **more)
                if algo != "bc" and name == "hopper-medium-v2":
                    _goes_online(shutil.copytree(folder, root / "online" / algo / name / f"s{seed}"), rng)


def _goes_online(folder: Path, rng: np.random.Generator) -> None:
    """As many environment steps after the updates on the data, on which the returns still rise a little."""
    config = (folder / "config.yaml").read_text().replace("env: null", "env: Hopper-v5")
    (folder / "config.yaml").write_text(config.replace("agent:\n", "agent:\n  offline_updates: 100000\n"))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"env": "Hopper-v5", "config_key": "0ff10e"}))
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    last = max(r["updates"] for r in rows)
    end = [r for r in rows if r["updates"] == last]
    if run["status"] == "done":
        for k in range(1, 11):
            at = {"env_steps": 10_000 * k, "updates": last + 10_000 * k}
            more = [r | at | {"return": r["return"] * (1 + 0.03 * k)} for r in end if not r["final"] or k == 10]
            rows = [r for r in rows if not r["final"] or r["env_steps"]] + more
        with (folder / "metrics.jsonl").open("a") as f:
            f.write(json.dumps({"env_steps": 100_000, "updates": 200_000}) + "\n")
    (folder / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


CASES: dict[str, Callable[[Path], None]] = {"one-run": one_run, "broken-grid": broken_grid, "from-data": from_data}


def picture(browser: str, page: Path, out: Path, width: int) -> None:
    """The page as high as it is, at a width: the page is put into a frame, since no window is that narrow."""
    frame = page.with_name(f"frame-{width}.html")
    height = 12_000 if width < 600 else 7_000
    frame.write_text(
        f"<body style='margin:0'><iframe src='{page.name}' style='border:0;width:{width}px;height:{height}px'></iframe>"
    )
    switches = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb")
    size = f"--window-size={max(width, 500)},{height}"
    command = [browser, *switches, size, f"--screenshot={out}", frame.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; may be repeated")
    parser.add_argument("--width", type=int, action="append", help="only this one, in pixels; may be repeated")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no Chromium found: install it (Debian: apt-get install chromium) and run this again")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.case or CASES:
        with tempfile.TemporaryDirectory() as temp:
            root = Path(temp)
            CASES[name](root / "runs")
            report = root / "report.html"
            rlctl = [sys.executable, "-c", "from rlctl.cli import main; main()"]
            command = [*rlctl, "report", str(root / "runs"), "-o", str(report), "--title", name, "--quiet"]
            subprocess.run(command, check=True)
            for width in args.width or WIDTHS:
                picture(browser, report, (args.folder / f"{name}-{width}.png").resolve(), width)
                print(args.folder / f"{name}-{width}.png", flush=True)


if __name__ == "__main__":
    main()
