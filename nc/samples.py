"""Choose the samples of a batch: one row of features for each label, of tokens or places, labels as class indices."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ncollapse.heads import HeadCall, logits_in, predict_alike
from ncollapse.kernels.tensors import tensor_of

#: The token that is taken, or the mean over all.
TokenPool = Literal["mean", "first", "last"]
#: Makes features `[B, d]` of a layer's output.
Pool = Callable[[Any], Tensor] | TokenPool


class Selected:
    """The samples of a batch, of which some may have to be left out; which ones, a GPU tells when it comes to it.

    Attributes:
        waits: whether a GPU must be waited for.
    """

    def __init__(
        self, features: Tensor, logits: Tensor, labels: Tensor, layers: dict[str, Tensor], keep: Tensor | None
    ) -> None:
        self.waits = keep is not None and keep.is_cuda
        if self.waits:  # the next batch comes before: loader and model, as a CUDA graph, may use their memory again
            features, logits, labels = (t.detach().clone() for t in (features, logits, labels))
            layers = {name: h.detach().clone() for name, h in layers.items()}
        self._features, self._logits, self._layers = features, logits, layers
        self._labels, self._keep = labels, keep
        if keep is not None:
            self._all_kept = keep.all().to("cpu", non_blocking=self.waits)
            self._told = torch.cuda.current_stream(keep.device).record_event() if self.waits else None

    def samples(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return features `[N, d]`, logits `[N, K]`, labels `[N]` and name -> features `[N, d']` of each layer."""
        features, logits, labels, layers = self._features, self._logits, self._labels, self._layers
        if self._keep is not None:
            if self._told is not None:
                self._told.synchronize()
            if not bool(self._all_kept):
                rows = self._keep.nonzero().squeeze(1)
                features, logits, *chosen = (h[rows.to(h.device)] for h in (features, logits, *layers.values()))
                labels, layers = labels[rows], dict(zip(layers, chosen, strict=True))
        # Without the wait for the GPU of a copy that blocks.
        return features, logits, labels.to(features.device, non_blocking=True), layers


def select_samples(
    call: HeadCall, output: Any, labels: Any, layers: Mapping[str, Any], *,
    pool: Pool | None, mask: Tensor | None, ignore_index: int | None,
) -> Selected:  # fmt: skip
    """Choose the samples of a batch.

    Args:
        call: of the head.
        output: what the model returned; it shows which of the tokens that the head ran over are used.
        labels: as in `measure`.
        layers: name -> output of each layer.
        mask: `[B, T]`, nonzero where a token is no padding.

    Raises:
        ValueError: labels that are not one class for each sample, features of which `pool` must choose.
        TypeError: labels that are not integers.
    """
    features, logits = call.features, call.logits
    if logits.shape[-1] == 1:
        raise ValueError(
            "measure: the head has one output, and neural collapse needs a row of the weight for each class; a "
            "classifier of one logit z is one of the logits (0, z): say so by "
            "head=ncollapse.Head(features=…, weight=…, logits=…)"
        )
    places, classes = features.shape[1:-1], logits.shape[-1]
    labels = tensor_of(labels)
    if places and labels.shape == features.shape[:-1]:  # a label for each token or place
        keep = labels.new_ones(labels.shape, dtype=torch.bool) if mask is None else mask.to(labels.device).bool()
        labels, keep = class_indices(labels.flatten(), classes), keep.expand(labels.shape).flatten()
        features, logits = features.flatten(0, -2), logits.flatten(0, -2)
        of_layers = {name: _flat(name, h, places, len(labels)) for name, h in layers.items()}
    else:
        labels, keep = class_indices(labels, classes), None
        if places:
            features, logits = _one_of_places(call, output, pool, mask)
        of_layers = {name: h if callable(pool) else pooled(h, pool, mask) for name, h in layers.items()}
    for name, h in {"the head's input": features, **of_layers}.items():
        if not isinstance(h, Tensor) or h.dim() != 2:
            shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"measure: features must be [B, d]; of {name} they are {shape}: give `pool`")
    if ignore_index is not None:
        used = labels != ignore_index
        keep = used if keep is None else keep & used
    return Selected(features, logits, labels, of_layers, keep)


