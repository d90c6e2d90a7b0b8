"""The warp engine on warp's CPU device, which computes what it would on a GPU; marked `gpu`: the same there.

The first run on a machine compiles the kernels, a minute or two; after that they are cached.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

pytest.importorskip("mujoco_warp", reason="the extra 'warp' is not installed")

from warp_helpers import DEFAULT_TASKS, compile_kernels, gymnasium_steps, make, rollout, same

import rlctl
import rlctl_envs
from rlctl_envs.contract import NonFiniteAction
from rlctl_envs.engines import load_model
from rlctl_envs.tasks import NUMPY, TASKS, SimState

pytestmark = pytest.mark.timeout(1800)  # a cold compile on a busy machine

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_task = pytest.mark.parametrize(
    "name", [name if name in DEFAULT_TASKS else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]
)

ONE_STEP: dict[str, tuple[float, float, float]] = {
    "Hopper": (5e-7, 2e-6, 7e-7),
    "Walker2d": (7e-6, 6e-5, 2e-6),
    "HalfCheetah": (8e-6, 2e-4, 3e-6),
    "Swimmer": (4e-7, 2e-6, 6e-7),
    "Ant": (1e-6, 5e-5, 4e-6),
    "Humanoid": (2e-5, 2e-2, 3e-5),
    "HumanoidStandup": (8e-4, 2e-2, 8e-6),
    "Reacher": (5e-7, 4e-6, 1e-6),
    "Pusher": (5e-7, 4e-6, 1e-6),
    "InvertedPendulum": (5e-7, 4e-6, 1e-6),
    "InvertedDoublePendulum": (5e-7, 4e-6, 1e-6),
}
"""Measured on warp's CPU device over 64 states: median and maximum over states of the largest observation error, and
maximum reward error. The tests allow ten times as much."""


@pytest.fixture(scope="module", autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    compile_kernels(request)


def errors(name: str, **options: Any) -> tuple[float, float, float, int]:
    """One step of the warp engine against Gymnasium's: as in `ONE_STEP`, and how many terminations differ."""
    theirs = gymnasium_steps(name, 64)
    frames = options.pop("frames", True)
    env = make(name, 64, physics="native", **options)
    if not frames:
        env.engine._model.callback.contactfilter = None
    env.reset()
    env.engine.load(theirs.qpos, theirs.qvel, theirs.warm)
    env._before.copy_(torch.from_numpy(theirs.before))
    _, reward, terminated, _, info = env.step(torch.from_numpy(theirs.action))
    off = np.abs(info["next_obs"].cpu().numpy() - theirs.obs).max(1)
    wrong = int((terminated.cpu().numpy() != theirs.terminated).sum())
    return float(np.median(off)), off.max(), np.abs(reward.cpu().numpy() - theirs.reward).max(), wrong


@pytest.mark.parametrize("device", DEVICES)
@every_task
def test_one_step_agrees_with_gymnasium(name: str, device: str) -> None:
    *found, wrong = errors(name, device=device)
    assert wrong == 0
    for what, got, measured in zip(("median obs", "max obs", "max reward"), found, ONE_STEP[name], strict=True):
        assert got <= 10 * measured, f"{what}: {got:.1e}, ten times {measured:.1e} is allowed"


def test_without_the_frame_correction_ant_would_fail() -> None:
    _, obs, reward, _ = errors("Ant", frames=False, capture="eager")
    assert obs > 0.1
    assert reward > 0.01


