"""PMOE-PPO: PPO as its special case, the density of the ratio, who the gate learns from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agent_helpers import batch_for, snapshot, tiny
from torch import Tensor, nn

from rlctl.agents.actor_critic import Rows, rows_of
from rlctl.agents.pmoe_ppo import PMOEPPO
from rlctl.agents.ppo import PPO
from rlctl.nets import Normal, NormalMixture
from rlctl.nets.distributions import mc_entropy
from rlctl.ops import minimize


def pmoe(**overrides: Any) -> PMOEPPO:
    agent = tiny("pmoe-ppo", **overrides)
    assert isinstance(agent, PMOEPPO)
    return agent


def rows_for(agent: PMOEPPO, seed: int = 0) -> Rows:
    c = agent.cfg
    return rows_of(batch_for(agent, seed), agent.pi, agent.v, agent.obs_norm, agent.reward_scale, c.gamma, c.lam)


def test_one_component_is_ppo(double: None) -> None:
    """Acting, and three whole updates with Adam, clipped gradients and moving normalisers. Gradients of the log-std are
    summed in another order, so equal means to 1e-11 here."""
    ours, ppo = pmoe(num_components=1), tiny("ppo")
    assert isinstance(ppo, PPO)
    shared = {k: v for k, v in ppo.state_dict().items() if k != "pi.log_std"}
    missing, unexpected = ours.load_state_dict(shared | {"pi.log_std": ppo.pi.log_std[None]}, strict=False)
    assert not unexpected
    assert all(k.startswith(("q.", "pi.gate.")) for k in missing)
    for seed in range(3):
        batch = batch_for(ppo, seed)
        obs = batch.obs[0]
        torch.testing.assert_close(ours.act(obs, explore=False)[0], ppo.act(obs, explore=False)[0])
        with ours.borrowed_rng(5):
            a = ours.act(obs, explore=True)[0]
        with ppo.borrowed_rng(5):
            torch.testing.assert_close(a, ppo.act(obs, explore=True)[0])
        mine, theirs = ours.update(batch), ppo.update(batch)
        for key in ("losses/policy", "losses/value", "policy/approx_kl", "policy/clip_fraction"):
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-9, atol=1e-11, msg=key)
        for key, value in ppo.state_dict().items():
            mine_too = ours.state_dict()[key].reshape(value.shape)
            torch.testing.assert_close(mine_too, value, rtol=1e-9, atol=1e-11, msg=key)


def test_the_ratio_is_that_of_the_mixture_and_starts_at_one(double: None) -> None:
    agent = pmoe(normalize_obs=False, normalize_reward=False)
    rows = rows_for(agent)
    pi = agent.pi(rows.obs)
    parts = pi.log_weights + pi.components.log_prob(rows.action.unsqueeze(-2))
    torch.testing.assert_close(rows.logp_old, parts.exp().sum(-1).log().detach(), rtol=1e-10, atol=1e-12)
    ratio = (pi.log_prob(rows.action) - rows.logp_old).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))
    loss = agent.policy_loss(ratio, rows.adv)
    gate = torch.autograd.grad(loss, list(agent.pi.gate.parameters()), retain_graph=True)
    assert all(float(g.abs().max()) > 0 for g in gate)  # PPO's own gradient reaches the gate


def test_many_dimensions_do_not_underflow() -> None:
    agent = pmoe()
    far = Normal(torch.full((1, 5, 40), 30.0), torch.zeros(5, 40))
    pi = NormalMixture(torch.zeros(1, 5), far)
    assert bool(pi.log_prob(torch.zeros(1, 40)).isfinite().all())
    assert agent.cfg.num_components == 5


class Prefers(nn.Module):
    """Q(s, a) = -(a_0 - target)^2, as an ensemble of one."""

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return -(action[..., 0] - self.target).square()[None]


def test_the_best_component_is_the_one_whose_draw_has_the_largest_q(double: None) -> None:
    agent = pmoe(num_components=3)
    agent.q = Prefers(0.4)  # type: ignore[assignment]
    mean = torch.tensor([[-0.5, 0.0], [0.3, 0.0], [0.9, 0.0]]).expand(6, 3, 2)
    pi = NormalMixture(torch.zeros(6, 3), Normal(mean, torch.zeros(3, 2)))
    obs = torch.zeros(6, 3)
    assert agent.best_component(pi, obs, torch.zeros(6, 3, 2)).tolist() == [1] * 6
    noise = torch.zeros(6, 3, 2)
    noise[2, 0, 0] = 0.9  # the draw decides, not the mean
    assert agent.best_component(pi, obs, noise).tolist() == [1, 1, 0, 1, 1, 1]
    noise[3, 2, 0], agent.q = 50.0, Prefers(1.0)  # type: ignore[assignment]
    assert agent.best_component(pi, obs, noise)[3] == 2  # seen as the environment sees it, clipped to 1


def test_the_frequency_loss_trains_the_gate_alone(double: None) -> None:
    agent = pmoe(freq_coef=1.0)
    rows = rows_for(agent)
    still = rows._replace(adv=torch.zeros_like(rows.adv), ret=agent.v(rows.obs).detach())
    agent.cfg = agent.cfg.__class__(**(vars(agent.cfg) | {"vf_coef": 0.0}))
    loss, _ = agent.loss(still)
    grads = torch.autograd.grad(loss, list(agent.pi.parameters()), allow_unused=True)
    named = {n: g for (n, _), g in zip(agent.pi.named_parameters(), grads, strict=True)}
    for name, g in named.items():
        size = 0.0 if g is None else float(g.abs().max())
        assert (size > 1e-6) == name.startswith("gate"), name


def test_q_learns_the_value_targets_and_no_policy_gradient_reaches_it(double: None) -> None:
    agent = pmoe()
    rows = rows_for(agent)
    assert float(agent.q_loss(rows).detach()) == pytest.approx(
        float((agent.q(rows.obs, rows.action.clamp(-1, 1))[0] - rows.ret).square().mean().detach()), rel=1e-12
    )
    loss, _ = agent.loss(rows)
    assert all(g is None for g in torch.autograd.grad(loss, list(agent.q.parameters()), allow_unused=True))
    agent.opt_q.param_groups[0]["lr"] = 1e-2
    losses = [float(minimize(agent.q_loss(rows), agent.opt_q)) for _ in range(300)]
    assert losses[-1] < 0.1 * min(losses[0], float(rows.ret.var()))  # of every row its own: no constant does that


def test_the_gate_learns_which_component_is_best_from_the_q_of_the_agent() -> None:
    """One state, two components far apart, reward what the first action dimension is: Q must tell, the gate follow."""
    agent = pmoe(num_components=2, log_std=-1.0, minibatch_size=8, freq_coef=1.0, lr=1e-2)
    nn.init.zeros_(agent.pi.mean[-1].weight)
    agent.pi.mean[-1].bias.data = torch.tensor([-0.5, 0.0, 0.5, 0.0])
    for p in (agent.pi.log_std, *agent.pi.mean.parameters()):
        p.requires_grad_(False)
    nn.init.zeros_(agent.pi.gate.linear.weight)
    nn.init.zeros_(agent.pi.gate.linear.bias)
    agent.pi.gate.linear.weight.requires_grad_(False)
    learned = [*agent.pi.gate.linear.parameters()][1:]
    opt = torch.optim.Adam(learned, 0.05)
    obs = torch.zeros(64, 3)
    for _ in range(60):
        action = agent.pi(obs).sample()
        ret = action[:, 0].clamp(-1, 1)
        rows = Rows(obs, action, agent.pi(obs).log_prob(action).detach(), ret * 0, ret * 0, ret)
        minimize(agent.q_loss(rows), agent.opt_q)
        loss, _ = agent.loss(rows)  # advantages are 0: what reaches the gate comes by Q alone
        learned[0].grad = torch.autograd.grad(loss, learned)[0]
        opt.step()
    assert float(agent.pi(obs).weights[0, 1].detach()) > 0.75


def test_the_deterministic_action_is_named_by_gate_or_by_q(double: None) -> None:
    for name, best in (("gate", -0.5), ("value", 0.9)):
        agent = pmoe(num_components=3, deterministic=name)
        agent.q = Prefers(1.0)  # type: ignore[assignment]
        nn.init.zeros_(agent.pi.mean[-1].weight)
        agent.pi.mean[-1].bias.data = torch.tensor([-0.5, 0.0, 0.3, 0.0, 0.9, 0.0])
        nn.init.zeros_(agent.pi.gate.linear.weight)
        agent.pi.gate.linear.bias.data = torch.tensor([1.0, 0.0, 0.0])
        with torch.no_grad():
            assert agent.act(torch.zeros(4, 3), explore=False)[0][:, 0].tolist() == pytest.approx([best] * 4)


def test_utilisation_is_logged() -> None:
    agent = pmoe(num_components=3)
    nn.init.zeros_(agent.pi.gate.linear.weight)
    agent.pi.gate.linear.bias.data = torch.tensor([0.5, 0.25, 0.25]).log()
    rows = rows_for(agent)
    log = agent.utilisation(rows)
    assert [float(log[f"mixture/weight_{k}"]) for k in range(3)] == pytest.approx([0.5, 0.25, 0.25])
    for name in ("effective_components", "components_per_state"):
        assert float(log[f"mixture/{name}"]) == pytest.approx(math.exp(1.0397207708))
    assert float(log["policy/entropy"]) == pytest.approx(-float(rows.logp_old.mean()))
    assert set(log) <= set(agent.update(batch_for(agent)))


def test_the_logged_entropy_is_that_of_the_mixture(double: None) -> None:
    """Over actions that the policy drew: within four standard errors of the stratified estimate."""
    agent = pmoe(num_components=3)
    agent.pi.mean[-1].bias.data = torch.linspace(-2, 2, 6)
    obs = torch.zeros(20_000, 3)
    with torch.no_grad():
        pi = agent.pi(obs)
        action = pi.sample(generator=torch.Generator().manual_seed(0))
        zero, logp = torch.zeros(len(obs)), pi.log_prob(action)
        exact = float(mc_entropy(pi, 4, generator=torch.Generator().manual_seed(1)).mean())
    logged = float(agent.utilisation(Rows(obs, action, logp, zero, zero, zero))["policy/entropy"])
    assert abs(logged - exact) < 4 * float(logp.std()) * (1.25 / len(obs)) ** 0.5


def test_every_component_moves(double: None) -> None:
    agent = pmoe(num_components=3)
    before = snapshot(agent.pi)
    agent.update(batch_for(agent))
    assert bool((agent.pi.log_std != before["log_std"]).all())
