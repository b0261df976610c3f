"""One training step of a stack: forward, loss gradient, backward, update; on a GPU replayed as a CUDA graph."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ncollapse import optim
from ncollapse.kernels.cross_entropy import cross_entropy_grad
from ncollapse.kernels.update.table import same_layout
from ncollapse.train.data.augment import gather_images, pad_images
from ncollapse.train.data.sets import Dataset
from ncollapse.train.training.stack import Stack

# Steps of a batch size before a CUDA graph is captured: in them libraries choose kernels and allocate workspaces.
_WARM_UP = 3


class Step:
    """Train a stack on the batches that it is called with.

    On a CUDA device, from the fourth step of a batch size on, a step replays a CUDA graph: it then costs one launch,
    whatever the number of layers.
    """

    def __init__(self, stack: Stack, optimizer: optim.Optimizer, data: Dataset, augment: str = "none") -> None:
        self._stack, self._optimizer, self._data = stack, optimizer, data
        self._images = pad_images(data.train_x, augment)
        self._params = list(stack.params.values())
        self._leaves = [stack.copies.get(name, param) for name, param in stack.params.items()]
        self._steps: Counter[torch.Size] = Counter()
        self._replays: dict[torch.Size, Callable[[Tensor, Tensor | None], None]] = {}

    def __call__(self, batch: Tensor, views: Tensor | None = None) -> None:
        """Take a step on a batch.

        Args:
            batch: indices of the samples, `[B]` for all runs or `[R, B]`.
            views: crop and flip of each sample, `[B, 3]` or `[R, B, 3]`, from `draw_views`; None: no augmentation.
        """
        self._steps[batch.shape] += 1
        if not batch.is_cuda or self._steps[batch.shape] <= _WARM_UP:
            self._run(batch, views)
            return
        if batch.shape not in self._replays:
            self._replays[batch.shape] = self._capture(batch, views)
        self._replays[batch.shape](batch, views)

    def _run(self, batch: Tensor, views: Tensor | None) -> None:
        images = gather_images(self._images, batch, views, self._data.size)
        _, logits = self._stack(images, train=True)
        # Training needs only the gradient of each run's mean cross-entropy, not its value.
        logits_grad = cross_entropy_grad(logits.detach(), self._data.train_y[batch])
        for param, grad in zip(self._params, torch.autograd.grad(logits, self._leaves, logits_grad), strict=True):
            # The fused update needs gradients in the layout of the parameters.
            param.grad = grad if same_layout(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        self._optimizer.step()

    def _capture(self, batch: Tensor, views: Tensor | None) -> Callable[[Tensor, Tensor | None], None]:
        static, graph = batch.clone(), torch.cuda.CUDAGraph()
        static_views = None if views is None else views.clone()
        with torch.cuda.graph(graph):  # records without running
            self._run(static, static_views)
        grads = [param.grad for param in self._params]  # in the graph's memory: keep them as long as the graph

        def replay(batch: Tensor, views: Tensor | None, _kept: object = grads) -> None:
            static.copy_(batch)
            if static_views is not None and views is not None:
                static_views.copy_(views)
            graph.replay()

        return replay
