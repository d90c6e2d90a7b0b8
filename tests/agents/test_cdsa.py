"""CDSA: the denoising objective against closed forms, the corrections by hand, base policies left as they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_helpers import ACT_DIM, OBS_DIM, as_dataset, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor

from rlctl import agents, experiment
from rlctl.agents.cdsa import CDSA, CDSAConfig
from rlctl.config import build
from rlctl.errors import UsageError
from rlctl.types import Batch, Spec

BASES = ["td3bc", "iql", "bc", "sac", "ppo"]


def cdsa(**overrides: Any) -> CDSA:
    agent = tiny("cdsa", **overrides)
    assert isinstance(agent, CDSA)
    return agent


# ----------------------------------------------------------------------------------------------------- the objective
class Linear(torch.nn.Module):
    """S(x, sigma) = -k x, whatever sigma."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(k))

    def forward(self, x: Tensor) -> Tensor:
        return -self.k * x[:, :-1]


def test_score_loss_by_hand(double: None) -> None:
    """x = 1, z = 2, sigma 0.5: x~ = 2, S = -0.8 * 2, sigma S + z = 1.2; squared 1.44 in each of five dimensions."""
    agent = cdsa()
    agent.pair_score = Linear(0.8)  # type: ignore[assignment]
    x, noise = torch.ones(3, 5), torch.full((3, 5), 2.0)
    assert float(agent.score_loss(x, torch.full((3,), 0.5), noise).detach()) == pytest.approx(5 * 1.44)


def test_the_objective_s_minimum_is_the_smoothed_score(double: None) -> None:
    """Data N(0, 1) smoothed by 0.5: the score at x is -x / 1.25, so -0.8 at 1."""
    agent = cdsa()
    agent.pair_score = net = Linear(0.0)  # type: ignore[assignment]
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(200_000, 5, generator=g) for _ in range(2))
    sigma = torch.full((200_000,), 0.5)
    with torch.no_grad():
        losses = []
        for k in (0.7, 0.8, 0.9):
            net.k.fill_(k)
            losses.append(float(agent.score_loss(x, sigma, noise)))
    # a parabola in k: its vertex
    a, b, c = losses
    assert 0.8 + 0.1 * (a - c) / (2 * (a - 2 * b + c)) == pytest.approx(0.8, abs=0.005)


def test_noise_levels_are_log_uniform() -> None:
    agent = cdsa(sigma_min=0.01, sigma_max=1.0)
    seen: list[Tensor] = []
    agent.score = lambda x, sigma: (seen.append(sigma), torch.zeros_like(x))[1]  # type: ignore[method-assign]
    agent.score_loss(torch.zeros(20_000, 5))
    u = (seen[0].log() - math.log(0.01)) / math.log(100)
    assert 0 <= float(u.min()) < 0.001
    assert 0.999 < float(u.max()) <= 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(u.var()) == pytest.approx(1 / 12, abs=0.003)


def gaussian_rows(n: int) -> tuple[Batch, Tensor, Tensor]:
    """Pairs (s, a) ~ N(mean, cov), s' = s + B a: rows, mean, cov."""
    g = torch.Generator().manual_seed(1)
    width = OBS_DIM + ACT_DIM
    root = torch.randn(width, width, generator=g) / 4 + 0.2 * torch.eye(width)
    mean = 0.2 * torch.randn(width, generator=g)
    x = mean + torch.randn(n, width, generator=g) @ root.T
    obs, action = x.split([OBS_DIM, ACT_DIM], -1)
    move = torch.randn(ACT_DIM, OBS_DIM, generator=g)
    rows = transitions(g, n)._replace(obs=obs, action=action, next_obs=obs + action @ move)
    return rows._replace(terminated=torch.zeros(n, dtype=torch.bool)), mean, root @ root.T


