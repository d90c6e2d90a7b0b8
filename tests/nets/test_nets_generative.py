"""Diffusion and flow policies with exact fields: point masses, Gaussians, chains, losses; codes and their decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlctl.nets import (
    DeterministicPolicy,
    DiffusionPolicy,
    FieldMLP,
    FieldResNet,
    FlowPolicy,
    GaussianPolicy,
    GenerativePolicy,
    LatentDecoderPolicy,
    OneStepPolicy,
    Policy,
    TanhGaussianPolicy,
    field_net,
    require,
)
from rlctl.ops.diffusion import alpha_bars

OBS, ACT = 3, 2
C = torch.tensor([0.3, -0.6])
KINDS: dict[str, dict[str, Any]] = {
    "ddpm": {"schedule": "vp", "steps": 5},
    "ddpm, cosine, v": {"schedule": "cosine", "steps": 10, "prediction": "v"},
    "ddpm, x0": {"schedule": "vp", "steps": 10, "prediction": "x0"},
    "ddim": {"schedule": "vp", "steps": 10, "sampler": "ddim"},
    "ddim, half": {"schedule": "cosine", "steps": 20, "sampler": "ddim", "sampling_steps": 4},
    "ddim, eta 1": {"schedule": "vp", "steps": 10, "sampler": "ddim", "eta": 1.0, "sampling_steps": 5},
    "beta": {"schedule": "vp", "steps": 5, "variance": "beta", "clip_at": "step"},
    "floor": {"schedule": "cosine", "steps": 10, "min_std": 0.1, "clip": None},
    "euler": {"steps": 10},
    "midpoint": {"steps": 4, "method": "midpoint"},
    "noisy flow": {"steps": 4, "noise_std": 0.05, "clip": None},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def is_flow(kind: str) -> bool:
    return kind in ("euler", "midpoint", "noisy flow")


def make(kind: str, seed: int = 0, **changes: Any) -> GenerativePolicy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cls = FlowPolicy if is_flow(kind) else DiffusionPolicy
        return cls(OBS, ACT, (16, 16), **KINDS[kind] | changes)  # type: ignore[no-any-return]


class Exact(nn.Module):
    """The field of data N(mean, std^2) in every dimension, as a network of the wanted kind would give it."""

    def __init__(self, mean: Tensor, std: float, policy_args: dict[str, Any], flow: bool) -> None:
        super().__init__()
        self.mean, self.std, self.flow = mean, std, flow
        self.kind = policy_args.get("prediction", "eps")
        if not flow:
            self.ab = alpha_bars(policy_args["schedule"], policy_args["steps"])

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.flow:
            t = t.unsqueeze(-1)
            slope = (t * self.std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * self.std**2)
            return self.mean + slope * (x - t * self.mean)
        ab = self.ab[t].to(x.dtype).unsqueeze(-1)
        noise = (1 - ab).sqrt() * (x - ab.sqrt() * self.mean) / (ab * self.std**2 + 1 - ab)
        data = (x - (1 - ab).sqrt() * noise) / ab.sqrt()
        return {"eps": noise, "x0": data, "v": ab.sqrt() * noise - (1 - ab).sqrt() * data}[self.kind]


def exact(kind: str, mean: Tensor, std: float, **changes: Any) -> GenerativePolicy:
    args = KINDS[kind] | changes
    return make(kind, **changes, net=Exact(mean, std, args, is_flow(kind)))


# ------------------------------------------------------------------------------------------------------- closed forms
@every_kind
def test_a_point_mass_is_found_from_anywhere(double: None, kind: str) -> None:
    """With the exact field of a = c every sampler ends in c, whatever its start, steps and levels."""
    mean = C.double()
    policy = exact(kind, mean, 0.0)
    obs = torch.zeros(50, OBS)
    draws = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    spread = {"floor": 0.1, "noisy flow": 0.05}.get(kind, 0.0)  # the noise of the last step, if there is any
    # the last step leads to c whatever came before
    assert float((draws - mean).abs().max()) <= 5 * spread + 1e-9
    torch.testing.assert_close(policy.decode(obs, torch.randn(50, ACT)), mean.expand(50, ACT), rtol=0, atol=1e-9)
    torch.testing.assert_close(policy.mode(obs), mean.expand(50, ACT), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_flow_to_a_point_mass_needs_no_particular_number_of_steps(double: None, steps: int) -> None:
    policy = exact("euler", C.double(), 0.0, steps=steps)
    torch.testing.assert_close(policy.decode(torch.zeros(5, OBS), torch.randn(5, ACT)), C.double().expand(5, ACT))


@pytest.mark.parametrize(
    ("kind", "changes", "mean", "std"),
    [
        ("ddpm", {}, 0.2995, 0.2954),
        ("ddim", {}, 0.2903, 0.4051),
        ("ddim", {"steps": 20}, 0.2892, 0.4509),
        ("ddim", {"sampler": "ddpm"}, 0.2995, 0.3643),
        ("beta", {"clip_at": "x0"}, 0.2995, 0.4435),
        ("ddpm, cosine, v", {}, 0.3000, 0.3887),
        ("euler", {}, 0.3, 0.43078),
        ("euler", {"steps": 4}, 0.3, 0.34054),
    ],
)
def test_spread_of_samples_of_gaussian_data(
    double: None, kind: str, changes: dict[str, Any], mean: float, std: float
) -> None:
    """200,000 draws against the moments in closed form (nothing clipped)."""
    policy = exact(kind, torch.tensor([0.3, 0.3]), 0.5, **changes, clip=None)
    draws = policy.sample(torch.zeros(100_000, OBS), generator=torch.Generator().manual_seed(1)).flatten()
    assert float(draws.mean()) == pytest.approx(mean, abs=4 * std / 200_000**0.5 + 5e-5)
    assert float(draws.std()) == pytest.approx(std, rel=4 / 400_000**0.5 + 2e-4)


def test_a_flow_is_never_asked_at_time_1() -> None:
    """The grid linspace(0, 1, K) of a released code would spread the Gaussian above by 0.526 at K = 4, not by 0.341."""
    assert make("euler", steps=4).time.tolist() == [0, 0.25, 0.5, 0.75]  # type: ignore[union-attr]


def test_zero_networks(double: None) -> None:
    """A flow then returns its noise bit for bit; a DDIM its noise over sqrt(ab_T), 1.05191 for 10 linear steps."""
    noise, obs = torch.randn(6, ACT), torch.randn(6, OBS)
    for kind in ("euler", "midpoint", "noisy flow"):
        assert torch.equal(make(kind, clip=None).identity_().decode(obs, noise), noise)
    linear = make("ddim", schedule="linear", clip=None).identity_()
    torch.testing.assert_close(linear.decode(obs, noise) / noise, torch.full((6, ACT), 1.05191), rtol=1e-5, atol=0)
    vp = make("ddim", clip=None).identity_()
    torch.testing.assert_close(vp.decode(obs, noise), noise * math.exp(5.05 / 2))


# --------------------------------------------------------------------------------------------------- every kind alike
@every_kind
def test_shapes_and_explicit_noise(kind: str) -> None:
    policy = make(kind)
    obs, g = torch.randn(4, OBS), torch.Generator().manual_seed(0)
    one, several = policy.draw_noise(obs, generator=g), policy.draw_noise(obs, 6, g)
    assert one.shape == (4, *policy.noise_shape)
    assert policy.noise_shape == ((policy.num_steps + 1, ACT) if policy.stochastic else (ACT,))
    assert several.shape == (4, 6, *policy.noise_shape)
    draws = policy.sample(obs, noise=several)
    assert draws.shape == (4, 6, ACT)
    assert policy.sample(obs, 6, generator=g).shape == (4, 6, ACT)
    assert policy(obs).sample(generator=g).shape == policy(obs).mode.shape == (4, ACT)
    # each draw depends on its own noise and observation alone
    torch.testing.assert_close(policy.sample(obs, noise=several[:, 2]), draws[:, 2], rtol=1e-5, atol=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(policy.sample(obs[order], noise=one[order]), policy.sample(obs, noise=one)[order])
    assert torch.equal(policy.sample(obs, noise=one), policy.sample(obs, noise=one))
    if policy.clip is not None:
        assert float(draws.detach().abs().max()) <= 1


@every_kind
def test_decoding_is_continuous_in_the_noise(double: None, kind: str) -> None:
    policy = make(kind, clip=None)
    obs, noise = torch.randn(4, OBS), 0.3 * torch.randn(4, ACT)
    near = policy.decode(obs, noise + 1e-6)
    assert float((near - policy.decode(obs, noise)).detach().abs().max()) < 1e-3
    assert not torch.equal(near, policy.decode(obs, noise))


@every_kind
def test_draws_are_differentiable_in_weights_and_in_the_first_noise(double: None, kind: str) -> None:
    policy = make(kind, clip=None)
    obs = torch.randn(4, OBS)
    noise = policy.draw_noise(obs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    g_noise, g_weight = torch.autograd.grad(
        policy.sample(obs, noise=noise).square().sum(), [noise, next(policy.net.net.parameters())]
    )
    first = g_noise[..., 0, :] if policy.stochastic else g_noise
    assert bool((first != 0).all())
    assert float(g_weight.abs().max()) > 0


@every_kind
def test_matching_loss(double: None, kind: str) -> None:
    """Nothing at the exact field of a point mass; else the mean square of its errors; several pairs per action."""
    policy, obs = make(kind), torch.randn(4, OBS)
    action, g = C.double().expand(4, ACT), torch.Generator().manual_seed(0)
    noise, time = policy.draw_pairs(action, 5, g)
    assert noise.shape == (4, 5, ACT)
    assert time.shape == (4, 5)
    loss = policy.matching_loss(obs, action, noise, time)
    assert loss.shape == (4, 5)
    one = policy.matching_loss(obs, action, noise[:, 3], time[:, 3])
    torch.testing.assert_close(one, loss[:, 3])
    each = policy.matching_loss(obs, action, noise[:, 3], time[:, 3], reduce=False)
    torch.testing.assert_close(each.mean(-1), one)
    drawn = [policy.matching_loss(obs, action, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    fitted = exact(kind, C.double(), 0.0).matching_loss(obs, action, noise, time)
    torch.testing.assert_close(fitted, torch.zeros(4, 5), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="both noise and time, or neither"):
        policy.matching_loss(obs, action, noise)


def test_times_cover_every_level_of_a_diffusion_and_the_unit_interval_of_a_flow() -> None:
    g, action = torch.Generator().manual_seed(0), torch.zeros(5000, ACT)
    levels = make("ddpm").draw_pairs(action, generator=g)[1]
    assert levels.unique().tolist() == [1, 2, 3, 4, 5]
    t = make("euler").draw_pairs(action, generator=g)[1]
    assert 0 <= float(t.min()) < 0.01
    assert 0.99 < float(t.max()) < 1


def test_the_exact_field_minimises_the_loss_in_expectation(double: None) -> None:
    """Gaussian data: the gradient in an offset added to the exact field vanishes (3 standard errors, 400,000 draws)."""
    for kind in ("ddpm", "ddpm, x0", "ddpm, cosine, v", "euler"):
        policy = exact(kind, torch.zeros(ACT), 0.5)
        inner, offset = policy.net, torch.zeros(ACT, requires_grad=True)
        policy.net = type(
            "Shifted", (nn.Module,), {"forward": lambda self, o, x, t, f=inner, b=offset: f(o, x, t) + b}
        )()
        g = torch.Generator().manual_seed(0)
        action = 0.5 * torch.randn(200_000, ACT, generator=g)
        error = policy.matching_loss(torch.zeros(200_000, OBS), action, generator=g, reduce=False)
        (grad,) = torch.autograd.grad(error.mean(), offset)
        scale = 2 * error.detach().mean().sqrt() / 400_000**0.5
        assert float(grad.abs().max()) < 3 * float(scale), kind


# -------------------------------------------------------------------------------------------------------------- chains
@every_kind
def test_chains(double: None, kind: str) -> None:
    policy, obs = make(kind), torch.randn(4, OBS)
    noise = policy.draw_noise(obs, generator=torch.Generator().manual_seed(0))
    chain = policy.sample_chain(obs, noise=noise)
    assert chain.shape == (4, policy.num_steps + 1, ACT)
    torch.testing.assert_close(policy.finished(chain[:, -1]), policy.sample(obs, noise=noise))
    start, rest = (noise[:, 0], noise[:, 1:]) if policy.stochastic else (noise, None)
    assert torch.equal(chain[:, 0], start)
    # from the middle on it is the same chain: what a partly frozen or warm-started sampler relies on
    middle = policy.path(obs, chain[:, 2], None if rest is None else rest[:, 2:], first=2)
    torch.testing.assert_close(torch.stack(middle, 1), chain[:, 2:])
    assert len(policy.path(obs, chain[:, 0], last=2)) == 3


@pytest.mark.parametrize("kind", ["floor", "noisy flow"])
def test_densities_of_a_chain_are_those_of_its_noise(double: None, kind: str) -> None:
    policy, obs = make(kind), torch.randn(4, OBS)
    noise = policy.draw_noise(obs, generator=torch.Generator().manual_seed(0))
    chain = policy.sample_chain(obs, noise=noise)
    logp = policy.chain_log_prob(obs, chain)
    expected = (-0.5 * noise[:, 1:].square() - policy.std.log()[:, None] - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(logp, expected)
    each = policy.chain_log_prob(obs, chain, reduce=False)
    assert each.shape == (4, policy.num_steps, ACT)
    torch.testing.assert_close(each.sum(-1), logp)
    # the same, pair by pair, in any order of (row, step)
    row, k = torch.tensor([3, 0, 2]), torch.tensor([1, 3, 0])
    pairs = policy.transition(obs[row], chain[row, k], k).log_prob(chain[row, k + 1])
    torch.testing.assert_close(pairs, logp[row, k])
    batch = policy.sample_chain(obs, 3, generator=torch.Generator().manual_seed(1))
    assert policy.chain_log_prob(obs, batch).shape == (4, 3, policy.num_steps)


@every_kind
def test_a_density_is_claimed_only_where_every_step_has_one(kind: str) -> None:
    policy = make(kind)
    has = kind in ("floor", "noisy flow")
    assert ("chain_log_prob" in policy.can) == has
    if not has:
        chain = policy.sample_chain(torch.randn(2, OBS))
        with pytest.raises(TypeError, match="needs a policy with chain_log_prob"):
            policy.chain_log_prob(torch.randn(2, OBS), chain)
    assert ("chain_log_prob" in make("floor", clip=1.0, clip_at="step").can) is False


def test_floor_under_the_noise_holds_in_sampling_and_density() -> None:
    policy = make("floor", min_std=0.25)
    assert float(policy.std.min()) == 0.25
    assert float(policy.std.max()) > 0.25
    assert float(make("floor", min_std=0.0).std[-1]) == 0


def test_one_step_diffusion_with_a_floor_is_a_gaussian_policy(double: None) -> None:
    """T = K = 1: the mean is the denoised estimate of the start, the std the floor."""
    policy = make("floor", schedule="vp", steps=1, min_std=0.3)
    obs, x = torch.randn(4, OBS), torch.randn(4, ACT)
    pi = policy.transition(obs, x, 0)
    ab = policy.alpha_bar[1]
    one = torch.ones((), dtype=torch.int64)
    torch.testing.assert_close(pi.mean, (x - (1 - ab).sqrt() * policy.field(obs, x, one)) / ab.sqrt())
    torch.testing.assert_close(pi.log_std.exp(), torch.full((4, ACT), 0.3))


def test_clipping(double: None) -> None:
    """Of the denoised estimate, of every state, of a flow's end; gradients pass where nothing is clipped."""
    far = torch.tensor([3.0, -0.5])
    for kind, changes in (("ddpm", {}), ("beta", {}), ("euler", {}), ("euler", {"clip_at": "step"})):
        policy = exact(kind, far, 0.0, **changes)
        obs = torch.zeros(20, OBS)
        chain = policy.sample_chain(obs, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(policy.finished(chain[:, -1]), torch.tensor([1.0, -0.5]).expand(20, ACT))
        inside = float(chain[:, 1:].abs().max()) <= 1
        assert inside == policy.clip_states
    x = torch.tensor([[0.5, 5.0]], requires_grad=True)
    ddpm = make("ddpm")
    (g,) = torch.autograd.grad(ddpm.finished(x).sum(), x)
    assert g.tolist() == [[1.0, 0.0]]


# ------------------------------------------------------------------------------------------------------------ networks
NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: FieldMLP(OBS, ACT, (16, 16)),
    "raw": lambda: FieldMLP(OBS, ACT, (16,), "gelu", "raw", xavier=True),
    "resnet": lambda: FieldResNet(OBS, ACT, width=16, blocks=2),
}


