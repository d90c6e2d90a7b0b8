"""The suite's tasks on the warp engine, on warp's CPU device; marked `gpu`: the same on CUDA."""

from __future__ import annotations

import logging
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

pytest.importorskip("mujoco_warp", reason="the extra 'warp' is not installed")

from dmc_helpers import check_starts, frozen, needs_models
from warp_helpers import compile_kernels, make, rollout, same

import rlctl_envs
from rlctl_envs.engines import load_model, warp_starts
from rlctl_envs.tasks import DMC_TASKS, NUMPY, SimState
from rlctl_envs.warp_vector import WarpVecEnv

pytestmark = [pytest.mark.timeout(1800), needs_models]  # a cold compile on a busy machine

DEFAULT_TASKS = ("cheetah-run", "finger-turn_easy")
"""Of the default suite: starts that settle; starts free of contact, a target, sensors of touch."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_task = pytest.mark.parametrize(
    "name", [name if name in DEFAULT_TASKS else pytest.param(name, marks=pytest.mark.slow) for name in DMC_TASKS]
)
settling_is_slow = pytest.mark.parametrize(
    "name", [name if name == "finger-turn_easy" else pytest.param(name, marks=pytest.mark.slow) for name in DMC_TASKS]
)

ERRORS: dict[str, tuple[float, float, float, float]] = {
    "hopper-stand": (5e-7, 9e-5, 6e-8, 6e-5),
    "hopper-hop": (5e-7, 9e-5, 2e-7, 6e-5),
    "cheetah-run": (1e-6, 1e-5, 2e-7, 1e-5),
    "walker-stand": (4e-6, 5e-5, 1e-7, 5e-5),
    "walker-walk": (4e-6, 5e-5, 3e-7, 5e-5),
    "walker-run": (4e-6, 5e-5, 2e-7, 5e-5),
    "finger-spin": (2e-7, 2e-5, 0.0, 3e-5),
    "finger-turn_easy": (5e-7, 9e-6, 0.0, 5e-6),
    "finger-turn_hard": (5e-7, 9e-6, 0.0, 5e-6),
    "fish-swim": (1e-6, 8e-6, 5e-7, 1e-5),
    "ball_in_cup-catch": (6e-8, 9e-7, 0.0, 8e-7),
    "cartpole-swingup": (1e-7, 2e-7, 1e-7, 4e-7),
    "pendulum-swingup": (6e-8, 3e-7, 0.0, 2e-7),
    "point_mass-easy": (2e-10, 1e-8, 1e-7, 3e-8),
    "reacher-easy": (1e-7, 2e-6, 0.0, 2e-6),
    "reacher-hard": (1e-7, 2e-6, 0.0, 2e-6),
    "acrobot-swingup": (1e-7, 2e-7, 1e-7, 5e-7),
    "humanoid-stand": (1e-5, 8e-5, 1e-7, 2e-4),
    "humanoid-walk": (1e-5, 8e-5, 1e-7, 2e-4),
    "humanoid-run": (1e-5, 8e-5, 4e-7, 2e-4),
}
"""Measured on warp's CPU device: over single steps from all recorded states the median and maximum of the largest
observation error and the maximum reward error; along recorded episodes of six steps the largest observation error. The
tests allow ten times as much, and never less than 1e-6."""


@pytest.fixture(scope="module", autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    compile_kernels(request, DEFAULT_TASKS)


def place(env: WarpVecEnv, qpos: Any, qvel: Any, warmstart: Any, goal: Any) -> None:
    env.reset()
    env.engine.load(qpos, qvel, warmstart)
    if env.task.goal_dim:
        env.engine.sim.goal.copy_(torch.from_numpy(goal))


def tensors(env: WarpVecEnv, *arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(x)).float().to(env.device) for x in arrays]


def step_errors(name: str, device: str) -> tuple[float, float, float]:
    """One step from every recorded state."""
    rows = frozen(name)
    episodes, steps, _ = rows["action"].shape
    n = episodes * steps
    env = make(name, n, device=device)
    place(env, *[rows[k][:, :-1].reshape(n, -1) for k in ("qpos", "qvel", "warmstart")], rows["goal"].repeat(steps, 0))
    action, expected, reward = tensors(
        env, rows["action"].reshape(n, -1), rows["obs"][:, 1:].reshape(n, -1), rows["reward"].reshape(n)
    )
    _, got, terminated, truncated, info = env.step(action)
    assert not (terminated | truncated).any()
    off = (info["next_obs"] - expected).abs().amax(1)
    return float(off.median()), float(off.max()), float((got - reward).abs().max())


def episode_error(name: str, device: str) -> float:
    """Along the recorded episodes, from their first states on."""
    rows = frozen(name)
    env = make(name, len(rows["action"]), device=device)
    place(env, rows["qpos"][:, 0], rows["qvel"][:, 0], rows["warmstart"][:, 0], rows["goal"])
    worst = 0.0
    for step in range(rows["action"].shape[1]):
        action, expected = tensors(env, rows["action"][:, step], rows["obs"][:, step + 1])
        worst = max(worst, float((env.step(action)[0] - expected).abs().max()))
    return worst


@pytest.mark.parametrize("device", DEVICES)
@every_task
def test_recorded_transitions(name: str, device: str) -> None:
    found = (*step_errors(name, device), episode_error(name, device))
    what = "median obs", "max obs", "max reward", "episodes"
    for label, got, measured in zip(what, found, ERRORS[name], strict=True):
        assert got <= 10 * max(measured, 1e-7), f"{label}: {got:.1e}, ten times {measured:.1e} is allowed"


def first_observations(env: WarpVecEnv) -> tuple[np.ndarray, np.ndarray]:
    """What MuJoCo's forward and the task's own code say of the states the worlds are in, and their contacts."""
    task = DMC_TASKS[next(name for name, cls in DMC_TASKS.items() if type(env.task) is cls)]()
    model = load_model(task)
    task.bind(model)
    state, data = env.engine.state(), mujoco.MjData(model)
    out, contacts = np.zeros((env.num_envs, env.obs_dim)), np.zeros(env.num_envs, int)
    for row in range(env.num_envs):
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = state["qpos"][row], state["qvel"][row]
        mujoco.mj_forward(model, data)
        full = np.concatenate([data.qpos, data.qvel])[None]
        derived = {field: np.array(getattr(data, field))[None] for field in task.derived}
        goal = env.engine.sim.goal[row : row + 1].numpy() if task.goal_dim else None
        sim = SimState(full[:, : model.nq], full[:, model.nq :], full, data.ctrl[None], goal=goal, **derived)
        task.write_obs(NUMPY, sim, out[row : row + 1])
        contacts[row] = data.ncon
    return out, contacts


@every_task
def test_starts_are_those_of_a_full_forward(name: str) -> None:
    """Observations that begin an episode, at the reset and after a time limit: forces of contact included."""
    env = make(name, 16, episode_len=3)
    action = torch.full((16, env.act_dim), 0.5)
    seen = []
    for _ in range(3):
        obs = env.reset(seed=4)[0] if not seen else [env.step(action)[0] for _ in range(3)][-1]
        expected, contacts = first_observations(env)
        np.testing.assert_allclose(obs.numpy(), expected, atol=2e-4, rtol=2e-4)
        seen.append(obs)
        if env.task.clear_start:
            assert not contacts.any()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@settling_is_slow
def test_start_distribution(name: str) -> None:
    """Every coordinate of states, targets and first observations: at the reset, and of worlds that started again."""
    n = 500 if name == "cheetah-run" else 4000
    env = make(name, n, episode_len=1, capture="eager" if name != "cheetah-run" else "split")
    for obs in (env.reset()[0], env.step(torch.zeros(n, env.act_dim))[0]):
        sim = env.engine.sim
        goal = sim.goal if env.task.goal_dim else torch.zeros(n, 0)
        check_starts(name, torch.cat([sim.state, goal, obs], 1).numpy())


def test_the_cheetah_falls_as_the_suites_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds of falling from the same draws. In float32: contacts amplify the rounding."""
    rows = frozen("cheetah-run")
    shares, fallen = rows["fall_draw"], rows["fall_obs"]
    env = make("cheetah-run", len(shares))

    class Draws:
        def uniform(self, low: float, high: float, size: tuple[int, ...]) -> torch.Tensor:
            out = torch.full(size, 0.5)
            out[:, 3:] = torch.from_numpy(shares)
            return out

    monkeypatch.setattr(env, "_draws", Draws())
    off = np.abs(env.reset()[0].numpy() - fallen)
    assert np.median(off.max(1)) < 1e-3
    assert off.max() < 0.1