@pytest.fixture(scope="module")
def fitted() -> tuple[CDSA, Batch, Tensor, Tensor]:
    """Trained on a Gaussian; with what its score must be, in z-scored coordinates."""
    rows, mean, cov = gaussian_rows(20_000)
    cfg = CDSAConfig(hidden=(32, 32), inverse_hidden=(32,), score_lr=5e-3, inverse_lr=5e-3)
    agent = agents.make(CDSA, Spec(OBS_DIM, ACT_DIM), cfg)
    assert isinstance(agent, CDSA)
    agent.wrap(tiny("td3bc"))
    agent.prepare(as_dataset(rows))
    g = torch.Generator().manual_seed(2)
    for _ in range(1000):
        index = torch.randint(20_000, (256,), generator=g)
        agent.update(rows.map(lambda x: x.index_select(0, index)))  # noqa: B023 - called at once
    scale = agent.pair_norm.std + agent.pair_norm.eps
    return agent, rows, (mean - agent.pair_norm.mean) / scale, cov / scale.outer(scale)


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_the_learned_score_is_that_of_a_gaussian(fitted: tuple[CDSA, Batch, Tensor, Tensor], sigma: float) -> None:
    """-(Sigma + sigma^2)^-1 (x - mu): direction, size, 0 at the mode; a step along it raises the density."""
    agent, rows, mean, cov = fitted
    x = agent.pair_norm(torch.cat([rows.obs, rows.action], -1))[:500]
    x = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    smooth = cov + sigma**2 * torch.eye(len(mean))
    true = -torch.linalg.solve(smooth, (x - mean).T).T
    level = torch.full((500,), sigma)
    with torch.no_grad():
        got = agent.score(x, level)
        at_mode = agent.score(mean[None], level[:1])
    assert float(torch.cosine_similarity(got, true, -1).mean()) > 0.95
    assert float((got - true).norm() / true.norm()) < 0.25
    assert float(at_mode.norm()) < 0.3 * float(true.norm(dim=-1).mean())
    density = torch.distributions.MultivariateNormal(mean, smooth).log_prob
    up = density(x + 0.5 * sigma**2 * got) - density(x)
    assert float((up > 0).float().mean()) > 0.95


def test_the_inverse_model_knows_linear_dynamics(fitted: tuple[CDSA, Batch, Tensor, Tensor]) -> None:
    agent, rows, _, _ = fitted
    s, following = ((x[:500] - agent.pair_norm.mean[:OBS_DIM]) / (agent.pair_norm.std + 1e-3)[:OBS_DIM]
                    for x in (rows.obs, rows.next_obs))  # fmt: skip
    with torch.no_grad():
        got = agent.inverse(torch.cat([s, following], -1))
    assert float((got - rows.action[:500]).norm() / rows.action[:500].norm()) < 0.1


def test_off_data_actions_are_moved_to_the_data(fitted: tuple[CDSA, Batch, Tensor, Tensor]) -> None:
    """Actions pushed away from the conditional mean given s come nearer to it."""
    agent, rows, _, _ = fitted
    agent_only = cdsa(hidden=(32, 32), inverse_hidden=(32,), action_step=0.5)
    agent_only.load_state_dict(agent.state_dict())
    g = torch.Generator().manual_seed(4)
    away = rows.action[:300] + torch.randn(300, ACT_DIM, generator=g)
    away = away.clamp(-1, 1)
    moved = agent_only.corrected(rows.obs[:300], away)
    before, after = ((x - rows.action[:300]).square().sum(-1).mean() for x in (away, moved))
    assert float(after) < 0.9 * float(before)


# ---------------------------------------------------------------------------------------------------- the correction
def test_correction_by_hand(double: None) -> None:
    """S = -x: a goes by -k_a sigma^2 z_a std_a; s^ = (1 - share sigma^2) s; I(s, s') = sum(s' - s) in each action."""
    agent = cdsa(action_step=0.5, state_step=2.0, state_share=0.5, sigma=0.4)
    agent.pair_score = Linear(1.0)  # type: ignore[assignment]

    class Sum(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s, following = x.split(OBS_DIM, -1)
            return (following - s).sum(-1, keepdim=True).expand(-1, ACT_DIM)

    agent.inverse = Sum()  # type: ignore[assignment]
    agent.pair_norm.mean.copy_(torch.arange(5.0))
    agent.pair_norm.std.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) - 1e-3)
    obs, action = torch.tensor([[1.0, 3.0, -1.0]]), torch.tensor([[0.2, 0.9]])
    s, a = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([-0.7, -0.62])
    known = 0.5 * 0.16 * -a * torch.tensor([4.0, 5.0]) + 2.0 * (-0.5 * 0.16 * s.sum())
    torch.testing.assert_close(agent.correction(obs, action, 0.4)[0], known)
    torch.testing.assert_close(agent.corrected(obs, action)[0], (action[0] + known).clamp(-1, 1))


def test_noise_levels_of_the_steps() -> None:
    assert cdsa(score_steps=0).levels() == []
    assert cdsa(score_steps=3, sigma=0.5).levels() == [0.5] * 3
    assert cdsa(score_steps=3, sigma=0.4, sigma_min=0.1, anneal=True).levels() == pytest.approx([0.4, 0.2, 0.1])
    with pytest.raises(ValueError, match="outside of what the score learns"):
        cdsa(sigma=2.0)


