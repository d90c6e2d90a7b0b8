"""Simulated tasks on a GPU: physics, observations, rewards and resets without a byte crossing to the host."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlctl_envs.contract import EnvState, NonFiniteAction, StepResult, VecEnv, check_state
from rlctl_envs.engines.base import Physics, load_model
from rlctl_envs.engines.warp import WarpEngine, overflow_advice
from rlctl_envs.engines.warp_graph import Capture, Part, Program
from rlctl_envs.engines.warp_starts import RUNAWAY, PreparedStarts
from rlctl_envs.tasks import Task, TorchDraws, TorchOps

_log = logging.getLogger(__name__)


class WarpVecEnv(VecEnv):
    """A simulated `Task` in N copies on one device; see `VecEnv` for the contract and `MujocoVecEnv` for its sibling.

    A step is a fixed program over fixed memory (`rlctl_envs.engines.warp_graph`), captured at the first reset. Every
    world restarts by itself when its episode ends, from the task's own start distribution; a world whose state, reward
    or observation is no longer finite ends with `terminated`, reward 0 and the last valid observation, and is counted.
    Starts that take more than a draw and kinematics are made ahead, between two steps of every `episode_len` (see
    `rlctl_envs.engines.warp_starts`); a task that has such starts and ends early is refused.

    Nothing is read back while stepping. So an action that is not finite cannot raise at once: the world that got it
    ends like one that ran away, and `report` raises. `num_diverged` and `report` wait for the device.

    One generator on the device serves all copies; on a CUDA device runs of one seed are close but not bit-identical,
    because contacts are added up in no fixed order.

    Args:
        task: the task; it is bound to its model here.
        num_envs: number of copies, N.
        env_id: name reported as `id`; the task's name with "-v5" by default.
        seed: of the random stream; entropy of the machine by default.
        device: where everything happens: "cuda", "cuda:1", or "cpu" (for tests: slow).
        physics: "published" or "native" (see `rlctl_envs.engines.load_model`).
        dtype: of observations and rewards; the simulation is float32 in any case.
        episode_len: steps until truncation, where the task's own limit is not wanted.
        nconmax: room for contacts per world, on average over the worlds; None takes what the task is known to need.
        njmax: room for constraint rows of every world; None likewise.
        capture: "auto", "graph", "split" or "eager" (see `rlctl_envs.engines.warp_graph.Capture`).
    """

    can_checkpoint: bool = True
    can_stagger: bool = True

    def __init__(
        self,
        task: Task,
        num_envs: int = 1,
        *,
        env_id: str | None = None,
        seed: int | None = None,
        device: str | torch.device = "cuda",
        physics: Physics = "published",
        dtype: torch.dtype = torch.float32,
        episode_len: int | None = None,
        nconmax: int | None = None,
        njmax: int | None = None,
        capture: Capture = "auto",
    ) -> None:
        prepared = bool(task.fresh or task.settle_steps or task.clear_start)
        if prepared and task.terminates:
            raise ValueError(
                f"{type(task).__name__} cannot be simulated by the warp engine: its starts have to be simulated "
                "(fresh, settle_steps or clear_start), which is done once per time limit, but its episodes can end "
                "before. Use backend='cpu'."
            )
        model = load_model(task, physics)
        task.bind(model)
        name = env_id or f"{type(task).__name__}-v5"
        limit = task.episode_len if episode_len is None else episode_len
        self._describe(name, num_envs, task.observation_size(), int(model.nu), limit, _indexed(device), dtype)
        n, dev = self.num_envs, self.device
        self.task, self.physics = task, physics
        self.engine = WarpEngine(task, model, n, dev, prepared, nconmax, njmax)
        for name in task.constants:
            constant = torch.as_tensor(getattr(task, name), device=dev)
            setattr(task, name, constant.float() if constant.is_floating_point() else constant)
        self._xp = TorchOps(dev)
        self.generator = torch.Generator(dev)
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()
        self._draws = TorchDraws(self.generator)
        low, high = torch.as_tensor(model.actuator_ctrlrange.T.copy(), dtype=torch.float32, device=dev)
        self._half, self._middle = (high - low) / 2, (high + low) / 2
        self._qpos0 = torch.as_tensor(model.qpos0, dtype=torch.float32, device=dev)
        self._qvel0 = torch.zeros(model.nv, device=dev)
        # what a step reads and writes; never replaced, for a graph knows only addresses
        self._action = torch.zeros(n, self.act_dim, device=dev)
        self._refused = torch.zeros(n, dtype=torch.bool, device=dev)
        self._obs = torch.zeros(n, self.obs_dim, dtype=dtype, device=dev)
        self._next_obs = torch.zeros_like(self._obs)
        self._reward = torch.zeros(n, dtype=dtype, device=dev)
        self._terminated = torch.zeros(n, dtype=torch.bool, device=dev)
        self._truncated = torch.zeros(n, dtype=torch.bool, device=dev)
        self._before = torch.zeros(n, device=dev)
        self._after = torch.zeros(n, device=dev)
        if task.goal_dim:
            self.engine.sim.goal = torch.zeros(n, task.goal_dim, device=dev)
        self._next_goal = torch.zeros(n, task.goal_dim, device=dev)
        self._clock = torch.zeros(n, dtype=torch.int64, device=dev)
        self._counts = torch.zeros(2, dtype=torch.int64, device=dev)
        """Worlds ended because they ran away, and rows of actions that were not finite, since construction."""
        self._overflow = torch.zeros_like(self.engine.overflow)
        self._seen_overflow = 0
        self._seen_diverged = 0
        self._moves = task.progress(self._xp, self.engine.sim) is not None
        self._capture: Capture = capture
        self.program = Program(
            self.engine,
            [
                Part("torch", self._control),
                Part("warp", lambda: self.engine.step(task.frame_skip)),
                Part("torch", self._observe),
                Part("warp", self.engine.restart),
                Part("torch", self._begin),
            ],
            [self.generator],
        )
        self._starts: PreparedStarts | None = None
        if prepared:
            self._starts = PreparedStarts(self.engine, task, self._sample_starts, self.episode_len, [self.generator])
        self._started = False

    # ------------------------------------------------------------------------------------- the program of one step
    def _control(self) -> None:
        """Actions of [-1, 1] to the simulator's units; rows that are not finite become zero and are marked."""
        finite = self._action.isfinite().all(-1)
        torch.logical_not(finite, out=self._refused)
        action = torch.where(finite[:, None], self._action, 0.0).clamp_(-1.0, 1.0)
        self.engine.sim.ctrl.copy_(action * self._half + self._middle)

    def _observe(self) -> None:
        """What the step led to: successor, reward, ends of episodes, and where those worlds will start again."""
        task, xp, sim, mask = self.task, self._xp, self.engine.sim, self.engine.mask
        obs = torch.empty_like(self._obs)
        task.write_obs(xp, sim, obs)
        after = task.progress(xp, sim)
        healthy = task.healthy(xp, sim)
        before = self._before if self._moves else None
        reward = task.reward(xp, sim, sim.ctrl, before, after, healthy)
        good = (sim.state.abs() < RUNAWAY).all(-1) & obs.isfinite().all(-1) & reward.isfinite()
        good &= ~self._refused
        self._next_obs.copy_(torch.where(good[:, None], obs, self._obs))
        self._reward.copy_(torch.where(good, reward, 0.0))
        torch.logical_not(good & healthy if task.terminates else good, out=self._terminated)
        self._clock.add_(1)
        torch.ge(self._clock, self.episode_len, out=self._truncated)
        torch.logical_or(self._terminated, self._truncated, out=mask)
        self._counts.add_(torch.stack([(~good & ~self._refused).sum(), self._refused.sum()]))
        self._overflow.bitwise_or_(self.engine.overflow)
        if after is not None:
            self._after.copy_(after)
        self._draw_starts()

    def _draw_starts(self) -> None:
        """New starts and goals for all worlds; only those of the mask will use theirs."""
        if self._starts is None:
            self.engine.start.copy_(self._sample_starts())
        if self.task.goal_dim:
            self._next_goal.copy_(self.task.sample_goal(self._xp, self._draws, self.num_envs))

    def _sample_starts(self) -> Tensor:
        """Draws from the task's distribution [N, nq + nv]."""
        return torch.cat(self.task.sample_start(self._xp, self._draws, self.num_envs, self._qpos0, self._qvel0), 1)

    def _begin(self) -> None:
        """First observations of the worlds that have restarted."""
        sim, mask = self.engine.sim, self.engine.mask
        if self.task.goal_dim:
            sim.goal.copy_(torch.where(mask[:, None], self._next_goal, sim.goal))
        obs = torch.empty_like(self._obs)
        self.task.write_obs(self._xp, sim, obs)
        self._obs.copy_(torch.where(mask[:, None], obs, self._next_obs))
        if self._moves:
            self._before.copy_(torch.where(mask, self.task.progress(self._xp, sim), self._after))
        self._clock.masked_fill_(mask, 0)

    # ------------------------------------------------------------------------------------------------ the contract
    @property
    def current_obs(self) -> Tensor:
        """The observation [N, O] the next action answers."""
        self._require_started()
        return self._obs.clone()

    @torch.no_grad()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start every world anew; the first call compiles and captures the step. See `VecEnv.reset`."""
        self._check_open()
        self._check_options(options)
        self._build()
        if seed is not None:
            self.generator.manual_seed(seed)
        self._make_starts()
        self.engine.mask.fill_(True)
        self._draw_starts()
        with self.engine.scope():
            self.engine.restart()
        self._begin()
        self._make_starts()  # for the first restarts
        self._started = True
        return self._obs.clone(), {}

    def _make_starts(self) -> None:
        """A start for every world, where starts are prepared."""
        if self._starts is not None:
            try:
                self._starts.make_all()
            except RuntimeError as e:
                raise RuntimeError(f"{self.id}: {e}") from e

    def _build(self) -> None:
        """Compile and capture, once; leaves the random stream and the counts as they were."""
        if self.program.mode != "none":
            return
        kept = self.generator.get_state()
        if self._starts is not None:
            self._starts.build(self._capture)
        self.program.build(self._capture)
        if self._starts is not None and self.program.stumbled:  # its generator has a new state object
            self._starts.draw_anew()
        self.generator.set_state(kept)
        self._counts.zero_()
        self._overflow.zero_()

    def stagger(self) -> None:
        """Spread the episodes' ages over the time limit; see `VecEnv.stagger`."""
        self._require_started()
        self._clock.copy_(torch.from_numpy(self._staggered_ages()))

    @torch.no_grad()
    def step(self, actions: Tensor | NDArray[Any]) -> StepResult:
        """Advance every world by one step; see `VecEnv`."""
        if not self._started:
            self._require_started()
        actions = torch.as_tensor(actions)
        if actions.shape != self._action.shape:
            self._check_shape(tuple(actions.shape))
        self._action.copy_(actions)
        self.program()
        # the next step writes over its memory; what is handed out stays
        obs, next_obs, reward = self._obs.clone(), self._next_obs.clone(), self._reward.clone()
        terminated, truncated = self._terminated.clone(), self._truncated.clone()
        done = self.engine.mask.clone()
        if self._starts is not None:
            self._starts.tick()
        return obs, reward, terminated, truncated, {"next_obs": next_obs, "final_obs": next_obs, "_final_obs": done}

    @property
    def num_diverged(self) -> int:  # type: ignore[override]
        """Worlds that ran away and were ended, since construction; waits for the device."""
        return int(self._counts[0])

    def report(self) -> dict[str, float]:
        """Worlds that ran away, and worlds whose buffers overflowed, since construction; see `VecEnv.report`.

        Logs what is new. Raises NonFiniteAction when an action since the last report was not finite.
        """
        n = len(self._overflow)
        *bits, diverged, bad_actions = torch.cat([self._overflow.long(), self._counts]).tolist()
        if bad_actions:
            self._counts[1] = 0
            raise NonFiniteAction(
                f"{self.id}: {bad_actions} rows of actions were not finite since the last look. Actions are finite "
                "numbers in [-1, 1]; check the policy for divergence."
            )
        if diverged > self._seen_diverged:
            self._seen_diverged = diverged
            _log.warning("%s: simulations that diverged and were ended: %d so far.", self.id, diverged)
        lost = [b for b in bits if b and overflow_advice(b, 0, 0)]
        union = int(np.bitwise_or.reduce(lost)) if lost else 0
        if len(lost) > self._seen_overflow:
            self._seen_overflow = len(lost)
            advice = overflow_advice(union, self.engine.nconmax, self.engine.njmax)
            _log.warning(
                "%s: contacts or constraint rows did not fit their buffers in %d of %d worlds and were dropped: raise "
                "%s, e.g. --set env_options.njmax=%d --set env_options.nconmax=%d.",
                self.id, len(lost), n, advice, 2 * self.engine.njmax, 2 * self.engine.nconmax,
            )  # fmt: skip
        found = {"env/diverged": float(diverged), "env/overflowed_worlds": float(len(lost))}
        return {name: value for name, value in found.items() if value}

    def state(self) -> EnvState:
        """Simulator, random stream, episode clocks, current observation, as arrays; see `VecEnv.state`."""
        self._require_started()
        state: EnvState = {f"engine.{name}": x for name, x in self.engine.state().items()}
        tensors = self._held() | {"rng": self.generator.get_state()}
        state |= {name: x.cpu().numpy().copy() for name, x in tensors.items()}
        return state | ({"starts.age": np.array(self._starts.age)} if self._starts is not None else {})

    def _held(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the engine and the random stream."""
        held = {"clock": self._clock, "counts": self._counts, "obs": self._obs, "progress": self._before}
        held |= {"overflow": self._overflow}
        if self.task.goal_dim:
            held["goal"] = self.engine.sim.goal
        if self._starts is not None:
            held |= {f"starts.{name}": x for name, x in self._starts.state().items()}
        return held

    @torch.no_grad()
    def set_state(self, state: EnvState) -> None:
        """Continue from a `state` of the same task, settings, N and kind of device."""
        self._check_open()
        self._build()
        engine, own = self.engine.state(), self._held()
        expected = {f"engine.{name}": x.shape for name, x in engine.items()}
        expected |= {name: tuple(x.shape) for name, x in own.items()}
        expected |= {"starts.age": ()} if self._starts is not None else {}
        check_state(self, state, expected | {"rng": tuple(self.generator.get_state().shape)})
        self.engine.set_state({name: state[f"engine.{name}"] for name in engine})
        for name, x in own.items():
            x.copy_(torch.from_numpy(np.ascontiguousarray(state[name])))
        if self._starts is not None:
            self._starts.put_back()
            self._starts.age = int(state["starts.age"])
        self.generator.set_state(torch.from_numpy(np.ascontiguousarray(state["rng"])))
        self._started = True

    def close_extras(self, **kwargs: Any) -> None:
        """Refuse further work; memory goes with the object."""
        self._started = False

    def _require_started(self) -> None:
        """An error before the first reset or after close."""
        if not self._started:
            self._check_open()
            raise RuntimeError(f"{self.id}: call reset() before the first step.")

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError(f"{self.id}: the environment is closed.")


def _indexed(device: str | torch.device) -> torch.device:
    """The device, with the number of the current one where it is plain "cuda": warp and torch then agree on it."""
    device = torch.device(device)
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return device
