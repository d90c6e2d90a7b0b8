"""`rlctl export`: the file acts like the agent, in the environment's units, and says how nearly."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import PPO, Cli

from rlctl import agents, experiment
from rlctl import export as exporting
from rlctl.conformance.probes import write_dataset
from rlctl.conformance.samples import batch_for, tiny
from rlctl.errors import UsageError


def observations(n: int, dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)


@pytest.mark.parametrize("kind", ["ppo", "sac"])
def test_torch(kind: str, cli: Cli, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Path = request.getfixturevalue(f"{kind}_run")
    record = cli("export", run, "--format", "torch", "--out", "p.pt2", "--json").json
    file = tmp_path / "p.pt2"
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["parity"]["max_difference"] <= 1e-4
    assert record["parity"]["observations"] == 512
    assert json.loads((tmp_path / "p.pt2.json").read_text()) == record | {"file": "p.pt2"}
    agent, _ = experiment.load_agent(run)
    obs = observations(7, 11)
    module = torch.export.load(file).module()
    for n in (1, 7):
        np.testing.assert_allclose(
            module(torch.from_numpy(obs[:n])).detach().numpy(), agent.predict(obs[:n])[0], atol=1e-5
        )
    # neither pickled objects nor what acting does not need
    with zipfile.ZipFile(file) as archive:
        assert all(i.file_size == 0 for i in archive.infolist() if i.filename.endswith((".pt", ".pkl")))
    names = torch.export.load(file).state_dict
    assert not [k for k in names if ".q." in k or ".v." in k or "lagged" in k]


def test_onnx(cli: Cli, ppo_run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    r = cli("export", ppo_run, "--out", "p.onnx")
    assert (r.code, r.err) == (0, "")
    assert "obs [batch, 11]" in r.out
    record = json.loads((tmp_path / "p.onnx.json").read_text())
    assert record["parity"]["runtime"].startswith("onnxruntime")
    agent, _ = experiment.load_agent(ppo_run)
    obs = 3 * observations(9, 11)
    session = onnxruntime.InferenceSession(str(tmp_path / "p.onnx"), providers=["CPUExecutionProvider"])
    for n in (1, 9):
        (action,) = session.run(None, {"obs": obs[:n]})
        np.testing.assert_allclose(action, agent.predict(obs[:n])[0], atol=1e-5)


def test_normalisation_and_scaling_are_inside(cli: Cli, tmp_path: Path) -> None:
    """InvertedPendulum takes forces from -3 to 3; PPO normalises what it sees."""
    sets = [*PPO, "run.eval_every=0"]
    args = ["--algo", "ppo", "--env", "InvertedPendulum", "--steps", "80", "--out", "a", "--quiet"]
    assert cli.train(*args, sets=sets).code == 0
    record = cli("export", "a", "--format", "torch", "--json").json
    assert (record["output"]["low"], record["output"]["high"]) == ([-3.0], [3.0])
    agent, _ = experiment.load_agent(tmp_path / "a")
    assert float(agent.obs_norm.count) > 0
    obs = 4 * observations(50, 4)
    action = (
        torch.export.load(tmp_path / "a" / "export" / "policy.pt2").module()(torch.from_numpy(obs)).detach().numpy()
    )
    np.testing.assert_allclose(action, 3 * agent.predict(obs)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["flow-bc", "diffusion-bc", "fql"])
def test_noise_is_an_input_of_a_generative_policy(name: str) -> None:
    agent: Any = tiny(name).eval()
    given = agent.exportable(sampled=True)
    assert list(given.inputs) == ["obs", "noise"]
    controller = exporting.Controller(given.module, np.array([-2.0, 0.0]), np.array([2.0, 4.0]))
    module = exporting.to_program(controller, given).module()
    g = torch.Generator().manual_seed(0)
    obs, noise = (torch.randn(5, *shape, generator=g) for shape in given.inputs.values())
    wanted = agent.pi.sample(agent.obs_norm(obs), noise=noise).clamp(-1, 1) * 2 + torch.tensor([0.0, 2.0])
    torch.testing.assert_close(module(obs, noise), wanted)
    assert not torch.equal(module(obs, noise), module(obs, -noise))


NO_DRAW = {
    *("sac", "mdpo-off", "pmoe-ppo", "pmoe-sac", "rlpd", "expo", "gorl-sac", "td3", "bc", "td3bc", "prdc", "a2pr"),
    *("diffusion-ql", "idql", "ifql", "rebrac", "cdsa", "pa-rl"),
}
"""What has no draw that noise alone decides, or none at all."""


@pytest.mark.parametrize("name", agents.names())
def test_an_exported_draw_is_the_agent_s_own(name: str) -> None:
    """What `act` does with the same noise."""
    agent: Any = tiny(name)
    agent.update(batch_for(agent))
    if name in NO_DRAW:
        with pytest.raises(UsageError, match="has no sampled form to export"):
            agent.exportable(sampled=True)
        return
    given = agent.eval().exportable(sampled=True)
    obs = torch.randn(5, agent.spec.obs_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), agent.borrowed_rng(3):
        noise = torch.randn(5, *given.inputs["noise"], generator=agent.rng["action"])
    with torch.no_grad(), agent.borrowed_rng(3):
        action = agent.act(obs, explore=True)[0]
        torch.testing.assert_close(given.module(obs, noise).clamp(-1, 1), action.clamp(-1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow-bc", "diffusion-bc", "fql"])
def test_a_generative_policy_as_onnx_with_noise(name: str, cli: Cli, tmp_path: Path) -> None:
    """The same noise gives the agent's own draw, in any batch; other noise another one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    data = write_dataset(tmp_path / "d.npz")
    args = ["--algo", name, "--data", data, "--env", "probe:both", "--steps", "5", "--out", "a", "--quiet"]
    assert cli.train(*args, sets=["batch_size=16", "run.eval_every=0"]).code == 0
    record = cli("export", "a", "--format", "onnx", "--sampled", "--out", "p.onnx", "--json").json
    assert [i["name"] for i in record["inputs"]] == ["obs", "noise"]
    assert record["parity"]["runtime"].startswith("onnxruntime")
    assert record["parity"]["max_difference"] <= 1e-4
    agent: Any = experiment.load_agent(tmp_path / "a")[0].eval()
    obs, noise = (
        np.random.default_rng(0).normal(size=(9, *i["shape"][1:])).astype(np.float32) for i in record["inputs"]
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "p.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        own = agent.pi.sample(agent.obs_norm(torch.from_numpy(obs)), noise=torch.from_numpy(noise)).clamp(-1, 1).numpy()
    for n in (1, 9):
        (action,) = session.run(None, {"obs": obs[:n], "noise": noise[:n]})
        np.testing.assert_allclose(action, own[:n], atol=1e-4)  # a probe's bounds are -1 and 1
    (other,) = session.run(None, {"obs": obs, "noise": -noise})
    assert np.abs(other - own).max() > 1e-3


def test_others_have_no_sampled_form(cli: Cli, sac_run: Path) -> None:
    r = cli("export", sac_run, "--format", "torch", "--sampled")
    assert r.code == 2
    assert "leave --sampled out" in r.err


@pytest.mark.slow
@pytest.mark.parametrize("name", agents.names())
def test_every_algorithm_can_be_exported(name: str) -> None:
    agent = tiny(name).eval()
    given = agent.exportable()
    module = exporting.to_program(exporting.Controller(given.module, -np.ones(2), np.ones(2)), given).module()
    obs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(obs), agent.act(obs, explore=False)[0].clamp(-1, 1))