def class_indices(labels: Tensor, classes: int) -> Tensor:
    """Convert labels `[B]`, `[B, 1]` or one-hot `[B, K]` to class indices `[B]`.

    Raises:
        ValueError: soft labels, several classes for a sample, other shapes.
        TypeError: labels that are not integers.
    """
    if labels.dim() == 2 and labels.shape[1] == 1 != classes:
        labels = labels.squeeze(1)
    if labels.dim() == 2 and labels.shape[1] == classes:
        if not bool((((labels == 0) | (labels == 1)).all(1) & (labels.sum(1) == 1)).all()):
            kind = "soft" if labels.is_floating_point() else "several classes for a sample"
            raise ValueError(
                f"measure: the labels are {kind}, and neural collapse needs the one class of each sample; use data "
                "without label mixing, or a `batch` function that returns (inputs, class indices)"
            )
        return labels.to(torch.uint8).argmax(1)
    if labels.dim() != 1:
        raise ValueError(
            f"measure: labels must be [B], [B, 1] or one-hot [B, K] with K = {classes}; got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"measure: labels must be integers, got {labels.dtype}")
    return labels.long()


def pooled(output: Any, pool: TokenPool | None = None, mask: Tensor | None = None) -> Any:
    """Make features `[B, d]` of a layer's output, as `measure` says of `pool`; return others unchanged."""
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor):
        return output
    if output.dim() in (4, 5):
        return output.mean(tuple(range(2, output.dim())))
    return output if pool is None or output.dim() != 3 else _of_tokens(output, pool, mask)


def _of_tokens(tokens: Tensor, pool: TokenPool, mask: Tensor | None) -> Tensor:
    """Take the mean, first or last `[B, d]` of tokens `[B, T, d]`, without padding."""
    shown = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens).expand(tokens.shape[:2])
    if pool == "mean":
        return (tokens * shown.unsqueeze(-1)).sum(1) / shown.sum(1, keepdim=True).clamp(min=1)
    if pool not in ("first", "last"):
        raise ValueError(f"measure: pool is a function, 'mean', 'first' or 'last', not {pool!r}")
    # argmax gives the first of equal values.
    at = shown.argmax(1) if pool == "first" else shown.shape[1] - 1 - shown.flip(1).argmax(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), at]


def _one_of_places(call: HeadCall, output: Any, pool: Pool | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return features `[B, d]` and logits `[B, K]` of a head that ran over tokens or places."""
    batch, *places, classes = call.logits.shape
    returned = logits_in(output, batch, classes)
    if callable(pool):
        h, z = (t.movedim(-1, 1) if call.is_map else t for t in call[:2])
        return pool(h), returned[0] if len(returned) == 1 else pool(z)
    h, z = call.features.flatten(1, -2), call.logits.flatten(1, -2)
    if call.is_map:
        if len(returned) != 1:
            return h.mean(1), z.mean(1)
        # What follows the head is in what the model returns: in SqueezeNet a ReLU before the mean.
        if h.shape[1] > 1 and not any(predict_alike(returned[0], made.mean(1)) for made in (z, z.relu())):
            warnings.warn(
                "measure: the predictions of the model are not those of the mean over places of its head's logits, "
                "while the features are averaged over places; if the model pools otherwise, give `pool` or a Head",
                stacklevel=2,
            )
        return h.mean(1), returned[0]
    if pool is not None:
        return _of_tokens(h, pool, mask), returned[0] if len(returned) == 1 else _of_tokens(z, pool, mask)
    for logits in returned:
        hits = (z.to(logits.dtype) == logits.unsqueeze(1)).all(-1)
        if bool(hits.any(1).all()):
            return h[torch.arange(batch, device=h.device), hits.int().argmax(1)], logits
        masks = [None] if mask is None else [None, mask]
        errors = [float((_of_tokens(z, "mean", shown) - logits).norm()) for shown in masks]
        if min(errors) <= 1e-3 * float(logits.norm()):
            return _of_tokens(h, "mean", masks[errors.index(min(errors))]), logits
    raise ValueError(
        f"measure: the head ran over {tuple(places)} tokens of each sample, and which of them the model uses does not "
        "show in what it returns: features must be [B, d]; give `pool`: 'mean', 'first', 'last' or a function; or name "
        "another head"
    )


def _flat(name: str, h: Any, places: torch.Size, rows: int) -> Tensor:
    """Return the features `[N, d]` of a layer that has a row for each of the N tokens or places of the head."""
    h = h[0] if isinstance(h, tuple) else h
    if isinstance(h, Tensor) and h.dim() == 3 and h.shape[1:-1] == places:
        h = h.flatten(0, 1)
    if not isinstance(h, Tensor) or h.dim() != 2 or len(h) != rows:
        shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(
            f"measure: there is a label for each of {tuple(places)} tokens or places, and the features of {name} are "
            f"{shape}; give a `pool` that returns a row for each, as `lambda maps: maps.movedim(1, -1).flatten(0, -2)`"
        )
    return h