@pytest.mark.parametrize("name", NETS)
def test_fields_meet_many_actions_per_observation(double: None, name: str) -> None:
    net = NETS[name]()
    obs, x = torch.randn(4, OBS), torch.randn(4, 5, ACT)
    together = net(obs, x, torch.tensor(0.3))
    assert together.shape == (4, 5, ACT)
    torch.testing.assert_close(net(obs, x[:, 2], torch.full((4,), 0.3)), together[:, 2])
    t = torch.rand(4, 5)
    torch.testing.assert_close(net(obs, x, t)[:, 1], net(obs, x[:, 1], t[:, 1]))
    assert not torch.allclose(net(obs, x, torch.tensor(0.9)), together)  # time is read
    assert not torch.allclose(net(obs + 1, x, torch.tensor(0.3)), together)


def test_a_custom_network_may_take_the_place_of_the_mlp() -> None:
    net = FieldResNet(OBS, ACT, width=16, blocks=1)
    policy = DiffusionPolicy(OBS, ACT, net=net)
    assert policy.net is net
    assert policy.sample(torch.randn(3, OBS)).shape == (3, ACT)


# ------------------------------------------------------------------------------------------------- interchangeability
ANY: dict[str, Callable[[], Policy]] = {
    "gaussian": lambda: GaussianPolicy(OBS, ACT, (8,)),
    "squashed": lambda: TanhGaussianPolicy(OBS, ACT, (8,)),
    "diffusion": lambda: DiffusionPolicy(OBS, ACT, (8,)),
    "flow": lambda: FlowPolicy(OBS, ACT, (8,)),
    "one step": lambda: OneStepPolicy(OBS, ACT, (8,)),
    "latent": lambda: latent(),
    "frozen latent": lambda: latent(frozen=True),
}


