"""Diffusion BC and flow BC: the loss, the slow copy; and the bandit of four modes that tells policies apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agent_helpers import batch_for, differing, recorded_inputs, snapshot, tiny
from torch import Tensor, nn

from rlctl import agents
from rlctl.agents.diffusion_bc import DiffusionBC
from rlctl.agents.diffusion_ql import DiffusionQL
from rlctl.agents.expo import EXPO
from rlctl.agents.idql import IDQL
from rlctl.agents.pa_rl import PARL
from rlctl.nets import (
    DiffusionPolicy,
    FlowPolicy,
    GaussianPolicy,
    GenerativePolicy,
    LatentDecoderPolicy,
    MixturePolicy,
    OneStepPolicy,
    Policy,
    TanhGaussianPolicy,
)
from rlctl.types import Agent, Batch, Spec

both = pytest.mark.parametrize("name", ["diffusion-bc", "flow-bc"])


def cloner(name: str, **overrides: Any) -> DiffusionBC:
    agent = tiny(name, **overrides)
    assert isinstance(agent, DiffusionBC)
    return agent


@both
def test_the_loss_is_the_matching_loss_of_the_policy_that_learns(name: str) -> None:
    agent = cloner(name)
    b = batch_for(agent)
    fast, slow = recorded_inputs(agent.pi.policy.net), recorded_inputs(agent.pi.slow.net)  # type: ignore[arg-type]
    noise, time = agent.pi.policy.draw_pairs(b.action)  # type: ignore[operator]
    loss = agent.actor_loss(b, noise, time)
    torch.testing.assert_close(loss, agent.pi.policy.matching_loss(b.obs, b.action, noise, time).mean())
    assert fast
    assert not slow
    agent.act(b.obs, explore=True)
    assert len(fast) == 2
    assert len(slow) == agent.pi.slow.num_steps


@pytest.mark.parametrize(
    ("name", "settings"),
    [("flow-bc", {}), *[("diffusion-bc", {"prediction": p}) for p in ("eps", "x0", "v")]],
)
def test_one_constant_action_is_learned(name: str, settings: dict[str, Any]) -> None:
    agent = cloner(name, actor_lr=3e-3, ema_start=300, hidden=(64, 64), **settings)
    b = batch_for(agent)._replace(action=torch.tensor([0.3, -0.7]).expand(32, 2))
    for _ in range(600):
        agent.update(b)
    for explore in (True, False):
        assert float((agent.act(b.obs, explore)[0] - b.action).abs().mean().detach()) < 0.07


# ------------------------------------------------------------------------------------------------ what a policy lacks
POLICIES: dict[str, Callable[[], Policy]] = {
    "gaussian": lambda: GaussianPolicy(3, 2, (8,)),
    "squashed": lambda: TanhGaussianPolicy(3, 2, (8,)),
    "diffusion": lambda: DiffusionPolicy(3, 2, (8,)),
    "flow": lambda: FlowPolicy(3, 2, (8,)),
    # the decoder learns; codes are drawn by an encoder that does not
    "latent": lambda: latent(frozen=True),
}
# where the agent's policy is made
WHERE = {DiffusionBC: "make_policy", IDQL: "make_policy", DiffusionQL: "make_policy", EXPO: "make_base"}
WHERE |= {PARL: "make_base"}


def latent(*, frozen: bool) -> LatentDecoderPolicy:
    encoder = GaussianPolicy(3, 2, (8,)).requires_grad_(not frozen)
    return LatentDecoderPolicy(encoder, FlowPolicy(3, 2, (8,), clip=None), squash=False)


def variant(base: type[Agent], make: Callable[[], Policy]) -> type[Agent]:
    return type("Variant", (base,), {WHERE[base]: lambda self: make()})


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("base", WHERE)
def test_the_same_learner_takes_any_policy_that_can_what_it_needs(base: type[Agent], kind: str) -> None:
    cls = variant(base, POLICIES[kind])
    small = {"hidden": (8,), "critic_hidden": (8,), "num_candidates": 3, "policy_every": 1, "num_actions": 3}
    small |= {"num_kept": 2, "bc_share": 0.0, "distill_offline": True, "cql_weight": 0.0}
    known = {k: v for k, v in small.items() if k in base.Config.__dataclass_fields__}
    agent = agents.make(cls, Spec(3, 2), base.Config(**known))
    b = batch_for(agent)
    before = snapshot(agent)
    metrics = agent.update(b)
    assert differing(agent, before)
    assert all(bool(x.isfinite()) for x in metrics.values())
    for explore in (True, False):
        action = agent.act(b.obs, explore)[0]
        assert action.shape == (32, 2)
        if base in (EXPO, PARL):  # others leave the bound to the policy
            assert float(action.abs().max()) <= 1


@pytest.mark.parametrize("base", WHERE)
def test_a_policy_that_lacks_something_is_refused_at_construction(base: type[Agent]) -> None:
    """Codes that are to be learned as well: the matching loss has no gradient in their encoder."""
    for make, kind in (
        (lambda: OneStepPolicy(3, 2, (8,)), "OneStepPolicy"),
        (lambda: latent(frozen=False), "LatentDecoderPolicy"),
    ):
        with pytest.raises(TypeError, match=f"(Variant|EXPO|PA-RL) needs a policy with matching_loss; {kind} offers"):
            agents.make(variant(base, make), Spec(3, 2))


def test_a_gradient_through_draws_is_refused_where_there_is_none() -> None:
    cls = type("Variant", (DiffusionQL,), {"make_policy": lambda self: MixturePolicy(3, 2, (8,))})
    with pytest.raises(TypeError, match="Variant needs a policy with reparam; MixturePolicy offers"):
        agents.make(cls, Spec(3, 2))


# ----------------------------------------------------------------------------------------------------------- four modes
CENTRES = torch.tensor([[0.8, 0.8], [0.8, -0.8], [-0.8, 0.8], [-0.8, -0.8]])
BANDIT: dict[str, dict[str, Any]] = {
    "bc": {"head": "gaussian"},
    "diffusion-bc": {"hidden": (128, 128, 128), "diffusion_steps": 10},
    "flow-bc": {"hidden": (64, 64), "flow_steps": 10},
    "diffusion-ql": {"hidden": (64, 64), "eta": 5.0, "temperature": 0.1, "num_candidates": 10, "tau": 0.05}
    | {"diffusion_steps": 4},
    "fql": {"hidden": (64, 64), "alpha": 0.05, "tau": 0.05, "lr": 2e-3},
    "idql": {"width": 32, "blocks": 1, "critic_hidden": (64, 64), "tau": 0.05},
    # the policy imitates what the search has found; search and temperature for values in [0, 1]
    "pa-rl": {"bc_share": 300 / 1_000_000, "distill_offline": True, "base": "flow", "base_steps": 6, "base_net": "mlp"}
    | {"base_hidden": (64, 64), "num_candidates": 4, "num_kept": 2, "num_critics": 2, "hidden": (64, 64), "tau": 0.05}
    | {"base_lr": 2e-3, "distill_lr": 2e-3, "search_steps": 3, "search_size": 0.05, "temperature": 0.1}
    | {"cql_weight": 0.0},
    "ifql": {"hidden": (64, 64), "critic_hidden": (64, 64), "tau": 0.05, "layer_norm": False},
}


OBS = {"fql": 1.0}
"""What is seen of the one state, if not 0: of an input of zeros, under biases of zero, FQL's layer norms see zeros too,
and its critics begin with a kink in the middle of the actions."""


def bandit(g: torch.Generator, n: int) -> Batch:
    """Actions at four places with equal chance, the first of which is paid; one step."""
    mode = torch.randint(0, 4, (n,), generator=g)
    action = CENTRES[mode] + 0.05 * torch.randn(n, 2, generator=g)
    no = torch.zeros(n, dtype=torch.bool)
    return Batch(torch.zeros(n, 1), action.clamp(-1, 1), (mode == 0).float(), torch.zeros(n, 1), ~no, no)


def trained(name: str, updates: int, batch_size: int = 256) -> Agent:
    cls = agents.get(name).Config
    known = {"actor_lr": 2e-3, "critic_lr": 2e-3, "v_lr": 2e-3, "ema_start": updates // 2, "ema_decay": 0.98}
    settings = {k: v for k, v in known.items() if k in cls.__dataclass_fields__} | BANDIT[name]
    agent = agents.make(name, Spec(1, 2), cls(**settings))
    g = torch.Generator().manual_seed(0)
    for _ in range(updates):
        b = bandit(g, batch_size)
        agent.update(b._replace(obs=b.obs + OBS.get(name, 0.0), next_obs=b.next_obs + OBS.get(name, 0.0)))
    return agent


def shares(agent: Agent, obs: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of 2000 stochastic actions: the share within 0.35 of each mode, and their mean."""
    with torch.no_grad():
        action = agent.act(torch.full((2000, 1), obs), explore=True)[0]
    near = (action[:, None] - CENTRES).norm(dim=-1) < 0.35
    return near.float().mean(0), action.mean(0)