@every_task
def test_starts_are_those_of_a_full_forward(name: str) -> None:
    """The first observation, derived fields included, is what MuJoCo computes at that state."""
    env = make(name, 3, dtype=torch.float64)
    obs, _ = env.reset(seed=4)
    state = env.engine.state()
    task = TASKS[name]()
    model = load_model(task)
    task.bind(model)
    for row in range(3):
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = state["qpos"][row], state["qvel"][row]
        mujoco.mj_forward(model, data)
        full = np.concatenate([data.qpos, data.qvel])[None]
        derived = {field: np.array(getattr(data, field))[None] for field in task.derived}
        sim = SimState(full[:, : model.nq], full[:, model.nq :], full, data.ctrl[None], **derived)
        expected = np.zeros((1, env.obs_dim))
        task.write_obs(NUMPY, sim, expected)
        np.testing.assert_allclose(obs[row].numpy(), expected[0], atol=1e-4, rtol=1e-5)


@every_task
def test_captured_equals_eager(name: str) -> None:
    """Over episode ends: `split` replays warp's part of the step from a graph, on the CPU too."""
    results = []
    for capture in ("eager", "split"):
        env = make(name, capture=capture, episode_len=7)
        env.reset(seed=1)
        assert env.program.mode == capture
        results.append(rollout(env, 20))
    assert same(*results)
    assert sum(int(done.sum()) for done in results[0][5::6]) >= 2 * 4


def test_seeds() -> None:
    env = make("Hopper")
    runs = []
    for seed in (1, 1, 2, None):
        obs, _ = env.reset(seed=seed)
        runs.append([obs, *rollout(env, 12)])
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(runs[2][0], runs[3][0])  # without a seed the stream goes on
    other = make("Hopper", seed=7)
    assert not torch.equal(other.reset()[0], make("Hopper", seed=8).reset()[0])
    assert torch.equal(make("Hopper", seed=7).reset()[0], make("Hopper", seed=7).reset()[0])


def check_restart(env: Any) -> None:
    """Restart worlds 1 and 3 of four: the engine's state of 0 and 2 stays, bit for bit."""
    before = env.engine.state()
    env.engine.mask.copy_(torch.tensor([False, True, False, True]))
    with env.engine.scope():
        env.engine.restart()
    after = env.engine.state()
    for field, rows in before.items():
        np.testing.assert_array_equal(after[field][[0, 2]], rows[[0, 2]])
        assert not np.array_equal(after[field][1], rows[1])
    assert (after["warm"][[1, 3]] == 0).all()


def test_a_restart_touches_only_its_own_worlds() -> None:
    """Two copies of a run, one of which restarts worlds 1 and 3: worlds 0 and 2 never notice."""
    runs = []
    for restart in (False, True):
        env = make("Ant")
        env.reset(seed=1)
        rollout(env, 5)
        if restart:
            check_restart(env)
        runs.append([x[[0, 2]] for x in rollout(env, 5, seed=9)])
    assert same(*runs)


def test_time_limits_are_each_worlds_own() -> None:
    env = make("Reacher", 5, episode_len=10)
    env.reset()
    env.stagger()
    truncated = torch.stack([env.step(torch.zeros(5, 2))[3] for _ in range(20)])
    for world, age in enumerate([0, 2, 4, 6, 8]):
        assert truncated[:, world].nonzero().flatten().tolist() == [9 - age, 19 - age]


def test_a_world_that_is_not_finite_ends_and_starts_again(caplog: pytest.LogCaptureFixture) -> None:
    env, twin = make("Hopper"), make("Hopper")
    start, _ = env.reset(seed=2)
    twin.reset(seed=2)
    broken = env.engine.state()
    broken["qvel"][1] = np.nan
    env.engine.set_state(broken)
    action = torch.full((4, 3), 0.2)
    obs, reward, terminated, truncated, info = env.step(action)
    fine = twin.step(action)
    assert terminated.tolist() == [False, True, False, False]
    assert not truncated.any()
    assert reward[1] == 0
    assert torch.equal(info["next_obs"][1], start[1])
    others = [0, 2, 3]
    assert torch.equal(obs[others], fine[0][others])
    assert torch.equal(reward[others], fine[1][others])
    assert env.num_diverged == 1
    with caplog.at_level(logging.WARNING):
        assert env.report() == {"env/diverged": 1.0}
    assert "diverged" in caplog.text
    later = rollout(env, 5)
    assert all(bool(x.isfinite().all()) for x in later)
    assert env.num_diverged == 1


