"""The search: what it proposes, when it stops a trial, what it calls better; it can be stopped at any moment."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("optuna")

from rlctl import experiment
from rlctl.bench import executors
from rlctl.errors import UsageError
from rlctl.tune import Cell, ExecutorRunner, Param, Plan, Tuner, local, parse_param
from rlctl.tune.study import FRESH, StudyInterrupted

LR = parse_param("lr=log:1e-5:1e-1")


def plan(**changes: Any) -> Plan:
    return Plan(
        **{"algo": "ppo", "tasks": ("probe:both",), "params": (LR,), "trials": 6, "seeds": 2, "startup": 2} | changes
    )


# --------------------------------------------------------------------------------------------------------------- space
@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("lr=log:1e-5:1e-2", Param("lr", "log", (1e-5, 1e-2))),
        ("agent.gamma=float:0.9:0.999", Param("agent.gamma", "float", (0.9, 0.999))),
        ("epochs=int:3:20", Param("epochs", "int", (3, 20))),
        ("minibatch_size=logint:32:512", Param("minibatch_size", "logint", (32, 512))),
        ("hidden=choice:[[64, 64], [256, 256]]", Param("hidden", "choice", ([64, 64], [256, 256]))),
        ("activation=choice:[tanh, relu]", Param("activation", "choice", ("tanh", "relu"))),
    ],
)
def test_params(text: str, param: Param) -> None:
    assert parse_param(text) == param


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "KEY=KIND"),
        ("lr=log", "KEY=KIND"),
        ("lr=logg:1:2", "allowed are float, log"),
        ("lr=log:0:1", "above 0"),
        ("lr=float:2:1", "below HIGH"),
        ("lr=float:1", "two numbers"),
        ("lr=float:a:b", "two numbers"),
        ("epochs=int:1.5:3", "whole numbers"),
        ("hidden=choice:64", "a list"),
        ("hidden=choice:[64]", "two values"),
    ],
)
def test_params_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_param(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": ()}, "nothing to search"),
        ({"tasks": ()}, "no task"),
        ({"params": (parse_param("lrr=log:1e-5:1e-2"),)}, "did you mean 'lr'"),
        ({"params": (parse_param("gamma=float:0.5:1.5"),)}, "gamma"),
        ({"tasks": ("probe:both", "Hoper")}, "Hopper"),
        ({"tasks": ("probe:both", "probe:action")}, "--scale"),
        ({"scale": {"Hopper": (0.0, 1.0)}}, "none of the tasks"),
        ({"trials": 0}, "at least 1"),
        ({"settings": ("epochs=many",)}, "epochs"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_plan_survives_its_file() -> None:
    p = plan(
        params=(LR, parse_param("hidden=choice:[[8, 8], [16]]")), settings=("epochs=2",), scale={"probe:both": (0, 2)}
    )
    assert Plan.read(yaml.safe_load(yaml.safe_dump(p.plain(), sort_keys=False))) == p
    with pytest.raises(UsageError, match="no key 'trails'"):
        Plan.read({"trails": 3})


def test_scores_are_on_the_scale_of_the_task() -> None:
    assert plan().score("probe:both", 0.7) == 0.7
    p = plan(tasks=("Hopper", "probe:both"), scale={"probe:both": (0.5, 1.0)})
    assert p.score("probe:both", 0.75) == 50
    assert p.score("Hopper", 3234.3) == pytest.approx(100)  # D4RL's expert


def test_least_p_is_that_of_complete_separation() -> None:
    assert plan(top=1, confirm_seeds=3).least_p() == pytest.approx(0.1)
    assert plan(top=3, confirm_seeds=5).least_p() == pytest.approx(6 / 252)


# ------------------------------------------------------------------------------------------------- a study in a moment
class Pretended:
    """Runs that take no time: the score of a learning rate is known, seeds add a little.

    Good rates are near 1e-3. Each `poll` makes one more evaluation; the fourth is the last.
    """

    def __init__(self, slots: int = 1, stop_after: int | None = None, kills: int = 0) -> None:
        self.slots, self.left, self.kills = slots, stop_after, kills
        self.started: list[Cell] = []
        self.under_way = 0
        self.most = 0

    def submit(self, cell: Cell) -> PretendedRun:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt  # as dead as a killed process: nothing is put in order
        self.started.append(cell)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return PretendedRun(self, cell)

    def close(self) -> None:
        pass


class PretendedRun:
    def __init__(self, runner: Pretended, cell: Cell) -> None:
        self.runner, self.cell, self.asked, self.code = runner, cell, False, None
        lr = float(cell.config.get("lr", 3e-4))
        self.ret = 10 - abs(math.log10(lr) + 3) + 0.01 * (cell.config["seed"] % 7)
        self.dies = {"refused": 2, "diverged": 3, "crashed": 1}.get(cell.config.get("activation", ""))
        if runner.kills > 0:
            runner.kills -= 1
            self.dies = -9
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "config.yaml").write_text("")
        self.made = 0

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._advance()
            self.runner.under_way -= self.code is not None
        return self.code

    def _advance(self) -> int | None:
        if self.asked:
            return 75
        if self.dies:
            return self.dies
        if self.made < 4:
            self.made += 1
            row = {
                "env_steps": self.made,
                "updates": 0,
                "return": self.ret * self.made / 4,
                "deterministic": True,
                "final": False,
            }
            with (self.cell.folder / "eval.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
            return None
        (self.cell.folder / "run.json").write_text(json.dumps({"status": "done", "final": {"return_mean": self.ret}}))
        return 0

    def stop(self) -> None:
        self.asked = True


def tune(folder: Path, p: Plan | None, runner: Any) -> dict[str, Any]:
    return Tuner(folder, p, lambda: runner, poll=0.0).run()


def test_a_study(tmp_path: Path) -> None:
    runner = Pretended(slots=3)
    result = tune(tmp_path / "s", plan(trials=14, top=2, confirm_seeds=5, evaluations=4), runner)
    assert runner.most == 3
    assert sum(result["trials"].values()) == 14
    assert result["trials"]["pruned"] > 0
    default, best, second = result["configurations"]
    assert default["name"] == "default"
    assert best["fresh_mean"] >= second["fresh_mean"]
    # the known score on the fresh seeds, not that of the search
    fresh = [0.01 * ((FRESH + s) % 7) for s in range(5)]
    assert default["fresh_scores"]["probe:both"] == pytest.approx([10 - 0.5228787 + f for f in fresh])
    assert best["verdict"] == "better"
    assert best["name"] in result["better"]
    assert json.loads((tmp_path / "s" / "result.json").read_text()) == result
    layer = experiment.load_yaml(tmp_path / "s" / "rank1.yaml")
    assert experiment.resolve(None, [layer, {"env": "probe:both"}]).agent.lr == best["settings"]["lr"]
    searched = {c.config["seed"] for c in runner.started if "trials" in c.folder.parts}
    confirmed = {c.config["seed"] for c in runner.started if "confirm" in c.folder.parts}
    assert searched == {0, 1}
    assert confirmed == {FRESH + s for s in range(5)}


def test_nothing_is_better_by_luck(tmp_path: Path) -> None:
    """All settings are the same: the best of the search is not called better."""
    p = plan(params=(parse_param("ent_coef=float:0:1"),), trials=6, confirm_seeds=5)
    result = tune(tmp_path / "s", p, Pretended())
    assert result["better"] == []
    assert {r["verdict"] for r in result["configurations"][1:]} == {"not separated from the default"}


def test_too_few_seeds_make_no_claim(tmp_path: Path) -> None:
    result = tune(tmp_path / "s", plan(trials=4, confirm_seeds=2), Pretended())
    assert {r["verdict"] for r in result["configurations"][1:]} == {"no claim: 2 fresh seeds cannot separate anything"}
    assert all(r["fresh_low"] is None for r in result["configurations"])


def test_a_poor_trial_is_pruned_before_its_end(tmp_path: Path) -> None:
    runner = Pretended()
    tune(tmp_path / "s", plan(trials=12, evaluations=4), runner)
    cells = [c for c in runner.started if "trials" in c.folder.parts]
    assert len(cells) < 24  # some never reached their second seed
    journal = [json.loads(line) for line in (tmp_path / "s" / "journal.log").read_text().splitlines()]
    assert any(entry.get("state") == 2 for entry in journal)


@pytest.mark.parametrize("calls", [1, 4, 9, 14, 20])
def test_killed_anywhere_and_gone_on_with(calls: int, tmp_path: Path) -> None:
    """Nothing that was finished is run again, no trial is lost or counted twice."""
    p = plan(trials=6, prune=False, confirm_seeds=3, top=2, evaluations=4)
    first = Pretended(stop_after=calls)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "s", p, first)
    with (tmp_path / "s" / "journal.log").open("a") as journal:
        journal.write('{"op_code": 5, "half')  # the line that the process was writing
    (tmp_path / "s" / "journal.log.lock").touch()
    second = Pretended()
    result = tune(tmp_path / "s", None, second)
    done = {c.folder for c in first.started[: calls - 1]}  # the last one was under way
    assert not done & {c.folder for c in second.started}
    assert result["trials"] == {"complete": 6}
    folders = {c.folder for c in [*first.started, *second.started]}
    assert len(folders) == 6 * 2 + 3 * 3
    again = Pretended()
    assert tune(tmp_path / "s", p, again) == result
    assert again.started == []


def test_runs_that_end_badly(tmp_path: Path) -> None:
    kinds = parse_param("activation=choice:[tanh, relu]")
    object.__setattr__(kinds, "values", ("tanh", "refused", "diverged", "crashed"))
    p = plan()
    object.__setattr__(p, "params", (LR, kinds))
    object.__setattr__(p, "trials", 16)
    result = tune(tmp_path / "s", p, Pretended())
    assert result["trials"]["complete"] + result["trials"]["pruned"] + result["trials"]["fail"] == 16
    assert all(r["settings"].get("activation", "tanh") == "tanh" for r in result["configurations"])


def test_another_plan_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    tune(tmp_path / "s", plan(trials=3, confirm_seeds=1, top=1), Pretended())
    with pytest.raises(UsageError, match="seeds differ"):
        Tuner(tmp_path / "s", plan(trials=3, confirm_seeds=1, top=1, seeds=3), Pretended)
    more = tune(tmp_path / "s", plan(trials=5, confirm_seeds=1, top=1), Pretended())
    assert sum(more["trials"].values()) == 5
    with pytest.raises(UsageError, match="holds no study"):
        Tuner(tmp_path / "empty", None, Pretended)


@pytest.mark.parametrize(("kills", "fate"), [(2, "complete"), (3, "fail")])
def test_a_run_that_is_killed_is_resumed_twice(kills: int, fate: str, tmp_path: Path) -> None:
    runner = Pretended(kills=kills)
    result = tune(tmp_path / "s", plan(trials=3, seeds=1, prune=False, confirm_seeds=1, top=1), runner)
    assert result["trials"] == {"complete": 3} if fate == "complete" else {"complete": 2, "fail": 1}
    assert [c.folder for c in runner.started[:3]] == [runner.started[0].folder] * 3


# ------------------------------------------------------------------------------------------------------ real processes
SMALL = ["num_envs=2", "horizon=32", "minibatch_size=32", "epochs=1", "hidden=[8]", "run.final_episodes=4"]
SMALL += ["run.eval_episodes=2"]


def real(**changes: Any) -> Plan:
    base = {"steps": 1024, "trials": 2, "seeds": 1, "top": 1, "confirm_seeds": 1, "evaluations": 2}
    return plan(**{"settings": tuple(SMALL)} | base | changes)


@pytest.mark.slow
def test_a_real_study_is_stopped_killed_and_gone_on_with(tmp_path: Path) -> None:
    """SIGTERM to the driver: exit code 75, the run has a checkpoint. kill -9: its run ends by itself."""
    folder = tmp_path / "s"
    args = ["tune", "--algo", "ppo", "--env", "probe:both", "--param", "lr=log:1e-4:1e-2", "--out", str(folder)]
    args += [
        "--steps",
        "60000",
        "--trials",
        "2",
        "--seeds",
        "1",
        "--top",
        "1",
        "--confirm-seeds",
        "1",
        "--evaluations",
        "2",
    ]
    args += [x for s in SMALL for x in ("--set", s)]
    code = "import sys; from rlctl.cli import main; sys.argv[0] = 'rlctl'; main()"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, *args], env={**os.environ, "OMP_NUM_THREADS": "1"})

    def wait_for(what: str, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 200
        while not list(folder.glob(what)):
            assert process.poll() is None and time.monotonic() < end, what
            time.sleep(0.05)

    process = start()
    wait_for("trials/0000/*/s0/metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    run = next(folder.glob("trials/0000/*/s0"))
    assert experiment.read_json(run / "run.json")["status"] in ("preempted", "done")

    process = start()
    time.sleep(3)
    process.kill()
    process.wait()
    result = Tuner(
        folder, None, lambda: local(2)
    ).run()  # would be refused if the run of the killed study still held its lock
    assert result["trials"] == {"complete": 2}
    assert all(r["fresh_mean"] is not None for r in result["configurations"])


@pytest.mark.slow
def test_a_signal_stops_the_study_in_this_process(tmp_path: Path) -> None:
    tuner = Tuner(tmp_path / "s", real(), local, poll=0.01)
    tuner._stop = True
    with pytest.raises(StudyInterrupted, match="go on with"):
        tuner.run()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray", "slurm"])
def test_a_study_on_every_executor(name: str, tmp_path: Path) -> None:
    """A run whose process is killed is resumed, and ends like one that nobody disturbed."""
    if name != "local":
        pytest.importorskip("ray" if name == "ray" else "submitit")
    folder, killed = tmp_path / "s", []

    class Sabotaged(ExecutorRunner):
        def ended(self, id: str) -> int | None:
            if not killed and (Path(id) / "checkpoints" / "latest").exists():
                for p in psutil.process_iter(["cmdline"]):
                    if "rlctl.bench.worker" in " ".join(p.info["cmdline"] or []) and folder_of(p) == id:
                        p.kill()
                        killed.append(id)
            return super().ended(id)

    def folder_of(p: psutil.Process) -> str:
        try:
            return next((str(Path(f.path).parent) for f in p.open_files() if f.path.endswith("metrics.jsonl")), "")
        except psutil.Error:
            return ""

    options: dict[str, Any] = {"slurm": {"cluster": "local", "folder": folder}}.get(name, {})
    p = real(steps=12_000, trials=1, settings=(*SMALL, "run.checkpoint_every=1000"))
    result = Tuner(folder, p, lambda: Sabotaged(executors.make(name, slots=1, threads=1, **options))).run()
    assert result["trials"] == {"complete": 1}
    (run,) = map(Path, killed)
    experiment.train(experiment.read_settings(run), tmp_path / "whole", quiet=True)
    finals = [experiment.read_json(x / "run.json")["final"] for x in (run, tmp_path / "whole")]
    assert finals[0] == finals[1]
