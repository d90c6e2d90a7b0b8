"""CQL: the conservative gap by number and by loops, the multiplier in both forms, SAC as what is left without it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.cql import CQL
from rlctl.agents.sac import SAC
from rlctl.ops import apply_gradients, gradients, minimize, polyak

C = 2.8919092898
"""The conservative gap of `by_table`."""


def cql(**overrides: Any) -> CQL:
    agent = tiny("cql", **overrides)
    assert isinstance(agent, CQL)
    return agent


def by_table(**overrides: Any) -> tuple[CQL, Tensor]:
    """One state, A = 2: values [1, 2] from the box, [0, 2.5] from pi(s'), [.5, 1.5] from pi(s); data value 1.2."""
    agent = cql(**overrides)
    box = -2 * math.log(2)
    log_density = torch.tensor([[box, box, -0.5, 0.2, -1.0, 0.3]])
    agent.candidates = lambda b, noise=None: (torch.zeros(1, 6, 2), log_density)  # type: ignore[method-assign]
    agent.q = Table(torch.tensor([1.0, 2.0, 0.0, 2.5, 0.5, 1.5]).expand(2, 1, 6))  # type: ignore[assignment]
    return agent, torch.tensor([[1.2], [1.2]])


@pytest.mark.parametrize(("penalty", "known"), [("importance", C), ("plain", 2.2886085417)])
def test_gap_by_number(double: None, penalty: str, known: float) -> None:
    agent, q = by_table(penalty=penalty, cql_weight=5.0)
    gap = agent.gap(transitions(torch.Generator(), 1), q)
    assert gap.tolist() == pytest.approx([known, known], abs=1e-9)
    assert float(agent.conservative_loss(gap)) == pytest.approx(2 * 5 * known, abs=1e-8)


@pytest.mark.parametrize(("form", "known"), [("official", 13.6595464491), ("scaled", 10.4595464491)])
def test_lagrange_terms_by_number(double: None, form: str, known: float) -> None:
    """Multiplier 1, weight 5, target gap 0.8; the multiplier's gradient is minus the mean term of the two critics."""
    agent, q = by_table(lagrange_gap=0.8, lagrange_form=form, cql_weight=5.0)
    gap = agent.gap(transitions(torch.Generator(), 1), q)
    assert float(agent.conservative_loss(gap).detach()) == pytest.approx(2 * known, abs=1e-8)
    (g,) = torch.autograd.grad(agent.multiplier_loss(gap), agent.log_multiplier)
    assert float(g) == pytest.approx(-known, abs=1e-8)
    agent.log_multiplier.data.fill_(math.log(3.0))
    assert float(agent.conservative_loss(gap).detach()) == pytest.approx(6 * known, abs=1e-7)
    agent.log_multiplier.data.fill_(100.0)
    assert float(agent.conservative_loss(gap).detach()) == pytest.approx(2e6 * known, rel=1e-9)


@pytest.mark.parametrize(("form", "threshold"), [("official", 2.0), ("scaled", 10.0)])
def test_the_multiplier_grows_where_the_gap_is_above_its_target(form: str, threshold: float) -> None:
    """Target 10, weight 5: the official form compares 5 C with it, the scaled one C itself."""
    agent = cql(lagrange_gap=10.0, lagrange_form=form, cql_weight=5.0)
    for gap, sign in ((threshold - 0.01, 1), (threshold + 0.01, -1)):
        (g,) = torch.autograd.grad(agent.multiplier_loss(torch.tensor([gap, gap])), agent.log_multiplier)
        assert sign * float(g) > 0


def test_gap_equals_its_loops(double: None) -> None:
    """Every action is judged at s; those of pi(s') are weighed by their density at s'."""
    agent = cql(num_actions=2, temperature=0.7)
    batch = transitions(torch.Generator().manual_seed(1), 3)
    noise = [torch.rand(2, 3, 2), torch.randn(2, 3, 2), torch.randn(2, 3, 2)]
    gap = agent.gap(batch, agent.q(batch.obs, batch.action), noise)
    for e, member in enumerate(agent.q.members):
        total = 0.0
        for b in range(3):
            entries = []
            for k in range(2):
                drawn = [(2 * noise[0][k, b] - 1, torch.tensor(-2 * math.log(2)))]
                for obs, z in ((batch.next_obs[b], noise[1][k, b]), (batch.obs[b], noise[2][k, b])):
                    drawn.append(agent.pi(obs).sample_log_prob(z))
                entries += [(member(torch.cat([batch.obs[b], a]))[0] - logp) / 0.7 for a, logp in drawn]
            data = member(torch.cat([batch.obs[b], batch.action[b]]))[0]
            total += float((0.7 * torch.stack(entries).logsumexp(0) - data).detach())
        assert float(gap[e].detach()) == pytest.approx(total / 3, rel=1e-9)


def test_gradients_of_the_gap(double: None) -> None:
    """-1 / B at the data's values; none reaches the policy; the bound on a sample's gap stops both its sides."""
    agent = cql()
    batch = batch_for(agent)
    q = agent.q(batch.obs, batch.action).detach().requires_grad_()
    gap = agent.gap(batch, q)
    (g,) = torch.autograd.grad(gap.sum(), q, retain_graph=True)
    torch.testing.assert_close(g, torch.full((2, 32), -1 / 32))
    assert not any(torch.autograd.grad(gap.sum(), list(agent.pi.parameters()), allow_unused=True, retain_graph=True))
    assert all(x is not None for x in torch.autograd.grad(gap.sum(), list(agent.q.parameters())))
    floored = cql(gap_floor=-200.0)
    high = q.detach() + torch.tensor([1e3, 0.0]).repeat(16)  # every other sample far below the bound
    bounded = floored.gap(batch, high.requires_grad_())
    (g,) = torch.autograd.grad(bounded.sum(), high)
    torch.testing.assert_close(g, torch.tensor([0.0, -1 / 32]).repeat(16).expand(2, 32))
    assert float(bounded.detach().mean()) == pytest.approx(-100, abs=5)


def test_the_gap_ignores_a_constant_in_q(double: None) -> None:
    agent = cql()
    batch = batch_for(agent)
    noise = [torch.rand(3, 32, 2), torch.randn(3, 32, 2), torch.randn(3, 32, 2)]
    before = agent.gap(batch, agent.q(batch.obs, batch.action), noise).detach()
    for m in agent.q.members:
        list(m.parameters())[-1].data += 50.0
    torch.testing.assert_close(agent.gap(batch, agent.q(batch.obs, batch.action), noise).detach(), before)


# --------------------------------------------------------------------------------------------------- soft actor-critic
def test_without_the_penalty_it_is_sac() -> None:
    """Losses of critics, actor and temperature, bit for bit on shared noise; no action is drawn for a penalty."""
    agent, sac = cql(cql_weight=0.0, entropy_backup=True, alpha=0.5, bc_share=0.0), tiny("sac", alpha=0.5)
    assert isinstance(sac, SAC)
    for ours, theirs in ((agent.pi, sac.pi), (agent.q, sac.q), (agent.q_lagged, sac.q_lagged)):
        ours.load_state_dict(theirs.state_dict())
    batch = batch_for(agent)
    assert torch.equal(agent.critic_loss(batch, agent.q(batch.obs, batch.action)), sac.critic_loss(batch))
    action, logp = agent.pi(batch.obs).sample_log_prob(generator=agent.rng["sample"])
    theirs, theirs_logp = sac.actor_loss(batch)
    assert torch.equal(agent.actor_loss(batch, action, logp), theirs)
    assert torch.equal(agent.alpha_loss(logp), sac.alpha_loss(theirs_logp))
    agent.candidates = None  # type: ignore[method-assign, assignment]
    assert "losses/conservative_gap" not in agent.update(batch)


def test_backups(double: None) -> None:
    """r = 1, gamma 0.9: one draw with and without entropy; of three draws the best by either rule; a termination."""
    batch = transitions(torch.Generator().manual_seed(0), 2)
    batch = batch._replace(reward=torch.ones(2), terminated=torch.tensor([False, True]))
    q = torch.tensor([[1.0, 3.0, 0.0], [4.0, 2.0, 1.0]])[:, None].expand(2, 2, 3)
    for settings, values, known in (
        ({}, q[..., 1], 2.0),
        ({"backup": "max-min"}, q, 3.0),
        ({"backup": "min-max"}, q, 2.0),
    ):
        agent = cql(gamma=0.9, num_actions=3, **settings)
        agent.q_lagged = lagged = Table(values)  # type: ignore[assignment]
        noise = torch.randn(3, 2, 2) if settings else torch.randn(2, 2)
        assert agent.backup_of(batch, noise).tolist() == pytest.approx([1 + 0.9 * known, 1.0])
        drawn = agent.pi(batch.next_obs).sample(noise)
        torch.testing.assert_close(lagged.seen[0][1], drawn.movedim(0, 1) if settings else drawn)


def test_the_policy_starts_as_a_clone(double: None) -> None:
    """E[alpha log pi - log pi(a_data)] for `bc_share` of the updates, then the critics' view."""
    agent = cql(alpha=0.5, steps=8, bc_share=0.25)
    batch = batch_for(agent)
    logp = torch.tensor([-1.0, 3.0]).repeat(16)
    known = 0.5 * 1.0 - float(agent.pi(batch.obs).log_prob(batch.action).mean().detach())
    assert float(agent.cloning_loss(batch, logp).detach()) == pytest.approx(known, rel=1e-9)
    edge = torch.full((32, 2), 1 - 1e-5)  # as which an action at the edge of the box counts
    known = 0.5 * 1.0 - float(agent.pi(batch.obs).log_prob(edge).mean().detach())
    assert float(agent.cloning_loss(batch._replace(action=torch.ones(32, 2)), logp).detach()) == pytest.approx(known)
    called: list[str] = []
    cloning, acting = agent.cloning_loss, agent.actor_loss
    agent.cloning_loss = lambda *a: (called.append("clone"), cloning(*a))[1]  # type: ignore[method-assign]
    agent.actor_loss = lambda *a: (called.append("act"), acting(*a))[1]  # type: ignore[method-assign]
    for _ in range(4):
        agent.update(batch)
    assert called == ["clone", "clone", "act", "act"]
    # resumed to a length of which a quarter is more: the policy goes on as it was
    longer = cql(alpha=0.5, steps=80, bc_share=0.25)
    longer.counters |= agent.counters
    longer.cloning_loss = lambda *a: pytest.fail("cloned again")  # type: ignore[assignment,method-assign]
    longer.update(batch)


@pytest.mark.parametrize("simultaneous", [False, True])
def test_the_order_of_an_update(simultaneous: bool) -> None:
    """Temperature, multiplier, critics, actor, stepped in this order; or all at the end.

    Either way the critics' loss is weighted by the multiplier of before its step (the official code takes the step
    between computing that loss and going back through it), the actor's gradient is that at the old critics, and the
    penalty's actions are the old policy's. What the order decides is which temperature the actor sees.
    """
    settings: dict[str, Any] = {"lagrange_gap": 1.0, "bc_share": 0.0, "simultaneous": simultaneous}
    agent, twin = cql(**settings), cql(**settings)
    for seed in range(2):
        batch = batch_for(agent, seed)
        agent.update(batch)
        action, logp = twin.pi(batch.obs).sample_log_prob(generator=twin.rng["sample"])
        g_alpha = gradients(twin.alpha_loss(logp), twin.opt_alpha)
        if not simultaneous:
            apply_gradients(twin.opt_alpha, g_alpha)
        g_pi = gradients(twin.actor_loss(batch, action, logp), twin.opt_pi)
        q = twin.q(batch.obs, batch.action)
        td, gap = twin.critic_loss(batch, q), twin.gap(batch, q)
        g_q = gradients(td + twin.conservative_loss(gap), twin.opt_q)
        minimize(twin.multiplier_loss(gap), twin.opt_multiplier)
        if simultaneous:
            apply_gradients(twin.opt_alpha, g_alpha)
        apply_gradients(twin.opt_q, g_q)
        apply_gradients(twin.opt_pi, g_pi)
        polyak(twin.q, twin.q_lagged, twin.cfg.tau)
    assert differing(agent, snapshot(twin)) == []


def test_the_penalty_lowers_other_actions_and_not_the_data_s() -> None:
    """The same rewards everywhere: what is left is the conservative term."""
    agents = [cql(cql_weight=w, critic_lr=1e-2, bc_share=1.0) for w in (0.0, 10.0)]
    batch = batch_for(agents[0])
    batch = batch._replace(action=torch.full((32, 2), 0.8), reward=torch.ones(32), terminated=torch.ones(32) > 0)
    differences = []
    for agent in agents:
        for _ in range(60):
            agent.update(batch)
        q = agent.q(batch.obs, torch.tensor([[0.8, 0.8], [-0.8, -0.8]]).expand(32, 2, 2)).detach().mean((0, 1))
        differences.append(float(q[0] - q[1]))
    assert differences[1] > differences[0] + 1.0


def test_critics_have_layers_of_their_own() -> None:
    """`critic_hidden` and `layer_norm` are theirs; without them they are built like the policy."""
    for settings, widths, block in (
        ({"critic_hidden": (6, 4), "layer_norm": True}, [6, 4, 1], ["Linear", "LayerNorm", "ReLU"]),
        ({"critic_hidden": None}, [8, 8, 1], ["Linear", "ReLU"]),
    ):
        agent = cql(hidden=(8, 8), **settings)
        for member in agent.q.members:
            assert [m.out_features for m in member.children() if isinstance(m, nn.Linear)] == widths
            assert [type(m).__name__ for m in member.children()] == block * 2 + ["Linear"]
        assert [type(m).__name__ for m in agent.pi.net.children()] == ["Linear", "ReLU"] * 2 + ["Linear"]


def test_settings() -> None:
    with pytest.raises(ValueError, match="entropy_backup=false"):
        cql(backup="max-min", entropy_backup=True)
    with pytest.raises(ValueError, match="cql_weight above 0"):
        cql(cql_weight=0.0, lagrange_gap=1.0)
    fixed = cql(alpha=0.25, learn_alpha=False)
    fixed.update(batch_for(fixed))
    assert float(fixed.log_alpha.exp()) == pytest.approx(0.25)
    assert set(fixed.optimizers()) == {"opt_pi", "opt_q"}
    assert set(cql(lagrange_gap=1.0).optimizers()) == {"opt_pi", "opt_q", "opt_alpha", "opt_multiplier"}
