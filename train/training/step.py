"""One step of a stack: forward, loss, backward, update; on a GPU replayed as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ncollapse.kernels.cross_entropy import cross_entropy_grad
from ncollapse.kernels.update.table import same_layout
from ncollapse.train.data.augment import padded, take
from ncollapse.train.data.sets import Dataset
from ncollapse.train.training.stack import Optimizer, Stack

#: Steps with a batch size that are launched one by one before they are captured: libraries choose their kernels and
#: take their workspaces then.
_WARM_UP = 3


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each run, `[R]`, from logits `[R, B, K]` and labels `[B]` or `[R, B]`."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.expand(logits.shape[:2]).flatten(), reduction="none")
    return losses.view(logits.shape[:2]).mean(1)


class Step:
    """Trains a stack on the batches that it is called with.

    On a CUDA device the steps with a batch size are, from the fourth on, one CUDA graph that is replayed: then a step
    costs one launch, whatever the number of layers.
    """

    def __init__(self, stack: Stack, optimizer: Optimizer, data: Dataset, augment: str = "none") -> None:
        self._stack, self._optimizer, self._data = stack, optimizer, data
        self._images = padded(data.train_x, augment)
        self._params = list(stack.params.values())
        self._leaves = [stack.copies.get(name, param) for name, param in stack.params.items()]
        self._seen: dict[torch.Size, int] = {}
        self._replays: dict[torch.Size, Callable[[Tensor, Tensor | None], None]] = {}

    def __call__(self, batch: Tensor, views: Tensor | None = None) -> None:
        """Take a step on the samples with these indices, `[B]` for all runs or `[R, B]`.

        Args:
            views: for each sample how it is seen, `[B, 3]` or `[R, B, 3]` (`ncollapse.train.data.augment`).
        """
        replay = self._replays.get(batch.shape)
        if replay is not None:
            replay(batch, views)
            return
        seen = self._seen[batch.shape] = self._seen.get(batch.shape, 0) + 1
        if batch.is_cuda and seen > _WARM_UP:
            self._replays[batch.shape] = replay = self._capture(batch, views)
            replay(batch, views)
            return
        self._run(batch, views)

    def _run(self, batch: Tensor, views: Tensor | None) -> None:
        images = take(self._images, batch, views, self._data.size)
        _, logits = self._stack(images, train=True)
        # The gradient of each run's mean cross-entropy is all that training needs of it.
        slope = cross_entropy_grad(logits.detach(), self._data.train_y[batch])
        for param, grad in zip(self._params, torch.autograd.grad(logits, self._leaves, slope), strict=True):
            # The layout of the parameters, which the fused update needs.
            param.grad = grad if same_layout(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        self._optimizer.step()

    def _capture(self, batch: Tensor, views: Tensor | None) -> Callable[[Tensor, Tensor | None], None]:
        static, graph = batch.clone(), torch.cuda.CUDAGraph()
        static_views = None if views is None else views.clone()
        with torch.cuda.graph(graph):  # records, and runs nothing
            self._run(static, static_views)
        grads = [param.grad for param in self._params]  # in the graph's memory: they live as long as it does

        def replay(batch: Tensor, views: Tensor | None, _kept: object = grads) -> None:
            static.copy_(batch)
            if static_views is not None and views is not None:
                static_views.copy_(views)
            graph.replay()

        return replay
