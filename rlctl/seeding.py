"""One seed, many independent named random streams.

`derive(seed, "env")`, `derive(seed, "action")` ... are independent integers; the same pair always gives the same one.
A name decides the stream, not the order of the calls, so adding a consumer never shifts the others.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch


def derive(seed: int, name: str, bits: int = 63) -> int:
    """A seed of `bits` bits for the stream `name` of the run seeded with `seed` (>= 0).

    Environments get 31: some still seed numpy's old generator, which takes no more than 32.
    """
    if seed < 0:
        raise ValueError(f"a seed is a non-negative integer, got {seed}")
    state = np.random.SeedSequence(entropy=seed, spawn_key=(zlib.crc32(name.encode()),)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(64 - bits))


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` for the stream `name`."""
    return torch.Generator(device=device).manual_seed(derive(seed, name))


@contextlib.contextmanager
def fresh_weights(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Within the block networks are built on `device`, with weights of the stream `name`.

    The global generator is left as it is.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(derive(seed, name))
        yield
