"""What each verb prints and does when all is well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import PPO, QUICK, SAC, Cli
from safetensors.torch import load_file

from rlctl import agents, checkpoint, experiment
from rlctl.config import as_plain
from rlctl.evaluate import evaluate
from rlctl_envs import make

VERBS = ["train", "resume", "eval", "report", "compare", "plot", "tune", "export", "video", "check", "new"]
VERBS += ["algos", "envs", "config", "doctor"]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
"""All but tab and newline: a progress bar's carriage returns and escapes."""
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def weights(folder: Path) -> bytes:
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    return (newest / "agent.safetensors").read_bytes()


def jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- help
def test_help_of_every_verb(cli: Cli) -> None:
    top = cli("--help")
    assert top.code == 0
    assert cli().code == 2
    for verb in VERBS:
        assert f" {verb} " in top.out
        r = cli(verb, "--help")
        assert (r.code, r.err) == (0, "")
        options = re.findall(r"--[a-z][a-z-]+", r.out)
        assert "--help" in options
        first = next(line for line in r.out.splitlines() if line.strip() and "Usage" not in line)
        assert len(first.split()) > 4, f"{verb} does not say what it does"
    text = cli("train", "--help").out
    assert text.count("rlctl train --algo") >= 4
    assert "75" in text


# -------------------------------------------------------------------------------------------------------------- json
@pytest.mark.parametrize(
    ("args", "key"),
    [
        (["algos"], "algorithms"),
        (["envs"], "tasks"),
        (["config", "sac"], "settings"),
        (["config", "ppo", "--env", "Hopper"], "settings"),
    ],
)
def test_json_of_listings(args: list[str], key: str, cli: Cli) -> None:
    r = cli(*args, "--json")
    assert r.json[key]
    assert r.err == ""
    plain = cli(*args)
    assert plain.code == 0
    assert CONTROL.search(plain.out) is None
    for row in r.json[key]:
        assert str(row.get("name") or row.get("key")) in plain.out


def test_json_of_doctor(cli: Cli) -> None:
    r = cli("doctor", "--json")
    assert r.json["ok"]
    assert {c["name"] for c in r.json["checks"]} >= {"simulator", "learning", "disk"}


def test_every_setting_has_a_meaning(cli: Cli) -> None:
    for algo in (row["name"] for row in cli("algos", "--json").json["algorithms"]):
        rows = cli("config", algo, "--json").json["settings"]
        assert [r["key"] for r in rows if not r["meaning"]] == []
        assert "run.keep" in {r["key"] for r in rows}


def test_config_says_whether_a_task_has_a_packaged_one(cli: Cli) -> None:
    assert (
        "* differs from the default: set by the packaged config for Hopper"
        in cli("config", "ppo", "--env", "Hopper").out
    )
    assert "The packaged config for Hopper takes the defaults." in cli("config", "mdpo-off", "--env", "Hopper").out
    none = cli("config", "sac", "--env", "Hopper")
    assert none.code == 0
    assert "There is no packaged config of sac for Hopper: these are the defaults" in none.out
    assert "packaged" not in cli("config", "sac").out
    tuned = {a: cli("config", a, "--env", "Hopper", "--json").json["packaged"] for a in ("ppo", "mdpo-off", "sac")}
    assert tuned == {"ppo": True, "mdpo-off": True, "sac": False}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_packaged_config_is_valid(file: Path) -> None:
    algo = file.parent.name
    data = {"data": "any.npz"} if "data" in agents.get(algo).sources() else {}
    settings = experiment.resolve(algo, [data | {"env": file.stem.replace("dmc-", "dmc:")}])
    values = experiment.load_yaml(file)
    assert values["agent"]
    assert {k: as_plain(settings.agent)[k] for k in values["agent"]} == values["agent"]


