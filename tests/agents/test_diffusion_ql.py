"""Diffusion-QL: its losses by number, what they differentiate, the order of an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, recorded_inputs, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.diffusion_ql import DiffusionQL
from rlctl.nets import DiffusionPolicy
from rlctl.ops import minimize, polyak
from rlctl.types import Batch


def dql(**overrides: Any) -> DiffusionQL:
    agent = tiny("diffusion-ql", **overrides)
    assert isinstance(agent, DiffusionQL)
    return agent


def rows(n: int) -> Batch:
    return transitions(torch.Generator().manual_seed(0), n)._replace(
        reward=torch.tensor([1.0, 2.0, 3.0])[:n],
        terminated=torch.tensor([False, True, False])[:n],
        truncated=torch.tensor([True, False, False])[:n],
    )


def test_critic_loss_by_hand(double: None) -> None:
    """y = r + 0.9 (1 - terminated) min_j = [1.9, 2, 3 - 1.8]; a truncation changes nothing; a' is the slow policy's."""
    agent = dql(gamma=0.9)
    agent.q_lagged = Table(torch.tensor([[1.0, 5.0, -1.0], [4.0, 1.5, -2.0]]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    batch = rows(3)
    noise = agent.slow.slow.draw_noise(batch.obs)  # type: ignore[operator]
    loss = agent.critic_loss(batch, noise)
    error = values.detach() - torch.tensor([1.9, 2.0, 1.2])
    assert float(loss.detach()) == pytest.approx(float(error.square().mean(1).sum()), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], 2 * error / 3)
    obs, action = agent.q_lagged.seen[0]
    assert torch.equal(obs, batch.next_obs)
    assert torch.equal(action, agent.slow.slow.sample(batch.next_obs, noise=noise))


def test_max_q_backup_by_hand(double: None) -> None:
    """Each critic's best of two actions, then the smaller critic: min(3, 5), min(2, 4), min(0, -1)."""
    agent = dql(gamma=0.9, max_q_backup=True, num_backup=2)
    agent.q_lagged = Table(  # type: ignore[assignment]
        torch.tensor([[[3.0, 1.0], [2.0, -1.0], [-5.0, 0.0]], [[0.0, 5.0], [4.0, 4.0], [-1.0, -2.0]]])
    )
    agent.q = Table(torch.zeros(2, 3))  # type: ignore[assignment]
    backup = torch.tensor([1 + 0.9 * 3, 2.0, 3 - 0.9])
    assert float(agent.critic_loss(rows(3))) == pytest.approx(2 * float(backup.square().mean()), abs=1e-12)
    assert agent.q_lagged.seen[0][1].shape == (3, 2, 2)


@pytest.mark.parametrize(("heads", "known"), [(True, -3 / 2), (False, 1 / 3)])
def test_value_term_by_number(double: None, heads: bool, known: float) -> None:
    """Q_1 = [2, 4] over mean |Q_2| = 2, or Q_2 = [1, -3] over mean |Q_1| = 3; the divisor has no gradient."""
    agent = dql()
    values = torch.tensor([[2.0, 4.0], [1.0, -3.0]]).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    loss = agent.q_loss(rows(2), coin=torch.tensor(heads))
    assert float(loss.detach()) == pytest.approx(known, abs=1e-12)
    expected = [[-0.25, -0.25], [0.0, 0.0]] if heads else [[0.0, 0.0], [-1 / 6, -1 / 6]]
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], torch.tensor(expected))


def test_both_critics_have_their_turn() -> None:
    agent, b = dql(), batch_for(dql())
    agent.q = Table(torch.tensor([[1.0] * 32, [-1.0] * 32]))  # type: ignore[assignment]
    signs = {float(agent.q_loss(b)) for _ in range(20)}
    assert signs == {-1.0, 1.0}