@settling_is_slow
def test_captured_equals_eager(name: str) -> None:
    """Over the ends of episodes, settling and redrawing included."""
    results = []
    for capture in ("eager", "split"):
        env = make(name, capture=capture, episode_len=7)
        env.reset(seed=1)
        assert env.program.mode == capture
        results.append(rollout(env, 16))
    assert same(*results)


def test_making_starts_leaves_the_running_worlds_alone() -> None:
    """Two copies of a run, one of which makes starts before every step, from a random stream of their own."""
    runs = []
    for often in (False, True):
        env = make("finger-turn_easy", episode_len=50)
        env.reset(seed=1)
        seen = []
        for k in range(12):
            if often:
                kept = env.generator.get_state()
                env._starts.make()  # type: ignore[union-attr]
                env.generator.set_state(kept)
            seen += rollout(env, 1, seed=k)
        runs.append(seen)
    assert same(*runs)


@pytest.mark.parametrize("name", DEFAULT_TASKS)
def test_worlds_start_again_at_their_own_time(name: str) -> None:
    """At each world's limit it begins anew, from a state nobody has begun from, with a target of its own."""
    n, limit = 5, 10
    env = make(name, n, episode_len=limit)
    first, _ = env.reset(seed=3)
    env.stagger()
    begun = [[row] for row in first]
    goals = [env.engine.sim.goal.clone()] if env.task.goal_dim else []
    for step in range(1, 31):
        obs, _, terminated, truncated, info = env.step(torch.zeros(n, env.act_dim))
        assert not terminated.any()
        due = [(step + age) % limit == 0 for age in (0, 2, 4, 6, 8)]
        assert truncated.tolist() == due
        assert (obs != info["next_obs"]).any(1).tolist() == due
        for world in range(n):
            if due[world]:
                begun[world].append(obs[world])
        if goals:
            assert (env.engine.sim.goal != goals[-1]).any(1).tolist() == due
            goals.append(env.engine.sim.goal.clone())
    starts = torch.stack([row for rows in begun for row in rows])
    assert len(starts) == 4 * n
    assert len(starts.unique(dim=0)) == 4 * n