def latent(*, frozen: bool = False) -> LatentDecoderPolicy:
    """Codes of a Gaussian, decoded by a flow; `frozen`: a prior that does not learn, and raw actions."""
    encoder = GaussianPolicy(OBS, ACT, (8,)).requires_grad_(not frozen)
    return LatentDecoderPolicy(encoder, FlowPolicy(OBS, ACT, (8,), clip=None), squash=not frozen)


@pytest.mark.parametrize("name", ANY)
def test_one_piece_of_code_serves_every_policy(name: str) -> None:
    torch.manual_seed(0)
    policy = ANY[name]()
    require(policy, "sample", "mode", "decode", "reparam", by="a test")
    obs, g = torch.randn(4, OBS), torch.Generator().manual_seed(0)
    assert policy(obs).sample(generator=g).shape == policy(obs).mode.shape == (4, ACT)
    assert policy.sample(obs, 7, generator=g).shape == (4, 7, ACT)
    assert policy.candidates(obs, 7, generator=g).shape == (4, 7, ACT)
    assert policy.noise_shape is not None
    noise = torch.randn(4, 7, *policy.noise_shape)
    torch.testing.assert_close(policy.sample(obs, noise=noise)[:, 3], policy.sample(obs, noise=noise[:, 3]))
    assert policy.decode(obs, torch.randn(4, ACT)).requires_grad
    if "matching_loss" in policy.can:
        loss = policy.matching_loss(obs, torch.rand(4, ACT) - 0.5, generator=g)
        assert loss.shape == (4,)
        assert loss.requires_grad
    assert ("matching_loss" in policy.can) == (name not in {"one step", "latent"})


