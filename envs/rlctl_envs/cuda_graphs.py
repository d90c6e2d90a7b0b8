"""Capturing a CUDA graph, and what is left to put right when a capture fails."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch


@contextlib.contextmanager
def capture(
    device: torch.device,
    generators: Sequence[torch.Generator],
    stream: Any,
    error_mode: Literal["global", "thread_local", "relaxed"] = "thread_local",
) -> Iterator[torch.cuda.CUDAGraph]:
    """Within, work on `stream` (torch's, of `device`) goes into the graph that this gives.

    Replays draw from `generators` anew instead of repeating the numbers of the capture. The graph has a memory pool of
    its own: one that is shared cannot be used again once all graphs that held it are gone.

    A capture that fails raises, and leaves the process as it was: torch would go on in the captured stream, its
    allocator would believe that the capture goes on, and each generator likewise, so that every later draw outside of
    a capture raises. Generators get new state objects with the old numbers; graphs captured before that have the same
    generators keep the old objects and must not be replayed.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    for generator in generators:
        graph.register_generator_state(generator)
    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.current_stream(device)
    drawing = [*generators, torch.cuda.default_generators[index]]  # which torch registers with every graph
    kept = [generator.get_state() for generator in drawing]
    # an object with a graph or a pool that is collected while a capture is under way frees memory at the wrong time
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=error_mode):
            yield graph
    except BaseException:
        torch.cuda.set_stream(before)
        _end_allocation(index, pool)
        for generator, state in zip(drawing, kept, strict=True):
            fresh = torch.Generator(generator.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh)
        raise
    finally:
        if collecting:
            gc.enable()


def _end_allocation(index: int, pool: Any) -> None:
    """Take back what torch before 2.12 leaves behind: an allocator that serves a capture which is no more."""
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except (RuntimeError, AttributeError):  # later versions have done so themselves
        return
    torch._C._cuda_releasePool(index, pool)
