"""What every registered algorithm must keep: it solves the probes, never reads a tensor on the host, resumes bit for
bit, acts reproducibly. New algorithms are covered by being registered; see `agent_helpers`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import (
    ACT_DIM,
    CORRECTED,
    IMITATORS,
    OBS_DIM,
    REWARD_SCALE,
    NoHostReads,
    batch_for,
    differing,
    snapshot,
    solve,
    tiny,
    value_of,
)

from rlctl import agents, checkpoint
from rlctl.config import build, field_docs
from rlctl.train import OfflineRLConfig
from rlctl.types import Agent, Spec
from rlctl_envs.probes import PROBES

NAMES = agents.names()
every_agent = pytest.mark.parametrize("name", NAMES)
REWARDLESS = IMITATORS | set(CORRECTED)
"""Neither the value nor the best action of a probe can be found by them; they are held to what they do promise."""
every_learner = pytest.mark.parametrize("name", [n for n in NAMES if n not in REWARDLESS])
"""All that learn from rewards."""


# ------------------------------------------------------------------------------------------------------------- probes
@pytest.mark.parametrize("name", sorted(REWARDLESS))
def test_whoever_is_excused_from_the_probes_ignores_rewards(name: str) -> None:
    results = []
    for scale in (1.0, -7.0):
        agent = tiny(name)
        for seed in range(3):
            batch = batch_for(agent, seed)
            agent.update(batch._replace(reward=scale * batch.reward))
        results.append(snapshot(agent))
    assert differing_keys(*results) == []


@pytest.mark.parametrize("probe", PROBES)
@every_learner
def test_solves_the_probes(name: str, probe: str) -> None:
    agent, env = solve(name, probe)
    starts = {"observation": [[-1.0], [1.0]], "both": [[-1.0], [1.0]], "delayed": [[0.0], [1.0]]}
    obs = torch.tensor(starts.get(probe, [[0.0]]))
    gamma = agent.cfg.gamma
    value, known = value_of(agent, obs) / REWARD_SCALE.get(name, 1.0), env.value(obs, gamma)
    tolerance = 0.1 if probe in ("action", "both") else 0.04 * max(float(known.abs().max()), 1.0)
    assert value.tolist() == pytest.approx(known.tolist(), abs=tolerance)
    if probe in ("action", "both"):
        action, _ = agent.act(obs, explore=False)  # 0.2 off costs 0.04; blind or wrong-signed actors are 0.4 off
        assert action.flatten().tolist() == pytest.approx(env.optimal_action(obs).flatten().tolist(), abs=0.2)


@pytest.mark.parametrize("probe", ["action", "both"])
@pytest.mark.parametrize("name", sorted(IMITATORS))
def test_an_imitator_copies_an_expert(name: str, probe: str) -> None:
    """What the probes can ask of it: the actions of the optimal policy, in every observation."""
    agent, env = solve(name, probe)
    obs = torch.tensor([[-1.0], [1.0]] if probe == "both" else [[0.0]])
    action, _ = agent.act(obs, explore=False)
    assert action.flatten().tolist() == pytest.approx(env.optimal_action(obs).flatten().tolist(), abs=0.05)


# ----------------------------------------------------------------------------------------------------- no host reads
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: 1 if x.sum() > 0 else 0,
    ],
)
def test_the_guard_sees_host_reads(read: Any) -> None:
    with pytest.raises(AssertionError, match="on the host"), NoHostReads():
        read(torch.ones(3))


MAY_READ = {"fixpo", "prdc"}
"""fixpo: how often it sweeps depends on what it finds. prdc: a KD-tree, on a CPU (test_prdc holds its other search to
the rule). They say so (`Agent.host_reads`) and cannot be captured."""
capturable = pytest.mark.parametrize("name", [n for n in NAMES if n not in MAY_READ])


@every_agent
def test_only_the_known_ones_claim_to_read_on_the_host(name: str) -> None:
    assert bool(agents.get(name).host_reads) == (name in MAY_READ)


@capturable
def test_update_never_reads_a_tensor_on_the_host(name: str) -> None:
    agent = tiny(name)
    batches = [batch_for(agent, seed) for seed in range(6)]
    with NoHostReads():
        for batch in batches:
            agent.update(batch)


def own_classes(cls: type[Agent]) -> list[type[Any]]:
    return [c for c in cls.__mro__ if issubclass(c, Agent) and c is not Agent]


HOST_METHODS = {"item", "tolist", "numpy", "cpu", "__array__"}
ONCE = {"__init__", "prepare"}
"""Run once, outside an update."""


def host_reads(source: str) -> Iterator[str]:
    """Suspicious calls in the methods of a class: `.item()` and its kin, and `float(x)`, `bool(x)`, `int(x)`."""
    for method in ast.walk(ast.parse(textwrap.dedent(source))):
        if not isinstance(method, ast.FunctionDef) or method.name in ONCE:
            continue
        for call in ast.walk(method):
            if not isinstance(call, ast.Call):
                continue
            f = call.func
            if isinstance(f, ast.Attribute) and f.attr in HOST_METHODS:
                yield f"{method.name}, line {call.lineno}: .{f.attr}()"
            elif isinstance(f, ast.Name) and f.id in ("float", "bool", "int") and call.args:
                if not isinstance(call.args[0], ast.Constant):
                    yield f"{method.name}, line {call.lineno}: {f.id}(...)"
            elif isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in ("np", "numpy"):
                yield f"{method.name}, line {call.lineno}: numpy"


def test_the_lint_sees_host_reads() -> None:
    source = """
    class A:
        def __init__(self, x):
            self.x = float(x)
        def update(self, x):
            return x.item(), float(x), np.mean(x), float("inf"), x.tolist()
    """
    assert len(list(host_reads(source))) == 4


@capturable
def test_no_host_reads_in_the_source(name: str) -> None:
    for cls in own_classes(agents.get(name)):
        assert list(host_reads(inspect.getsource(cls))) == []


# ------------------------------------------------------------------------------------------------------------- update
@every_agent
def test_metrics_and_gradients_after_an_update(name: str) -> None:
    agent = tiny(name)
    seen: dict[str, int] = {}
    for seed in range(4):
        metrics = agent.update(batch_for(agent, seed))
        for key, value in metrics.items():
            assert value.shape == (), key
            assert not value.requires_grad, key
            assert bool(value.isfinite()), key
            assert "/" in key, key  # a TensorBoard tag
            seen[key] = seen.get(key, 0) + 1
    assert any(k.startswith("losses/") for k in seen)
    assert all(p.grad is None for p in agent.parameters())
    assert agent.counters["updates"] == 4


@every_agent
def test_every_parameter_is_learned_by_one_optimiser_or_frozen(name: str) -> None:
    agent = tiny(name)
    owned = [id(p) for opt in agent.optimizers().values() for g in opt.param_groups for p in g["params"]]
    assert agent.optimizers()
    owned += [id(p) for p in agent.moved_by_hand()]
    assert len(owned) == len(set(owned))
    assert {id(p) for p in agent.parameters() if p.requires_grad} == set(owned)
    before = snapshot(agent)
    for seed in range(4):
        agent.update(batch_for(agent, seed))
    moved = set(differing(agent, before))
    idle = {k for k, p in agent.named_parameters() if p.requires_grad} - moved
    assert not idle


@every_agent
def test_update_leaves_the_batch_and_the_global_generator_alone(name: str) -> None:
    agent = tiny(name)
    batch = batch_for(agent)
    before = {k: v.clone() for k, v in batch.tensors().items()}
    state = torch.get_rng_state()
    agent.update(batch)
    agent.act(torch.zeros(2, OBS_DIM), explore=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in batch.tensors().items())


BACKUP_ALONE: dict[str, dict[str, Any]] = {n: {"cql_weight": 0.0} for n in ("cql", "cal-ql", "famo2o-cql", "pa-rl")}
"""Settings that leave the backup as the only use of a successor: CQL's penalty takes some of its actions from pi(s'),
whether or not the episode went on."""


@every_agent
def test_nothing_beyond_a_termination_counts(name: str) -> None:
    """With every step terminated, the successors may be anything."""
    results = []
    for scale in (1.0, -7.0):
        agent = tiny(name, **BACKUP_ALONE.get(name, {}))
        for seed in range(3):
            batch = batch_for(agent, seed)
            all_ended = torch.ones_like(batch.terminated)
            agent.update(batch._replace(next_obs=scale * batch.next_obs, terminated=all_ended))
        results.append(snapshot(agent))
    assert differing_keys(*results) == []


@every_learner
def test_the_successor_of_a_truncation_counts(name: str) -> None:
    results = []
    for scale in (1.0, -7.0):
        agent = tiny(name)
        for seed in range(3):
            batch = batch_for(agent, seed)
            no, yes = torch.zeros_like(batch.terminated), torch.ones_like(batch.truncated)
            agent.update(batch._replace(next_obs=scale * batch.next_obs, terminated=no, truncated=yes))
        results.append(snapshot(agent))
    assert differing_keys(*results)


@every_agent
def test_a_one_step_learner_ignores_where_episodes_were_cut(name: str) -> None:
    """On replayed single transitions a truncation is no event at all."""
    if agents.get(name).regime == "on_policy":
        pytest.skip("on-policy advantages are cut at truncations")
    results = []
    for flip in (False, True):
        agent = tiny(name)
        for seed in range(3):
            batch = batch_for(agent, seed)
            agent.update(batch._replace(truncated=batch.truncated ^ flip))
        results.append(snapshot(agent))
    assert differing_keys(*results) == []


def differing_keys(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [k for k in a if not torch.equal(a[k], b[k])]


FROM_DATA = [n for n in NAMES if issubclass(agents.get(n).Config, OfflineRLConfig) and n not in REWARDLESS]


@pytest.mark.parametrize("name", FROM_DATA)
def test_raw_rewards_are_transformed_in_the_update(name: str) -> None:
    """`2r+1` on raw rewards learns what no transform learns from rewards that are 2 r + 1 already."""
    results = []
    for transform in ("2r+1", "none"):
        agent = tiny(name, reward=transform)
        for seed in range(3):
            batch = batch_for(agent, seed)
            agent.update(batch if transform == "2r+1" else batch._replace(reward=2 * batch.reward + 1))
        results.append({k: x for k, x in snapshot(agent).items() if not k.startswith("reward.")})
    assert differing_keys(*results) == []
    assert differing_keys({k: x for k, x in snapshot(tiny(name)).items() if k in results[0]}, results[0])


# --------------------------------------------------------------------------------------------------------- checkpoint
@every_agent
def test_a_restored_agent_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    original = tiny(name, seed=0)
    for seed in range(3):
        original.update(batch_for(original, seed))
        original.act(torch.zeros(4, OBS_DIM), explore=True)
    with torch.random.fork_rng():
        checkpoint.save(tmp_path, "step_000000003", original, {}, checkpoint.Snapshot({"n": 3}), keep=1)
        restored = tiny(name, seed=1)  # other weights, other generators, fresh optimisers
        assert differing(restored, snapshot(original))
        snap = checkpoint.load(tmp_path / "step_000000003", restored)
    assert snap.state == {"n": 3}
    assert restored.counters == original.counters
    obs = torch.randn(4, OBS_DIM, generator=torch.Generator().manual_seed(9))
    for seed in range(10, 14):
        assert differing(restored, snapshot(original)) == []
        for explore in (False, True):
            assert torch.equal(original.act(obs, explore)[0], restored.act(obs, explore)[0])
        batch = batch_for(original, seed)
        ours, theirs = original.update(batch), restored.update(batch)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert differing(restored, snapshot(original)) == []


@every_agent
def test_the_weights_alone_are_enough_to_act(name: str, tmp_path: Path) -> None:
    original, other = tiny(name, seed=0), tiny(name, seed=1)
    for seed in range(2):
        original.update(batch_for(original, seed))
    checkpoint.save_agent(tmp_path / "best", original, {"score": 1})
    checkpoint.load_agent(tmp_path / "best", other)
    obs = torch.randn(4, OBS_DIM, generator=torch.Generator().manual_seed(9))
    assert torch.equal(original.act(obs, explore=False)[0], other.act(obs, explore=False)[0])


# ---------------------------------------------------------------------------------------------------------------- act
@every_agent
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("explore", [False, True])
def test_act_shape_and_dtype(name: str, n: int, explore: bool) -> None:
    action, extra = tiny(name).act(torch.randn(n, OBS_DIM), explore)
    assert action.shape == (n, ACT_DIM)
    assert action.dtype == torch.float32
    assert isinstance(extra, dict)
    assert all(len(x) == n for x in extra.values())


@every_agent
def test_act_draws_from_its_own_generator_alone(name: str) -> None:
    obs = torch.randn(5, OBS_DIM, generator=torch.Generator().manual_seed(0))
    draws = []
    for global_seed in (1, 2):
        agent = tiny(name)
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            draws.append([agent.act(obs, explore)[0] for explore in (True, False, True, False)])
    for a, b in zip(*draws, strict=True):
        assert torch.equal(a, b)
    first, mode, second, mode_again = draws[0]
    assert torch.equal(mode, mode_again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, mode)


@every_agent
def test_the_deterministic_action_takes_no_random_number(name: str) -> None:
    agent = tiny(name)
    before = {k: g.get_state() for k, g in agent.rng.items()}
    agent.act(torch.zeros(3, OBS_DIM), explore=False)
    assert all(torch.equal(g.get_state(), before[k]) for k, g in agent.rng.items())


@every_agent
def test_borrowed_generators_are_given_back(name: str) -> None:
    agent, twin = tiny(name), tiny(name)
    obs = torch.randn(5, OBS_DIM)
    with agent.borrowed_rng(7):
        first = agent.act(obs, explore=True)[0]
    with agent.borrowed_rng(7):
        again = agent.act(obs, explore=True)[0]
    assert torch.equal(first, again)
    assert torch.equal(agent.act(obs, explore=True)[0], twin.act(obs, explore=True)[0])


@every_agent
def test_each_row_is_acted_on_by_itself(name: str) -> None:
    agent = tiny(name)
    obs = torch.randn(5, OBS_DIM)
    together = agent.act(obs, explore=False)[0]
    for row, action in zip(obs, together, strict=True):
        torch.testing.assert_close(agent.act(row[None], explore=False)[0][0], action)


@every_agent
def test_predict(name: str) -> None:
    agent = tiny(name)
    rng = np.random.default_rng(0)
    one, many = rng.normal(size=OBS_DIM), rng.normal(size=(5, OBS_DIM))  # float64, as numpy gives them
    action, state = agent.predict(one)
    assert state is None
    assert isinstance(action, np.ndarray)
    assert action.shape == (ACT_DIM,)
    assert action.dtype == np.float32
    actions, _ = agent.predict(many)
    assert actions.shape == (5, ACT_DIM)
    np.testing.assert_array_equal(actions, agent.predict(many)[0])
    expected = agent.act(torch.from_numpy(many).float(), explore=False)[0].clamp(-1, 1)
    np.testing.assert_array_equal(actions, expected.detach().numpy())
    noisy = [agent.predict(np.tile(one, (200, 1)), deterministic=False)[0] for _ in range(2)]
    assert not np.array_equal(*noisy)
    assert all(np.abs(x).max() <= 1 for x in noisy)


# ------------------------------------------------------------------------------------------------------------- config
@every_agent
def test_config_is_frozen_documented_and_has_defaults(name: str) -> None:
    cls = agents.get(name)
    cfg = cls.Config()
    docs = field_docs(cls.Config)
    for field in dataclasses.fields(cls.Config):
        assert docs.get(field.name, "").endswith("."), f"{cls.Config.__name__}.{field.name} has no sentence below it"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cfg, field.name, None)
    assert build(cls.Config, {"steps": 5}, "algo").steps == 5
    assert isinstance(agents.make(name, Spec(OBS_DIM, ACT_DIM, getattr(cfg, "num_envs", 1))), cls)


@every_agent
def test_the_docstring_cites_its_source(name: str) -> None:
    module = inspect.getmodule(agents.get(name))
    assert module is not None
    doc = module.__doc__ or ""
    assert "Source:" in doc
    assert "Differs:" in doc
    if name in agents.ENTRIES:
        assert agents.ENTRIES[name].paper in doc


# -------------------------------------------------------------------------------------------------------------- seeds
@every_agent
def test_one_seed_one_result(name: str) -> None:
    states = []
    for seed, global_seed in ((3, 1), (3, 2), (4, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            agent = tiny(name, seed=seed)
            start = snapshot(agent)
            for k in range(5):
                agent.update(batch_for(agent, k))
        states.append((start, snapshot(agent)))
    same, again, other = states
    assert differing_keys(same[0], again[0]) == []
    assert differing_keys(same[1], again[1]) == []
    weights = [k for k, x in same[0].items() if k.endswith("weight") and x.dim() > 1]  # a LayerNorm starts at 1
    assert set(weights) <= set(differing_keys(same[0], other[0]))
    assert set(weights) <= set(differing_keys(same[1], other[1]))


def test_making_an_agent_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    tiny(NAMES[0])
    assert torch.equal(torch.get_rng_state(), state)
