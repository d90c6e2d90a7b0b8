"""PA-RL: search by critics, imitation of what it finds, by policies of every kind; its reductions to cloning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agent_helpers import CriticTable, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor

from rlctl import agents
from rlctl.agents.pa_rl import BOUND, PARL, Choices, PARLConfig
from rlctl.nets import EMA, DeterministicPolicy, DiffusionPolicy, MixturePolicy, Policy
from rlctl.ops import minimize
from rlctl.ops.diffusion import alpha_bars, reverse_steps
from rlctl.ops.selection import best_of
from rlctl.types import Batch, Spec

every_base = pytest.mark.parametrize("base", ["diffusion", "flow", "gaussian"])


def pa_rl(**overrides: Any) -> PARL:
    agent = tiny("pa-rl", **{"bc_share": 0.0} | overrides)
    assert isinstance(agent, PARL)
    return agent


def rows(n: int) -> Batch:
    return transitions(torch.Generator().manual_seed(0), n)


# -------------------------------------------------------------------------------------------------------------- search
@every_base
def test_search_by_value_then_by_gradient(base: str) -> None:
    """The m best of k draws; each at least as good after the local search; the data's action searched along."""
    agent = pa_rl(base=base, num_candidates=7, num_kept=3, search_steps=5, search_size=30.0)  # critics start flat
    b = rows(20)
    g = torch.Generator().manual_seed(1)
    draws = agent.base.sample(b.obs, 7, generator=g)
    values = agent.value(b.obs, draws)
    found = agent.optimized(b.obs, b.action, generator=torch.Generator().manual_seed(1))
    assert found.actions.shape == (20, 4, 2)
    before = torch.cat([values.sort(-1, descending=True).values[:, :3], agent.value(b.obs, b.action[:, None])], -1)
    assert bool((found.values >= before - 1e-4).all())  # that much for the edge of the box
    assert bool((found.values > before + 1e-4).any())
    torch.testing.assert_close(agent.value(b.obs, found.actions), found.values)
    assert float(found.actions.abs().max()) <= BOUND
    # the first of the fixed noise is none at all
    calm = agent.base.sample(b.obs, noise=torch.zeros(20, *agent.bank.shape[1:]))
    action = agent.act(b.obs, explore=False)[0]
    assert bool((agent.value(b.obs, action[:, None]) >= agent.value(b.obs, calm[:, None]) - 1e-4).all())


def test_candidates_are_of_the_policy_s_average() -> None:
    agent = pa_rl(num_candidates=4, num_kept=4, search_steps=0, ema_start=0, distill_offline=True, distill_lr=1e-2)
    for seed in range(2):
        agent.update(batch_for(agent, seed))
    obs = rows(9).obs
    found = agent.optimized(obs, generator=torch.Generator().manual_seed(1)).actions
    for policy, same in ((agent.base.slow, True), (agent.base.policy, False)):
        draws = policy.sample(obs, 4, generator=torch.Generator().manual_seed(1)).clamp(-BOUND, BOUND)
        assert torch.equal(found.sort(1).values, draws.sort(1).values) == same


def test_the_optimised_action_of_the_conservative_term_is_never_the_data_s() -> None:
    """Not even where that is the best of all."""
    agent, twin = (pa_rl(search_steps=0, distill_offline=True) for _ in range(2))
    b = batch_for(agent)
    b = b._replace(action=torch.full_like(b.action, 0.9))
    for a in (agent, twin):
        a.value = lambda obs, action: -(action - 0.9).square().sum(-1)  # type: ignore[method-assign]
    gap, seen = agent.gap, []

    def recorded(b: Batch, q: Tensor, next_action: Tensor, action: Tensor) -> Tensor:
        seen.append(action)
        return gap(b, q, next_action, action)

    agent.gap = recorded  # type: ignore[method-assign, assignment]
    agent.update(b)
    ours, rng, m = twin.seen(b), twin.rng["sample"], twin.cfg.num_kept
    twin.optimized(ours.next_obs, generator=rng)
    found = twin.optimized(ours.obs, ours.action, generator=rng)
    assert bool((found.values[:, m] > found.values[:, :m].amax(-1)).all())
    assert torch.equal(seen[0], best_of(found.actions[:, :m], found.values[:, :m]))


