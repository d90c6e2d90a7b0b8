"""MDPO off-policy: SAC as its special case bit for bit, fixed points of one mirror step, the anchor, the options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, recorded_inputs, snapshot, solve, tiny, transitions, value_of
from torch import Tensor, nn

from rlctl.agents.mdpo_off import MDPOOff
from rlctl.agents.sac import SAC
from rlctl.nets import TanhNormal
from rlctl.ops import minimize
from rlctl.types import Agent, Batch

SIGNS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
"""Noise of mean exactly 0, variance exactly 1 and no correlation."""


def mdpo(**overrides: Any) -> MDPOOff:
    agent = tiny("mdpo-off", **overrides)
    assert isinstance(agent, MDPOOff)
    return agent


def sac(**overrides: Any) -> SAC:
    agent = tiny("sac", learn_alpha=False, **overrides)
    assert isinstance(agent, SAC)
    return agent


def batch(rows: int = 32, seed: int = 0) -> Batch:
    return transitions(torch.Generator().manual_seed(seed), rows)


def constant(policy: nn.Module, *bias: float) -> nn.Parameter:
    """Make the policy give the same (mean, mean, log-std, log-std) everywhere; returns that vector."""
    last = policy.net[-1]  # type: ignore[index]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(bias)
    return last.bias


def moved_apart(agent: MDPOOff) -> None:
    """Make the anchor another policy than the current one."""
    with torch.no_grad():
        for p in agent.pi_anchor.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))


# ------------------------------------------------------------------------------------------------------------ it is SAC
@pytest.mark.parametrize(("form", "kl_coef"), [("linearised", 1.0), ("exact", 0.0)])
def test_with_c_equal_lambda_it_is_sac_bit_for_bit(form: str, kl_coef: float) -> None:
    """On shared noise: losses, gradients, and five whole updates, whatever the anchor is."""
    ours, theirs = mdpo(form=form, kl_coef=kl_coef, alpha=1.0), sac(alpha=1.0)
    for part in ("pi", "q", "q_lagged"):
        assert differing(getattr(ours, part), snapshot(getattr(theirs, part))) == []
    moved_apart(ours)
    for seed in range(5):
        b = batch(seed=seed)
        states = [agent.rng["sample"].get_state() for agent in (ours, theirs)]
        assert torch.equal(*states)
        found: list[list[Tensor]] = []
        for agent, state in zip((ours, theirs), states, strict=True):
            critic, actor = agent.critic_loss(b), agent.actor_loss(b)[0]
            slopes = torch.autograd.grad(critic, list(agent.q.parameters()))
            found.append([critic, actor, *slopes, *torch.autograd.grad(actor, list(agent.pi.parameters()))])
            agent.rng["sample"].set_state(state)
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
        ours.update(b)
        theirs.update(b)
        for part in ("pi", "q", "q_lagged"):
            assert differing(getattr(ours, part), snapshot(getattr(theirs, part))) == []


@pytest.mark.parametrize(("form", "kl_coef"), [("linearised", 0.2), ("exact", 0.0)])
def test_with_c_equal_lambda_it_is_sac_at_the_default_alpha(double: None, form: str, kl_coef: float) -> None:
    """SAC keeps log alpha, which rounds: equal to 1e-12 instead of bit for bit."""
    ours, theirs = mdpo(form=form, kl_coef=kl_coef, alpha=0.2), sac(alpha=0.2)
    moved_apart(ours)
    noise = torch.randn(32, 2, generator=theirs.rng["sample"].clone_state())
    ours_loss, theirs_loss = ours.actor_loss(batch(), noise)[0], theirs.actor_loss(batch())[0]
    assert float(ours_loss.detach()) == pytest.approx(float(theirs_loss.detach()), abs=1e-12)
    ours_g = torch.autograd.grad(ours_loss, list(ours.pi.parameters()))
    for g, h in zip(ours_g, torch.autograd.grad(theirs_loss, list(theirs.pi.parameters())), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)


def test_with_another_c_it_is_not_sac() -> None:
    ours, theirs = mdpo(kl_coef=1.0, alpha=1.0), sac(alpha=1.0)
    moved_apart(ours)
    assert not torch.equal(ours.actor_loss(batch())[0], theirs.actor_loss(batch())[0])


# ------------------------------------------------------------------------------------------------------ one mirror step
@pytest.mark.parametrize("form", ["exact", "linearised"])
@pytest.mark.parametrize("kl_coef", [0.3, 1.0, 7.0])
def test_at_the_anchor_the_loss_is_that_of_sac(double: None, form: str, kl_coef: float) -> None:
    """pi = pi_k: alpha log pi - Q, whatever c."""
    agent, noise = mdpo(form=form, kl_coef=kl_coef, alpha=0.2), torch.randn(32, 2)
    pi = agent.pi(batch().obs)
    action, logp = pi.sample_log_prob(noise)
    expected = (0.2 * logp - agent.q(batch().obs, action).amin(0)).mean()
    assert agent.actor_loss(batch(), noise)[0].item() == pytest.approx(expected.item(), abs=1e-12)


class Parabola(nn.Module):
    """-0.75 (u - 2)^2 of the action before squashing, less alpha times the squash's log-Jacobian, per dimension."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        q = -0.75 * (action.atanh() - 2).square() - self.alpha * (1 - action.square()).log()
        return q.sum(-1).expand(2, -1)


