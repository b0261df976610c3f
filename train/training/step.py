"""One training step: forward, loss gradient, backward, update; on a GPU replayed as a CUDA graph."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ncollapse.train.networks.architecture import Architecture
from ncollapse.train.networks.forms import form_of
from ncollapse.train.networks.side_stream import main_stream
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.graphs import record_graph, waits_for_gpu
from ncollapse.train.training.lane import Lane
from ncollapse.train.training.randomness import Generators

# Steps of a batch size before a CUDA graph is captured: in them libraries choose kernels and allocate workspaces.
_WARM_UP = 3


class Step:
    """Train the stacks of some lanes on the batches that it is called with.

    On a CUDA device, from the fourth step of a batch size on, a step replays a CUDA graph: it then costs one launch,
    whatever the number of layers. The graph holds the update too if the optimizers allow it, else they follow it. What
    cannot be recorded is computed step by step.

    Several lanes are branches of the graph: each runs on a stream of its own, forked from the step's stream and joined
    with it again, so that one fills what the others leave of the GPU. A lane's kernels are those that it has alone.
    Memory needs no further care: a lane takes its own from its stream's, a fork waits for all that came before, and
    all that follows waits for the lanes.

    Args:
        lanes: one of any number of runs, or several of one run each.
        why_no_graph: why a CUDA graph cannot hold the forward pass; empty where it can.

    Attributes:
        captured: what CUDA graphs hold on a GPU, in words.
        generators: for each lane those from which the user's code draws, outside of a graph; without them it draws from
            the global ones as they are.
    """

    def __init__(self, lanes: Sequence[Lane], why_no_graph: str = "") -> None:
        self.lanes = list(lanes)
        device = lanes[0].stack.weight.device
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda" and len(lanes) > 1:
            with torch.cuda.device(device):
                self._streams = [main_stream(1 + i) for i in range(len(lanes))]  # 0 is that of the recording
        self._steps: Counter[torch.Size] = Counter()
        self._replays: dict[torch.Size, Callable[..., None]] = {}
        of_update = next(filter(None, (lane.updates.why_no_graph for lane in lanes)), "")
        self.captured = captured(of_update, why_no_graph)
        self.generators: list[Generators] = []
        self._recording = False
        self._graphs = not why_no_graph
        self._update_in_graph = not of_update

    def __call__(self, batch: Tensor, views: Tensor | None = None) -> None:
        """Take a step on a batch.

        Args:
            batch: indices of the samples, `[B]` for all runs or `[R, B]`; of streamed data the samples `[B, …]`.
            views: crop and flip of each sample, `[B, 3]` or `[R, B, 3]`, from `draw_views`; None: no augmentation. Of
                streamed data the labels `[B]`.
        """
        if not batch.is_cuda or not self._graphs:
            self._work(batch, views)
            return
        self._steps[batch.shape] += 1
        if self._steps[batch.shape] < _WARM_UP:
            self._work(batch, views)
            return
        if self._steps[batch.shape] == _WARM_UP:
            with waits_for_gpu() as lines:
                self._work(batch, views, update=False)
            self._update()
            if lines:
                self._use_no_graphs(f"it waits for the GPU ({lines[0]})")
            return
        if batch.shape not in self._replays:
            self._capture(batch, views)
        if not self._graphs:
            self._work(batch, views)
            return
        self._replays[batch.shape](batch, views)

    def _work(self, batch: Tensor, views: Tensor | None, *, update: bool = True) -> None:
        """Compute the gradients of all lanes, and with `update` take their updates."""
        if len(self.lanes) == 1:  # without what a step of a small network would notice
            self.lanes[0].gradients(batch, views)
            if update:
                self.lanes[0].updates.step()
            return
        by_run = self.lanes[0].samples.indexed and batch.dim() == 2
        with self._branches() as branch:
            for i, lane in enumerate(self.lanes):
                with branch(i), self._turn(i):
                    if by_run:
                        lane.gradients(batch[i], None if views is None else views[i])
                    else:
                        lane.gradients(batch, views)
                    if update:
                        lane.updates.step()

    def _update(self) -> None:
        for i, lane in enumerate(self.lanes):
            with self._turn(i):
                lane.updates.step()

    @contextmanager
    def _branches(self) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
        """Yield the context in which a lane works: a stream of its own, which ends before what follows the block."""
        if not self._streams:
            yield lambda i: nullcontext()
            return
        main, forked = torch.cuda.current_stream(self._streams[0].device), list[torch.cuda.Stream]()

        @contextmanager
        def branch(i: int) -> Iterator[None]:
            stream = self._streams[i]
            stream.wait_stream(main)
            forked.append(stream)
            with torch.cuda.stream(stream):
                yield

        try:
            yield branch
        finally:  # a recording cannot end before, not even one that has failed
            for stream in forked:
                main.wait_stream(stream)

    @contextmanager
    def _turn(self, i: int) -> Iterator[None]:
        """Let a lane draw from its own generators, unless a graph is recorded, which cannot hold their states."""
        if not self.generators or self._recording:
            yield
            return
        before = self.generators[i].take_turn()
        try:
            yield
        finally:
            self.generators[i] = before.take_turn()

    def _use_no_graphs(self, reason: str) -> None:
        self._graphs, self.captured = False, captured("", reason)
        self._replays.clear()

    def _capture(self, batch: Tensor, views: Tensor | None) -> None:
        """Record steps on batches of this size; if only the update prevents it, without the update."""
        static = batch.clone()
        static_views = None if views is None else views.clone()
        with_update = self._update_in_graph

        def work() -> None:
            self._recording = True
            try:
                self._work(static, static_views, update=with_update)
            finally:
                self._recording = False

        device = self.lanes[0].stack.weight.device
        graph, reason = record_graph(work, device)
        if graph is None and with_update:
            self._update_in_graph, with_update, of_update = False, False, reason
            graph, reason = record_graph(work, device)
            self.captured = captured(of_update, "")
        if graph is None:
            self._use_no_graphs(reason)
            return
        replayed = graph
        takers = [(param, lane) for lane in self.lanes for param in lane.takers]
        grads = [param.grad for param, _ in takers]  # in the graph's memory: keep them as long as the graph
        step = weakref.proxy(self)  # no cycle: the graph's memory is free at once when the step is gone

        def replay(batch: Tensor, views: Tensor | None) -> None:
            static.copy_(batch)
            if static_views is not None and views is not None:
                static_views.copy_(views)
            replayed.replay()
            if not with_update:
                for (param, lane), grad in zip(takers, grads, strict=True):
                    # Graphs of other batch sizes have theirs; some optimizers keep the gradient.
                    param.grad = grad.clone() if grad is not None and lane.updates.takes_rows else grad
                step._update()

        self._replays[batch.shape] = replay


def why_no_graph(architecture: Architecture, precision: str, plugins: Plugins) -> str:
    """Say why a CUDA graph cannot hold the forward pass of a model; "" where it can.

    A graph repeats the random numbers and the branches of the step that it has recorded: a model of the user's that has
    either is one whose runs do not stack.
    """
    if not architecture.own:
        return ""
    form = form_of(architecture, precision, plugins)
    return form.reason if form.kind == "alone" else ""


def captured(of_update: str, of_forward: str) -> str:
    """Say what CUDA graphs hold, from the reasons why they cannot hold the update or the forward pass; "" for none."""
    if of_forward:
        return f"nothing: {of_forward}"
    return f"forward and backward pass: {of_update}" if of_update else "forward pass, backward pass and update"