class Scaled(nn.Module):
    """Q_j = factor_j * value(a)."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = torch.tensor(factors)[:, None]

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.factors * (action.sum(-1) + obs[..., 0])


def test_the_scale_of_rewards_does_not_matter_to_the_actor(double: None) -> None:
    agent, b = dql(), batch_for(dql())
    b = b.map(lambda x: x.double() if x.is_floating_point() else x)
    params, grads = list(agent.slow.policy.parameters()), []
    noise = agent.slow.policy.draw_noise(b.obs)  # type: ignore[operator]
    for scale in (1.0, 70.0):
        agent.q = Scaled(scale, 1.5 * scale)  # type: ignore[assignment]
        grads.append(torch.autograd.grad(agent.q_loss(b, noise, torch.tensor(True)), params))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_the_gradient_passes_through_the_whole_chain(double: None) -> None:
    """Nonzero at the noise the first step starts from: no step is cut off."""
    agent = dql()
    agent.q = Scaled(1.0, 1.0)  # type: ignore[assignment]
    policy = agent.slow.policy
    assert isinstance(policy, DiffusionPolicy)
    obs = torch.randn(64, 3)
    noise = policy.draw_noise(obs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    b = rows(1)._replace(obs=obs)
    (g,) = torch.autograd.grad(agent.q_loss(b, noise, torch.tensor(True)), noise)
    assert float((g[:, 0] != 0).double().mean()) > 0.05  # where no step and no action is clipped
    assert not bool(g[:, -1].any())  # the last step adds no noise


def test_eta_zero_is_behaviour_cloning() -> None:
    """Bit for bit what `diffusion-bc` does, whatever the critics say."""
    agent, other = dql(eta=0.0, max_grad_norm=None), tiny("diffusion-bc", normalize_obs=False)
    agent.slow.load_state_dict(other.pi.state_dict())  # type: ignore[union-attr]
    for seed in range(3):
        b = batch_for(agent, seed)
        agent.rng["sample"].manual_seed(seed)
        agent.critic_loss(b)  # spends what the critic spends
        other.rng["sample"].set_state(agent.rng["sample"].get_state())
        agent.rng["sample"].manual_seed(seed)
        agent.update(b)
        other.update(b)
    assert differing(agent.slow, snapshot(other.pi)) == []  # type: ignore[arg-type]


def test_the_cloning_term_is_of_the_data_s_actions(double: None) -> None:
    """Not of the policy's new ones, as one port has it: by number, with a network that gives a constant."""
    agent, b = dql(), rows(2)
    agent.slow.policy.net = Table(torch.tensor([[0.5, -0.5], [0.0, 1.0]]))  # type: ignore[assignment]
    noise, level = torch.tensor([[1.0, 0.0], [2.0, -1.0]]), torch.tensor([2, 5])
    loss = agent.bc_loss(b, noise, level)
    assert float(loss) == pytest.approx((0.25 + 0.25 + 4 + 4) / 4, abs=1e-12)
    policy = agent.slow.policy
    assert isinstance(policy, DiffusionPolicy)
    ab = policy.alpha_bar[level][:, None]
    _, x, t = policy.net.seen[0]  # type: ignore[union-attr, index]
    torch.testing.assert_close(x, ab.sqrt() * b.action + (1 - ab).sqrt() * noise)
    assert torch.equal(t, level)


def test_the_order_of_an_update() -> None:
    """Critics; policy by the new critics; slow policy; lagged critics."""
    agent, twin = dql(), dql()
    for seed in range(2):
        batch = batch_for(agent, seed)
        agent.update(batch)
        minimize(twin.critic_loss(batch), twin.opt_q, twin.cfg.max_grad_norm)
        loss = twin.bc_loss(batch) + twin.cfg.eta * twin.q_loss(batch)
        minimize(loss, twin.opt_pi, twin.cfg.max_grad_norm)
        twin.slow.update(seed + 1)
        polyak(twin.q, twin.q_lagged, twin.cfg.tau)
    assert differing(agent, snapshot(twin)) == []


def test_acting_draws_from_the_slow_policy_by_the_lagged_critics() -> None:
    agent, obs = dql(num_candidates=7), torch.randn(5, 3)
    fast, slow = recorded_inputs(agent.slow.policy.net), recorded_inputs(agent.slow.slow.net)  # type: ignore[arg-type]
    asked, current = recorded_inputs(agent.q_lagged), recorded_inputs(agent.q)
    for explore in (True, False):
        agent.act(obs, explore)
    assert len(slow) == 2 * agent.cfg.diffusion_steps
    assert len(asked) == 2
    assert asked[0][1].shape == (5, 7, 2)
    assert not fast
    assert not current
