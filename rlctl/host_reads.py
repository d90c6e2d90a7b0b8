"""Which tensor operations make the host wait for the device, told from the operation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

VALUES = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal", "_linalg_check_errors"})
"""Operations that hand a tensor's value to Python."""
SHAPES = frozenset(
    {"nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
)
"""Operations whose result is as long as the values say."""


def host_read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> str:
    """Why an operation, as `TorchDispatchMode` sees it, waits for the device; empty if it does not.

    On a CPU nothing waits, yet the answer is what a CUDA device would give, copies between devices excepted: there
    are none to see. Tensors made of Python numbers (`torch.tensor(x, device=...)`, `x.new_tensor`, lists as indices)
    are copies too, and on no device is there an operation that shows it.
    """
    name, kwargs = func.__name__.split(".")[0], kwargs or {}
    if name in VALUES:
        return "it reads a tensor on the host"
    if name in SHAPES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return "the shape of its result is read on the host"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return "a boolean index is read on the host: use torch.where"
        if any(x.device.type != args[0].device.type for x in indices):
            return f"an index is copied from {indices[0].device.type} to {args[0].device.type}"
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device")
        if isinstance(source, Tensor) and target is not None and torch.device(target).type != source.device.type:
            return f"it copies from {source.device.type} to {torch.device(target).type}"
    return ""
