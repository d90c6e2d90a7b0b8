"""What every registered algorithm must keep: the checks of `rlctl.conformance`, which `rlctl check algo` runs.

New algorithms are covered by being registered; see `rlctl/conformance/settings.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Any

import pytest
import torch
from agent_helpers import NoHostReads, as_dataset, batch_for, differing_keys, host_reads, snapshot, tiny

from rlctl import agents
from rlctl.config import field_docs
from rlctl.conformance import Skip
from rlctl.conformance.algo import CHECKS
from rlctl.conformance.settings import traits
from rlctl.train import OfflineRLConfig
from rlctl_envs.probes import PROBES

NAMES = agents.names()
every_agent = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a second write many files, and are read back through the same kernel."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


COSTLY = {"cal-ql", "famo2o-cql", "famo2o-iql", "a2pr", "edac", "pmoe-sac"} | {
    "diffusion-ql",
    "expo",
    "fql",
    "idql",
    "ifql",
    "pa-rl",
    "rlpd",
    "gorl-sac",
}
"""Variants of learners that solve every probe in the default suite, and learners of several seconds a probe: theirs are
two (values over time, the choice of an action by the observation), the others are slow."""
SLOW = {f"probe-{which}" for which in PROBES} - {"probe-delayed", "probe-both"}


@pytest.mark.parametrize(
    ("name", "check"),
    [pytest.param(n, c, marks=[pytest.mark.slow] if n in COSTLY and c in SLOW else []) for c in CHECKS for n in NAMES],
)
def test_check(name: str, check: str) -> None:
    try:
        CHECKS[check](name)
    except Skip as e:
        pytest.skip(str(e))


# ------------------------------------------------------------------------------------------------------------ rewards
FROM_DATA = [n for n in NAMES if issubclass(agents.get(n).Config, OfflineRLConfig) and traits(n).learns == "values"]


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


# --------------------------------------------------------------------------------------------------------------- data
FITS = [n for n in NAMES if agents.get(n).sources() == {"data"}]


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize(("obs", "act"), [(1, 0), (0, -1)])
def test_data_of_other_dimensions_are_refused(name: str, obs: int, act: int) -> None:
    """One action dimension would broadcast over three, in silence."""
    agent = tiny(name)
    batch = batch_for(agent)
    own = agent.spec
    wide = {"obs": own.obs_dim + obs, "next_obs": own.obs_dim + obs, "action": own.act_dim + act}
    data = as_dataset(batch._replace(**{k: torch.zeros(len(batch.reward), n) for k, n in wide.items()}))
    with pytest.raises(ValueError, match=f"observations of {own.obs_dim + obs} and actions of {own.act_dim + act}"):
        agent.prepare(data)


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
        lambda x: x.unique(),
        lambda x: torch.arange(3).repeat_interleave(x.long()),
        lambda x: x.index_put((x > 0,), x),
        lambda x: torch.linalg.cholesky(x[:, None] * x),
        lambda x: x.to("meta"),
    ],
)
def test_the_guard_sees_host_reads(read: Any) -> None:
    with pytest.raises(AssertionError, match=r"on the host|from cpu to meta"), NoHostReads():
        read(torch.ones(3))


def test_the_guard_lets_the_rest_pass() -> None:
    x = torch.ones(3)
    with NoHostReads():
        x.index_put((torch.tensor([0, 2]),), x[:2])
        torch.arange(3).repeat_interleave(torch.ones(3, dtype=torch.long), output_size=3)
        torch.arange(3).repeat_interleave(2)
        x.to(torch.float64).copy_(x)
        torch.where(x > 0, x, 0.0)


MAY_READ = {"fixpo", "prdc"}
"""fixpo: how often it sweeps depends on what it finds. prdc: a KD-tree, on a CPU (test_prdc holds its other search to
the rule). They say so (`Agent.host_reads`) and cannot be captured."""


@every_agent
def test_only_the_known_ones_claim_to_read_on_the_host(name: str) -> None:
    assert bool(agents.get(name).host_reads) == (name in MAY_READ)


def test_the_lint_sees_host_reads() -> None:
    source = """
    class A:
        def __init__(self, x):
            self.x = float(x)
        def update(self, x):
            return x.item(), float(x), np.mean(x), float("inf"), x.tolist()
    """
    assert len(list(host_reads(source))) == 4


# -------------------------------------------------------------------------------------------------------- house style
@every_agent
def test_every_setting_says_what_it_means(name: str) -> None:
    cls = agents.get(name)
    docs = field_docs(cls.Config)
    for field in dataclasses.fields(cls.Config):
        assert docs.get(field.name, "").endswith("."), f"{cls.Config.__name__}.{field.name} has no sentence below it"


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
def test_making_an_agent_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    tiny(NAMES[0])
    assert torch.equal(torch.get_rng_state(), state)
