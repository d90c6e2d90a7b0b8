"""Generative policies: an action is what a learned field makes of noise, in K steps.

Shapes: `noise` of a draw is `[..., *policy.noise_shape]`, leading dimensions those of the observations, or one more for
several draws per observation, as [B, N]. `noise_shape` is (A,) where all chance is in the start (a flow, DDIM), and
(K + 1, A) where each step adds some: row 0 is the start x_K, row 1 + k goes into step k. Steps are counted in the order
of execution: 0 is the noisiest, K - 1 gives the action. A chain is `[..., K + 1, A]`, from the start to the action.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from rlctl.nets.distributions import Normal
from rlctl.nets.field import FieldMLP, TimeKind, xavier_
from rlctl.nets.mlp import Activation, mlp
from rlctl.nets.policy import Policy, require
from rlctl.ops.diffusion import (
    Prediction,
    Schedule,
    Variance,
    alpha_bars,
    noised,
    predicted_data,
    predicted_noise,
    regression_target,
    reverse_steps,
)
from rlctl.ops.flow import Method, advanced, interpolated

Sampler = Literal["ddpm", "ddim"]
ClipDiffusion = Literal["x0", "step"]
ClipFlow = Literal["end", "step"]


@dataclass(frozen=True)
class Conditioned:
    """A policy at given observations: what stands where another policy has a distribution."""

    policy: Policy
    obs: Tensor

    @property
    def mode(self) -> Tensor:
        """The deterministic action [..., A]."""
        return self.policy.mode(self.obs)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A draw [..., A]."""
        return self.policy.sample(self.obs, noise=noise, generator=generator)


def check_choice(name: str, value: str, of: Any) -> None:
    """ValueError if the setting `name` is none of the words of the Literal `of`."""
    if value not in get_args(of):
        raise ValueError(f"{name}='{value}' is not allowed: {', '.join(get_args(of))}")


Step = int | Tensor
"""A step of the sampler, or one for each row (int64, the leading shape of the state)."""