@pytest.mark.parametrize(("anneal", "left"), [(False, 0.84**3), (True, 0.84 * 0.96 * 0.99)])
def test_each_step_goes_by_its_own_noise_level(double: None, anneal: bool, left: float) -> None:
    """S = -x and all of the way: a step at level sigma leaves 1 - sigma^2 of the action; levels 0.4, 0.2, 0.1."""
    agent = cdsa(action_step=1.0, score_steps=3, sigma=0.4, sigma_min=0.1, anneal=anneal)
    agent.pair_score = Linear(1.0)  # type: ignore[assignment]
    agent.pair_norm.mean.zero_()
    agent.pair_norm.std.fill_(1 - 1e-3)
    action = torch.tensor([[0.5, -0.8]])
    torch.testing.assert_close(agent.corrected(torch.zeros(1, OBS_DIM), action), left * action)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("zero", [{"score_steps": 0}, {"action_step": 0.0, "state_step": 0.0}])
def test_without_steps_it_is_its_base_agent_bit_for_bit(base: str, zero: dict[str, Any]) -> None:
    """Deterministic and drawn actions, those of an evaluation's borrowed generators included."""
    plain, other = tiny(base), tiny(base)
    agent = agents.make(CDSA, Spec(OBS_DIM, ACT_DIM, plain.spec.num_envs), CDSAConfig(**zero))
    assert isinstance(agent, CDSA)
    agent.wrap(other)
    obs = 2 * torch.randn(4, OBS_DIM, generator=torch.Generator().manual_seed(0))
    for explore in (False, True, True):
        assert torch.equal(agent.act(obs, explore)[0], plain.act(obs, explore)[0])
    with agent.borrowed_rng(5), plain.borrowed_rng(5):
        assert torch.equal(agent.act(obs, True)[0], plain.act(obs, True)[0])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("separate", [False, True])
def test_it_works_on_any_base_and_never_moves_it(base: str, separate: bool) -> None:
    settings = {"state_step": 0.2, "score_steps": 2, "separate_state_score": separate, "hidden": (16,)}
    agent = agents.make(CDSA, Spec(OBS_DIM, ACT_DIM, 4), CDSAConfig(**settings))
    assert isinstance(agent, CDSA)
    agent.wrap(tiny(base)).prepare(as_dataset(transitions(torch.Generator().manual_seed(1), 200)))
    before = snapshot(agent)
    for seed in range(3):
        agent.update(batch_for(agent, seed))
    moved = {k.split(".")[0] for k in differing(agent, before)}
    assert moved == {"pair_score", "inverse", *(["state_score"] if separate else [])}
    obs = torch.randn(6, OBS_DIM)
    action, extra = agent.act(obs, explore=False)
    assert extra == {}
    assert float(action.abs().max()) <= 1
    assert agent.base is not None
    assert not torch.equal(action, agent.base.act(obs, explore=False)[0])


def test_terminated_rows_teach_the_inverse_model_nothing() -> None:
    agent = cdsa()
    batch = batch_for(agent)
    losses = [
        agent.inverse_loss(batch._replace(next_obs=torch.where(batch.terminated[:, None], x, batch.next_obs)))
        for x in (batch.next_obs, 1e3 * torch.ones(32, OBS_DIM))
    ]
    assert bool(batch.terminated.any())
    assert torch.equal(*losses)


def test_a_base_is_needed_and_has_to_fit(tmp_path: Path) -> None:
    agent = agents.make(CDSA, Spec(OBS_DIM, ACT_DIM), CDSAConfig(hidden=(8,)))
    assert isinstance(agent, CDSA)
    data = as_dataset(transitions(torch.Generator(), 10))
    for use in (lambda: agent.prepare(data), lambda: agent.act(torch.zeros(1, OBS_DIM), False)):
        with pytest.raises(UsageError, match="--set base=RUN_DIR"):
            use()
    with pytest.raises(ValueError, match="the two are not the same"):
        agents.make(CDSA, Spec(OBS_DIM + 1, ACT_DIM), CDSAConfig(hidden=(8,))).wrap(tiny("td3bc"))
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UsageError, match=f"no run in {folder}, of the agent whose actions"):
            agents.make(CDSA, Spec(OBS_DIM, ACT_DIM), CDSAConfig(base=str(folder)))


def test_the_base_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert build(CDSAConfig, {"base": "runs/x"}, "the config").base == str(tmp_path / "runs/x")
    assert build(CDSAConfig, {}, "the config").base == ""


@pytest.mark.parametrize("which", [20, "20", "step_20", "best"])
def test_a_checkpoint_is_named_as_everywhere(which: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(experiment, "load_named", lambda base, at, *a: (asked.append(at), (tiny("bc"), None))[1])
    cfg = build(CDSAConfig, {"base": "runs/x", "checkpoint": which}, "the config")
    agents.make(CDSA, Spec(OBS_DIM, ACT_DIM), cfg)
    assert asked == [str(which)]