def test_the_lagged_critics_choose_nothing() -> None:
    agent, b = pa_rl(), rows(9)
    with agent.borrowed_rng(0):
        before = agent.optimized(b.obs, generator=agent.rng["action"])
    for p in agent.q_lagged.parameters():
        p.add_(1.0)
    with agent.borrowed_rng(0):
        after = agent.optimized(b.obs, generator=agent.rng["action"])
    assert torch.equal(before.actions, after.actions)


def test_what_is_imitated_by_number() -> None:
    """m = 3 and the data's: of values 1, 0, [-1 dropped], log 2 the chances are e, 1, 2 over their sum."""
    values = torch.tensor([1.0, 0.0, -1.0, math.log(2.0)]).expand(4000, 4)
    found = Choices(torch.arange(4.0).expand(4000, 4).unsqueeze(-1), values)
    agent = pa_rl(num_kept=3)
    uniform = torch.linspace(0, 1, 4001)[:-1]
    shares = torch.bincount(agent.to_imitate(found, uniform)[:, 0].long(), minlength=4) / 4000
    total = math.e + 3
    assert shares.tolist() == pytest.approx([math.e / total, 1 / total, 0, 2 / total], abs=1e-3)
    without = pa_rl(num_kept=3, data_candidate=False, temperature=0.5)
    shares = torch.bincount(without.to_imitate(found, uniform)[:, 0].long(), minlength=4) / 4000
    total = math.e**2 + 1 + math.e**-2
    assert shares.tolist() == pytest.approx([math.e**2 / total, 1 / total, math.e**-2 / total, 0], abs=1e-3)
    assert set(pa_rl(num_kept=3, distill_argmax=True).to_imitate(found)[:, 0].tolist()) == {0.0}


def test_choice_by_value_reaches_the_regularised_optimum(double: None) -> None:
    """Of many draws of N(m, s^2), with Q = -(a - c)^2 / (2 l): mean (m / s^2 + c / (tau l)) / p, variance 1 / p, with
    p = 1 / s^2 + 1 / (tau l): what a policy that imitates the choices converges to."""
    m, s, c, l, tau = -0.3, 0.5, 0.4, 0.2, 0.7  # noqa: E741
    g = torch.Generator().manual_seed(0)
    actions = m + s * torch.randn(10_000, 400, 1, generator=g)
    values = -(actions - c).square().sum(-1) / (2 * l)
    agent = pa_rl(num_candidates=400, num_kept=400, data_candidate=False, temperature=tau)
    chosen = agent.to_imitate(Choices(actions, values), torch.rand(10_000, generator=g))
    precision = 1 / s**2 + 1 / (tau * l)
    assert float(chosen.mean()) == pytest.approx((m / s**2 + c / (tau * l)) / precision, abs=0.012)
    assert float(chosen.var()) == pytest.approx(1 / precision, rel=0.06)


@pytest.mark.parametrize(
    ("settings", "levels", "clip_states"),
    [
        ({}, 5, True),
        ({"schedule": "vp", "variance": "posterior", "clip_at": "x0", "base_steps": 10}, 10, False),
    ],
)
def test_the_sampler_of_a_diffusion_is_as_configured(settings: dict[str, Any], levels: int, clip_states: bool) -> None:
    cfg = PARLConfig(base_net="mlp", base_hidden=(8,), **settings)
    agent = agents.make("pa-rl", Spec(3, 2), cfg)
    assert isinstance(agent, PARL)
    policy = agent.base.policy
    assert isinstance(policy, DiffusionPolicy)
    assert (policy.num_steps, policy.schedule, policy.clip_states) == (levels, cfg.schedule, clip_states)
    steps = reverse_steps(alpha_bars(cfg.schedule, levels), variance=cfg.variance)
    torch.testing.assert_close(policy.std, steps.std.float())


