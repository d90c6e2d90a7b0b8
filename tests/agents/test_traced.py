"""Losses and gradients from recordings: the same bits as without, and a refusal where that cannot be."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import batch_for, differing, snapshot, tiny
from torch import Tensor

from rlctl import agents, experiment
from rlctl.accelerate import accelerate
from rlctl.agents import names
from rlctl.agents.ppo import PPO
from rlctl.agents.td3 import TD3
from rlctl.ops import adam, frozen_copy, gradients
from rlctl.traced import CHECKS, TracedLoss
from rlctl.types import Batch


def traced(agent: Any) -> tuple[TracedLoss, list[str]]:
    """The agent's loss, replaced by a recording, and what that says."""
    said: list[str] = []
    agent.loss = TracedLoss(agent, agent.loss, said.append)
    return agent.loss, said


def recordings(loss: TracedLoss) -> list[Any]:
    return [r for there in loss._recordings.values() for r in there]


@pytest.mark.parametrize("name", [n for n in names() if callable(getattr(agents.get(n), "loss", None))])
def test_updates_are_the_same_bit_for_bit(name: str) -> None:
    """Of every agent that has one loss; those whose loss cannot be recorded say why, and run as before."""
    plain, agent = tiny(name), tiny(name)
    loss, said = traced(agent)
    for k in range(6):
        batch = batch_for(plain, k)
        expected, got = plain.update(batch), agent.update(batch)
        assert all(torch.equal(expected[key], got[key]) for key in expected), k
        assert differing(plain, snapshot(agent)) == [], k
    assert (loss.replays > 0) is (said == []) is (name in ("ppo", "spo"))
    if name == "pmoe-ppo":
        assert "it draws random numbers" in said[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_whole_runs_are_the_same(threads: int, tmp_path: Path) -> None:
    """From the command line's door, evaluation and checkpoints included."""
    ends = []
    for trace in (True, False):
        folder = tmp_path / str(trace)
        layer: dict[str, Any] = {"env": "Pendulum-v1", "seed": 3}
        layer["agent"] = {"steps": 1024, "num_envs": 4, "horizon": 64, "minibatch_size": 64}
        layer["run"] = {"final_episodes": 2, "evaluations": 2, "trace": trace, "threads": threads, "tensorboard": False}
        experiment.train(experiment.resolve("ppo", [layer]), folder, quiet=True)
        last = max((folder / "checkpoints").glob("step_*"))
        ends.append((last / "agent.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_any_use_of_the_loss_has_its_gradients() -> None:
    """Not only the short way through `minimize`."""
    agent = tiny("ppo")
    plain = agent.loss  # type: ignore[operator]
    loss, _ = traced(agent)
    rows = agent.prepare_rollout(batch_for(agent))  # type: ignore[operator]
    for _ in range(CHECKS + 1):
        out = loss(rows)
    assert loss.replays == 1
    params = [p for p in agent.parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain(rows)[0], params)
    short = gradients(out[0], agent.opt)  # type: ignore[attr-defined]
    doubled = torch.autograd.grad(2 * out[0] + params[0].sum(), params, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, short, strict=True))
    assert torch.equal(doubled[0], 2 * expected[0] + 1)
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled[1:], expected[1:], strict=True))
    with torch.no_grad():
        assert not loss(rows)[0].requires_grad


def test_new_shapes_and_settings_are_recorded_beside_each_other() -> None:
    agent = tiny("ppo")
    plain = agent.loss  # type: ignore[operator]
    loss, said = traced(agent)
    rows = agent.prepare_rollout(batch_for(agent))  # type: ignore[operator]
    short = type(rows)(*[x[:7] for x in rows])
    agent.weight = 1.0  # type: ignore[assignment]
    for _ in range(CHECKS + 2):
        for part in (rows, short):
            assert torch.equal(loss(part)[0], plain(part)[0])
    assert loss.replays == 4
    agent.weight = 2.0  # type: ignore[assignment]
    loss(rows)
    assert loss.replays == 4
    assert not said
    for size in range(1, 12):
        loss(type(rows)(*[x[: size + 7] for x in rows]))
    assert said == ["not recorded: the loss of PPO: its arguments, or what the agent holds, change too often"]


