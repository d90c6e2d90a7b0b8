"""The VecEnv contract: resets, episode ends, checkpoints, errors, divergence, threads, Gymnasium's door."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from scipy import stats

import rlctl_envs
from rlctl_envs import engines
from rlctl_envs.contract import VecEnv, rng_from_array, rng_to_array
from rlctl_envs.engines import PoolEngine, batch_problem
from rlctl_envs.tasks import NUMPY, TASKS
from rlctl_envs.vector import MujocoVecEnv

BACKENDS = ("batch", "pool")
# Of the suite's tasks those that do what the others do not: draw targets, avoid contacts, fall first, integrate by RK4.
SUITE = ["hopper-hop", "cheetah-run", "finger-turn_easy", "fish-swim", "cartpole-swingup", "humanoid-walk"]
HAVE_MODELS = importlib.util.find_spec("dm_control") is not None


def suite_task(name: str) -> Any:
    """A parameter that is skipped where the models are not installed."""
    return pytest.param(f"dmc:{name}", marks=pytest.mark.skipif(not HAVE_MODELS, reason="needs the extra dmc"))


NAMES = [*TASKS, *map(suite_task, SUITE)]


def actions(env: VecEnv, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, env.num_envs, env.act_dim, generator=generator) * 2 - 1


def run(env: VecEnv, sequence: torch.Tensor) -> list[torch.Tensor]:
    """All that steps return, as one flat list."""
    seen: list[torch.Tensor] = []
    for action in sequence:
        *first, info = env.step(action)
        seen += [*first, info["next_obs"], info["_final_obs"]]
    return seen


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_batch_engine_passes_its_self_test_here() -> None:
    assert batch_problem() is None


def test_failed_self_test_degrades_to_the_pool_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "_compare_one_step", lambda: "xpos differs")
    batch_problem.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                env = rlctl_envs.make("Hopper")
                assert isinstance(env, MujocoVecEnv)
                assert isinstance(env.engine, PoolEngine)
        assert [r.getMessage() for r in caplog.records if "xpos differs" in r.getMessage()] != []
        assert len(caplog.records) == 1
    finally:
        batch_problem.cache_clear()


def test_self_test_notices_a_wrong_field(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the pass for contact forces cfrc_ext stays zero.
    original = engines.BatchEngine.step

    def without_forces(self: engines.BatchEngine, substeps: int) -> Any:
        self._contact_forces = False
        return original(self, substeps)

    monkeypatch.setattr(engines.BatchEngine, "step", without_forces)
    assert engines._compare_one_step() == "cfrc_ext differs from a plain simulation"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TASKS)
def test_shapes_types_and_spaces(name: str, backend: str) -> None:
    env = rlctl_envs.make(name, 3, seed=0, backend=backend)
    assert env.id == f"{name}-v5"
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.single_action_space == gymnasium.spaces.Box(-1.0, 1.0, (env.act_dim,), np.float32)
    assert env.observation_space.shape == (3, env.obs_dim)
    obs, info = env.reset()
    assert obs.shape == (3, TASKS[name].obs_dim)
    assert obs.dtype is torch.float32
    assert info == {}
    assert env.act_dim == TASKS[name].act_dim
    obs, reward, terminated, truncated, info = env.step(torch.zeros(3, env.act_dim))
    assert (reward.shape, reward.dtype) == ((3,), torch.float32)
    for flag in (terminated, truncated, info["_final_obs"]):
        assert (flag.shape, flag.dtype) == ((3,), torch.bool)
    assert torch.equal(info["next_obs"], obs)
    assert torch.equal(env.current_obs, obs)
    env.close()
    env.close()


@pytest.mark.parametrize("name", NAMES)
def test_thread_count_and_engine_do_not_change_results(name: str) -> None:
    results = []
    for backend, threads in (("batch", 1), ("batch", 2), ("pool", 1), ("pool", 3)):
        env = rlctl_envs.make(name, 5, seed=3, backend=backend, threads=threads)
        first, _ = env.reset()
        results.append([first, *run(env, actions(env, 60))])
        env.close()
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autoreset_and_true_successor(backend: str) -> None:
    """After an end, obs is a start state, next_obs the state that ended, and only the rows that ended differ."""
    env = rlctl_envs.make("Hopper", 6, seed=0, backend=backend, dtype=torch.float64)
    env.reset()
    ends = 0
    for action in actions(env, 150).double():
        obs, _, terminated, truncated, info = env.step(action)
        done = terminated | truncated
        assert torch.equal(info["_final_obs"], done)
        assert info["final_obs"] is info["next_obs"]
        assert torch.equal((obs != info["next_obs"]).any(1), done)
        # Hopper starts within 0.005 of z = 1.25 and ends below 0.7 or leaning more than 0.2.
        assert bool((obs[done][:, 0] - 1.25).abs().le(0.005).all())
        ended = info["next_obs"][terminated]
        assert bool(((ended[:, 0] <= 0.7) | (ended[:, 1].abs() >= 0.2)).all())
        ends += int(done.sum())
    assert ends > 5
    env.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_limit_is_per_episode(backend: str) -> None:
    """Episodes out of step with each other are each truncated after exactly their own number of steps."""
    limit = 40
    env = rlctl_envs.make("Hopper", 5, seed=1, backend=backend, episode_len=limit)
    env.reset()
    age = torch.zeros(5, dtype=torch.int64)
    seen_truncated = seen_terminated = 0
    # Small actions: some fall before the limit, some do not.
    for action in actions(env, 400):
        _, _, terminated, truncated, _ = env.step(0.7 * action)
        age += 1
        assert torch.equal(truncated, age >= limit)
        seen_truncated += int(truncated.sum())
        seen_terminated += int(terminated.sum())
        age[terminated | truncated] = 0
    assert seen_truncated > 3
    assert seen_terminated > 3
    env.close()


def test_default_time_limits() -> None:
    assert {name: task.episode_len for name, task in TASKS.items() if task.episode_len != 1000} == {
        "Reacher": 50,
        "Pusher": 100,
    }
    env = rlctl_envs.make("HalfCheetah", 2, seed=0)
    env.reset()
    zero = torch.zeros(2, env.act_dim)
    for step in range(1, 1001):
        _, _, terminated, truncated, info = env.step(zero)
        assert bool(truncated.all()) is (step == 1000)
        assert not terminated.any()
    assert not torch.equal(env.current_obs, info["next_obs"])
    env.close()


@pytest.mark.parametrize("name", TASKS)
def test_reset_distribution(name: str) -> None:
    """Start states against Gymnasium's own sampler (Kolmogorov-Smirnov, every coordinate)."""
    n = 4000
    theirs: Any = gymnasium.make(f"{name}-v5", disable_env_checker=True).unwrapped
    recorded: list[np.ndarray] = []
    # Only the draw is wanted: recording it instead of simulating makes thousands of resets cheap.
    theirs.set_state = lambda qpos, qvel: recorded.append(np.concatenate([qpos, qvel]))
    theirs.reset(seed=0)
    for _ in range(n - 1):
        theirs.reset_model()
    expected = np.stack(recorded)
    env = MujocoVecEnv(TASKS[name](), 1)
    qpos, qvel = env.task.sample_start(NUMPY, np.random.default_rng(1), n, theirs.init_qpos * 1.0, theirs.init_qvel)
    ours = np.concatenate([qpos, qvel], axis=1)
    if name == "Pusher":  # Gymnasium writes the cylinder into its own initial pose: the same in every later reset
        assert (np.hypot(qpos[:, -4], qpos[:, -3]) > 0.17).all()
    for column in range(ours.shape[1]):
        a, b = ours[:, column], expected[:, column]
        if a.std() < 1e-12:
            np.testing.assert_allclose(b, a, atol=1e-12)
            continue
        # About 150 coordinates are tested in all: 1e-5 each keeps the whole file's false alarms near 1 in 600.
        assert stats.ks_2samp(a, b).pvalue > 1e-5, f"coordinate {column}"
        assert a.std() == pytest.approx(b.std(), rel=0.05), f"coordinate {column}"
    env.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_identical(name: str, backend: str, tmp_path: Path) -> None:
    env = rlctl_envs.make(name, 4, seed=5, backend=backend, episode_len=30)
    env.reset()
    before, after = actions(env, 47, 1), actions(env, 70, 2)
    run(env, before)
    # Through a file without pickle, as a checkpoint would.
    np.savez(tmp_path / "env.npz", **env.state())  # type: ignore[arg-type]
    obs_then = env.current_obs.clone()
    expected = run(env, after)
    with np.load(tmp_path / "env.npz", allow_pickle=False) as file:
        state = dict(file)
    env.set_state(state)  # the same environment, gone on since
    assert torch.equal(env.current_obs, obs_then)
    assert_same(run(env, after), expected)
    env.close()
    for other_backend in BACKENDS:  # a new process would make a new one; the engine may differ
        fresh = rlctl_envs.make(name, 4, seed=99, backend=other_backend, episode_len=30)
        fresh.set_state(state)
        assert torch.equal(fresh.current_obs, obs_then)
        assert_same(run(fresh, after), expected)
        fresh.close()


