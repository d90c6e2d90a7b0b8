"""What every capture of a CUDA graph needs around it: its random generators, and what to do with them if it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


def new_graph(generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    """An empty graph whose replays draw from `generators` anew instead of repeating the numbers of the capture."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph


@contextlib.contextmanager
def rescued(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Within, a graph that has these generators is captured; if that raises, they are as before, and usable.

    A capture that fails leaves them convinced that it goes on: every later draw outside a capture would raise. So each
    gets a new state object with the old numbers. Graphs captured before keep the old object and must not be replayed.
    """
    kept = [generator.get_state() for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(generators, kept, strict=True):
            fresh = torch.Generator(generator.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh)
        raise