def test_a_copy_records_anew() -> None:
    """A recording holds the parameters of one agent."""
    agent = tiny("ppo")
    traced(agent)
    rows = agent.prepare_rollout(batch_for(agent))  # type: ignore[operator]
    for _ in range(CHECKS + 1):
        agent.loss(rows)  # type: ignore[operator]
    twin = copy.deepcopy(agent)
    for _ in range(3):
        agent.update(batch_for(agent))
        twin.update(batch_for(twin))
    assert differing(agent, snapshot(twin)) == []
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert not torch.equal(twin.loss(rows)[0], agent.loss(rows)[0])  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------------- refusals
class Drawing(PPO):
    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        return super().policy_loss(ratio, adv) * torch.rand((), generator=self.rng["sample"])


class Reading(PPO):
    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        return super().policy_loss(ratio, adv) * (2.0 if adv.mean() > 0 else 1.0)


class Annealed(PPO):
    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        return super().policy_loss(ratio, adv) / (1 + self.counters["updates"])


class Changing(PPO):
    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        self.obs_norm.mean.add_(1e-3)
        return super().policy_loss(ratio, adv)


class Counting(PPO):
    calls = 0

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().policy_loss(ratio, adv)


class Remembering(PPO):
    def loss(self, m: Any) -> Any:
        loss, metrics = super().loss(m)
        self.latest = metrics["losses/policy"]
        return loss, metrics


class Collecting(PPO):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Tensor] = []

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        self.seen.append(ratio.detach().max())
        return super().policy_loss(ratio, adv)


class Overwriting(PPO):
    def loss(self, m: Any) -> Any:
        m.adv.abs_()
        return super().loss(m)


class Branching(PPO):
    """On a value that comes by no operation, and that the first minibatches all have."""

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        far = abs(ratio.detach().numpy() - 1).max() > 0.15
        return (0.0 if far else 1.0) * super().policy_loss(ratio, adv)


class Listing(PPO):
    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        return (0.0 if max(ratio.tolist()) > 1.15 else 1.0) * super().policy_loss(ratio, adv)


class Talking(PPO):
    def loss(self, m: Any) -> Any:
        loss, metrics = super().loss(m)
        return loss, metrics | {"words": "no tensor"}


class Twofold(PPO):
    def loss(self, m: Any) -> Any:
        loss, metrics = super().loss(m)
        return loss, metrics | {"other": loss * 2}


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Drawing, "it draws random numbers"),
        (Reading, "it reads a tensor on the host"),
        (Annealed, "it reads the counter 'updates'"),
        (Changing, "it changes obs_norm.mean"),
        (Counting, "it sets attributes of the agent, or what they hold: calls"),
        (Remembering, "it sets attributes of the agent, or what they hold: latest"),
        (Collecting, "it sets attributes of the agent, or what they hold: seen.0"),
        (Overwriting, "it changes its arguments"),
        (Branching, "it reads a tensor on the host (numpy)"),
        (Listing, "it reads a tensor on the host (tolist)"),
        (Talking, "it returns more than tensors"),
        (Twofold, "it returns not one scalar"),
    ],
)
def test_what_no_recording_can_give_again_is_refused(cls: type[PPO], why: str) -> None:
    agent = cls(tiny("ppo").spec, tiny("ppo").cfg)
    plain = copy.deepcopy(agent)
    loss, said = traced(agent)
    rows = agent.prepare_rollout(batch_for(agent))
    other = type(rows)(*[x.clone() for x in rows])
    for _ in range(3):  # recording has left no trace: the loss has been worked out as often as it was asked for
        assert torch.equal(loss(rows)[0], plain.loss(other)[0])
        assert differing(agent, snapshot(plain)) == []
        assert getattr(agent, "calls", 0) == getattr(plain, "calls", 0)
        assert len(getattr(agent, "seen", [])) == len(getattr(plain, "seen", []))
    assert len(said) == 1
    assert why in said[0]
    assert loss.replays == 0


