"""PPO: the clipped objective, the order of an update, advantages, normalisers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import ACT_DIM, OBS_DIM, Table, batch_for, differing, recorded_inputs, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.actor_critic import Rows
from rlctl.agents.ppo import PPO
from rlctl.nets import Normal
from rlctl.types import Batch

OneStep = {"epochs": 1, "horizon": 16, "num_envs": 4, "minibatch_size": 64}
"""One gradient step per update, on the whole rollout."""
Plain = {"normalize_advantage": False, "normalize_obs": False, "normalize_reward": False, "anneal_lr": False}


def ppo(**overrides: Any) -> PPO:
    agent = tiny("ppo", **overrides)
    assert isinstance(agent, PPO)
    return agent


def gradient_descent(agent: PPO, lr: float = 1.0) -> None:
    """Replace Adam by plain steps of size `lr`, so that a step shows its gradient."""
    agent.opt = torch.optim.SGD([*agent.pi.parameters(), *agent.v.parameters()], lr=lr)  # type: ignore[assignment]


def steps(agent: nn.Module, before: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [before[k] - v for k, v in agent.state_dict().items() if k.startswith(prefix)]


# ---------------------------------------------------------------------------------------------------------- objective
@pytest.mark.parametrize(
    ("adv", "ratio", "loss", "slope"),
    [
        (1.0, 0.7, -0.7, -1.0),
        (1.0, 1.1, -1.1, -1.0),
        (1.0, 1.5, -1.2, 0.0),
        (-1.0, 0.7, 0.8, 0.0),
        (-1.0, 1.1, 1.1, 1.0),
        (-1.0, 1.5, 1.5, 1.0),
    ],
)
def test_clipped_objective(double: None, adv: float, ratio: float, loss: float, slope: float) -> None:
    r = torch.tensor([ratio], requires_grad=True)
    value = ppo(clip=0.2).policy_loss(r, torch.tensor([adv]))
    assert float(value.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(torch.autograd.grad(value, r)[0]) == slope


def test_losses_are_means(double: None) -> None:
    agent = ppo(clip=0.2)
    r, adv = torch.tensor([0.7, 1.1, 1.5] * 2), torch.tensor([1.0] * 3 + [-1.0] * 3)
    assert float(agent.policy_loss(r, adv)) == pytest.approx((-0.7 - 1.1 - 1.2 + 0.8 + 1.1 + 1.5) / 6, abs=1e-12)
    assert float(agent.value_loss(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0]))) == 6.5


def test_first_gradient_is_the_policy_gradient_by_number(double: None) -> None:
    """At pi = pi_old every on-policy surrogate has the gradient of -E[A log pi]."""
    theta = torch.tensor([0.1, -0.2], requires_grad=True)
    action, adv = torch.tensor([[0.5], [-1.0], [0.3]]), torch.tensor([1.0, -0.5, 2.0])
    logp = Normal(theta[:1].expand(3, 1), theta[1:]).log_prob(action)
    loss = ppo().policy_loss((logp - logp.detach()).exp(), adv)
    (g,) = torch.autograd.grad(loss, theta)
    assert g.tolist() == pytest.approx([-0.6713211139, 1.0148386715], abs=1e-10)


def test_first_step_of_an_update_is_the_policy_gradient(double: None) -> None:
    agent = ppo(**OneStep, **Plain, vf_coef=0.0, max_grad_norm=1e9)
    gradient_descent(agent)
    batch = batch_for(agent)
    adv, _ = advantages(agent, batch)
    vanilla = -(adv * agent.pi(batch.obs).log_prob(batch.action)).mean()
    expected = torch.autograd.grad(vanilla, list(agent.pi.parameters()))
    before = snapshot(agent)
    agent.update(batch)
    named = dict(zip(dict(agent.pi.named_parameters()), expected, strict=True))
    for name, p in agent.pi.named_parameters():
        torch.testing.assert_close(before[f"pi.{name}"] - p.detach(), named[name], rtol=1e-9, atol=1e-12)
    assert all(not bool(s.any()) for s in steps(agent, before, "v."))


def test_value_step_is_the_weighted_gradient_of_the_squared_error(double: None) -> None:
    agent = ppo(**OneStep, **Plain, vf_coef=0.3, max_grad_norm=1e9)
    gradient_descent(agent)
    batch = batch_for(agent)
    _, ret = advantages(agent, batch)
    expected = torch.autograd.grad(0.3 * (agent.v(batch.obs) - ret).square().mean(), list(agent.v.parameters()))
    before = snapshot(agent)
    agent.update(batch)
    for a, b in zip(steps(agent, before, "v."), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_entropy_bonus_widens_every_dimension_alike(double: None) -> None:
    """d H / d log s = 1 per dimension, and nothing else moves."""
    after = []
    for ent_coef in (0.0, 0.05):
        agent = ppo(**OneStep, **Plain, ent_coef=ent_coef, max_grad_norm=1e9)
        gradient_descent(agent)
        agent.update(batch_for(agent))
        after.append(snapshot(agent))
    for name in after[0]:
        difference = after[1][name] - after[0][name]
        expected = torch.full_like(difference, 0.05 if name == "pi.log_std" else 0.0)
        torch.testing.assert_close(difference, expected, rtol=0, atol=1e-12)


def test_gradient_is_rescaled_over_both_networks_together(double: None) -> None:
    lengths = []
    for limit in (1e9, 0.01):
        agent = ppo(**OneStep, **Plain, max_grad_norm=limit)
        gradient_descent(agent)
        before = snapshot(agent)
        agent.update(batch_for(agent))
        both = [*steps(agent, before, "pi."), *steps(agent, before, "v.")]
        lengths.append(float(torch.cat([s.flatten() for s in both]).norm()))
    assert lengths[0] > 0.1
    assert lengths[1] == pytest.approx(0.01, rel=1e-3)


class Watched(PPO):
    """Keeps what the policy loss is given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ratios: list[Tensor] = []
        self.advs: list[Tensor] = []

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        self.ratios.append(ratio.detach())
        self.advs.append(adv)
        return super().policy_loss(ratio, adv)


