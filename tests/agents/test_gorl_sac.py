"""GoRL on SAC: what it is without a decoder; who moves in which phase; where stages begin; resuming."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions
from interrupted_runs import StopAt, assert_resumes_anywhere
from torch import Tensor, nn

from rlctl import agents
from rlctl.agents.decoder_stages import Recent, refit
from rlctl.agents.gorl_sac import GoRLSAC, GoRLSACConfig, train_gorl_sac
from rlctl.agents.sac import SAC
from rlctl.data.ring import Ring
from rlctl.errors import Interrupted, UsageError
from rlctl.nets import TanhNormal
from rlctl.run import Run, RunConfig
from rlctl.train import Job
from rlctl.types import Batch, Metrics, Spec
from rlctl_envs.probes import make_probe


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a second write many files, and are read back through the same kernel."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


both_decoders = pytest.mark.parametrize("decoder", ["flow", "diffusion"])


def gorl_sac(**overrides: Any) -> GoRLSAC:
    agent = tiny("gorl-sac", **overrides)
    assert isinstance(agent, GoRLSAC)
    return agent


def gathered(agent: GoRLSAC, n: int, raw: Tensor | None = None) -> Recent:
    """What the agent does in made-up states, or given raw actions."""
    ring = Ring(n, seed=1)
    b = transitions(torch.Generator().manual_seed(5), n)
    with agent.borrowed_rng(0), torch.no_grad():
        action, extra = agent.act(b.obs, explore=True)
    ring.add(b._replace(action=action, extra=extra if raw is None else {"raw_action": raw}))
    return Recent(ring, n)


def fit(agent: GoRLSAC, rows: Recent, steps: int, batch_size: int = 64) -> list[Metrics]:
    return [refit(agent, rows, rows.sample(batch_size)) for _ in range(steps)]


def later(decoder: str = "flow", **overrides: Any) -> GoRLSAC:
    """An agent in stage 1, under a decoder that is not the identity."""
    agent = gorl_sac(decoder=decoder, decoder_updates=60, decoder_lr=1e-2, **overrides)
    fit(agent, gathered(agent, 400), 60)
    agent.begin(1)
    return agent


# ------------------------------------------------------------------------------------------------------- reductions
SIGNS = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]))
"""Noise of two dimensions with the exact mean and variance: of a quadratic in it, its average is the expectation."""


class Given(nn.Module):
    """A policy whose draws are those of given noise, whatever generator they are asked of."""

    def __init__(self, policy: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.policy, self.noise = policy, noise

    def forward(self, obs: Tensor) -> Given:
        self.pi: TanhNormal = self.policy(obs)
        return self

    def sample_log_prob(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.pi.sample_log_prob(self.noise)


class WithPrior(nn.Module):
    """Q_j(s, a) + alpha log p(a), p the density of tanh(N(0, I))."""

    def __init__(self, q: nn.Module, alpha: float) -> None:
        super().__init__()
        self.q, self.alpha = q, alpha

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        prior = TanhNormal(torch.zeros_like(action), torch.zeros_like(action))
        values: Tensor = self.q(obs, action)
        return values + self.alpha * prior.log_prob(action, eps=1e-12)


def test_without_a_decoder_it_is_sac_whose_values_know_the_prior(double: None) -> None:
    """Actor, backup and temperature of our SAC, with alpha log p(a) added to Q and target_entropy = -target_kl."""
    agent = gorl_sac(alpha=0.3, target_kl=1.5)
    sac = agents.make("sac", Spec(3, 2), tiny("sac", alpha=0.3, target_entropy=-1.5).cfg)
    assert isinstance(sac, SAC)
    one = transitions(torch.Generator().manual_seed(0), 6)
    b = one.map(lambda x: x.repeat_interleave(4, 0))
    b = b.map(lambda x: x.double() if x.is_floating_point() else x)
    noise = SIGNS.double().repeat(6, 1)
    sac.pi = Given(agent.pi, noise)  # type: ignore[assignment]
    sac.q, sac.q_lagged = WithPrior(agent.q, 0.3), WithPrior(agent.q_lagged, 0.3)  # type: ignore[assignment]
    ours, kl = agent.actor_loss(b, noise)
    theirs, logp = sac.actor_loss(b)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for x, y in zip(*[torch.autograd.grad(f, list(agent.pi.parameters())) for f in (ours, theirs)], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
        assert float(x.abs().max()) > 1e-4
    # the loss of a constant critic is quadratic in the backup, its slope linear: averages over the noise agree
    slopes = []
    for loss_of in (lambda: agent.critic_loss(b, noise), lambda: sac.critic_loss(b)):
        level = torch.zeros((), requires_grad=True)
        agent.q = sac.q = Table(level.expand(2, 24))  # type: ignore[assignment]
        slopes.append(torch.autograd.grad(loss_of(), level)[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-9)
    prior = TanhNormal(torch.zeros(24, 2), torch.zeros(24, 2))
    with torch.no_grad():
        action, _ = agent.drawn(b.obs, noise)
    divergence = logp - prior.log_prob(action, eps=1e-12)
    torch.testing.assert_close(agent.alpha_loss(kl), sac.alpha_loss(divergence), rtol=0, atol=1e-9)


class OfCode(nn.Module):
    """Q_j = -|e - c|^2 / (2 l), e the raw action."""

    def __init__(self, c: float, length: float) -> None:
        super().__init__()
        self.c, self.length = c, length

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return (-(action.atanh() - self.c).square().sum(-1) / (2 * self.length)).expand(2, -1)


def test_the_optimum_of_a_bandit(double: None) -> None:
    """Q = -(e - c)^2 / (2 l) of the code itself: e* = c / (1 + alpha l), sigma^2 = alpha l / (1 + alpha l)."""
    alpha, c, length = 0.4, 0.7, 0.5
    agent = gorl_sac(alpha=alpha)
    best = c / (1 + alpha * length), 0.5 * math.log(alpha * length / (1 + alpha * length))
    out = torch.tensor([best[0]] * 2 + [best[1]] * 2, requires_grad=True)
    agent.pi.net = Table(out.expand(4, 4))  # type: ignore[assignment]
    agent.q = OfCode(c, length)  # type: ignore[assignment]
    loss, _ = agent.actor_loss(transitions(torch.Generator().manual_seed(0), 4), SIGNS.double())
    assert float(torch.autograd.grad(loss, out)[0].abs().max()) < 1e-12


def test_critic_loss_by_hand(double: None) -> None:
    """KL of N(0.5, 2^2) in one dimension and the prior in the other: (0.25 + 4 - 1)/2 - log 2; y = [r + 0.9 ...]."""
    agent = gorl_sac(alpha=0.5, gamma=0.9)
    agent.pi.net = Table(torch.tensor([0.5, 0.0, math.log(2.0), 0.0]).expand(3, 4))  # type: ignore[assignment]
    lagged = Table(torch.tensor([[1.0, 5.0, -3.0], [2.0, 4.0, 7.0]]))
    agent.q_lagged = lagged  # type: ignore[assignment]
    q = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]])
    agent.q = Table(q)  # type: ignore[assignment]
    b = transitions(torch.Generator().manual_seed(0), 3)._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([True, False, False]),
    )
    noise = torch.randn(3, 2)
    kl = (0.25 + 4 - 1) / 2 - math.log(2.0)
    backup = torch.tensor([1 + 0.9 * (1 - 0.5 * kl), 2.0, 3 + 0.9 * (-3 - 0.5 * kl)])
    expected = (q - backup).square().mean(1).sum()
    assert float(agent.critic_loss(b, noise)) == pytest.approx(float(expected), abs=1e-7)
    action = (torch.tensor([0.5, 0.0]) + torch.tensor([2.0, 1.0]) * noise).tanh()
    torch.testing.assert_close(lagged.seen[0][1], action, rtol=0, atol=1e-6)


def test_the_weight_of_the_kl_holds_it_at_its_target() -> None:
    agent = gorl_sac()
    assert agent.target_kl == 2.0
    for kl, sign in ((torch.tensor([1.0, 2.0]), 1), (torch.tensor([2.0, 4.0]), -1)):
        (slope,) = torch.autograd.grad(agent.alpha_loss(kl), agent.log_alpha)
        assert float(slope) * sign > 0  # descending, the weight falls while codes are nearer than that


# -------------------------------------------------------------------------------------------------------------- phases
@both_decoders
def test_phase_1_moves_encoder_and_critics_alone(decoder: str) -> None:
    agent = later(decoder)
    b = batch_for(agent)
    assert not torch.allclose(b.extra["raw_action"].tanh(), b.action)
    raw = agent.raw_action(b.obs, torch.ones(32, 2))
    assert not torch.allclose(raw, torch.ones(32, 2), atol=0.1)
    before = snapshot(agent)
    agent.update(b)
    assert {k.split(".")[0] for k in differing(agent, before)} == {"pi", "q", "q_lagged", "log_alpha"}
    assert not any(p.requires_grad for p in agent.decoders.acting.parameters())


def test_the_encoder_learns_through_the_decoder(double: None) -> None:
    """dL/dmean of the codes is -dQ/da times the decoder's Jacobian (by differences), when the KL weighs nothing."""
    agent = later(alpha=1e-12)
    obs, noise, eps = torch.randn(1, 3), torch.zeros(1, 2), 1e-5
    head = torch.tensor([[0.3, -0.4, -1.0, -0.5]], requires_grad=True)
    agent.pi.net = Table(head)  # type: ignore[assignment]
    b = transitions(torch.Generator().manual_seed(0), 1)._replace(obs=obs)
    (slope,) = torch.autograd.grad(agent.actor_loss(b, noise)[0], head)
    with torch.no_grad():

        def value(code: Tensor) -> float:
            return float(agent.q(obs, agent.raw_action(obs, code).tanh()).amin())

        for i in range(2):
            step = torch.zeros(1, 2)
            step[0, i] = eps
            mean = head[:, :2].detach()
            known = -(value(mean + step) - value(mean - step)) / (2 * eps)
            assert float(slope[0, i]) == pytest.approx(known, rel=1e-4, abs=1e-8)


