"""Captured updates equal plain ones, for every agent, over every turn their Python takes; what cannot be captured is
refused with a reason. `Tape` stands for a CUDA graph; marked `gpu`: the graphs themselves.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_helpers import ACT_DIM, OBS_DIM, batch_for, differing, snapshot, tiny

import rlctl
from rlctl import agents, checkpoint
from rlctl.accelerate import TURNS, WARM_UP, Captured, Tape, _obstacle, accelerate, follow
from rlctl.agents.sac import SAC
from rlctl.host_numbers import Counters, HostNumber, Recording, apply
from rlctl.types import Agent, Batch, Spec
from rlctl_envs.probes import make_probe

SCHEDULED: dict[str, dict[str, Any]] = {
    "iql": {"steps": 20, "anneal_actor_lr": True},
    "cql": {"bc_steps": 3},
    "mdpo-off": {"anchor_every": 3},
    "td3": {"policy_every": 3},
}
"""Settings that make an agent's Python change its mind within the test; on-policy agents anneal by themselves."""
CAPTURABLE = [name for name in agents.names() if not agents.get(name).host_reads]
UPDATES = 14


def settings(agent: Agent) -> list[Any]:
    return [g["lr"] for opt in agent.optimizers().values() for g in opt.param_groups]


def moments(agent: Agent) -> list[torch.Tensor]:
    states = [opt.state[p] for opt in agent.optimizers().values() for g in opt.param_groups for p in g["params"]]
    return [s[k] for s in states for k in sorted(s)]


def equal(a: Agent, b: Agent) -> bool:
    same = differing(a, snapshot(b)) == [] and a.counters == b.counters and settings(a) == settings(b)
    return same and all(torch.equal(x, y) for x, y in zip(moments(a), moments(b), strict=True))


@pytest.mark.parametrize("name", CAPTURABLE)
def test_captured_equals_plain(name: str) -> None:
    plain, captured = (tiny(name, **SCHEDULED.get(name, {})) for _ in range(2))
    said: list[str] = []
    report = accelerate(captured, graphs="tape", say=said.append)
    assert report.captured == ("update", "act")
    for k in range(UPDATES):
        batch = batch_for(plain, k)
        for agent in (plain, captured):
            agent.counters["env_steps"] += 1
        expected, got = plain.update(batch), captured.update(batch)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key].float(), got[key]) for key in got), k
        assert equal(plain, captured), k
    assert isinstance(captured.update, Captured)
    assert captured.update.replays >= UPDATES - 3 * (WARM_UP + 1), "it hardly ever replayed"
    assert not said
    obs = torch.randn(5, OBS_DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for explore in (True, False):
            for k in range(WARM_UP + 3):
                assert torch.equal(plain.act(obs + k, explore)[0], captured.act(obs + k, explore)[0])
    assert captured.act.replays == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(set(agents.names()) - set(CAPTURABLE)))
def test_agents_that_read_on_the_host_are_refused_by_name(name: str) -> None:
    plain, agent = tiny(name), tiny(name)
    said: list[str] = []
    accelerate(agent, graphs="tape", say=said.append)
    for k in range(4):
        batch = batch_for(plain, k)
        plain.update(batch)
        agent.update(batch)
    assert equal(plain, agent)
    assert said == [f"not captured: {type(agent).__name__}'s update: it reads tensors on the host: {plain.host_reads}"]
    assert agent.update.replays == 0  # type: ignore[attr-defined]


def test_graphs_may_be_required() -> None:
    with pytest.raises(ValueError, match="graphs=require: SAC cannot be captured: graphs need a CUDA device"):
        accelerate(tiny("sac"), graphs="require")


def test_on_a_cpu_there_are_no_graphs() -> None:
    agent = tiny("sac")
    report = accelerate(agent)
    assert report.captured == ()
    assert report.reasons == ("graphs need a CUDA device",)
    assert "update" not in vars(agent)
    assert accelerate(agent, graphs="never").reasons == ("switched off",)


def test_rehearsal_leaves_the_agent_alone() -> None:
    agent = tiny("sac")
    before, rng = snapshot(agent), {k: g.get_state() for k, g in agent.rng.items()}
    assert not _obstacle(agent, "update", (batch_for(agent),), {})
    assert differing(agent, before) == []
    assert agent.counters == {"updates": 0, "env_steps": 0}
    assert not agent.opt_q.state  # type: ignore[attr-defined]
    assert all(torch.equal(g.get_state(), rng[k]) for k, g in agent.rng.items())