class GenerativePolicy(Policy):
    """What diffusions and flows have in common: K Gaussian (or deterministic) steps along a field.

    A subclass gives the field, the mean of a step along it, and the matching loss.
    """

    std: Tensor
    noise_shape: tuple[int, ...]

    def __init__(self, act_dim: int, std: Tensor, clip: float | None, clip_states: bool) -> None:
        super().__init__()
        self.act_dim, self.num_steps = act_dim, len(std)
        self.clip, self.clip_states = clip, clip_states
        self.stochastic = bool((std > 0).any())
        """Whether steps add noise."""
        self.noise_shape = (self.num_steps + 1, act_dim) if self.stochastic else (act_dim,)
        self.register_buffer("std", std.to(torch.get_default_dtype()), persistent=False)
        self.can = frozenset({"sample", "reparam", "mode", "decode", "field", "matching_loss"})
        if bool((std > 0).all()) and not clip_states:
            self.can |= {"chain_log_prob"}

    def forward(self, obs: Tensor) -> Conditioned:
        """The policy at `obs` [..., O]."""
        return Conditioned(self, obs)

    # ------------------------------------------------------------------------------------------ what a subclass gives
    @abstractmethod
    def field(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The learned field [..., A] at `obs` [..., O], `x` [..., A] and time `t` (0-dim or of x's leading shape)."""

    @abstractmethod
    def step_mean(self, field: Callable[[Tensor, Tensor], Tensor], x: Tensor, k: Step, deterministic: bool) -> Tensor:
        """Where step `k` leads from `x` [..., A] along `field(x, t)`; `deterministic`: when no noise is to come."""

    @abstractmethod
    def draw_pairs(
        self, action: Tensor, num: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise [..., A] and times [...] for the matching loss of `action` [..., A]; with `num` that many for each."""

    @abstractmethod
    def matching_error(self, obs: Tensor, action: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Squared error [..., A] of the network at the noisy action of (`noise`, `time`)."""

    # --------------------------------------------------------------------------------------------------- imitation
    def matching_loss(
        self,
        obs: Tensor,
        action: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        reduce: bool = True,
    ) -> Tensor:
        """Error of the field at a noisy `action` [..., A], a mean over dimensions [...]; of each if not `reduce`.

        `noise` and `time` are both given or both drawn from `generator`. For several pairs per action they have one
        more dimension, `[..., S, A]` and `[..., S]`, and so has the result.
        """
        if noise is None or time is None:
            if noise is not time:
                raise ValueError("a matching loss takes both noise and time, or neither")
            noise, time = self.draw_pairs(action, generator=generator)
        for _ in range(noise.dim() - action.dim()):
            action = action.unsqueeze(-2)
        error = self.matching_error(obs, action, noise, time)
        return error.mean(-1) if reduce else error

    # ---------------------------------------------------------------------------------------------------- sampling
    def draw_noise(self, obs: Tensor, num: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Noise for `sample`, [..., (num,) *noise_shape]."""
        lead = obs.shape[:-1] if num is None else (*obs.shape[:-1], num)
        return torch.randn((*lead, *self.noise_shape), generator=generator, dtype=obs.dtype, device=obs.device)

    def path(
        self, obs: Tensor, x: Tensor, noise: Tensor | None = None, first: int = 0, last: int | None = None
    ) -> list[Tensor]:
        """The states from `x` [..., A] before step `first` to that after step `last - 1` (None: all), each [..., A].

        With `noise` [..., last - first, A] the steps of the stochastic sampler; without, the deterministic map.
        """
        states = [x]
        for j, k in enumerate(range(first, self.num_steps if last is None else last)):
            x = self.step_mean(partial(self.field, obs), x, k, noise is None)
            if noise is not None:
                x = x + self.std[k] * noise[..., j, :]
            if self.clip_states and self.clip is not None:
                x = x.clamp(-self.clip, self.clip)
            states.append(x)
        return states

    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws [..., A], with `num` [..., num, A]; differentiable through all steps in parameters and noise."""
        noise = self.draw_noise(obs, num, generator) if noise is None else noise
        start, rest = (noise[..., 0, :], noise[..., 1:, :]) if self.stochastic else (noise, None)
        return self.finished(self.path(obs, start, rest)[-1])

    def decode(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The action [..., A] of the start `noise` [..., A] when no step adds any."""
        return self.finished(self.path(obs, noise)[-1])

    def mode(self, obs: Tensor) -> Tensor:
        """The action of zero noise: the centre of the prior, not the densest action."""
        return self.decode(obs, obs.new_zeros(*obs.shape[:-1], self.act_dim))

    def finished(self, x: Tensor) -> Tensor:
        """The last state of a chain as an action: clipped to the range, if there is one."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    # ------------------------------------------------------------------------------------------------------ chains
    def sample_chain(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Every state of a draw, [..., K + 1, A], the last one not clipped; `finished` makes an action of it."""
        noise = self.draw_noise(obs, num, generator) if noise is None else noise
        start, rest = (noise[..., 0, :], noise[..., 1:, :]) if self.stochastic else (noise, None)
        return torch.stack(self.path(obs, start, rest), -2)

    def transition(self, obs: Tensor, x: Tensor, k: Step) -> Normal:
        """The distribution of the state after step `k` given `x` [..., A] before it; TypeError where there is none."""
        require(self, "chain_log_prob", by="the density of a sampling step")
        mean = self.step_mean(partial(self.field, obs), x, k, False)
        return Normal(mean, at(self.std, k).log().expand_as(mean))

    def chain_log_prob(self, obs: Tensor, chain: Tensor, reduce: bool = True) -> Tensor:
        """Log-density of each step of `chain` [..., K + 1, A], [..., K]; of each dimension too if not `reduce`."""
        k = torch.arange(self.num_steps, device=chain.device)
        steps = self.transition(obs, chain[..., :-1, :], k)
        return steps.log_prob(chain[..., 1:, :], reduce)

    def identity_(self) -> Self:
        """Set every weight to zero: a flow then returns its noise, a DDIM its noise over sqrt(ab_K) (unclipped)."""
        for p in self.parameters():
            nn.init.zeros_(p)
        return self


def at(table: Tensor, k: Step) -> Tensor:
    """Entry `k` of `table` [K], so that it broadcasts against a state [..., A]."""
    return table[k] if isinstance(k, int) else table[k].unsqueeze(-1)


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of `table` [K] at `index` (int64) of any shape.

    table[index] reads a 0-dim index on the host; take(index) does not, but cannot be exported to ONNX.
    """
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


class DiffusionPolicy(GenerativePolicy):
    """A denoising diffusion over actions, T levels of noise; `field` is the noise prediction eps(s, x, i), i = 1..T.

    `sampler="ddpm"` adds noise in every step but the last, of the posterior's variance or of `beta`; "ddim" is
    deterministic unless `eta` > 0. `sampling_steps` K < T skips levels. `min_std` is a floor under the noise of every
    step, the last included: that gives every step a density. `clip` bounds the denoised estimate in each step
    (`clip_at="x0"`) or each state ("step"), and the action; None bounds nothing.
    """

    level: Tensor
    alpha_bar: Tensor
    of_data: Tensor
    of_x: Tensor

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        activation: Activation = "mish",
        *,
        schedule: Schedule = "vp",
        steps: int = 5,
        prediction: Prediction = "eps",
        sampler: Sampler = "ddpm",
        variance: Variance = "posterior",
        eta: float | None = None,
        sampling_steps: int | None = None,
        min_std: float = 0.0,
        clip: float | None = 1.0,
        clip_at: ClipDiffusion = "x0",
        features: TimeKind = "sinusoidal",
        net: nn.Module | None = None,
    ) -> None:
        check_choice("prediction", prediction, Prediction)
        check_choice("sampler", sampler, Sampler)
        check_choice("variance", variance, Variance)
        check_choice("clip_at", clip_at, ClipDiffusion)
        eta = {"ddpm": 1.0, "ddim": 0.0}[sampler] if eta is None else eta
        if not 0 <= eta <= 1 or min_std < 0:
            raise ValueError(f"eta lies in [0, 1] and min_std is at least 0, got eta={eta}, min_std={min_std}")
        alpha_bar = alpha_bars(schedule, steps)
        noisy = reverse_steps(alpha_bar, sampling_steps, eta=eta, variance=variance)
        calm = reverse_steps(alpha_bar, sampling_steps, eta=0.0)
        super().__init__(act_dim, noisy.std.clamp(min=min_std), clip, clip_states=clip_at == "step")
        self.schedule, self.steps, self.prediction = schedule, steps, prediction
        self.register_buffer("level", noisy.level, persistent=False)
        dtype = torch.get_default_dtype()
        self.register_buffer("alpha_bar", alpha_bar.to(dtype), persistent=False)
        # row 0 for the stochastic sampler, row 1 for the deterministic map
        self.register_buffer("of_data", torch.stack([noisy.of_data, calm.of_data]).to(dtype), persistent=False)
        self.register_buffer("of_x", torch.stack([noisy.of_x, calm.of_x]).to(dtype), persistent=False)
        self.net = net or FieldMLP(obs_dim, act_dim, hidden, activation, features)

    def field(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise [..., A] that the network sees in x_i; `t` is i (int64), 0-dim or of x's leading shape."""
        return predicted_noise(self.prediction, self.net(obs, x, t), x, looked_up(self.alpha_bar, t).unsqueeze(-1))

    def step_mean(self, field: Callable[[Tensor, Tensor], Tensor], x: Tensor, k: Step, deterministic: bool) -> Tensor:
        """The mean of x_p given x_i; see `rlctl.ops.diffusion.reverse_steps`."""
        i, row = self.level[k], int(deterministic)
        data = predicted_data(field(x, i), x, looked_up(self.alpha_bar, i).unsqueeze(-1))
        if self.clip is not None and not self.clip_states:
            data = data.clamp(-self.clip, self.clip)
        return at(self.of_data[row], k) * data + at(self.of_x[row], k) * x

    def draw_pairs(
        self, action: Tensor, num: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Standard-normal noise and levels i uniform in 1..T."""
        lead = action.shape[:-1] if num is None else (*action.shape[:-1], num)
        noise = torch.randn((*lead, self.act_dim), generator=generator, dtype=action.dtype, device=action.device)
        return noise, torch.randint(1, self.steps + 1, lead, generator=generator, device=action.device)

    def matching_error(self, obs: Tensor, action: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """(net(s, x_i, i) - target)^2, [..., A], in the units of what it predicts; `time` is i in 1..T (int64)."""
        alpha_bar = looked_up(self.alpha_bar, time).unsqueeze(-1)
        out = self.net(obs, noised(action, noise, alpha_bar), time)
        return (out - regression_target(self.prediction, action, noise, alpha_bar)).square()


class FlowPolicy(GenerativePolicy):
    """A flow over actions, matched on straight paths; `field` is the velocity v(s, x, t), t = 0 noise, t = 1 action.

    K = `steps` equal steps, v asked at t = k / K (and half a step later with the midpoint rule). `noise_std` > 0 adds
    that much Gaussian noise after every step: only then have the steps densities (ReinFlow, arXiv:2505.22094).
    `clip` bounds the action (`clip_at="end"`) or every state ("step"); None bounds nothing.
    """

    time: Tensor

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int] = (512, 512, 512, 512),
        activation: Activation = "gelu",
        *,
        steps: int = 10,
        method: Method = "euler",
        noise_std: float = 0.0,
        clip: float | None = 1.0,
        clip_at: ClipFlow = "end",
        features: TimeKind = "raw",
        xavier: bool = True,
        net: nn.Module | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"a flow is followed in at least one step, got {steps}")
        if noise_std < 0:
            raise ValueError(f"noise_std is a standard deviation, at least 0, got {noise_std}")
        check_choice("method", method, Method)
        check_choice("clip_at", clip_at, ClipFlow)
        super().__init__(act_dim, torch.full((steps,), noise_std), clip, clip_states=clip_at == "step")
        self.method: Method = method
        self.register_buffer("time", torch.arange(steps) / steps, persistent=False)
        self.net = net or FieldMLP(obs_dim, act_dim, hidden, activation, features, xavier=xavier)

    def field(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity [..., A]."""
        return self.net(obs, x, t)

    def step_mean(self, field: Callable[[Tensor, Tensor], Tensor], x: Tensor, k: Step, deterministic: bool) -> Tensor:
        """One step of the ODE solver."""
        return advanced(field, x, self.time[k], 1 / self.num_steps, self.method)

    def draw_pairs(
        self, action: Tensor, num: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Standard-normal noise and times uniform in [0, 1)."""
        lead = action.shape[:-1] if num is None else (*action.shape[:-1], num)
        like: dict[str, Any] = {"generator": generator, "dtype": action.dtype, "device": action.device}
        return torch.randn((*lead, self.act_dim), **like), torch.rand(lead, **like)

    def matching_error(self, obs: Tensor, action: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """(v(s, x_t, t) - (action - noise))^2, [..., A]."""
        x = interpolated(noise, action, time.unsqueeze(-1))
        return (self.net(obs, x, time) - (action - noise)).square()


class OneStepPolicy(Policy):
    """One network from observation and noise to action, a = clip(mu(s, z)), z ~ N(0, I): a flow's map in one call."""

    can = frozenset({"sample", "reparam", "mode", "decode"})

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        hidden: Sequence[int] = (512, 512, 512, 512),
        activation: Activation = "gelu",
        *,
        clip: float | None = 1.0,
        xavier: bool = True,
    ) -> None:
        super().__init__()
        self.act_dim, self.clip, self.noise_shape = act_dim, clip, (act_dim,)
        self.net = mlp(obs_dim + act_dim, act_dim, hidden, activation)
        if xavier:
            xavier_(self.net)

    def forward(self, obs: Tensor) -> Conditioned:
        """The policy at `obs` [..., O]."""
        return Conditioned(self, obs)

    def unclipped(self, obs: Tensor, noise: Tensor) -> Tensor:
        """mu(s, z), [..., A]; `noise` has the leading dimensions of `obs`, or one more."""
        for _ in range(noise.dim() - obs.dim()):
            obs = obs.unsqueeze(-2)
        return self.net(torch.cat([obs.expand(*noise.shape[:-1], -1), noise], -1))

    def decode(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The action [..., A] of `noise` [..., A]."""
        out = self.unclipped(obs, noise)
        return out if self.clip is None else out.clamp(-self.clip, self.clip)

    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws [..., A], with `num` [..., num, A]."""
        if noise is None:
            lead = obs.shape[:-1] if num is None else (*obs.shape[:-1], num)
            noise = torch.randn((*lead, self.act_dim), generator=generator, dtype=obs.dtype, device=obs.device)
        return self.decode(obs, noise)

    def mode(self, obs: Tensor) -> Tensor:
        """The action of zero noise."""
        return self.decode(obs, obs.new_zeros(*obs.shape[:-1], self.act_dim))


class LatentDecoderPolicy(Policy):
    """An encoder draws a code, a decoder maps it to an action: a = g(s, e), e ~ N(mean(s), std(s)).

    The density that is known is that of the code. `squash`: the decoder gives raw actions, tanh brings them into the
    box. The norms turn raw observations into what each part was trained on. It can be fitted to given actions
    (`matching_loss`) if the encoder is frozen at construction, for no matching loss has a gradient in it, and nothing
    is squashed, for what is matched is raw.
    """

    def __init__(
        self,
        encoder: Policy,
        decoder: Policy,
        *,
        squash: bool = True,
        encoder_norm: nn.Module | None = None,
        decoder_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require(encoder, "sample", "log_prob", "mode", by="an encoder of codes")
        require(decoder, "decode", by="a decoder of codes")
        self.encoder, self.decoder, self.squash = encoder, decoder, squash
        self.encoder_norm, self.decoder_norm = encoder_norm or nn.Identity(), decoder_norm or nn.Identity()
        self.noise_shape = encoder.noise_shape
        both = encoder.can & decoder.can & {"reparam"}
        self.can = frozenset({"sample", "mode", "decode", "latent_log_prob"}) | both
        if not squash and not any(p.requires_grad for p in encoder.parameters()):
            self.can |= decoder.can & {"matching_loss"}

    def forward(self, obs: Tensor) -> Conditioned:
        """The policy at `obs` [..., O]."""
        return Conditioned(self, obs)

    def latent(self, obs: Tensor) -> Any:
        """The distribution of the code [..., A] at `obs` [..., O]."""
        return self.encoder(self.encoder_norm(obs))

    def raw_action(self, obs: Tensor, code: Tensor) -> Tensor:
        """What the decoder makes of `code` [..., A], before any squashing: what it is trained on."""
        return self.decoder.decode(self.decoder_norm(obs), code)

    def decode(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The action [..., A] of the code `noise` [..., A]."""
        raw = self.raw_action(obs, noise)
        return raw.tanh() if self.squash else raw

    def sample(
        self,
        obs: Tensor,
        num: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Actions [..., A], with `num` [..., num, A], of codes drawn with `noise` of that shape."""
        return self.decode(obs, self.encoder.sample(self.encoder_norm(obs), num, noise, generator))

    def mode(self, obs: Tensor) -> Tensor:
        """The action of the code's mode."""
        return self.decode(obs, self.latent(obs).mode)

    def latent_log_prob(self, obs: Tensor, code: Tensor) -> Tensor:
        """Log-density [...] of `code` [..., A]."""
        return self.latent(obs).log_prob(code)

    def matching_loss(
        self,
        obs: Tensor,
        action: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The decoder's, of RAW actions [..., A] and noise of the fixed prior N(0, I), not of the encoder."""
        return self.decoder.matching_loss(self.decoder_norm(obs), action, noise, time, generator)
