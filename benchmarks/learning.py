"""Learning evidence: gather finished runs into small result files, draw their curves, print the table.

    python benchmarks/learning.py record RUN_DIR ...      # runs of rlctl -> benchmarks/results/learning/*.json
    python benchmarks/learning.py report                  # those files -> two pictures and the tables in Markdown
    python benchmarks/learning.py report --into FILE      # the tables in place of those that stand in FILE
    python benchmarks/learning.py picture FILE ... --out curves-of-some.png

One file per (algorithm, task, config): every seed with its curve (evaluation step, mean of the episodes), its final
evaluation, the commit and the wall-clock; hardware, versions and physics once. Curves of agents that go online begin
below zero: at -10,000 there are 10,000 updates to come before the first step in the environment.
Published figures live in `PUBLISHED`, with their source; they are other task versions and budgets where it says so, and
never averaged with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS

FOLDER = RESULTS / "learning"

SHEETS = {"hopper": "hop", "halfcheetah": "hc"}
D4RL = {
    # D4RL v2, normalised, the last checkpoint of 1M updates (EDAC 3M), mean of four seeds: CORL's table
    "bc": {"hc-mr": 35.7, "hop-mr": 29.8, "hop-me": 52.3},
    "bc-10%": {"hc-mr": 23.6, "hop-mr": 70.4, "hop-me": 111.2},
    "td3bc": {"hc-mr": 44.8, "hop-mr": 64.4, "hop-me": 101.2},
    "awac": {"hc-mr": 45.1, "hop-mr": 98.9, "hop-me": 101.9},
    "cql": {"hc-mr": 45.0, "hop-mr": 95.1, "hop-me": 99.3},
    "iql": {"hc-mr": 44.5, "hop-mr": 97.4, "hop-me": 107.4},
    "rebrac": {"hc-mr": 51.2, "hop-mr": 95.0, "hop-me": 109.5},
    "edac": {"hc-mr": 62.1, "hop-mr": 99.7, "hop-me": 105.2},
    # the paper's own
    "a2pr": {"hc-mr": 56.6, "hop-mr": 101.5, "hop-me": 112.1},
}
"""Of other data with the same names and longer training: orientation, never to be averaged or ranked with ours."""

PUBLISHED = {
    ("ppo", "Hopper-v5"): "1M: CleanRL v4 2383±272, baselines v2 2159±303, Tianshou v3 2609±701 (max over training)",
    (
        "ppo",
        "HalfCheetah-v5",
    ): "1M: CleanRL v4 1443±46, baselines v2 1429±62, Tianshou v3 5784±1244 (max over training)",
    ("ppo", "Walker2d-v5"): "1M: CleanRL v4 2288±572, baselines v2 3356±323, Tianshou v3 3589±757 (max over training)",
    ("sac", "HalfCheetah-v5"): "1M: CleanRL v4 9635±1424, SB3 zoo v3 9535±100",
    ("sac", "Hopper-v5"): "1M: CleanRL v4 2310±343, SB3 zoo v3 2326±1130",
    ("td3", "HalfCheetah-v5"): "1M: CleanRL v4 9583",
    ("td3", "Hopper-v5"): "1M: CleanRL v4 3135",
    ("trpo", "Hopper-v5"): "1M: sb3-contrib v3 3372±215, Tianshou v3 2046±1038, baselines about 2200",
    ("trpo", "HalfCheetah-v5"): "1M: sb3-contrib v3 1803±46, Tianshou v3 4471±805, baselines about 1350",
    ("trpo", "Walker2d-v5"): "1M: sb3-contrib v3 4502±234, Tianshou v3 3827±783, baselines about 2350",
    ("trpo", "Swimmer-v5"): "1M: sb3-contrib v3 359±2, Tianshou v3 41±20",
    ("mdpo", "Hopper-v5"): "10M, v2, without normalisation: 1964±217",
    ("mdpo", "Walker2d-v5"): "10M, v2, without normalisation: 2948±298",
    ("spo", "Hopper-v5"): "curves only",
    ("spo", "HalfCheetah-v5"): "curves only",
    ("spo", "Walker2d-v5"): "curves only",
    ("fixpo", "Hopper-v5"): "no table",
    ("fixpo", "HalfCheetah-v5"): "no table",
    ("fixpo", "Walker2d-v5"): "no table",
    ("pmoe-ppo", "Hopper-v5"): "no table",
    ("pmoe-ppo", "HalfCheetah-v5"): "no table",
    ("pmoe-ppo", "Walker2d-v5"): "no table",
    ("pmoe-sac", "Hopper-v5"): "curves only",
    ("pmoe-sac", "HalfCheetah-v5"): "curves only",
    ("mdpo", "HalfCheetah-v5"): "cell not reached",
    ("mdpo-off", "Hopper-v5"): "cell not reached",
    ("mdpo-off", "HalfCheetah-v5"): "cell not reached",
    # the GoRL paper's figures, of its own PPO too: MuJoCo Playground, whose engine and resets are others
    ("gorl", "dmc:hopper-stand"): "180M steps on MJX: 743±200",
    ("gorl", "dmc:walker-walk"): "180M steps on MJX: 890",
    ("ppo", "dmc:hopper-stand"): "180M steps on MJX: 281±270",
    ("ppo", "dmc:walker-walk"): "180M steps on MJX: 820",
    ("expo with data", "Hopper-v5"): "no digits for this task",
    ("td3bc", "Hopper-v5"): "other data (D4RL hopper-medium-v2, 1M updates): CORL last 60.4 normalised",
}

OFFLINE_HEAD, ONLINE_HEAD = "| learner | updates | ", "| algorithm | task | steps | "
"""How the two tables begin."""

BUILT_ON = {"cdsa": ("base", "on"), "dppo": ("pretrained", "from")}
"""Agents that take up a trained run: the field of the config that names its folder, the word for the two together."""


def record(folders: list[Path]) -> None:
    """Merge finished runs into their result files."""
    for folder in folders:
        run = json.loads((folder / "run.json").read_text())
        if run["status"] != "done":
            sys.exit(f"{folder} is {run['status']}, not done")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        env = run["eval_env"]
        episodes: dict[int, list[float]] = defaultdict(list)
        rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
        offline = not any(row["env_steps"] for row in rows)  # agents that go online with data count steps there
        on_data = config["agent"].get("offline_updates") or 0  # of an agent that goes on in an environment
        for row in rows:
            if not row["final"] and row["deterministic"]:
                episodes[row["env_steps"] or row["updates"] - on_data].append(row["return"])
        session = run["sessions"][-1]
        final = dict(run["final"])
        if not offline:
            final.pop("normalized_score", None)  # that scale belongs to D4RL-like data
        seed = {
            "final": final,
            "curve": [[step, round(statistics.fmean(rets), 1)] for step, rets in sorted(episodes.items())],
            "git": session["git"],
            "started": run["started"],
            "seconds": {k: round(v) for k, v in run["spent_s"].items()},
        }
        column, agent, key = run.get("column") or run["algo"], dict(config["agent"]), run["config_key"]
        field, joined = BUILT_ON.get(run["algo"], ("", ""))
        if agent.get(field):  # seeds that differ in that run alone belong together, whatever its folder
            if not (Path(agent[field]) / "run.json").exists():
                sys.exit(f"{folder} was built on {agent[field]}, where there is no run any more: put it back")
            other = json.loads((Path(agent[field]) / "run.json").read_text())
            column = f"{run['algo']} {joined} {other['algo']}"
            agent[field] = f"{other['algo']} {other['config_key']}"
            seed["built_on_seed"] = other["seed"]
            key = f"{other['algo']}-{other['config_key']}"
        shared = {
            "algo": run["algo"],
            "env": env,
            "data": run["data"],
            "offline": offline,
            "column": column,
            "steps": config["agent"]["steps"],
            "physics": run["physics"],
            "config_key": key,
            "agent": agent,
            "machine": {k: v for k, v in session["machine"].items() if k != "host"},
            "versions": session["versions"],
            "torch_threads": config["run"]["threads"] or session["torch_threads"],
        }
        merge(f"{run['algo']}-{env}-{key}", shared, run["seed"], seed)


def merge(name: str, shared: dict[str, Any], seed: int, result: dict[str, Any]) -> None:
    """Add one seed to the result file `name`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{name.replace(':', '.')}.json"  # sb3:ppo: a colon is no part of a file name everywhere
    held = json.loads(file.read_text()) if file.exists() else {"agent": shared["agent"], "seeds": {}}
    if differing := [k for k, v in shared["agent"].items() if held["agent"].get(k, v) != v]:
        sys.exit(f"{file} holds runs with another {', '.join(differing)}: move it away, or record these elsewhere")
    seeds = held["seeds"]
    seeds[str(seed)] = result
    ordered = dict(sorted(seeds.items(), key=lambda kv: int(kv[0])))
    file.write_text(json.dumps(shared | {"seeds": ordered}, separators=(",", ":")) + "\n")
    print(f"{file}: {len(seeds)} seeds")


