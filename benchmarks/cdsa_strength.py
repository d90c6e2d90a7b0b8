"""How far CDSA should move actions: one trained score, several base agents, several strengths of the correction.

    python benchmarks/cdsa_strength.py --score CDSA_RUN --env Hopper BASE_RUN ...

The score network knows the data alone, so the one of CDSA_RUN corrects any agent of the task; nothing is trained here.
Every pair is rolled out for `--episodes` episodes from the same starts, deterministic actions. The first column is the
base itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write

import rlctl
from rlctl.agents.cdsa import CDSA
from rlctl.data.reference import normalized_score
from rlctl.evaluate import evaluate
from rlctl.experiment import load_named


class Strength(NamedTuple):
    """One way to correct: fields of CDSA's config."""

    action_step: float
    score_steps: int
    sigma: float = 0.3
    anneal: bool = False

    def __str__(self) -> str:
        if not self.score_steps:
            return "none"
        levels = f"{self.sigma} falling" if self.anneal else f"{self.sigma}"
        return f"{self.score_steps} x {self.action_step}, sigma {levels}"


STRENGTHS = [
    Strength(0.0, 0),
    Strength(0.2, 1),
    Strength(0.5, 1),
    Strength(1.0, 1),
    Strength(0.5, 5),
    Strength(1.0, 1, sigma=1.0),
    Strength(1.0, 5, sigma=1.0, anneal=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", type=Path, help="run directories of the agents to correct")
    parser.add_argument("--score", required=True, type=Path, help="run directory of a trained CDSA")
    parser.add_argument("--env", required=True, help="task to roll out in")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    corrector = load_named(str(args.score), "latest", "--score", "a trained CDSA")[0]
    if not isinstance(corrector, CDSA):
        parser.error(f"--score {args.score} holds no CDSA: train one with `rlctl train --algo cdsa --set base=RUN_DIR`")
    env = rlctl.make_env(args.env, args.episodes, seed=0)
    rows: list[dict[str, Any]] = []
    print("| base | " + " | ".join(map(str, STRENGTHS)) + " |\n" + "|---" * (len(STRENGTHS) + 1) + "|")
    for folder in args.bases:
        run = json.loads((folder / "run.json").read_text())
        corrector.wrap(load_named(str(folder), "latest", "a base", "the agent whose actions to correct")[0])
        scores = []
        for strength in STRENGTHS:
            corrector.cfg = dataclasses.replace(corrector.cfg, **strength._asdict())
            result = evaluate(corrector, env, args.episodes, seed=10_000)
            assert result is not None
            score = normalized_score(args.env, result.mean)
            scores.append({**strength._asdict(), "return": result.mean, "std": result.std, "normalised": score})
        rows.append({"base": run["algo"], "config_key": run["config_key"], "seed": run["seed"], "scores": scores})
        cells = (f"{s['return']:.0f} ± {s['std']:.0f}" for s in scores)
        print(f"| {run['algo']} | " + " | ".join(cells) + " |", flush=True)
    data = json.loads((args.score / "run.json").read_text())["data"]
    write("cdsa-strength", {"data": data, "env": args.env, "episodes": args.episodes, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
