"""The losses that a run may name, each with its values per sample and the gradient of each run's mean.

| name | value of a sample with logits z and label y, of K classes | source |
| --- | --- | --- |
| cross_entropy | −log p_y; with label smoothing ε the target is (1 − ε)·one-hot(y) + ε/K | |
| mse | (1/K) Σ_c (z_c − [c = y])² | `torch.nn.functional.mse_loss` |
| mse_rescaled | (1/K) (k (z_y − M)² + Σ_{c≠y} z_c²) | Hui & Belkin 2021, arXiv 2006.07322, Section 3 |
| focal | −(1 − p_y)^γ log p_y | Lin et al. 2017, arXiv 1708.02002, Equation 4 |

p is the softmax of z. A function of p alone has a gradient by z whose sum over the classes is zero, so that the exact
law of NC0 (`ufm.row_sum_factor`) holds for cross_entropy and focal; those of the squared errors and of the user's
losses have other row sums.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.kernels.cross_entropy import cross_entropy_grad
from ncollapse.train.config import LOSSES, RunConfig
from ncollapse.train.errors import OwnCodeError, UserError, out_of_memory
from ncollapse.train.plugins import Plugins

#: Options of a loss with their defaults. Those of mse_rescaled are what its authors take for the 1,000 classes of
#: ImageNet; with k = M = 1 it is mse, which they take up to 42 classes.
_OPTIONS: dict[str, dict[str, float]] = {
    "cross_entropy": {}, "mse": {}, "mse_rescaled": {"k": 15.0, "M": 30.0}, "focal": {"gamma": 2.0},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss with its options.

    Attributes:
        name: as settings have it.
        per_sample: logits `[N, K]`, labels `[N]` int64 → the loss of each sample, `[N]`.
        grad: logits `[R, B, K]` of R runs, labels `[B]` for all of them or `[R, B]` → the gradient of each run's mean
            loss, `[R, B, K]`.
        sums_to_zero: whether that gradient sums to zero over the classes, so that the exact law of NC0 holds.
    """

    name: str
    per_sample: Callable[[Tensor, Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]
    sums_to_zero: bool = False

    def of_runs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each sample of each run, `[R, B]`, from logits `[R, B, K]` and labels `[B]`."""
        values = self.per_sample(logits.flatten(0, 1), labels.expand(logits.shape[:2]).flatten())
        return values.view(logits.shape[:2])


def make_loss(run: RunConfig, plugins: Plugins) -> Loss:
    """Make the loss of a run.

    Raises:
        UserError: options that the loss does not have or cannot take.
    """
    if run.loss not in LOSSES:
        return _own(run, plugins)
    given, known = run.options("loss"), _OPTIONS[run.loss]
    for name, value in given.items():
        if name not in known:
            raise UserError(f"loss_options: {run.loss} has {', '.join(known) or 'no options'}, not {name}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value < 0 or not math.isfinite(value):
            raise UserError(f"loss_options: {name} of {run.loss} is a number of at least 0; got {value!r}")
    options = known | given
    if run.loss == "cross_entropy":
        return cross_entropy_loss(run.label_smoothing)
    if run.loss == "focal":
        return _focal(options["gamma"])
    k, height = (options["k"], options["M"]) if run.loss == "mse_rescaled" else (1.0, 1.0)
    return _squared_error(run.loss, k, height)


def cross_entropy_loss(label_smoothing: float = 0.0) -> Loss:
    """Make the cross-entropy, with targets (1 − ε)·one-hot(labels) + ε/K."""

    def per_sample(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    def grad(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_grad(logits, labels, label_smoothing)

    return Loss("cross_entropy", per_sample, grad, sums_to_zero=True)


def _squared_error(name: str, k: float, height: float) -> Loss:
    def residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return z − M·one-hot(y), and each element's weight."""
        one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        return logits - height * one_hot, 1 + (k - 1) * one_hot

    def per_sample(logits: Tensor, labels: Tensor) -> Tensor:
        difference, weight = residual(logits, labels)
        return (weight * difference.square()).mean(-1)

    def grad(logits: Tensor, labels: Tensor) -> Tensor:
        difference, weight = residual(logits, labels.expand(logits.shape[:-1]))
        return weight * difference * (2 / (logits.shape[-1] * logits.shape[-2]))

    return Loss(name, per_sample, grad)


def _focal(gamma: float) -> Loss:
    def parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the softmax without the label's entry, 1 − p_y, and log p_y; accurate where p_y is near 1 too."""
        label = labels.unsqueeze(-1)
        others = logits.softmax(-1).scatter(-1, label, 0.0)
        of_others = logits.scatter(-1, label, -torch.inf).logsumexp(-1, keepdim=True)
        return others, others.sum(-1, keepdim=True), -F.softplus(of_others - logits.gather(-1, label))

    def per_sample(logits: Tensor, labels: Tensor) -> Tensor:
        _, missing, log_p = parts(logits, labels)
        return -(missing**gamma * log_p).squeeze(-1)

    def grad(logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.expand(logits.shape[:-1])
        others, missing, log_p = parts(logits, labels)
        # log p / (1 − p), which tends to −1 as p → 1.
        ratio = torch.where(missing > 0, log_p / missing, -1.0)
        others = others * (missing**gamma * (1 - gamma * (1 - missing) * ratio))
        # Minus the sum of the others, as in `cross_entropy_grad`: the row sum is zero up to the rounding of that sum.
        return others.scatter_(-1, labels.unsqueeze(-1), -others.sum(-1, keepdim=True)) / logits.shape[-2]

    return Loss("focal", per_sample, grad, sums_to_zero=True)


def _own(run: RunConfig, plugins: Plugins) -> Loss:
    found, options = plugins.find("loss", run.loss), run.options("loss")
    function: Any = found
    _check_options(run.loss, found, options, plugins)
    if inspect.isclass(found):
        try:
            function, options = found(**options), {}
        except Exception as error:
            raise OwnCodeError.of(f"loss {run.loss}", error) from error
        if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
            raise UserError(f"loss {run.loss} ({plugins.where('loss', run.loss)}) has parameters, which nothing trains")

    def per_sample(logits: Tensor, labels: Tensor) -> Tensor:
        if isinstance(function, nn.Module):
            function.to(logits.device)
        try:
            return function(logits, labels.clone(), **options)  # it may change them in place
        except Exception as error:
            if out_of_memory(error):
                raise
            raise OwnCodeError.of(f"loss {run.loss}", error) from error

    def grad(logits: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            flat = logits.detach().flatten(0, -2).requires_grad_()
            values = per_sample(flat, labels.expand(logits.shape[:-1]).flatten())
            try:
                (found,) = torch.autograd.grad(values.sum(), flat)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                raise OwnCodeError.of(f"loss {run.loss}, gradient", error) from error
        return found.view_as(logits) / logits.shape[-2]

    return Loss(run.loss, per_sample, grad)


def _check_options(name: str, found: Any, options: Mapping[str, Any], plugins: Plugins) -> None:
    """Raise UserError for options that a loss of the user's does not take, or that it needs."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of some functions in C
        return
    what = f"loss {name} ({plugins.where('loss', name)})"
    try:
        signature.bind(*() if inspect.isclass(found) else (None, None), **options)
    except TypeError as error:
        takes = "its options" if inspect.isclass(found) else "logits, labels and its options"
        raise UserError(f"{what} is called with {takes}, {dict(options) or 'none here'}: {error}") from None


def try_loss(run: RunConfig, plugins: Plugins, num_classes: int) -> None:
    """Try the loss of a run on a batch of random logits.

    Raises:
        UserError: options that it does not take, an error in it, values that are not one finite number for each sample,
            a sample's value that depends on the other samples, no gradient; the message has the file and the line.
    """
    loss = make_loss(run, plugins)
    if run.loss in LOSSES:
        return
    what = f"loss {run.loss} ({plugins.where('loss', run.loss)})"
    generator = torch.Generator().manual_seed(0)
    samples = 2 * num_classes + 3  # another number than K, so that shapes cannot be mistaken
    logits = torch.randn(samples, num_classes, generator=generator, device="cpu").requires_grad_()
    labels = torch.arange(samples, device="cpu") % num_classes
    values = loss.per_sample(logits, labels)
    if not isinstance(values, Tensor):
        raise UserError(f"{what} must return a tensor [B], one value for each sample; it returns {values!r:.60}")
    if values.shape != (samples,):
        raise UserError(
            f"{what} must return [B], one value for each sample (reduction='none' of torch's losses); of logits "
            f"{list(logits.shape)} and labels {list(labels.shape)} it returns {list(values.shape)}"
        )
    if not values.is_floating_point() or not bool(values.isfinite().all()):
        raise UserError(f"{what} returns values that are no finite numbers, of random logits: {values[:3].tolist()}")
    part = loss.per_sample(logits[:3], labels[:3])
    if part.shape != (3,) or not torch.allclose(part, values[:3], rtol=1e-4, atol=1e-6):
        raise UserError(f"{what}: the value of a sample depends on the other samples of its batch, or on chance")
    if not values.requires_grad:
        raise UserError(f"{what} has no gradient by the logits: it detaches them, or computes outside of torch")
    grad = loss.grad(logits.unsqueeze(0), labels)
    if not bool(grad.isfinite().all()) or not bool(grad.any()):
        kind = "only zeros" if bool(grad.isfinite().all()) else "not finite"
        raise UserError(f"{what} has a gradient by the logits that is {kind}, of random logits")


def chance_level(loss: Loss, labels: Tensor, num_classes: int) -> float:
    """Return the smallest mean loss of a classifier that does not look at its input, from labels `[N]`.

    It is searched for over the logits that all samples share.
    """
    shares = labels.cpu().bincount(minlength=num_classes) / len(labels)
    logits, classes = (
        torch.zeros(num_classes, requires_grad=True, device="cpu"),
        torch.arange(num_classes, device="cpu"),
    )
    search = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def mean() -> Tensor:
        search.zero_grad()
        value = (shares * loss.per_sample(logits.expand(num_classes, -1), classes)).sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(mean)
        return mean().item()
