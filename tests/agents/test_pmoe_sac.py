"""PMOE-SAC: SAC as its special case bit for bit, who is chosen and who learns, the gate, backups by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, solve, tiny, transitions, value_of
from torch import Tensor, nn

from rlctl.agents.pmoe_sac import PMOESAC
from rlctl.agents.sac import SAC
from rlctl.nets import TanhNormal, TanhNormalMixture
from rlctl.ops import minimize
from rlctl.types import Batch

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def pmoe(**overrides: Any) -> PMOESAC:
    agent = tiny("pmoe-sac", **overrides)
    assert isinstance(agent, PMOESAC)
    return agent


def batch(rows: int = 32, seed: int = 0) -> Batch:
    return transitions(torch.Generator().manual_seed(seed), rows)


class Fixed(nn.Module):
    """A policy that gives one distribution everywhere."""

    def __init__(self, dist: TanhNormalMixture) -> None:
        super().__init__()
        self.dist = dist

    def forward(self, obs: Tensor) -> TanhNormalMixture:
        return self.dist


class Climb(nn.Module):
    """Q(s, a) = slope * sum(a), twice."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return (self.slope * action.sum(-1)).expand(2, *action.shape[:-1])


def outputs(agent: PMOESAC) -> nn.Linear:
    last = agent.pi.net[-1]
    assert isinstance(last, nn.Linear)
    return last


# ------------------------------------------------------------------------------------------------------------ it is SAC
@pytest.mark.parametrize("improve", ["best", "all"])
def test_one_component_is_sac_bit_for_bit(improve: str) -> None:
    """On shared noise: losses, gradients, and five whole updates, temperature included."""
    ours, theirs = pmoe(num_components=1, alpha=0.4, improve=improve), tiny("sac", alpha=0.4)
    assert isinstance(theirs, SAC)
    ours.pi.net.load_state_dict(theirs.pi.net.state_dict())
    ours.q.load_state_dict(theirs.q.state_dict())
    ours.q_lagged.load_state_dict(theirs.q_lagged.state_dict())
    for seed in range(5):
        b = batch(seed=seed)
        states = [agent.rng["sample"].get_state() for agent in (ours, theirs)]
        assert torch.equal(*states)
        found: list[list[Tensor]] = []
        for agent, state in zip((ours, theirs), states, strict=True):
            critic, (actor, logp, *_) = agent.critic_loss(b), agent.actor_loss(b)
            slopes = torch.autograd.grad(critic, list(agent.q.parameters()))
            slopes += torch.autograd.grad(actor, list(agent.pi.net.parameters()))
            found.append([critic, actor, logp, agent.alpha_loss(logp), *slopes])
            agent.rng["sample"].set_state(state)
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
        ours.update(b)
        theirs.update(b)
        assert differing(ours.pi.net, snapshot(theirs.pi.net)) == []
        for part in ("q", "q_lagged"):
            assert differing(getattr(ours, part), snapshot(getattr(theirs, part))) == []
        assert torch.equal(ours.log_alpha, theirs.log_alpha)
    obs = batch().obs
    for explore in (False, True):
        assert torch.equal(ours.act(obs, explore)[0], theirs.act(obs, explore)[0])


