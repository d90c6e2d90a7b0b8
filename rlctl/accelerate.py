"""Captured updates: an agent's `update` and `act` as CUDA graphs, without a line in the agent.

    accelerate(agent)                       # replaces agent.update and agent.act on this one object
    accelerate(agent, compile=True)         # torch.compile of its losses as well

On a CPU, where there are no graphs, a method `loss` runs from a recording of its own (`rlctl.traced`).

A first few updates run as they are, and are recorded: which operations run, in which memory, and what the Python around
them does with the agent's counters (`rlctl.host_numbers`). From then on an update is: fill in the new batch, replay,
set the counters. Where the Python takes another turn (TD3's delayed policy step), that turn is recorded as well.
Results equal those of the plain update: captured graphs run the same kernels on the same numbers.

An agent that cannot be captured runs as before, and is told why: in `Report.reasons`, or through `say` at its first
update, which is rehearsed on a copy. Nothing falls back in silence.

A recorder stands for the device: `CudaGraph`, or `Tape`, its stand-in on a CPU, which replays recorded operations one
by one into the memory they first used. It gains no time; it is how the machinery is proven without a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlctl import parallel
from rlctl.host_numbers import Counters, Expression, HostNumber, Recording, followed, plain
from rlctl.host_reads import host_read
from rlctl.types import Agent, Batch
from rlctl_envs import cuda_graphs
from rlctl_envs.engines import available_cores

Graphs: TypeAlias = Literal["auto", "require", "never", "tape"]
"""auto: CUDA graphs where the agent is on a CUDA device. require: the same, and an error elsewhere. never: none.
tape: the CPU stand-in for tests."""
Precision: TypeAlias = Literal["float32", "tf32", "bf16"]

WARM_UP = 2
"""Plain runs of each turn before it is captured: the first creates optimiser state, kernels and handles."""
LARGEST = 200_000
"""Operations of an update that are captured at most: a graph of millions takes minutes to build, and gains little, for
an update so long does not wait for Python."""
TURNS = 8
"""Turns an update may take. Past that, Python decides something anew at each update, and capturing gains nothing."""

_log = logging.getLogger(__name__)


class CannotCapture(Exception):
    """Why something cannot be captured."""


# ------------------------------------------------------------------------------------------------------------ recorders
class Recorder(Protocol):
    """Something that records what a function does with tensors, and does it again."""

    runs_while_recording: bool
    """Whether the recorded run counts as one: a CUDA capture computes nothing."""

    def record(self, run: Callable[[], Any]) -> Any:
        """Run `run` and return what it returns: tensors that every replay will fill."""

    def replay(self) -> None:
        """Do the same again, on the same memory."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises CannotCapture where an operation makes the host wait, and after `LARGEST` operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, or run."""
        self.count += 1
        if self.count > LARGEST:
            raise CannotCapture(f"it is more than {LARGEST:,} operations: larger minibatches make fewer")
        if why := host_read(func, args, kwargs):
            raise CannotCapture(f"{why} ({func})")
        return func(*args, **(kwargs or {}))


