"""What FamO2O on IQL and on CQL have in common."""

from __future__ import annotations

import pytest
import torch
from agent_helpers import OBS_DIM, as_dataset, recorded_inputs, tiny, transitions

from rlctl.agents.famo2o_cql import FamO2OCQL
from rlctl.agents.famo2o_iql import FamO2OIQL


@pytest.mark.parametrize(
    ("algo", "networks"),
    [("famo2o-iql", ("pi", "balance", "v", "q", "q_lagged")), ("famo2o-cql", ("pi", "balance", "q", "q_lagged"))],
)
def test_every_network_sees_z_scored_observations(algo: str, networks: tuple[str, ...]) -> None:
    """In an update and while acting; the universal policy's six numbers of beta follow them."""
    agent = tiny(algo, normalize_obs=True)
    assert isinstance(agent, FamO2OIQL | FamO2OCQL)
    data = transitions(torch.Generator().manual_seed(5), 500)
    data = data._replace(obs=data.obs * 20 + 7, next_obs=data.next_obs * 20 + 7)
    agent.prepare(as_dataset(data))
    b = data.map(lambda x: x[:32])
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3
    known = [(x - mean) / std for x in (b.obs, b.next_obs)]
    seen = {name: recorded_inputs(getattr(agent, name)) for name in networks}
    for use in (lambda: agent.update(b), lambda: agent.act(b.obs, False), lambda: agent.act_by(b.obs, b.action)):
        use()
        for name, calls in seen.items():
            for inputs in calls:
                assert any(torch.allclose(inputs[0][:, :OBS_DIM], z, atol=1e-3) for z in known), name
    assert all(seen.values())
