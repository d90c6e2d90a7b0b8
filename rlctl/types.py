"""The vocabulary every module shares: `Spec`, `Batch`, `Agent`.

Shapes: `B` is a batch of transitions, `[T, N]` a rollout of `T` steps in `N` worlds, `O` and `A` the observation and
action dimensions. A scalar per sample is always `[B]`, never `[B, 1]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from rlctl.errors import UsageError
from rlctl.seeding import generator

if TYPE_CHECKING:
    from rlctl.train import Job

Regime = Literal["on_policy", "off_policy", "offline"]
Source = Literal["env", "data"]

# Types of config fields; the bounds are checked when settings are read (`rlctl.config.build`).
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Widths = Annotated[tuple[Count, ...], Field(max_length=16)]


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute()) if folder else ""


RunFolder = Annotated[str, AfterValidator(_absolute)]
"""Names a run directory: kept whole, for a run is loaded from elsewhere than it was made."""

Metrics = dict[str, Tensor]
"""Name to 0-dim tensor, on the agent's device. Names are TensorBoard tags, e.g. `losses/critic`."""


class Spec(NamedTuple):
    """All that an agent may know of its task at construction."""

    obs_dim: int
    act_dim: int
    num_envs: int = 1
    device: torch.device = torch.device("cpu")
    episode_len: int = 1000
    """Steps after which the task truncates an episode."""
    seed: int = 0
    """Root of the agent's named random generators."""


class Batch(NamedTuple):
    """Transitions. Leading dimensions are `[B]` (replay, dataset) or `[T, N]` (rollout)."""

    obs: Tensor
    """[..., O] as the environment gave it, never normalised."""
    action: Tensor
    """[..., A] exactly as the policy's distribution produced it, before any clipping."""
    reward: Tensor
    """[...] as the environment gave it, never scaled."""
    next_obs: Tensor
    """[..., O] the true successor, also where the episode ended: never a reset observation."""
    terminated: Tensor
    """[...] bool: the task ended, the value of `next_obs` is zero."""
    truncated: Tensor
    """[...] bool: the episode was cut (time limit), the value of `next_obs` is not zero."""
    extra: Mapping[str, Tensor] = MappingProxyType({})
    """What the agent's `act` returned beside the action, or what a dataset carries, by name."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `fn` to every tensor, those of `extra` included."""
        return Batch._make([*[fn(x) for x in self[:6]], {k: fn(x) for k, x in self.extra.items()}])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; those of `extra` as `extra.NAME`."""
        named: dict[str, Tensor] = dict(zip(self._fields[:6], self[:6], strict=True))
        return named | {f"extra.{k}": x for k, x in self.extra.items()}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> Batch:
        """Undo `tensors`."""
        extra = {k.removeprefix("extra."): x for k, x in named.items() if k.startswith("extra.")}
        return cls._make([*[named[k] for k in cls._fields[:6]], extra])


class Buffer(Protocol):
    """What a loop needs of a place that transitions go to and come from."""

    def add(self, batch: Batch) -> None:
        """Store one vector step, `[N, ...]`."""

    def sample(self, n: int) -> Batch:
        """`n` transitions, uniformly with replacement, `[n, ...]`."""

    def __len__(self) -> int:
        """Transitions held."""


@dataclass(frozen=True)
class AgentConfig:
    """What every agent's config has: the length of the run. The one home of defaults is the agent's own subclass."""

    steps: Count = 1_000_000
    """Length of the run: environment steps, or gradient steps of an offline learner."""


class Exportable(NamedTuple):
    """A policy for use outside of rlctl; see `Agent.exportable`."""

    module: nn.Module
    """forward(obs [B, O], *others) -> action [B, A] in the units of [-1, 1]. Draws no random number itself."""
    inputs: dict[str, tuple[int, ...]]
    """Its inputs by name, in order, with their shapes less the batch: `obs` first; all others are standard normal noise
    that the caller draws."""


class Deterministic(nn.Module):
    """An agent's deterministic action as a module."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, obs: Tensor) -> Tensor:
        """Actions [B, A] for raw observations [B, O]."""
        return self.agent.act(obs, explore=False)[0]


class Sampled(nn.Module):
    """The draw of an agent that given noise decides; see `Agent.act_by`."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, A] for raw observations [B, O] and standard normal noise [B, ...]."""
        return self.agent.act_by(obs, noise)