class FourModes(nn.Module):
    """The perfect network of a diffusion (eps) or flow whose data are Gaussians of std 0.05 at `CENTRES`."""

    def __init__(self, policy: GenerativePolicy) -> None:
        super().__init__()
        self.alpha_bar = policy.alpha_bar if isinstance(policy, DiffusionPolicy) else None

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        # x = scale a + width noise; given x and the mode, the action's mean is a step from the centre
        ab = None if self.alpha_bar is None else self.alpha_bar[t]
        scale, width = (t, 1 - t) if ab is None else (ab.sqrt(), (1 - ab).sqrt())
        off = x.unsqueeze(-2) - scale * CENTRES
        var = (0.05 * scale).square() + width.square()
        weight = (-off.square().sum(-1) / (2 * var)).softmax(-1)
        action = (weight.unsqueeze(-1) * (CENTRES + 0.05**2 * scale * off / var)).sum(-2)
        noise = (x - scale * action) / width
        return action - noise if ab is None else noise


PARL_VP = {"schedule": "vp", "variance": "posterior", "clip_at": "x0", "base_steps": 10}


@pytest.mark.parametrize(
    ("name", "settings", "known"),
    [
        ("diffusion-bc", {}, 0.96),
        ("flow-bc", {}, 1.0),
        ("idql", {}, 0.94),
        ("ifql", {}, 1.0),
        ("expo", {}, 0.94),
        ("expo", {"base": "flow", "base_steps": 6}, 0.97),
        ("pa-rl", PARL_VP, 0.96),
        ("diffusion-bc", {"diffusion_steps": 20}, 1.0),
        # what is said of fewer steps
        ("diffusion-ql", {}, 0.63),
        ("diffusion-bc", {"diffusion_steps": 5}, 0.63),
        ("idql", {"diffusion_steps": 5}, 0.69),
        ("pa-rl", {}, 0.85),
    ],
)
def test_how_well_samplers_keep_to_the_modes(name: str, settings: dict[str, Any], known: float) -> None:
    """The share of draws near a mode when the network is perfect: what the sampler alone loses by having few steps."""
    agent = agents.make(name, Spec(1, 2), agents.get(name).Config(**settings))
    policy = next(m for m in agent.modules() if isinstance(m, GenerativePolicy))
    policy.net = FourModes(policy)  # type: ignore[assignment]
    with torch.no_grad():
        draws = policy.sample(torch.zeros(8000, 1), generator=torch.Generator().manual_seed(0))
    share = ((draws[:, None] - CENTRES).norm(dim=-1) < 0.35).float().mean(0)
    assert float(share.sum()) == pytest.approx(known, abs=0.015)
    assert float(share.min()) > 0.9 * float(share.mean())


@both
def test_generative_cloning_covers_every_mode(name: str) -> None:
    share, _ = shares(trained(name, 1400))
    assert float(share.min()) > 0.15
    assert float(share.max()) < 0.35
    assert float(share.sum()) > 0.75


def test_gaussian_cloning_collapses_to_the_middle() -> None:
    agent = trained("bc", 600)
    share, mean = shares(agent)
    assert float(mean.abs().max()) < 0.15
    assert float(agent.act(torch.zeros(1, 1), explore=False)[0].detach().abs().max()) < 0.25
    assert float(share.sum()) < 0.7


@pytest.mark.parametrize("name", ["diffusion-ql", "fql", "idql", "ifql", "pa-rl"])
def test_improvers_find_the_paid_mode(name: str) -> None:
    agent = trained(name, 600 if name == "pa-rl" else 500, 128)  # it clones first, then learns values
    share, _ = shares(agent, OBS.get(name, 0.0))
    assert float(share[0]) > 0.9
