"""TRPO, MDPO, SPO and FixPO: one first gradient, each its own proximity; and the numbers of each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agent_helpers import OBS_DIM, batch_for, recorded_inputs, snapshot, tiny
from torch import Tensor, nn

from rlctl.agents.actor_critic import Rows, fit_value, rows_of, step_taken, value_loss
from rlctl.agents.fixpo import FixPO
from rlctl.agents.mdpo import MDPO
from rlctl.agents.ppo import PPO
from rlctl.agents.spo import SPO
from rlctl.agents.trpo import TRPO
from rlctl.nets import GaussianPolicy, Normal
from rlctl.nets.distributions import k3
from rlctl.ops import adam
from rlctl.ops.trust_region import flat

Plain = {"normalize_obs": False, "normalize_reward": False}


# ---------------------------------------------------------------------------------------------- the first gradient
def rows_for(agent: Any, seed: int = 0) -> tuple[Rows, Tensor]:
    """A rollout, its advantages standardised over the whole of it (so that every method sees the same ones)."""
    c = agent.cfg
    rows = rows_of(batch_for(agent, seed), agent.pi, agent.v, agent.obs_norm, agent.reward_scale, c.gamma, c.lam)
    std, mean = torch.std_mean(rows.adv)
    adv = (rows.adv - mean) / (std + 1e-8)
    return rows._replace(adv=adv), adv


class OneGaussian(nn.Module):
    """The same Gaussian in every state."""

    def __init__(self, mean: float, log_std: float) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor([mean])), nn.Parameter(torch.tensor([log_std]))

    def forward(self, obs: Tensor) -> Normal:
        return Normal(self.mean.expand(len(obs), 1), self.log_std)


def first_losses(rows: Rows, adv: Tensor, pi: Any) -> dict[str, Tensor]:
    """The policy loss of each method at the old policy, with the weights of `pi`."""
    logp = pi(rows.obs).log_prob(rows.action)
    ratio, old = (logp - rows.logp_old).exp(), pi(rows.obs).detach()
    agents = {name: tiny(name, **Plain) for name in ("ppo", "spo", "mdpo", "trpo", "fixpo")}
    for agent in agents.values():
        agent.pi = pi
    mdpo, trpo, fixpo = agents["mdpo"], agents["trpo"], agents["fixpo"]
    assert isinstance(mdpo, MDPO)
    assert isinstance(trpo, TRPO)
    assert isinstance(fixpo, FixPO)
    ppo, spo = agents["ppo"], agents["spo"]
    assert isinstance(ppo, PPO)
    assert isinstance(spo, SPO)
    return {
        "policy gradient": -(logp * adv).mean(),
        "ppo": ppo.policy_loss(ratio, adv),
        "spo": spo.policy_loss(ratio, adv),
        "mdpo": mdpo.policy_loss(rows, adv, old, 0.3),
        "trpo": -trpo.surrogate(pi(rows.obs), rows, adv),
        "fixpo": fixpo.loss(rows, old)[0] - fixpo.cfg.vf_coef * (fixpo.v(rows.obs) - rows.ret).square().mean(),
    }


def test_the_first_gradient_is_the_policy_gradient(double: None) -> None:
    agent = tiny("trpo", **Plain)
    rows, adv = rows_for(agent)
    params = list(agent.pi.parameters())  # type: ignore[union-attr]
    grads = {
        n: flat(torch.autograd.grad(x, params, retain_graph=True)) for n, x in first_losses(rows, adv, agent.pi).items()
    }
    assert float(grads["policy gradient"].abs().max()) > 1e-3
    for name, g in grads.items():
        torch.testing.assert_close(g, grads["policy gradient"], rtol=0, atol=1e-10, msg=name)


def test_the_first_gradient_by_hand(double: None) -> None:
    """d loss / d (mean, log std) of one Gaussian and three samples."""
    action, adv = torch.tensor([[0.5], [-1.0], [0.3]]), torch.tensor([1.0, -0.5, 2.0])
    pi, obs, zero = OneGaussian(0.1, -0.2), torch.zeros(3, OBS_DIM), torch.zeros(3)
    rows = Rows(obs, action, pi(obs).log_prob(action).detach(), zero, adv, zero)
    losses = first_losses(rows, adv, pi)
    ratio = (pi(obs).log_prob(action) - rows.logp_old).exp()
    losses["k3 penalty"] = losses["policy gradient"] + k3(ratio.log()).mean()
    assert len(losses) == 7
    for name, loss in losses.items():
        got = flat(torch.autograd.grad(loss, [pi.mean, pi.log_std], retain_graph=True)).tolist()
        assert got == pytest.approx([-0.6713211139, 1.0148386715], abs=1e-9), name


def test_a_penalty_by_minus_log_ratio_would_change_the_first_gradient(double: None) -> None:
    """Of the estimators of KL(old || new) at new = old, k3 has no gradient, k1 = -log r minus the mean score.

    With z = (a - mean) / s: -(mean z / s, mean z^2 - 1), which is (0.5 / 3 / s^2, 1 - 0.47 / s^2) here, s^2 = e^-0.4.
    """
    action = torch.tensor([[0.5], [-1.0], [0.3]])
    pi, obs = OneGaussian(0.1, -0.2), torch.zeros(3, OBS_DIM)
    log_ratio = pi(obs).log_prob(action) - pi(obs).log_prob(action).detach()
    of_k1 = flat(torch.autograd.grad(-log_ratio.mean(), [pi.mean, pi.log_std], retain_graph=True)).tolist()
    assert of_k1 == pytest.approx([0.2486374496, 0.2988423921], abs=1e-9)
    assert flat(torch.autograd.grad(k3(log_ratio).mean(), [pi.mean, pi.log_std])).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------- value fit
def test_value_loss_with_and_without_the_clip(double: None) -> None:
    zero = torch.zeros(4)
    m = Rows(zero, zero, zero, torch.ones(4), zero, torch.full((4,), 2.0))
    v = torch.tensor([0.5, 1.1, 1.5, 2.5], requires_grad=True)
    each = [float(value_loss(x[None], Rows(*[y[:1] for y in m]), 0.2).detach()) for x in v]
    assert each == pytest.approx([2.25, 0.81, 0.64, 0.64], abs=1e-12)
    assert float(value_loss(v, m, 0.2).detach()) == pytest.approx(sum(each) / 4, abs=1e-12)
    slope = torch.autograd.grad(value_loss(v, m, 0.2), v)[0]
    assert slope[2:].tolist() == [0, 0]  # the clip has taken the gradient
    assert float(value_loss(v, m).detach()) == pytest.approx((1.5**2 + 0.9**2 + 0.5**2 + 0.5**2) / 4, abs=1e-12)


def test_fit_value_learns_the_targets_and_sees_every_row_once_per_epoch(double: None) -> None:
    agent = tiny("trpo", **Plain)
    rows, _ = rows_for(agent)
    opt = adam(agent.v.parameters(), 1e-2)  # type: ignore[union-attr]
    g = torch.Generator().manual_seed(0)
    first = fit_value(agent.v, opt, rows, 1, 16, g)  # type: ignore[arg-type]
    last = [fit_value(agent.v, opt, rows, 1, 16, g) for _ in range(200)][-1]  # type: ignore[arg-type]
    assert float(last) < 0.5 * float(first)
    seen = recorded_inputs(agent.v)  # type: ignore[arg-type]
    fit_value(agent.v, opt, rows, 3, 16, g)  # type: ignore[arg-type]
    passes = torch.cat([obs for (obs,) in seen]).reshape(3, *rows.obs.shape)
    wanted = sorted(rows.obs.tolist())
    assert [sorted(p.tolist()) for p in passes] == [wanted] * 3
    assert not torch.equal(passes[0], passes[1])  # in another order


# ----------------------------------------------------------------------------------------------------- what is logged
def test_an_extreme_step_is_reported_and_stays_finite() -> None:
    """exp of these log ratios overflows, or is of a density of 0: neither may end a run as diverged."""
    agent = tiny("spo", **Plain)
    rows, _ = rows_for(agent)
    for shift in (-1e4, 1e4, torch.inf):
        log = step_taken(agent.pi, rows._replace(logp_old=rows.logp_old + shift))  # type: ignore[arg-type]
        assert all(bool(x.isfinite()) for x in log.values())
        assert float(log["policy/clip_fraction"]) == 1
        assert float(log["policy/approx_kl"]) > 1000
    log_ratio = torch.tensor([0.3, -0.1, 0.0]).repeat(len(rows.adv))[: len(rows.adv)]
    log = step_taken(agent.pi, rows._replace(logp_old=rows.logp_old - log_ratio))  # type: ignore[arg-type]
    assert float(log["policy/approx_kl"]) == pytest.approx(float((log_ratio.exp() - 1 - log_ratio).mean()), rel=1e-4)
    assert float(log["policy/ratio_deviation"]) == pytest.approx(float((log_ratio.exp() - 1).abs().mean()), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ TRPO
def trpo(**overrides: Any) -> TRPO:
    agent = tiny("trpo", **overrides)
    assert isinstance(agent, TRPO)
    return agent


@pytest.mark.parametrize("kl", ["new_old", "old_new"])
@pytest.mark.parametrize("delta", [0.01, 0.5])
def test_an_accepted_step_is_inside_and_better(double: None, kl: str, delta: float) -> None:
    agent = trpo(kl=kl, delta=delta)
    accepted = 0
    for seed in range(8):
        rows, adv = rows_for(agent, seed)
        old, surrogate = agent.pi(rows.obs).detach(), float(agent.surrogate(agent.pi(rows.obs), rows, adv).detach())
        metrics = agent.policy_step(rows)
        if float(metrics["policy/step_scale"]):
            accepted += 1
            new = agent.pi(rows.obs)
            measured = (new.kl(old) if kl == "new_old" else old.kl(new)).mean()
            assert float(measured.detach()) == pytest.approx(float(metrics["policy/kl"]), abs=1e-12)
            assert 0 < float(measured.detach()) <= delta
            assert float(agent.surrogate(agent.pi(rows.obs), rows, adv).detach()) > surrogate
    assert accepted >= 6


@pytest.mark.parametrize(("kl", "scale", "reached"), [("new_old", 1.0, 0.0099402639), ("old_new", 0.8, None)])
def test_the_direction_decides_whether_the_line_search_shrinks(
    double: None, kl: str, scale: float, reached: float | None
) -> None:
    """From N(.3, .7) along the gradient (.4, -.2) the full step has KL(new || old) 0.0099402639, inside delta = 0.01,
    but KL(old || new) 0.0108142784. Two samples z_1, z_2 (in standard deviations) of advantage +-1 have a gradient
    along (1, s (z_1 + z_2)), so z_1 + z_2 = -.5 / s gives this one.
    """
    agent = trpo(kl=kl, delta=0.01, damping=0.0)
    agent.pi = GaussianPolicy(1, 1, (), log_std=math.log(0.7))
    nn.init.constant_(agent.pi.mean[-1].bias, 0.3)
    obs, zero, z = (
        torch.zeros(2, 1),
        torch.zeros(2),
        torch.tensor([[0.4], [-0.4 - 0.5 / 0.7]]),
    )  # obs 0: a constant mean
    action, old = 0.3 + 0.7 * z, Normal(torch.tensor([[0.3]]), torch.tensor([0.7]).log())
    rows = Rows(obs, action, agent.pi(obs).log_prob(action).detach(), zero, torch.tensor([1.0, -1.0]), zero)
    adv = torch.tensor([1.0, -1.0])
    slope = flat(
        torch.autograd.grad(agent.surrogate(agent.pi(obs), rows, adv), [agent.pi.mean[-1].bias, agent.pi.log_std])
    )
    assert float(slope[0] / slope[1]) == pytest.approx(-2.0, abs=1e-9)
    assert float(slope[0]) > 0
    metrics = agent.policy_step(rows)
    assert float(metrics["policy/step_scale"]) == pytest.approx(scale, abs=1e-12)
    new = agent.pi(obs[:1]).detach()
    if reached is not None:
        assert float(metrics["policy/kl"]) == pytest.approx(reached, abs=1e-10)
        assert float(new.kl(old)) == pytest.approx(reached, abs=1e-10)
        assert float(old.kl(new)) == pytest.approx(0.0108142784, abs=1e-10)
    else:
        assert float(metrics["policy/kl"]) == pytest.approx(float(old.kl(new)), abs=1e-12)
        assert float(old.kl(new)) <= 0.01


def test_a_step_that_fails_leaves_the_policy_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backwards: every candidate lowers the surrogate."""
    from rlctl.agents import trpo as module

    real = module.natural_step
    monkeypatch.setattr(module, "natural_step", lambda *args: -real(*args))
    agent = trpo()
    before = snapshot(agent.pi)
    metrics = agent.update(batch_for(agent))
    assert float(metrics["policy/step_scale"]) == 0
    assert float(metrics["policy/kl"]) == 0
    assert all(torch.equal(v, before[k]) for k, v in agent.pi.state_dict().items())