def test_critics_start_small() -> None:
    """Rows of the last layer are vectors of length 0.01, give or take: values begin near 0, whatever the action."""
    agent = agents.make("pa-rl", Spec(3, 2), PARLConfig(base_net="mlp", base_hidden=(8,)))
    assert isinstance(agent, PARL)
    last = [q[-1] for q in agent.q.members]  # type: ignore[index]
    lengths = torch.stack([layer.weight.detach().norm() for layer in last])
    assert len(lengths) == 10
    assert 0.008 < float(lengths.min()) <= float(lengths.max()) < 0.012
    assert all(not bool(layer.bias.any()) for layer in last)


# ---------------------------------------------------------------------------------------------------------- reductions
@every_base
@pytest.mark.parametrize("data_candidate", [False, True])
def test_one_candidate_and_no_search_is_behaviour_cloning(base: str, data_candidate: bool) -> None:
    """Of its own draws, or where the data's action takes the place of the worst, of the data: bit for bit."""
    sets = {"base": base, "num_candidates": 1, "num_kept": 1, "search_steps": 0, "cql_weight": 0.0, "ema_start": 0}
    agent, twin = (pa_rl(**sets, data_candidate=data_candidate, distill_offline=True) for _ in range(2))
    b = batch_for(agent)
    agent.update(b)
    rng = twin.rng["sample"]
    # in the order of the update: the successor's draw, this state's, critics, choice, matching
    twin.base.sample(b.next_obs, 1, generator=rng)
    with torch.no_grad():
        own = twin.base.sample(b.obs, 1, generator=rng)[:, 0]
    torch.randperm(3, generator=rng)
    torch.rand(len(b.reward), generator=rng)
    target = (b.action if data_candidate else own).clamp(-BOUND, BOUND)
    twin.opt_base.param_groups[0]["lr"] = twin.cfg.distill_lr
    minimize(twin.base.policy.matching_loss(b.obs, target, generator=rng).mean(), twin.opt_base)
    twin.base.update(1)
    assert differing(agent.base, snapshot(twin.base)) == []
    assert differing(agent.base, snapshot(pa_rl(**sets).base))


def test_cloning_first_then_values_then_distillation() -> None:
    """On the data alone the policy stays a clone, unless asked; in the environment it imitates."""
    agent = tiny("pa-rl")  # two updates of cloning
    assert isinstance(agent, PARL)
    moved = []
    for seed in range(4):
        before = snapshot(agent)
        agent.counters["env_steps"] = 5 * (seed == 3)
        metrics = agent.update(batch_for(agent, seed))
        changed = differing(agent, before)
        moved.append({part for part in ("base", "q", "q_lagged") if any(k.startswith(part + ".") for k in changed)})
        assert ("losses/base" in metrics) == ("base" in moved[-1])
    assert moved == [{"base"}, {"base"}, {"q", "q_lagged"}, {"base", "q", "q_lagged"}]
    assert agent.opt_base.param_groups[0]["lr"] == agent.cfg.distill_lr


# ------------------------------------------------------------------------------------------------------------- critics
def test_critic_loss_by_hand(double: None) -> None:
    """Both of two critics count: y = r + 0.9 (1 - terminated) min = [1.9, 2, 0.3]."""
    agent = pa_rl(gamma=0.9, num_critics=2)
    agent.q_lagged = CriticTable(torch.tensor([[1.0, 5.0, -3.0], [2.0, 4.0, 7.0]]))  # type: ignore[assignment]
    b = rows(3)._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([True, False, False]),
    )
    q = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]])
    error = q - torch.tensor([1.9, 2.0, 0.3])
    assert float(agent.critic_loss(b, q, b.action)) == pytest.approx(float(error.square().mean(1).sum()), abs=1e-12)