def test_state_must_fit() -> None:
    env = rlctl_envs.make("Hopper", 2, seed=0)
    with pytest.raises(RuntimeError, match="reset"):
        env.state()
    env.reset()
    state = env.state()
    assert all(array.dtype != object for array in state.values())
    with pytest.raises(ValueError, match="shape"):
        rlctl_envs.make("Hopper", 3).set_state(state)
    with pytest.raises(ValueError, match="missing"):
        rlctl_envs.make("Ant", 2).set_state(state)
    with pytest.raises(ValueError, match="missing"):
        env.set_state({k: v for k, v in state.items() if k != "rng"})


def test_random_stream_round_trip() -> None:
    rng = np.random.Generator(np.random.PCG64(7))
    rng.integers(0, 10, dtype=np.int32)  # leaves half a draw in the buffer
    copy = rng_from_array(rng_to_array(rng))
    assert copy.integers(0, 1000, 9, dtype=np.int32).tolist() == rng.integers(0, 1000, 9, dtype=np.int32).tolist()


def test_seeds() -> None:
    def first(**kwargs: Any) -> torch.Tensor:
        env = rlctl_envs.make("Hopper", 4, **kwargs)
        return env.reset()[0]

    assert torch.equal(first(seed=1), first(seed=1))
    assert not torch.equal(first(seed=1), first(seed=2))
    assert not torch.equal(first(), first())
    env = rlctl_envs.make("Hopper", 4, seed=1)
    a, b = env.reset()[0], env.reset()[0]
    assert not torch.equal(a, b), "a reset without a seed goes on with the stream"
    assert torch.equal(env.reset(seed=1)[0], a)
    assert len({tuple(row.tolist()) for row in a}) == 4, "copies start differently"


