"""Other programs' logs as columns of the same report, each marked with how its score was measured.

| found | is read as | score |
|---|---|---|
| `evaluations.npz` | SB3's EvalCallback, RL Zoo folders | episodes of the last evaluation |
| `*.monitor.csv` | SB3's Monitor, where there is no evaluations.npz | the last 100 training episodes |
| `events.out.tfevents.*` | CleanRL, skrl, rsl_rl, SB3, told apart by their tags | mean of the last tenth of the curve |
| `*.csv` with a header | one row per evaluation: algo,task,seed,step,return | rows of the largest step |

None of them says on which physics, with how many selections or with which settings it was made, so a report never
claims that one is better or worse than a run under our own protocol; it shows them side by side. A run whose files
cannot be read is listed with the reason and stops nothing; a score that is no finite number counts as a failed run.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlctl.errors import UsageError
from rlctl.report.runs import RunRecord, Task
from rlctl.report.stats import Floats

KINDS = "RL Zoo folders (evaluations.npz, *.monitor.csv), TensorBoard event files, and CSV files given by name"
CSV_COLUMNS = ("algo", "task", "seed", "step", "return")
TRAINING_EPISODES, POINTS = 100, 100

TAGS = {  # where in a TensorBoard file the return is, and whose it then is; the first that is there counts
    "eval/mean_reward": ("SB3", "evaluations in training"),
    "charts/episodic_return": ("CleanRL", "training episodes"),
    "Train/mean_reward": ("rsl_rl", "training episodes"),
    "Reward / Total reward (mean)": ("skrl", "training episodes"),
    "rollout/ep_rew_mean": ("SB3", "training episodes"),
}
UNITS = {"rsl_rl": "iterations", "skrl": "steps of each environment"}


def from_folder(folder: Path, files: list[str], root: Path) -> list[RunRecord]:
    """Runs that lie directly in `folder` and are not ours."""
    monitors = [f for f in files if f.endswith("monitor.csv")]
    events = [f for f in files if f.startswith("events.out.tfevents.")]
    if "evaluations.npz" in files:
        return _readable(lambda: [zoo_evaluations(folder)], folder, "evaluations.npz", "SB3 Zoo")
    if monitors:
        read = [folder / f for f in monitors]
        return _readable(lambda: [zoo_monitors(folder, read)], folder, ", ".join(monitors), "SB3 Zoo")
    if events:
        return _readable(lambda: tensorboard(folder, root), folder, ", ".join(events), "TensorBoard")
    return []


def from_file(file: Path) -> list[RunRecord]:
    """Runs in a file that was given by name."""
    if file.suffix == ".csv":
        return _readable(lambda: list(plain_csv(file)), file, file.name, "CSV")
    if file.name == "run.json":
        raise UsageError(f"{file} is a file of a run: give its directory, {file.parent}")
    raise UsageError(f"{file} is not a directory or a CSV file; what can be read are run directories, {KINDS}")


def _readable(read: Callable[[], list[RunRecord]], where: Path, what: str, origin: str) -> list[RunRecord]:
    """What `read` finds at `where`, or one record that says why it cannot be read."""
    try:
        return read()
    except UsageError:
        raise
    except Exception as e:  # NumPy, YAML, zip, CSV and protocol buffers each have errors of their own for a torn file
        note = " ".join(f"{what}, or what lies beside it, cannot be read: {type(e).__name__}: {e}".split())
        task = Task("online", where.name)
        return [RunRecord(str(where), where.parent.name, task, None, "unreadable", origin=origin, note=note)]


def _scored(record: RunRecord) -> RunRecord:
    """The record without what is not finite in its curve; failed, as a run of ours would be, where its score is not."""
    x, y = record.curve
    finite = np.isfinite(x) & np.isfinite(y)
    record = replace(record, curve=(x[finite], y[finite]))
    if all(map(math.isfinite, record.episodes)):
        return record
    note = "its last returns are not finite numbers"
    return replace(record, status="failed", episodes=(), selection=None, note=note)


# ----------------------------------------------------------------------------------------------------------------- zoo
class _ZooSafeLoader(yaml.SafeLoader):
    """The zoo's YAML holds Python's OrderedDict by tag: read here as the mapping it is, nothing is executed."""


def _ordered(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
    assert isinstance(node, yaml.SequenceNode)
    pairs = loader.construct_sequence(node, deep=True)
    return {str(k): v for k, v in (pairs[0] if pairs else [])}


def _opaque(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    return f"!{suffix}"


_ZooSafeLoader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _ordered)
_ZooSafeLoader.add_multi_constructor("tag:yaml.org,2002:python/", _opaque)


def _zoo_identity(folder: Path) -> tuple[str, str, int | None, dict[str, Any]]:
    """(algorithm, environment, seed, hyperparameters) of `<algo>/<env>_<n>/`, from args.yml where it is kept."""
    found: dict[str, dict[str, Any]] = {"args.yml": {}, "config.yml": {}}
    for name in found:
        for file in [folder / name, *sorted(folder.glob(f"*/{name}"))]:
            if file.exists():
                values = yaml.load(file.read_text(), _ZooSafeLoader)  # noqa: S506 - a safe loader
                found[name] = values if isinstance(values, dict) else {}
                break
    args = found["args.yml"]
    env, _, number = folder.name.rpartition("_")
    seed = args.get("seed")
    if not (isinstance(seed, int) and seed >= 0):  # not kept, or drawn at random: the folder's number tells runs apart
        seed = int(number) if env and number.isdigit() else None
    algo = str(args.get("algo") or folder.parent.name)
    return algo, str(args.get("env") or (env if env and number.isdigit() else folder.name)), seed, found["config.yml"]


def zoo_evaluations(folder: Path) -> RunRecord:
    """`evaluations.npz`: timesteps [n], results [n, episodes], ep_lengths [n, episodes]."""
    algo, env, seed, settings = _zoo_identity(folder)
    with np.load(folder / "evaluations.npz", allow_pickle=False) as file:
        steps, results = np.asarray(file["timesteps"], np.float64), np.asarray(file["results"], np.float64)
    if results.ndim != 2 or not results.size or len(results) != len(steps) or not np.isfinite(steps).all():
        raise ValueError(f"timesteps {steps.shape} and results {results.shape} do not belong together")
    means = results.mean(1)
    best = float(means[np.isfinite(means)].max(initial=-math.inf))
    record = RunRecord(
        where=str(folder),
        algo=algo,
        task=Task("online", env, env),
        seed=seed,
        status="done",
        origin="SB3 Zoo",
        protocol="episodes of the last evaluation in training",
        episodes=tuple(results[-1].tolist()),
        curve=(steps, results.mean(1)),
        settings=dict(settings),
        steps=int(steps[-1]),
        selection=(best, int(results.size)) if math.isfinite(best) else None,
        seconds=_monitor_seconds(folder),
    )
    return _scored(record)


def zoo_monitors(folder: Path, files: list[Path]) -> RunRecord:
    """Monitor files, one per environment of the run: rows r (return), l (length), t (seconds since the start)."""
    algo, env, seed, settings = _zoo_identity(folder)
    rows = sorted((row for file in files for row in _monitor(file)), key=lambda row: row[2])
    task = Task("online", env, env)
    if not rows:
        return RunRecord(
            str(folder), algo, task, seed, "unreadable", origin="SB3 Zoo", note="no episode in monitor.csv"
        )
    ret, length, seconds = np.array(rows).T
    record = RunRecord(
        where=str(folder),
        algo=algo,
        task=task,
        seed=seed,
        status="done",
        origin="SB3 Zoo",
        protocol=f"the last {TRAINING_EPISODES} training episodes",
        episodes=tuple(ret[-TRAINING_EPISODES:].tolist()),
        curve=_binned(length.cumsum(), ret),
        settings=dict(settings),
        steps=int(length.sum()),
        seconds={"total": float(seconds.max())},
    )
    return _scored(record)


def _monitor(file: Path) -> Iterator[tuple[float, float, float]]:
    with file.open(newline="", encoding="utf-8-sig") as f:
        head = f.readline()
        if not head.startswith("#"):  # the line with the start time is not always there
            f.seek(0)
        for row in csv.DictReader(f):
            try:
                ret, length, seconds = float(row["r"]), float(row["l"]), float(row["t"])
            except (KeyError, TypeError, ValueError):  # a line that breaks off
                continue
            if math.isfinite(length) and math.isfinite(seconds):
                yield ret, length, seconds


def _monitor_seconds(folder: Path) -> dict[str, float]:
    """Wall-clock by the monitors beside the evaluations; none where they cannot be read: the score does without."""
    try:
        ends = [row[2] for file in folder.glob("*monitor.csv") for row in _monitor(file)]
    except (OSError, ValueError, csv.Error):
        return {}
    return {"total": max(ends)} if ends else {}


# --------------------------------------------------------------------------------------------------------- TensorBoard
def tensorboard(folder: Path, root: Path) -> list[RunRecord]:
    """The run whose event files lie in `folder`, or none where they hold no return. ValueError if they hold nothing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 10, "images": 1, "histograms": 1})
    log.Reload()
    tags = log.Tags()
    if not any(tags.values()):  # TensorBoard passes over what it cannot read, and a run that died at once wrote nothing
        raise ValueError("no event in it")
    tag = next((t for t in TAGS if t in tags["scalars"]), None)
    if tag is None:
        return []
    origin, protocol = TAGS[tag]
    events = log.Scalars(tag)
    if not events:
        return []
    step, value = np.array([e.step for e in events], float), np.array([e.value for e in events], float)
    settings = _cleanrl_settings(log, tags["tensors"]) if origin == "CleanRL" else {}
    algo, env, seed = _identity(folder, root, origin, settings)
    last = value[step >= step[0] + 0.9 * (step[-1] - step[0])]
    record = RunRecord(
        where=str(folder),
        algo=algo,
        task=Task("online", env, env, UNITS.get(origin, "environment steps")),
        seed=seed,
        status="done",
        origin=origin,
        protocol=f"{protocol}, the last tenth of the curve",
        episodes=tuple(last.tolist()),
        curve=_binned(step, value),
        settings=settings,
        steps=int(step[-1]),
        seconds={"total": events[-1].wall_time - events[0].wall_time},
    )
    return [_scored(record)]


