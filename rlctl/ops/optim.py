"""Gradient steps and slow copies."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from rlctl import parallel
from rlctl.host_numbers import scalar
from rlctl.ops.dense import wanted

M = TypeVar("M", bound=nn.Module)


class Adam(torch.optim.Adam):
    """`torch.optim.Adam(fused=True)`, state and results bit for bit, with less around the kernel.

    The packaged `step` spends several times the kernel's own time on options nobody here uses; at the network sizes of
    this field that was a fifth of a whole gradient step. Options of torch's that are not parameters here do not exist.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a gradient scaler then unscales and skips by itself
        self._counts: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of a checkpoint."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._counts = {}
        for k in range(len(self.param_groups)):
            self._count_together(k)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the parameters that have a gradient."""
        if closure is not None:
            raise TypeError("a closure is not supported: compute the loss before the step")
        self.step_with([p.grad for p in _params(self)])

    @torch.no_grad()
    def step_with(self, grads: Sequence[Tensor | None]) -> None:
        """One step along `grads`, in the order of the parameters; a parameter whose gradient is None stays."""
        if len(grads) != sum(len(group["params"]) for group in self.param_groups):
            raise ValueError(f"{len(grads)} gradients for {len(_params(self))} parameters")
        rest = iter(grads)
        for k, group in enumerate(self.param_groups):
            # the kernel takes both for laid out alike, which the gradient of a sum or of a transpose is not
            pairs = [
                (p, g if g.stride() == p.stride() else torch.empty_like(p).copy_(g))
                for p in group["params"]
                if (g := next(rest)) is not None
            ]
            if any(not self.state[p] for p, _ in pairs):
                for p, _ in pairs:
                    self._begin(p)
                self._count_together(k)
            states = [self.state[p] for p, _ in pairs]
            steps = [s["step"] for s in states]
            if not steps:
                continue
            count, places = self._counts.get(k, (None, ()))
            if count is not None and len(places) == len(steps) and all(map(operator.is_, places, steps)):
                count.add_(1)
            else:
                torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                [p for p, _ in pairs],
                [g for _, g in pairs],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                steps,
                lr=scalar(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _begin(self, p: Tensor) -> None:
        if not (state := self.state[p]):
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)

    def _count_together(self, k: int) -> None:
        """Make the step counts of group `k` places of one tensor: a loop over numbers costs more than the kernel."""
        states = [self.state.get(p) for p in self.param_groups[k]["params"]]
        if all(states) and states and states[0]["step"].device.type == "cpu":  # type: ignore[index]
            count = torch.stack([s["step"] for s in states])  # type: ignore[index]
            places = list(count.unbind())
            for s, place in zip(states, places, strict=True):
                s["step"] = place  # type: ignore[index]
            self._counts[k] = (count, places)


def adam(params: Iterable[nn.Parameter], lr: float, eps: float = 1e-8, weight_decay: float = 0.0) -> Adam:
    """Adam with one kernel call per step (a loop over parameters costs as much as a small network).

    Parameters that are frozen are left out: no loss has a gradient in them. `weight_decay` times the parameter is added
    to the gradient (an L2 penalty, not AdamW's decay).
    """
    return Adam([p for p in params if p.requires_grad], lr, eps=eps, weight_decay=weight_decay)


def minimize(loss: Tensor, opt: torch.optim.Optimizer, max_grad_norm: float | None = None) -> Tensor:
    """One gradient step of `opt` on the scalar `loss`. Returns the detached loss.

    Every gradient step of the project goes through here or through its two halves, `gradients` and `apply_gradients`,
    which a method needs that changes gradients in between or takes several losses at the same parameters.
    """
    apply_gradients(opt, gradients(loss, opt), max_grad_norm)
    return loss.detach()


@overload
def gradients(
    loss: Tensor, opt: torch.optim.Optimizer, *, allow_unused: Literal[False] = ..., retain_graph: bool = ...
) -> list[Tensor]: ...
@overload
def gradients(
    loss: Tensor, opt: torch.optim.Optimizer, *, allow_unused: bool, retain_graph: bool = ...
) -> list[Tensor | None]: ...
def gradients(
    loss: Tensor, opt: torch.optim.Optimizer, *, allow_unused: bool = False, retain_graph: bool = False
) -> list[Tensor] | list[Tensor | None]:
    """Gradients of `loss` in the parameters of `opt`, in their order.

    No other network receives any, and backward skips the weight gradients of networks the loss merely passes through
    (a frozen critic under an actor loss). A parameter that `loss` does not depend on is an error unless `allow_unused`,
    which gives None for it: that step then leaves it alone. `retain_graph` keeps the graph for another loss that shares
    a part of it.
    """
    params = _params(opt)
    known, grads = getattr(
        loss, "known_gradients", ((), ())
    )  # of a loss that was computed with them, for its parameters
    if len(known) == len(params) and all(a is b for a, b in zip(known, params, strict=True)):
        return list(grads)
    with wanted(params):
        return list(torch.autograd.grad(loss, params, allow_unused=allow_unused, retain_graph=retain_graph))


def apply_gradients(
    opt: torch.optim.Optimizer, grads: Sequence[Tensor | None], max_grad_norm: float | None = None
) -> None:
    """Step `opt` with `grads`, first rescaled to the global L2 norm `max_grad_norm` when they are longer.

    Where several processes share the update, `grads` are first averaged over them.
    """
    params = _params(opt)
    if parallel.world_size() > 1:
        grads = parallel.mean_gradients(grads)
    if max_grad_norm is not None and (present := [g for g in grads if g is not None]):
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)))
        # not in place: autograd may hand out one tensor for two parameters, or one that is expanded
        scaled = iter(torch._foreach_mul(present, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)))
        grads = [None if g is None else next(scaled) for g in grads]
    if isinstance(opt, Adam):
        opt.step_with(grads)
    else:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.step()
        opt.zero_grad(set_to_none=True)
    # the fused kernel does not tell autograd that it wrote: without this, a loss computed before the step and
    # differentiated after it would silently get gradients of a mixture of old and new weights instead of an error
    torch.autograd.graph.increment_version(params)


def _params(opt: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


@torch.no_grad()
def polyak(source: nn.Module, lagged: nn.Module, tau: float) -> None:
    """`lagged <- lagged + tau * (source - lagged)` for every parameter, and a plain copy of every buffer."""
    torch._foreach_lerp_(list(lagged.parameters()), list(source.parameters()), tau)
    for slow, fast in zip(lagged.buffers(), source.buffers(), strict=True):
        slow.copy_(fast)


def frozen_copy(module: M) -> M:
    """A deep copy that no gradient reaches: the start of a lagged (target) network."""
    return copy.deepcopy(module).requires_grad_(False)
