"""A stack and its optimizers, from a batch to gradients to the update: what stands beside other lanes in a step."""

import torch
from torch import Tensor, nn

from ncollapse.kernels.update.table import same_layout
from ncollapse.train.data.augment import gather_images, pad_images
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.losses import Loss, cross_entropy_loss
from ncollapse.train.training.stack import Stack
from ncollapse.train.training.updates import Updates, in_memory_of_their_own

# On a CPU gradients of at most this size are copied into memory that stays the same, so that the optimizer need not
# fill its table of addresses again.
_KEPT_BYTES = 2**22


class TrainingSamples:
    """The training samples of a data set, from which each step gathers a batch.

    Attributes:
        indexed: a batch is one of indices; else, of streamed data, the samples themselves.
    """

    def __init__(self, data: Dataset, augment: str = "none") -> None:
        self._data, self.indexed = data, not isinstance(data, Streamed)
        self._images = pad_images(data.train_x, augment) if self.indexed else data.train_x

    def gather(self, batch: Tensor, views: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return samples and labels of what `Step` is called with."""
        if not self.indexed:
            assert views is not None
            return batch, views
        size = self._data.size if views is not None else 0
        return gather_images(self._images, batch, views, size), self._data.train_y[batch]


class Lane:
    """Compute the gradients of a stack's runs, which its optimizers take.

    Args:
        samples: lanes may share them.
        loss: None: the cross-entropy.

    Attributes:
        takers: the parameters whose `grad` the optimizers read.
    """

    def __init__(self, stack: Stack, updates: Updates, samples: TrainingSamples, loss: Loss | None = None) -> None:
        self.stack, self.updates, self.samples = stack, updates, samples
        self._loss = loss or cross_entropy_loss()
        self._params = list(stack.params.values())
        self._leaves = [stack.copies.get(name, param) for name, param in stack.params.items()]
        self._rows: list[nn.Parameter] = list(stack.rows.values())
        self.takers: list[Tensor] = [*self._rows] if updates.takes_rows else self._params
        self._kept: list[Tensor] = []
        leaves = list(zip(self._params, self._leaves, strict=True))
        size = sum(leaf.nbytes for leaf in self._leaves)
        if updates.reads_in_place and stack.weight.device.type == "cpu" and size <= _KEPT_BYTES:
            self._kept = [torch.empty_like(param, dtype=leaf.dtype) for param, leaf in leaves]
        self._assigned = False  # the parameters have them
        self._kept_rows = [kept[0] for kept in self._kept] if self._rows else []

    def gradients(self, batch: Tensor, views: Tensor | None) -> None:
        """Compute the gradients on a batch of these runs; see `Step`."""
        samples, labels = self.samples.gather(batch, views)
        _, logits = self.stack(samples, train=True)
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
        if self.updates.takes_rows:
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
