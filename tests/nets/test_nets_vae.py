"""The auto-encoder of actions: shapes, bounds, seams, and its KL by number."""

from __future__ import annotations

import pytest
import torch

from rlctl.nets.distributions import Normal
from rlctl.nets.vae import ActionVAE, prior_kl


def vae() -> ActionVAE:
    torch.manual_seed(0)
    return ActionVAE(3, 2, (8, 8))


def test_kl_by_number(double: None) -> None:
    """Mean, not sum, over the latent dimensions."""
    code = Normal(torch.tensor([0.5, -1.0]), torch.tensor([0.7, 1.2]).log())
    assert float(prior_kl(code)) == pytest.approx(0.3821766936, abs=1e-9)
    assert prior_kl(Normal(code.mean.expand(5, 2), code.log_std.expand(5, 2))).shape == (5,)


def test_kl_is_zero_at_the_prior_alone(double: None) -> None:
    zero = torch.zeros(4)
    assert float(prior_kl(Normal(zero, zero))) == 0.0
    for mean, log_std in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        moved = Normal(zero + torch.tensor([mean, 0, 0, 0]), zero + torch.tensor([0, log_std, 0, 0]))
        assert float(prior_kl(moved)) > 1e-6


def test_shapes_and_bounds() -> None:
    net, obs, action = vae(), torch.randn(5, 3), torch.rand(5, 2) * 2 - 1
    code = net.encode(obs, action)
    assert net.latent_dim == 4  # twice the actions
    assert code.mean.shape == code.log_std.shape == (5, 4)
    assert ActionVAE(3, 2, (8,), latent_dim=3).encode(obs, action).mean.shape == (5, 3)
    assert float(net.decode(obs, 1e6 * code.mean).detach().abs().max()) <= 1.0
    for p in net.encoder[-1].parameters():
        p.data.fill_(1e3)
    assert float(net.encode(obs, action).log_std.detach().max()) == 15.0
    net.encoder[-1].weight.data.zero_()
    net.encoder[-1].bias.data.fill_(-1e3)
    assert float(net.encode(obs, action).log_std.detach().min()) == -4.0


def test_a_reconstruction_is_the_decoded_draw() -> None:
    net, obs, action, noise = vae(), torch.randn(5, 3), torch.rand(5, 2) * 2 - 1, torch.randn(5, 4)
    rec, code = net(obs, action, noise)
    assert torch.equal(rec, net.decode(obs, code.mean + code.log_std.exp() * noise))
    assert rec.shape == (5, 2)
    drawn = [net(obs, action, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_draw_is_reparameterised() -> None:
    net, obs, noise = vae(), torch.randn(5, 3), torch.randn(5, 4)
    action = (torch.rand(5, 2) * 2 - 1).requires_grad_()
    rec, _ = net(obs, action, noise)
    grads = torch.autograd.grad(rec.sum(), [action, *net.parameters()])
    assert all(bool((g != 0).any()) for g in grads)


def test_it_can_learn_to_reconstruct() -> None:
    net, g = vae(), torch.Generator().manual_seed(3)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    obs = torch.randn(64, 3, generator=g)
    action = torch.stack([obs[:, 0].tanh(), -0.5 * torch.ones(64)], -1)
    errors = []
    for _ in range(150):
        rec, code = net(obs, action, generator=g)
        error = (rec - action).square().mean()
        opt.zero_grad()
        (error + 1e-3 * prior_kl(code).mean()).backward()
        opt.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.1 * errors[0]
