"""Time and memory of a report over many runs, which are made up: 10 algorithms, 5 tasks, 10 seeds.

    python benchmarks/report_scale.py [--keep FOLDER] [--runs 500]     # -> results/report-500-runs.json

The made-up runs have the files and the sizes of real ones (100 evaluations of 10 episodes and a final one of 100; 500
metric rows). A few failed, diverged, were killed or are missing. The report is made in a process of its own, so that
its peak memory is that of the command.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import RESULTS

from rlctl.config import fingerprint
from rlctl.provenance import git, machine, provenance, versions

ALGOS = ("ppo", "trpo", "mdpo", "spo", "fixpo", "sac", "td3", "mdpo-off", "pmoe-ppo", "pmoe-sac")
TASKS = {"Hopper-v5": 3000.0, "HalfCheetah-v5": 6000.0, "Walker2d-v5": 4000.0, "Ant-v5": 3500.0, "Swimmer-v5": 120.0}
EVALUATIONS, EPISODES, FINAL, METRIC_ROWS = 100, 10, 100, 500


def write_run(
    folder: Path,
    algo: str,
    env: str,
    seed: int,
    level: float,
    *,
    rng: np.random.Generator,
    status: str = "done",
    error: str | None = None,
    steps: int = 1_000_000,
    evaluations: int = EVALUATIONS,
    final: int = FINAL,
    metric_rows: int = METRIC_ROWS,
    data: str | None = None,
    settings: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    made: float = 1.0,
) -> Path:
    """A run directory whose agent climbs to a mean return of `level`; `made` is the share of the steps it got to."""
    folder.mkdir(parents=True)
    online = data is None
    agent = {"steps": steps, "lr": 3e-4, "hidden": [64, 64], **(settings or {})}
    config = {"algo": algo, "env": env if online else None, "data": data, "device": "auto", "env_options": {}}
    config |= {"agent": agent}
    key = fingerprint({k: v for k, v in config.items() if k != "device"})
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "seed": seed, "run": {"evaluations": evaluations}}))
    labels = {} if dataset is None else {k: dataset[k] for k in ("dataset", "dataset_version", "benchmark")}

    def rows(at: int, returns: np.ndarray[Any, Any], final: bool) -> str:
        counts = {"env_steps": at if online else 0, "updates": at // 100 if online else at}
        return "".join(
            json.dumps(
                {
                    **counts,
                    "episode": i,
                    "return": float(r),
                    "length": 1000,
                    "deterministic": True,
                    "final": final,
                    **labels,
                }
            )
            + "\n"
            for i, r in enumerate(returns)
        )

    with (folder / "eval.jsonl").open("w") as f:
        for k in range(1, int(evaluations * made) + 1):
            climb = level * (1 - np.exp(-4 * k / evaluations))
            f.write(rows(steps * k // evaluations, rng.normal(climb, 0.08 * abs(level), EPISODES), False))
        if status == "done":
            f.write(rows(steps, rng.normal(level * (1 - np.exp(-4)), 0.08 * abs(level), final), True))
    names = (
        "losses/policy",
        "losses/value",
        "policy/approx_kl",
        "policy/entropy",
        "charts/episodic_return",
        "charts/SPS",
    )
    with (folder / "metrics.jsonl").open("w") as f:
        for k in range(1, int(metric_rows * made) + 1):
            at = steps * k // metric_rows
            spent = {"time/collect_s": at / 20_000, "time/learn_s": at / 12_000, "time/eval_s": at / 90_000}
            values = dict(zip(names, rng.normal(size=len(names)).tolist(), strict=True))
            f.write(json.dumps({"env_steps": at if online else 0, "updates": at, **values, **spent}) + "\n")
    record: dict[str, Any] = {"schema": 1, "algo": algo, "env": env if online else None, "data": data, "seed": seed}
    command = ["rlctl", "train", "--algo", algo, "--env" if online else "--data", env if online else data]
    session = {**_PROVENANCE, "command": [*command, "--seed", str(seed)]}
    started = (_START + datetime.timedelta(seconds=seed)).isoformat(timespec="seconds")
    record |= {"config_key": key, "physics": "published", "started": started, "sessions": [session]}
    record |= {"status": status, "error": error, "eval_env": env, "dataset": dataset, "updated": started}
    record |= {"spec": {"obs_dim": 11, "act_dim": 3, "num_envs": 32, "episode_len": 1000}}
    if status == "done":
        used = evaluations * EPISODES
        record["final"] = {"episodes": final, "best_eval_mean": level * 1.02, "eval_episodes_used_total": used}
        record |= {"progress": steps, "spent_s": {"collect": steps / 2e4, "learn": steps / 1.2e4, "eval": steps / 9e4}}
    (folder / "run.json").write_text(json.dumps(record, indent=1))
    return folder


_START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_PROVENANCE = provenance()


def write_grid(root: Path, runs: int) -> int:
    """Made-up runs of every algorithm on every task; returns how many there are."""
    rng = np.random.default_rng(0)
    written = 0
    for k in range(runs):
        algo, env = ALGOS[k % len(ALGOS)], list(TASKS)[k // len(ALGOS) % len(TASKS)]
        seed = k // (len(ALGOS) * len(TASKS))
        level = TASKS[env] * (0.5 + 0.06 * ALGOS.index(algo)) * float(rng.lognormal(0, 0.2))
        trouble: dict[str, Any] = {}
        if k % 97 == 13:
            trouble = {"status": "failed", "error": "RuntimeError: the simulator process died", "made": 0.4}
        elif k % 97 == 31:
            message = "Diverged: losses/value became non-finite at env step 610,000, update 297"
            trouble = {"status": "failed", "error": message, "made": 0.6}
        elif k % 97 == 47:
            trouble = {"status": "running", "made": 0.7}
        elif k % 97 == 71:
            continue  # missing
        write_run(root / algo / env / f"s{seed}", algo, env, seed, level, rng=rng, **trouble)
        written += 1
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="write the runs and report.html here and leave them")
    parser.add_argument("--out", type=Path, help="result file, default results/report-RUNS-runs.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        root = args.keep or Path(temp)
        written = write_grid(root / "runs", args.runs)
        page = root / "report.html"
        command = [
            sys.executable,
            "-c",
            "from rlctl.cli import main; main()",
            "report",
            str(root / "runs"),
            "-o",
            str(page),
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = page.stat().st_size
    result = {
        "runs": written,
        "seconds_wall": round(seconds, 1),
        "seconds_cpu": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_mib": round(used.ru_maxrss / 1024),
        "page_kib": round(size / 1024),
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
        "git": git(),
        "machine": {k: v for k, v in machine().items() if k != "host"},
        "versions": versions(),
    }
    target = args.out or RESULTS / f"report-{args.runs}-runs.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
