"""One step of a stack: forward, loss, backward, update; on a GPU replayed as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nc import optim
from nc.train.data import Dataset
from nc.train.stack import Stack

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

    def __init__(self, stack: Stack, optimizer: optim.Stacked, data: Dataset) -> None:
        self._stack, self._optimizer, self._data = stack, optimizer, data
        self._params = list(stack.params.values())
        self._targets = torch.eye(len(data.classes), dtype=stack.weight.dtype, device=stack.weight.device)
        self._seen: dict[torch.Size, int] = {}
        self._replays: dict[torch.Size, Callable[[Tensor], None]] = {}

    def __call__(self, batch: Tensor) -> None:
        """Take a step on the samples with these indices, `[B]` for all runs or `[R, B]`."""
        replay = self._replays.get(batch.shape)
        if replay is not None:
            replay(batch)
            return
        seen = self._seen[batch.shape] = self._seen.get(batch.shape, 0) + 1
        if batch.is_cuda and seen > _WARM_UP:
            self._replays[batch.shape] = replay = self._capture(batch)
            replay(batch)
            return
        self._run(batch)

    def _run(self, batch: Tensor) -> None:
        _, logits = self._stack(self._data.train_x[batch], train=True)
        # The gradient of each run's mean cross-entropy is all that training needs of it.
        with torch.no_grad():
            slope = (logits.softmax(-1) - self._targets[self._data.train_y[batch]]) / logits.shape[1]
        for param, grad in zip(self._params, torch.autograd.grad(logits, self._params, slope), strict=True):
            param.grad = grad.contiguous()  # the layout of the parameters, which the fused update needs
        self._optimizer.step()

    def _capture(self, batch: Tensor) -> Callable[[Tensor], None]:
        static, graph = batch.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and runs nothing
            self._run(static)
        grads = [param.grad for param in self._params]  # in the graph's memory: they live as long as it does

        def replay(batch: Tensor, _kept: object = grads) -> None:
            static.copy_(batch)
            graph.replay()

        return replay