@pytest.mark.parametrize("name", ["finger-turn_easy", pytest.param("cheetah-run", marks=pytest.mark.slow)])
def test_resume_is_bit_identical(name: str) -> None:
    env = make(name, episode_len=9)
    env.reset(seed=3)
    rollout(env, 5)
    state = {k: v.copy() for k, v in env.state().items()}
    expected = rollout(env, 25, seed=5)
    other = make(name, episode_len=9, seed=11, capture="eager")
    other.set_state(state)
    assert torch.equal(other.current_obs, torch.from_numpy(state["obs"]))
    assert same(rollout(other, 25, seed=5), expected)
    for missing in ("starts.start", "starts.first.qacc_warmstart", "starts.age"):
        with pytest.raises(ValueError, match=f"missing \\['{missing}'\\]"):
            other.set_state({k: v for k, v in state.items() if k != missing})


def test_a_world_that_is_not_finite_starts_again() -> None:
    env = make("finger-turn_easy", episode_len=50)
    env.reset(seed=2)
    broken = env.engine.state()
    broken["qvel"][1] = np.nan
    env.engine.set_state(broken)
    obs, reward, terminated, _, _ = env.step(torch.zeros(4, 2))
    assert terminated.tolist() == [False, True, False, False]
    assert reward[1] == 0
    expected, contacts = first_observations(env)
    np.testing.assert_allclose(obs[1].numpy(), expected[1], atol=1e-5)
    assert contacts[1] == 0
    assert all(bool(x.isfinite().all()) for x in rollout(env, 5))
    assert env.report() == {"env/diverged": 1.0}