# ------------------------------------------------------------------------------------------------------------ output
def test_quiet_prints_nothing_and_the_log_tells_all(cli: Cli, tmp_path: Path) -> None:
    sets = [*PPO, "run.eval_every=40"]
    r = cli.train("--algo", "ppo", "--env", "probe:both", "--steps", "80", "--out", "a", "--quiet", sets=sets)
    assert (r.code, r.out, r.err) == (0, "", "")
    r = cli("resume", "a", "--steps", "120", "--quiet")
    assert (r.code, r.out, r.err) == (0, "", "")
    said = (tmp_path / "a" / "console.log").read_text()
    assert "evaluation:" in said
    assert "resumed from step_000000000080" in said


def test_piped_output_is_plain(cli: Cli, tmp_path: Path) -> None:
    r = cli.train("--algo", "sac", "--env", "probe:both", "--steps", "60", "--out", "a", sets=SAC)
    assert r.code == 0
    for text in (r.out, r.err, (tmp_path / "a" / "console.log").read_text()):
        assert text
        assert CONTROL.search(text) is None
    # results on stdout, progress on stderr, and the commands it names work as printed
    assert "final evaluation:" in r.out
    assert "replay buffer:" in r.err
    command = next(line for line in r.out.splitlines() if line.startswith("evaluate again")).split("rlctl ")[1]
    assert cli(*command.split(), "--episodes", "2").code == 0


def test_default_folder_never_collides(cli: Cli, tmp_path: Path) -> None:
    args = ("--algo", "ppo", "--env", "hopper", "--steps", "20", "--seed", "4", "--quiet")
    for _ in range(2):
        assert cli.train(*args, sets=PPO).code == 0
    assert cli.train(*args, "--set", "gamma=0.9", sets=PPO).code == 0
    names = sorted(p.name for p in (tmp_path / "runs" / "ppo" / "Hopper-v5").iterdir())
    keys = {re.fullmatch(r"s4-([0-9a-f]{8})(-2)?", n).group(1) for n in names}  # type: ignore[union-attr]
    assert len(names) == 3
    assert len(keys) == 2


# ---------------------------------------------------------------------------------------------------- the run itself
def test_config_file_repeats_a_run(cli: Cli, tmp_path: Path, sac_run: Path) -> None:
    assert cli("train", "--config", sac_run / "config.yaml", "--out", "again", "--quiet").code == 0
    assert weights(tmp_path / "again") == weights(sac_run)
    assert jsonl(tmp_path / "again" / "eval.jsonl") == jsonl(sac_run / "eval.jsonl")
    assert (tmp_path / "again" / "config.yaml").read_text() == (sac_run / "config.yaml").read_text()
    # flags are stronger than the file, and another seed is another run
    assert cli("train", "--config", sac_run / "config.yaml", "--seed", "6", "--out", "other", "--quiet").code == 0
    assert weights(tmp_path / "other") != weights(sac_run)
    a, b = (experiment.read_json(f / "run.json") for f in (sac_run, tmp_path / "other"))
    assert a["config_key"] == b["config_key"]


