"""Several processes that share an update: equal to one process with all their worlds, and to each other."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import rlctl
from rlctl import agents, experiment, parallel
from rlctl.errors import UsageError
from rlctl.nets.normalizer import RunningMoments
from rlctl.types import Batch, Spec

SIZE = 2
CONFIG: dict[str, Any] = {"num_envs": 4, "horizon": 8, "hidden": (8, 8), "epochs": 3, "steps": 4 * 8 * 10}
ALGOS: dict[str, dict[str, Any]] = {
    "ppo": {"minibatch_size": 32},
    "mdpo": {"policy_steps": 3, "v_minibatch_size": 32, "v_epochs": 2},
    "spo": {"minibatch_size": 32},
    "pmoe-ppo": {"minibatch_size": 8},
    "dppo": {"minibatch_size": 16, "diffusion_steps": 2},
    "trpo": {"v_minibatch_size": 32, "v_epochs": 2, "delta": 0.05},
    "fixpo": {"minibatch_size": 32, "fixup_minibatch_size": 32, "max_kl": 0.02, "lr": 1e-2},
}
"""Where one minibatch is the whole rollout, sharing it changes no number, but for rounding."""


def config(name: str) -> Any:
    cls = agents.get(name).Config
    known = cls.__dataclass_fields__
    return cls(**{k: v for k, v in (CONFIG | ALGOS[name]).items() if k in known})


def made_up(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    lead = (8, 4)
    return Batch(
        torch.randn(*lead, 3, generator=g) * 2 + 1,
        torch.randn(*lead, 2, generator=g),
        torch.randn(*lead, generator=g),
        torch.randn(*lead, 3, generator=g),
        torch.rand(*lead, generator=g) < 0.1,
        torch.rand(*lead, generator=g) < 0.1,
    )


def updated(name: str, rank: int, size: int) -> dict[str, torch.Tensor]:
    """State of the agent after three updates on a rank's share of the worlds."""
    cfg = parallel.share(config(name), size)
    agent = agents.make(name, Spec(3, 2, 4 // size, seed=rank), cfg)
    parallel.broadcast(agent)
    for k in range(3):
        batch = made_up(k).map(lambda x: x.chunk(size, 1)[rank].contiguous())
        if name == "dppo":  # it learns from what its own acting has stored
            chains = [agent.act(obs, explore=True)[1]["chain"] for obs in batch.obs]
            batch = batch._replace(extra={"chain": torch.stack(chains).detach()})
        agent.update(batch)
    return {k: v for k, v in agent.state_dict().items() if "carry" not in k}


def child(rank: int, store: str, work: Callable[[int], Any], answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    try:
        answers.put((rank, work(rank)))
    finally:
        parallel.leave()


def together(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of two processes that have met."""
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds
    answers = context.Queue()
    arguments = (str(folder / "store"), work, answers)
    processes = [context.Process(target=child, args=(rank, *arguments)) for rank in range(SIZE)]
    for p in processes:
        p.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for p in processes:
        p.join(30)
        assert p.exitcode == 0
    return [found[rank] for rank in range(SIZE)]


def numbers(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {k: v.tolist() for k, v in state.items()}


@pytest.mark.parametrize("name", ["ppo", "mdpo", "spo", "trpo", "fixpo"])
def test_two_processes_learn_what_one_would(name: str, tmp_path: Path) -> None:
    """Parameters, and the moments of the normalisers, after updates on halves of the same rollouts."""
    ranks = together(lambda rank: numbers(updated(name, rank, SIZE)), tmp_path)
    assert ranks[0] == ranks[1]  # to the bit
    alone = updated(name, 0, 1)
    for key, expected in alone.items():
        torch.testing.assert_close(torch.tensor(ranks[0][key]).to(expected), expected, atol=2e-5, rtol=1e-4)
    assert float(alone["obs_norm.count"]) == 3 * 8 * 4


@pytest.mark.parametrize("name", ["pmoe-ppo", "dppo"])
def test_processes_that_draw_their_own_noise_stay_together(name: str, tmp_path: Path) -> None:
    """Minibatches of their own shuffles, noise of their own in acts and losses: parameters are the same."""
    ranks = together(lambda rank: numbers(updated(name, rank, SIZE)), tmp_path)
    assert ranks[0] == ranks[1]


def test_gradients_moments_and_votes(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        grads = parallel.mean_gradients([torch.full((2, 2), float(rank)), None, torch.tensor(4.0 * rank)])
        moments = RunningMoments((1,))
        moments.update(torch.arange(4.0).reshape(4, 1) + 10 * rank)
        votes = [parallel.anybody(rank == k, torch.device("cpu")) for k in range(3)]
        return [None if g is None else g.tolist() for g in grads], numbers(moments.state_dict()), votes

    first, second = together(work, tmp_path)
    assert first == second
    assert first[0] == [[[0.5, 0.5], [0.5, 0.5]], None, 2.0]
    rows = torch.cat([torch.arange(4.0), torch.arange(4.0) + 10])
    assert first[1]["mean"] == pytest.approx([float(rows.mean())])
    assert first[1]["var"] == pytest.approx([float(rows.var(correction=0))])
    assert first[1]["count"] == 8
    assert first[2] == [True, True, False]


def test_alone_nothing_happens() -> None:
    assert (parallel.world_size(), parallel.rank(), parallel.launched()) == (1, 0, False)
    grads = [torch.ones(2), None]
    assert parallel.mean_gradients(grads)[0] is grads[0]
    cfg = config("ppo")
    assert parallel.share(cfg, 1) is cfg


def test_shares() -> None:
    cfg = parallel.share(config("ppo"), 2)
    assert (cfg.num_envs, cfg.minibatch_size, cfg.horizon, cfg.steps) == (2, 16, 8, 160)
    with pytest.raises(UsageError, match="num_envs=4 cannot be divided among 3 processes"):
        parallel.share(config("ppo"), 3)


@pytest.mark.parametrize(
    ("algo", "why"),
    [
        ("sac", "only on-policy agents"),
        ("gorl", "only on-policy agents"),
        ("by hand", "moves parameters without a gradient step"),
        ("reading", "each process would decide for itself: it must"),
    ],
)
def test_agents_that_cannot_share_are_refused(algo: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if algo in ("by hand", "reading"):
        host_reads, algo = ("it must", "ppo") if algo == "reading" else ("", "trpo")
        monkeypatch.setattr(agents.get(algo), "decides_together", False)
        monkeypatch.setattr(agents.get(algo), "host_reads", host_reads)
    settings = experiment.resolve(algo, [{"env": "probe:both"}])
    with pytest.raises(UsageError, match=why):
        experiment._refuse_unless_shareable(settings)


def torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlctl"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([*command, *args], capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_under_torchrun(tmp_path: Path) -> None:
    """Rank 0 keeps the run: one directory, counts of all worlds, a checkpoint that acts, and a resume."""
    folder = tmp_path / "run"
    sets = ["horizon=16", "minibatch_size=32", "epochs=2", "run.final_episodes=4", "run.evaluations=2"]
    done = torchrun(
        "train", "--algo", "ppo", "--env", "Hopper", "--num-envs", "4", "--steps", "640", "--out", str(folder),
        *[x for s in sets for x in ("--set", s)],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes, 2 worlds each" in done.stderr
    assert done.stdout.count("final evaluation") == 1
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["processes"], record["progress"]) == ("done", 2, 640)
    assert record["spec"]["num_envs"] == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["env_steps"] == 640
    assert rows[-1]["updates"] == 10
    agent, _ = rlctl.load_agent(folder)
    assert float(agent.obs_norm.count) == 640  # type: ignore[attr-defined]
    alone = subprocess.run(
        [sys.executable, "-m", "rlctl", "resume", str(folder), "--steps", "1280"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert alone.returncode == 2
    assert "started with 2 processes, this is 1" in alone.stderr
    again = torchrun("resume", str(folder), "--steps", "1280")
    assert again.returncode == 0, again.stderr
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["progress"]) == ("done", 1280)
    agent, _ = rlctl.load_agent(folder)
    assert float(agent.obs_norm.count) == 1280  # type: ignore[attr-defined]
