"""Steps inside a KL ball: conjugate gradient, Fisher-vector products, backtracking that restores exactly.

Source: Schulman et al. 2015, arXiv:1502.05477, section 6 and appendix C. Vectors are flat, `[P]`: the entries of the
parameters in their order. Nothing here reads a tensor on the host: what a branch would decide, `torch.where`
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlctl import parallel


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """The entries of `tensors`, one behind the other, `[P]`."""
    return torch.cat([t.reshape(-1) for t in tensors])


@torch.no_grad()
def write(params: Sequence[Tensor], vector: Tensor) -> None:
    """Copy the entries of `vector` [P] into `params`, in place."""
    for p, piece in zip(params, torch.split(vector, [p.numel() for p in params]), strict=True):
        p.copy_(piece.view_as(p))


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x [P] with `product`(x) near b [P], for a symmetric positive definite `product`; starts at 0.

    Once the squared residual is below `tolerance`, or a direction has no positive curvature (float32 noise), x stays
    what it is for good.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared = residual @ residual
    going = squared > tolerance
    for _ in range(iterations):
        image = product(direction)
        curvature = direction @ image
        going = going & (squared > tolerance) & (curvature > 0)
        length = torch.where(going, squared / torch.where(going, curvature, 1.0), 0.0)
        x = x + length * direction
        residual = residual - length * image
        before, squared = squared, residual @ residual
        direction = residual + torch.where(going, squared / before.clamp(min=1e-38), 0.0) * direction
    return x


def fisher_vector_product(kl: Tensor, params: Sequence[Tensor], damping: float) -> Callable[[Tensor], Tensor]:
    """v [P] -> (H + damping I) v [P], H the Hessian in `params` of the mean KL divergence `kl` (nats).

    At the old policy, where `kl` is 0, H is the Fisher matrix, whichever way the divergence is taken. `kl` compares the
    policy, with its graph, with a detached copy of itself: undetached, the second derivative would be 0. Where several
    processes share the update, H is the mean of theirs.
    """
    slope = flat(torch.autograd.grad(kl, list(params), create_graph=True))

    def product(v: Tensor) -> Tensor:
        here = flat(torch.autograd.grad(slope @ v, list(params), retain_graph=True))
        return parallel.mean(here) + damping * v

    return product


def natural_step(product: Callable[[Tensor], Tensor], gradient: Tensor, delta: float, iterations: int) -> Tensor:
    """The step s [P] along F^-1 `gradient` with s^T F s / 2 = `delta` nats, F being what `product` multiplies by.

    sqrt(2 delta / x^T F x) x with F x = g by conjugate gradient. s^T F s / 2 models the KL divergence to second order
    where F is undamped; with damping the divergence ends below delta. Zero where that is not finite or x^T F x is not
    positive: an update that cannot be trusted is left out.
    """
    x = conjugate_gradient(product, gradient, iterations)
    curvature = x @ product(x)
    step = (2 * delta / curvature).sqrt() * x
    return torch.where((curvature > 0) & step.isfinite().all(), step, 0.0)


@torch.no_grad()
def backtrack(
    params: Sequence[Tensor],
    step: Tensor,
    accept: Callable[[], Tensor],
    shrink: float = 0.8,
    iterations: int = 10,
) -> Tensor:
    """Move `params` by shrink^j `step` with the smallest j < `iterations` that `accept` allows; return shrink^j.

    `accept` judges the parameters as they stand and returns a 0-dim bool. If no j is allowed, every parameter is what
    it was, bit for bit, and the result is 0. All candidates are tried in either case, as a host read would cost more
    on a GPU; `step` = 0 counts as not accepted.
    """
    before = flat(params)
    chosen, scale = before, torch.zeros_like(before[0])
    for j in range(iterations):
        candidate = before + shrink**j * step
        write(params, candidate)
        good = accept() & (scale == 0) & (step != 0).any()
        chosen = torch.where(good, candidate, chosen)
        scale = torch.where(good, shrink**j, scale)
    write(params, chosen)
    return scale