def test_gaussian_matching_loss_is_the_negative_log_likelihood(double: None) -> None:
    policy, obs, action = GaussianPolicy(OBS, ACT, (8,)), torch.randn(4, OBS), torch.randn(4, ACT)
    torch.testing.assert_close(policy.matching_loss(obs, action), -policy(obs).log_prob(action))
    noise = torch.randn(4, ACT)
    torch.testing.assert_close(policy.decode(obs, noise), policy(obs).mean + policy.log_std.exp() * noise)
    point = DeterministicPolicy(OBS, ACT, (8,))
    torch.testing.assert_close(point.matching_loss(obs, action), (point(obs) - action).square().mean(-1))


def test_unknown_words_are_refused() -> None:
    """None of them falls back to another choice."""
    for name, value in (("prediction", "epsilon"), ("variance", "b"), ("sampler", "euler"), ("clip_at", "end")):
        with pytest.raises(ValueError, match=f"{name}='{value}' is not allowed: "):
            DiffusionPolicy(OBS, ACT, (8,), **{name: value})  # type: ignore[arg-type]
    for name, value in (("method", "heun"), ("clip_at", "x0")):
        with pytest.raises(ValueError, match=f"{name}='{value}' is not allowed: "):
            FlowPolicy(OBS, ACT, (8,), **{name: value})  # type: ignore[arg-type]
    for name, number in (("eta", -1.0), ("eta", 2.0), ("min_std", -0.1)):
        with pytest.raises(ValueError, match=f"{name}={number}"):
            DiffusionPolicy(OBS, ACT, (8,), **{name: number})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least 0, got -0\.1"):
        FlowPolicy(OBS, ACT, (8,), noise_std=-0.1)