def _cleanrl_settings(log: Any, tags: list[str]) -> dict[str, Any]:
    """CleanRL writes its arguments as a Markdown table `|name|value|` into a text summary."""
    name = "hyperparameters/text_summary"
    if name not in tags:
        return {}
    text = b"".join(log.Tensors(name)[-1].tensor_proto.string_val).decode(errors="replace")
    rows = re.findall(r"^\|([^|]+)\|([^|]*)\|$", text, re.MULTILINE)
    return {k: v for k, v in rows if k not in ("param", "-") and not k.startswith("-")}


def _identity(folder: Path, root: Path, origin: str, settings: dict[str, Any]) -> tuple[str, str, int | None]:
    """Who ran what: CleanRL's arguments or its `env__script__seed__time`; else `<algo>/<env>/<anything>s<seed>`."""
    parts = folder.name.split("__")
    if origin == "CleanRL" and len(parts) == 4:
        env, script, number, _ = parts
        return (
            re.sub(r"_continuous_action$", "", script),
            settings.get("env_id", env),
            _int(settings.get("seed", number)),
        )
    try:
        above = [p for p in folder.relative_to(root.parent).parts if p not in ("logs", "runs", "summaries", "tb")]
    except ValueError:
        above = list(folder.parts)
    algo, env = [origin, "unknown", *above][-3:-1] if len(above) > 2 else (origin, above[0] if above else "unknown")
    pattern = r"_(\d+)$" if origin == "SB3" else r"(?:^|[_-])s(?:eed)?[_-]?(\d+)$"  # SB3 numbers runs: PPO_1, PPO_2
    number_at_end = re.search(pattern, folder.name)
    return algo, env, _int(settings.get("seed", number_at_end[1] if number_at_end else None))


