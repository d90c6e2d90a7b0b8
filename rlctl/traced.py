"""A loss and its gradients from a recording, on a CPU: the same operations, without Python's and autograd's share.

With small networks and minibatches most of a gradient step is spent around its operations. So the operations of the
loss and of its backward pass are recorded once, as one flat program that TorchScript's interpreter runs: the same
kernels on the same numbers, so the same bits (`rlctl.traced_graph` shortens it before). The first calls hold each
recording to the plain loss, bit for bit; a loss that cannot be recorded, or does not come out the same, runs as before,
and `reason` says why.

The recording knows the shapes of its arguments, and holds everything else for constant but the memory of tensors, which
it reads. So a loss is refused that draws random numbers, reads a counter or the value of a tensor, or changes anything;
and where the agent holds something else than at the time (`rlctl.traced_state`), the loss is recorded anew. What it
cannot see is state outside of the agent: variables of a module, attributes of a class, the settings of an optimiser.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from rlctl.host_reads import host_read
from rlctl.traced_graph import side_by_side, simplify
from rlctl.traced_state import Holdings
from rlctl.types import Agent

Program: TypeAlias = Callable[..., Sequence[Tensor]]

CHECKS = 3
"""Calls for which a recording is held to the plain loss before it stands in for it. TorchScript optimises in the second
and is settled from the third on."""
WORTH_SPLITTING = 1_500_000
"""Rows times parameters from which on a second thread saves more than it takes to wake: 18 % of a minibatch of 256 for
two networks of 64-64 (2.5 million), nothing of one of 64."""
SHAPES = 8
"""Recordings of one loss, by shapes of arguments and what the agent holds; what asks for more is no place for them."""
UNSEEN = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr})
"""Ways to the value of a tensor on which there is no operation."""


class CannotTrace(Exception):
    """Why a loss cannot be recorded."""


@dataclass
class _Recording:
    program: Program
    params: Sequence[Tensor]
    """Those that the loss depends on, in the order of the gradients."""
    structure: Any
    """Of what the loss returns."""
    differentiable: int
    """Which leaf of it is the loss."""
    holdings: Holdings
    """What the agent held."""
    checked: int = 0


class TracedLoss:
    """Stands in for `agent.loss`; takes and returns what that does, gradients for `backward` included.

    Args:
        agent: its parameters are those that gradients are computed for.
        loss: its method. It returns tensors in any nesting of tuples and dicts, one of them a scalar that requires a
            gradient.
        say: is told once if the loss cannot be recorded.
        cores: processor cores that it may use. With two or more, where torch itself keeps to one thread and the batch
            is large enough, parts of the loss that share no operation (actor and critic) run at the same time.
    """

    def __init__(self, agent: Agent, loss: Callable[..., Any], say: Callable[[str], None], cores: int = 1) -> None:
        self._agent, self._loss, self._say, self._cores = agent, loss, say, cores
        self._recordings: dict[Any, list[_Recording]] = {}
        """By shapes of arguments."""
        self.reason = ""
        """Why it has given up, if it has."""
        self.replays = 0
        """Calls answered by a recording."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which record anew: a recording holds the parameters of one agent."""
        return vars(self) | {"_recordings": {}}

    def __call__(self, *args: Any, **named: Any) -> Any:
        """What the loss returns."""
        if self.reason or named or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._loss(*args, **named)
        flat: list[Tensor] = []
        if not _flatten(args, flat):
            self._give_up("an argument is neither a tensor nor a tuple of tensors")
            return self._loss(*args)
        there = self._recordings.setdefault(tuple([(x.shape, x.stride(), x.dtype) for x in flat]), [])
        recording = next((r for r in there if r.holdings.same()), None)
        if recording is None:
            try:
                if sum(map(len, self._recordings.values())) >= SHAPES:
                    moved = there[-1].holdings.moved() if there else []
                    which = f" ({', '.join(moved[:4])})" if moved else ""
                    raise CannotTrace(f"its arguments, or what the agent holds, change too often{which}")
                recording = self._record(args, flat)
            except CannotTrace as e:
                self._give_up(str(e))
                return self._loss(*args)
            there.append(recording)
        if recording.checked < CHECKS:
            return self._check(recording, args, flat)
        self.replays += 1
        return self._replay(recording, flat)

    def _record(self, args: Any, flat: list[Tensor]) -> _Recording:
        """Record the loss of these arguments."""
        agent = self._agent
        try:
            holdings = Holdings(agent, apart=(self, agent.rng, agent.counters))
        except ValueError as e:
            raise CannotTrace(str(e)) from e
        held = [p for p in holdings.tensors.values() if p.requires_grad]
        params = list({id(p): p for p in (*agent.parameters(), *held) if p.requires_grad and p.is_leaf}.values())
        found: dict[str, Any] = {}

        def loss_and_gradients(*tensors: Tensor) -> list[Tensor]:
            leaves, structure = tree_flatten(self._loss(*_unflatten(args, iter(tensors))))
            if not all(isinstance(x, Tensor) for x in leaves):
                raise CannotTrace("it returns more than tensors")
            roots = [k for k, x in enumerate(leaves) if x.requires_grad]
            if len(roots) != 1 or leaves[roots[0]].dim():
                raise CannotTrace("it returns not one scalar that requires a gradient, and others that do not")
            grads = torch.autograd.grad(leaves[roots[0]], params, allow_unused=True)
            found.update(structure=structure, differentiable=roots[0], used=[g is not None for g in grads])
            return [x.detach() for x in leaves] + [g for g in grads if g is not None]

        given = [x.clone() for x in flat]  # nothing that happens in here is to reach the plain loss
        try:
            with _untouched(holdings, given), _no_counters(agent), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript's own, of its age and of constants
                with _Refuse(), _RefuseUnseen():  # type: ignore[no-untyped-call]
                    loss_and_gradients(*given)
                traced = make_fx(loss_and_gradients)(*given)
                simplify(traced)
                work = max(x.shape[0] if x.dim() else 1 for x in flat) * sum(p.numel() for p in params)
                two = self._cores > 1 and torch.get_num_threads() == 1 and work >= WORTH_SPLITTING
                whole = side_by_side(traced, sum(found["used"])) if two else traced
                program = torch.jit.trace(whole, tuple(given), check_trace=False)  # type: ignore[no-untyped-call]
        except CannotTrace:
            raise
        except Exception as e:
            raise CannotTrace(f"recording it failed ({type(e).__name__}: {str(e).strip().splitlines()[-1]})") from e
        used = [p for p, wanted in zip(params, found["used"], strict=True) if wanted]
        return _Recording(program, used, found["structure"], found["differentiable"], holdings)

    def _check(self, recording: _Recording, args: Any, flat: list[Tensor]) -> Any:
        """The plain loss; gives up if the recording has another value or another gradient."""
        out = self._loss(*args)
        leaves = tree_flatten(out)[0]
        root = leaves[recording.differentiable]
        expected = [*leaves, *torch.autograd.grad(root, recording.params, retain_graph=True)]
        with torch.no_grad():
            got = recording.program(*flat)
        same = all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
        if not same and bool(torch.stack([x.isfinite().all() for x in expected]).all()):
            self._give_up("its recording does not give the same bits")
        recording.checked += same
        return out

    def _replay(self, recording: _Recording, flat: list[Tensor]) -> Any:
        with torch.no_grad():
            out = list(recording.program(*flat))
        count = len(out) - len(recording.params)
        root = recording.differentiable
        loss = _WithGradients.apply((out[root], out[count:]), *recording.params)  # type: ignore[no-untyped-call]
        loss.known_gradients = (recording.params, out[count:])
        out[root] = loss
        return tree_unflatten(out[:count], recording.structure)

    def _give_up(self, why: str) -> None:
        self.reason = why
        self._recordings.clear()
        self._say(f"not recorded: the loss of {type(self._agent).__name__}: {why}")


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known: `apply((value, gradients), *parameters)`."""

    @staticmethod
    def forward(ctx: Any, known: tuple[Tensor, list[Tensor]], *params: Tensor) -> Tensor:
        value, ctx.grads = known
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *torch._foreach_mul(ctx.grads, grad)


class _Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises CannotTrace at an operation whose result no recording can give again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, or run."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotTrace(f"it draws random numbers ({func})")
        if why := host_read(func, args, kwargs):
            raise CannotTrace(f"{why} ({func})")
        return func(*args, **(kwargs or {}))


class _RefuseUnseen(TorchFunctionMode):
    """Raises CannotTrace where Python takes the values of a tensor without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, or run."""
        if func in UNSEEN:
            raise CannotTrace(f"it reads a tensor on the host ({func.__name__})")
        return func(*args, **(kwargs or {}))


class _Unread(dict[str, int]):
    """Counters that must not be read."""

    def __getitem__(self, name: str) -> int:
        raise CannotTrace(f"it reads the counter {name!r}")

    def get(self, name: str, default: Any = None) -> Any:
        """As by index."""
        return self[name]


@contextlib.contextmanager
def _no_counters(agent: Agent) -> Iterator[None]:
    counters, agent.counters = agent.counters, _Unread(copy.copy(agent.counters))
    try:
        yield
    finally:
        agent.counters = counters


@contextlib.contextmanager
def _untouched(holdings: Holdings, given: Sequence[Tensor]) -> Iterator[None]:
    """Within, what the agent holds and the arguments may change: the agent is put back, and the loss is refused."""
    tensors, versions = {name: x.detach().clone() for name, x in holdings.tensors.items()}, [x._version for x in given]
    try:
        yield
    finally:
        now = holdings.tensors
        moved = [name for name, x in tensors.items() if not torch.equal(x, now[name])]
        with torch.no_grad():
            for name in moved:
                now[name].copy_(tensors[name])
        set_anew = holdings.moved()
        holdings.restore()
    if moved:
        raise CannotTrace(f"it changes {', '.join(moved)}")
    if set_anew:
        raise CannotTrace(f"it sets attributes of the agent, or what they hold: {', '.join(set_anew)}")
    if [x._version for x in given] != versions:
        raise CannotTrace("it changes its arguments")


def _flatten(args: Any, into: list[Tensor]) -> bool:
    """Append the tensors of nested tuples; False if there is anything else."""
    for x in args:
        if isinstance(x, Tensor):
            into.append(x)
        elif not isinstance(x, tuple) or not _flatten(x, into):
            return False
    return True


def _unflatten(args: tuple[Any, ...], tensors: Iterator[Tensor]) -> list[Any]:
    """`args` with other tensors in the places of theirs."""

    def again(x: Any) -> Any:
        if isinstance(x, Tensor):
            return next(tensors)
        parts = [again(y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)

    return [again(x) for x in args]