def test_starts_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a reset that is an error; later a world keeps the start it has."""
    env = make("finger-turn_easy", episode_len=4)
    env.reset(seed=1)
    before = env.engine.start.clone()
    unlucky, starts = torch.tensor([True, False, True, False]), env._starts
    assert starts is not None
    end = starts._end

    def some() -> None:
        """No draw is good in the unlucky worlds."""
        starts._missing.logical_and_(~unlucky)
        end()
        starts._missing.logical_or_(unlucky)

    monkeypatch.setattr(starts, "_end", some)
    rollout(env, 4)
    assert (env.engine.start != before).any(1).tolist() == [False, True, False, True]
    monkeypatch.setattr(warp_starts, "MAX_DRAWS", 3)
    with pytest.raises(RuntimeError, match="FingerTurnEasy-v5: no start without contact in 3 draws of environment 0"):
        env.reset()


def stuck(rng: np.random.Generator) -> np.ndarray:
    """A pose of the finger with two contacts, none of them slight."""
    model = load_model(DMC_TASKS["finger-turn_easy"]())
    data = mujoco.MjData(model)
    while data.ncon != 2 or data.contact.dist.max() > -1e-3:
        data.qpos[:] = rng.uniform(-np.pi, np.pi, 3)
        mujoco.mj_forward(model, data)
    return np.concatenate([data.qpos, data.qvel])


@pytest.mark.parametrize(("nconmax", "expected"), [(16, [False, *[True] * 7]), (1, [True] * 8)])
def test_contacts_are_found_and_a_buffer_too_small_to_tell_means_contact(nconmax: int, expected: list[bool]) -> None:
    engine = make("finger-turn_easy", 8, nconmax=nconmax).engine
    engine.start.copy_(torch.from_numpy(stuck(np.random.default_rng(0))))
    engine.start[0] = torch.tensor([1.5, 0.0, 0.0, 0.0, 0.0, 0.0])  # the finger points away from the spinner
    with engine.scope():
        engine.put_starts()
        engine.find_contacts()
    found = max(int(count.numpy()[0]) for count in (engine._data.nacon, engine._data.ncollision))
    assert found >= 14
    assert engine.touching.tolist() == expected


@pytest.mark.slow  # kernels for a buffer of another size
def test_what_is_lost_while_settling_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    env = make("cheetah-run", njmax=1, episode_len=100)
    env.reset()
    with caplog.at_level(logging.WARNING):
        rollout(env, 1)
        assert env.report()["env/overflowed_worlds"] > 0
    assert "njmax (now 1 constraint rows per world)" in caplog.text


def test_what_the_engine_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = DMC_TASKS["finger-spin"]
    monkeypatch.setattr(task, "terminates", property(lambda _: True))
    with pytest.raises(ValueError, match=r"FingerSpin cannot be simulated .* its episodes can end before"):
        make("finger-spin")
    monkeypatch.undo()

    def with_a_limit(self: Any) -> Any:
        spec = mujoco.MjSpec.from_file(str(self.model_path()))
        kind, joint = mujoco.mjtSensor.mjSENS_JOINTLIMITPOS, mujoco.mjtObj.mjOBJ_JOINT
        spec.add_sensor(name="limit", type=kind, objtype=joint, objname="distal")
        return spec.compile()

    monkeypatch.setattr(task, "compile_model", with_a_limit)
    with pytest.raises(ValueError, match="does not refresh sensors of kind JOINTLIMITPOS after a step"):
        make("finger-spin")


def test_by_name() -> None:
    env = rlctl_envs.make("dmc:finger-turn_easy", 2, backend="warp", seed=0)
    obs, _ = env.reset()
    assert isinstance(env, WarpVecEnv)
    assert (env.id, tuple(obs.shape), env.episode_len) == ("dmc:finger-turn_easy", (2, 12), 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DMC_TASKS)
def test_gpu_capture_equals_eager(name: str) -> None:
    """One step from one state: contacts are summed in no fixed order, so to rounding and not to the bit."""
    rows = frozen(name)
    results = []
    for capture in ("eager", "split", "graph"):
        env = make(name, len(rows["action"]), device="cuda", capture=capture)
        place(env, rows["qpos"][:, 0], rows["qvel"][:, 0], rows["warmstart"][:, 0], rows["goal"])
        assert env.program.mode == capture
        obs, reward, *_ = env.step(*tensors(env, rows["action"][:, 0]))
        results.append((obs, reward))
    for obs, reward in results[1:]:
        torch.testing.assert_close(obs, results[0][0], atol=10 * max(ERRORS[name][1], 1e-7), rtol=1e-3)
        torch.testing.assert_close(reward, results[0][1], atol=10 * max(ERRORS[name][2], 1e-7), rtol=1e-3)