def test_an_action_that_is_not_finite_is_reported() -> None:
    env = make("Hopper")
    env.reset()
    action = torch.zeros(4, 3)
    action[2, 1] = torch.nan
    obs, _, terminated, _, _ = env.step(action)
    assert terminated.tolist() == [False, False, True, False]
    assert bool(obs.isfinite().all())
    with pytest.raises(NonFiniteAction, match="1 rows of actions"):
        env.report()
    assert env.report() == {}
    assert env.num_diverged == 0


def test_actions_are_clipped_and_checked() -> None:
    env = make("Hopper")
    outcomes = []
    for action in (torch.full((4, 3), 5.0), torch.ones(4, 3), np.ones((4, 3))):
        env.reset(seed=1)
        outcomes.append(env.step(action)[0])
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[1], outcomes[2])
    with pytest.raises(ValueError, match=r"shape \(4, 2\)"):
        env.step(torch.zeros(4, 2))


def test_a_full_buffer_is_reported_with_what_to_raise(caplog: pytest.LogCaptureFixture) -> None:
    env = make("Hopper", njmax=2, episode_len=30)
    env.reset()
    with caplog.at_level(logging.WARNING):
        rollout(env, 60)  # resets clear the engine's own flags
        assert env.report()["env/overflowed_worlds"] > 0
        assert "njmax (now 2 constraint rows per world)" in caplog.text
        caplog.clear()
        env.report()
        assert not caplog.text  # said once
    roomy = make("Hopper")
    roomy.reset()
    rollout(roomy, 60)
    assert roomy.report() == {}
    with pytest.raises(ValueError, match="nconmax is 0"):
        make("Hopper", nconmax=0)


def test_tensors_share_memory_with_the_simulator_and_outputs_do_not() -> None:
    env = make("Ant")
    env.reset()
    data = env.engine._data
    assert env.engine.sim.cfrc_ext.data_ptr() == data.cfrc_ext.ptr
    assert env.engine.sim.ctrl.data_ptr() == data.ctrl.ptr
    results = [env.step(torch.full((4, 8), 0.1 * k)) for k in range(2)]
    kept = [x.clone() for x in results[0][:4]]
    addresses = [r[0].data_ptr() for r in results]
    env.step(torch.zeros(4, 8))
    assert all(torch.equal(x, y) for x, y in zip(results[0][:4], kept, strict=True))
    assert len(set(addresses)) == 2
    assert torch.equal(env.current_obs, env.current_obs)


@pytest.mark.parametrize("name", ["Hopper", pytest.param("Ant", marks=pytest.mark.slow)])
def test_resume_is_bit_identical(name: str) -> None:
    env = make(name, episode_len=9)
    env.reset(seed=3)
    rollout(env, 5)
    state = {k: v.copy() for k, v in env.state().items()}
    expected = rollout(env, 15, seed=5)
    other = make(name, episode_len=9, seed=11, capture="eager")
    other.set_state(state)
    assert torch.equal(other.current_obs, torch.from_numpy(state["obs"]))
    assert same(rollout(other, 15, seed=5), expected)
    with pytest.raises(ValueError, match="the state does not fit"):
        other.set_state({k: v for k, v in state.items() if k != "clock"})
    with pytest.raises(ValueError, match="must be"):
        make(name, 3).set_state(state)


def test_before_the_first_reset_and_after_close() -> None:
    env = make("Reacher")
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(torch.zeros(4, 2))
    env.reset()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(torch.zeros(4, 2))
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()