def test_an_agent_that_draws_while_it_acts_is_told_what_to_do() -> None:
    agent = tiny("sac").eval()
    agent.act = lambda obs, explore: (agent.pi(obs).sample(generator=agent.rng["action"]), {})  # type: ignore[method-assign]
    controller = exporting.Controller(agent.exportable().module, -np.ones(2), np.ones(2))
    with pytest.raises(exporting.RlctlError, match=r"override exportable\(\)"):
        exporting.to_program(controller, agent.exportable())


def test_a_model_that_acts_otherwise_is_not_written(
    cli: Cli, ppo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(program: object, file: Path) -> exporting.Runner:
        file.write_bytes(b"x")
        return lambda inputs: np.full((len(inputs[0]), 3), 0.5, np.float32)

    monkeypatch.setattr(exporting, "_write_torch", off)
    r = cli("export", ppo_run, "--format", "torch", "--out", "p.pt2")
    assert r.code == 1
    assert "nothing was written" in r.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "tflite"], "onnx, torch"),
        (["--format", "torch", "--out", "p.onnx"], r"\*.pt2"),
        (["--format", "torch", "--checkpoint", "7"], "no checkpoint '7'"),
    ],
)
def test_refusals(args: list[str], message: str, cli: Cli, ppo_run: Path) -> None:
    r = cli("export", ppo_run, *args)
    assert r.code == 2
    assert re.search(message, r.err), r.err