def variant(base: type[Agent], **methods: Any) -> Agent:
    cls = type("Variant", (base,), methods)
    cfg = base.Config(hidden=(8, 8), batch_size=16)
    return agents.make(cls, Spec(OBS_DIM, ACT_DIM), cfg)


def refusal(agent: Agent) -> str:
    """What is said at the agent's first update, which goes through all the same."""
    said: list[str] = []
    accelerate(agent, graphs="tape", say=said.append)
    before = snapshot(agent)
    agent.update(batch_for(agent))
    assert differing(agent, before)
    assert agent.counters["updates"] == 1
    (line,) = said
    return line


class TestRefusals:
    def test_a_read_on_the_host(self) -> None:
        def update(self: Any, b: Batch) -> Any:
            metrics = SAC.update(self, b)
            if float(metrics["losses/critic"]) > 1e9:
                raise RuntimeError
            return metrics

        assert "update: it reads a tensor on the host" in refusal(variant(SAC, update=update))

    def test_a_count_outside_of_counters(self) -> None:
        def update(self: Any, b: Batch) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return SAC.update(self, b)

        line = refusal(variant(SAC, update=update))
        assert "it counts in calls: only what is kept in `counters` can be replayed" in line

    def test_an_error_while_followed(self) -> None:
        def update(self: Any, b: Batch) -> Any:
            torch.clamp(b.reward, max=self.counters["updates"])
            return SAC.update(self, b)

        assert "it failed while it was followed (TypeError" in refusal(variant(SAC, update=update))

    def test_a_new_decision_at_every_update(self) -> None:
        """Python takes the counter's value as it is: each recording serves one update only. Results stay right."""

        def update(self: Any, b: Batch) -> Any:
            self.cfg_scale = torch.tensor(float(self.counters["updates"]))
            return SAC.update(self, b)

        said: list[str] = []
        captured, plain = variant(SAC, update=update), variant(SAC)
        accelerate(captured, graphs="tape", say=said.append)
        for k in range(TURNS + 3):
            batch = batch_for(plain, k)
            plain.update(batch)
            captured.update(batch)
        assert len(said) == 1
        assert "decides anew" in said[0]
        assert differing(plain, snapshot(captured)) == []
        assert captured.counters == plain.counters


def test_a_capture_that_fails_falls_back_without_losing_an_update() -> None:
    class Broken:
        runs_while_recording = False

        def record(self, run: Any) -> Any:
            raise RuntimeError("the driver said no")

        def replay(self) -> None:
            raise AssertionError

    plain, agent = tiny("td3"), tiny("td3")
    said: list[str] = []
    agent.update = Captured(agent, "update", Broken, said.append, contextlib.nullcontext)  # type: ignore[method-assign]
    for k in range(10):
        batch = batch_for(plain, k)
        plain.update(batch)
        agent.update(batch)
        assert equal(plain, agent), k
    assert said == ["update: the capture failed: RuntimeError: the driver said no"]


def test_a_capture_that_fails_leaves_no_recording_of_another_method() -> None:
    """Its generators have new state objects, of which graphs made before know nothing."""

    class Broken(Tape):
        runs_while_recording = False

        def record(self, run: Any) -> Any:
            raise RuntimeError("the driver said no")

    agent = tiny("sac")
    act = Captured(agent, "act", Tape, lambda _: None, contextlib.nullcontext)
    update = Captured(agent, "update", Broken, lambda _: None, contextlib.nullcontext)
    agent.act, agent.update = act, update  # type: ignore[method-assign]
    obs = torch.zeros(2, OBS_DIM)
    for _ in range(5):
        agent.act(obs, explore=True)
    assert act.replays == 2
    for k in range(4):
        agent.update(batch_for(agent, k))
    assert update.refused
    for _ in range(4):
        agent.act(obs, explore=True)
    assert act.replays == 2 + 1  # warmed up twice and recorded again
    assert not act.refused