def test_precedence(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("algo: ppo\nenv: probe:both\ngamma: 0.5\nagent:\n  lam: 0.5\n  clip: 0.5\n")
    r = cli.train(
        "--config", "c.yaml", "--steps", "20", "--out", "a", "--quiet", sets=[*PPO, "agent.clip=0.3", "steps=999"]
    )
    assert r.code == 0, r.err
    agent = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["agent"]
    assert (agent["gamma"], agent["lam"], agent["clip"], agent["steps"]) == (0.5, 0.5, 0.3, 20)


def test_evaluation_does_not_touch_training(cli: Cli, tmp_path: Path) -> None:
    for algo, sets in (("ppo", PPO), ("sac", SAC)):
        results = set()
        for name, extra in {
            "never": ["run.eval_every=0", "run.final_episodes=0"],
            "often": ["run.eval_every=7"],
            "sampled": ["run.eval_every=7", "run.eval_stochastic=true"],
        }.items():
            folder = tmp_path / f"{algo}-{name}"
            args = ("--algo", algo, "--env", "Hopper", "--steps", "100", "--out", folder, "--quiet")
            assert cli.train(*args, sets=[*sets, *extra]).code == 0
            results.add(weights(folder))
        assert len(results) == 1, algo


def test_steps_smaller_than_a_rollout_and_not_divisible(cli: Cli, tmp_path: Path) -> None:
    args = ("--algo", "ppo", "--env", "probe:both", "--quiet")
    assert cli.train(*args, "--steps", "7", "--out", "a", sets=PPO).code == 0
    assert cli.train(*args, "--steps", "47", "--out", "b", sets=PPO).code == 0
    # a rollout is 20 steps and is never cut: the run ends with the rollout that reaches its total
    assert [experiment.read_json(tmp_path / n / "run.json")["progress"] for n in "ab"] == [20, 60]
    sets = [*SAC, "num_envs=8"]
    assert (
        cli.train("--algo", "sac", "--env", "probe:both", "--steps", "50", "--out", "c", "--quiet", sets=sets).code == 0
    )
    assert experiment.read_json(tmp_path / "c" / "run.json")["progress"] == 56


def test_resume_of_a_finished_run(cli: Cli, tmp_path: Path, ppo_run: Path) -> None:
    shutil.copytree(ppo_run, tmp_path / "run")
    r = cli("resume", "run")
    assert r.code == 2
    assert "--steps" in r.err
    r = cli("resume", "run", "--steps", "100")
    assert r.code == 2
    assert "200 steps already" in r.err
    assert cli("resume", "run", "--steps", "260", "--quiet").code == 0
    assert experiment.read_json(tmp_path / "run" / "run.json")["progress"] == 260
    steps = [r["env_steps"] for r in jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps))  # no row twice, none out of order