def test_the_missing_capability_is_named() -> None:
    with pytest.raises(TypeError, match="DPPO needs a policy with chain_log_prob; FlowPolicy offers"):
        require(FlowPolicy(OBS, ACT, (8,)), "sample", "chain_log_prob", by="DPPO")
    with pytest.raises(TypeError, match="PPO needs a policy with log_prob; DiffusionPolicy offers"):
        require(DiffusionPolicy(OBS, ACT, (8,)), "log_prob", by="PPO")
    with pytest.raises(TypeError, match="a decoder of codes needs a policy with decode; DeterministicPolicy"):
        LatentDecoderPolicy(GaussianPolicy(OBS, ACT, (8,)), DeterministicPolicy(OBS, ACT, (8,)))
    with pytest.raises(TypeError, match="a cloner needs a policy with matching_loss; LatentDecoderPolicy offers"):
        require(latent(), "matching_loss", by="a cloner")
    assert "matching_loss" in latent(frozen=True).can
    squashed = LatentDecoderPolicy(GaussianPolicy(OBS, ACT, (8,)).requires_grad_(False), FlowPolicy(OBS, ACT, (8,)))
    assert "matching_loss" not in squashed.can  # what it matches are raw actions, not those that are given
    with pytest.raises(TypeError, match="an encoder of codes needs a policy with log_prob; FlowPolicy"):
        LatentDecoderPolicy(FlowPolicy(OBS, ACT, (8,)), FlowPolicy(OBS, ACT, (8,)))


