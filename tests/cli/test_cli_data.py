"""`rlctl data`, and what `rlctl train --data` refuses before it trains."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
import yaml
from cli_helpers import Cli, Result

from rlctl.cli.data import histogram
from rlctl.data.collect import num_worlds
from rlctl.data.dataset import load_dataset

SMALL = ["hidden=[8, 8]", "batch_size=8"]


@pytest.fixture(autouse=True)
def roots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))


def refused(r: Result, *words: str, code: int = 2) -> None:
    assert r.code == code, r
    assert r.err.startswith("rlctl: ")
    assert r.err.count("\n") == 1, r.err
    assert [w for w in words if w not in r.err] == []


def npz(path: Path, n: int = 40, obs: int = 11, act: int = 3, **change: Any) -> Path:
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.normal(size=(n, obs)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, act)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.arange(n) % 10 == 9,
        "timeouts": np.zeros(n, bool),
    }
    np.savez(path, **(columns | change))
    return path


def test_collect_random_and_look_at_it(cli: Cli, tmp_path: Path) -> None:
    make = ["data", "collect", "--env", "hopper", "--policy", "random", "--steps", "200", "--num-envs", "4"]
    r = cli(*make, "--id", "mine/hopper-random-v0", "--author", "me", "--seed", "3")
    assert r.code == 0, r.err
    assert "mine/hopper-random-v0" in r.out
    theirs = minari.load_dataset("mine/hopper-random-v0")
    spec = theirs.spec
    assert (spec.env_spec.id, spec.action_space.shape, spec.observation_space.shape) == ("Hopper-v5", (3,), (11,))
    assert theirs.total_steps >= 200
    meta = theirs.storage.metadata
    assert (meta["author"], meta["algorithm_name"]) == ({"me"}, "random")
    assert (meta["ref_min_score"], meta["ref_max_score"]) == (-20.272305, 3234.3)
    assert "seed 3" in meta["description"]
    assert any(x.startswith("mujoco==") for x in meta["requirements"])
    for e in theirs.iterate_episodes():  # whole episodes only
        assert e.terminations[-1] or e.truncations[-1]
        assert not (e.terminations[:-1] | e.truncations[:-1]).any()
        assert len(e.observations) == len(e.actions) + 1
        assert set(np.unique(e.infos["policy"])) == {0}
    # the simulator agrees that these actions lead from one observation to the next: nothing is shifted by a row
    again = cli(*make, "--id", "mine/hopper-random-v1", "--seed", "3")
    assert again.code == 0
    assert load_dataset("mine/hopper-random-v0").sha256 == load_dataset("mine/hopper-random-v1").sha256

    rows = cli("data", "list", "--json").json["datasets"]
    assert [(x["id"], x["format"], x["env"]) for x in rows] == [
        ("mine/hopper-random-v0", "minari-hdf5", "Hopper-v5"),
        ("mine/hopper-random-v1", "minari-hdf5", "Hopper-v5"),
    ]
    assert rows[0]["transitions"] == theirs.total_steps
    assert cli("data", "list", "--prefix", "other/").out.count("\n") == 2
    info = cli("data", "info", "mine/hopper-random-v0", "--json").json
    assert (info["dataset_version"], info["benchmark"], info["score_reference"]) == (0, "own", "hopper")
    shown = cli("data", "info", "mine/hopper-random-v0")
    assert shown.code == 0
    assert "episode returns" in shown.out
    assert "█" in shown.out
    found = cli("data", "verify", "mine/hopper-random-v0")
    assert (found.code, found.out) == (0, "mine/hopper-random-v0: nothing found\n")


def test_collected_transitions_are_the_simulators_own(cli: Cli) -> None:
    """Gymnasium, set to a stored state, answers the stored action with the stored successor and reward."""
    import gymnasium

    r = cli(
        "data", "collect", "--env", "InvertedPendulum", "--policy", "random", "--steps", "30", "--id", "mine/p-v0",
        "--set", "physics=native",
    )  # fmt: skip
    assert r.code == 0, r.err
    theirs = minari.load_dataset("mine/p-v0")
    assert theirs.spec.action_space.high[0] == 3.0  # the environment's own unit, not ours
    env: Any = gymnasium.make("InvertedPendulum-v5").unwrapped
    env.reset()
    checked = 0
    for e in theirs.iterate_episodes():
        for t in range(len(e.actions)):
            env.set_state(e.observations[t, :2].astype(float), e.observations[t, 2:].astype(float))
            obs, reward, terminated, _, _ = env.step(e.actions[t])
            np.testing.assert_allclose(obs, e.observations[t + 1], atol=1e-4)
            assert (reward, terminated) == (e.rewards[t], e.terminations[t])
            checked += 1
    assert checked >= 30
    assert float(load_dataset("mine/p-v0").rows.action.abs().max()) <= 1


def test_collect_a_mixture_of_checkpoints(cli: Cli, sac_run: Path) -> None:
    steps = sorted(int(p.name[5:]) for p in (sac_run / "checkpoints").glob("step_*"))
    r = cli(
        "data", "collect", "--policy", sac_run, "--mix", f"{sac_run}@{steps[0]}=0.25", "--mix", "random=0.25",
        "--steps", "400", "--num-envs", "2", "--id", "mine/mixed-v0", "--quiet",
    )  # fmt: skip
    assert (r.code, r.out, r.err) == (0, "", "")
    theirs = minari.load_dataset("mine/mixed-v0")
    assert theirs.storage.metadata["algorithm_name"] == "sac+random"
    assert theirs.spec.env_spec.id == "Hopper-v5"  # the run's own
    counts = np.bincount([int(e.infos["policy"][0, 0]) for e in theirs.iterate_episodes() for _ in e.rewards])
    assert len(counts) == 3
    assert (counts >= [200, 100, 100]).all()
    best = cli(
        "data", "collect", "--policy", f"{sac_run}@best", "--deterministic", "--steps", "20", "--id", "mine/b-v0"
    )
    assert best.code == 0, best.err


@pytest.mark.parametrize(("shares", "want"), [(["--mix", "random=0.25"], [75, 25]), ([], [100])])
def test_long_episodes_do_not_make_a_dataset_many_times_as_long(
    shares: list[str], want: list[int], cli: Cli, tmp_path: Path
) -> None:
    """Sixteen worlds of episodes that never end early would play 16 episodes of 25 steps for the first step alone."""
    r = cli(
        "data", "collect", "--env", "HalfCheetah", "--policy", "random", *shares, "--steps", "100",
        "--set", "episode_len=25", "--id", "mine/c-v0",
    )  # fmt: skip
    assert r.code == 0, r.err
    theirs = minari.load_dataset("mine/c-v0")
    played = np.bincount([int(e.infos["policy"][0, 0]) for e in theirs.iterate_episodes() for _ in e.rewards])
    assert played.tolist() == want


@pytest.mark.parametrize("budget", [1, 7, 100, 999, 1000, 1001, 16_000, 16_001, 20_000, 200_000])
def test_full_episodes_go_over_the_budget_by_less_than_an_episode_a_world(budget: int) -> None:
    limit, most = 1000, 16
    n = num_worlds(budget, limit, most)
    rounds = -(-budget // (n * limit))
    assert 1 <= n <= most
    assert rounds * n * limit - budget < rounds * limit


def test_collect_keeps_the_settings_of_the_task(cli: Cli) -> None:
    options = {"physics": "native", "forward_reward_weight": 0.5, "episode_len": 30}
    make = ["data", "collect", "--env", "HalfCheetah", "--policy", "random", "--steps", "30", "--id", "mine/c-v0"]
    assert cli(*make, *(x for k, v in options.items() for x in ("--set", f"{k}={v}"))).code == 0
    theirs = minari.load_dataset("mine/c-v0")
    made = theirs.recover_environment().spec
    assert (made.kwargs["forward_reward_weight"], made.max_episode_steps) == (0.5, 30)
    assert "ref_max_score" not in theirs.storage.metadata  # of the task with its own reward
    data = load_dataset("mine/c-v0")
    assert (data.env_id, data.origin.env_options) == ("HalfCheetah-v5", options)
    assert data.labels()["benchmark"] == "own"
    r = cli.train("--algo", "bc", "--data", "mine/c-v0", "--steps", "2", "--out", "run", sets=SMALL)
    assert r.code == 0, r.err
    record = json.loads(Path("run/run.json").read_text())
    assert (record["eval_env"], record["eval_env_options"]) == ("HalfCheetah-v5", options)
    # and so under other formats
    assert cli("data", "convert", "mine/c-v0", "--id", "mine/d-v0").code == 0
    assert load_dataset("mine/d-v0").origin.env_options == options
    assert cli("data", "convert", "mine/c-v0", "--out", "e.npz").code == 0
    assert cli("data", "convert", "e.npz", "--id", "mine/f-v0").code == 0
    assert [load_dataset(x).labels()["benchmark"] for x in ("mine/d-v0", "e.npz", "mine/f-v0")] == ["own"] * 3


def test_collect_says_where_it_cannot_write(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "taken" / "root"))
    make = ["data", "collect", "--env", "Hopper", "--policy", "random", "--steps", "9", "--id", "mine/c-v0"]
    refused(cli(*make), "no dataset can be written into", "MINARI_DATASETS_PATH")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--id": "bad"}, ["'bad' is not a dataset id", "NAMESPACE/NAME-vK"]),
        ({"--policy": "nowhere"}, ["nowhere is not a run directory"]),
        ({"--env": "Hoper"}, ["unknown environment 'Hoper'", "Hopper"]),
        ({"--env": None}, ["no environment", "--env"]),
        ({"--mix": "random"}, ["POLICY=SHARE", "'random'"]),
        ({"--mix": "random=1.5"}, ["share between 0 and 1"]),
        ({"--mix": "random=many"}, ["share between 0 and 1"]),
        ({"--storage": "csv"}, ["no storage 'csv'", "hdf5, arrow, parquet"]),
        ({"--set": "physics=quantum"}, ["quantum"]),
        ({"--id": "a/hopper-v0"}, ["two letters or more"]),
        ({"--mix": "random=0.001"}, ["gets no step"]),
    ],
)
def test_collect_refuses(change: dict[str, str | None], words: list[str], cli: Cli, tmp_path: Path) -> None:
    options = {"--env": "Hopper", "--policy": "random", "--steps": "50", "--id": "mine/x-v0"} | change
    refused(cli("data", "collect", *[x for k, v in options.items() if v for x in (k, v)]), *words)
    assert not (tmp_path / "minari").exists()


def test_collect_refuses_equal_reference_scores(cli: Cli) -> None:
    make = ["data", "collect", "--env", "Hopper", "--policy", "random", "--steps", "5", "--id", "mine/x-v0"]
    refused(cli(*make, "--ref-scores", "5", "5"), "two different returns", "5 twice")


def test_collect_refuses_an_agent_of_another_task_and_a_taken_id(cli: Cli, sac_run: Path) -> None:
    make = ["data", "collect", "--steps", "20", "--id", "mine/x-v0", "--policy"]
    refused(
        cli(*make, sac_run, "--env", "Walker2d"), "takes observations of 11", "Walker2d-v5 has 17 and 6", "Hopper-v5"
    )
    refused(cli(*make, f"{sac_run}@7"), "has no checkpoint '7'", "120")
    refused(cli(*make, "random", "--env", "Hopper", "--mix", "random=0.6", "--mix", "random=0.4"), "nothing is left")
    assert cli(*make, "random", "--env", "Hopper").code == 0
    refused(cli(*make, "random", "--env", "Hopper"), "there is a dataset 'mine/x-v0'", "mine/x-v1")


def test_convert_round_trip(cli: Cli, tmp_path: Path) -> None:
    npz(tmp_path / "a.npz")
    want = load_dataset("a.npz").sha256
    assert cli("data", "convert", "a.npz", "--out", "b.hdf5").code == 0
    assert cli("data", "convert", "b.hdf5", "--id", "mine/c-v0", "--env", "Hopper", "--author", "me").code == 0
    assert cli("data", "convert", "mine/c-v0", "--out", "d.npz").code == 0
    assert [load_dataset(x).sha256 for x in ("b.hdf5", "mine/c-v0", "d.npz")] == [want] * 3
    theirs = minari.load_dataset("mine/c-v0")
    assert (theirs.spec.env_spec.id, theirs.total_episodes, theirs.total_steps) == ("Hopper-v5", 4, 40)
    pytest.importorskip("pyarrow")
    for v, storage in ((1, "arrow"), (2, "parquet")):
        assert cli("data", "convert", "mine/c-v0", "--id", f"mine/c-v{v}", "--storage", storage).code == 0
        assert load_dataset(f"mine/c-v{v}").sha256 == want
        copy = minari.load_dataset(f"mine/c-v{v}").storage.metadata
        assert (copy["author"], copy["ref_max_score"], copy["data_format"]) == ({"me"}, 3234.3, storage)


def test_convert_refuses(cli: Cli, tmp_path: Path) -> None:
    npz(tmp_path / "a.npz")
    refused(cli("data", "convert", "a.npz"), "--out", "--id")
    refused(cli("data", "convert", "a.npz", "--out", "b.csv"), "b.csv", ".npz")
    refused(cli("data", "convert", "a.npz", "--out", "a.npz"), "exists")
    refused(cli("data", "convert", "no.npz", "--out", "b.npz"), "nearest there: a.npz")
    refused(cli("data", "convert", "a.npz", "--id", "mine/x"), "is not a dataset id")
    wrong = cli("data", "convert", "a.npz", "--id", "mine/x-v0", "--env", "HalfCheetah")
    refused(wrong, "observations of 11 and actions of 3", "HalfCheetah-v5 has 17 and 6")
    refused(cli("data", "convert", "a.npz", "--out", "a.npz/b.npz"), "cannot be made", "choose another --out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz"]


def test_verify_one_line_per_finding(cli: Cli, tmp_path: Path) -> None:
    actions = np.full((40, 3), 2.0)
    npz(tmp_path / "a.npz", actions=actions, timeouts=np.arange(40) == 4)
    r = cli("data", "verify", "a.npz", "--reward-range", "-0.1", "0.1")
    assert r.code == 1
    assert r.err == ""
    lines = r.out.splitlines()
    assert [x.split(":")[0] for x in lines] == sorted(x.split(":")[0] for x in lines)
    assert [x for x in lines if x.startswith("error: action: outside [-1, 1] in 39 rows, up to 2")]
    assert [x for x in lines if x.startswith("error: reward: outside [-0.1, 0.1]")]
    found = cli("data", "verify", "a.npz", "--json")
    assert found.code == 1
    report = json.loads(found.out)
    assert report["ok"] is False
    assert {f["about"] for f in report["findings"]} >= {"action"}
    refused(cli("data", "verify", "b.npz"), "nearest there: a.npz")


def test_download_without_a_network_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(cli("data", "download", "mujoco/hopper/medium-v0"), "no network", "127.0.0.1", code=1)
    refused(cli("data", "list", "--remote", "--prefix", "mujoco/"), "no network", code=1)
    refused(cli("data", "download", "hoper-medium-v2"), "hopper-medium-v2")


@pytest.mark.parametrize("verb", ["list", "info", "verify", "collect", "convert", "download"])
def test_help_teaches_with_an_example(verb: str, cli: Cli) -> None:
    r = cli("data", verb, "--help")
    assert r.code == 0
    assert f"rlctl data {verb}" in " ".join(r.out.split()).split("Examples")[1]


def test_histogram_bars() -> None:
    lines = histogram([0, 1, 400, 200], [0.0, 0.5, 1.0, 1.5, 2.0], width=10)
    assert lines == [
        "  0 to 0.5",
        "0.5 to   1  ▏ 1",
        "  1 to 1.5  ██████████ 400",
        "1.5 to   2  █████ 200",
    ]


# --------------------------------------------------------------------------------------------------------------- train
def test_train_records_its_data(cli: Cli, tmp_path: Path) -> None:
    npz(tmp_path / "a.npz")
    sets = [*SMALL, "data_options.view=d4rl_compat", "reward=10r-5"]
    r = cli.train("--algo", "td3bc", "--data", "a.npz", "--env", "Hopper", "--steps", "20", "--out", "run", sets=sets)
    assert r.code == 0, r.err
    assert "view d4rl_compat" in r.err
    record = json.loads(Path("run/run.json").read_text())
    assert record["dataset"] == load_dataset("a.npz", view="d4rl_compat").record()
    assert record["reward_transform"] == {"reward": "10r-5: 10 * r + -5"}
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data_options"] == {"view": "d4rl_compat"}
    labels = {"dataset": "a", "dataset_version": None, "benchmark": "own"}
    assert labels.items() <= record["final"].items()
    rows = [json.loads(x) for x in Path("run/eval.jsonl").read_text().splitlines()]
    assert rows
    assert all(labels.items() <= row.items() for row in rows)
    again = cli("eval", "run", "--episodes", "2", "--json").json
    assert labels.items() <= again.items()
    more = cli("resume", "run", "--steps", "30", "--quiet")
    assert more.code == 0, more.err


def test_train_on_a_set_whose_environment_is_not_installed(cli: Cli, tmp_path: Path) -> None:
    npz(tmp_path / "a.npz")
    assert cli("data", "convert", "a.npz", "--id", "mine/c-v0").code == 0
    meta = tmp_path / "minari/mine/c-v0/data/metadata.json"
    spec = json.dumps({"id": "NoSuchRobot-v3", "kwargs": {}})
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"env_spec": spec}))
    r = cli.train("--algo", "td3bc", "--data", "mine/c-v0", "--steps", "10", "--out", "run", sets=SMALL)
    assert r.code == 0, r.err
    assert "no evaluation: the environment of the dataset cannot be made here" in r.err
    assert "NoSuchRobot-v3" in r.err


@pytest.mark.parametrize(
    ("change", "args", "words"),
    [
        ({"act": 4}, [], ["actions of 4 dimensions", "Hopper-v5 has 11 and 3", "not the same task"]),
        ({"obs": 12}, [], ["observations of 12", "not the same task"]),
        ({"actions": np.zeros((39, 3))}, [], ["actions has shape (39, 3)", "expected 40 rows"]),
        ({"rewards": np.full(40, np.nan)}, [], ["reward of transition 0", "NaN"]),
        ({}, ["data_options.veiw=exact"], ["no key 'veiw'", "did you mean 'view'"]),
        ({}, ["data_options.view=d4rl"], ["no view 'd4rl'"]),
        ({}, ["reward=10r*5"], ["no reward transform '10r*5'"]),
    ],
)
def test_bad_data_is_refused_before_training(
    change: dict[str, Any], args: list[str], words: list[str], cli: Cli, tmp_path: Path
) -> None:
    npz(tmp_path / "a.npz", **change)
    r = cli.train("--algo", "td3bc", "--data", "a.npz", "--env", "Hopper", "--steps", "10", sets=[*SMALL, *args])
    refused(r, *words)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.npz"]


def test_rewards_that_nothing_can_scale_leave_no_run(cli: Cli, tmp_path: Path) -> None:
    """Episodes of one return: IDQL scales by their range, which `prepare` finds out, after the run has its folder."""
    npz(tmp_path / "flat.npz", rewards=np.ones(40, np.float32))
    sets = ["width=8", "batch_size=8", "run.final_episodes=0", "run.evaluations=1"]
    given = [x for s in sets for x in ("--set", s)]
    made = ["train", "--algo", "idql", "--data", "flat.npz", "--env", "Hopper", "--steps", "5", "--quiet", *given]
    refused(cli(*made, "--out", "flat"), "returns of 'flat' do not vary", "--set reward=none")
    assert not Path("flat").exists()
    assert cli(*made, "--out", "flat", "--set", "reward=none").code == 0


def test_a_cut_file_and_a_wrong_id_are_refused_before_training(cli: Cli, tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:-700])
    refused(cli.train("--algo", "td3bc", "--data", "a.npz", sets=SMALL), "not a whole .npz file")
    refused(
        cli.train("--algo", "td3bc", "--data", "hopper-medium-v2", sets=SMALL), "rlctl data download hopper-medium-v2"
    )


def test_cdsa_corrects_runs_of_any_algorithm(
    cli: Cli, tmp_path: Path, sac_run: Path, ppo_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without score steps an evaluation gives the base run's very returns, with them it does not; from any folder."""
    npz(tmp_path / "a.npz")
    made = ["train", "--algo", "cdsa", "--data", "a.npz", "--env", "Hopper", "--steps", "5", "--quiet"]
    sets = ["hidden=[8]", "inverse_hidden=[8]", "batch_size=8", "run.final_episodes=0", "run.evaluations=1"]
    for base in (sac_run, ppo_run):
        theirs = cli("eval", base, "--episodes", "3", "--json").json["returns"]
        for steps, same in (("0", True), ("2", False)):
            out = f"{base.name}-{steps}"
            given = [*sets, f"base={os.path.relpath(base)}", f"score_steps={steps}", "state_step=0.2"]
            r = cli(*made, "--out", out, *[x for s in given for x in ("--set", s)])
            assert r.code == 0, r.err
            monkeypatch.chdir(base)
            assert (cli("eval", tmp_path / out, "--episodes", "3", "--json").json["returns"] == theirs) == same
            monkeypatch.chdir(tmp_path)
    refused(cli(*made, "--out", "none"), "--set base=RUN_DIR")
    refused(cli(*made, "--out", "none", "--set", "base=nowhere"), "no run in", "nowhere, of the agent whose actions")
    assert not Path("none").exists()

    shutil.copytree(ppo_run, "lent")
    assert cli(*made, "--out", "built", *[x for s in [*sets, "base=lent"] for x in ("--set", s)]).code == 0
    shutil.rmtree("lent")
    kept = {p: (Path("built") / p).read_bytes() for p in ("run.json", "config.yaml")}
    refused(cli("resume", "built", "--steps", "9"), "no run in", "put it back")
    assert {p: (Path("built") / p).read_bytes() for p in kept} == kept  # still finished, with the steps it made
    shutil.copytree(ppo_run, "lent")
    assert cli("resume", "built", "--steps", "9", "--quiet").code == 0