def advantages(agent: PPO, batch: Batch) -> tuple[Tensor, Tensor]:
    """Advantages and value targets [T, N]."""
    rows = agent.prepare_rollout(batch)
    return rows.adv.view_as(batch.reward), rows.ret.view_as(batch.reward)


def watched(**overrides: Any) -> Watched:
    template = ppo(**overrides)
    torch.manual_seed(0)
    return Watched(template.spec, template.cfg)


def test_first_ratio_is_one_in_every_update(double: None) -> None:
    """Also after the normalisers have moved."""
    agent = watched()
    for seed in range(3):
        agent.ratios.clear()
        agent.update(batch_for(agent, seed))
        first = agent.ratios[0]
        torch.testing.assert_close(first, torch.ones_like(first), rtol=0, atol=1e-12)
        assert float((agent.ratios[-1] - 1).abs().max()) > 1e-4


def test_reported_step_is_that_of_the_finished_update(double: None) -> None:
    agent = ppo(epochs=3, lr=1e-2, clip=0.05, normalize_obs=False)
    batch = batch_for(agent)
    before = agent.pi(batch.obs).log_prob(batch.action).detach()
    metrics = {k: float(x) for k, x in agent.update(batch).items()}
    log_ratio = agent.pi(batch.obs).log_prob(batch.action).detach() - before
    assert metrics["policy/approx_kl"] == pytest.approx(float((log_ratio.exp() - 1 - log_ratio).mean()), rel=1e-9)
    outside = ((log_ratio.exp() < 0.95) | (log_ratio.exp() > 1.05)).double().mean()
    assert metrics["policy/clip_fraction"] == pytest.approx(float(outside), abs=1e-6)
    assert 0 < metrics["policy/clip_fraction"] < 1


def test_reported_numbers(double: None) -> None:
    agent = ppo(**OneStep, **Plain, log_std=-0.3)
    batch = batch_for(agent)
    adv, ret = advantages(agent, batch)
    v = agent.v(batch.obs).detach()
    metrics = {k: float(x) for k, x in agent.update(batch).items()}
    assert metrics["losses/policy"] == pytest.approx(-float(adv.mean()), abs=1e-12)
    assert metrics["losses/value"] == pytest.approx(float((v - ret).square().mean()), rel=1e-12)
    log_std = agent.pi.log_std.detach()  # of the policy after the update
    entropy = float(log_std.sum()) + 0.5 * ACT_DIM * np.log(2 * np.pi * np.e)
    assert metrics["policy/entropy"] == pytest.approx(entropy, rel=1e-12)
    assert metrics["policy/std"] == pytest.approx(float(log_std.exp().mean()), rel=1e-12)
    assert metrics["value/explained_variance"] == pytest.approx(1 - float((ret - v).var() / ret.var()), abs=1e-6)


