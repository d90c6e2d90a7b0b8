"""A trained policy as one file that needs nothing of rlctl: raw observations in, actions in the env's own units out.

What the agent does to observations (normalisation) and what the environment does to actions (clipping, scaling) is
inside. Two formats: ONNX, and PyTorch's own `torch.export` program (.pt2; not TorchScript, which PyTorch no longer
develops). Beside the model lies a JSON file: inputs, outputs, where it comes from, and how far its actions are from the
agent's own, measured by running the written file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rlctl import experiment
from rlctl.checkpoint import write_atomically
from rlctl.errors import RlctlError, UsageError
from rlctl.provenance import versions
from rlctl.types import Agent, Exportable

Format = Literal["onnx", "torch"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 18
TOLERANCE = 1e-4
"""Largest difference allowed between exported and own actions, as a part of half the action range."""
ROWS = 512
"""Observations on which the two are compared."""


class Mismatch(RlctlError):
    """The exported model does not act like the agent."""


class Controller(nn.Module):
    """The exported module: clips the policy's action to [-1, 1] and takes it to the environment's units."""

    low: Tensor
    high: Tensor

    def __init__(self, policy: nn.Module, low: np.ndarray, high: np.ndarray) -> None:
        super().__init__()
        self.policy = policy
        self.register_buffer("low", torch.as_tensor(low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(high, dtype=torch.float32))

    def forward(self, obs: Tensor, *noise: Tensor) -> Tensor:
        """Actions [B, A] in the environment's units."""
        action = self.policy(obs, *noise).clamp(-1, 1)
        return (self.high - self.low) / 2 * action + (self.high + self.low) / 2


def export(
    run_dir: Path,
    format: Format = "onnx",
    *,
    checkpoint: str = "latest",
    sampled: bool = False,
    out: Path | None = None,
) -> Path:
    """Export a run's policy to `out` (default: RUN_DIR/export/policy.onnx or .pt2, policy-sampled); returns the file.

    `sampled` exports draws of a generative policy, by noise that is an input, instead of the deterministic action.
    Its description is `out` with .json added. Raises UsageError (format, missing package, no environment) and Mismatch,
    with no file left, when the written model does not act like the agent.
    """
    if format not in get_args(Format):
        raise UsageError(f"no format '{format}': allowed are {', '.join(get_args(Format))}")
    if format == "onnx":
        missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
        if missing:
            raise UsageError(f"ONNX needs the packages {', '.join(missing)}: pip install 'rlctl[export]'")
    out = out or run_dir / "export" / f"policy{'-sampled' * sampled}{SUFFIX[format]}"
    if out.suffix != SUFFIX[format]:
        raise UsageError(f"{out}: a model of format {format} is called *{SUFFIX[format]}")
    agent, settings = experiment.load_agent(run_dir, checkpoint)
    env_id, options = experiment.evaluated_in(run_dir, settings)
    agent.cpu().eval()
    given = agent.exportable(sampled)
    low, high, obs = _look_around(agent, env_id, options)
    controller = Controller(given.module, low, high).eval()
    inputs = (obs, *_noise(given, len(obs)))
    with torch.no_grad():
        wanted = controller(*inputs).numpy()
    program = to_program(controller, given)
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f".tmp-{out.name}")
    try:
        run = _write_onnx(program, given, temp) if format == "onnx" else _write_torch(program, temp)
        parity = compare(run, inputs, wanted, (high - low) / 2)
        if not parity["max_difference"] <= TOLERANCE:
            raise Mismatch(
                f"the exported model is off by {parity['max_difference']:.2g} of half the action range "
                f"(allowed: {TOLERANCE:g}); nothing was written"
            )
        temp.replace(out)
    finally:
        temp.unlink(missing_ok=True)
    runtime = "onnxruntime" if format == "onnx" else "torch"
    record = {
        "format": format,
        "file": out.name,
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "algo": settings.algo,
        "env": env_id,
        "env_options": options,
        "checkpoint": checkpoint,
        "inputs": [
            {"name": name, "shape": ["batch", *shape], "dtype": "float32", "is": _meaning(name)}
            for name, shape in given.inputs.items()
        ],
        "output": {
            "name": "action",
            "shape": ["batch", len(low)],
            "dtype": "float32",
            "is": "the deterministic action in the environment's units, clipped to low and high"
            if len(given.inputs) == 1
            else "the action that the noise decides, in the environment's units, clipped to low and high",
            "low": low.tolist(),
            "high": high.tolist(),
        },
        "parity": parity | {"runtime": f"{runtime} {version(runtime)}", "against": "the agent in PyTorch, float32"},
        "opset": OPSET if format == "onnx" else None,
        "versions": versions() | ({"onnx": version("onnx")} if format == "onnx" else {}),
    }
    write_atomically(out.with_name(out.name + ".json"), json.dumps(record, indent=1) + "\n")
    return out