class Agent(nn.Module):
    """An algorithm: `init`, `act`, `update`; its state is held in place.

    A subclass sets `regime` and `Config`, builds its networks and optimisers (attributes; both are found and
    checkpointed by themselves) in `__init__`, and implements `act` and `update`. Nothing in `update` may read a tensor
    on the host: no `.item()`, no `bool(tensor)`, no numpy. A method that cannot do without says so in `host_reads`.
    """

    regime: ClassVar[Regime]
    needs: ClassVar[frozenset[Source] | None] = None
    """What training takes: {"env"}, {"data"} or both; None follows `regime`."""
    accepts: ClassVar[frozenset[Source]] = frozenset()
    """What training takes besides, if given."""
    host_reads: str = ""
    """Why an update has to read tensors on the host, if it does; such an agent cannot be captured as a graph. Said by
    the class; an instance whose settings do without the reads clears it."""
    decides_together: bool = False
    """Whether several processes that share an update decide alike what it reads on the host, and move alike what it
    moves by hand, as they do with gradient steps (`rlctl.parallel`)."""
    offline_only: ClassVar[str] = ""
    """Why an offline learner does not go on in an environment, for one that does not. One that does has a Config with
    the fields of `rlctl.train.OfflineRLConfig`."""
    one_length: ClassVar[str] = ""
    """Why a run cannot be made longer than it was begun, for a method of which that is so."""
    Config: ClassVar[type[Any]]
    schedule: ClassVar[Callable[[Job], None] | None] = None
    """A multi-stage method names its own function of loops here; None takes the loop of `regime`."""

    def __init__(self, spec: Spec, cfg: Any = None) -> None:
        super().__init__()
        self.spec = spec
        self.cfg = self.Config() if cfg is None else cfg
        self.rng: dict[str, torch.Generator] = {
            name: generator(spec.seed, name, spec.device) for name in ("action", "sample")
        }
        """`action` feeds `act`, `sample` feeds `update`; both are part of a checkpoint."""
        self.counters: dict[str, int] = {"updates": 0, "env_steps": 0}
        """Python counters that steer an update (delays, schedules); part of a checkpoint. The loops keep `env_steps`,
        the agent's `update` keeps `updates`."""

    @classmethod
    def sources(cls) -> frozenset[Source]:
        """What training needs: `needs`, or what goes with `regime`."""
        default: Source = "data" if cls.regime == "offline" else "env"
        return frozenset({default}) if cls.needs is None else cls.needs

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions for `obs` [N, O]: (action [N, A] in the units of [-1, 1], extra to store beside the transition).

        `explore=True` draws from the behaviour policy, `False` gives the deterministic action. Nothing but the `action`
        generator may change: evaluations call this too. What counts environment steps reads
        `self.counters["env_steps"]`.
        """
        raise NotImplementedError

    def update(self, batch: Batch) -> Metrics:
        """One update from a batch: `[T, N]` for an on-policy agent, else `[B]`."""
        raise NotImplementedError

    def prepare(self, data: Any) -> None:
        """Look at the whole `rlctl.data.Dataset` before offline training (statistics, an index). Default: nothing.

        Called again when a run is resumed, so what it computes must depend on the data alone.
        """

    def random_act(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Warm-up actions, uniform in [-1, 1]^A, and their extra; an agent whose `act` stores one overrides this."""
        shape = (*obs.shape[:-1], self.spec.act_dim)
        return torch.rand(shape, generator=self.rng["action"], device=obs.device) * 2 - 1, {}

    @torch.no_grad()
    def predict(
        self,
        observation: np.ndarray,
        state: None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, None]:
        """Numpy in, numpy out, one observation [O] or several [N, O]; actions are clipped to [-1, 1].

        The parameters are those of Stable-Baselines3's `predict` (`state` and `episode_start` are for recurrent
        policies, and unused). Actions stay in [-1, 1]: rescale them for a Gymnasium environment with other bounds.
        """
        obs = torch.as_tensor(np.asarray(observation), dtype=torch.float32, device=self.spec.device)
        action, _ = self.act(obs.reshape(-1, self.spec.obs_dim), explore=not deterministic)
        return action.clamp(-1, 1).reshape(*obs.shape[:-1], self.spec.act_dim).cpu().numpy(), state

    def act_by(self, obs: Tensor, noise: Tensor) -> Tensor:
        """What `act(obs, explore=True)` gives where its draw is `noise` [B, *pi.noise_shape], for `exportable`.

        An agent that acts by more than `pi` at `obs_norm(obs)` overrides it.
        """
        agent: Any = self
        return agent.pi.sample(agent.obs_norm(obs), noise=noise)

    def exportable(self, sampled: bool = False) -> Exportable:
        """What `rlctl export` writes: the deterministic action, a function of the observation alone.

        With `sampled` a draw of the policy, which takes its noise as an input, so that the exported model is a function
        too: of an agent whose policy is `pi`, sees `obs_norm(obs)`, and draws by noise alone (`Policy.noise_shape`), or
        whose `act_by` says what noise of that shape makes. Another agent overrides this; UsageError if it does not.
        """
        obs: dict[str, tuple[int, ...]] = {"obs": (self.spec.obs_dim,)}
        if not sampled:
            return Exportable(Deterministic(self), obs)
        noise = getattr(getattr(self, "pi", None), "noise_shape", None)
        if noise is None or not hasattr(self, "obs_norm"):
            raise UsageError(
                f"{type(self).__name__} has no sampled form to export: leave --sampled out, or override "
                "Agent.exportable with a module that takes its noise as an input"
            )
        return Exportable(Sampled(self), obs | {"noise": noise})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Every optimiser held as an attribute, or in a dict or list that is one, by name (`opt_pi`, `opts/0`)."""
        found: dict[str, torch.optim.Optimizer] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.optim.Optimizer):
                found[name] = value
            elif isinstance(value, dict | list | tuple) and not name.startswith("_"):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                found |= {f"{name}/{k}": v for k, v in items if isinstance(v, torch.optim.Optimizer)}
        return found

    def moved_by_hand(self) -> Iterable[nn.Parameter]:
        """Parameters that `update` moves without an optimiser (a line search, say); a run refuses any other orphan.

        See `decides_together`.
        """
        return ()

    @contextlib.contextmanager
    def borrowed_rng(self, seed: int) -> Iterator[None]:
        """Within the block the agent draws from fresh generators, so that an evaluation leaves training untouched."""
        kept, self.rng = self.rng, {name: generator(seed, name, self.spec.device) for name in self.rng}
        try:
            yield
        finally:
            self.rng = kept