def spread(values: list[float]) -> str:
    """mean ± std over seeds; a single value stands alone."""
    if len(values) == 1:
        return f"{values[0]:.0f}"
    return f"{statistics.fmean(values):.0f} ± {statistics.stdev(values):.0f}"


def is_offline(result: dict[str, Any]) -> bool:
    """Whether its agents learned from data alone."""
    return bool(result.get("offline", result["data"] is not None))


def name_of(result: dict[str, Any]) -> str:
    """What an agent is called in tables and legends: its column, and what data it had before or besides."""
    name = str(result.get("column", result["algo"]))
    if is_offline(result) or not result["data"]:
        return name
    return name + (" offline, then online" if result["agent"].get("offline_updates") else " with data")


def offline_table(files: list[dict[str, Any]]) -> list[str]:
    """Lines of a table, learners by datasets: normalised return of the last agent, mean ± std over seeds (how many)."""
    cells: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for r in files:
        scores = [s["final"]["normalized_score"] for s in r["seeds"].values()]
        spread_out = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        cell = f"{statistics.fmean(scores):.1f}{spread_out} ({len(scores)})"
        kind = r["data"].removeprefix("ladder/").removesuffix("-v0")
        task, _, rest = kind.partition("-")
        short = f"{SHEETS.get(task, task)}-{''.join(word[0] for word in rest.split('-'))}"
        row = cells[r.get("column", r["algo"]), r["steps"]]
        if kind in row:
            sys.exit(f"two configs of {r.get('column', r['algo'])} on {kind}: give one of them a column of its own")
        there = D4RL.get(r["algo"] if r.get("column") not in D4RL else r["column"], {}).get(short)
        row[kind] = cell + (f" / {there}" if there else "")
    sets = sorted({kind for row in cells.values() for kind in row})
    lines = [f"{OFFLINE_HEAD}{' | '.join(sets)} |", "|---" * (len(sets) + 2) + "|"]
    for (name, steps), row in sorted(cells.items()):
        lines.append(f"| {name} | {steps:,} | " + " | ".join(row.get(kind, "") for kind in sets) + " |")
    return lines


