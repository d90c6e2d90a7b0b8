"""Suites: what they mean, what is refused and in which words, keys, and that those that are shipped hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench_helpers import TINY, TINY_PPO, plan, write

from rlctl import agents
from rlctl.bench import suite
from rlctl.bench.suite import folder_name
from rlctl.errors import UsageError

SHIPPED = sorted((Path(__file__).parents[2] / "benchmarks" / "suites").glob("*.yaml"))


def test_every_layer_has_its_place(tmp_path: Path) -> None:
    p = plan(
        tmp_path,
        seeds=[4, 9],
        budgets={"on_policy": "1e3", "off_policy": 500},  # the string that YAML 1.1 reads
        evaluation={"evaluations": 7, "episodes": 3, "final_episodes": 11, "stochastic": True},
        set={"gamma": 0.9, "run.keep": 5},
        tasks=["hopper", {"env": "probe:both", "name": "both", "budgets": {"on_policy": 64}, "set": {"gamma": 0.8}}],
        algorithms=[
            {"algo": "ppo", "name": "mine", "set": {"lr": "1e-3"}, "on": {"Hopper": {"gamma": 0.7}}},
            {"algo": "sac", "steps": 80, "only": ["both"], "set": {"hidden": [8, 8]}},
        ],
    )
    seen = [(c.column, c.source, c.seed, c.steps, c.settings.agent.gamma) for c in p.cells]
    assert seen == [
        ("mine", "Hopper-v5", 4, 1000, 0.7),
        ("mine", "both", 4, 64, 0.8),
        ("sac", "both", 4, 80, 0.8),
        ("mine", "Hopper-v5", 9, 1000, 0.7),
        ("mine", "both", 9, 64, 0.8),
        ("sac", "both", 9, 80, 0.8),
    ]
    first = p.cells[0].settings
    assert first.agent.lr == 1e-3
    assert first.agent.num_envs == 32  # of the config shipped for Hopper
    assert (first.run.evaluations, first.run.eval_episodes, first.run.final_episodes) == (7, 3, 11)
    assert (first.run.eval_stochastic, first.run.keep, first.run.threads) == (True, 5, 1)
    assert p.cells[0].id == f"mine/Hopper-v5/s4-{p.cells[0].key}"


def test_the_key_is_what_decides_the_result(tmp_path: Path) -> None:
    def key(**changes: Any) -> str:
        return plan(tmp_path, **changes).cells[0].key

    same = key()
    assert key(seeds=[7]) == same
    assert key(set={"run.tensorboard": True, "run.checkpoint_every": 8}) == same
    assert key(name="other") == same
    assert key(algorithms=[{"algo": "ppo", "name": "x", "set": TINY_PPO}]) == same
    different = [
        key(set={"gamma": 0.5}),
        key(budgets={"on_policy": 256}),
        key(tasks=["probe:action"]),
        key(evaluation=TINY["evaluation"] | {"final_episodes": 3}),
    ]
    assert len({same, *different}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algoritms": []}, "a suite has no key 'algoritms': did you mean 'algorithms'"),
        ({"algorithms": ["ppp"]}, "unknown algorithm 'ppp': did you mean 'ppo'"),
        ({"algorithms": ["sb3:pppo"]}, "did you mean 'sb3:ppo'"),
        ({"tasks": ["Hoppper"]}, "did you mean 'Hopper'"),
        ({"algorithms": [{"algo": "ppo", "set": {"lrr": 1}}]}, "no key 'lrr': did you mean 'lr'"),
        ({"algorithms": [{"algo": "ppo", "sets": {}}]}, "algorithm 1 has no key 'sets': did you mean 'set'"),
        ({"algorithms": [{"set": {}}]}, "algorithm 1: algo"),
        ({"algorithms": [{"algo": "ppo", "only": ["Walker"]}]}, "'Walker', which is no source of the suite"),
        ({"algorithms": [{"algo": "ppo", "on": {"prob:both": {}}}]}, "did you mean 'probe:both'"),
        ({"algorithms": ["ppo", "ppo"]}, "two algorithms are called ppo"),
        ({"tasks": ["Hopper", "hopper"]}, "two sources are called Hopper-v5"),
        ({"tasks": []}, "there is no source"),
        ({"algorithms": []}, "there is no algorithm"),
        ({"algorithms": ["iql"]}, "iql learns from datasets, and the suite has none"),
        ({"datasets": ["x.hdf5"]}, "no algorithm of the suite learns from x.hdf5"),
        ({"budgets": {"onpolicy": 5}}, "did you mean 'on_policy'"),
        ({"seeds": [1, 1]}, "different non-negative integers, got [1, 1]"),
        ({"seeds": 0}, "seeds are a number of them"),
        ({"seeds": "five"}, "seeds.int='five' is not allowed"),
        ({"evaluation": {"episode": 3}}, "did you mean 'episodes'"),
        ({"set": {"run.final_episodes": 3}}, "the same for all cells"),
        ({"set": {"seed": 3}}, "has a place of its own"),
        ({"tasks": [{"env": "Hopper", "set": {"env_options.phisics": "native"}}]}, "phisics"),
        ({"algorithms": [{"algo": "ppo", "set": {"num_envs": 0}}]}, "num_envs=0 is not allowed"),
        # nothing but the agent itself knows this
        (
            {"algorithms": [{"algo": "ppo", "set": {"num_envs": 3, "horizon": 5, "minibatch_size": 64}}]},
            "ppo on probe:both",
        ),
    ],
)
def test_mistakes_are_found_before_anything_starts(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as e:
        plan(tmp_path, **changes)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_on_is_a_key_and_no_name_of_true(tmp_path: Path) -> None:
    """As YAML 1.1 would have it."""
    ppo = "{algo: ppo, on: {Hopper: {lr: 0.5}}}"
    (tmp_path / "a.yaml").write_text(
        f"{{seeds: 1, tasks: [Hopper], evaluation: {{stochastic: true}}, algorithms: [{ppo}]}}"
    )
    (cell,) = suite.load(str(tmp_path / "a.yaml")).cells
    assert cell.settings.agent.lr == 0.5
    assert cell.settings.run.eval_stochastic is True


def test_agents_that_may_have_data_meet_the_datasets_they_name(tmp_path: Path) -> None:
    p = plan(
        tmp_path,
        tasks=["Hopper"],
        datasets=[{"data": str(tmp_path / "mine.npz"), "env": "Hopper", "name": "mine"}],
        algorithms=["sac", "bc", {"algo": "rlpd", "only": ["mine"]}, {"algo": "rlpd", "name": "rlpd-alone"}],
    )
    met = {c.column: (c.source, c.settings.data is not None, c.settings.env) for c in p.cells}
    assert met["rlpd"] == ("mine", True, "Hopper-v5")
    assert met["rlpd-alone"] == met["sac"] == ("Hopper-v5", False, "Hopper-v5")
    assert met["bc"] == met["rlpd"]
    with pytest.raises(UsageError, match="sac learns from tasks"):
        plan(
            tmp_path,
            tasks=["Hopper"],
            datasets=["hopper-medium-v2"],
            algorithms=[{"algo": "sac", "only": ["hopper-medium-v2"]}],
        )


def test_the_weights_of_rebrac_are_those_of_each_set() -> None:
    cells = [c for c in suite.load("offline-d4rl").cells if c.column == "rebrac" and c.seed == 0]
    found = {c.source: (c.settings.agent.actor_bc, c.settings.agent.critic_bc) for c in cells}
    assert found["hopper-medium-replay-v2"] == (0.05, 0.5)
    assert found["halfcheetah-medium-v2"] == (0.001, 0.01)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("a: [")
    for name, message in (
        ("list.yaml", "does not hold a mapping"),
        ("broken.yaml", "not valid YAML"),
        ("none.yaml", "cannot read the suite"),
    ):
        with pytest.raises(UsageError, match=message):
            suite.load(str(tmp_path / name))
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        suite.load("smok")


def test_datasets_that_are_not_here_are_named_all(tmp_path: Path) -> None:
    p = plan(
        tmp_path,
        tasks=[],
        datasets=["hopper-medium-v2", {"data": str(tmp_path / "mine.npz"), "name": "mine"}],
        algorithms=["bc"],
    )
    assert [c.source for c in p.cells] == ["hopper-medium-v2", "mine"]
    assert "rlctl data download hopper-medium-v2" in p.missing[0]
    assert "mine.npz" in p.missing[1]


def test_other_seeds(tmp_path: Path) -> None:
    assert [c.seed for c in suite.load(str(write(tmp_path)), seeds=[3, 5]).cells] == [3, 5]


def test_folder_names() -> None:
    names = ["sb3:ppo", "mujoco/hopper/medium-v0", "/data/big/mine.hdf5", "Hopper-v5"]
    assert [folder_name(n) for n in names] == ["sb3.ppo", "mujoco-hopper-medium-v0", "mine", "Hopper-v5"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_shipped_suites_hold(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load(file.read_text())
    if "dmc:" in str(raw.get("tasks")):
        pytest.importorskip("dm_control")
    if any("sb3:" in str(a) for a in raw["algorithms"]):
        pytest.importorskip("sb3_contrib")
    p = suite.load(file.stem)
    assert p.description
    assert len(p.cells) == len({c.id for c in p.cells})
    asked = {a if isinstance(a, str) else a["algo"] for a in raw["algorithms"]}
    assert {c.settings.algo for c in p.cells} == asked <= {*agents.names(), *agents.BASELINES}
    assert len({dataclasses.replace(c.settings.run, tensorboard=True) for c in p.cells}) == 1
