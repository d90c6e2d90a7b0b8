"""Policies made of policies: best of N, edits, slow copies, composition, warm starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlctl.nets import (
    EMA,
    BestOfN,
    Composed,
    DiffusionPolicy,
    Edited,
    FlowPolicy,
    GaussianPolicy,
    MixturePolicy,
    OneStepPolicy,
    TanhGaussianPolicy,
    WarmStarted,
)

OBS, ACT = 3, 2
C = torch.tensor([0.3, -0.6])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def near_c(obs: Tensor, action: Tensor) -> Tensor:
    return -(action - C.to(action.dtype)).square().sum(-1)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ best of N
@pytest.mark.parametrize("kind", ["flow", "diffusion", "gaussian"])
def test_best_of_n(kind: str) -> None:
    base = {"flow": FlowPolicy, "diffusion": DiffusionPolicy, "gaussian": GaussianPolicy}[kind](OBS, ACT, (8,))
    best, obs = BestOfN(base, near_c, 6), torch.randn(5, OBS)
    assert base.noise_shape is not None
    noise = torch.randn(5, 6, *base.noise_shape)
    candidates = base.sample(obs, noise=noise)
    chosen = best.sample(obs, noise=noise)
    values = near_c(obs, candidates)
    torch.testing.assert_close(near_c(obs, chosen), values.amax(-1))
    assert not chosen.requires_grad
    assert torch.equal(BestOfN(base, near_c, 1).sample(obs, noise=noise[:, :1]), candidates[:, 0])
    # more candidates never lower the value of the one that is chosen
    rising = torch.stack([near_c(obs, BestOfN(base, near_c, n).sample(obs, noise=noise[:, :n])) for n in (1, 2, 4, 6)])
    assert bool((rising.diff(dim=0) >= 0).all())
    assert best.sample(obs, 3, generator=gen()).shape == (5, 3, ACT)
    assert torch.equal(best.mode(obs), best(obs).mode)
    torch.testing.assert_close(best.mode(obs[2:3]), best.mode(obs)[2:3])
    at_least = near_c(obs, base.sample(obs, noise=torch.zeros(5, *base.noise_shape)))
    assert bool((near_c(obs, best.mode(obs)) >= at_least - 1e-6).all())


def test_best_of_many_draws_of_a_gaussian_is_the_nearest_to_the_best_action(double: None) -> None:
    """a ~ N(m, s^2), Q = -(a - c)^2 / 2: E[Q] rises with N towards 0."""
    base = GaussianPolicy(OBS, 1, (), log_std=math.log(0.5))
    for p in base.mean.parameters():
        nn.init.zeros_(p)
    obs, values = torch.zeros(4000, OBS), []
    for n in (1, 2, 8, 64):
        best = BestOfN(base, lambda s, a: -0.5 * (a[..., 0] - 0.4).square(), n)
        values.append(float((-0.5 * (best.sample(obs, generator=gen()) - 0.4).square()).mean()))
    assert values[0] == pytest.approx(-0.5 * (0.25 + 0.16), abs=0.02)
    assert values == sorted(values)
    assert -1e-3 < values[-1] < 0


def test_softmax_of_values(double: None) -> None:
    """Weights exp(Q / temperature): shares of a two-armed draw."""
    base = FlowPolicy(OBS, 1, (8,), clip=None).identity_()
    best = BestOfN(base, lambda s, a: a[..., 0], 2, weigh=lambda q: (q / 0.5).softmax(-1))
    noise = torch.tensor([[0.0], [1.0]]).expand(4000, 2, 1)
    share = float(best.sample(torch.zeros(4000, OBS), noise=noise, generator=gen()).mean())
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)


def test_what_best_of_n_refuses() -> None:
    base = FlowPolicy(OBS, ACT, (8,))
    with pytest.raises(TypeError, match="the value is a function"):
        BestOfN(base, nn.Linear(1, 1), 4)
    with pytest.raises(ValueError, match="at least 1"):
        BestOfN(base, near_c, 0)
    mixture = BestOfN(MixturePolicy(OBS, ACT, (8,)), near_c, 4)  # its noise does not determine its draws
    assert mixture.sample(torch.randn(3, OBS), generator=gen()).shape == (3, ACT)
    with pytest.raises(TypeError, match="a deterministic best of N needs a policy with mode"):
        mixture.mode(torch.randn(3, OBS))


def test_the_critic_is_no_part_of_the_wrapper() -> None:
    critic = nn.Linear(OBS + ACT, 1)
    best = BestOfN(FlowPolicy(OBS, ACT, (8,)), lambda s, a: critic(torch.cat([s, a], -1))[..., 0], 4)
    assert all(k == "bank" or k.startswith("policy.") for k in best.state_dict())


# ---------------------------------------------------------------------------------------------------------------- edits
def edited(beta: float, base_kind: str = "flow", **changes: Any) -> Edited:
    base = FlowPolicy(OBS, ACT, (8,)) if base_kind == "flow" else DiffusionPolicy(OBS, ACT, (8,))
    return Edited(base, TanhGaussianPolicy(OBS + ACT, ACT, (8,)), beta, **changes)


@pytest.mark.parametrize("base", ["flow", "diffusion"])
def test_without_edits_it_is_the_best_of_n(base: str) -> None:
    policy, obs = edited(0.0, base), torch.randn(5, OBS)
    noise = torch.randn(5, 4, *policy.noise_shape)  # type: ignore[misc]
    theirs = noise[..., 0, :] if base == "flow" else noise[..., :-1, :]
    candidates = policy.candidates(obs, 4, noise)
    assert candidates.shape == (5, 8, ACT)
    assert torch.equal(candidates[:, :4], candidates[:, 4:])
    plain = BestOfN(policy.policy, near_c, 4)
    assert torch.equal(BestOfN(policy, near_c, 4).sample(obs, noise=noise), plain.sample(obs, noise=theirs))


def test_the_chosen_one_is_a_candidate_and_the_best_of_them() -> None:
    policy, obs = edited(0.3, num_edits=2), torch.randn(5, OBS)
    noise = torch.randn(5, 4, *policy.noise_shape)  # type: ignore[misc]
    candidates = policy.candidates(obs, 4, noise)
    assert candidates.shape == (5, 6, ACT)
    base = policy.policy.sample(obs, noise=noise[..., 0, :])
    torch.testing.assert_close(candidates[:, :4], base)
    off = (candidates[:, 4:] - base[:, :2]).detach().abs()
    assert 0 < float(off.max()) <= 0.3 + 1e-6
    assert float(candidates.detach().abs().max()) <= 1
    chosen = BestOfN(policy, near_c, 4).sample(obs, noise=noise)
    assert bool(((chosen[:, None] == candidates).all(-1)).any(-1).all())
    torch.testing.assert_close(near_c(obs, chosen), near_c(obs, candidates.detach()).amax(-1))


@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_the_density_of_an_edit_integrates_to_one(double: None, beta: float) -> None:
    policy = Edited(FlowPolicy(OBS, 1, (8,)), TanhGaussianPolicy(OBS + 1, 1, (8,)), beta)
    obs, base = torch.randn(1, OBS).expand(200_001, OBS), torch.full((200_001, 1), 0.1)
    pi = policy.edit(torch.cat([obs, base], -1))
    noise = torch.linspace(-8, 8, 200_001)[:, None]
    u = pi.sample(noise).detach()
    a, logp = policy.edited(obs, base, noise)
    inside = (a > -1) & (a < 1)  # where nothing is clipped, the action is where the density says
    torch.testing.assert_close(a[inside], (base + beta * u)[inside])
    assert float(torch.trapezoid(logp.detach().exp(), (base + beta * u)[:, 0])) == pytest.approx(1, abs=1e-6)


def test_base_actions_outside_the_box_are_clipped_like_edits() -> None:
    """Of a base whose draws nobody bounds; what the edit sees of it is in the box too."""
    base = GaussianPolicy(OBS, ACT, (8,), log_std=1.0)
    policy, obs = Edited(base, TanhGaussianPolicy(OBS + ACT, ACT, (8,)), 0.3), torch.randn(50, OBS)
    seen: list[Tensor] = []
    policy.edit.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., OBS:].detach()))
    candidates = policy.candidates(obs, 4, generator=gen())
    draws = base.sample(obs, 4, generator=gen())
    assert float(draws.detach().abs().max()) > 2
    assert torch.equal(candidates[:, :4], draws.clamp(-1, 1))
    assert torch.equal(seen[0], candidates[:, :4])
    base.mean[-1].bias.data.fill_(9.0)  # type: ignore[operator, union-attr]
    for action in (candidates, policy.sample(obs, generator=gen()), policy.mode(obs)):
        assert float(action.detach().abs().max()) <= 1
    assert all(float(x.abs().max()) <= 1 for x in seen)


def test_an_edit_is_differentiable_in_its_own_weights_and_the_base_is_untouched(double: None) -> None:
    policy, obs = edited(0.3), torch.randn(5, OBS)
    with torch.no_grad():
        base = policy.policy.sample(obs, generator=gen())
    a, logp = policy.edited(obs, base, generator=gen())
    grads = torch.autograd.grad(a.sum() + logp.sum(), list(policy.parameters()), allow_unused=True)
    named = dict(zip([n for n, _ in policy.named_parameters()], grads, strict=True))
    assert all((g is None) == n.startswith("policy") for n, g in named.items())


# ----------------------------------------------------------------------------------------------------------- slow copy
def test_a_slow_copy_of_edits_has_the_same_candidates() -> None:
    edited = Edited(FlowPolicy(OBS, ACT, (8,)), TanhGaussianPolicy(OBS + ACT, ACT, (8,)), 0.1, 2)
    obs, noise = torch.randn(5, OBS), torch.randn(5, 4, 2, ACT)
    got = EMA(edited).candidates(obs, 4, noise)
    assert got.shape == (5, 6, ACT)
    assert torch.equal(got, edited.candidates(obs, 4, noise))


def test_ema() -> None:
    policy = FlowPolicy(OBS, ACT, (8,))
    ema = EMA(policy, decay=0.75, every=2, start=4)
    first, slow = next(policy.parameters()), next(ema.slow.parameters())
    before = slow.clone()
    with torch.no_grad():
        first += 1.0
    for step in (1, 3, 5):  # not its turn
        ema.update(step)
    assert torch.equal(slow, before)
    ema.update(4)
    torch.testing.assert_close(slow, before + 0.25)
    ema.update(6)
    torch.testing.assert_close(slow, before + 0.25 + 0.25 * 0.75)
    ema.update(2)  # before the start: a plain copy
    assert torch.equal(slow, first)
    with torch.no_grad():
        first += 1.0
    assert not slow.requires_grad
    obs, noise = torch.randn(4, OBS), torch.randn(4, ACT)
    assert torch.equal(ema.sample(obs, noise=noise), ema.slow.sample(obs, noise=noise))
    assert not torch.equal(ema.sample(obs, noise=noise), policy.sample(obs, noise=noise))
    loss = ema.matching_loss(obs, torch.zeros(4, ACT), generator=gen())
    torch.testing.assert_close(loss, policy.matching_loss(obs, torch.zeros(4, ACT), generator=gen()))
    assert ema.can == {"sample", "mode", "decode", "matching_loss"}
    for other in (DiffusionPolicy(OBS, ACT, (8,), min_std=0.1), GaussianPolicy(OBS, ACT, (8,))):
        slow = EMA(other)
        offered = {name for name in other.can if name in dir(slow) or name in dir(slow(obs))}
        assert slow.can == (offered & other.can) - {"field", "chain_log_prob"}
        assert slow.can >= {"sample", "mode", "decode", "matching_loss"}
        assert not slow.sample(obs, generator=gen()).requires_grad  # no `reparam`
    assert slow.can == {"sample", "mode", "decode", "matching_loss", "log_prob", "entropy", "kl"}


# --------------------------------------------------------------------------------------------------------- composition
class GaussianNoise(nn.Module):
    """The exact noise prediction of data N(mean, std^2)."""

    def __init__(self, mean: float, std: float, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.mean, self.std, self.ab = mean, std, policy.alpha_bar

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        ab = self.ab[t].unsqueeze(-1)
        return (1 - ab).sqrt() * (x - ab.sqrt() * self.mean) / (ab * self.std**2 + 1 - ab)


@pytest.mark.parametrize("kind", [DiffusionPolicy, FlowPolicy])
def test_all_weight_on_one_parent_is_that_parent(double: None, kind: Any) -> None:
    parents, obs = [kind(OBS, ACT, (8,)) for _ in range(3)], torch.randn(5, OBS)
    noise = parents[0].draw_noise(obs, generator=gen())
    for j in range(3):
        composed = Composed(parents, [float(j == k) for k in range(3)])
        torch.testing.assert_close(composed.sample(obs, noise=noise), parents[j].sample(obs, noise=noise))
    half = Composed(parents[:2], [0.5, 0.5])
    assert "matching_loss" not in half.can
    assert half.sample(obs, 4, generator=gen()).shape == (5, 4, ACT)


def test_two_gaussians_of_equal_spread_compose_to_their_weighted_mean(double: None) -> None:
    """A product of powers: N(m1, s^2)^w N(m2, s^2)^(1-w) has mean w m1 + (1-w) m2 and the same spread."""
    parents = []
    for mean in (0.6, -0.2):
        p = DiffusionPolicy(OBS, ACT, (8,), steps=20, sampler="ddim", clip=None)
        p.net = GaussianNoise(mean, 0.3, p)
        parents.append(p)
    mixed, single = (
        Composed(parents, [0.75, 0.25]),
        DiffusionPolicy(OBS, ACT, (8,), steps=20, sampler="ddim", clip=None),
    )
    single.net = GaussianNoise(0.75 * 0.6 - 0.25 * 0.2, 0.3, single)
    obs, noise = torch.zeros(6, OBS), torch.randn(6, ACT)
    torch.testing.assert_close(mixed.decode(obs, noise), single.decode(obs, noise))


def test_parents_may_predict_different_things(double: None) -> None:
    a, b = DiffusionPolicy(OBS, ACT, (8,), clip=None), DiffusionPolicy(OBS, ACT, (8,), prediction="v", clip=None)
    obs, x, i = torch.randn(4, OBS), torch.randn(4, ACT), torch.tensor(3)
    mixed = Composed([a, b], [0.25, 0.75]).field(obs, x, i)
    torch.testing.assert_close(mixed, 0.25 * a.field(obs, x, i) + 0.75 * b.field(obs, x, i))


def test_what_cannot_be_composed() -> None:
    base = DiffusionPolicy(OBS, ACT, (8,))
    for other, what in (
        (DiffusionPolicy(OBS, ACT, (8,), schedule="cosine"), "schedule: vp and cosine"),
        (DiffusionPolicy(OBS, ACT, (8,), steps=10), "num_steps: 5 and 10"),
        (DiffusionPolicy(OBS, ACT, (8,), sampler="ddim"), "the noise of their steps"),
        (FlowPolicy(OBS, ACT, (8,)), "kind: DiffusionPolicy and FlowPolicy"),
    ):
        with pytest.raises(ValueError, match=what):
            Composed([base, other], [0.5, 0.5])
    for weights in ([0.5, 0.6], [1.5, -0.5], [1.0]):
        with pytest.raises(ValueError, match="at least 0, with sum 1"):
            Composed([base, base], weights)
    with pytest.raises(ValueError, match="at least one"):
        Composed([], [])


@pytest.mark.parametrize("kind", ["gaussian", "one step", "slow copy"])
def test_what_has_no_field_is_neither_composed_nor_started_warm(kind: str) -> None:
    policy: Any = {
        "gaussian": lambda: GaussianPolicy(OBS, ACT, (8,)),
        "one step": lambda: OneStepPolicy(OBS, ACT, (8,)),
        "slow copy": lambda: EMA(FlowPolicy(OBS, ACT, (8,))),
    }[kind]()
    with pytest.raises(TypeError, match="a warm start needs a policy with field; "):
        WarmStarted(policy, 1, 1)
    with pytest.raises(TypeError, match="a composition needs a policy with field; "):
        Composed([policy, policy], [0.5, 0.5])


# ---------------------------------------------------------------------------------------------------------- warm starts
class PointMass(nn.Module):
    """The exact noise prediction of data that is `plan`."""

    def __init__(self, plan: Tensor, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.plan, self.ab = plan, policy.alpha_bar

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        ab = self.ab[t].unsqueeze(-1)
        return (x - ab.sqrt() * self.plan) / (1 - ab).sqrt()


def test_a_constant_plan_is_a_fixed_point_of_the_warm_start(double: None) -> None:
    horizon = 3
    base = DiffusionPolicy(OBS, horizon * ACT, (8,), steps=20, sampler="ddim")
    base.net = PointMass(C.double().repeat(horizon), base)
    warm, obs = WarmStarted(base, horizon, 3), torch.zeros(4, OBS)
    plan = warm.plan(obs, generator=gen())
    torch.testing.assert_close(plan, C.double().expand(4, horizon, ACT))
    torch.testing.assert_close(warm.plan(obs, plan), plan)
    torch.testing.assert_close(warm.mode(obs), C.double().expand(4, ACT))
    assert warm.sample(obs, 5, generator=gen()).shape == (4, 5, ACT)


def test_a_warm_start_moves_the_plan_on_and_takes_the_last_steps_only() -> None:
    base = FlowPolicy(OBS, 3 * ACT, (8,), steps=10, clip=None).identity_()
    previous, obs = torch.randn(4, 3, ACT), torch.randn(4, OBS)
    plan = WarmStarted(base, 3, 2).plan(obs, previous)  # an identity flow: nothing but the shift is left
    torch.testing.assert_close(plan, torch.stack([previous[:, 1], previous[:, 2], previous[:, 2]], 1))
    counted: list[float] = []
    learned = FlowPolicy(OBS, 3 * ACT, (8,), steps=10)
    learned.net.register_forward_pre_hook(lambda _, args: counted.append(round(float(args[2]), 6)))
    WarmStarted(learned, 3, 2).plan(obs, previous)
    assert counted == [0.8, 0.9]
    with pytest.raises(ValueError, match="holds no plan of 4 actions"):
        WarmStarted(base, 4, 2)
    with pytest.raises(ValueError, match="1 to 10 steps, not 11"):
        WarmStarted(base, 3, 11)


def test_numbers_and_parts_that_make_no_sense_are_refused() -> None:
    flow = FlowPolicy(OBS, ACT, (8,))
    with pytest.raises(ValueError, match="holds no plan of 0 actions"):
        WarmStarted(flow, 0, 1)
    for wrong in ({"every": 0}, {"decay": 2.0}):
        with pytest.raises(ValueError, match="every at least 1, got"):
            EMA(flow, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a warm start's noise is that of whole plans"):
        Edited(WarmStarted(flow, 1, 1), TanhGaussianPolicy(OBS + ACT, ACT, (8,)), 0.1)
    with pytest.raises(TypeError, match="train its policies by theirs"):
        Composed([flow, flow], [0.5, 0.5]).matching_loss(torch.zeros(2, OBS), torch.zeros(2, ACT))
