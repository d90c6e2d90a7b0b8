"""RLPD: as SAC it is SAC; its subset of critics, the entropy in its backup, its rhythm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import ACT_DIM, CriticTable, batch_for, differing, snapshot, tiny

from rlctl.agents.rlpd import RLPD

AS_SAC = {
    "num_critics": 2,
    "backup_critics": 2,
    "policy_every": 1,
    "layer_norm": False,
    "actor_value": "min",
    "target_entropy": -float(ACT_DIM),
}


def rlpd(**overrides: Any) -> RLPD:
    agent = tiny("rlpd", **overrides)
    assert isinstance(agent, RLPD)
    return agent


def test_with_two_critics_it_is_sac_bit_for_bit() -> None:
    sac, as_sac = tiny("sac", alpha=0.3), rlpd(alpha=0.3, **AS_SAC)
    assert differing(as_sac, snapshot(sac)) == []
    for seed in range(4):
        batch = batch_for(sac, seed)
        ours, theirs = as_sac.update(batch), sac.update(batch)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert differing(as_sac, snapshot(sac)) == []


@pytest.mark.parametrize("change", ["num_critics", "policy_every", "layer_norm", "actor_value", "target_entropy"])
def test_each_of_those_settings_matters(change: str) -> None:
    sac = tiny("sac", alpha=0.3)
    other = rlpd(alpha=0.3, **{k: v for k, v in AS_SAC.items() if k != change})
    for seed in range(2):
        sac.update(batch_for(sac, seed))
        other.update(batch_for(sac, seed))
    theirs = other.state_dict()
    assert any(k not in theirs or not torch.equal(v, theirs[k]) for k, v in sac.state_dict().items())


@pytest.mark.parametrize("entropy_backup", [True, False])
def test_backup_by_hand(double: None, entropy_backup: bool) -> None:
    """y = r + 0.9 (1 - terminated) (min over a random pair - 0.5 log pi); a truncation changes nothing."""
    agent = rlpd(gamma=0.9, alpha=0.5, num_critics=3, entropy_backup=entropy_backup)
    batch = batch_for(agent)
    g = agent.rng["sample"].clone_state()
    q = torch.randn(3, len(batch.reward), generator=torch.Generator().manual_seed(3))
    agent.q_lagged, agent.q = CriticTable(q), CriticTable(torch.zeros(3, len(batch.reward)))  # type: ignore[assignment]
    _, logp = agent.pi(batch.next_obs).sample_log_prob(generator=g)
    pair = torch.randperm(3, generator=g)[:2].tolist()
    y = [
        float(r) + 0.9 * (0.0 if t else min(float(q[j, i]) for j in pair) - (0.5 * float(lp) if entropy_backup else 0))
        for i, (r, t, lp) in enumerate(zip(batch.reward, batch.terminated, logp.detach(), strict=True))
    ]
    expected = 3 * torch.tensor(y).square().mean()
    torch.testing.assert_close(agent.critic_loss(batch), expected, rtol=1e-10, atol=0)


def test_the_actor_climbs_the_mean() -> None:
    agent = rlpd(num_critics=3, alpha=0.1)
    batch = batch_for(agent)
    g = agent.rng["sample"].clone_state()
    loss, logp = agent.actor_loss(batch)
    action, again = agent.pi(batch.obs).sample_log_prob(generator=g)
    assert torch.equal(logp, again)
    torch.testing.assert_close(loss, (0.1 * again - agent.q(batch.obs, action).mean(0)).mean())


def test_critics_at_every_update_the_rest_at_every_third() -> None:
    agent = rlpd(policy_every=3, tau=0.1)
    for k in range(1, 7):
        before, lagged = snapshot(agent), snapshot(agent.q_lagged)
        metrics = agent.update(batch_for(agent, k))
        moved = {name.split(".")[0] for name in differing(agent, before)}
        assert moved == {"q", "q_lagged"} | ({"pi", "log_alpha"} if k % 3 == 0 else set())
        assert ("losses/actor" in metrics) == (k % 3 == 0)
        now = agent.q.state_dict()
        for name, v in agent.q_lagged.state_dict().items():
            torch.testing.assert_close(v, lagged[name] + 0.1 * (now[name] - lagged[name]))


def test_entropy_target_and_subset() -> None:
    assert rlpd().target_entropy == -ACT_DIM / 2
    assert rlpd(target_entropy=-5.0).target_entropy == -5.0
    with pytest.raises(ValueError, match="1 to 3 critics"):
        rlpd(num_critics=3, backup_critics=4)