class Unrolled(nn.Module):
    """A module that takes gradients in its forward pass, as the primitive operations they come to, with what these use
    of its parameters: `torch.export` does not follow `autograd.grad`.
    """

    def __init__(self, module: nn.Module, inputs: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        examples = [torch.zeros(13, *shape) for shape in inputs.values()]
        trace = make_fx(lambda *given: module(*given), tracing_mode="symbolic", _allow_non_fake_inputs=True)
        self.graph = trace(*examples)

    def forward(self, *given: Tensor) -> Tensor:
        """What the module gives."""
        action: Tensor = self.graph(*given)
        return action


def to_program(controller: Controller, given: Exportable) -> torch.export.ExportedProgram:
    """The module as a `torch.export` program for batches of any size, without what acting does not use."""
    program = _traced(controller, given)
    agent = getattr(given.module, "agent", None)
    if not isinstance(agent, Agent):
        return program
    # critics and their copies go along unless taken away: a second trace does without
    used = {
        spec.target
        for spec, node in zip(program.graph_signature.input_specs, _placeholders(program), strict=True)
        if spec.target is not None and node.users
    }
    prefix = "policy.agent."
    idle = [n for n, _ in agent.named_children() if not any(u.startswith(f"{prefix}{n}.") for u in used)]
    kept = {name: agent._modules.pop(name) for name in idle}
    try:
        return _traced(controller, given)
    except (AttributeError, torch._dynamo.exc.UserError):  # act() asks for one of them without using its weights
        return program
    finally:
        agent._modules.update(kept)


def _placeholders(program: torch.export.ExportedProgram) -> list[Any]:
    return [n for n in program.graph.nodes if n.op == "placeholder"]


def _traced(controller: Controller, given: Exportable) -> torch.export.ExportedProgram:
    example = tuple(torch.zeros(13, *shape) for shape in given.inputs.values())
    batch = torch.export.Dim("batch", min=1)
    # `*noise` is one argument to the tracer
    shapes = ({0: batch}, *([tuple({0: batch} for _ in example[1:])] if example[1:] else []))
    with torch.no_grad(), _silent():
        try:
            return torch.export.export(controller, example, dynamic_shapes=shapes)
        except AttributeError:
            raise
        except Exception as e:
            reason = str(e).strip().partition("\n")[0]
            raise RlctlError(
                f"act(explore=False) cannot be traced ({type(e).__name__}: {reason}): the agent should override "
                "exportable() with a module that takes its random numbers as inputs and does not branch on tensors"
            ) from e


Runner = Callable[[tuple[Tensor, ...]], np.ndarray]


def _write_onnx(program: torch.export.ExportedProgram, given: Exportable, file: Path) -> Runner:
    """Write the ONNX file; returns how onnxruntime runs it."""
    import onnx
    import onnxruntime

    names = list(given.inputs)
    with _silent():
        made = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["action"], opset_version=OPSET, verbose=False
        )
    assert made is not None
    made.save(str(file))
    onnx.checker.check_model(str(file))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of every Mish that it cannot fold, which changes nothing
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> np.ndarray:
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        return np.asarray(session.run(["action"], feeds)[0])

    return run


def _write_torch(program: torch.export.ExportedProgram, file: Path) -> Runner:
    """Write the program; returns how PyTorch runs what it reads back."""
    program.example_inputs = None  # they would be the one pickle in the archive
    with _silent():
        with file.open("wb") as f:
            torch.export.save(program, f)
        with file.open("rb") as written:
            module = torch.export.load(written).module()

    def run(inputs: tuple[Tensor, ...]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(*inputs).numpy())

    return run


def compare(run: Runner, inputs: tuple[Tensor, ...], wanted: np.ndarray, half_range: np.ndarray) -> dict[str, Any]:
    """How far `run` is from the actions `wanted` [B, A], in parts of half the action range; at once and one by one."""
    got = run(inputs)
    alone = np.concatenate([run(tuple(x[i : i + 1] for x in inputs)) for i in range(8)])
    gap = np.abs(got - wanted) / half_range
    worst = max(float(gap.max()), float((np.abs(alone - wanted[:8]) / half_range).max()))
    return {
        "observations": len(wanted),
        "max_difference": worst,
        "mean_difference": float(gap.mean()),
        "unit": "half the action range",
        "tolerance": TOLERANCE,
    }


def _look_around(agent: Agent, env_id: str, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Action bounds [A], and observations [ROWS, O]: what the agent meets while exploring, a few far outside of it."""
    import rlctl_envs

    env = rlctl_envs.make(env_id, 8, seed=0, **options)
    try:
        low, high = env.action_bounds
        obs, _ = env.reset(seed=0)
        seen = [obs]
        with torch.no_grad(), agent.borrowed_rng(0):
            while len(seen) * 8 < ROWS:
                obs, *_ = env.step(agent.act(obs.cpu(), explore=True)[0].clamp(-1, 1))
                seen.append(obs)
    finally:
        env.close()
    rows = torch.cat(seen)[:ROWS].cpu().float().clone()
    rows[-16:] *= 20.0
    return low, high, rows


def _noise(given: Exportable, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, *shape, generator=g) for shape in list(given.inputs.values())[1:]]


def _meaning(name: str) -> str:
    return "the observation as the environment gives it" if name == "obs" else "standard normal noise"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporters tell of optional packages and of deprecations in themselves; neither concerns a user."""
    logger = logging.getLogger("torch.onnx")
    before, logger.level = logger.level, logging.ERROR
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.level = before