def test_the_gap_counts_optimised_actions_as_often_as_those_of_the_box(double: None) -> None:
    """Against a plain log-sum-exp with every copy written out; the floor lifts the optimised ones alone."""
    agent = pa_rl(num_actions=4)
    b = batch_for(agent)
    b = b.map(lambda x: x.double() if x.is_floating_point() else x)
    uniform, there, here = torch.rand(32, 4, 2), torch.rand(32, 2) - 0.5, torch.rand(32, 2) - 0.5
    q, floor = agent.q(b.obs, b.action), b.extra["mc_return"]
    box = agent.q(b.obs, 2 * uniform - 1)
    optimised = torch.stack([agent.q(b.obs, there), agent.q(b.obs, here)], -1)
    for calibrate in (True, False):
        held = torch.maximum(optimised, floor[:, None]) if calibrate else optimised
        every = torch.cat([box, *[held] * 4, q[..., None]], -1)
        expected = (every.logsumexp(-1) - q).mean(-1).sum()
        other = pa_rl(num_actions=4, calibrate=calibrate)
        torch.testing.assert_close(other.gap(b, q, there, here, uniform), expected)
    assert bool((floor[:, None] > optimised).any())
    low = b._replace(extra={**b.extra, "mc_return": torch.full_like(floor, -torch.inf)})
    same = [pa_rl(num_actions=4, calibrate=c).gap(low, q, there, here, uniform) for c in (True, False)]
    assert torch.equal(same[0], same[1])


# -------------------------------------------------------------------------------------------------------------- bandit
CENTRES = torch.tensor([[0.8, 0.8], [0.8, -0.8], [-0.8, 0.8], [-0.8, -0.8]])


def bandit(g: torch.Generator, n: int) -> Batch:
    """Actions at four places with equal chance, the first of which is paid; one step."""
    mode = torch.randint(0, 4, (n,), generator=g)
    action = (CENTRES[mode] + 0.05 * torch.randn(n, 2, generator=g)).clamp(-1, 1)
    no = torch.zeros(n, dtype=torch.bool)
    return Batch(torch.zeros(n, 1), action, (mode == 0).float(), torch.zeros(n, 1), ~no, no)


@pytest.mark.timeout(900)
@pytest.mark.slow
@every_base
def test_distilled_policies_of_every_kind_go_to_the_paid_mode(base: str) -> None:
    """The policy's own draws, not the best of them: nearly all where the reward is, after distillation.

    Values are within [0, 1] and change over actions 1.6 apart: a search step of 0.05 times their slope gets somewhere,
    a temperature of 0.1 tells them apart. The official 3e-4 and 1, for values down to -100, do neither.
    """
    cfg = PARLConfig(
        base=base,  # type: ignore[arg-type]
        base_net="mlp",
        base_hidden=(128, 128),
        base_steps=10,
        schedule="vp",
        variance="posterior",
        clip_at="x0",
        bc_share=400 / 1_000_000,
        distill_offline=True,
        base_lr=2e-3,
        distill_lr=2e-3,
        ema_start=0,
        ema_decay=0.98,
        hidden=(64, 64),
        critic_lr=2e-3,
        tau=0.05,
        num_critics=2,
        num_candidates=8,
        num_kept=3,
        search_steps=3,
        search_size=0.05,
        temperature=0.1,
        cql_weight=0.0,
    )
    agent = agents.make("pa-rl", Spec(1, 2), cfg)
    assert isinstance(agent, PARL)
    g = torch.Generator().manual_seed(0)
    for _ in range(1100):
        agent.update(bandit(g, 64))
    obs = torch.zeros(1000, 1)

    def share(action: Tensor) -> float:
        return float(((action - CENTRES[0]).norm(dim=-1) < 0.35).float().mean())

    with torch.no_grad():
        assert share(agent.base.sample(obs, generator=g)) > 0.9
        assert share(agent.act(obs, explore=True)[0]) > 0.98


# ------------------------------------------------------------------------------------------------------------- refusal
def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_kept=9 of 5 candidates"):
        pa_rl(num_kept=9)
    with pytest.raises(ValueError, match="smallest of 1 to 3 critics"):
        pa_rl(backup_critics=4)

    class Silent(PARL):
        def make_base(self) -> Policy:
            return DeterministicPolicy(3, 2, (8,))

    class Mixed(PARL):
        def make_base(self) -> Policy:
            return MixturePolicy(3, 2, (8,))

    with pytest.raises(TypeError, match="PA-RL needs a policy with sample, mode; DeterministicPolicy offers"):
        agents.make(Silent, Spec(3, 2))
    with pytest.raises(TypeError, match="MixturePolicy draws by more than noise"):
        agents.make(Mixed, Spec(3, 2))
    assert isinstance(pa_rl().base, EMA)