def _int(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


# ----------------------------------------------------------------------------------------------------------------- CSV
def plain_csv(file: Path) -> Iterator[RunRecord]:
    """Rows `algo,task,seed,step,return`, an episode or a mean each, with `family` if it is not `online`."""
    with file.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets write a byte order mark
        reader = csv.DictReader(f)
        missing = [c for c in CSV_COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(
                f"{file} lacks the columns {', '.join(missing)}: its header must name {','.join(CSV_COLUMNS)} "
                "(and may name family: online, D4RL, Minari or own data)"
            )
        runs: dict[tuple[str, str, str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for number, row in enumerate(reader, 2):
            try:
                key = (row["algo"], row.get("family") or "online", row["task"], int(row["seed"]))
                step = float(row["step"])
                if not math.isfinite(step):
                    raise ValueError(f"step {step}")
                runs[key][step].append(float(row["return"]))
            except (TypeError, ValueError) as e:
                raise UsageError(f"{file}, line {number}: seed, step and return are numbers, got {row}") from e
    for (algo, family, task, seed), curve in runs.items():
        steps = sorted(curve)
        record = RunRecord(
            where=str(file),
            algo=algo,
            task=Task(family, task, task, "environment steps" if family == "online" else "updates"),
            seed=seed,
            status="done",
            origin="CSV",
            protocol="as the CSV file gives it",
            episodes=tuple(curve[steps[-1]]),
            curve=(np.array(steps), np.array([np.mean(curve[s]) for s in steps])),
            steps=int(steps[-1]),
        )
        yield _scored(record)


def _binned(step: Floats, value: Floats) -> tuple[Floats, Floats]:
    """At most `POINTS` means over equal spans of steps: single training episodes are noise."""
    if len(step) <= POINTS:
        return step, value
    edges = np.linspace(step[0], step[-1], POINTS + 1)
    index = np.clip(np.searchsorted(edges, step, side="left") - 1, 0, POINTS - 1)
    count = np.bincount(index, minlength=POINTS)
    filled = count > 0
    mean = np.bincount(index, weights=value, minlength=POINTS)[filled] / count[filled]
    return edges[1:][filled], mean
