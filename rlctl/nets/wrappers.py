"""Policies made of policies: the best of several draws, edited draws, slow copies, compositions, warm starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlctl.nets.generative import Conditioned, DiffusionPolicy, FlowPolicy, GenerativePolicy, Step
from rlctl.nets.policy import Policy, require
from rlctl.ops.optim import frozen_copy, polyak
from rlctl.ops.selection import best_of, drawn

Value = Callable[[Tensor, Tensor], Tensor]
"""Q(obs [..., O], actions [..., N, A]) -> [..., N]."""


class BestOfN(Policy):
    """Draws `num` actions of `policy` and takes the one `value` likes best (an `Edited` policy adds its edits).

    With `weigh`, a function of the values [..., N] that gives weights of that shape, a draw takes one in proportion to
    them instead. `mode` compares the actions of noise that was drawn once, at construction (the first is zero noise):
    it needs no random number, and the same for all states. `value` must be a function, not a module, so that the
    critic's weights stand in a checkpoint once; no gradient is taken.
    """

    bank: Tensor

    def __init__(self, policy: Policy, value: Value, num: int, weigh: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        require(policy, "sample", by="BestOfN")
        if isinstance(value, nn.Module):
            raise TypeError(f"the value is a function of (obs, actions), such as a method; got the module {value!r}")
        if num < 1:
            raise ValueError(f"the best of {num} actions is none: num is at least 1")
        self.policy, self.value, self.num, self.weigh = policy, value, num, weigh
        self.can = frozenset({"sample"})
        if policy.noise_shape is not None:
            self.can |= {"mode"}
            bank = torch.randn(num, *policy.noise_shape)
            self.register_buffer("bank", torch.cat([torch.zeros_like(bank[:1]), bank[1:]]))

    def forward(self, obs: Tensor) -> Conditioned:
        """The policy at `obs` [..., O]."""
        return Conditioned(self, obs)

    @torch.no_grad()
    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """The chosen action [..., A], with `num` [..., num, A] (each the best of its own `self.num`).

        `noise` is that of the candidates, [..., self.num, *noise_shape]; `uniform` [...] in [0, 1) picks with `weigh`.
        """
        if num is not None:
            obs = obs.unsqueeze(-2).expand(*obs.shape[:-1], num, obs.shape[-1])
        actions = self.policy.candidates(obs, self.num, noise, generator)
        values = self.value(obs, actions)
        if self.weigh is None:
            return best_of(actions, values)
        return drawn(actions, self.weigh(values), uniform, generator)

    @torch.no_grad()
    def mode(self, obs: Tensor) -> Tensor:
        """The best action [..., A] of the fixed noise."""
        require(self, "mode", by="a deterministic best of N")
        noise = self.bank.expand(*obs.shape[:-1], *self.bank.shape)
        actions = self.policy.candidates(obs, self.num, noise)
        return best_of(actions, self.value(obs, actions))


class Edited(Policy):
    """Base actions moved by a small learned edit: a = clip(a_b + beta u), u ~ edit(. | [s, a_b]) in (-1, 1)^A. Base
    actions are clipped to [-1, 1] too, before anything sees them.

    `edit` is a squashed policy that sees observation and base action side by side. As candidates of `BestOfN` it gives
    N base actions and the edits of the first `num_edits` of them (None: of all). Noise of a draw is the base's with one
    more row, [..., R + 1, A], the edit's last.
    Source: Dong et al. 2025, arXiv:2507.07986.
    """

    def __init__(self, policy: Policy, edit: Policy, beta: float, num_edits: int | None = None) -> None:
        super().__init__()
        require(policy, "sample", by="an edited policy's base")
        require(edit, "sample", "log_prob", by="an edit")
        if beta < 0:
            raise ValueError(f"beta is the size of an edit, at least 0, got {beta}")
        self.policy, self.edit, self.beta, self.num_edits = policy, edit, beta, num_edits
        self.can = frozenset({"sample"})
        if isinstance(policy, WarmStarted):
            raise TypeError("a warm start's noise is that of whole plans, an edit's of one action: edit its policy")
        if policy.noise_shape is not None and edit.noise_shape is not None:
            *rows, act_dim = policy.noise_shape
            self.noise_shape = (1 + (rows[0] if rows else 1), act_dim)
            self.can |= {"mode"}

    def forward(self, obs: Tensor) -> Conditioned:
        """The policy at `obs` [..., O]."""
        return Conditioned(self, obs)

    def edited(
        self, obs: Tensor, base: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """An edit of `base` [..., A], [..., A], and log pi(a | s, a_b) = log p(u) - A log beta, [...], before the clip.

        `base` is in the box. At beta 0 nothing is edited and the density is infinite. `obs` may have one dimension
        less than `base`.
        """
        for _ in range(base.dim() - obs.dim()):
            obs = obs.unsqueeze(-2)
        pi = self.edit(torch.cat([obs.expand(*base.shape[:-1], -1), base], -1))
        u, logp = pi.sample_log_prob(noise, generator)
        shift = base.shape[-1] * (math.log(self.beta) if self.beta else -math.inf)
        return (base + self.beta * u).clamp(-1, 1), logp - shift

    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Edited draws [..., A], with `num` [..., num, A]."""
        ours, theirs = self._split(noise)
        base = self.policy.sample(obs, num, theirs, generator).clamp(-1, 1)
        return self.edited(obs, base, ours, generator)[0]

    def mode(self, obs: Tensor) -> Tensor:
        """The edit's own mode at the base's."""
        base = self.policy.mode(obs).clamp(-1, 1)
        return (base + self.beta * self.edit.mode(torch.cat([obs, base], -1))).clamp(-1, 1)

    def candidates(
        self, obs: Tensor, num: int, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num` base actions and edits of the first `num_edits`, [..., num + num_edits, A]."""
        ours, theirs = self._split(noise)
        base = self.policy.sample(obs, num, theirs, generator).clamp(-1, 1)
        few = num if self.num_edits is None else min(self.num_edits, num)
        edits, _ = self.edited(obs, base[..., :few, :], None if ours is None else ours[..., :few, :], generator)
        return torch.cat([base, edits], -2)

    def _split(self, noise: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The edit's noise [..., A] and the base's, in its own shape."""
        if noise is None:
            return None, None
        rest = noise[..., :-1, :]
        return noise[..., -1, :], rest.squeeze(-2) if len(self.policy.noise_shape or ()) == 1 else rest


class EMA(Policy):
    """Acts with an exponential moving average of the policy that learns: train `policy`, sample from this.

    `update(step)` moves the average: slow <- slow + (1 - decay)(policy - slow) in every `every`-th step; before `start`
    it is a plain copy instead. What it can do is the slow policy's, so no gradient reaches a parameter (`reparam` it
    cannot), but for `matching_loss`, which is that of the policy that learns.
    """

    OFFERS = frozenset({"sample", "mode", "decode", "matching_loss"}) | frozenset(
        {"log_prob", "entropy", "kl", "components", "deterministic"}  # of what `forward` gives
    )

    def __init__(self, policy: Policy, decay: float = 0.995, every: int = 1, start: int = 0) -> None:
        super().__init__()
        if not 0 <= decay <= 1 or every < 1:
            raise ValueError(f"decay is a share in [0, 1] and every at least 1, got decay={decay}, every={every}")
        self.policy, self.slow = policy, frozen_copy(policy)
        self.decay, self.every, self.start = decay, every, start
        self.can, self.noise_shape = policy.can & self.OFFERS, policy.noise_shape

    def update(self, step: int) -> None:
        """Take in the policy of update number `step` (a Python number)."""
        if step % self.every == 0:
            polyak(self.policy, self.slow, 1 - self.decay if step >= self.start else 1.0)

    def forward(self, obs: Tensor) -> object:
        """The slow policy at `obs` [..., O]."""
        return self.slow(obs)

    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws of the slow policy."""
        return self.slow.sample(obs, num, noise, generator)

    def candidates(
        self, obs: Tensor, num: int, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The slow policy's: of edits the base actions too."""
        return self.slow.candidates(obs, num, noise, generator)

    def mode(self, obs: Tensor) -> Tensor:
        """The slow policy's."""
        return self.slow.mode(obs)

    def decode(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The slow policy's."""
        return self.slow.decode(obs, noise)

    def matching_loss(
        self,
        obs: Tensor,
        action: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """That of the policy that learns."""
        return self.policy.matching_loss(obs, action, noise, time, generator)


class Composed(GenerativePolicy):
    """Several diffusions, or several flows, sampled as one: in each step their fields are averaged with `weights`.

    The parents share levels, sampler and clipping; diffusions may predict different things (all are turned into noise).
    Weights are at least 0 and sum to 1. Nothing is trained. Source: arXiv:2510.01068.
    """

    def __init__(self, policies: Sequence[GenerativePolicy], weights: Sequence[float]) -> None:
        if not policies:
            raise ValueError("a composition of no policies is none: give at least one")
        for p in policies:
            require(p, "field", by="a composition")
        first = policies[0]
        if len(policies) != len(weights) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(f"{len(policies)} policies need as many weights, at least 0, with sum 1; got {weights}")
        for p in policies[1:]:
            if (diff := _unlike(first, p)) is not None:
                raise ValueError(f"only policies that sample alike can be composed; these differ in {diff}")
        super().__init__(first.act_dim, first.std, first.clip, first.clip_states)
        self.policies, self.weights = nn.ModuleList(policies), tuple(weights)
        self.can = self.can - {"matching_loss"}

    def matching_loss(self, *args: object, **kwargs: object) -> Tensor:
        """TypeError: nothing is trained."""
        raise TypeError("a composition has no matching_loss: train its policies by theirs")

    def field(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """sum_j w_j field_j, [..., A]."""
        fields = [w * p.field(obs, x, t) for w, p in zip(self.weights, self._parents(), strict=True)]
        return torch.stack(fields).sum(0)

    def step_mean(self, field: Callable[[Tensor, Tensor], Tensor], x: Tensor, k: Step, deterministic: bool) -> Tensor:
        """As in each of the parents."""
        return self._parents()[0].step_mean(field, x, k, deterministic)

    def _parents(self) -> list[GenerativePolicy]:
        return list(self.policies)  # type: ignore[arg-type]


def _unlike(a: GenerativePolicy, b: GenerativePolicy) -> str | None:
    """The first thing in which two policies sample differently, None if there is none."""
    if type(a) is not type(b):
        return f"kind: {type(a).__name__} and {type(b).__name__}"
    names = ["act_dim", "num_steps", "clip", "clip_states"]
    names += ["schedule", "steps"] if isinstance(a, DiffusionPolicy) else []
    names += ["method"] if isinstance(a, FlowPolicy) else []
    for name in names:
        if (x := getattr(a, name)) != (y := getattr(b, name)):
            return f"{name}: {x} and {y}"
    same = torch.equal(a.std, b.std) and (
        not isinstance(a, DiffusionPolicy) or torch.equal(a.of_data, b.of_data)  # type: ignore[arg-type]
    )
    return None if same else "the noise of their steps"


class WarmStarted(Policy):
    """A receding horizon: `policy` gives plans of `horizon` actions [H * A], of which the first is executed.

    The first plan takes all K steps. Each later one begins as the plan before, moved on by one action (the last
    repeated), taken for a state `steps` steps before the end, so it costs `steps` instead of K.
    Source: arXiv:2508.05396. Differs: the number of steps is given, not derived from a contraction
    condition; too few and the plan lags behind, too many and it forgets where it started.
    """

    def __init__(self, policy: GenerativePolicy, horizon: int, steps: int) -> None:
        super().__init__()
        require(policy, "decode", "field", by="a warm start")
        if horizon < 1 or policy.act_dim % horizon:
            raise ValueError(f"a policy of {policy.act_dim} numbers holds no plan of {horizon} actions of equal size")
        if not 1 <= steps <= policy.num_steps:
            raise ValueError(f"a warm start takes 1 to {policy.num_steps} steps, not {steps}")
        self.policy, self.horizon, self.steps = policy, horizon, steps
        self.can, self.noise_shape = frozenset({"sample", "mode"}), policy.noise_shape

    def forward(self, obs: Tensor) -> Conditioned:
        """The policy at `obs` [..., O]."""
        return Conditioned(self, obs)

    def plan(
        self,
        obs: Tensor,
        previous: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A plan [..., H, A]: from scratch, or from the one before, `previous` [..., H, A].

        `noise` [..., *noise_shape] is used from scratch only; a warm start adds none.
        """
        if previous is None:
            flat = self.policy.sample(obs, noise=noise, generator=generator)
        else:
            moved = torch.cat([previous[..., 1:, :], previous[..., -1:, :]], -2).flatten(-2)
            flat = self.policy.finished(self.policy.path(obs, moved, first=self.policy.num_steps - self.steps)[-1])
        return self._cut(flat)

    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """First actions [..., A] of plans from scratch, with `num` [..., num, A]."""
        return self._cut(self.policy.sample(obs, num, noise, generator))[..., 0, :]

    def mode(self, obs: Tensor) -> Tensor:
        """The first action [..., A] of the plan of zero noise."""
        return self._cut(self.policy.mode(obs))[..., 0, :]

    def _cut(self, flat: Tensor) -> Tensor:
        """[..., H * A] -> [..., H, A]."""
        return flat.reshape(*flat.shape[:-1], self.horizon, -1)
