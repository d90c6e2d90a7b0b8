"""What `rlctl bench` costs beside the runs themselves: the same few runs through it and through `rlctl train`, in turn.

    python benchmarks/speed/bench.py --runs 3 --rounds 3

Processor time of all processes of a command (driver and cells) is what is compared: it means the same on a machine that
does other things too; wall-clock is recorded beside it. The cost is per run, and part of it (starting the driver and
validating the suite) is shared by all runs of a grid. The aim: under 2% of a run of five minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import write

RUN_OF_INTEREST = 300.0
"""Seconds."""
COMMAND = [sys.executable, "-c", "import sys; from rlctl.cli import main; sys.argv[0] = 'rlctl'; main()"]
SETTINGS: dict[str, Any] = {"run.final_episodes": 10, "run.evaluations": 2, "run.eval_episodes": 10, "run.threads": 1}
STEPS = 20_480


def cost(*args: str | Path) -> tuple[float, float]:
    """(processor seconds, wall-clock seconds) of `rlctl ARGS` and of all its children."""
    start = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"rlctl {' '.join(map(str, args))} ended with status {status}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - start


def alone(folder: Path, runs: int) -> tuple[float, float]:
    sets = [x for k, v in SETTINGS.items() for x in ("--set", f"{k}={v}")]
    each = [
        cost(
            "train",
            "--algo",
            "ppo",
            "--env",
            "Hopper",
            "--steps",
            str(STEPS),
            "--seed",
            str(k),
            *sets,
            "--out",
            folder / str(k),
        )
        for k in range(runs)
    ]
    return sum(c for c, _ in each), sum(w for _, w in each)


def in_a_grid(folder: Path, runs: int) -> tuple[float, float]:
    suite = {
        "seeds": runs,
        "budgets": {"on_policy": STEPS},
        "evaluation": {"evaluations": 2, "episodes": 10, "final_episodes": 10},
        "tasks": ["Hopper"],
        "algorithms": ["ppo"],
    }
    folder.mkdir(parents=True)
    file = folder / "overhead.yaml"
    file.write_text(yaml.safe_dump(suite))
    return cost("bench", file, "--out", folder / "out", "--jobs", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs per command")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the result goes instead of benchmarks/results")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temp:
        for r in range(args.rounds):
            a, b = alone(Path(temp) / f"a{r}", args.runs), in_a_grid(Path(temp) / f"b{r}", args.runs)
            extra = [(y - x) / args.runs for x, y in zip(a, b, strict=True)]
            rows.append({"train_cpu_s": a[0], "bench_cpu_s": b[0], "train_wall_s": a[1], "bench_wall_s": b[1]})
            rows[-1] |= {"extra_cpu_s_per_run": extra[0], "extra_wall_s_per_run": extra[1]}
            print({k: round(v, 2) for k, v in rows[-1].items()}, flush=True)
    per_run = statistics.median([row["extra_cpu_s_per_run"] for row in rows])
    share = per_run / RUN_OF_INTEREST
    print(f"{per_run:.2f} s of processor time per run, {share:.2%} of a run of {RUN_OF_INTEREST:.0f} s")
    write(
        "speed-bench",
        {"runs": args.runs, "extra_cpu_s_per_run": per_run, "share_of_300_s": share, "rounds": rows},
        args.out,
    )


if __name__ == "__main__":
    main()
