"""EDAC: the diversity term, its gradient, and SAC-N and SAC as what is left without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.edac import EDAC
from rlctl.agents.sac import SAC
from rlctl.ops import minimize, polyak
from rlctl.types import Batch


def edac(**overrides: Any) -> EDAC:
    agent = tiny("edac", **overrides)
    assert isinstance(agent, EDAC)
    return agent


def like_sac(**overrides: Any) -> tuple[EDAC, SAC, Batch]:
    """EDAC with two critics and eta 0, and SAC with the same weights, temperature and generators."""
    agent, sac = edac(num_critics=2, eta=0.0, alpha=0.5, **overrides), tiny("sac", alpha=0.5)
    assert isinstance(sac, SAC)
    for ours, theirs in ((agent.pi, sac.pi), (agent.q, sac.q), (agent.q_lagged, sac.q_lagged)):
        ours.load_state_dict(theirs.state_dict())
    return agent, sac, batch_for(agent)


def test_without_diversity_two_critics_are_sac() -> None:
    """Losses of critics, actor and temperature, bit for bit on shared noise."""
    agent, sac, batch = like_sac()
    assert torch.equal(agent.critic_loss(batch), sac.critic_loss(batch))
    action, logp = agent.pi(batch.obs).sample_log_prob(generator=agent.rng["sample"])
    theirs, theirs_logp = sac.actor_loss(batch)
    assert torch.equal(agent.actor_loss(batch, action, logp), theirs)
    assert torch.equal(agent.alpha_loss(logp), sac.alpha_loss(theirs_logp))


def test_sac_n_takes_the_smallest_of_n(double: None) -> None:
    """Lagged values [4, 3, 5, 2, 6] and policy density: y = 1 + 0.9 (2 - 0.5 log pi)."""
    agent = edac(num_critics=5, eta=0.0, gamma=0.9, alpha=0.5)
    batch = transitions(torch.Generator().manual_seed(0), 2)
    batch = batch._replace(reward=torch.ones(2), terminated=torch.tensor([False, True]))
    noise = torch.randn(2, 2)
    _, logp = agent.pi(batch.next_obs).sample_log_prob(noise)
    agent.q_lagged = Table(torch.tensor([4.0, 3.0, 5.0, 2.0, 6.0])[:, None].expand(5, 2))  # type: ignore[assignment]
    values = torch.randn(5, 2).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    y = torch.stack([1 + 0.9 * (2 - 0.5 * logp[0].detach()), torch.tensor(1.0)])
    torch.testing.assert_close(agent.backup_of(batch, noise), y)
    loss = agent.critic_loss(batch, noise)
    assert float(loss.detach()) == pytest.approx(float((values.detach() - y).square().mean(1).sum()), rel=1e-12)
    actor = agent.actor_loss(batch, batch.action, torch.tensor([-1.0, 2.0]))
    expected = 0.5 * 0.5 - values.detach().amin(0).mean()
    assert float(actor.detach()) == pytest.approx(float(expected), rel=1e-12)


class Sloped(nn.Module):
    """Critics of given values [E, B] and action gradients [E, B, A]."""

    def __init__(self, values: Tensor, slopes: Tensor) -> None:
        super().__init__()
        self.values, self.slopes = values, slopes

    def with_action_gradient(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        return self.values, self.slopes


@pytest.mark.parametrize("eta", [1.0, 5.0])
def test_critic_loss_with_diversity_by_number(double: None, eta: float) -> None:
    """Unit gradients [1, 0], [.6, .8], [0, 1]: 1.4; errors 1, 2, 3 of each critic: 14."""
    agent = edac(eta=eta)
    batch = transitions(torch.Generator().manual_seed(0), 1)
    batch = batch._replace(reward=torch.tensor([0.5]), terminated=torch.tensor([True]))
    slopes = torch.tensor([[[2.0, 0.0]], [[0.6, 0.8]], [[0.0, 0.1]]])
    agent.q = Sloped(0.5 + torch.tensor([[1.0], [2.0], [3.0]]), slopes)  # type: ignore[assignment]
    assert float(agent.critic_loss(batch)) == pytest.approx(14 + 1.4 * eta, abs=1e-12)


def test_diversity_of_identical_critics_is_their_number(double: None) -> None:
    agent = edac(num_critics=4, eta=3.0)
    plain = edac(num_critics=4, eta=0.0)
    for m in agent.q.members:
        m.load_state_dict(agent.q.members[0].state_dict())
    plain.load_state_dict(agent.state_dict())
    batch, noise = batch_for(agent), torch.zeros(32, 2)
    extra = agent.critic_loss(batch, noise) - plain.critic_loss(batch, noise)
    assert float(extra.detach()) == pytest.approx(3.0 * 4, rel=1e-9)


def test_gradient_of_the_loss_is_that_of_finite_differences(double: None) -> None:
    """The second derivative goes through `gradients`, as in an update."""
    agent = edac(num_critics=2, eta=2.0)
    batch, noise = batch_for(agent), torch.zeros(32, 2)
    w = next(agent.q.members[0].parameters())
    (g,) = torch.autograd.grad(agent.critic_loss(batch, noise), w)
    index, eps, ends = divmod(int(g.abs().argmax()), w.shape[1]), 1e-6, []
    for shift in (eps, -2 * eps, eps):
        w.data[index] += shift
        ends.append(float(agent.critic_loss(batch, noise).detach()))
    assert float(g[index]) == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-4)


def test_a_large_eta_turns_the_critics_apart() -> None:
    def cosine(agent: EDAC) -> float:
        slopes = agent.q.with_action_gradient(batch.obs, batch.action)[1].detach()
        return float(nn.functional.cosine_similarity(slopes[0], slopes[1], dim=-1).mean())

    agents = [edac(num_critics=2, eta=eta, critic_lr=1e-2) for eta in (0.0, 50.0)]
    batch = batch_for(agents[0])
    for agent in agents:
        for _ in range(40):
            minimize(agent.critic_loss(batch), agent.opt_q)
    assert cosine(agents[1]) < cosine(agents[0]) - 0.5


def test_the_order_of_an_update() -> None:
    """Temperature; the actor by the new temperature; the critics by the new actor; the lagged critics."""
    agent, twin = edac(), edac()
    for seed in range(2):
        batch = batch_for(agent, seed)
        agent.update(batch)
        action, logp = twin.pi(batch.obs).sample_log_prob(generator=twin.rng["sample"])
        minimize(twin.alpha_loss(logp), twin.opt_alpha)
        minimize(twin.actor_loss(batch, action, logp), twin.opt_pi)
        minimize(twin.critic_loss(batch), twin.opt_q)
        polyak(twin.q, twin.q_lagged, twin.cfg.tau)
    assert differing(agent, snapshot(twin)) == []


def test_backups_without_entropy(double: None) -> None:
    """One draw; or of three draws the best, by each critic ([3, 4]: 3) or by the smallest ([1, 2, 0]: 2)."""
    batch = transitions(torch.Generator().manual_seed(0), 1)
    batch = batch._replace(reward=torch.tensor([1.0]), terminated=torch.tensor([False]))
    q = torch.tensor([[[1.0, 3.0, 0.0]], [[4.0, 2.0, 1.0]]])
    for backup, noise, values, known in (
        ("one", torch.zeros(1, 2), q[..., 1], 2.0),
        ("max-min", torch.randn(3, 1, 2), q, 3.0),
        ("min-max", torch.randn(3, 1, 2), q, 2.0),
    ):
        agent = edac(backup=backup, backup_actions=3, entropy_backup=False, gamma=0.9)
        agent.q_lagged = lagged = Table(values)  # type: ignore[assignment]
        assert agent.backup_of(batch, noise).tolist() == pytest.approx([1 + 0.9 * known])
        drawn = agent.pi(batch.next_obs).sample(noise)
        torch.testing.assert_close(lagged.seen[0][1], drawn if backup == "one" else drawn.movedim(0, 1))


def test_settings() -> None:
    with pytest.raises(ValueError, match="num_critics must be at least 2"):
        edac(num_critics=1, eta=1.0)
    with pytest.raises(ValueError, match="entropy_backup=false"):
        edac(backup="max-min")
    fixed = edac(alpha=0.25, learn_alpha=False)
    fixed.update(batch_for(fixed))
    assert float(fixed.log_alpha.exp()) == pytest.approx(0.25)
    assert set(fixed.optimizers()) == {"opt_pi", "opt_q"}
    agent = edac()
    for net, bound in ((agent.pi.net, 1e-3), (agent.q.members[2], 3e-3)):
        *hidden, weight, bias = (p.detach() for p in net.parameters())
        assert 0.5 * bound < float(weight.abs().max()) <= bound
        assert float(bias.abs().max()) <= bound
        assert all(bool((p == torch.tensor(0.1)).all()) for p in hidden if p.dim() == 1)
    assert agent.pi.log_std_bounds == (-5.0, 2.0)