def test_physics_and_options() -> None:
    margins = {
        physics: make("Hopper", physics=physics).engine._model.geom_margin.numpy()
        for physics in ("native", "published")
    }
    expected = load_model(TASKS["Hopper"](), "published").geom_margin
    np.testing.assert_allclose(margins["published"].flatten(), expected, rtol=1e-6)
    np.testing.assert_allclose(margins["native"], 2 * margins["published"], rtol=1e-6)
    env = rlctl_envs.make("Hopper", 2, backend="warp", capture="eager", njmax=40, ctrl_cost_weight=0.0)
    env.reset()
    assert (env.engine.njmax, env.program.mode, env.task.ctrl_cost_weight) == (40, "eager", 0.0)  # type: ignore[attr-defined]
    assert env.program.reason == "as asked"  # type: ignore[attr-defined]
    for capture, message in (("graph", "needs a CUDA device"), ("fast", "it is one of auto, graph")):
        with pytest.raises(ValueError, match=message):
            make("Hopper", capture=capture).reset()


def test_a_failed_capture_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rlctl_envs.engines.warp_graph import Program

    def refuse(self: Any) -> None:
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(Program, "_several_graphs", refuse)
    env = make("Hopper")
    with caplog.at_level(logging.WARNING):
        env.reset(seed=1)
    assert env.program.mode == "eager"
    assert "no graphs today" in env.program.reason
    assert "no graphs today" in caplog.text
    monkeypatch.undo()
    captured = make("Hopper")
    captured.reset(seed=1)
    assert same(rollout(env, 4), rollout(captured, 4))


@pytest.mark.parametrize("algo", ["ppo", "sac"])
@pytest.mark.parametrize("device", DEVICES)
def test_agents_learn_on_it(algo: str, device: str) -> None:
    """Rollouts, normalisers, replay and updates on tensors that come straight from the simulator."""
    from rlctl.agents.ppo import PPOConfig
    from rlctl.agents.sac import SACConfig

    env = make("Hopper", 8, episode_len=20, device=device)
    run = rlctl.Run(make_eval_env=lambda n, seed: make("Hopper", n, episode_len=20, seed=seed, device=device))
    run.config = rlctl.RunConfig(evaluations=1, eval_episodes=4, final_episodes=0)
    if algo == "ppo":
        agent = rlctl.make_agent("ppo", env, PPOConfig(num_envs=8, horizon=16, minibatch_size=32, steps=384))
        rlctl.accelerate(agent)
        rlctl.on_policy(agent, env, run)
    else:
        cfg = SACConfig(num_envs=8, learning_starts=64, steps=128, batch_size=32, hidden=(32, 32))
        agent = rlctl.make_agent("sac", env, cfg)
        rlctl.accelerate(agent)
        rlctl.off_policy(agent, env, rlctl.Ring(1000, device), run)
    run.finish(agent)
    assert run.updates == {"ppo": 3, "sac": 64}[algo]
    assert run.episodes.length.max() <= 20
    assert run.last_eval is not None
    assert all(bool(x.isfinite().all()) for x in agent.state_dict().values())


@pytest.mark.slow
def test_kernels_are_cached_between_processes() -> None:
    import warp as wp

    cache = Path(wp.config.kernel_cache_dir)
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*.o")}
    assert before
    code = "from warp_helpers import make; make('Hopper', 2).reset()"
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {[here, *sys.path]!r}; {code}"], check=True)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.o")} == before


# ------------------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_gpu_capture_equals_eager(name: str) -> None:
    """One step from one state: contacts are summed in no fixed order, so to rounding and not to the bit."""
    obs, rewards = [], []
    for capture in ("eager", "split", "graph"):
        env = make(name, 64, device="cuda", capture=capture)
        env.reset(seed=1)
        assert env.program.mode == capture
        first, reward, *_ = env.step(torch.full((64, env.act_dim), 0.3, device="cuda"))
        obs.append(first)
        rewards.append(reward)
    for k in (1, 2):
        torch.testing.assert_close(obs[k], obs[0], atol=10 * ONE_STEP[name][1], rtol=1e-3)
        torch.testing.assert_close(rewards[k], rewards[0], atol=10 * ONE_STEP[name][2], rtol=1e-3)