class Tape(Watch):  # type: ignore[no-untyped-call]
    """Operations recorded and run again one by one, each into the memory of its first result: a graph's stand-in."""

    runs_while_recording = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def record(self, run: Callable[[], Any]) -> Any:
        """Run and record; see `Recorder`."""
        with self:
            return run()

    @torch.no_grad()
    def replay(self) -> None:
        """Run the recorded operations again; see `Recorder`."""
        for function, args, kwargs, results in self._ops:
            again = function(*args, **kwargs)
            for old, new in zip(results, _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr() or old.numel() == 0:
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record an operation; views stay valid without being made again."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not _is_view(func):
            self._ops.append((func, args, kwargs or {}, _tensors(out)))
        return out


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    """Whether an operation only gives other names to memory."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class CudaGraph:
    """One CUDA graph; see `Recorder`."""

    runs_while_recording = False

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._device, self._generators = device, generators
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None

    def record(self, run: Callable[[], Any]) -> Any:
        """Capture; see `Recorder`."""
        with cuda_graphs.capture(self._device, self._generators, self._stream, "global") as self._graph:
            return run()

    def replay(self) -> None:
        """Launch; see `Recorder`."""
        assert self._graph is not None
        self._graph.replay()


# ----------------------------------------------------------------------------------------------------------- one method
@dataclass
class _Turn:
    """One way through the Python of a method, with its recording once there is one."""

    host: Recording
    settings: list[tuple[dict[str, Any], str, Any]]
    """Learning rates and their kin that the method left alone: (parameter group, key, value)."""
    changed: list[tuple[dict[str, Any], str, Expression]]
    """Those it set, as functions of the counters."""
    runs: int = 1
    recorder: Recorder | None = None
    inputs: list[Tensor] = field(default_factory=list)
    output: Any = None

    def holds(self, counters: Mapping[str, int]) -> bool:
        return self.host.holds(counters) and all(group.get(key) == value for group, key, value in self.settings)


def follow(agent: Agent, run: Callable[[], Any]) -> tuple[_Turn, Any]:
    """Run something of the agent and note what it does with counters and optimiser settings: (the turn, the result).

    Afterwards both hold plain numbers again, those it left.
    """
    real, host, before = agent.counters, Recording(agent.counters, agent.spec.device), _group_settings(agent)
    changed: list[tuple[dict[str, Any], str, Expression]] = []
    agent.counters = Counters(host)
    try:
        with followed():
            out = run()
    finally:
        agent.counters = real
        for group, key, value in before:
            now = group[key]
            if isinstance(now, HostNumber):
                group[key] = now.value
                changed.append((group, key, now.expression))
            elif now != value:
                changed.append((group, key, _constant(now)))
        real.update({name: plain(value) for name, value in host.written.items()})
    own = {(id(group), key) for group, key, _ in changed}
    return _Turn(host, [s for s in before if (id(s[0]), s[1]) not in own], changed), out


class Captured:
    """A method of an agent that replays a recording of itself. Calls take and return what the method does."""

    def __init__(
        self,
        agent: Agent,
        name: str,
        make: Callable[[], Recorder],
        on_refusal: Callable[[str], None],
        scope: Callable[[], contextlib.AbstractContextManager[Any]],
        *,
        rehearse: bool = False,
    ) -> None:
        self._agent, self._name, self._make, self._refuse = agent, name, make, on_refusal
        self._rehearse = rehearse
        self._method = getattr(agent, name)
        self._scope = scope
        self._turns: dict[Any, list[_Turn]] = {}
        self._rng = agent.rng
        self._states: list[Any] = []
        """State objects of the optimisers, as recorded."""
        self.refused = ""
        """Why it has given up, if it has."""
        self.replays = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method does, by a replay where it can."""
        agent = self._agent
        if self.refused or agent.rng is not self._rng:  # the generators of an evaluation are not the recorded ones
            with self._scope():
                return self._method(*args, **kwargs)
        if self._rehearse:
            self._rehearse = False
            if why := _obstacle(agent, self._name, args, kwargs):
                self._give_up(why)
                return self(*args, **kwargs)
        states = [opt.state for opt in agent.optimizers().values()]
        if len(states) != len(self._states) or any(a is not b for a, b in zip(states, self._states, strict=True)):
            self.forget()  # the first call, or a checkpoint was loaded: optimisers hold other tensors now
            self._states = states
        values, flat = _split(args, kwargs)
        turns = self._turns.setdefault((values, _shapes(flat), agent.training, torch.is_grad_enabled()), [])
        counters = dict(agent.counters)
        turn = next((t for t in turns if t.holds(counters)), None)
        if turn is None:
            if len(turns) >= TURNS:
                self._give_up("its Python decides anew from the counters at each call; keep such numbers in tensors")
                return self(*args, **kwargs)
            turn, out = follow(agent, lambda: self._plainly(*args, **kwargs))
            turns.append(turn)
            return out
        if turn.recorder is None:
            if turn.runs < WARM_UP:
                turn.runs += 1
                return follow(agent, lambda: self._plainly(*args, **kwargs))[1]
            return self._record(turn, args, kwargs, flat)
        for kept, new in zip(turn.inputs, flat, strict=True):
            kept.copy_(new, non_blocking=True)
        turn.host.fill(counters)
        turn.recorder.replay()
        self.replays += 1
        self._finish(turn, counters)
        return _copied(turn.output)

    def _plainly(self, *args: Any, **kwargs: Any) -> Any:
        """The method itself, on a stream of its own where that is a GPU's: captures and warm-ups want one."""
        device = self._agent.spec.device
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            with self._scope():
                return self._method(*args, **kwargs)
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), self._scope():
            out = self._method(*args, **kwargs)
        torch.cuda.current_stream(device).wait_stream(stream)
        return out

    def _record(self, turn: _Turn, args: Any, kwargs: Any, flat: list[Tensor]) -> Any:
        """Record a turn that has warmed up; returns what this call would have returned without."""
        agent, recorder = self._agent, self._make()
        inputs = [x.clone() for x in flat]
        args, kwargs = _joined(args, kwargs, inputs)
        counters = dict(agent.counters)
        settings = [(group, key, group[key]) for group, key, _ in _group_settings(agent)]
        try:
            recorded, output = follow(agent, lambda: recorder.record(lambda: self._plainly(*args, **kwargs)))
        except Exception as e:
            if recorder.runs_while_recording:
                raise
            # nothing has been computed yet: undo what the Python did, and do it the plain way
            agent.counters.update(counters)
            for group, key, value in settings:
                group[key] = value
            self._give_up(f"the capture failed: {type(e).__name__}: {e}")
            for other in vars(agent).values():  # the generators have new states (`cuda_graphs.capture`)
                if isinstance(other, Captured):
                    other.forget()
            return self(*args, **kwargs)
        turn.host, turn.settings, turn.changed = recorded.host, recorded.settings, recorded.changed
        turn.recorder, turn.inputs, turn.output = recorder, inputs, output
        if not recorder.runs_while_recording:
            agent.counters.update(counters)
            turn.host.fill(counters)
            recorder.replay()
            self._finish(turn, counters)
        return _copied(output)

    def forget(self) -> None:
        """Drop the recordings; calls are recorded anew."""
        self._turns.clear()

    def _finish(self, turn: _Turn, counters: Mapping[str, int]) -> None:
        """What the Python of the method would have left behind."""
        for group, key, expression in turn.changed:
            group[key] = expression(counters)
        self._agent.counters.update(turn.host.counters_after(counters))

    def _give_up(self, why: str) -> None:
        self.refused = why
        self.forget()
        self._refuse(f"{self._name}: {why}")


