"""Perceptrons, policies, critics: shapes, initialisation, clamps, independence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlctl.nets import (
    DeterministicPolicy,
    GaussianPolicy,
    MixturePolicy,
    Normal,
    Policy,
    QEnsemble,
    TanhGaussianPolicy,
    TanhMixturePolicy,
    TanhNormal,
    ValueNet,
    VEnsemble,
    mlp,
    require,
)
from rlctl.nets.mlp import ACTIVATIONS, Linear


def linears(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


# --------------------------------------------------------------------------------------------------------------- mlp
def test_mlp_layers() -> None:
    net = mlp(3, 2, (5, 4), "elu", layer_norm=True)
    assert [(m.in_features, m.out_features) for m in linears(net)] == [(3, 5), (5, 4), (4, 2)]
    kinds = [type(m).__name__ for m in net]
    assert kinds == ["Linear", "LayerNorm", "ELU", "Linear", "LayerNorm", "ELU", "Linear"]
    assert mlp(3, 2, ())(torch.zeros(7, 3)).shape == (7, 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    net, x = mlp(3, 2, (5,), activation), torch.randn(4, 6, 3)  # type: ignore[arg-type]
    first, last = linears(net)
    hidden = ACTIVATIONS[activation]()(x @ first.weight.T + first.bias)
    torch.testing.assert_close(net(x), hidden @ last.weight.T + last.bias)


def test_orthogonal_initialisation() -> None:
    """Gain sqrt(2) in hidden layers, the given gain in the last, zero biases."""
    torch.manual_seed(0)
    for layer, gain in zip(linears(mlp(6, 3, (8, 8), "tanh", orthogonal=0.01)), (2**0.5, 2**0.5, 0.01), strict=True):
        w = layer.weight.detach()
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=1e-5, atol=1e-5 * gain**2)
        assert not bool(layer.bias.any())


def test_default_initialisation_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours = mlp(6, 3, (8, 8))
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------- policies
def test_gaussian_policy() -> None:
    pi = GaussianPolicy(3, 2, (5,), log_std=-0.5)
    dist = pi(torch.randn(4, 3))
    assert isinstance(dist, Normal)
    assert dist.mean.shape == (4, 2)
    assert pi.log_std.shape == (2,)
    assert pi.log_std.tolist() == [-0.5, -0.5]
    assert float(dist.mean.detach().abs().max()) < 0.1  # the last layer starts at gain 0.01
    assert pi.log_std.requires_grad


def with_output(policy: nn.Module, values: list[float]) -> None:
    """Make the last layer constant."""
    last = linears(policy)[-1]
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(values)


@pytest.mark.parametrize(("raw", "expected"), [(100.0, 2.0), (-100.0, -20.0), (2.5, 2.0), (1.9, 1.9), (-3.0, -3.0)])
def test_squashed_policy_clamps_log_std(raw: float, expected: float) -> None:
    pi = TanhGaussianPolicy(3, 2, (5,))
    with_output(pi, [0.3, -0.7, raw, -1.0])
    dist = pi(torch.randn(4, 3))
    assert isinstance(dist, TanhNormal)
    torch.testing.assert_close(dist.mean, torch.tensor([0.3, -0.7]).expand(4, 2))
    torch.testing.assert_close(dist.log_std, torch.tensor([expected, -1.0]).expand(4, 2))
    (grad,) = torch.autograd.grad(dist.log_std.sum(), linears(pi)[-1].bias)
    assert grad.tolist() == [0.0, 0.0, 4.0 if raw == expected else 0.0, 4.0]


def test_squashed_policy_reads_the_state_for_both_heads() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        dist = TanhGaussianPolicy(3, 2, (16,))(torch.randn(5, 3))
    assert float(dist.mean.std(0).min()) > 0
    assert float(dist.log_std.std(0).min()) > 0


def test_deterministic_policy() -> None:
    pi = DeterministicPolicy(3, 2, (5,))
    with_output(pi, [0.5, -30.0])
    action = pi(torch.randn(2, 6, 3))
    assert action.shape == (2, 6, 2)
    torch.testing.assert_close(action, torch.tensor([0.5, -30.0]).tanh().expand(2, 6, 2))


POLICIES = [GaussianPolicy, TanhGaussianPolicy, MixturePolicy, TanhMixturePolicy, DeterministicPolicy]


@pytest.mark.parametrize("cls", POLICIES)
def test_policies_can_do_what_they_declare(cls: type[Policy]) -> None:
    torch.manual_seed(0)
    out = cls(3, 2, (5,))(torch.randn(4, 3))  # type: ignore[call-arg]
    assert ("mode" in cls.can) != ("deterministic" in cls.can)
    action = out.mode if "mode" in cls.can else out
    assert action.shape == (4, 2)
    if "sample" in cls.can:
        assert out.sample().shape == (4, 2)
        assert out.sample().requires_grad == ("reparam" in cls.can)
    if "log_prob" in cls.can:
        assert out.log_prob(0.5 * torch.ones(4, 2)).shape == (4,)
    if "kl" in cls.can:
        torch.testing.assert_close(out.kl(out), torch.zeros(4))
    else:
        assert not hasattr(out, "kl")
    if "components" in cls.can:
        torch.testing.assert_close(out.weights.sum(-1), torch.ones(4))
        assert out.components.mode.shape == (4, out.num, 2)
    else:
        assert not hasattr(out, "components")
    if "entropy" in cls.can:
        assert bool(out.entropy().isfinite().all())
    else:
        assert not hasattr(out, "entropy")


def test_require_names_what_is_missing() -> None:
    require(GaussianPolicy(3, 2, (5,)), "log_prob", "kl", by="TRPO")
    with pytest.raises(TypeError, match=r"TRPO needs a policy with log_prob, kl; Determ.*offers deterministic"):
        require(DeterministicPolicy(3, 2, (5,)), "log_prob", "kl", by="TRPO")
    with pytest.raises(TypeError, match="X needs a policy with mode; Policy offers nothing"):
        require(Policy(), "mode", by="X")


# ----------------------------------------------------------------------------------------------------------- critics
def test_value_net_shapes() -> None:
    v = ValueNet(3, (5,))
    for lead in ((), (4,), (4, 6)):
        assert v(torch.randn(*lead, 3)).shape == lead


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("num", [1, 2, 10])
def test_q_ensemble_shapes(num: int, layer_norm: bool) -> None:
    q = QEnsemble(3, 2, (5, 4), num, layer_norm=layer_norm)
    for lead in ((), (4,), (4, 6)):
        assert q(torch.randn(*lead, 3), torch.randn(*lead, 2)).shape == (num, *lead)


def test_q_ensemble_of_many_actions_per_state_equals_one_at_a_time() -> None:
    torch.manual_seed(0)
    q = QEnsemble(3, 2, (8, 8))
    obs, actions = torch.randn(4, 3), torch.randn(4, 6, 2)
    together = q(obs[:, None].expand(4, 6, 3), actions)
    for k in range(6):
        torch.testing.assert_close(together[:, :, k], q(obs, actions[:, k]))


def members(q: QEnsemble, activation: type[nn.Module]) -> list[nn.Sequential]:
    """The same ensemble (without layer norm) as ordinary networks of torch's own layers."""
    out = []
    for member in q.members:
        layers: list[nn.Module] = []
        linears = [m for m in member.modules() if isinstance(m, Linear)]
        for m in linears:
            layer = nn.Linear(m.in_features, m.out_features)
            layer.weight.data, layer.bias.data = m.weight.data.clone(), m.bias.data.clone()
            layers += [layer, activation()]
        out.append(nn.Sequential(*layers[:-1]))
    return out