def test_phase_2_moves_the_next_decoder_alone_and_sees_no_encoder() -> None:
    """Noise comes from the prior: whatever encoder made the actions, the loss on them is the same."""
    losses = []
    for shift in (0.0, 1.0):
        agent = gorl_sac(decoder_updates=4)
        rows = gathered(agent, 200)
        for p in agent.pi.parameters():
            p.data.add_(shift)
        before = snapshot(agent)
        losses.append(torch.stack([m["losses/decoder"] for m in fit(agent, rows, 4)]))
        moved = {k.removeprefix("decoders.").split(".")[0] for k in differing(agent, before)}
        assert moved == {"next", "next_norm", "best", "best_loss"}
    assert torch.equal(*losses)


def test_a_stage_keeps_what_it_knows_of_actions() -> None:
    agent = gorl_sac(decoder_updates=20)
    for seed in range(3):
        agent.update(batch_for(agent, seed))
    fit(agent, gathered(agent, 200), 20)
    best, before = snapshot(agent.decoders.best), snapshot(agent)
    steps_of = {name: len(opt.state) for name, opt in agent.optimizers().items()}
    agent.begin(1)
    assert {k.split(".")[0] for k in differing(agent, before)} == {"pi", "decoders"}
    assert differing(agent.decoders.acting.net, best) == []
    assert bool(agent.decoders.acting.fitted)
    assert {name: len(opt.state) for name, opt in agent.optimizers().items()} == steps_of | {"opt_pi": 0}
    held = {id(p) for g in agent.opt_pi.param_groups for p in g["params"]}
    assert held == {id(p) for p in agent.pi.parameters()}
    assert not any(torch.equal(before[k], v) for k, v in agent.state_dict().items() if k.startswith("pi.net"))
    again = snapshot(agent)
    agent.begin(1)  # as a resumed run does
    assert differing(agent, again) == []