def test_every_transition_once_per_epoch_in_a_new_order() -> None:
    agent = ppo(epochs=3, normalize_obs=False)
    batch = batch_for(agent)
    numbers = torch.arange(batch.reward.numel()).float().reshape(batch.reward.shape)
    obs = batch.obs.clone()
    obs[..., 0] = numbers
    seen = recorded_inputs(agent.pi)
    agent.update(batch._replace(obs=obs))
    assert seen[0][0].shape == batch.obs.shape  # log pi_old of the whole rollout
    minibatches = [x[0][:, 0] for x in seen[1:-1]]  # the last is the look back at the step taken
    assert all(len(m) == agent.cfg.minibatch_size for m in minibatches)
    per_epoch = len(numbers.flatten()) // agent.cfg.minibatch_size
    epochs = [torch.cat(minibatches[i * per_epoch : (i + 1) * per_epoch]) for i in range(3)]
    assert len(minibatches) == 3 * per_epoch
    for order in epochs:
        assert torch.equal(order.sort().values, numbers.flatten())
        assert not torch.equal(order, numbers.flatten())
    assert not torch.equal(epochs[0], epochs[1])


def test_rows_stay_together_when_shuffled(double: None) -> None:
    """One pass of minibatches at learning rate zero reports the same losses as the whole rollout at once."""
    metrics = []
    for size in (16, 64):
        agent = ppo(**(OneStep | {"minibatch_size": size}), **Plain)
        gradient_descent(agent, lr=0.0)
        metrics.append(agent.update(batch_for(agent)))
    assert float(metrics[0]["losses/value"]) == pytest.approx(float(metrics[1]["losses/value"]), rel=1e-12)
    assert float(metrics[0]["losses/policy"]) == pytest.approx(float(metrics[1]["losses/policy"]), rel=1e-9)


def test_advantages_are_standardised_per_minibatch(double: None) -> None:
    agent = watched()
    agent.update(batch_for(agent))
    for adv in agent.advs:
        assert float(adv.mean()) == pytest.approx(0.0, abs=1e-12)
        assert float(adv.std()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_constant_added_to_the_advantages(double: None, normalise: bool) -> None:
    """Changes nothing when they are standardised (and a lot when they are not)."""

    class Shifted(PPO):
        shift = 0.0

        def prepare_rollout(self, batch: Batch) -> Rows:
            rows = super().prepare_rollout(batch)
            return rows._replace(adv=rows.adv + self.shift)

    after = []
    for shift in (0.0, 50.0):
        template = ppo(normalize_advantage=normalise)
        torch.manual_seed(0)
        agent = Shifted(template.spec, template.cfg)
        agent.shift = shift
        agent.update(batch_for(agent))
        after.append(torch.cat([p.detach().flatten() for p in agent.pi.parameters()]))
    assert torch.allclose(*after, rtol=0, atol=1e-9) == normalise


def test_a_minibatch_must_divide_the_rollout() -> None:
    with pytest.raises(ValueError, match="minibatch_size=48 does not divide a rollout of 64 transitions"):
        ppo(horizon=16, num_envs=4, minibatch_size=48)


# --------------------------------------------------------------------------------------------------------- advantages
def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


class Sum(nn.Module):
    """V(s) = the sum of the observation."""

    def forward(self, obs: Tensor) -> Tensor:
        return obs.sum(-1)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (None, [9.7114397864, 8.7415627712, 8.7576425, 3.485]),
        ("terminated", [2.4305, 1.0, 8.7576425, 3.485]),
        ("truncated", [3.0822665, 1.693, 8.7576425, 3.485]),
    ],
)
def test_advantages_by_number(double: None, end: str | None, expected: list[float]) -> None:
    """The network is asked for the value of the true successor (0.7 where the episode was cut), not of the next row."""
    agent = ppo(**Plain, gamma=0.99, lam=0.95, num_envs=1, horizon=16)
    agent.v = Sum()  # type: ignore[assignment]
    value = column(0.5, 1.0, -0.5, 2.0)
    successor = column(1.0, 0.7 if end == "truncated" else -0.5, 2.0, 1.5)
    no = torch.zeros(4, 1, dtype=torch.bool)
    ended = no.clone()
    ended[1] = True
    pad = torch.zeros(4, 1, OBS_DIM - 1)
    batch = Batch(
        obs=torch.cat([value[..., None], pad], -1),
        action=torch.zeros(4, 1, 2),
        reward=column(1.0, 2.0, 3.0, 4.0),
        next_obs=torch.cat([successor[..., None], pad], -1),
        terminated=ended if end == "terminated" else no,
        truncated=ended if end == "truncated" else no,
    )
    adv, ret = advantages(agent, batch)
    assert adv[:, 0].tolist() == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(ret - value, adv, rtol=0, atol=1e-12)
    assert not adv.requires_grad
    assert not ret.requires_grad


