"""Baselines of Stable-Baselines3 and sb3-contrib: `sb3:ppo`, `sb3:sac`, `sb3:td3`, `sb3:trpo`, `sb3:tqc`.

The learner is theirs, untouched: their networks, their buffers, their `learn`. Ours are the tasks (so the physics is
the same), the evaluation protocol and the run directory, so that a comparison compares learners and nothing else.

Source: Raffin et al. 2021, JMLR 22(268), and the installed version of the libraries (named in run.json).
Differs: nothing in the learners. The settings are the keywords of their constructors, with their defaults. Two things
    are spelt in our way: `hidden` and `activation` stand for policy_kwargs, `normalize` for a VecNormalize around the
    environment (observations and rewards; its statistics belong to the agent and stand still in evaluations). The
    replay buffer is not made larger than the run.

A run resumes bit for bit on the CPU like one of our own: the checkpoints are written between two of `learn`'s rollouts,
where everything that SB3 carries over is in the networks, the optimisers and a few arrays (`Carried`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from rlctl.data.ring import refuse_if_too_large
from rlctl.errors import UsageError
from rlctl.seeding import derive
from rlctl.types import Agent, AgentConfig, Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths
from rlctl_envs.contract import rng_from_array, rng_to_array

if TYPE_CHECKING:
    from rlctl.train import Job

OURS = {"steps", "num_envs", "normalize", "hidden", "activation", "action_noise"}
"""Settings that are no keywords of the constructors."""


@dataclass(frozen=True)
class SB3Config(AgentConfig):
    """What all five have."""

    num_envs: Count = 1
    """Worlds stepped side by side (SB3's n_envs)."""
    normalize: bool = False
    """Put VecNormalize around the environment."""
    activation: Literal["tanh", "relu"] = "relu"
    """Of the hidden layers."""
    gamma: Fraction = 0.99
    """Discount factor."""


@dataclass(frozen=True)
class SB3OnPolicyConfig(SB3Config):
    """What PPO and TRPO have."""

    hidden: Widths = (64, 64)
    """Widths of the hidden layers, of policy and value alike (net_arch)."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Of the hidden layers."""
    n_steps: Count = 2048
    """Steps of each world per rollout."""
    gae_lambda: Fraction = 0.95
    """Lambda of the advantage estimate."""
    normalize_advantage: bool = True
    """Advantages to mean 0 and std 1 per minibatch."""


@dataclass(frozen=True)
class SB3PPOConfig(SB3OnPolicyConfig):
    """PPO of Stable-Baselines3."""

    learning_rate: Positive = 3e-4
    """Of Adam."""
    batch_size: Count = 64
    """Transitions per minibatch."""
    n_epochs: Count = 10
    """Passes over a rollout."""
    clip_range: Positive = 0.2
    """Of the ratio."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.5
    """Weight of the value loss."""
    max_grad_norm: Positive = 0.5
    """Norm to which gradients are clipped."""
    target_kl: Positive | None = None
    """Stop the epochs above 1.5 times this KL; None: never."""


@dataclass(frozen=True)
class SB3TRPOConfig(SB3OnPolicyConfig):
    """TRPO of sb3-contrib."""

    learning_rate: Positive = 1e-3
    """Of the value's Adam."""
    batch_size: Count = 128
    """Transitions per minibatch of the value fit."""
    cg_max_steps: Count = 15
    """Iterations of the conjugate gradients."""
    cg_damping: NonNegative = 0.1
    """Damping of the Hessian-vector product."""
    line_search_shrinking_factor: Fraction = 0.8
    """Step factor between two tries of the line search."""
    line_search_max_iter: Count = 10
    """Tries of the line search."""
    n_critic_updates: Count = 10
    """Passes of the value fit over a rollout."""
    target_kl: Positive = 0.01
    """Radius of the trust region, in nats."""


@dataclass(frozen=True)
class SB3OffPolicyConfig(SB3Config):
    """What SAC, TD3 and TQC have."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers, of actor and critics alike (net_arch)."""
    learning_rate: Positive = 3e-4
    """Of all Adams."""
    buffer_size: Count = 1_000_000
    """Transitions the replay buffer keeps."""
    learning_starts: int = 100
    """Environment steps of uniform random actions before learning starts."""
    batch_size: Count = 256
    """Transitions per update."""
    tau: Fraction = 0.005
    """Step of the slow critics."""
    train_freq: Count = 1
    """Vector steps between two rounds of updates."""
    gradient_steps: int = 1
    """Updates per round; -1: as many as environment steps since the last."""
    action_noise: NonNegative = 0.0
    """Std of Gaussian noise on the actions of training (NormalActionNoise); 0: none, SB3's default even in TD3."""


@dataclass(frozen=True)
class SB3SACConfig(SB3OffPolicyConfig):
    """SAC of Stable-Baselines3."""

    ent_coef: str | float = "auto"
    """Temperature: auto, auto_INIT or a number."""
    target_entropy: str | float = "auto"
    """auto: minus the number of action dimensions."""
    target_update_interval: Count = 1
    """Updates between two steps of the slow critics."""


@dataclass(frozen=True)
class SB3TQCConfig(SB3SACConfig):
    """TQC of sb3-contrib."""

    top_quantiles_to_drop_per_net: int = 2
    """Of each critic's 25 quantiles."""


@dataclass(frozen=True)
class SB3TD3Config(SB3OffPolicyConfig):
    """TD3 of Stable-Baselines3."""

    hidden: Widths = (400, 300)
    """Widths of the hidden layers, of actor and critics alike (net_arch)."""
    learning_rate: Positive = 1e-3
    """Of all Adams."""
    policy_delay: Count = 2
    """Critic updates per policy update."""
    target_policy_noise: NonNegative = 0.2
    """Std of the noise on the target's action."""
    target_noise_clip: NonNegative = 0.5
    """Bound of that noise."""


def learn(job: Job) -> None:
    """The schedule of all five: SB3's own `learn` in our environment, with a tick of the run between its rollouts."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecNormalize

    from rlctl_envs.adapters.sb3 import SB3VecEnv

    agent, env, run, cfg = job.agent, job.env, job.run, job.cfg
    assert env is not None
    model: Any = agent.model
    now = run.stage(agent, "sb3")
    if now.env_steps >= cfg.steps:
        return
    if hasattr(cfg, "buffer_size"):
        refuse_if_too_large(agent.spec, min(cfg.buffer_size, cfg.steps + env.num_envs))
    adapter = SB3VecEnv(env)
    normalizer = VecNormalize(adapter, gamma=cfg.gamma) if cfg.normalize else None
    if normalizer is not None:
        give_statistics(agent, normalizer)  # of the checkpoint, if the run is a resumed one
    model.set_env(adapter if normalizer is None else normalizer)
    model.set_logger(Logger(None, []))
    run.begin(agent, now, env=env, buffer=Carried(model, normalizer), left=cfg.steps - now.env_steps)

    class Ticks(BaseCallback):  # type: ignore[misc, unused-ignore]
        """Between two rollouts: everything SB3 has done since the last one becomes a tick of the run."""

        def __init__(self) -> None:
            super().__init__()
            self.since = time.perf_counter()
            self.updates = model._n_updates

        def spend(self, what: str) -> None:
            before, self.since = self.since, time.perf_counter()
            run.spent[what] += self.since - before

        def _on_rollout_start(self) -> None:
            self.tick()

        def _on_step(self) -> bool:
            assert adapter.last is not None
            run.episodes.add(*adapter.last)
            agent.counters["env_steps"] += adapter.num_envs
            return True

        def _on_rollout_end(self) -> None:
            self.spend("collect")

        def tick(self) -> None:
            self.spend("learn")
            steps = model.num_timesteps - now.env_steps
            if not steps:
                return
            new, self.updates = model._n_updates - self.updates, model._n_updates
            agent.counters["updates"] += new
            if normalizer is not None:
                keep_statistics(agent, normalizer)
            run.tick(agent, [losses(model, agent.spec)] * new, env_steps=steps)
            self.since = time.perf_counter()  # an evaluation counts for itself

    ticks = Ticks()
    model.learn(cfg.steps - now.env_steps, ticks, log_interval=None, reset_num_timesteps=False)
    ticks.tick()


class SB3Agent(Agent):
    """A model of Stable-Baselines3 in the place of an agent; `model` is the library's own object.

    `act` gives the library's actions for raw observations. There is no `update`: the model runs its own `learn`.
    """

    library: ClassVar[str] = "stable_baselines3"
    model_name: ClassVar[str]
    host_reads = "the learner is Stable-Baselines3's, which reads every loss"
    schedule: ClassVar[Callable[[Job], None] | None] = staticmethod(learn)

    obs_mean: Tensor
    obs_var: Tensor

    def __init__(self, spec: Spec, cfg: Any = None, model: Any = None) -> None:
        super().__init__(spec, cfg)
        self.model = self._new_model() if model is None else model
        self.policy: nn.Module = self.model.policy
        log_ent_coef = getattr(self.model, "log_ent_coef", None)
        if log_ent_coef is not None:  # SAC keeps it outside of its policy
            self.register_buffer("log_ent_coef", log_ent_coef)
        if self.cfg.normalize:
            for name, shape in (("obs", (spec.obs_dim,)), ("ret", ())):  # as VecNormalize begins
                mean = torch.zeros(shape, dtype=torch.float64, device=spec.device)
                self.register_buffer(f"{name}_mean", mean)
                self.register_buffer(f"{name}_var", torch.ones_like(mean))
                self.register_buffer(f"{name}_count", mean.new_tensor(1e-4))

    def _new_model(self) -> Any:
        import importlib

        try:
            library = importlib.import_module(self.library)
            from stable_baselines3.common.noise import NormalActionNoise

            from rlctl_envs.adapters.sb3 import SpacesOnly
        except ImportError as e:
            raise UsageError(f"{self.model_name} of {self.library} is not installed: pip install 'rlctl[sb3]'") from e
        cfg, spec = self.cfg, self.spec
        keywords = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in OURS}
        if "buffer_size" in keywords:
            keywords["buffer_size"] = min(cfg.buffer_size, cfg.steps + spec.num_envs)
            if cfg.action_noise:
                keywords["action_noise"] = NormalActionNoise(
                    np.zeros(spec.act_dim), np.full(spec.act_dim, cfg.action_noise)
                )
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[cfg.activation]
        try:
            return getattr(library, self.model_name)(
                "MlpPolicy",
                SpacesOnly(spec.obs_dim, spec.act_dim, spec.num_envs),
                policy_kwargs={"net_arch": list(cfg.hidden), "activation_fn": activation},
                seed=derive(spec.seed, "sb3", 31),
                device=spec.device,
                **keywords,
            )
        except (ValueError, AssertionError) as e:
            raise UsageError(f"{self.model_name} of {self.library} refuses its settings: {e}") from e

    # ------------------------------------------------------------------------------------------------------- acting
    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's action; `explore` draws from the policy and adds the action noise of training."""
        if self.cfg.normalize:
            obs = normalized(obs, self.obs_mean, self.obs_var)
        with self._draws() if explore else contextlib.nullcontext():
            action: Tensor = self.policy._predict(obs, deterministic=not explore)  # type: ignore[operator]
            if explore and (std := getattr(self.cfg, "action_noise", 0.0)):
                action = (action + std * torch.randn_like(action)).clamp(-1, 1)
        return action, {}

    @contextlib.contextmanager
    def _draws(self) -> Iterator[None]:
        """Within, torch's global generator (SB3 knows no other) is one seeded by our `action` generator."""
        rng = self.rng["action"]
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        with torch.random.fork_rng(devices=[self.spec.device] if self.spec.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def update(self, batch: Batch) -> Metrics:
        """Refused: SB3 owns its loop. A run of `rlctl train` or `rlctl bench` calls `schedule` instead."""
        raise TypeError(f"{type(self).__name__} learns through model.learn alone: train it with rlctl train or bench")

    # --------------------------------------------------------------------------------------------------- being saved
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Those of the policy's parts and the temperature's."""
        parts = {"pi": self.policy, "actor": getattr(self.policy, "actor", None)}
        parts["critic"] = getattr(self.policy, "critic", None)
        found = {name: opt for name, part in parts.items() if (opt := getattr(part, "optimizer", None)) is not None}
        if (temperature := getattr(self.model, "ent_coef_optimizer", None)) is not None:
            found["ent_coef"] = temperature
        return found

    def moved_by_hand(self) -> Iterable[nn.Parameter]:
        """The slow copies: SB3 leaves them trainable and moves them by averaging."""
        return [p for name, p in self.policy.named_parameters() if "_target." in name]


CLIP_OBS, EPSILON = 10.0, 1e-8
"""VecNormalize's defaults."""


def normalized(obs: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """What VecNormalize makes of observations [N, O]: float32, clipped at 10 standard deviations."""
    return ((obs.double() - mean) / (var + EPSILON).sqrt()).clamp(-CLIP_OBS, CLIP_OBS).float()


def wrap(model: Any, normalizer: Any = None) -> Agent:
    """A model that SB3 trained elsewhere, with its VecNormalize if it had one, as an agent that acts in our tools.

        agent = wrap(PPO.load("best_model.zip"))
        rlctl.evaluate(agent, rlctl.make_env("Hopper", 10), 10)

    Its actions must lie in [-1, 1], as those of our tasks do, and a VecNormalize must have SB3's own `clip_obs` and
    `epsilon`; ValueError otherwise. One with `norm_obs=False` leaves observations alone, and so does the agent.
    (Loading SB3's own files unpickles them, so that is left to you and SB3.)
    """
    space = model.action_space
    if not (hasattr(space, "low") and (space.low == -1).all() and (space.high == 1).all()):
        raise ValueError(f"the model acts in {space}, our tasks take actions of [-1, 1]: train it on SB3VecEnv")
    if normalizer is not None and not normalizer.norm_obs:
        normalizer = None
    if normalizer is not None and (normalizer.clip_obs, normalizer.epsilon) != (CLIP_OBS, EPSILON):
        raise ValueError(
            f"the VecNormalize has clip_obs={normalizer.clip_obs:g}, epsilon={normalizer.epsilon:g}; supported are "
            f"clip_obs={CLIP_OBS:g}, epsilon={EPSILON:g}: with others the model would act on what it never saw"
        )
    (obs_dim,), (act_dim,) = model.observation_space.shape, space.shape
    spec = Spec(obs_dim, act_dim, model.n_envs, torch.device(model.device))
    agent = SB3Agent(spec, SB3Config(normalize=normalizer is not None), model)
    if normalizer is not None:
        keep_statistics(agent, normalizer)
    return agent


def losses(model: Any, spec: Spec) -> Metrics:
    """What SB3 has logged since the last call, under our tags."""
    skip = {"n_updates", "learning_rate", "clip_range", "explained_variance"}  # no news; NaN where returns are constant
    row: Metrics = {}
    for name, value in model.logger.name_to_value.items():
        section, _, what = name.partition("/")
        if section == "train" and what not in skip and value is not None:
            row[f"losses/{what.removesuffix('_loss')}"] = torch.tensor(float(value), device=spec.device)
    model.logger.name_to_value.clear()  # TD3 does not log its actor at every update
    return row


def keep_statistics(agent: Agent, normalizer: Any) -> None:
    """VecNormalize's statistics into the agent's buffers."""
    for name in ("obs", "ret"):
        rms = getattr(normalizer, f"{name}_rms")
        for what in ("mean", "var", "count"):
            getattr(agent, f"{name}_{what}").copy_(torch.as_tensor(getattr(rms, what), dtype=torch.float64))


def give_statistics(agent: Agent, normalizer: Any) -> None:
    """Undo `keep_statistics`."""
    for name in ("obs", "ret"):
        rms = getattr(normalizer, f"{name}_rms")
        rms.mean, rms.var = (getattr(agent, f"{name}_{what}").cpu().numpy().copy() for what in ("mean", "var"))
        rms.count = float(getattr(agent, f"{name}_count"))


class Carried:
    """What SB3 carries from one rollout to the next beside networks and optimisers, as a part of a checkpoint.

    The observation to act on, the counters, the replay buffer, VecNormalize's running return, and the two generators
    that SB3 draws from besides torch's: numpy's global one and the action space's.
    """

    BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    COUNTERS = ("num_timesteps", "_n_updates", "_episode_num")

    def __init__(self, model: Any, normalizer: Any) -> None:
        self.model, self.normalizer = model, normalizer

    def save(self, folder: Path, previous: Path | None = None) -> None:
        """Write everything anew (`previous` is of no use to a ring that is one array)."""
        model = self.model
        _, keys, pos, has_gauss, cached = np.random.get_state()  # noqa: NPY002  (SB3 draws from it)
        arrays: dict[str, Any] = {
            "numpy": np.asarray(keys),
            "numpy_rest": np.array([pos, has_gauss, cached], np.float64),
            "action_space": rng_to_array(model.action_space.np_random),
            "counters": np.array([getattr(model, name) for name in self.COUNTERS], np.int64),
            "last_obs": model._last_obs,
            "last_starts": np.asarray(model._last_episode_starts),
        }
        if self.normalizer is not None:
            arrays |= {"returns": self.normalizer.returns, "raw_obs": self.normalizer.old_obs}
        if (buffer := getattr(model, "replay_buffer", None)) is not None:
            rows = buffer.buffer_size if buffer.full else buffer.pos
            arrays |= {f"buffer.{k}": getattr(buffer, k)[:rows] for k in self.BUFFER}
            arrays["buffer.pos"] = np.array(buffer.pos, np.int64)
        save_file({k: np.array(v, order="C") for k, v in arrays.items()}, folder / "carried.safetensors")

    def load(self, folder: Path) -> None:
        """Undo `save`; a buffer that has become larger since (a longer run) takes the old rows in their order."""
        model, arrays = self.model, load_file(folder / "carried.safetensors")
        pos, has_gauss, cached = arrays["numpy_rest"].tolist()
        np.random.set_state(("MT19937", arrays["numpy"], int(pos), int(has_gauss), cached))  # noqa: NPY002
        model.action_space._np_random = rng_from_array(arrays["action_space"])
        for name, value in zip(self.COUNTERS, arrays["counters"].tolist(), strict=True):
            setattr(model, name, value)
        model._last_obs, model._last_episode_starts = arrays["last_obs"], arrays["last_starts"]
        if self.normalizer is not None:
            self.normalizer.returns, self.normalizer.old_obs = arrays["returns"], arrays["raw_obs"]
            model._last_original_obs = arrays["raw_obs"]
        if (buffer := getattr(model, "replay_buffer", None)) is not None:
            oldest, rows = int(arrays["buffer.pos"]), len(arrays["buffer.rewards"])
            same = rows == buffer.buffer_size or oldest == rows  # the ring had not wrapped, or has the size it had
            for k in self.BUFFER:
                getattr(buffer, k)[:rows] = (
                    arrays[f"buffer.{k}"] if same else np.roll(arrays[f"buffer.{k}"], -oldest, 0)
                )
            buffer.full = rows == buffer.buffer_size
            buffer.pos = (oldest if same else rows) % buffer.buffer_size


class SB3PPO(SB3Agent):
    """PPO of Stable-Baselines3."""

    regime, Config, model_name = "on_policy", SB3PPOConfig, "PPO"


class SB3TRPO(SB3Agent):
    """TRPO of sb3-contrib."""

    regime, Config, library, model_name = "on_policy", SB3TRPOConfig, "sb3_contrib", "TRPO"


class SB3SAC(SB3Agent):
    """SAC of Stable-Baselines3."""

    regime, Config, model_name = "off_policy", SB3SACConfig, "SAC"


class SB3TD3(SB3Agent):
    """TD3 of Stable-Baselines3."""

    regime, Config, model_name = "off_policy", SB3TD3Config, "TD3"


class SB3TQC(SB3Agent):
    """TQC of sb3-contrib."""

    regime, Config, library, model_name = "off_policy", SB3TQCConfig, "sb3_contrib", "TQC"