@pytest.mark.parametrize(("name", "bound"), [("Humanoid", 0.4), ("Pusher", 2.0), ("InvertedPendulum", 3.0)])
def test_actions_are_clipped_then_rescaled(name: str, bound: float) -> None:
    env = rlctl_envs.make(name, 2, seed=0)
    assert isinstance(env, MujocoVecEnv)
    env.reset()
    env.step(np.stack([np.full(env.act_dim, 5.0), np.full(env.act_dim, -5.0)]))
    np.testing.assert_array_equal(env.engine.sim.ctrl[0], bound)
    np.testing.assert_array_equal(env.engine.sim.ctrl[1], -bound)
    env.reset()  # an episode that ends clears the controls: look at first steps only
    env.step(np.stack([np.ones(env.act_dim), -np.ones(env.act_dim)]))
    np.testing.assert_array_equal(env.engine.sim.ctrl, [[bound] * env.act_dim, [-bound] * env.act_dim])
    env.reset()
    env.step(torch.full((2, env.act_dim), 0.5))
    np.testing.assert_allclose(env.engine.sim.ctrl, 0.5 * bound, rtol=1e-7)
    env.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32])
def test_action_that_is_not_finite(bad: float, kind: Any) -> None:
    env = rlctl_envs.make("Hopper", 3, seed=0)
    env.reset()
    action: Any = torch.zeros(3, 3, dtype=kind) if isinstance(kind, torch.dtype) else np.zeros((3, 3), kind)
    action[1, 2] = bad
    with pytest.raises(ValueError, match=f"environment 1 is not finite: component 2 is {bad}"):
        env.step(action)
    action[1, 2] = 1e30  # merely large: clipped
    env.step(action)
    env.close()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 4), (3, 3, 1)])
