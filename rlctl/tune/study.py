"""A study: trials proposed by Optuna, judged over seeds and tasks, the best ones confirmed on fresh seeds.

    STUDY/study.yaml       the plan; the same command, or `rlctl tune --out STUDY`, goes on with it
        journal.log        Optuna's record of the trials
        trials/0007/TASK/s0/   a run directory per trial, task and seed
        confirm/default/ confirm/trial-0007/ ...   the same on fresh seeds
        result.json  rank1.yaml ...   what came out; a rank is a config for `rlctl train --config`

A trial goes through its cells (tasks by seeds, in the same order in every trial) one after the other, so that its
intermediate scores mean the same at the same step whatever the number of slots; the slots work on trials side by side.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from rlctl import agents, experiment
from rlctl.checkpoint import write_atomically
from rlctl.config import merge, parse_overrides
from rlctl.data.reference import reference_name, reference_scores
from rlctl.errors import RlctlError, UsageError
from rlctl.report.stats import holm, permutation_test, t_interval
from rlctl.tune.runner import Cell, Handle, Runner
from rlctl.tune.space import Param, read_params

if TYPE_CHECKING:
    import optuna

FRESH = 10_000
"""First seed of the confirmation; the search uses those from 0."""
LEVEL = 0.05
RETRIES = 2
"""Times a run is resumed whose process was killed."""


class StudyInterrupted(RlctlError):
    """Asked to stop: the runs have written checkpoints, the study can be gone on with."""

    exit_code = 75


@dataclass(frozen=True)
class Plan:
    """What is searched, and how a trial is judged. Raises UsageError for what cannot be."""

    algo: str
    tasks: tuple[str, ...]
    """Environments, or datasets of an offline learner."""
    params: tuple[Param, ...]
    steps: int | None = None
    """Length of a run; None: the algorithm's own."""
    trials: int = 30
    seeds: int = 2
    """Per task, of every trial."""
    top: int = 3
    """How many of the best are run again."""
    confirm_seeds: int = 5
    """Fresh ones, per task, of the best and of the default."""
    evaluations: int = 20
    """During a run: what pruning goes by."""
    prune: bool = True
    startup: int = 5
    """Trials before any is pruned."""
    seed: int = 0
    """Of the proposals."""
    settings: tuple[str, ...] = ()
    """KEY=VALUE, the same in all runs, as `rlctl train --set` takes them."""
    scale: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By task, the returns that score 0 and 100."""

    def __post_init__(self) -> None:
        if not self.params:
            raise UsageError("nothing to search: give settings with --param, e.g. --param lr=log:1e-5:1e-2")
        if not self.tasks:
            raise UsageError("no task: give one or more with --env (--data for an offline learner)")
        for what in ("trials", "seeds", "evaluations", "confirm_seeds", "startup"):
            if getattr(self, what) < 1:
                raise UsageError(f"{what} is at least 1, got {getattr(self, what)}")
        for p in self.params:  # a misspelt or impossible setting shows now, not in the first trial
            for value in p.extremes():
                self.resolved(self.tasks[0], {p.key: value})
        for task in self.tasks:
            self.resolved(task, {})
        if unknown := [t for t in self.scale if t not in self.tasks]:
            raise UsageError(f"--scale names {', '.join(unknown)}, which is none of the tasks {', '.join(self.tasks)}")
        if len(self.tasks) > 1 and (missing := [t for t in self.tasks if self._range(t) is None]):
            raise UsageError(
                f"returns of several tasks cannot be averaged as they are: give those that score 0 and 100 for "
                f"{', '.join(missing)} with --scale TASK=LOW:HIGH"
            )

    @property
    def offline(self) -> bool:
        """Whether its tasks are datasets."""
        return "env" not in agents.get(self.algo).sources()

    def cells(self, first_seed: int, seeds: int) -> list[tuple[str, int]]:
        """(task, seed) in the order in which they are run: every task once, then again with the next seed."""
        return [(task, first_seed + s) for s, task in itertools.product(range(seeds), self.tasks)]

    def layer(self, task: str, values: dict[str, Any], seed: int = 0) -> dict[str, Any]:
        """The settings of a run with `values` on a task, still to be resolved: what is wrong with them its run says."""
        sets = [f"run.evaluations={self.evaluations}", "run.tensorboard=false", "run.threads=1", *self.settings]
        layer = parse_overrides([*sets, *[f"{k}={json.dumps(v)}" for k, v in values.items()]])
        top = {"algo": self.algo, "data" if self.offline else "env": task, "seed": seed}
        return merge(layer, top, {"agent": {"steps": self.steps}} if self.steps else {})

    def resolved(self, task: str, values: dict[str, Any]) -> experiment.Settings:
        """The same, resolved."""
        return experiment.resolve(None, [self.layer(task, values)])

    def least_p(self) -> float:
        """The smallest p-value the comparison on fresh seeds can give, Holm-corrected; `LEVEL` and above is hopeless.

        Dealing 2 n runs of each task into halves anew, 2 of all the ways are as extreme as complete separation.
        """
        return min(1.0, self.top * 2 / math.comb(2 * self.confirm_seeds, self.confirm_seeds) ** len(self.tasks))

    def score(self, task: str, ret: float) -> float:
        """A return as a score: 0 to 100 on the task's scale, or as it is where there is none (a single task)."""
        found = self._range(task)
        return ret if found is None else 100 * (ret - found[0]) / (found[1] - found[0])

    def _range(self, task: str) -> tuple[float, float] | None:
        return self.scale.get(task) or reference_scores().get(reference_name(task) or "")

    def plain(self) -> dict[str, Any]:
        """As study.yaml has it."""
        out = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        out["params"] = {p.key: p.plain() for p in self.params}
        out["scale"] = {k: list(v) for k, v in self.scale.items()}
        return out

    @classmethod
    def read(cls, values: dict[str, Any]) -> Plan:
        """Undo `plain`; a file of a user has the same keys."""
        known = set(cls.__dataclass_fields__)
        if unknown := [k for k in values if k not in known]:
            raise UsageError(f"a study has no key '{unknown[0]}': it has {', '.join(sorted(known))}")
        values = dict(values)
        for key in ("algo", "tasks", "params"):
            if key not in values:
                raise UsageError(f"a study says at least algo, tasks and params: {key} is missing")
        values["params"] = read_params(values["params"])
        for key in ("tasks", "settings"):
            if isinstance(values.get(key, []), str):
                raise UsageError(f"{key} is a list, got {values[key]!r}")
            values[key] = tuple(values.get(key, ()))
        values["scale"] = {k: (float(v[0]), float(v[1])) for k, v in (values.get("scale") or {}).items()}
        return cls(**values)