class LikeCuda(Tape):
    """A tape that, as a CUDA capture does, computes nothing while it records."""

    runs_while_recording = False

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def record(self, run: Any) -> Any:
        agent = self.agent
        tensors = [*agent.state_dict().values(), *moments(agent)]
        kept = [x.clone() for x in tensors]
        states = [g.get_state() for g in agent.rng.values()]
        out = super().record(run)
        with torch.no_grad():
            for x, old in zip(tensors, kept, strict=True):
                x.copy_(old)
        for g, state in zip(agent.rng.values(), states, strict=True):
            g.set_state(state)
        return out


@pytest.mark.parametrize("name", ["ppo", "sac", "td3", "iql", "mdpo"])
def test_a_capture_that_computes_nothing_is_followed_by_a_replay(name: str) -> None:
    plain, agent = (tiny(name, **SCHEDULED.get(name, {})) for _ in range(2))
    agent.update = Captured(  # type: ignore[method-assign]
        agent, "update", lambda: LikeCuda(agent), lambda _: None, contextlib.nullcontext
    )
    for k in range(10):
        batch = batch_for(plain, k)
        expected, got = plain.update(batch), agent.update(batch)
        assert all(torch.equal(expected[key].float(), got[key].float()) for key in got), k
        assert equal(plain, agent), k