def test_action_of_wrong_shape(shape: tuple[int, ...]) -> None:
    env = rlctl_envs.make("Hopper", 3, seed=0)
    env.reset()
    with pytest.raises(ValueError, match=r"must be \(3, 3\)"):
        env.step(torch.zeros(shape))


def test_action_kinds() -> None:
    results = []
    for action in ([[0, 1, -1]], np.array([[0, 1, -1]]), torch.tensor([[0.0, 1, -1]], requires_grad=True)):
        env = rlctl_envs.make("Hopper", 1, seed=0)
        env.reset()
        results.append(env.step(action)[0])  # type: ignore[arg-type]
        env.close()
    assert_same(results[:1] * 3, results)


def test_order_of_calls() -> None:
    env = rlctl_envs.make("Hopper", seed=0)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no options"):
        env.reset(options={"x": 1})
    env.reset()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(torch.zeros(1, 3)), lambda: env.current_obs, env.state):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_bad_settings() -> None:
    for kwargs, message in (
        ({"num_envs": 0}, "num_envs is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"physics": "newton"}, "physics is 'newton'"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"episode_len": 0}, "episode_len is 0"),
        ({"ctrl_cost_wieght": 1.0}, "did you mean 'ctrl_cost_weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            rlctl_envs.make("Hopper", **kwargs)  # type: ignore[arg-type]


def test_names() -> None:
    for name in ("Hopper", "hopper", "Hopper-v5", "HOPPER-V5"):
        assert rlctl_envs.make(name).id == "Hopper-v5"
        assert rlctl_envs.canonical(name) == "Hopper-v5"
    for name, near in (("Hoper", "Hopper"), ("Pendulm-v1", "Pendulum-v1"), ("probe:actoin", "probe:action")):
        with pytest.raises(rlctl_envs.UnknownTask, match=f"did you mean '{near}'.*rlctl envs") as caught:
            rlctl_envs.make(name)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_listing_agrees_with_the_environments_and_is_cheap() -> None:
    for row in rlctl_envs.task_table():
        if row["name"].startswith("dmc:") and not HAVE_MODELS:
            continue
        env = rlctl_envs.make(row["name"])
        assert (env.id, env.obs_dim, env.act_dim, env.episode_len) == (
            row["id"], row["obs_dim"], row["act_dim"], row["episode_len"],
        )  # fmt: skip
        env.close()
    # The task sizes come from class attributes: no model is compiled for a listing.
    code = "import sys, rlctl_envs; rlctl_envs.task_table(); print('mujoco' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_gymnasium_make_vec() -> None:
    env: Any = gymnasium.make_vec("rlctl_envs:rlctl/Hopper-v5", num_envs=4, ctrl_cost_weight=0.5, seed=0)
    assert isinstance(env, MujocoVecEnv)
    assert env.task.ctrl_cost_weight == 0.5  # type: ignore[attr-defined]
    env.reset(seed=0)
    obs, *_ = env.step(env.action_space.sample())
    assert obs.shape == (4, 11)
    env.close()
    assert "rlctl/dmc-hopper-stand" in gymnasium.registry
    if HAVE_MODELS:
        assert gymnasium.make_vec("rlctl_envs:rlctl/dmc-hopper-stand", num_envs=2).unwrapped.id == "dmc:hopper-stand"  # type: ignore[attr-defined]


def test_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        value = "other_package:factory"

        def load(self) -> Any:
            return lambda num_envs, **kwargs: rlctl_envs.make("Hopper", num_envs, **kwargs)

    monkeypatch.setattr("rlctl_envs.registry._plugins", lambda: {"myhopper": Point()})
    assert rlctl_envs.make("myhopper", 3).num_envs == 3
    assert "myhopper" in [row["name"] for row in rlctl_envs.task_table()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    ["HalfCheetah", "Hopper", "Ant", "InvertedDoublePendulum", suite_task("fish-swim"), suite_task("humanoid-walk")],
)
@pytest.mark.parametrize("poison", [1e11, float("nan")])
def test_divergence_ends_the_episode(name: str, backend: str, poison: float, caplog: pytest.LogCaptureFixture) -> None:
    env = rlctl_envs.make(name, 3, seed=0, backend=backend)
    assert isinstance(env, MujocoVecEnv)
    env.reset()
    env.step(torch.zeros(3, env.act_dim))
    last = env.current_obs.clone()
    # A state the simulator cannot go on from, planted the way a checkpoint is restored.
    state = env.state()
    column = 1 + env._qpos0.size  # rows are time, qpos, qvel, ...
    state["engine.rows"][1, column] = poison
    env.set_state(state)
    with caplog.at_level(logging.WARNING, logger="rlctl_envs"):
        obs, reward, terminated, truncated, info = env.step(torch.zeros(3, env.act_dim))
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    assert torch.equal(info["next_obs"][1], last[1])
    assert reward[1] == 0.0
    assert not torch.equal(obs[1], last[1])
    for tensor in (obs, reward, info["next_obs"]):
        assert bool(torch.isfinite(tensor).all())
    assert env.num_diverged == 1
    assert "diverged in environment 1" in caplog.text
    for action in actions(env, 20):
        obs, reward, *_ = env.step(action)
        assert bool(torch.isfinite(obs).all())
    assert env.num_diverged == 1, "a new episode does not inherit the old one's warning"
    env.close()


def test_no_log_file_in_the_working_folder(tmp_path: Path) -> None:
    code = (
        "import rlctl_envs, torch\n"
        "e = rlctl_envs.make('HalfCheetah', 2, seed=0); e.reset()\n"
        "e.engine.sim.qvel[0] = 1e9; e.step(torch.zeros(2, 6))\n"
        "assert e.num_diverged == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert list(tmp_path.iterdir()) == []
    assert "settotalmass" not in done.stdout + done.stderr


def test_staggered_worlds_reach_their_time_limits_in_turn() -> None:
    env = rlctl_envs.make("HalfCheetah", 4, seed=0, episode_len=20)
    env.reset(seed=0)
    env.stagger()
    ends: list[list[int]] = [[] for _ in range(4)]
    for t in range(1, 46):
        _, _, terminated, truncated, _ = env.step(torch.zeros(4, 6))
        assert not bool(terminated.any())
        for i in truncated.nonzero()[:, 0].tolist():
            ends[i].append(t)
    assert ends == [[20, 40], [15, 35], [10, 30], [5, 25, 45]]


def test_staggering_needs_a_reset_and_survives_a_checkpoint() -> None:
    env = rlctl_envs.make("HalfCheetah", 2, seed=0, episode_len=10)
    with pytest.raises(RuntimeError, match="reset"):
        env.stagger()
    env.reset(seed=0)
    env.stagger()
    other = rlctl_envs.make("HalfCheetah", 2, seed=1, episode_len=10)
    other.reset(seed=1)
    other.set_state(env.state())
    for _ in range(12):
        a, b = env.step(torch.zeros(2, 6)), other.step(torch.zeros(2, 6))
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