STEPS: list[tuple[str, float, float, tuple[float, float], tuple[float, float]]] = [
    ("exact", 2.0, 0.0, (0.0, 1.0), (0.8571428571, 0.7559289460)),  # hard: t = 0.5
    ("linearised", 2.0, 0.0, (0.0, 1.0), (0.8571428571, 0.7559289460)),
    ("linearised", 1.0, 0.2, (0.0, 1.0), (1.3043478261, 0.6593804734)),
    ("linearised", 0.2, 0.2, (0.0, 1.0), (2.0, 0.3651483717)),  # the optimum of SAC
    ("exact", 0.0, 0.2, (0.0, 1.0), (2.0, 0.3651483717)),
    ("exact", 1.0, 0.2, (0.0, 1.0), (1.2, 0.6928203230)),
]


@pytest.mark.parametrize(("form", "kl_coef", "alpha", "old", "new"), STEPS)
def test_one_step_ends_at_the_known_gaussian(
    double: None, form: str, kl_coef: float, alpha: float, old: tuple[float, float], new: tuple[float, float]
) -> None:
    """With noise of mean 0 and variance 1 the gradient vanishes at the known (mean, std), and only there."""
    agent = mdpo(form=form, kl_coef=kl_coef, alpha=alpha)
    agent.q = Parabola(alpha)  # type: ignore[assignment]
    mean, log_std = torch.tensor(old[0]), torch.tensor(old[1]).log()
    constant(agent.pi_anchor, float(mean), float(mean), float(log_std), float(log_std))
    for shift_mean, shift_std in ((0.0, 0.0), (0.05, 0.0), (0.0, 0.05)):
        mean, log_std = torch.tensor(new[0]) + shift_mean, torch.tensor(new[1]).log() + shift_std
        bias = constant(agent.pi, float(mean), float(mean), float(log_std), float(log_std))
        loss, _ = agent.actor_loss(batch(4), SIGNS.double())
        (g,) = torch.autograd.grad(loss, bias)
        if shift_mean == shift_std == 0:
            assert g.tolist() == pytest.approx([0.0] * 4, abs=1e-8)
        else:
            assert float(g.abs().max()) > 0.01


def test_repeated_linearised_steps_end_where_they_should(double: None) -> None:
    """c = 1, alpha = 0.2: means 1.3043, 1.6168, 1.7546, 1.8307, standard deviations 0.6594, 0.5472, 0.4896, 0.4547."""
    agent = mdpo(form="linearised", kl_coef=1.0, alpha=0.2)
    agent.q = Parabola(0.2)  # type: ignore[assignment]
    chain = [(0.0, 1.0), (1.3043, 0.6594), (1.6168, 0.5472), (1.7546, 0.4896), (1.8307, 0.4547)]
    for old, new in itertools.pairwise(chain):
        for policy, (mean, std) in ((agent.pi_anchor, old), (agent.pi, new)):
            log_std = float(torch.tensor(std).log())
            bias = constant(policy, mean, mean, log_std, log_std)
        (g,) = torch.autograd.grad(agent.actor_loss(batch(4), SIGNS.double())[0], bias)
        assert g.tolist() == pytest.approx([0.0] * 4, abs=2e-3)