# --------------------------------------------------------------------------------------------------------------- codes
def test_an_identity_decoder_gives_the_encoder_back(double: None) -> None:
    encoder = GaussianPolicy(OBS, ACT, (8,))
    policy = LatentDecoderPolicy(encoder, FlowPolicy(OBS, ACT, (8,), clip=None).identity_())
    obs, noise = torch.randn(4, OBS), torch.randn(4, ACT)
    assert torch.equal(policy.sample(obs, noise=noise), encoder(obs).sample(noise).tanh())
    assert torch.equal(policy.mode(obs), encoder(obs).mode.tanh())
    code = encoder(obs).sample(noise)
    assert torch.equal(policy.raw_action(obs, code), code)
    assert torch.equal(policy.latent_log_prob(obs, code), encoder(obs).log_prob(code))
    plain = LatentDecoderPolicy(encoder, FlowPolicy(OBS, ACT, (8,), clip=None).identity_(), squash=False)
    assert torch.equal(plain.sample(obs, noise=noise), code)


def test_each_part_of_a_latent_policy_has_its_own_statistics_and_gradients(double: None) -> None:
    class Shift(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, obs: Tensor) -> Tensor:
            return obs + self.by

    encoder, decoder = GaussianPolicy(OBS, ACT, (8,)), FlowPolicy(OBS, ACT, (8,), clip=None)
    policy = LatentDecoderPolicy(encoder, decoder, encoder_norm=Shift(1.0), decoder_norm=Shift(-2.0))
    obs, noise = torch.randn(4, OBS), torch.randn(4, ACT)
    code = encoder(obs + 1).sample(noise)
    torch.testing.assert_close(policy.sample(obs, noise=noise), decoder.decode(obs - 2, code).tanh())
    # the refit's noise comes from the fixed prior: the encoder has no part in it
    loss = policy.matching_loss(obs, torch.randn(4, ACT), generator=torch.Generator().manual_seed(0)).mean()
    grads = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    of = dict(zip([n for n, _ in policy.named_parameters()], grads, strict=True))
    assert all((g is None) == n.startswith("encoder") for n, g in of.items())
    # the density's gradient reaches the encoder alone
    grads = torch.autograd.grad(
        policy.latent_log_prob(obs, code.detach()).sum(), list(policy.parameters()), allow_unused=True
    )
    of = dict(zip([n for n, _ in policy.named_parameters()], grads, strict=True))
    assert all((g is None) == n.startswith("decoder") for n, g in of.items())