@pytest.mark.parametrize("activation", ["relu", "elu"])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_q_ensemble_equals_separate_networks(num: int, activation: str) -> None:
    torch.manual_seed(0)
    q = QEnsemble(3, 2, (8, 7), num, activation)  # type: ignore[arg-type]
    obs, action = torch.randn(9, 3), torch.randn(9, 2, requires_grad=True)
    values = q(obs, action)
    nets = members(q, {"relu": nn.ReLU, "elu": nn.ELU}[activation])
    separate = torch.stack([net(torch.cat([obs, action], -1)).squeeze(-1) for net in nets])
    torch.testing.assert_close(values, separate)
    (a,) = torch.autograd.grad(values.square().sum(), action)
    (b,) = torch.autograd.grad(separate.square().sum(), action)
    torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(q(obs, action).square().sum(), list(q.parameters()))
    theirs = [
        g
        for net in nets
        for g in torch.autograd.grad(net(torch.cat([obs, action], -1)).square().sum(), list(net.parameters()))
    ]
    for g, h in zip(grads, theirs, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_members_of_an_ensemble_share_nothing(layer_norm: bool) -> None:
    """The loss of one member moves no number that another member's value depends on."""
    torch.manual_seed(0)
    q = QEnsemble(3, 2, (8, 8), 3, layer_norm=layer_norm)
    obs, action = torch.randn(9, 3), torch.randn(9, 2)
    before = q(obs, action).detach()
    opt = torch.optim.SGD(q.parameters(), lr=0.1)
    q(obs, action)[1].square().sum().backward()
    opt.step()
    after = q(obs, action).detach()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_the_members_start_apart_and_like_ordinary_layers() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 128)
    bound = 64**-0.5
    for p in (layer.weight, layer.bias):
        assert float(p.detach().abs().max()) <= bound
        assert float(p.detach().abs().max()) > 0.9 * bound
    assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    q = QEnsemble(16, 8, (32, 32), 4)
    for layers in zip(*[linears(m) for m in q.members], strict=True):
        rows = torch.stack([torch.cat([x.weight.flatten(), x.bias]) for x in layers]).detach()
        apart = torch.corrcoef(rows) - torch.eye(4)
        assert float(apart.abs().max()) < 0.6
    values = QEnsemble(3, 2, (16,), 4)(torch.randn(5, 3), torch.randn(5, 2)).detach()
    assert float(values.std(0).min()) > 0