def test_a_random_action_is_the_tanh_of_the_raw_one_it_stores() -> None:
    action, extra = gorl_sac().random_act(torch.zeros(1000, 3))
    assert extra.keys() == gorl_sac().act(torch.zeros(1, 3), explore=True)[1].keys()
    torch.testing.assert_close(extra["raw_action"].tanh(), action)
    assert float(action.abs().max()) < 1
    assert float(action.abs().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
def test_four_modes() -> None:
    """Under a decoder of actions with four modes, which N(0, I) covers, the encoder picks the one that is paid."""
    net = {"decoder_hidden": (64, 64), "decoder_steps": 6, "decoder_lr": 3e-3, "decoder_updates": 500}
    sizes = {"hidden": (64, 64), "actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05}
    agent = gorl_sac(**net, **sizes, alpha=0.02, learn_alpha=False, gamma=0.0)
    modes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    g = torch.Generator().manual_seed(0)
    rows = gathered(
        agent, 4000, modes[torch.randint(4, (4000,), generator=g)] + 0.1 * torch.randn(4000, 2, generator=g)
    )
    rows.ring.rows.obs.zero_()
    fit(agent, rows, 500, 256)
    agent.begin(1)

    def act(n: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        with torch.no_grad():
            action, extra = agent.act(torch.zeros(n, 3), explore=True)
        return action, extra, (extra["raw_action"].unsqueeze(-2) - modes).norm(dim=-1).argmin(-1)

    covered = act(2000)[2].bincount(minlength=4) / 2000
    assert 0.1 < float(covered.min()) <= float(covered.max()) < 0.45
    no = torch.zeros(64, dtype=torch.bool)
    ring = Ring(20_000)
    for _ in range(300):
        action, extra, mode = act(64)
        obs = torch.zeros(64, 3)
        ring.add(Batch(obs, action, (mode == 1).float(), obs, ~no, no, extra))
        agent.update(ring.sample(64))
    assert float((act(2000)[2] == 1).float().mean()) > 0.9


# --------------------------------------------------------------------------------------------------------- whole runs
def small_run(run: Run, **changes: Any) -> GoRLSAC:
    """Three stages of 40 steps in two worlds of the probe `time-limit`, whose state takes long to forget."""
    options: dict[str, Any] = {"num_envs": 2, "batch_size": 8, "hidden": (8,), "learning_starts": 20}
    options |= {"decoder_hidden": (8, 8), "decoder_steps": 3, "decoder_updates": 12, "decoder_batch_size": 16}
    options |= {"steps": 120, "stage_weights": (1.0, 1.0, 1.0), "recent_steps": 100, "buffer_size": 100}
    cfg = GoRLSACConfig(**(options | changes))
    env = make_probe("time-limit", 2, seed=1)
    agent = agents.make("gorl-sac", Spec(env.obs_dim, env.act_dim, 2, seed=4), cfg)
    assert isinstance(agent, GoRLSAC)
    train_gorl_sac(Job(agent, env, None, run, cfg, 4))
    run.finish(agent)
    return agent


def test_a_run_takes_the_steps_it_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    monkeypatch.setattr(Run, "plan", lambda self, total: planned.append(total))
    run = Run()
    agent = small_run(run)
    assert (run.env_steps, run.updates) == (120, 100 + 2 * 12)
    assert planned == [run.progress] == [120 + 2 * 12]
    assert (agent.counters["stage"], agent.counters["updates"], agent.counters["env_steps"]) == (2, 100, 120)
    assert bool(agent.decoders.acting.fitted)


def test_resumed_anywhere_equals_never_stopped(tmp_path: Path) -> None:
    """Within each kind of phase, and at every boundary between two; the replay has begun anew by the last."""
    ends = [40, 52, 104]  # of the first stage, the first refit, the second
    assert_resumes_anywhere(small_run, tmp_path, (30, *ends, 46, 130))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the first of 3 stages takes 40 steps and learning starts after 40"):
        small_run(Run(), learning_starts=40)
    small_run(Run(), learning_starts=110, steps=120, stage_weights=(1.0,))  # no decoder, no complaint
    run = StopAt(tmp_path / "run", RunConfig(tensorboard=False))
    run.stop_at = 100
    with pytest.raises(Interrupted):
        small_run(run)
    run.close()
    again = Run(tmp_path / "run", RunConfig(tensorboard=False), resume=True)
    with pytest.raises(UsageError, match="begun with 120 steps"):
        small_run(again, steps=240)
    again.close()