# -------------------------------------------------------------------------------------------------------- normalisers
def test_normalisers_stand_still_from_acting_to_the_end_of_the_update() -> None:
    """The policy sees in its update exactly what it saw while acting."""
    agent = ppo()
    agent.update(batch_for(agent, 0))  # move them away from the identity
    batch = batch_for(agent, 1)
    norms = nn.ModuleList([agent.obs_norm, agent.reward_scale])
    before = snapshot(norms)
    seen = recorded_inputs(agent.pi)
    with torch.no_grad():
        for obs in batch.obs:
            agent.act(obs, explore=True)
    acted = torch.stack([x[0] for x in seen])
    seen.clear()
    agent.pi.register_forward_pre_hook(lambda *_: assert_still(norms, before))
    agent.v.register_forward_pre_hook(lambda *_: assert_still(norms, before))
    agent.update(batch)
    torch.testing.assert_close(seen[0][0], acted)
    assert differing(norms, before)


def assert_still(module: nn.Module, before: dict[str, Tensor]) -> None:
    assert differing(module, before) == []


def test_normalisers_take_in_the_raw_rollout_once() -> None:
    agent = ppo(gamma=0.9)
    rollouts = [batch_for(agent, seed) for seed in range(3)]
    for batch in rollouts:
        agent.update(batch)
    data = torch.cat([b.obs.reshape(-1, OBS_DIM) for b in rollouts]).double().numpy()
    np.testing.assert_allclose(agent.obs_norm.mean.numpy(), data.mean(0), rtol=1e-10)
    np.testing.assert_allclose(agent.obs_norm.var.numpy(), data.var(0), rtol=1e-10)
    sums = []
    for n in range(agent.cfg.num_envs):
        g = 0.0
        for b in rollouts:
            for t in range(agent.cfg.horizon):
                g = 0.9 * g + float(b.reward[t, n])
                sums.append(g)
                g = 0.0 if b.terminated[t, n] or b.truncated[t, n] else g
    assert float(agent.reward_scale.moments.var) == pytest.approx(float(np.var(sums)), rel=1e-5)


def test_normalisers_off_never_move() -> None:
    agent = ppo(**Plain)
    before = snapshot(nn.ModuleList([agent.obs_norm, agent.reward_scale]))
    agent.update(batch_for(agent))
    assert differing(nn.ModuleList([agent.obs_norm, agent.reward_scale]), before) == []
    x = torch.tensor([[100.0, -200.0, 3.0]])
    assert torch.equal(agent.obs_norm(x), x)


def test_acting_and_evaluating_move_nothing() -> None:
    agent = ppo()
    agent.update(batch_for(agent))
    before = snapshot(agent)
    agent.act(torch.randn(4, OBS_DIM), explore=True)
    agent.predict(np.ones(OBS_DIM))
    assert differing(agent, before) == []


def test_rewards_are_scaled_and_observations_standardised_for_the_advantages() -> None:
    agent = ppo()
    agent.update(batch_for(agent, 0))
    batch = batch_for(agent, 1)
    v = Table(torch.zeros_like(batch.reward))
    agent.v = v  # type: ignore[assignment]
    adv, _ = advantages(agent, batch)
    seen_obs, seen_next = v.seen[0][0], v.seen[1][0]
    torch.testing.assert_close(seen_obs, agent.obs_norm(batch.obs))
    torch.testing.assert_close(seen_next, agent.obs_norm(batch.next_obs))
    last = agent.reward_scale(batch.reward)[-1]
    torch.testing.assert_close(adv[-1], last)  # with V = 0 the last advantage is the reward as the critic sees it
    assert not torch.allclose(last, batch.reward[-1])


# ------------------------------------------------------------------------------------------------------ act, schedule
def test_actions_are_stored_unclipped_and_predicted_clipped() -> None:
    agent = ppo(log_std=1.5)
    action, _ = agent.act(torch.zeros(500, OBS_DIM), explore=True)
    assert float(action.detach().abs().max()) > 3
    predicted, _ = agent.predict(np.zeros((500, OBS_DIM)), deterministic=False)
    assert np.abs(predicted).max() == 1.0
    assert float(action.detach().std()) == pytest.approx(np.exp(1.5), rel=0.1)


def test_learning_rate_falls_linearly_to_zero_over_the_run() -> None:
    agent = ppo(steps=4 * 64, lr=1e-3)
    rates = []
    for seed in range(6):
        agent.update(batch_for(agent, seed))
        rates.append(agent.opt.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0, 0.0], abs=1e-15)


def test_learning_rate_can_stay() -> None:
    agent = ppo(steps=4 * 64, lr=1e-3, anneal_lr=False)
    for seed in range(5):
        agent.update(batch_for(agent, seed))
    assert agent.opt.param_groups[0]["lr"] == 1e-3


def test_losses_of_random_transitions_need_no_spare_fields() -> None:
    """`extra` may carry what the agent does not know."""
    agent = ppo()
    batch = transitions(torch.Generator().manual_seed(0), agent.cfg.horizon, agent.cfg.num_envs)
    agent.update(batch._replace(extra={"note": torch.zeros(batch.reward.shape)}))