def test_backtracking_fires_when_the_full_step_is_too_long(double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlctl.agents import trpo as module

    real = module.natural_step
    monkeypatch.setattr(module, "natural_step", lambda *args: 3 * real(*args))
    agent = trpo(delta=1e-3)
    metrics = agent.update(batch_for(agent))
    assert 0.8**9 <= float(metrics["policy/step_scale"]) <= 0.8**4  # 1/3 lies between 0.8^4 and 0.8^5
    assert float(metrics["policy/kl"]) <= 1e-3


def test_every_policy_parameter_takes_part_and_the_value_network_does_not(double: None) -> None:
    agent = trpo()
    rows, _ = rows_for(agent)
    pi, v = snapshot(agent.pi), snapshot(agent.v)
    agent.policy_step(rows)
    assert all(not torch.equal(x, pi[k]) for k, x in agent.pi.state_dict().items())  # log_std included
    assert all(torch.equal(x, v[k]) for k, x in agent.v.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ MDPO
def mdpo(**overrides: Any) -> MDPO:
    agent = tiny("mdpo", **overrides)
    assert isinstance(agent, MDPO)
    return agent


def test_the_step_size_falls_from_one_and_never_to_zero() -> None:
    agent = mdpo(steps=4 * 16 * 5)
    seen = []
    for k in range(7):
        agent.counters["updates"] = k
        seen.append(agent.step_size())
    assert seen == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_the_divergence_is_new_to_old_and_closed_form(double: None) -> None:
    """At ratio 1 everywhere and zero advantage only the divergence is left."""
    agent = mdpo(**Plain)
    rows, adv = rows_for(agent)
    old = Normal(agent.pi(rows.obs).mean.detach() + 0.5, agent.pi.log_std.detach() - 0.3)
    new = agent.pi(rows.obs)
    loss = agent.policy_loss(rows, torch.zeros_like(adv), old, 0.25)
    assert float(loss.detach()) == pytest.approx(4 * float(new.kl(old).mean().detach()), rel=1e-12)
    assert float(new.kl(old).detach().mean()) != pytest.approx(float(old.kl(new).detach().mean()), rel=1e-2)


def test_one_step_is_the_plain_policy_gradient_whatever_the_step_size(double: None) -> None:
    after = []
    for start in (0, 4):
        agent = mdpo(policy_steps=1, steps=4 * 16 * 5)
        agent.counters["updates"] = start
        agent.update(batch_for(agent))
        after.append(flat(list(agent.pi.parameters())).detach())
    assert torch.equal(*after)
    agent = mdpo(policy_steps=5, steps=4 * 16 * 5)
    agent.update(batch_for(agent))
    other = mdpo(policy_steps=5, steps=4 * 16 * 5)
    other.counters["updates"] = 4
    other.update(batch_for(other))
    assert not torch.allclose(flat(list(agent.pi.parameters())), flat(list(other.pi.parameters())), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- SPO
def spo(**overrides: Any) -> SPO:
    agent = tiny("spo", **overrides)
    assert isinstance(agent, SPO)
    return agent


@pytest.mark.parametrize(
    ("adv", "ratio", "loss", "slope"),
    [
        (1.0, 0.7, -0.475, -2.5),
        (1.0, 1.1, -1.075, -0.5),
        (1.0, 1.5, -0.875, 1.5),
        (-1.0, 0.7, 0.925, -0.5),
        (-1.0, 1.1, 1.125, 1.5),
        (-1.0, 1.5, 2.125, 3.5),
    ],
)
def test_quadratic_objective(double: None, adv: float, ratio: float, loss: float, slope: float) -> None:
    r = torch.tensor([ratio], requires_grad=True)
    value = spo().policy_loss(r, torch.tensor([adv]))
    assert float(value.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(torch.autograd.grad(value, r)[0]) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("adv", [2.0, -0.5])
def test_the_objective_peaks_at_the_edge_of_the_band(double: None, adv: float) -> None:
    agent, a = spo(band=0.3), torch.tensor([adv])
    best = 1 + 0.3 * (1 if adv > 0 else -1)
    r = torch.tensor([best], requires_grad=True)
    loss = agent.policy_loss(r, a)
    assert float(torch.autograd.grad(loss, r)[0]) == pytest.approx(0, abs=1e-12)
    assert float(loss.detach()) == pytest.approx(-adv * best + abs(adv) * 0.3 / 2, abs=1e-12)


def test_ratios_stay_closer_to_one_than_under_the_clip() -> None:
    """The same rollout, learning rate and number of epochs."""
    deviation = {}
    for name in ("ppo", "spo"):
        agent = tiny(name, epochs=30, lr=1e-2, **Plain)
        deviation[name] = float(agent.update(batch_for(agent))["policy/ratio_deviation"])
    assert deviation["spo"] < 0.7 * deviation["ppo"]


def test_an_extreme_log_ratio_does_not_overflow() -> None:
    agent = spo(**Plain)
    rows, _ = rows_for(agent)
    loss, _ = agent.loss(rows._replace(logp_old=rows.logp_old - 1e4))
    assert bool(loss.isfinite())


# ----------------------------------------------------------------------------------------------------------- FixPO
def fixpo(**overrides: Any) -> FixPO:
    agent = tiny("fixpo", **overrides)
    assert isinstance(agent, FixPO)
    return agent


def test_multiplier_gradient(double: None) -> None:
    agent = fixpo(max_kl=0.5, margin=3.0)
    slope = torch.autograd.grad(agent.beta_loss(torch.tensor([0.05, 0.2, 0.1])), agent.beta)[0]
    assert float(slope) == pytest.approx(-0.1, abs=1e-12)  # beta grows: 0.2 exceeds 0.5 / 3
    agent.beta_step(torch.tensor([0.2]))
    grown = float(agent.beta.detach())
    assert grown > 1
    for _ in range(2000):
        agent.beta_step(torch.tensor([0.0]))
    assert float(agent.beta.detach()) == pytest.approx(agent.cfg.beta_floor)


@pytest.mark.parametrize("max_kl", [0.5, 0.02])
def test_every_state_of_the_batch_ends_inside_the_bound(double: None, max_kl: float) -> None:
    agent = fixpo(max_kl=max_kl, lr=1e-2, epochs=4)
    for seed in range(4):
        batch = batch_for(agent, seed)
        old = agent.pi(agent.obs_norm(batch.obs)).detach()
        obs = agent.obs_norm(batch.obs)
        metrics = agent.update(batch)
        kl = old.kl(agent.pi(obs)).detach()
        assert float(kl.max()) <= max_kl
        assert float(metrics["policy/kl_max"]) == pytest.approx(float(kl.max()), abs=1e-12)
        assert float(kl.max()) > 0


def test_the_repair_is_what_holds_the_bound(double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_repair = fixpo(max_kl=0.02, lr=1e-2, epochs=1)
    metrics = with_repair.update(batch_for(with_repair))
    assert float(metrics["policy/fixup_steps"]) > 0
    without = fixpo(max_kl=0.02, lr=1e-2, epochs=1)
    monkeypatch.setattr(without, "fixup", lambda rows, old: (True, 0))
    assert float(without.update(batch_for(without))["policy/kl_max"]) > 0.02


def test_beta_never_falls_while_a_state_violates(double: None) -> None:
    agent = fixpo(max_kl=0.02, lr=1e-2)
    rows, _ = rows_for(agent)
    old = agent.pi(rows.obs).detach()
    with torch.no_grad():
        agent.pi.log_std += 0.5
    seen = [float(agent.beta.detach())]
    real = agent.beta_step
    agent.beta_step = lambda kl: (real(kl), seen.append(float(agent.beta.detach())))[0]  # type: ignore[method-assign, func-returns-value]
    inside, steps = agent.fixup(rows, old)
    assert inside
    assert steps == len(seen) - 1 > 1
    assert seen == sorted(seen)


def test_an_update_that_cannot_repair_falls_back(double: None) -> None:
    """One sweep of tiny steps cannot undo a long first phase: the policy is the old one again."""
    agent = fixpo(max_kl=1e-6, lr=1e-2, fixup_sweeps=1, epochs=3)
    before = snapshot(agent.pi)
    metrics = agent.update(batch_for(agent))
    assert float(metrics["policy/kl_max"]) == 0
    assert all(torch.equal(v, before[k]) for k, v in agent.pi.state_dict().items())


def test_nothing_to_repair_at_learning_rate_zero(double: None) -> None:
    repairs = {}
    for lr in (0.0, 1e-2):
        agent = fixpo(max_kl=1e-3, anneal_lr=False)
        agent.opt.param_groups[0]["lr"] = lr  # a config allows no 0
        before = snapshot(agent.pi)
        repairs[lr] = float(agent.update(batch_for(agent))["policy/fixup_steps"])
        assert all(torch.equal(v, before[k]) for k, v in agent.pi.state_dict().items()) == (lr == 0)
    assert repairs[0.0] == 0 < repairs[1e-2]


def test_minibatches_of_one_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match="minibatch_size=1 has no spread to normalise advantages by"):
        fixpo(minibatch_size=1, normalize_advantage=True)
    assert fixpo(minibatch_size=1, normalize_advantage=False).cfg.minibatch_size == 1


def test_the_penalty_has_no_gradient_at_the_old_policy(double: None) -> None:
    agent = fixpo()
    rows, _ = rows_for(agent)
    kl = agent.divergence(rows.obs, agent.pi(rows.obs).detach()).mean()
    assert float(flat(torch.autograd.grad(kl, list(agent.pi.parameters()))).abs().max()) < 1e-12


def test_the_value_network_takes_no_part_in_the_repair(double: None) -> None:
    agent = fixpo(max_kl=0.02, lr=1e-2)
    rows, _ = rows_for(agent)
    old = agent.pi(rows.obs).detach()
    with torch.no_grad():
        agent.pi.log_std += 0.5
    v = snapshot(agent.v)
    _, steps = agent.fixup(rows, old)
    assert steps > 0
    assert all(torch.equal(x, v[k]) for k, x in agent.v.state_dict().items())
