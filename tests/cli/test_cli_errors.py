"""Whatever is wrong with a request: one line on stderr that helps, an exit code, nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import PPO, QUICK, SAC, Cli, Result
from safetensors import SafetensorError

from rlctl import checkpoint, experiment

PPO_ON_HOPPER = ["train", "--algo", "ppo", "--env", "Hopper", "--steps", "20"]


def refused(r: Result, *words: str, code: int = 2) -> None:
    assert r.code == code, r
    assert r.out == ""
    assert r.err.startswith("rlctl: ")
    assert r.err.count("\n") == 1, r.err
    assert "Traceback" not in r.err
    assert [w for w in words if w not in r.err] == []


def config_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train"], ["no algorithm", "--algo"]),
        (["train", "--algo", "pppo", "--env", "Hopper"], ["unknown algorithm 'pppo'", "did you mean 'ppo'"]),
        (["train", "--algo", "SAC", "--env", "Hopper"], ["did you mean 'sac'"]),
        (["train", "--algo", "ppo"], ["--env", "rlctl envs"]),
        (["train", "--algo", "ppo", "--env", "Hoper"], ["unknown environment 'Hoper'", "Hopper"]),
        (["train", "--algo", "ppo", "--env", "probe:constnt"], ["probe:constant"]),
        (["train", "--algo", "ppo", "--env", "CartPole-v1"], ["CartPole-v1", "Box"]),
        (["train", "--algo", "ppo", "--env", "Hopper", "--data", "x"], ["reads no dataset"]),
        (["train", "--algo", "td3bc", "--env", "Hopper"], ["--data"]),
        (["train", "--algo", "bc", "--data", "x", "--offline-updates", "9"], ["bc does not go", "sees no reward"]),
        (
            ["train", "--algo", "sac", "--env", "Hopper", "--offline-updates", "9"],
            ["sac does not go", "from the start"],
        ),
        (["train", "--algo", "td3bc", "--data", "no/such/dataset-v0"], ["no dataset 'no/such/dataset-v0'"]),
        (["train", "--algo", "td3bc", "--data", "nothing.hdf5"], ["nothing.hdf5"]),
        (["train", "--algo", "nowhere.at_all:Agent", "--env", "Hopper"], ["no module 'nowhere.at_all'"]),
        (["train", "--algo", "rlctl.agents.sac:SCA", "--env", "Hopper"], ["no class 'SCA'", "SAC"]),
        (["train", "--algo", "json:JSONDecoder", "--env", "Hopper"], ["not an rlctl.Agent subclass"]),
        ([*PPO_ON_HOPPER, "--set", "gama=0.9"], ["no key 'gama'", "did you mean 'gamma'"]),
        ([*PPO_ON_HOPPER, "--set", "run.eval_evry=9"], ["no key 'eval_evry'", "did you mean 'eval_every'"]),
        ([*PPO_ON_HOPPER, "--set", "rum.keep=9"], ["no key 'rum'", "'run'"]),
        ([*PPO_ON_HOPPER, "--set", "gamma=high"], ["gamma='high'"]),
        ([*PPO_ON_HOPPER, "--set", "num_envs=2.5"], ["num_envs=2.5"]),
        ([*PPO_ON_HOPPER, "--set", "activation=rlu"], ["activation='rlu'", "relu"]),
        ([*PPO_ON_HOPPER, "--set", "gamma"], ["key=value", "'gamma'"]),
        ([*PPO_ON_HOPPER, "--set", "hidden=[64"], ["hidden"]),
        ([*PPO_ON_HOPPER, "--set", "minibatch_size=7"], ["minibatch_size=7 does not divide"]),
        ([*PPO_ON_HOPPER, "--set", "seed=-1"], ["seed", "-1"]),
        ([*PPO_ON_HOPPER, "--set", "run=5"], ["run"]),
        ([*PPO_ON_HOPPER, "--set", "agent=5"], ["agent"]),
        ([*PPO_ON_HOPPER, "--set", "env_options=5"], ["env_options"]),
        (["train", "--algo", "ppo", "--set", "env=5"], ["'env'", "5"]),
        ([*PPO_ON_HOPPER, "--set", "device=5"], ["device"]),
        ([*PPO_ON_HOPPER, "--set", "env_options.no_such=1"], ["no_such"]),
        ([*PPO_ON_HOPPER, "--set", "env_options.physic=native"], ["'physic'", "did you mean 'physics'"]),
        ([*PPO_ON_HOPPER, "--set", "env_options.physics=quantum"], ["quantum"]),
        ([*PPO_ON_HOPPER, "--set", "num_envs=0"], ["num_envs"]),
        ([*PPO_ON_HOPPER, "--set", "run.log_every=-1"], ["log_every"]),
        ([*PPO_ON_HOPPER, "--set", "run.keep=0"], ["keep"]),
        ([*PPO_ON_HOPPER, "--set", "run.eval_episodes=0"], ["eval_episodes"]),
        ([*PPO_ON_HOPPER, "--set", "run.threads=0"], ["threads"]),
        ([*PPO_ON_HOPPER, "--device", "tpu"], ["tpu", "cpu"]),
        ([*PPO_ON_HOPPER, "--device", "mps"], ["mps", "cpu"]),
        ([*PPO_ON_HOPPER, "--config", "none.yaml"], ["cannot read the config file none.yaml"]),
        (["resume", "nowhere"], ["nowhere is not a run directory"]),
        (["eval", "nowhere"], ["nowhere is not a run directory"]),
        (["config", "pppo"], ["did you mean 'ppo'"]),
        (["config", "ppo", "--env", "Hoper"], ["Hopper"]),
    ],
    ids=lambda x: " ".join(x[1:])[:60] if isinstance(x, list) and "train" in x else "",
)
def test_refused_in_one_line(args: list[str], words: list[str], cli: Cli, tmp_path: Path) -> None:
    refused(cli(*args), *words)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []  # a refused request leaves no run directory


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["train", "--alg", "ppo"], "--algo"),
        (["train", "--algo", "ppo", "--steps", "many"], "--steps"),
        (["train", "--algo", "ppo", "--steps", "0"], "--steps"),
        (["train", "--algo", "ppo", "--seed", "-1"], "--seed"),
        (["trian"], "'train'"),
        (["eval", ".", "--episodes", "0"], "--episodes"),
        (["resume"], "RUN_DIR"),
    ],
)
def test_misspelt_options(args: list[str], word: str, cli: Cli) -> None:
    refused(cli(*args), word, "--help`")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agent: [1, 2", ["mine.yaml is not valid YAML"]),
        ("- 1\n- 2\n", ["mine.yaml does not hold a mapping"]),
        ("", ["mine.yaml does not hold a mapping"]),
        ("agent:\n  gama: 1\n", ["no key 'gama'", "gamma"]),
        ("agnt:\n  gamma: 1\n", ["no key 'agnt'", "agent"]),
        ("agent: 5\n", ["'agent' is a section"]),
        ("seed: 1.5\n", ["seed", "1.5"]),
        ("!!python/object/apply:os.system ['true']", ["mine.yaml is not valid YAML"]),
    ],
)
def test_bad_config_files(text: str, words: list[str], cli: Cli, tmp_path: Path) -> None:
    refused(cli(*PPO_ON_HOPPER, "--config", config_file(tmp_path, text)), *words)


def test_config_is_a_folder_or_binary(cli: Cli, tmp_path: Path) -> None:
    refused(cli(*PPO_ON_HOPPER, "--config", tmp_path), "cannot read the config file")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    refused(cli(*PPO_ON_HOPPER, "--config", "x.yaml"), "x.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(cli: Cli) -> None:
    refused(cli(*PPO_ON_HOPPER, "--device", "cuda"), "--device cuda", "no CUDA device", "--device cpu")


def test_buffer_too_large(cli: Cli, tmp_path: Path) -> None:
    size = 10**12
    r = cli(
        "train", "--algo", "sac", "--env", "Hopper", "--steps", str(size), "--set", f"buffer_size={size}", "--quiet"
    )
    refused(r, "GiB", "--set buffer_size=")
    fits = int(r.err.split("buffer_size=")[1].split()[0])
    assert 10**5 < fits < size
    assert list(tmp_path.rglob("*.yaml")) == []
    # a large buffer that a short run can never fill is no obstacle
    r = cli.train(
        "--algo", "sac", "--env", "probe:both", "--steps", "30", "--quiet", sets=[*SAC, f"buffer_size={10**9}"]
    )
    assert r.code == 0, r.err


def test_out_that_is_taken(cli: Cli, tmp_path: Path, ppo_run: Path) -> None:
    before = sorted(ppo_run.rglob("*"))
    refused(cli.train("--algo", "ppo", "--env", "Hopper", "--out", ppo_run, sets=PPO), "not empty", "rlctl resume")
    assert sorted(ppo_run.rglob("*")) == before
    (tmp_path / "file").write_text("mine")
    refused(cli.train("--algo", "ppo", "--env", "Hopper", "--out", "file", sets=PPO), "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_out_that_cannot_be_created(cli: Cli) -> None:
    refused(cli.train("--algo", "ppo", "--env", "Hopper", "--out", "/dev/null/run", sets=PPO), "/dev/null/run", "--out")


def test_out_that_is_empty_is_used(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    r = cli.train("--algo", "ppo", "--env", "probe:both", "--steps", "40", "--out", "empty", "--quiet", sets=PPO)
    assert (r.code, r.out, r.err) == (0, "", "")
    assert (tmp_path / "empty" / "run.json").exists()


def test_run_without_a_checkpoint_cannot_be_evaluated(cli: Cli, tmp_path: Path, ppo_run: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ppo_run, copy)
    shutil.rmtree(copy / "checkpoints")
    refused(cli("eval", copy), "no latest checkpoint")
    refused(cli("eval", copy, "--checkpoint", "best"), "no best checkpoint")


def test_eval_of_a_damaged_checkpoint(cli: Cli, tmp_path: Path, ppo_run: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ppo_run, copy)
    weights = max((copy / "checkpoints").glob("step_*")) / "agent.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    refused(cli("eval", copy), "agent.safetensors", "damaged")
    weights.write_bytes(whole[:-9] + bytes(9))  # readable, and not what was written
    refused(cli("eval", copy), "agent.safetensors", "differs from what was written")
    best = copy / "checkpoints" / "best" / "agent.safetensors"
    best.write_bytes(best.read_bytes()[:-9] + bytes(9))
    refused(cli("eval", copy, "--checkpoint", "best"), "best/agent.safetensors", "differs from what was written")


def test_eval_of_a_run_without_its_record(cli: Cli, tmp_path: Path, ppo_run: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ppo_run, copy)
    (copy / "run.json").write_text("{")
    refused(cli("eval", copy), "run.json is damaged")
    (copy / "run.json").unlink()
    refused(cli("eval", copy), "run.json is missing or incomplete")


def test_a_key_of_another_section_is_named(cli: Cli) -> None:
    r = cli.train("--algo", "ppo", "--env", "Hopper", sets=[*PPO, "final_episodes=3"])
    refused(r, "no key 'final_episodes'", "did you mean 'run.final_episodes'?")


def test_ctrl_c_before_there_is_a_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "resolve", pressed)
    refused(cli.train("--algo", "ppo", "--env", "Hopper", sets=PPO), "rlctl: interrupted", code=130)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
    ids=["file", "safetensors"],
)
def test_a_full_disk_is_one_line_and_leaves_a_run_to_resume(
    error: Exception, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    folder = tmp_path / "run"
    some = ["train", "--algo", "ppo", "--env", "probe:constant", "--steps", "60", "--quiet", "--out", str(folder)]
    some += [x for s in [*QUICK, *PPO, "run.checkpoint_every=20"] for x in ("--set", s)]
    first = checkpoint.save_file
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_file", lambda x, at: full() if at.stem == "optim" else first(x, at))
        refused(cli(*some), "no space left", f"rlctl resume {folder}", code=1)
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    left = [p.name for p in (folder / "checkpoints").iterdir()]
    assert left == ["best"]  # no half of a checkpoint, which would take the rest of the disk
    assert cli("resume", folder, "--quiet").code == 0


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ("None", "Careless.update returned None, not a dict of metrics"),
        ("{'losses/x': 1.5}", "Careless.update gives losses/x as 1.5: a metric is a detached 0-dim tensor"),
        ("{'losses/x': batch.reward}", "Careless.update gives losses/x as a tensor of shape"),
    ],
)
def test_metrics_that_are_none(metrics: str, words: str, cli: Cli, tmp_path: Path) -> None:
    """A bug of the author, who gets a traceback, and words that tell what an update returns."""
    source = "from rlctl.agents.ppo import PPO\n\n\nclass Careless(PPO):\n    def update(self, batch):\n"
    name = f"careless_{len(metrics)}"
    (tmp_path / f"{name}.py").write_text(f"{source}        return {metrics}\n")
    with pytest.raises(TypeError, match=words):
        cli.train("--algo", f"{name}:Careless", "--env", "probe:constant", "--steps", "60", "--quiet", sets=PPO)


def test_what_an_agent_at_work_raises_is_no_refusal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "wrong_shape.py").write_text(
        "from rlctl.agents.sac import SAC\nfrom rlctl.nets import Normal\n\n\n"
        "class Wrong(SAC):\n"
        "    def update(self, batch):\n"
        "        return Normal(batch.obs[:, :3], batch.obs[:, :1])\n"
    )
    with pytest.raises(ValueError, match="differ in the last dimension"):
        cli.train("--algo", "wrong_shape:Wrong", "--env", "Hopper", "--steps", "60", "--quiet", sets=SAC)


def test_mistake_in_a_users_file_shows_its_traceback(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "broken_agent.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        cli("train", "--algo", "broken_agent:X", "--env", "Hopper")
