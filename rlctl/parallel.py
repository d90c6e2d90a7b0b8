"""Several processes that share one on-policy update: data parallel, started by torchrun.

    torchrun --nproc-per-node 4 -m rlctl train --algo ppo --env Humanoid --num-envs 16384 --device cuda

Every process ("rank") steps its share of the worlds with seeds of its own and learns from its own rollout; the ranks
average each gradient before it is applied and merge the moments of the normalisers, so parameters are the same
everywhere at every moment. Rank 0 alone logs, evaluates and writes checkpoints.

Outside of torchrun everything here does nothing: one process is a world of size 1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlctl.errors import UsageError

C = TypeVar("C")


def launched() -> bool:
    """Whether torchrun, or something that sets its variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def launched_rank() -> int:
    """Number of this process as it was launched; 0 where it is alone. Known before the processes have met."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """Number of this process on its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(device: torch.device) -> None:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs. Does nothing if they have met already."""
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Processes that share the update."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def mean_gradients(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each gradient averaged over the ranks, in one message; None where the loss does not depend on a parameter."""
    present = [g for g in grads if g is not None]
    if world_size() == 1 or not present:
        return list(grads)
    flat = mean(torch.cat([g.reshape(-1) for g in present]))
    parts = iter(torch.split(flat, [g.numel() for g in present]))
    return [None if g is None else next(parts).view(g.shape) for g in grads]


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over the ranks, without its graph; `x` itself where there is but one."""
    return x if world_size() == 1 else total(x) / world_size()


def total(x: Tensor) -> Tensor:
    """The sum of `x` over the ranks."""
    if world_size() == 1:
        return x
    out = x.detach().clone()
    dist.all_reduce(out)
    return out


def merged_moments(mean_here: Tensor, var_here: Tensor, rows: int) -> tuple[Tensor, Tensor, int]:
    """Mean, (population) variance and number of all ranks' rows together; every rank brings equally many."""
    if world_size() == 1:
        return mean_here, var_here, rows
    together = mean(mean_here)
    return together, mean(var_here + (mean_here - together).square()), rows * world_size()


def std_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sample standard deviation and mean of all ranks' elements together."""
    if world_size() == 1:
        return torch.std_mean(x)
    var, here = torch.var_mean(x, correction=0)
    together, var, n = merged_moments(here, var, x.numel())
    return (var * (n / (n - 1))).sqrt(), together


def largest(x: Tensor) -> Tensor:
    """The largest `x` [] of any rank."""
    if world_size() == 1:
        return x
    out = x.detach().clone()
    dist.all_reduce(out, dist.ReduceOp.MAX)
    return out


def anybody(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes; all of them ask at the same moment."""
    if world_size() == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=device)) > 0)


def broadcast(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world_size() > 1:
        for x in module.state_dict().values():
            dist.broadcast(x, 0)


def share(cfg: C, size: int) -> C:
    """The part of an on-policy agent's config that one of `size` ranks works with: `cfg` itself where `size` is 1.

    Worlds and minibatches are divided, so that one update still learns from as many transitions in as many steps, and
    so are the steps, of which each rank makes its part. Raises UsageError where they cannot be divided.
    """
    if size == 1:
        return cfg
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):  # type: ignore[arg-type]
        value = getattr(cfg, f.name)
        if f.name == "num_envs" or f.name.endswith("minibatch_size"):
            if value % size:
                raise UsageError(
                    f"{f.name}={value} cannot be divided among {size} processes: choose a multiple of {size}"
                )
            changes[f.name] = value // size
        elif f.name == "steps":
            changes[f.name] = -(-value // size)
    return dataclasses.replace(cfg, **changes)  # type: ignore[type-var]