def test_field_net_gives_what_its_kind_asks_and_refuses_blocks_of_several_widths() -> None:
    blocks = field_net("resnet", "flow", 3, 2, (32, 32))
    assert isinstance(blocks, FieldResNet) and len(blocks.blocks) == 2
    for of, time in (("diffusion", "SinusoidalTime"), ("flow", "RawTime")):
        plain = field_net("mlp", of, 3, 2, (32, 16))  # type: ignore[arg-type]
        assert isinstance(plain, FieldMLP) and type(plain.time).__name__ == time
    with pytest.raises(ValueError, match=r"one width: the widths \(32, 16\)"):
        field_net("resnet", "diffusion", 3, 2, (32, 16))


# ------------------------------------------------------------------------------------------- losses weighted by a value
class Affine(nn.Module):
    """slope x + shift for each of a few times, whatever the observation."""

    def __init__(self, slope: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(slope), nn.Parameter(shift)

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        # rows are laid out [actions, noises, times]
        return self.slope[:, None] * x + self.shift[:, None]


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_weighted_matching_has_the_regularised_optimum_for_its_fixed_point(double: None, kind: str) -> None:
    """Data N(m, s^2), weights exp(Q / tau), Q = -(a - c)^2 / (2 l): the loss is least at the field of the Gaussian with
    mean (m / s^2 + c / (tau l)) / (1 / s^2 + 1 / (tau l)) and variance 1 / (1 / s^2 + 1 / (tau l)), and not at the
    data's own. Expectations are sums on grids, times a few.
    """
    m, s, c, l, tau = -0.3, 0.5, 0.4, 0.2, 0.7  # noqa: E741
    precision = 1 / s**2 + 1 / (tau * l)
    optimum = ((m / s**2 + c / (tau * l)) / precision, precision**-0.5)
    diffusion = DiffusionPolicy(1, 1, (8,), clip=None)
    policy = diffusion if kind == "diffusion" else FlowPolicy(1, 1, (8,), clip=None)
    times = torch.arange(1, 6) if kind == "diffusion" else torch.tensor([0.0, 0.25, 0.5, 0.9])

    def oracle(mean: float, std: float) -> Affine:
        if kind == "flow":
            slope = (times * std**2 - (1 - times)) / ((1 - times).square() + times.square() * std**2)
            return Affine(slope, mean * (1 - slope * times))
        ab = diffusion.alpha_bar[times]
        slope = (1 - ab).sqrt() / (ab * std**2 + 1 - ab)
        return Affine(slope, -slope * ab.sqrt() * mean)

    a, z = torch.linspace(m - 8 * s, m + 8 * s, 401), torch.linspace(-8, 8, 401)
    chance = (-(a - m).square() / (2 * s**2)).exp()[:, None] * (-z.square() / 2).exp()
    chance = (chance / chance.sum()).unsqueeze(-1)
    weight = (-(a - c).square() / (2 * l * tau)).exp()[:, None, None]
    shape = (len(a), len(z), len(times))
    action, noise = a[:, None, None, None].expand(*shape, 1), z[None, :, None, None].expand(*shape, 1)

    def slope_at(mean: float, std: float, weight: Tensor) -> float:
        policy.net = net = oracle(mean, std)
        loss = policy.matching_loss(torch.zeros(*shape, 1), action, noise, times.expand(shape))
        assert loss.shape == shape  # a loss of each sample: weights are whoever's that multiplies
        grads = torch.autograd.grad((chance * weight * loss).sum(), list(net.parameters()))
        return max(float(g.abs().max()) for g in grads)

    assert slope_at(*optimum, weight) < 1e-10
    assert slope_at(m, s, torch.ones(())) < 1e-10
    assert slope_at(m, s, weight) > 1e-2