def _constant(value: Any) -> Expression:
    return lambda _: value


def _group_settings(agent: Agent) -> list[tuple[dict[str, Any], str, Any]]:
    """Numbers in the parameter groups of the agent's optimisers: (group, key, value)."""
    return [
        (group, key, value)
        for opt in agent.optimizers().values()
        for group in opt.param_groups
        for key, value in group.items()
        if isinstance(value, int | float | HostNumber | tuple)
    ]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Arguments as (what is no tensor, hashable; the tensors, in order). Batches count as their tensors."""
    rest: list[Any] = []
    flat: list[Tensor] = []
    for name, x in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(x, Batch):
            named = x.tensors()
            rest.append((name, tuple(named)))
            flat += named.values()
        elif isinstance(x, Tensor):
            rest.append((name, None))
            flat.append(x)
        else:
            rest.append((name, x))
    return tuple(rest), flat


def _joined(
    args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with the tensors `flat` in place of their own: undoes `_split`."""
    rest = iter(flat)

    def new(x: Any) -> Any:
        if isinstance(x, Batch):
            return Batch.from_tensors({name: next(rest) for name in x.tensors()})
        return next(rest) if isinstance(x, Tensor) else x

    positional = tuple(new(x) for x in args)
    return positional, {name: new(x) for name, x in sorted(kwargs.items())}