# ------------------------------------------------------------------------------------------------------------- a trial
@dataclass
class _Attempt:
    """A configuration on its way through its cells."""

    name: str
    values: dict[str, Any]
    cells: list[tuple[str, int]]
    folder: Path
    trial: optuna.Trial | None = None
    """None in the confirmation: nothing is reported, nothing pruned."""
    scores: list[float] = field(default_factory=list)
    """Of the finished cells."""
    handle: Handle | None = None
    lost: int = 0
    """Times the process of the cell under way was killed, or its machine lost."""
    pruned: bool = False
    outcome: str = ""
    """done, pruned, diverged, refused or failed, once it has ended."""
    note: str = ""

    def run_dir(self, k: int) -> Path:
        task, seed = self.cells[k]
        return self.folder / task.replace(":", "-").replace("/", "-") / f"s{seed}"


class Tuner:
    """Carries a plan out in `folder`, or goes on with it."""

    def __init__(
        self,
        folder: Path,
        plan: Plan | None,
        make_runner: Callable[[], Runner],
        *,
        say: Callable[[str], None] = lambda line: None,
        poll: float = 0.2,
    ) -> None:
        self.folder, self.say, self.poll = folder, say, poll
        self.plan = _claim(folder, plan)
        self._make_runner = make_runner
        self._stop = False

    def run(self) -> dict[str, Any]:
        """Search, confirm, compare; returns what result.json holds. Raises StudyInterrupted after a signal."""
        lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UsageError(f"{self.folder} is in use by another process: wait for it, or stop it first") from e
        try:
            self.runner = self._make_runner()  # not before the lock is ours: it may end what another one runs
        except BaseException:
            lock.close()
            raise
        try:
            with self._stop_on_signals():
                study = self._open()
                self._search(study)
                self._confirm(study)
                return self._conclude(study)
        finally:
            self.runner.close()
            lock.close()

    # -------------------------------------------------------------------------------------------------------- search
    def _open(self) -> optuna.Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = self.folder / "journal.log"
        _mend(journal)
        plan = self.plan
        done = sum(1 for _ in journal.open()) if journal.exists() else 0
        sampler = optuna.samplers.TPESampler(
            seed=plan.seed + done,  # a study that is gone on with draws on, it does not draw the same again
            multivariate=True,
            constant_liar=self.runner.slots > 1,
            n_startup_trials=max(plan.startup, 5),
        )
        warm_up = max(plan.evaluations // 5, 1)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=plan.startup, n_warmup_steps=warm_up)
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="tune",
            direction="maximize",
            sampler=sampler,
            pruner=pruner if plan.prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )

    def _search(self, study: optuna.Study) -> None:
        from optuna.trial import Trial, TrialState

        # those that were under way when the study was stopped keep their number and settings
        waiting = [Trial(study, t._trial_id) for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
        active: list[_Attempt] = []

        def next_one() -> _Attempt | None:
            if waiting:
                trial = waiting.pop(0)
                self.say(f"trial {trial.number} goes on")
            elif len(study.get_trials(deepcopy=False)) < self.plan.trials:
                trial = study.ask()
            else:
                return None
            values = {p.key: p.suggest(trial) for p in self.plan.params}
            cells = self.plan.cells(0, self.plan.seeds)
            return _Attempt(
                f"trial {trial.number}", values, cells, self.folder / "trials" / f"{trial.number:04d}", trial
            )

        for attempt in self._drive(next_one, active):
            assert attempt.trial is not None
            _tell(study, attempt)
            what = f"{fmean(attempt.scores):.4g}" if attempt.outcome == "done" else attempt.outcome
            best = next(iter(self._best(study)), None)
            lead = f"; best {best.value:.4g}, trial {best.number}" if best is not None else ""
            shown = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in attempt.values.items())
            self.say(f"{attempt.name} of {self.plan.trials}: {what}{lead}   {shown}{attempt.note}")

    # ------------------------------------------------------------------------------------------------------- confirm
    def _confirm(self, study: optuna.Study) -> None:
        attempts = self._candidates(study)
        left = iter(attempts)
        for attempt in self._drive(lambda: next(left, None), []):
            mean = f"{fmean(attempt.scores):.4g}" if attempt.outcome == "done" else attempt.outcome + attempt.note
            self.say(f"fresh seeds, {attempt.name}: {mean}")

    def _candidates(self, study: optuna.Study) -> list[_Attempt]:
        """The default settings and the best trials, one attempt per seed so that the slots share them."""
        out = []
        for name, values in [("default", {}), *[(f"trial-{t.number:04d}", self._values(t)) for t in self._best(study)]]:
            for s in range(self.plan.confirm_seeds):
                cells = self.plan.cells(FRESH + s, 1)
                out.append(_Attempt(f"{name} seed {FRESH + s}", values, cells, self.folder / "confirm" / name))
        return out

    def _best(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        from optuna.trial import TrialState

        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ranked = sorted(done, key=lambda t: -float(t.value or 0.0))
        distinct: list[optuna.trial.FrozenTrial] = []
        for t in ranked:
            if all(t.params != other.params for other in distinct):
                distinct.append(t)
        return distinct[: self.plan.top]

    def _values(self, t: optuna.trial.FrozenTrial) -> dict[str, Any]:
        kinds = {p.key: p.kind for p in self.plan.params}
        return {k: json.loads(v) if kinds[k] == "choice" else v for k, v in t.params.items()}

    # ------------------------------------------------------------------------------------------------------ the driver
    def _drive(self, next_one: Callable[[], _Attempt | None], active: list[_Attempt]) -> Iterator[_Attempt]:
        """Keep the slots busy; yields each attempt as it ends."""
        exhausted = False
        while True:
            while not exhausted and not self._stop and len(active) < self.runner.slots:
                attempt = next_one()
                exhausted = attempt is None
                if attempt is not None:
                    active.append(attempt)
            if self._stop:
                raise StudyInterrupted(f"interrupted; go on with: rlctl tune --out {self.folder}")
            if not active:
                return
            for attempt in list(active):
                self._advance(attempt)
                if attempt.outcome:
                    active.remove(attempt)
                    yield attempt
            time.sleep(self.poll)

    def _advance(self, a: _Attempt) -> None:
        """Start what is to be started, read what has come, decide."""
        k = len(a.scores)
        cell = a.run_dir(k)
        code: int | None = None
        if a.handle is None:
            code = _earlier(cell)
            if code is None:
                task, seed = a.cells[k]
                config = self.plan.layer(task, a.values, seed)
                a.handle = self.runner.submit(Cell(cell, config, cell.with_name(f"{cell.name}.log")))
                return
        else:
            code = a.handle.poll()
        if a.trial is not None and not a.pruned:
            self._report(a, k, cell)
        if code is None:
            if a.pruned and a.handle is not None:
                a.handle.stop()
            return
        a.handle = None
        if a.pruned:
            a.outcome = "pruned"
        elif code == 0:
            a.scores.append(self.plan.score(a.cells[k][0], _final(cell)))
            a.lost = 0
            a.outcome = "done" if len(a.scores) == len(a.cells) else ""
        elif code < 0 and a.lost < RETRIES:  # killed, or its machine gone: no fault of the settings; it is resumed
            a.lost += 1
        elif code != 75:  # that is: somebody else stopped it; it is gone on with
            a.outcome = {2: "refused", 3: "diverged"}.get(code, "failed")
            a.note = f" ({_last_line(cell.with_name(f'{cell.name}.log')) or f'exit code {code}'})"

    def _report(self, a: _Attempt, k: int, cell: Path) -> None:
        """Hand on the evaluations that have come since: the mean of the finished cells and of the one under way."""
        assert a.trial is not None
        known = a.trial.storage.get_trial(a.trial._trial_id).intermediate_values
        for i, ret in enumerate(_evaluations(cell)):
            step = k * self.plan.evaluations + i
            if step in known or not math.isfinite(ret):
                continue
            a.trial.report(fmean([*a.scores, self.plan.score(a.cells[k][0], ret)]), step)
            if a.trial.should_prune():
                a.pruned = True
                return

    # -------------------------------------------------------------------------------------------------------- results
    def _conclude(self, study: optuna.Study) -> dict[str, Any]:
        from optuna.trial import TrialState

        plan = self.plan
        names = ["default", *[f"trial-{t.number:04d}" for t in self._best(study)]]
        values = {"default": {}, **{f"trial-{t.number:04d}": self._values(t) for t in self._best(study)}}
        found = {f"trial-{t.number:04d}": t.value for t in self._best(study)}
        scores = {name: self._matrix(name) for name in names}
        rows: list[dict[str, Any]] = []
        rng = np.random.default_rng(plan.seed)
        enough = plan.confirm_seeds >= 3
        whole = {n for n in names if np.isfinite(scores[n]).all()}
        comparable = [n for n in names[1:] if enough and {n, "default"} <= whole]
        p_values = holm([permutation_test(scores[n], scores["default"], rng) for n in comparable])
        adjusted = dict(zip(comparable, p_values, strict=True))
        for name in names:
            per_seed = scores[name].mean(1)
            interval = t_interval(per_seed) if enough and name in whole else None
            p = adjusted.get(name)
            rows.append(
                {
                    "name": name,
                    "settings": values[name],
                    "search_score": found.get(name),
                    "fresh_mean": float(per_seed.mean()) if name in whole else None,
                    "fresh_low": interval.low if interval else None,
                    "fresh_high": interval.high if interval else None,
                    "fresh_scores": {t: _finite(scores[name][:, i]) for i, t in enumerate(plan.tasks)},
                    "p_against_default": p,
                    "verdict": _verdict(name, scores, p, plan),
                }
            )
        rows[1:] = sorted(rows[1:], key=lambda r: math.inf if r["fresh_mean"] is None else -r["fresh_mean"])
        states = [t.state for t in study.get_trials(deepcopy=False)]
        result = {
            "study": str(self.folder),
            "plan": plan.plain(),
            "trials": {s.name.lower(): states.count(s) for s in TrialState if states.count(s)},
            "search_seeds": list(range(plan.seeds)),
            "fresh_seeds": [FRESH + s for s in range(plan.confirm_seeds)],
            "score": "0 to 100 on the task's scale" if plan._range(plan.tasks[0]) else "return",
            "configurations": rows,
            "better": [r["name"] for r in rows if r["verdict"] == "better"],
        }
        for rank, row in enumerate(rows[1:], 1):
            layer = merge(parse_overrides(list(plan.settings)), _nested(row["settings"]), {"algo": plan.algo})
            if plan.steps:
                layer = merge({"agent": {"steps": plan.steps}}, layer)
            text = f"# {row['name']} of a search; on {plan.confirm_seeds} fresh seeds: {row['verdict']}.\n"
            write_atomically(self.folder / f"rank{rank}.yaml", text + yaml.safe_dump(layer, sort_keys=False))
        write_atomically(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        return result

    def _matrix(self, name: str) -> np.ndarray:
        """Scores on the fresh seeds, [seeds, tasks]; NaN for a run that did not end well."""
        out = np.full((self.plan.confirm_seeds, len(self.plan.tasks)), np.nan)
        for s, i in itertools.product(range(out.shape[0]), range(out.shape[1])):
            a = _Attempt(name, {}, [(self.plan.tasks[i], FRESH + s)], self.folder / "confirm" / name)
            if _earlier(a.run_dir(0)) == 0:
                out[s, i] = self.plan.score(self.plan.tasks[i], _final(a.run_dir(0)))
        return out

    @contextlib.contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def ask(signum: int, _: FrameType | None) -> None:
            self._stop = True
            self.say(f"{signal.Signals(signum).name}: the runs write their checkpoints")

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


# ------------------------------------------------------------------------------------------------------------- helpers
def _claim(folder: Path, plan: Plan | None) -> Plan:
    """The plan of the study in `folder`: the one given, which must be the one it has if it has one."""
    file = folder / "study.yaml"
    if not file.exists():
        if plan is None:
            raise UsageError(f"{folder} holds no study: say what to search with --algo, --env and --param")
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, yaml.safe_dump(plan.plain(), sort_keys=False))
        return plan
    there = Plan.read(yaml.safe_load(file.read_text()))
    if plan is None or plan == there:
        return there
    differs = [k for k in vars(plan) if getattr(plan, k) != getattr(there, k)]
    if differs == ["trials"] and plan.trials > there.trials:  # more of the same
        write_atomically(file, yaml.safe_dump(plan.plain(), sort_keys=False))
        return plan
    raise UsageError(
        f"{folder} holds another study, whose {', '.join(differs)} differ: go on with "
        f"it by `rlctl tune --out {folder}` alone, or choose another --out"
    )


def _mend(journal: Path) -> None:
    """Cut off a line that a killed process left half written, and the lock it held: this study is ours alone."""
    if not journal.exists():
        return
    data = journal.read_bytes()
    if data and not data.endswith(b"\n"):
        with journal.open("r+b") as f:
            f.truncate(data.rfind(b"\n") + 1)
    for lock in journal.parent.glob("journal.log.lock*"):
        lock.unlink(missing_ok=True)


def _tell(study: optuna.Study, a: _Attempt) -> None:
    from optuna.trial import TrialState

    assert a.trial is not None
    a.trial.set_user_attr("outcome", a.outcome + a.note)
    if a.outcome == "done":
        study.tell(a.trial, fmean(a.scores))
    elif a.outcome in ("pruned", "diverged", "refused"):
        study.tell(a.trial, state=TrialState.PRUNED)  # settings to keep away from, and the proposals do
    else:
        study.tell(a.trial, state=TrialState.FAIL)


def _earlier(cell: Path) -> int | None:
    """The exit code of a cell that an earlier session saw end; None for one that is still to be run or resumed."""
    record = experiment.read_json(cell / "run.json")
    if record.get("status") == "done":
        return 0
    return 3 if str(record.get("error") or "").startswith("Diverged") else None


def _final(cell: Path) -> float:
    final = experiment.read_json(cell / "run.json").get("final")
    if not final:
        raise RlctlError(f"{cell} was not evaluated at its end: run.final_episodes must be above 0")
    return float(final["return_mean"])


def _evaluations(cell: Path) -> list[float]:
    """Mean return of each evaluation made so far, the final one aside."""
    file = cell / "eval.jsonl"
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last line may be half written
            rows.append(json.loads(line))
    rows = [r for r in rows if r["deterministic"] and not r["final"]]
    grouped = itertools.groupby(rows, key=lambda r: (r["env_steps"], r["updates"]))
    return [fmean(r["return"] for r in group) for _, group in grouped]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].strip()[:200] if lines else ""


def _verdict(name: str, scores: dict[str, np.ndarray], p: float | None, plan: Plan) -> str:
    if name == "default":
        return "what the others are compared with"
    for who in (name, "default"):
        if not np.isfinite(scores[who]).all():
            return f"no claim: a run of {who} on fresh seeds did not end well"
    if p is None or plan.least_p() >= LEVEL:
        return f"no claim: {plan.confirm_seeds} fresh seeds cannot separate anything"
    if p >= LEVEL:
        return "not separated from the default"
    return "better" if scores[name].mean() > scores["default"].mean() else "worse"


def _finite(x: Sequence[float] | np.ndarray) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in x]


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    return parse_overrides([f"{k}={json.dumps(v)}" for k, v in values.items()])
