"""What a CUDA graph holds addresses of, kept alive as long as the graph."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Memory of graphs that are gone, whose last replays may still run.
_ended: list[list[Tensor]] = []


def keep_for_graph(tensors: Iterable[Tensor | None], otherwise: list[Any], *, until_idle: bool = False) -> None:
    """Keep the memory of tensors for the CUDA graph that is being captured, until it is destroyed or reset.

    Args:
        tensors: those whose addresses the graph holds; None is left out.
        otherwise: the list that keeps them where torch cannot tell which graph is captured (2.11).
        until_idle: keep them longer, until `free_ended`: replays may still run when their graph is destroyed. Without,
            the allocator may give the memory to other streams at once, as that of any tensor.
    """
    # The graph must not keep alive what users attach to their tensors: it may lead back to the graph.
    held = [t.detach() for t in tensors if t is not None]
    try:
        graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    except (AttributeError, RuntimeError):  # torch is too old, or does not capture: another library does
        graph = None
    if not hasattr(graph, "retain_object"):
        otherwise.append(held)
    elif until_idle:
        graph.register_destroy_callback(partial(_ended.append, held))
    else:
        graph.retain_object(held)


def free_ended() -> None:
    """Free the memory of graphs that are gone; waits for its devices if there is any. Not during a capture."""
    ended = [_ended.pop() for _ in range(len(_ended))]  # other threads may add some while this one waits
    for device in {t.device for held in ended for t in held if t.is_cuda}:
        torch.cuda.synchronize(device)