def online_table(files: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of agents in environments: return of the last agent, mean ± std over seeds, and each seed."""
    lines = [f"{ONLINE_HEAD}seeds | final return, mean ± std over seeds | each seed | published |", "|---" * 7 + "|"]
    for r in files:
        finals = [s["final"]["return_mean"] for s in r["seeds"].values()]
        each = ", ".join(f"{v:.0f}" for v in finals)
        name = name_of(r)
        reference = PUBLISHED.get((name, r["env"]), "")
        cells = (name, r["env"], f"{r['steps']:,}", len(finals), spread(finals), each, reference)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def replaced(text: str, table: list[str], head: str) -> str:
    """`text` with `table` in place of the one table that begins with `head`. ValueError unless there is just one."""
    old = text.splitlines()
    starts = [i for i, line in enumerate(old) if line.startswith(head)]
    if len(starts) != 1:
        raise ValueError(f"{len(starts)} tables begin with '{head}': there must be one to replace")
    end = next((i for i in range(starts[0], len(old)) if not old[i].startswith("|")), len(old))
    return "\n".join([*old[: starts[0]], *table, *old[end:]]) + "\n"


def results() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The recorded results: of learners on data, and of agents in environments."""
    everything = [json.loads(f.read_text()) for f in sorted(FOLDER.glob("*.json"))]
    return [r for r in everything if is_offline(r)], [r for r in everything if not is_offline(r)]


def report(into: Path | None = None) -> None:
    """Print the tables, or put them in the place of those in `into`, and draw the curves."""
    offline, files = results()
    tables = {OFFLINE_HEAD: offline_table(offline), ONLINE_HEAD: online_table(files)}
    if into is None:
        print("\n\n".join("\n".join(lines) for lines in tables.values()))
    else:
        text = into.read_text()
        try:
            for head, lines in tables.items():
                text = replaced(text, lines, head)
        except ValueError as e:
            sys.exit(f"{into}: {e}")
        into.write_text(text)
    for part, name in ((files, "curves.png"), (offline, "curves-offline.png")):
        if part:
            picture(part, FOLDER / name)


def picture(results: list[dict[str, Any]], file: Path) -> None:
    """Draw evaluation returns over training, a panel per task or dataset and length, a line per seed.

    A name has one colour and dash in all panels; legends stand beside the panels, the highest at the end on top.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels: dict[str, list[Any]] = defaultdict(list)
    for r in results:
        reached = max(s["curve"][-1][0] for s in r["seeds"].values())  # more than `steps` where decoders take some too
        length = f"{float(f'{reached:.2g}') / 1000:.0f}k " + ("updates" if is_offline(r) else "steps")
        panels[f"{r['data'] if is_offline(r) else r['env']}, {length}"].append(r)
    look = {
        name: {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        for i, name in enumerate(sorted({name_of(r) for r in results}))
    }
    longest = max(len(members) for members in panels.values())
    cols = min(3 if longest < 10 else 2, len(panels))
    rows = -(-len(panels) // cols)
    size = (6.6 * cols, max(3.6, 0.2 * longest) * rows)
    fig, axes = plt.subplots(rows, cols, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, members) in zip(axes.flat, sorted(panels.items()), strict=False):
        for r in sorted(members, key=lambda r: -statistics.fmean(s["curve"][-1][1] for s in r["seeds"].values())):
            for k, s in enumerate(r["seeds"].values()):
                xs, ys = zip(*s["curve"], strict=True)
                label = f"{name_of(r)} ({len(r['seeds'])})" if k == 0 else None
                ax.plot(xs, ys, **look[name_of(r)], lw=1.2, alpha=0.8, label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("gradient steps" if "updates" in title else "environment steps")
        ax.set_ylabel("evaluation return")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.grid(alpha=0.25)
        ax.legend(
            fontsize=8,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            title="agent (seeds)",
            title_fontsize=8,
        )
    fig.savefig(file, dpi=90)
    plt.close(fig)
    print(f"\ncurves: {file}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record", help="gather finished runs").add_argument("runs", nargs="+", type=Path)
    tables = verbs.add_parser("report", help="tables and curves")
    tables.add_argument("--into", type=Path, metavar="FILE", help="replace the tables in this Markdown file")
    draw = verbs.add_parser("picture", help="the curves of some result files")
    draw.add_argument("files", nargs="+", type=Path)
    draw.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    if args.verb == "record":
        record(args.runs)
    elif args.verb == "picture":
        picture([json.loads(f.read_text()) for f in args.files], args.out)
    else:
        report(args.into)


if __name__ == "__main__":
    main()