def test_large_layers_take_the_faster_product_with_the_same_result() -> None:
    torch.manual_seed(0)
    q = QEnsemble(10, 6, (256, 256))
    obs, action = torch.randn(256, 10), torch.randn(256, 6)
    double = QEnsemble(10, 6, (256, 256)).double()
    double.load_state_dict(q.state_dict())
    torch.testing.assert_close(q(obs, action).double(), double(obs.double(), action.double()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- of offline learners
def test_small_last_layer() -> None:
    """Hidden biases 0.1, all of the last layer within the bound, hidden weights as ever."""
    torch.manual_seed(0)
    net = mlp(6, 40, (8, 8), small_last=3e-3)
    *hidden, last = linears(net)
    assert all(bool((m.bias == torch.tensor(0.1)).all()) for m in hidden)
    for p in (last.weight, last.bias):
        assert float(p.detach().abs().max()) <= 3e-3
        assert float(p.detach().abs().max()) > 2e-3
    assert float(hidden[1].weight.detach().abs().max()) > 0.3  # uniform within 1 / sqrt(8)


def test_dropout_silences_units_of_the_hidden_layers(double: None) -> None:
    torch.manual_seed(0)
    net = mlp(3, 2, (400,))
    x = torch.randn(1, 3).expand(300, 3)
    g = torch.Generator().manual_seed(0)
    out = net.dropped(x, 0.25, g)
    kept = torch.rand(300, 400, generator=torch.Generator().manual_seed(0)) >= 0.25
    hidden = linears(net)[0](x).relu() * kept / 0.75
    torch.testing.assert_close(out, linears(net)[1](hidden))
    torch.testing.assert_close(out.mean(0), net(x)[0], rtol=0.02, atol=0.02)  # right in expectation
    assert not torch.equal(net.dropped(x, 0.25, g), out)
    assert torch.equal(net.dropped(x, 0.0, g), net(x))


def test_dropout_happens_where_it_is_asked_for_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    for policy in (GaussianPolicy(3, 2, (32,), dropout=0.5), DeterministicPolicy(3, 2, (32,), dropout=0.5)):
        policy.train()
        calm, again, dropped = policy(x), policy(x), policy(x, drop=torch.Generator())
        if isinstance(policy, GaussianPolicy):
            calm, again, dropped = calm.mean, again.mean, dropped.mean
        assert torch.equal(calm, again)
        assert not torch.equal(calm, dropped)
    plain = GaussianPolicy(3, 2, (32,))
    assert torch.equal(plain(x, drop=torch.Generator()).mean, plain(x).mean)


def test_gaussian_with_a_mean_in_the_box_and_a_bounded_spread(double: None) -> None:
    """mean tanh(0.4), std 1: the density at 0.9 is that of a plain Gaussian, without a Jacobian."""
    policy = GaussianPolicy(1, 1, (), tanh_mean=True, log_std_bounds=(-5.0, 2.0))
    (layer,) = linears(policy)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 0.4)
    pi = policy(torch.zeros(1, 1))
    assert float(pi.log_prob(torch.tensor([[0.9]])).detach()) == pytest.approx(-1.0541650741, abs=1e-9)
    for free, held in ((-9.0, -5.0), (-1.0, -1.0), (7.0, 2.0)):
        nn.init.constant_(policy.log_std, free)
        assert float(policy(torch.zeros(1, 1)).log_std.detach()) == held
        assert float(policy.summary()["policy/std"]) == pytest.approx(math.exp(held))


def test_log_std_bounds_of_the_squashed_policy() -> None:
    torch.manual_seed(0)
    narrow = TanhGaussianPolicy(3, 2, (8,), log_std_bounds=(-5.0, 2.0), small_last=1e-3)
    for bias, held in ((-30.0, -5.0), (9.0, 2.0)):
        nn.init.constant_(linears(narrow)[-1].bias, bias)
        assert narrow(torch.randn(4, 3)).log_std.detach().unique().tolist() == [held]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_action_gradients_of_an_ensemble(double: None, layer_norm: bool) -> None:
    """Values and slopes of each member by itself, and a second derivative that reaches its weights."""
    torch.manual_seed(0)
    q = QEnsemble(3, 2, (16, 16), 4, layer_norm=layer_norm)
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    with torch.no_grad():  # it makes the graph it needs
        values, slopes = q.with_action_gradient(obs, action)
    torch.testing.assert_close(values, q(obs, action))
    assert slopes.shape == (4, 5, 2)
    for e, member in enumerate(q.members):
        a = action.clone().requires_grad_()
        (g,) = torch.autograd.grad(member(torch.cat([obs, a], -1)).sum(), a)
        torch.testing.assert_close(slopes[e], g)
    first, eps, ends = next(q.members[0].parameters()), 1e-6, []
    (g,) = torch.autograd.grad(slopes[0, 2, 1], first, retain_graph=True)
    index = divmod(int(g.abs().argmax()), g.shape[1])
    for shift in (eps, -2 * eps, eps):
        first.data[index] += shift
        ends.append(float(q.with_action_gradient(obs, action)[1][0, 2, 1].detach()))
    assert float(g[index]) == pytest.approx((ends[0] - ends[1]) / (2 * eps), abs=1e-7)
    assert float(g[index]) != 0


def test_gaussian_policy_with_bounds(double: None) -> None:
    """mean = tanh(0.4), std 1, a = 0.9: log-density -1.0541650741, without a Jacobian; a clamped log-std."""
    policy = GaussianPolicy(3, 1, (), "relu", tanh_mean=True, log_std_bounds=(-5.0, 2.0))
    for p in policy.mean.parameters():
        p.data.zero_()
    policy.mean[-1].bias.data.fill_(0.4)
    obs, action = torch.zeros(1, 3), torch.tensor([[0.9]])
    assert float(policy(obs).log_prob(action).detach()) == pytest.approx(-1.0541650741, abs=1e-9)
    for raw, bounded in ((-9.0, -5.0), (9.0, 2.0), (0.3, 0.3)):
        policy.log_std.data.fill_(raw)
        assert float(policy(obs).log_std.detach()) == pytest.approx(bounded)
        assert float(policy.summary()["policy/std"]) == pytest.approx(math.exp(bounded))


def test_v_ensemble_equals_separate_networks() -> None:
    torch.manual_seed(0)
    values, obs = VEnsemble(3, (8,), num=3, layer_norm=True), torch.randn(4, 5, 3)
    out = values(obs)
    assert out.shape == (3, 4, 5)
    for member, one in zip(values.members, out, strict=True):
        torch.testing.assert_close(member(obs)[..., 0], one)
    assert not torch.allclose(out[0], out[1])
    assert any(isinstance(m, nn.LayerNorm) for m in values.modules())
