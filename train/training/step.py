"""One training step of a stack: forward, loss gradient, backward, update; on a GPU replayed as a CUDA graph."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ncollapse.kernels.update.table import same_layout
from ncollapse.train.data.augment import gather_images, pad_images
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.losses import Loss, cross_entropy_loss
from ncollapse.train.networks.architecture import Architecture
from ncollapse.train.networks.forms import form_of
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.graphs import record_graph, waits_for_gpu
from ncollapse.train.training.stack import Stack
from ncollapse.train.training.updates import Updates, in_memory_of_their_own

# Steps of a batch size before a CUDA graph is captured: in them libraries choose kernels and allocate workspaces.
_WARM_UP = 3
# On a CPU gradients of at most this size are copied into memory that stays the same, so that the optimizer need not
# fill its table of addresses again.
_KEPT_BYTES = 2**22


class Step:
    """Train a stack on the batches that it is called with.

    On a CUDA device, from the fourth step of a batch size on, a step replays a CUDA graph: it then costs one launch,
    whatever the number of layers. The graph holds the update too if the optimizers allow it, else they follow it. What
    cannot be recorded is computed step by step.

    Args:
        loss: None: the cross-entropy.
        why_no_graph: why a CUDA graph cannot hold the forward pass; empty where it can.

    Attributes:
        captured: what CUDA graphs hold on a GPU, in words.
    """

    def __init__(
        self, stack: Stack, updates: Updates, data: Dataset, augment: str = "none", *, loss: Loss | None = None,
        why_no_graph: str = "",
    ) -> None:  # fmt: skip
        self._stack, self._updates, self._data = stack, updates, data
        self._loss = loss or cross_entropy_loss()
        self._streamed = isinstance(data, Streamed)
        self._images = None if self._streamed else pad_images(data.train_x, augment)
        self._params = list(stack.params.values())
        self._leaves = [stack.copies.get(name, param) for name, param in stack.params.items()]
        self._rows: list[nn.Parameter] = list(stack.rows.values())
        self._kept: list[Tensor] = []
        leaves = list(zip(self._params, self._leaves, strict=True))
        size = sum(leaf.nbytes for leaf in self._leaves)
        if updates.reads_in_place and stack.weight.device.type == "cpu" and size <= _KEPT_BYTES:
            self._kept = [torch.empty_like(param, dtype=leaf.dtype) for param, leaf in leaves]
        self._assigned = False  # the parameters have them
        self._kept_rows = [kept[0] for kept in self._kept] if self._rows else []
        self._steps: Counter[torch.Size] = Counter()
        self._replays: dict[torch.Size, Callable[..., None]] = {}
        self.captured = captured(updates.why_no_graph, why_no_graph)
        self._graphs = not why_no_graph
        self._update_in_graph = not updates.why_no_graph

    def __call__(self, batch: Tensor, views: Tensor | None = None) -> None:
        """Take a step on a batch.

        Args:
            batch: indices of the samples, `[B]` for all runs or `[R, B]`; of streamed data the samples `[B, …]`.
            views: crop and flip of each sample, `[B, 3]` or `[R, B, 3]`, from `draw_views`; None: no augmentation. Of
                streamed data the labels `[B]`.
        """
        if not batch.is_cuda or not self._graphs:
            self._gradients(batch, views)
            self._updates.step()
            return
        self._steps[batch.shape] += 1
        if self._steps[batch.shape] < _WARM_UP:
            self._gradients(batch, views)
            self._updates.step()
            return
        if self._steps[batch.shape] == _WARM_UP:
            with waits_for_gpu() as lines:
                self._gradients(batch, views)
            self._updates.step()
            if lines:
                self._use_no_graphs(f"it waits for the GPU ({lines[0]})")
            return
        if batch.shape not in self._replays:
            self._capture(batch, views)
        if not self._graphs:
            self._gradients(batch, views)
            self._updates.step()
            return
        self._replays[batch.shape](batch, views)

    def _gradients(self, batch: Tensor, views: Tensor | None) -> None:
        if self._images is None:
            assert views is not None
            samples, labels = batch, views
        else:
            size = self._data.size if views is not None else 0
            samples, labels = gather_images(self._images, batch, views, size), self._data.train_y[batch]
        _, logits = self._stack(samples, train=True)
        # Training needs only the gradient of each run's mean loss, not its value.
        logits_grad = self._loss.grad(logits.detach(), labels)
        if self._rows:
            self._gradients_of_one(logits, logits_grad)
            return
        grads = torch.autograd.grad(logits, self._leaves, logits_grad)
        if self._kept:
            torch._foreach_copy_(self._kept, grads)
            self._assign_kept()
            return
        for param, grad in zip(self._params, grads, strict=True):
            # The fused update needs gradients in the layout of the parameters.
            param.grad = grad if same_layout(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)

    def _gradients_of_one(self, logits: Tensor, logits_grad: Tensor) -> None:
        """Compute the gradients of a run that its module computes; a parameter that this step has not used has none."""
        grads = torch.autograd.grad(logits, self._rows, logits_grad, allow_unused=True)
        if self._updates.takes_rows:
            for row, grad in zip(self._rows, in_memory_of_their_own(grads), strict=True):
                row.grad = grad
        elif self._kept and all(grad is not None for grad in grads):
            torch._foreach_copy_(self._kept_rows, grads)
            self._assign_kept()
        else:
            for param, grad in zip(self._params, grads, strict=True):
                param.grad = None if grad is None else grad.contiguous().unsqueeze(0)
            self._assigned = False

    def _assign_kept(self) -> None:
        if not self._assigned:
            for param, kept in zip(self._params, self._kept, strict=True):
                param.grad = kept
            self._assigned = True

    def _use_no_graphs(self, reason: str) -> None:
        self._graphs, self.captured = False, captured("", reason)
        self._replays.clear()

    def _capture(self, batch: Tensor, views: Tensor | None) -> None:
        """Record steps on batches of this size; if only the update prevents it, without the update."""
        static = batch.clone()
        static_views = None if views is None else views.clone()
        with_update = self._update_in_graph

        def work() -> None:
            self._gradients(static, static_views)
            if with_update:
                self._updates.step()

        graph, reason = record_graph(work)
        if graph is None and with_update:
            self._update_in_graph, with_update, of_update = False, False, reason
            graph, reason = record_graph(work)
            self.captured = captured(of_update, "")
        if graph is None:
            self._use_no_graphs(reason)
            return
        replayed = graph
        takers: Sequence[Tensor] = self._rows if self._updates.takes_rows else self._params
        grads = [param.grad for param in takers]  # in the graph's memory: keep them as long as the graph

        def replay(batch: Tensor, views: Tensor | None) -> None:
            static.copy_(batch)
            if static_views is not None and views is not None:
                static_views.copy_(views)
            replayed.replay()
            if not with_update:
                for param, grad in zip(takers, grads, strict=True):
                    # Graphs of other batch sizes have theirs; some optimizers keep the gradient.
                    param.grad = grad.clone() if grad is not None and self._updates.takes_rows else grad
                self._updates.step()

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