def _shapes(flat: list[Tensor]) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype, x.device) for x in flat)


def _copied(x: Any) -> Any:
    """Outputs of a recording, in memory of their own: the next replay writes over it. Scalars in one go."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, tuple):
        return tuple(_copied(y) for y in x)
    if isinstance(x, dict):
        if x and all(isinstance(y, Tensor) and y.dim() == 0 for y in x.values()):
            return dict(zip(x, torch.stack([y.detach().float() for y in x.values()]).unbind(), strict=True))
        return {name: _copied(y) for name, y in x.items()}
    return x


# ------------------------------------------------------------------------------------------------------------ the door
@dataclass(frozen=True)
class Report:
    """What `accelerate` did. `say()` is one line of it."""

    captured: tuple[str, ...]
    """Methods that run from recordings after their first few calls, unless the first shows that they cannot."""
    reasons: tuple[str, ...]
    """Why there are none."""
    compiled: tuple[str, ...]
    """Losses that run through torch.compile."""
    precision: str
    """The arithmetic, in words."""
    kind: str = "CUDA graphs"

    def say(self) -> str:
        """One line for a log."""
        parts = [f"{' and '.join(self.captured)} as {self.kind}" if self.captured else "no graphs"]
        parts[0] += f" ({'; '.join(self.reasons)})" if self.reasons else ""
        if self.compiled:
            parts.append(f"torch.compile of {', '.join(self.compiled)}")
        return "; ".join([*parts, self.precision])


def accelerate(
    agent: Agent,
    *,
    graphs: Graphs = "auto",
    compile: bool = False,
    trace: bool = True,
    precision: Precision = "float32",
    cores: int | None = None,
    say: Callable[[str], None] = _log.warning,
) -> Report:
    """Make `agent.update` and `agent.act` run from CUDA graphs where that is possible; changes this object alone.

    Args:
        agent: on its device, before training; checkpoints may be loaded later.
        graphs: see `Graphs`. Whether an update can be captured is found out at its first call.
        compile: run the agent's losses (methods called `loss` or ending in `_loss`) through torch.compile.
        trace: on a CPU run the agent's `loss`, where it has one, and its gradients from a recording: the same bits,
            sooner. Not beside `compile` or bf16; a loss that cannot be recorded runs as before, and a log line of
            level info says why.
        precision: float32: matrix products in full. tf32: on CUDA with 10 bits of mantissa in their factors. bf16:
            losses and their gradients under autocast to bfloat16; parameters, optimisers, actions and normalisers stay
            float32. The first two set torch's switch for the whole process.
        cores: processor cores that a recorded loss may use (see `rlctl.traced.TracedLoss`); all there are by default.
        say: is told when a method turns out not to be capturable.

    Raises ValueError when graphs="require" cannot be had: here where that is plain, at the first update otherwise.
    """
    device = agent.spec.device
    scope, policy = _precision(precision, device)
    if graphs == "never":
        why = "switched off"
    elif graphs != "tape" and device.type != "cuda":
        why = "graphs need a CUDA device"
    elif parallel.world_size() > 1:
        why = "several processes share each update"
    else:
        why = ""
    compiled = _compile_losses(agent) if compile else ()
    if trace and not compile and precision != "bf16" and device.type == "cpu" and graphs != "tape":
        _trace_loss(agent, available_cores() if cores is None else cores)
    if why and graphs == "require":
        raise ValueError(f"graphs=require: {type(agent).__name__} cannot be captured: {why}.")
    if why:
        if precision == "bf16":
            plain_update = agent.update

            def update(batch: Batch) -> Any:
                with scope():
                    return plain_update(batch)

            agent.update = update  # type: ignore[method-assign]
        return Report((), (why,), compiled, policy)

    def recorder() -> Recorder:
        return Tape() if graphs == "tape" else CudaGraph(device, list(agent.rng.values()))

    def refusal(reason: str) -> None:
        if graphs == "require":
            raise ValueError(f"graphs=require: {type(agent).__name__} cannot be captured: {reason}.")
        say(f"not captured: {type(agent).__name__}'s {reason}")

    for name, around in (("act", contextlib.nullcontext), ("update", scope)):
        setattr(agent, name, Captured(agent, name, recorder, refusal, around, rehearse=True))
    kind = "tapes, which stand for CUDA graphs in tests" if graphs == "tape" else "CUDA graphs"
    return Report(("update", "act"), (), compiled, policy, kind)


def _obstacle(agent: Agent, name: str, args: Any, kwargs: Any) -> str:
    """What keeps a method from being captured, found on a copy of the agent; empty if nothing does.

    Whatever goes wrong goes wrong here, where no training state is half changed. Asked at the first call, when the
    agent has seen its dataset and a true batch is there.
    """
    if name == "update" and agent.host_reads:
        return f"it reads tensors on the host: {agent.host_reads}"
    memo: dict[int, Any] = {id(g): _same_generator(g) for g in agent.rng.values()}
    # recordings made so far stay the original's: a CUDA graph cannot be copied, and the copy drops them below
    memo |= {id(x): x for x in vars(agent).values() if isinstance(x, Captured)}
    try:
        twin = copy.deepcopy(agent, memo)
    except Exception as e:
        return f"the agent cannot be copied for a rehearsal ({type(e).__name__}: {e})"
    for replaced in [n for n in vars(twin) if callable(getattr(type(twin), n, None))]:
        del vars(twin)[replaced]  # captured and compiled methods are those of the original
    before = _simple_attributes(twin)
    try:
        for _ in range(2):
            with Watch():  # type: ignore[no-untyped-call]
                follow(twin, lambda: getattr(twin, name)(*args, **kwargs))
    except CannotCapture as e:
        return str(e)
    except Exception as e:
        return f"it failed while it was followed ({type(e).__name__}: {e})"
    if moved := [n for n, value in _simple_attributes(twin).items() if before.get(n) != value]:
        return f"it counts in {', '.join(moved)}: only what is kept in `counters` can be replayed"
    return ""


def _same_generator(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def _simple_attributes(agent: Agent) -> dict[str, Any]:
    return {name: x for name, x in vars(agent).items() if isinstance(x, bool | int | float | str | None)}


def _compile_losses(agent: Agent) -> tuple[str, ...]:
    """Put torch.compile around the agent's losses."""
    names = [n for n in dir(type(agent)) if (n == "loss" or n.endswith("_loss")) and callable(getattr(agent, n))]
    # a loss that sums others is compiled as one piece
    names = ["loss"] if "loss" in names else names
    for name in names:
        setattr(agent, name, torch.compile(getattr(agent, name), dynamic=False))
    return tuple(names)


def _trace_loss(agent: Agent, cores: int) -> None:
    """Put a recording in the place of the agent's `loss`, if it has one."""
    loss: Any = getattr(agent, "loss", None)
    if callable(getattr(type(agent), "loss", None)):  # a method: a module that is called so stays one
        from rlctl.traced import TracedLoss  # which loads what only recording needs

        agent.loss = TracedLoss(agent, loss, _log.info, cores)  # type: ignore[assignment]


def _precision(
    precision: Precision, device: torch.device
) -> tuple[Callable[[], contextlib.AbstractContextManager[Any]], str]:
    """Set torch's switches; returns the scope of an update and the policy in words."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "bf16":

        @contextlib.contextmanager
        def scope() -> Iterator[None]:
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                yield

        return scope, "losses in bfloat16 by autocast, everything else float32"
    what = "matrix products with TF32 factors" if precision == "tf32" else "float32 throughout, TF32 off"
    return contextlib.nullcontext, what
