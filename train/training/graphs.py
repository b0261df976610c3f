"""CUDA graphs of what the user's code may be part of: recorded if they can be, else said why not."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ncollapse.train.errors import blamed, out_of_memory
from ncollapse.train.networks.side_stream import main_stream


@contextmanager
def waits_for_gpu() -> Iterator[list[str]]:
    """Note the lines that let the processor wait for the GPU, which no CUDA graph can hold.

    Such as `.item()`, a mask as index, or a tensor that is made of numbers in the processor's memory. To know them
    before a recording is better than a recording that fails.

    Yields:
        A list that is filled when the block ends: "mine.py, line 12".
    """
    lines: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            lines.append(f"{Path(warning.filename).name}, line {warning.lineno}")
        elif "Synchronization debug mode" not in text:  # which says that it does not find all
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def record_graph(work: Callable[[], None], device: torch.device) -> tuple[torch.cuda.CUDAGraph | None, str]:
    """Record a GPU's part of some work, without doing it, in a CUDA graph.

    The GPU need not be the current one: a recording on a stream of another would be empty, and so would its replays.

    Returns:
        The graph and ""; or None and why it cannot be recorded: then nothing is left of the attempt.

    Raises:
        RuntimeError: memory is used up.
    """
    with torch.cuda.device(device):
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=main_stream()):
                work()
        except Exception as error:
            # The end of a recording that has failed raises an error too, with the first one as its context.
            first: BaseException = error
            while first.__context__ is not None and not out_of_memory(first):
                first = first.__context__
            # Where the end has failed, the stream of the recording is still the current one. The stream and the
            # allocator are free for others once the graph is reset.
            torch.cuda.set_stream(stream)
            graph.reset()
            if out_of_memory(first):
                raise first from None
            return None, blamed(first)
        return graph, ""