@pytest.mark.gpu
def test_gpu_replays_draw_fresh_starts() -> None:
    env = make("Hopper", 64, device="cuda", episode_len=1)
    env.reset(seed=1)
    assert env.program.mode == "graph"
    starts = torch.stack([env.step(torch.zeros(64, 3, device="cuda"))[0] for _ in range(5)])
    assert len(starts.flatten(0, 1).unique(dim=0)) == 5 * 64


@pytest.mark.gpu
def test_gpu_a_restart_touches_only_its_own_worlds() -> None:
    env = make("Ant", device="cuda")
    env.reset(seed=1)
    for _ in range(5):
        env.step(torch.full((4, 8), 0.3, device="cuda"))
    check_restart(env)


@pytest.mark.gpu
def test_gpu_trouble_ends_a_world_and_is_told() -> None:
    env = make("Hopper", device="cuda")
    start, _ = env.reset(seed=2)
    broken = env.engine.state()
    broken["qvel"][1] = np.nan
    env.engine.set_state(broken)
    obs, reward, terminated, _, info = env.step(torch.full((4, 3), 0.2, device="cuda"))
    assert terminated.tolist() == [False, True, False, False]
    assert reward[1] == 0
    assert torch.equal(info["next_obs"][1], start[1])
    assert bool(obs.isfinite().all())
    assert env.report() == {"env/diverged": 1.0}
    env.step(torch.full((4, 3), torch.nan, device="cuda"))
    with pytest.raises(NonFiniteAction, match="4 rows of actions"):
        env.report()
    cramped = make("Hopper", device="cuda", njmax=2)
    cramped.reset(seed=1)
    for _ in range(60):
        cramped.step(torch.rand(4, 3, device="cuda") * 2 - 1)
    assert cramped.report()["env/overflowed_worlds"] > 0


@pytest.mark.gpu
def test_gpu_seeds_and_states() -> None:
    """A seed gives the same starts; a state taken and put back goes on alike, to rounding."""
    env, other = (make("Hopper", 32, device="cuda", seed=k) for k in (1, 2))
    starts = [env.reset(seed=5)[0], other.reset(seed=5)[0], env.reset(seed=6)[0]]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    action = torch.full((32, 3), 0.3, device="cuda")
    for _ in range(5):
        env.step(action)
    other.set_state(env.state())
    assert torch.equal(other.current_obs, env.current_obs)
    first, second = env.step(action), other.step(action)
    torch.testing.assert_close(first[:2], second[:2], atol=10 * ONE_STEP["Hopper"][1], rtol=1e-3)


@pytest.mark.gpu
def test_gpu_memory_of_the_graph_is_its_own() -> None:
    """What others allocate and fill after the capture changes no step, though the solver's loops interrupt it."""
    quiet, loud = (make("Hopper", 256, device="cuda") for _ in range(2))
    action = torch.full((256, 3), 0.3, device="cuda")
    for env in (quiet, loud):
        env.reset(seed=1)
        assert env.program.mode == "graph"
    for _ in range(3):
        expected = quiet.step(action)
        noise = [torch.full((2**k,), 1e9, device="cuda") for k in range(8, 22)]
        got = loud.step(action)
        assert all(bool((x == 1e9).all()) for x in noise)
        torch.testing.assert_close(got[:2], expected[:2], atol=10 * ONE_STEP["Hopper"][1], rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Hopper", "HalfCheetah", "Ant", "Humanoid"])
def test_gpu_ten_thousand_steps(name: str) -> None:
    env = make(name, 1024, device="cuda")
    env.reset(seed=1)
    for _ in range(10_000):
        obs, reward, *_ = env.step(torch.rand(1024, env.act_dim, device="cuda") * 2 - 1)
    assert bool(obs.isfinite().all() & reward.isfinite().all())  # of the last step, and made so where a world diverged
    assert env.report() == {}  # none did, and no buffer overflowed, in any of them