def test_two_processes_on_one_run(cli: Cli, tmp_path: Path, ppo_run: Path) -> None:
    shutil.copytree(ppo_run, tmp_path / "run")
    hold = "import fcntl, sys; f = open('run/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    with subprocess.Popen(
        [sys.executable, "-c", hold + "sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
        r = cli("resume", "run", "--steps", "900")
        assert r.code == 2
        assert "run is in use by another process" in r.err
        assert {p: p.read_bytes() for p in before} == before  # nothing of the other's run is touched
        assert cli("eval", "run", "--episodes", "2").code == 0  # looking is free
        other.communicate()
    assert cli("resume", "run", "--steps", "220", "--quiet").code == 0


def test_from_another_folder_and_through_a_link(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    args = ("--algo", "ppo", "--env", "probe:both", "--steps", "40", "--quiet")
    assert cli.train(*args, "--out", "link/a", sets=PPO).code == 0
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert cli("resume", "../a", "--steps", "60", "--quiet").code == 0
    assert cli("eval", "../a", "--episodes", "2").code == 0
    assert not (tmp_path / "deep" / "er" / "runs").exists()


USER_FILE = '''
from rlctl.agents.sac import SAC
from rlctl.types import Batch


class MyAgent(SAC):
    """SAC with a small twist."""

    def critic_loss(self, b: Batch):
        return 2 * super().critic_loss(b)
'''


def test_a_users_agent_in_one_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cli_user_pkg").mkdir()
    (tmp_path / "cli_user_pkg" / "my_file.py").write_text(USER_FILE)
    algo = "cli_user_pkg.my_file:MyAgent"
    r = cli.train("--algo", algo, "--env", "Pendulum-v1", "--steps", "60", "--out", "a", "--quiet", sets=SAC)
    assert (r.code, r.err) == (0, "")
    assert cli("eval", "a", "--episodes", "2", "--json").json["algo"] == algo
    assert cli("config", algo, "--json").json["settings"]
    assert cli("resume", "a", "--steps", "80", "--quiet").code == 0
    # where the file is not in reach, the message says where it looked
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("cli_user_pkg", "cli_user_pkg.my_file"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    r = cli("eval", "../a")
    assert r.code == 2
    assert "no module 'cli_user_pkg.my_file'" in r.err


def test_pendulum_resumes_with_fresh_episodes(cli: Cli, tmp_path: Path) -> None:
    assert cli.train("--algo", "sac", "--env", "Pendulum-v1", "--steps", "60", "--out", "a", sets=SAC).code == 0
    r = cli("resume", "a", "--steps", "80")
    assert r.code == 0
    assert "resumed from" in r.err
    evaluated = jsonl(tmp_path / "a" / "eval.jsonl")
    assert [e["final"] for e in evaluated[-2:]] == [True, True]


# -------------------------------------------------------------------------------------------------------- evaluation
def test_eval_is_what_it_says(cli: Cli, ppo_run: Path) -> None:
    r = cli("eval", ppo_run, "--episodes", "5", "--seed", "1", "--json").json
    assert len(r["returns"]) == len(r["lengths"]) == r["episodes"] == 5
    assert r["return_mean"] == pytest.approx(fmean(r["returns"]))
    assert r["deterministic"]
    assert r["checkpoint"] == "latest"
    assert r == cli("eval", ppo_run, "--episodes", "5", "--seed", "1", "--json").json
    assert r["returns"] != cli("eval", ppo_run, "--episodes", "5", "--seed", "2", "--json").json["returns"]
    plain = cli("eval", ppo_run, "--episodes", "5", "--seed", "1")
    assert f"{r['return_mean']:.1f}" in plain.out
    assert plain.out.count("\n") == 1


def test_eval_stochastic(cli: Cli, ppo_run: Path) -> None:
    args = ("eval", ppo_run, "--episodes", "4", "--json")
    sampled = cli(*args, "--stochastic").json
    assert not sampled["deterministic"]
    assert sampled["returns"] != cli(*args).json["returns"]
    assert sampled == cli(*args, "--stochastic").json


def test_eval_best_is_the_best(cli: Cli, ppo_run: Path) -> None:
    note = json.loads((ppo_run / "checkpoints" / "best" / "note.json").read_text())
    seen: dict[int, list[float]] = {}
    for row in jsonl(ppo_run / "eval.jsonl"):
        if row["deterministic"] and not row["final"]:
            seen.setdefault(row["env_steps"], []).append(row["return"])
    means = {step: fmean(returns) for step, returns in seen.items()}
    assert note["env_steps"] == max(means, key=lambda s: means[s])
    assert note["eval_return_mean"] == max(means.values())
    best = cli("eval", ppo_run, "--checkpoint", "best", "--episodes", "3", "--json").json
    assert best["checkpoint"] == "best"
    final = experiment.read_json(ppo_run / "run.json")["final"]
    assert final["best_eval_mean"] == note["eval_return_mean"]
    assert final["eval_episodes_used_total"] == len(jsonl(ppo_run / "eval.jsonl")) - 2 * 2  # less the final ones


def test_normalisers_stand_still_in_evaluation(ppo_run: Path) -> None:
    agent, _ = experiment.load_agent(ppo_run)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    env = make("Hopper", 3, seed=0)
    for stochastic in (False, True):
        evaluate(agent, env, 3, stochastic=stochastic)
    env.close()
    assert all(torch.equal(v, before[k]) for k, v in agent.state_dict().items())
    saved = load_file(ppo_run / "checkpoints" / "best" / "agent.safetensors")
    assert saved.keys() == before.keys()  # the statistics travel with the best agent, not beside it
    older, newer = (load_file(p / "agent.safetensors") for p in sorted((ppo_run / "checkpoints").glob("step_*")))
    norm = next(k for k in saved if k.startswith("obs_norm.mean"))
    assert not torch.equal(older[norm], newer[norm])  # each checkpoint has its own


def test_final_evaluation_of_one_seed_is_repeatable_in_another_run(cli: Cli, tmp_path: Path, sac_run: Path) -> None:
    # the same initial states whatever the agent: the first observation, not the return, decides
    rows = [r for r in jsonl(sac_run / "eval.jsonl") if r["final"]]
    assert len(rows) == 2
    quick = [x for s in QUICK for x in ("--set", s)]
    r = cli("train", "--config", sac_run / "config.yaml", *quick, "--set", "run.eval_every=0", "--out", "b", "--quiet")
    assert r.code == 0
    assert [r["return"] for r in jsonl(tmp_path / "b" / "eval.jsonl")] == [r["return"] for r in rows]