# ------------------------------------------------------------------------------------------ what moves between updates
class Weighing(PPO):
    """A penalty whose weight grows with each update; subclasses say where it is kept."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begin()

    def penalty(self, pi: Any) -> Tensor:
        return self.weight() * pi.mode.square().mean()

    def update(self, batch: Batch) -> Any:
        metrics = super().update(batch)
        self.grow()
        return metrics

    begin: Callable[..., None]
    weight: Callable[..., Any]
    grow: Callable[..., None]


class InTensor(Weighing):
    def begin(self) -> None:
        self.beta = torch.tensor(1.0)

    def weight(self) -> Any:
        return self.beta

    def grow(self) -> None:
        self.beta = self.beta * 3.0


class InBuffer(InTensor):
    def begin(self) -> None:
        self.register_buffer("beta", torch.tensor(1.0))


class InPlace(InTensor):
    def grow(self) -> None:
        self.beta.mul_(3.0)


class InModule(Weighing):
    def begin(self) -> None:
        self.pi.beta = 1.0  # type: ignore[assignment]

    def weight(self) -> Any:
        return self.pi.beta

    def grow(self) -> None:
        self.pi.beta *= 3.0  # type: ignore[operator, assignment]


class InDeque(Weighing):
    def begin(self) -> None:
        self.betas = deque([1.0, 2.0], maxlen=2)

    def weight(self) -> Any:
        return sum(self.betas)

    def grow(self) -> None:
        self.betas.append(3 * self.betas[-1])


class InArray(Weighing):
    def begin(self) -> None:
        self.betas = np.ones(2)

    def weight(self) -> Any:
        return float(self.betas[0])

    def grow(self) -> None:
        self.betas *= 3.0


class InObject(Weighing):
    def begin(self) -> None:
        self.schedule = SimpleNamespace(beta=1.0)  # type: ignore[assignment]

    def weight(self) -> Any:
        return self.schedule.beta  # type: ignore[union-attr]

    def grow(self) -> None:
        self.schedule.beta *= 3.0  # type: ignore[union-attr]


class InConfig(Weighing):
    def begin(self) -> None: ...

    def weight(self) -> Any:
        return self.cfg.clip

    def grow(self) -> None:
        self.cfg = dataclasses.replace(self.cfg, clip=self.cfg.clip / 3)


class InFrozenCopy(Weighing):
    """The distance to the policy as it was at the last update."""

    def begin(self) -> None:
        self.old: Any = None

    def loss(self, m: Any) -> Any:
        loss, metrics = super().loss(m)
        drift = 0.0 if self.old is None else (self.pi(m.obs).mode - self.old(m.obs).mode).square().mean()
        return loss + drift, metrics

    def weight(self) -> Any:
        return 0.0

    def grow(self) -> None:
        self.old = frozen_copy(self.pi)


class Optimised(Weighing):
    """A tensor that is no parameter of the agent, but of its optimiser."""

    def begin(self) -> None:
        self.free = torch.tensor(0.1, requires_grad=True)
        self.opt = adam([*self.pi.parameters(), *self.v.parameters(), self.free], 1e-3)  # type: ignore[arg-type]

    def weight(self) -> Any:
        return (self.free - 0.3) ** 2

    def grow(self) -> None: ...


class Masking(Weighing):
    """Writes into views of a constant, which changes nothing before a ratio leaves the middle."""

    def begin(self) -> None: ...

    def weight(self) -> Any:
        return 0.0

    def grow(self) -> None: ...

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        weights = torch.ones(len(ratio), 2)
        weights[:, 0] = ((ratio.detach() - 1).abs() < 0.15).float()
        weights = weights / weights.sum(0)
        return -(ratio * adv * weights[:, 0]).sum()


class Powers(Masking):
    """A first power is a copy of its own, to write into."""

    def penalty(self, pi: Any) -> Tensor:
        with torch.no_grad():
            w = self.pi.log_std**1  # type: ignore[operator]
            w[:] = 2 * w
        return (w * pi.mode.square().mean(0)).sum()


HOLDING = [InTensor, InBuffer, InPlace, InModule, InDeque, InArray, InObject, InConfig, InFrozenCopy, Optimised]


@pytest.mark.parametrize("cls", [*HOLDING, Masking, Powers])
def test_a_recording_sees_what_the_agent_holds(cls: type[PPO], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large steps, so that ratios leave the middle; in two halves where that is possible."""
    monkeypatch.setattr("rlctl.traced.WORTH_SPLITTING", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec, cfg = tiny("ppo").spec, dataclasses.replace(tiny("ppo").cfg, lr=3e-3)
    plain, agent = (agents.make(cls, spec, cfg) for _ in range(2))
    said: list[str] = []
    loss = agent.loss = TracedLoss(agent, agent.loss, said.append, cores=2)  # type: ignore[assignment, arg-type]
    for k in range(3):
        batch = batch_for(plain, k)
        expected, got = plain.update(batch), agent.update(batch)
        assert all(torch.equal(expected[key], got[key]) for key in expected), k
        assert differing(plain, snapshot(agent)) == [], k
    torch.set_num_threads(threads)
    assert not said
    assert loss.replays > 0


def test_what_changes_at_every_update_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlctl.traced.SHAPES", 2)
    agent = agents.make(InTensor, tiny("ppo").spec, tiny("ppo").cfg)
    _, said = traced(agent)
    for k in range(3):
        agent.update(batch_for(agent, k))
    why = "its arguments, or what the agent holds, change too often (beta)"
    assert said == [f"not recorded: the loss of InTensor: {why}"]


def test_an_agent_that_holds_a_lot_in_python_is_not_recorded() -> None:
    agent = tiny("ppo")
    agent.history = [0.0] * 20_000  # type: ignore[assignment]
    _, said = traced(agent)
    agent.update(batch_for(agent))
    assert "the agent holds more than 10,000 values in dicts and lists" in said[0]


def test_a_recording_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tiny("ppo")
    loss, said = traced(agent)
    rows = agent.prepare_rollout(batch_for(agent))  # type: ignore[operator]
    loss(rows)
    (recording,) = recordings(loss)
    program: Callable[..., Any] = recording.program
    recording.program = lambda *args: [x * (1 + 1e-6) for x in program(*args)]
    loss(rows)
    assert said == ["not recorded: the loss of PPO: its recording does not give the same bits"]


class WithModule(TD3):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.loss = torch.nn.MSELoss()


def test_a_module_called_loss_stays_one() -> None:
    agent = WithModule(tiny("td3").spec, tiny("td3").cfg)
    accelerate(agent)
    assert isinstance(agent.loss, torch.nn.MSELoss)


def test_other_arguments_are_left_to_the_loss() -> None:
    agent = tiny("ppo")
    named = TracedLoss(agent, lambda x, *, scale: x * scale, print)
    assert named(torch.tensor(2.0), scale=3.0) == 6.0
    seen = []
    agent.loss = TracedLoss(agent, lambda batch: batch.obs.sum(), seen.append)  # type: ignore[assignment]
    batch: Batch = batch_for(agent)
    assert torch.equal(agent.loss(batch), batch.obs.sum())  # type: ignore[operator]
    assert "neither a tensor nor a tuple" in seen[0]


# ------------------------------------------------------------------------------------------------------ two at a time
def side_by_side_of(agent: Any, monkeypatch: pytest.MonkeyPatch) -> TracedLoss:
    """The agent's loss, recorded for two cores whatever its size."""
    monkeypatch.setattr("rlctl.traced.WORTH_SPLITTING", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    agent.loss = TracedLoss(agent, agent.loss, pytest.fail, cores=2)
    agent.update(batch_for(agent))
    torch.set_num_threads(threads)
    return agent.loss  # type: ignore[no-any-return]


def forks(loss: TracedLoss) -> list[bool]:
    return ["prim::fork" in str(r.program.graph) for r in recordings(loss)]


@pytest.mark.parametrize("name", ["ppo", "spo"])
def test_actor_and_critic_at_the_same_time_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, agent = tiny(name), tiny(name)
    loss = side_by_side_of(agent, monkeypatch)
    assert forks(loss) == [True]
    plain.update(batch_for(plain))
    for k in range(6):
        batch = batch_for(plain, k)
        expected, got = plain.update(batch), agent.update(batch)
        assert all(torch.equal(expected[key], got[key]) for key in expected), k
        assert differing(plain, snapshot(agent)) == [], k
    assert loss.replays > 1


def test_networks_that_share_layers_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(PPO):
        def loss(self, m: Any) -> Any:
            loss, metrics = super().loss(m)
            return loss + 1e-3 * (self.pi(m.obs).mode.mean(-1) * self.v(m.obs)).mean(), metrics

    assert forks(side_by_side_of(Shared(tiny("ppo").spec, tiny("ppo").cfg), monkeypatch)) == [False]


def test_small_minibatches_are_not_split() -> None:
    agent = tiny("ppo")
    agent.loss = TracedLoss(agent, agent.loss, pytest.fail, cores=2)
    rows = agent.prepare_rollout(batch_for(agent))  # type: ignore[operator]
    agent.loss(rows)
    assert forks(agent.loss) == [False]


def test_constants_are_computed_once() -> None:
    """The seed of the backward pass and what it alone is turned into; nothing that a parameter or an input touches."""
    agent = tiny("ppo")
    loss, _ = traced(agent)
    rows = agent.prepare_rollout(batch_for(agent))  # type: ignore[operator]
    loss(rows)  # held to the plain loss, like the next two
    text = str(recordings(loss)[0].program.graph)
    assert "aten::ones_like" not in text
    assert "_folded" in text
    with torch.no_grad():
        agent.pi.log_std.add_(0.3)  # type: ignore[union-attr, operator]
        agent.v.net[0].weight.mul_(1.2)  # type: ignore[union-attr, index, operator]
    expected = PPO.loss(agent, rows)  # type: ignore[arg-type]
    for _ in range(CHECKS):
        got = loss(rows)
    assert loss.replays == 1
    assert torch.equal(got[0], expected[0])