class Uncopyable(Tape):
    """As a CUDA graph is."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle a graph")


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_actions_captured_before_do_not_keep_the_update_from_it(name: str) -> None:
    plain, agent = tiny(name), tiny(name)
    refused: list[str] = []
    for method in ("act", "update"):
        wrapped = Captured(
            agent, method, Uncopyable, refused.append, contextlib.nullcontext, rehearse=method == "update"
        )
        setattr(agent, method, wrapped)
    obs = torch.randn(8, OBS_DIM)
    for _ in range(WARM_UP + 4):
        assert torch.equal(plain.act(obs, explore=True)[0], agent.act(obs, explore=True)[0])
    for k in range(WARM_UP + 4):
        batch = batch_for(plain, k)
        plain.update(batch)
        agent.update(batch)
    assert refused == []
    assert agent.act.replays > 0 and agent.update.replays > 0  # type: ignore[attr-defined]
    assert equal(plain, agent)


def test_other_shapes_are_recorded_beside_each_other() -> None:
    plain, captured = tiny("sac"), tiny("sac")
    accelerate(captured, graphs="tape")
    for k in range(12):
        batch = batch_for(plain, k).map(lambda x: x[: 32 if k % 2 else 20])  # noqa: B023
        plain.update(batch)
        captured.update(batch)
    assert equal(plain, captured)
    assert captured.update.replays == 12 - 2 * (WARM_UP + 1)  # type: ignore[attr-defined]


def test_evaluations_use_their_own_generators() -> None:
    plain, captured = tiny("sac"), tiny("sac")
    accelerate(captured, graphs="tape")
    obs = torch.zeros(4, OBS_DIM)
    with torch.no_grad():
        for _ in range(6):
            assert torch.equal(plain.act(obs, True)[0], captured.act(obs, True)[0])
        for agent in (plain, captured):
            with agent.borrowed_rng(7):
                agent.drawn = agent.act(obs, True)[0]  # type: ignore[assignment]
        assert torch.equal(plain.drawn, captured.drawn)  # type: ignore[arg-type]
        assert torch.equal(plain.act(obs, True)[0], captured.act(obs, True)[0])


def test_a_checkpoint_may_be_loaded_into_a_captured_agent(tmp_path: Path) -> None:
    plain, captured = tiny("td3"), tiny("td3", seed=5)
    accelerate(captured, graphs="tape")
    for k in range(9):
        plain.update(batch_for(plain, k))
        captured.update(batch_for(plain, 50 + k))
    with torch.random.fork_rng():
        checkpoint.save(tmp_path, "step_000000009", plain, {}, checkpoint.Snapshot({}), keep=1)
        checkpoint.load(tmp_path / "step_000000009", captured)
    for k in range(9):
        batch = batch_for(plain, 100 + k)
        plain.update(batch)
        captured.update(batch)
        assert equal(plain, captured), k


def test_a_learning_rate_changed_from_outside_is_noticed() -> None:
    plain, captured = tiny("sac"), tiny("sac")
    accelerate(captured, graphs="tape")
    for k in range(10):
        if k == 6:
            for agent in (plain, captured):
                agent.opt_pi.param_groups[0]["lr"] = 1e-2  # type: ignore[attr-defined]
        batch = batch_for(plain, k)
        plain.update(batch)
        captured.update(batch)
        assert equal(plain, captured), k


@pytest.mark.parametrize("name", ["ppo", "td3"])
def test_whole_runs_are_the_same(name: str) -> None:
    results = []
    for graphs in ("never", "tape"):
        cfg: dict[str, Any] = {"steps": 640, "hidden": (16, 16), "num_envs": 4}
        cfg |= {"horizon": 16, "minibatch_size": 32, "epochs": 2} if name == "ppo" else {"learning_starts": 400}
        env = make_probe("both", 4, seed=0)
        agent = rlctl.make_agent(name, env, agents.get(name).Config(**cfg))
        accelerate(agent, graphs=graphs)  # type: ignore[arg-type]
        run = rlctl.Run(make_eval_env=lambda n, seed: make_probe("both", n, seed=seed))
        run.config = rlctl.RunConfig(evaluations=2, eval_episodes=3, final_episodes=3)
        if name == "ppo":
            rlctl.on_policy(agent, env, run)
        else:
            rlctl.off_policy(agent, env, rlctl.Ring(1000), run)
        results.append((snapshot(agent), run.finish(agent)))
    assert all(torch.equal(results[0][0][k], results[1][0][k]) for k in results[0][0])
    assert results[0][1] == results[1][1]


@pytest.mark.slow
def test_compiled_losses_equal_plain_ones() -> None:
    """To rounding: the compiler fuses and reorders. Weights stay together over several updates of PPO."""
    plain, compiled = tiny("ppo"), tiny("ppo")
    assert accelerate(compiled, compile=True).compiled == ("loss",)
    for k in range(4):
        batch = batch_for(plain, k)
        expected, got = plain.update(batch), compiled.update(batch)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, atol=1e-4, rtol=1e-3)
    for key, value in snapshot(plain).items():
        torch.testing.assert_close(compiled.state_dict()[key], value, atol=1e-4, rtol=1e-3)


@pytest.fixture
def _matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_matmul_precision")
@pytest.mark.parametrize("graphs", ["never", "tape"])
@pytest.mark.parametrize("name", ["ppo", "sac", "td3"])
def test_bfloat16_losses(name: str, graphs: Any) -> None:
    """Near the float32 update, not equal to it; parameters, moments and actions stay float32."""
    plain, rough = tiny(name), tiny(name)
    report = accelerate(rough, precision="bf16", graphs=graphs)
    assert "bfloat16" in report.say()
    for k in range(6):
        batch = batch_for(plain, k)
        plain.update(batch)
        rough.update(batch)
    drift = [k for k in differing(rough, snapshot(plain)) if "weight" in k]
    assert drift
    for key, x in rough.state_dict().items():
        assert x.dtype == plain.state_dict()[key].dtype
        torch.testing.assert_close(x, plain.state_dict()[key], atol=2e-2, rtol=0.3)
    assert all(x.dtype == torch.float32 for x in moments(rough))
    assert rough.act(torch.zeros(2, OBS_DIM), explore=True)[0].dtype == torch.float32


@pytest.mark.usefixtures("_matmul_precision")
def test_the_precision_policy_is_explicit() -> None:
    assert "TF32 off" in accelerate(tiny("sac")).say()
    assert torch.get_float32_matmul_precision() == "highest"
    assert "TF32 factors" in accelerate(tiny("sac"), precision="tf32").say()
    assert torch.get_float32_matmul_precision() == "high"


# -------------------------------------------------------------------------------------------------------- host numbers
def recording(**counters: int) -> tuple[Recording, Counters]:
    host = Recording(counters, torch.device("cpu"))
    return host, Counters(host)


def test_numbers_remember_where_they_come_from() -> None:
    host, counters = recording(updates=4, env_steps=100)
    counters["updates"] += 1
    n = counters["updates"]
    assert isinstance(n, HostNumber)
    rate = 0.5 * max(1.0 - n / 10, 0.0)
    assert rate.value == 0.25
    assert rate.expression({"updates": 6, "env_steps": 0}) == 0.5 * (1 - 7 / 10)
    assert (-n).value == -5
    assert abs(-n).value == 5
    assert (2**n).value == 32
    assert math.floor(n / 2).value == 2  # type: ignore[attr-defined]
    assert host.counters_after({"updates": 6, "env_steps": 0}) == {"updates": 7}
    assert host.holds({"updates": 8, "env_steps": 0})
    assert not host.holds({"updates": 10, "env_steps": 0})  # the maximum is the other one there


@pytest.mark.parametrize(
    "decide",
    [
        lambda n: n % 2 == 0,
        lambda n: bool(n % 2),
        lambda n: not n % 2,
        lambda n: n > 3,
        lambda n: n in (4, 6),
        lambda n: {4: 1}.get(n, 0),
    ],
)
def test_decisions_leave_guards(decide: Any) -> None:
    host, counters = recording(updates=4)
    outcome = decide(counters["updates"])
    for k in range(12):
        if host.holds({"updates": k}):
            assert decide(k) == outcome
    assert host.holds({"updates": 4})


def test_values_taken_as_they_are_hold_for_themselves_alone() -> None:
    for take in (int, float, range, lambda n: [0] * 9 and [0, 1, 2, 3, 4, 5][n], "{}".format):
        host, counters = recording(updates=4)
        take(counters["updates"])
        assert [k for k in range(9) if host.holds({"updates": k})] == [4]


def test_numbers_beside_tensors_live_in_tensors() -> None:
    host, counters = recording(updates=4)
    n = counters["updates"]
    x = torch.ones(3)
    products = [n * x, x * n, x / n, x + n, n - x, x.mean() * n]
    assert [float(p.flatten()[0]) for p in products] == [4.0, 4.0, 0.25, 5.0, 3.0, 4.0]
    assert all(p.dtype == torch.float32 for p in products)
    assert (x.double() * n).dtype == torch.float64
    host.fill({"updates": 7})
    assert float(n.like(x)) == 7.0
    assert bool((x < n).all())
    assert not host.guards


def test_apply_follows_any_function() -> None:
    _, counters = recording(updates=4)
    root = apply(math.sqrt, counters["updates"])
    assert root.value == 2.0
    assert root.expression({"updates": 9}) == 3.0


def test_follow_gives_plain_numbers_back() -> None:
    agent = tiny("ppo")
    turn, _ = follow(agent, lambda: agent.update(batch_for(agent)))
    assert type(agent.counters) is dict
    assert agent.counters["updates"] == 1
    assert all(type(lr) is float for lr in settings(agent))
    assert turn.changed
    assert turn.holds({"updates": 1, "env_steps": 5})


# ------------------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", CAPTURABLE)
def test_gpu_graphs_equal_plain_updates(name: str) -> None:
    """The same kernels on the same numbers. Draws agree too, since both start from the same generator state."""
    plain, captured = (tiny(name, device="cuda:0", **SCHEDULED.get(name, {})) for _ in range(2))
    captured.load_state_dict(plain.state_dict())
    assert accelerate(captured).captured == ("update", "act")
    for k in range(UPDATES):
        source = tiny(name)
        batch = batch_for(source, k).map(lambda x: x.cuda())
        expected, got = plain.update(batch), captured.update(batch)
        for key in got:
            torch.testing.assert_close(got[key], expected[key].float(), atol=1e-4, rtol=1e-3)
    for key, x in plain.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[key], x, atol=1e-4, rtol=1e-3)
    assert captured.update.replays > 0  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_gpu_generators_survive_a_capture_that_fails() -> None:
    plain, agent = (tiny("sac", device="cuda:0") for _ in range(2))
    agent.load_state_dict(plain.state_dict())
    said: list[str] = []
    accelerate(agent, say=said.append)
    loss = agent.critic_loss

    def fails(*args: Any, **kwargs: Any) -> Any:
        out = loss(*args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # which no capture may hold
        return out

    agent.critic_loss = fails
    for k in range(8):
        batch = batch_for(tiny("sac"), k).map(lambda x: x.cuda())
        expected, got = plain.update(batch), agent.update(batch)
        for key in got:
            torch.testing.assert_close(got[key], expected[key].float(), atol=1e-4, rtol=1e-3)
    assert len(said) == 1
    assert "the capture failed" in said[0]