def test_one_component_is_sac_with_the_density_of_the_mixture(double: None) -> None:
    ours, theirs = pmoe(num_components=1, alpha=0.4, density="mixture"), tiny("sac", alpha=0.4)
    assert isinstance(theirs, SAC)
    ours.pi.net.load_state_dict(theirs.pi.net.state_dict())
    ours.q.load_state_dict(theirs.q.state_dict())
    ours.q_lagged.load_state_dict(theirs.q_lagged.state_dict())
    for _ in range(3):
        ours.update(batch())
        theirs.update(batch())
    for a, b in zip(ours.pi.net.parameters(), theirs.pi.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------------------------------------------- critic
class ThreeOrFour(nn.Module):
    """3 for positive actions, 4 for negative ones."""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.where(action[..., 0] > 0, 3.0, 4.0).expand(2, -1)


def test_expected_soft_value_by_number(double: None) -> None:
    """w = [.25, .75], log pi_k = [-1, -2], Q = [3, 4], alpha = .5: 4.625, by four draws that hit each share exactly."""
    agent = pmoe(num_components=2, alpha=0.5, gamma=1.0)
    u = torch.tensor([0.5, -0.5])
    log_std = -(torch.tensor([-1.0, -2.0]) + (1 - u.tanh().square()).log()) - HALF_LOG_2PI
    components = TanhNormal(u[None, :, None].expand(4, 2, 1), log_std[None, :, None].expand(4, 2, 1))
    agent.pi = Fixed(TanhNormalMixture(torch.tensor([[0.25, 0.75]]).log().expand(4, 2), components))  # type: ignore[assignment]
    agent.q_lagged = ThreeOrFour()  # type: ignore[assignment]
    values = torch.zeros(2, 4, requires_grad=True)
    agent.q = Table(values)  # type: ignore[assignment]
    b = batch(4)._replace(reward=torch.zeros(4), terminated=torch.zeros(4, dtype=torch.bool))
    uniform, noise = torch.tensor([0.125, 0.375, 0.625, 0.875]), torch.zeros(4, 1)
    (g,) = torch.autograd.grad(agent.critic_loss(b, noise, uniform), values)
    backup = -g[0] * 4 / 2
    assert backup.tolist() == pytest.approx([3.5, 5.0, 5.0, 5.0], abs=1e-9)
    assert float(backup.mean()) == pytest.approx(4.625, abs=1e-9)


def test_backup_with_the_density_of_the_mixture(double: None) -> None:
    agent = pmoe(density="mixture", alpha=0.5, gamma=0.9)
    b, noise, uniform = batch(), torch.randn(32, 2), torch.rand(32)
    pi = agent.pi(b.next_obs)
    action = pi.sample(noise, uniform=uniform)
    soft = agent.q_lagged(b.next_obs, action).amin(0) - 0.5 * pi.log_prob(action)
    y = (b.reward + 0.9 * soft * ~b.terminated).detach()
    slow = ((agent.q(b.obs, b.action) - y) ** 2).mean(-1).sum()
    assert agent.critic_loss(b, noise, uniform).item() == pytest.approx(slow.item(), rel=1e-7)
    official = pmoe(alpha=0.5, gamma=0.9)
    assert abs(official.critic_loss(b, noise, uniform).item() - slow.item()) > 1e-3


# ---------------------------------------------------------------------------------------------------------------- actor
def test_only_the_best_component_improves(double: None) -> None:
    """Means far apart, Q rising in the action: the third component is best everywhere and alone gets a gradient."""
    agent = pmoe(num_components=3)
    agent.q = Climb()  # type: ignore[assignment]
    last = outputs(agent)
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([-0.5, -0.5, 0.0, 0.0, 0.5, 0.5] + [-3.0] * 6)
    loss, logp, log = agent.actor_loss(batch())
    (g,) = torch.autograd.grad(loss, last.bias)
    by_component = g.reshape(2, 3, 2).abs().sum((0, 2))
    assert by_component[:2].tolist() == [0.0, 0.0]
    assert float(by_component[2]) > 0.1
    assert logp.shape == (32,)
    assert [float(log[f"mixture/best_{k}"]) for k in range(3)] == [0.0, 0.0, 1.0]
    agent = pmoe(num_components=3, improve="all")
    agent.q = Climb()  # type: ignore[assignment]
    last = outputs(agent)
    nn.init.zeros_(last.weight)
    loss, logp, _ = agent.actor_loss(batch())
    (g,) = torch.autograd.grad(loss, last.bias)
    assert float(g.reshape(2, 3, 2).abs().sum((0, 2)).min()) > 0.01
    assert logp.shape == (96,)


@pytest.mark.parametrize("density", ["component", "mixture"])
@pytest.mark.parametrize("improve", ["best", "all"])
def test_actor_loss_equals_a_slow_reference(double: None, improve: str, density: str) -> None:
    agent = pmoe(alpha=0.3, improve=improve, density=density)
    b, noise = batch(6), torch.randn(6, 4, 2)
    pi = agent.pi(b.obs)
    total, squares = torch.tensor(0.0), torch.tensor(0.0)
    for i in range(6):
        draws, values = [], []
        components = [TanhNormal(pi.components.mean[i, k], pi.components.log_std[i, k]) for k in range(4)]
        for one, eps in zip(components, noise[i], strict=True):
            u = one.mean + one.log_std.exp() * eps
            each = torch.stack([c.log_prob_pre_tanh(u) for c in components])
            of_mixture = (pi.weights[i].detach() * each.exp()).sum().log()
            draws.append(one.log_prob_pre_tanh(u) if density == "component" else of_mixture)
            values.append(torch.minimum(*agent.q(b.obs[i], u.tanh())))
        best = max(range(4), key=lambda k: float(values[k]))
        for k in range(4):
            squares = squares + (int(k == best) - pi.weights[i, k]) ** 2
            if k == best or improve == "all":
                total = total + 0.3 * draws[k] - values[k]
    expected = total / 6 + squares / 24
    loss, _, log = agent.actor_loss(b, noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert float(log["losses/gate"]) == pytest.approx(squares.item() / 24, rel=1e-9)
    params = list(agent.pi.parameters())
    got = torch.autograd.grad(loss, params)
    for g, h in zip(got, torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("density", ["component", "mixture"])
def test_the_frequency_loss_trains_the_gate_alone_and_nothing_else_does(density: str) -> None:
    agent = pmoe(density=density)
    b = batch()
    trunk, gate = list(agent.pi.net.parameters()), list(agent.pi.gate.parameters())
    pi = agent.pi(b.obs)
    from_gate = torch.autograd.grad(pi.weights.square().sum(), trunk + gate, allow_unused=True)
    assert all(g is None for g in from_gate[: len(trunk)])
    assert all(g is not None for g in from_gate[len(trunk) :])
    noise = torch.randn(32, 4, 2)
    slopes = []
    for value in (0.0, 100.0):
        agent.q = Climb(value)  # type: ignore[assignment]
        best_before = agent.actor_loss(b, noise)
        slopes.append(torch.autograd.grad(best_before[0], gate))
    agent.q = Climb(1.0)  # type: ignore[assignment]
    again = torch.autograd.grad(agent.actor_loss(b, noise)[0], gate)
    for g, h in zip(slopes[1], again, strict=True):
        torch.testing.assert_close(g, h)  # the same component is best; how much better does not count
    assert not torch.equal(slopes[0][1], slopes[1][1])


def test_the_actor_step_moves_the_actor_alone() -> None:
    agent = pmoe()
    before = snapshot(agent)
    minimize(agent.actor_loss(batch())[0], agent.opt_pi)
    moved = differing(agent, before)
    assert all(k.startswith("pi.") for k in moved)
    assert {"pi.gate.linear.weight", "pi.net.out.weight", "pi.net.hidden0.weight"} <= set(moved)
    before = snapshot(agent)
    minimize(agent.critic_loss(batch()), agent.opt_q)
    assert {k.split(".")[0] for k in differing(agent, before)} == {"q"}


def test_the_gate_learns_which_component_is_best() -> None:
    """Component 1 is the best one where the first observation is positive, component 0 elsewhere."""
    agent = pmoe(num_components=2, gate="obs", actor_lr=3e-2)
    last = outputs(agent)
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([-0.8, 0.0, 0.8, 0.0] + [-4.0] * 4)

    class Switch(nn.Module):
        def forward(self, obs: Tensor, action: Tensor) -> Tensor:
            sign = obs[..., 0].sign().reshape(-1, *[1] * (action.dim() - 2))
            return (1e-3 * sign * action[..., 0]).expand(2, *action.shape[:-1])

    agent.q = Switch()  # type: ignore[assignment]
    gate = list(agent.pi.gate.parameters())
    opt = torch.optim.Adam(gate, lr=3e-2)
    for seed in range(300):
        minimize(agent.actor_loss(batch(128, seed))[0], opt)
    obs = batch(512, 1000).obs
    obs = obs[obs[:, 0].abs() > 0.2]
    chosen = agent.pi(obs).logits.argmax(-1)
    assert float((chosen == (obs[:, 0] > 0)).double().mean()) > 0.97
    action, _ = agent.act(obs, explore=False)
    torch.testing.assert_close(action[:, 0].sign(), obs[:, 0].sign() * (chosen == (obs[:, 0] > 0)).mul(2).sub(1))


# -------------------------------------------------------------------------------------------------- temperature, acting
@pytest.mark.parametrize(("target", "sign"), [(20.0, 1), (-50.0, -1)])
def test_alpha_holds_the_entropy_of_the_component(target: float, sign: int) -> None:
    agent = pmoe(target_entropy=target, alpha=0.5, alpha_lr=1e-2)
    metrics = agent.update(batch_for(agent))
    assert sign * (float(agent.log_alpha.detach()) - math.log(0.5)) == pytest.approx(1e-2, rel=1e-3)
    assert float(metrics["policy/alpha"]) == pytest.approx(0.5)
    assert pmoe().target_entropy == -2.0
    fixed = pmoe(alpha=0.25, learn_alpha=False)
    fixed.update(batch_for(fixed))
    assert float(fixed.log_alpha.detach()) == pytest.approx(math.log(0.25))


def test_behaviour_draws_a_component_and_evaluation_takes_the_heaviest() -> None:
    agent = pmoe(num_components=3)
    last = outputs(agent)
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([-1.0, -1.0, 0.0, 0.0, 1.0, 1.0] + [-4.0] * 6)
    nn.init.zeros_(agent.pi.gate.linear.weight)
    agent.pi.gate.linear.bias.data = torch.tensor([0.3, 0.1, 0.6]).log()
    with torch.no_grad():
        obs = torch.zeros(20_000, 3)
        mode, draws = agent.act(obs, explore=False)[0], agent.act(obs, explore=True)[0].atanh()
    torch.testing.assert_close(mode, torch.full((20_000, 2), math.tanh(1.0)))
    shares = [float(((draws[:, 0] - m).abs() < 0.5).double().mean()) for m in (-1.0, 0.0, 1.0)]
    assert shares == pytest.approx([0.3, 0.1, 0.6], abs=0.02)
    assert float((draws[:, 0] * draws[:, 1]).min()) > -0.05  # one component gives all dimensions of an action


def test_the_critics_may_name_the_component_of_the_deterministic_action() -> None:
    agent = pmoe(num_components=3, deterministic="value")
    last = outputs(agent)
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([-1.0, -1.0, 0.0, 0.0, 1.0, 1.0] + [-4.0] * 6)
    agent.q.forward = lambda obs, action: torch.stack([action.sum(-1), -action[..., 0]])  # type: ignore[method-assign]
    with torch.no_grad():
        action = agent.act(torch.zeros(5, 3), explore=False)[0]
    torch.testing.assert_close(action, torch.zeros(5, 2))  # min of the two: 0 in the middle, -tanh(1) to its right


def test_utilisation() -> None:
    agent = pmoe(num_components=3)
    nn.init.zeros_(agent.pi.gate.linear.weight)
    agent.pi.gate.linear.bias.data = torch.tensor([0.5, 0.25, 0.25]).log()
    _, _, log = agent.actor_loss(batch())
    assert [float(log[f"mixture/weight_{k}"]) for k in range(3)] == pytest.approx([0.5, 0.25, 0.25])
    assert float(log["mixture/effective_components"]) == pytest.approx(math.exp(1.0397207708))
    assert sum(float(log[f"mixture/best_{k}"]) for k in range(3)) == pytest.approx(1.0)
    metrics = agent.update(batch_for(agent))
    assert set(log) <= set(metrics)


@pytest.mark.parametrize(
    "options",
    [{"improve": "all"}, {"density": "mixture"}, {"gate": "obs", "num_components": 2}],
    ids=["all components", "mixture density", "gate by observation"],
)
def test_every_style_solves_the_hardest_probe(options: dict[str, Any]) -> None:
    agent, env = solve("pmoe-sac", "both", **options)
    obs = torch.tensor([[-1.0], [1.0]])
    assert value_of(agent, obs).tolist() == pytest.approx(env.value(obs, agent.cfg.gamma).tolist(), abs=0.1)
    action, _ = agent.act(obs, explore=False)
    assert action.flatten().tolist() == pytest.approx(env.optimal_action(obs).flatten().tolist(), abs=0.2)