def test_the_gradient_of_the_divergence_at_the_anchor_is_the_score(double: None) -> None:
    """c times the score: zero in the mean, not per sample; with the density's own parameters detached it is zero."""
    agent = mdpo(form="exact", kl_coef=3.0, alpha=0.0)
    agent.q = Table(torch.zeros(2, 1))  # type: ignore[assignment]
    params = list(agent.pi.parameters())
    b, noise = batch(4)._replace(obs=batch(1).obs.expand(4, -1)), torch.randn(4, 2)
    for row in range(4):
        one = b.map(lambda x, row=row: x[row : row + 1])  # type: ignore[misc]
        got = torch.autograd.grad(agent.actor_loss(one, noise[row : row + 1])[0], params)
        pi = agent.pi(one.obs)
        u = pi.sample_pre_tanh(noise[row : row + 1])[0].detach()
        score = torch.autograd.grad(pi.log_prob_pre_tanh(u).sum(), params)
        for g, s in zip(got, score, strict=True):
            torch.testing.assert_close(g, 3.0 * s, rtol=1e-9, atol=1e-11)
        assert max(float(g.abs().max()) for g in got) > 0.01
    agent.q = Table(torch.zeros(2, 4))  # type: ignore[assignment]
    for g in torch.autograd.grad(agent.actor_loss(b, SIGNS.double())[0], params):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)
    pi = agent.pi(b.obs)
    u = pi.sample_pre_tanh(noise)[0]
    detached = pi.detach().log_prob_pre_tanh(u) - agent.pi_anchor(b.obs).log_prob_pre_tanh(u)
    for g in torch.autograd.grad(detached.sum(), params):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)


def test_the_linearised_form_refuses_a_small_c() -> None:
    for kl_coef in (0.09, 0.1):
        with pytest.raises(ValueError, match=r"kl_coef > alpha / 2 \(form=exact takes any\)"):
            mdpo(form="linearised", kl_coef=kl_coef, alpha=0.2)
    mdpo(form="linearised", kl_coef=0.11, alpha=0.2)
    mdpo(form="exact", kl_coef=0.09, alpha=0.2)


