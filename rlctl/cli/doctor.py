"""`rlctl doctor`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check the installation: versions, simulator engine, parity with Gymnasium, speed, memory, device."""
    from rlctl.cli.output import print_json, print_table
    from rlctl.provenance import machine, versions

    checks = [_check_simulator(), _check_learning(), _check_cuda(), _check_disk()]
    report = {"versions": versions(), "machine": machine(), "checks": checks, "ok": all(c["ok"] for c in checks)}
    if json_:
        print_json(report)
    else:
        print_table(["PACKAGE", "VERSION"], list(versions().items()))
        print()
        print_table(["MACHINE", ""], list(machine().items()))
        print()
        print_table(["CHECK", "", "RESULT"], [[c["name"], "ok" if c["ok"] else "FAILED", c["detail"]] for c in checks])
    if not report["ok"]:
        raise typer.Exit(1)


def _check_simulator() -> dict[str, Any]:
    """Steps 64 Hoppers for half a second and compares one step with Gymnasium's."""
    import gymnasium
    import numpy as np
    import torch

    import rlctl_envs

    try:
        env = rlctl_envs.make("Hopper", 1, seed=0, physics="native", dtype=torch.float64)
        assert isinstance(env, rlctl_envs.MujocoVecEnv)
        env.reset()
        reference: Any = gymnasium.make("Hopper-v5").unwrapped
        reference.reset(seed=0)
        reference.set_state(env.engine.sim.qpos[0].copy(), env.engine.sim.qvel[0].copy())
        action = np.full((1, 3), 0.3)
        ours = env.step(action)[4]["next_obs"][0].numpy()
        difference = float(np.abs(ours - reference.step(action[0])[0]).max())
        engine = env.engine.name
        env.close()
        many = rlctl_envs.make("Hopper", 64, seed=0)
        many.reset()
        zeros = torch.zeros(64, many.act_dim)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < 0.5:
            many.step(zeros)
            steps += 64
        speed = steps / (time.perf_counter() - start)
        many.close()
    except Exception as e:  # a doctor reports whatever is wrong
        return {"name": "simulator", "ok": False, "detail": f"{type(e).__name__}: {e}"}
    detail = f"{engine} engine, {speed:,.0f} Hopper steps/s; one step differs from Gymnasium's by {difference:.1e}"
    return {"name": "simulator", "ok": difference < 1e-9, "detail": detail}


def _check_learning() -> dict[str, Any]:
    """Trains PPO for a few updates on a probe task in memory."""
    import rlctl_envs
    from rlctl import agents
    from rlctl.agents.ppo import PPOConfig
    from rlctl.run import Run
    from rlctl.train import on_policy
    from rlctl.types import Spec

    try:
        env = rlctl_envs.make("probe:constant", 8)
        cfg = PPOConfig(num_envs=8, horizon=32, steps=8 * 32 * 4)
        agent = agents.make("ppo", Spec(env.obs_dim, env.act_dim, 8, episode_len=env.episode_len), cfg)
        run = Run()
        on_policy(agent, env, run, steps=cfg.steps, horizon=cfg.horizon)
    except Exception as e:
        return {"name": "learning", "ok": False, "detail": f"{type(e).__name__}: {e}"}
    return {"name": "learning", "ok": run.updates == 4, "detail": f"{run.updates} PPO updates on a probe task"}


def _check_cuda() -> dict[str, Any]:
    import torch

    from rlctl_envs.engines.choice import missing_packages

    if not torch.cuda.is_available():
        return {"name": "CUDA", "ok": True, "detail": f"no device: torch {torch.__version__} runs on the CPU"}
    free, total = torch.cuda.mem_get_info()
    detail = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if missing := missing_packages():
        detail += f"; {' and '.join(missing)} missing: pip install 'rlctl[warp]' to simulate there"
    return {"name": "CUDA", "ok": True, "detail": detail}


def _check_disk() -> dict[str, Any]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return {"name": "disk", "ok": free > 1, "detail": f"{free:.1f} GiB free in {Path.cwd()}"}