# ------------------------------------------------------------------------------------------------------------- Tsallis
@pytest.mark.parametrize("form", ["exact", "linearised"])
def test_tsallis_losses_equal_a_slow_reference(double: None, form: str) -> None:
    """Logarithms log_{2-q} per dimension, and the factor q on the old policy's."""
    q, alpha, c = 1.5, 0.2, 0.7
    agent = mdpo(form=form, kl_coef=c, alpha=alpha, tsallis_q=q)
    moved_apart(agent)
    b, noise = batch(), torch.randn(32, 2)
    pi, old = agent.pi(b.obs), agent.pi_anchor(b.obs)
    u = pi.mean + pi.log_std.exp() * noise

    def tsallis(p: TanhNormal) -> Tensor:
        density = torch.distributions.Normal(p.mean, p.log_std.exp()).log_prob(u).exp() / (1 - u.tanh().square())
        return ((density**0.5 - 1) / 0.5).sum(-1)

    new, old_weight = (alpha + c, -c * q) if form == "exact" else (c, q * (alpha - c))
    values = agent.q(b.obs, u.tanh()).amin(0)
    expected = (new * tsallis(pi) + old_weight * tsallis(old) - values).mean()
    loss, log = agent.actor_loss(b, noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert float(log["policy/entropy"]) == pytest.approx(-tsallis(pi).mean().item(), rel=1e-9)
    got = torch.autograd.grad(loss, list(agent.pi.parameters()))
    for g, h in zip(got, torch.autograd.grad(expected, list(agent.pi.parameters())), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-7, atol=1e-9)
    backup_noise = torch.randn(32, 2)
    pi = agent.pi(b.next_obs)
    u = pi.mean + pi.log_std.exp() * backup_noise
    soft = agent.q_lagged(b.next_obs, u.tanh()).amin(0) - alpha * tsallis(pi)
    y = (b.reward + agent.cfg.gamma * soft * ~b.terminated).detach()
    slow = ((agent.q(b.obs, b.action) - y) ** 2).mean(-1).sum()
    assert agent.critic_loss(b, backup_noise).item() == pytest.approx(slow.item(), rel=1e-9)


# ------------------------------------------------------------------------------------------------------------- critics
def test_value_style_backup_by_hand(double: None) -> None:
    """y = r + 0.9 (1 - terminated) V_lagged(s'); V regresses on min_j Q_j - 0.5 log pi."""
    agent = mdpo(critic="value", gamma=0.9, alpha=0.5)
    b = batch(3)._replace(reward=torch.tensor([1.0, 2.0, 3.0]), terminated=torch.tensor([False, True, False]))
    agent.v_lagged = lagged = Table(torch.tensor([2.0, 7.0, -1.0]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = online = Table(values)  # type: ignore[assignment]
    (g,) = torch.autograd.grad(agent.critic_loss(b), values)
    y = torch.tensor([1 + 0.9 * 2.0, 2.0, 3 - 0.9])
    torch.testing.assert_close(g, 2 * (values.detach() - y) / 3)
    assert torch.equal(lagged.seen[0][0], b.next_obs)
    v = torch.tensor([0.5, 1.0, -2.0]).requires_grad_()
    agent.v = Table(v)  # type: ignore[assignment]
    noise = torch.randn(3, 2)
    action, logp = agent.pi(b.obs).sample_log_prob(noise)
    loss = agent.value_loss(b, noise)
    (g,) = torch.autograd.grad(loss, v)
    target = torch.tensor([3.0, 0.0, 2.0]) - 0.5 * logp.detach()
    torch.testing.assert_close(g, 2 * (v.detach() - target) / 3)
    torch.testing.assert_close(online.seen[-1][1], action)


def test_value_style_lags_the_value_alone() -> None:
    agent = mdpo(critic="value", tau=0.1)
    assert not hasattr(agent, "q_lagged")
    assert differing(agent.v_lagged, snapshot(agent.v)) == []
    old = snapshot(agent.v_lagged)
    metrics = agent.update(batch())
    for k, x in agent.v_lagged.state_dict().items():
        torch.testing.assert_close(x, old[k] + 0.1 * (agent.v.state_dict()[k] - old[k]))
        assert not torch.equal(x, old[k])
    assert "losses/value" in metrics
    assert not hasattr(mdpo(), "v")


@pytest.mark.parametrize(("how", "q"), [("min", [2.0, 1.0]), ("mean", [2.5, 2.5]), ("first", [2.0, 4.0])])
def test_what_the_actor_climbs(double: None, how: str, q: list[float]) -> None:
    agent = mdpo(actor_q=how, kl_coef=0.0, alpha=0.0)
    agent.q = Table(torch.tensor([[2.0, 4.0], [3.0, 1.0]]))  # type: ignore[assignment]
    assert agent.actor_loss(batch(2))[0].item() == pytest.approx(-sum(q) / 2, abs=1e-12)


@pytest.mark.parametrize("critic", ["twin", "value"])
def test_who_receives_a_gradient(critic: str) -> None:
    agent = mdpo(critic=critic)
    before = snapshot(agent)
    minimize(agent.actor_loss(batch())[0], agent.opt_pi)
    assert differing(agent, before)
    assert all(k.startswith("pi.") for k in differing(agent, before))
    before = snapshot(agent)
    minimize(agent.critic_loss(batch()), agent.opt_q)
    assert {k.split(".")[0] for k in differing(agent, before)} == {"q"}
    if critic == "value":
        before = snapshot(agent)
        minimize(agent.value_loss(batch()), agent.opt_v)
        assert {k.split(".")[0] for k in differing(agent, before)} == {"v"}


def test_order_of_an_update() -> None:
    """Critics first, the actor against the new critics, lagged critics last and by tau alone."""
    agent, by_hand = mdpo(tau=0.1), mdpo(tau=0.1)
    old_lagged = snapshot(agent.q_lagged)
    agent.update(batch())
    minimize(by_hand.critic_loss(batch()), by_hand.opt_q)
    minimize(by_hand.actor_loss(batch())[0], by_hand.opt_pi)
    for part in ("q", "pi", "pi_anchor"):
        assert differing(getattr(by_hand, part), snapshot(getattr(agent, part))) == []
    for k, v in agent.q_lagged.state_dict().items():
        torch.testing.assert_close(v, old_lagged[k] + 0.1 * (agent.q.state_dict()[k] - old_lagged[k]))


# -------------------------------------------------------------------------------------------------------------- anchor
def test_the_anchor_sees_the_same_draw_with_gradient_through_it_alone() -> None:
    agent = mdpo()
    moved_apart(agent)
    loss, _ = agent.actor_loss(batch())
    assert not any(p.requires_grad for p in agent.pi_anchor.parameters())
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))
    pi, old = agent.pi(batch().obs), agent.pi_anchor(batch().obs)
    u, logp = pi.sample_pre_tanh(noise)
    q = agent.q(batch().obs, u.tanh()).amin(0)
    expected = (1.2 * logp - 1.0 * old.log_prob_pre_tanh(u) - q).mean()  # the defaults: alpha 0.2, c = 1, exact
    loss, log = agent.actor_loss(batch(), noise)
    torch.testing.assert_close(loss, expected)
    params = list(agent.pi.parameters())
    for g, h in zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(g, h)
    torch.testing.assert_close(log["policy/anchor_kl"], pi.kl(old).mean())
    assert float(log["policy/anchor_kl"]) > 0


def test_the_anchor_is_replaced_every_m_environment_steps() -> None:
    """Counted in environment steps, not updates; several worlds may step across a multiple of m."""
    agent = mdpo(anchor_every=10)
    assert differing(agent.pi_anchor, snapshot(agent.pi)) == []
    replaced: list[int] = []
    for env_steps in (4, 8, 9, 12, 16, 16, 20, 24, 28, 36, 36, 55, 59):
        agent.counters["env_steps"] = env_steps
        old = snapshot(agent.pi_anchor)
        agent.update(batch(seed=env_steps))
        if differing(agent.pi_anchor, old):
            replaced.append(env_steps)
            assert differing(agent.pi_anchor, snapshot(agent.pi)) == []
    assert replaced == [12, 20, 36, 55]
    assert all(not p.requires_grad for p in agent.pi_anchor.parameters())


# ------------------------------------------------------------------------------------------------------------- options
def test_behaviour_is_a_draw_or_by_flag_its_centre() -> None:
    obs = torch.ones(4000, 3)
    with torch.no_grad():
        for sample in (True, False):
            agent = mdpo(sample_actions=sample)
            mode, draws = agent.act(obs, explore=False)[0], agent.act(obs, explore=True)[0]
            torch.testing.assert_close(mode, agent.pi(obs).mean.tanh())
            assert torch.equal(draws, mode) != sample
            if sample:
                torch.testing.assert_close(draws.atanh().mean(0), agent.pi(obs[0]).mean, rtol=0, atol=0.1)
                torch.testing.assert_close(draws.atanh().std(0), agent.pi(obs[0]).log_std.exp(), rtol=0.1, atol=0)


def test_output_penalty() -> None:
    plain, charged = mdpo(), mdpo(output_penalty=1e-3)
    pi = plain.pi(batch().obs)
    noise = torch.randn(32, 2)
    extra = charged.actor_loss(batch(), noise)[0] - plain.actor_loss(batch(), noise)[0]
    expected = 1e-3 * (pi.mean.square().mean() + pi.log_std.square().mean())
    assert extra.item() == pytest.approx(expected.item(), rel=1e-2)


def test_the_critic_draws_from_the_current_policy_at_the_successor() -> None:
    agent = mdpo()
    moved_apart(agent)
    seen, noise = recorded_inputs(agent.q_lagged), torch.randn(32, 2)
    agent.critic_loss(batch(), noise)
    assert torch.equal(seen[0][0], batch().next_obs)
    torch.testing.assert_close(seen[0][1], agent.pi(batch().next_obs).sample(noise).detach())


def learns_both(agent: Agent, obs: Tensor, env: Any) -> None:
    assert value_of(agent, obs).tolist() == pytest.approx(env.value(obs, agent.cfg.gamma).tolist(), abs=0.1)
    action, _ = agent.act(obs, explore=False)
    assert action.flatten().tolist() == pytest.approx(env.optimal_action(obs).flatten().tolist(), abs=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "linearised", "critic": "value", "actor_q": "first"},
        {"tsallis_q": 1.5},
        {"critic": "value", "actor_q": "mean", "output_penalty": 1e-3},
    ],
    ids=["as released", "tsallis", "mean of critics"],
)
def test_every_style_solves_the_hardest_probe(options: dict[str, Any]) -> None:
    agent, env = solve("mdpo-off", "both", **options)
    learns_both(agent, torch.tensor([[-1.0], [1.0]]), env)


def test_the_count_of_refreshes_is_a_counter_so_that_a_resumed_run_refreshes_at_the_same_steps() -> None:
    agent = mdpo(critic="value", anchor_every=10)
    agent.counters["env_steps"] = 25
    agent.update(batch_for(agent, 0))
    assert agent.counters == {"updates": 1, "env_steps": 25, "anchors": 2}
    before = snapshot(agent.pi_anchor)
    agent.update(batch_for(agent, 1))
    assert differing(agent.pi_anchor, before) == []
