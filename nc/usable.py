"""What the metrics share: the class means that can be used, warnings about the others, norms."""

import warnings
from typing import Any

import torch
from torch import Tensor

from ncollapse.stats import Balance, ClassStats


def vanished(stats: ClassStats, means: Tensor) -> Tensor:
    """Return whether the means differ by no more than their rounding, `[*]` bool."""
    return norm(means) <= torch.finfo(stats.dtype).eps * norm(stats.means[..., stats.present, :])


def prefix(stats: ClassStats) -> str:
    """Return the layer's name for a message."""
    return f"{stats.name}: " if stats.name else ""


def usable_means(stats: ClassStats, balance: Balance, *, simplex: bool = False) -> Tensor:
    """Return M, with NaN for runs where it has vanished; warn of missing classes and too few dimensions."""
    name = prefix(stats)
    missing = stats.present.logical_not().nonzero().flatten().tolist()
    if len(missing) > stats.num_classes - 2:
        raise ValueError(
            f"{name}NC metrics need samples of at least two classes; got {stats.num_classes - len(missing)}"
        )
    if missing:
        warn(f"{name}no samples of class {', '.join(map(str, missing))}: left out of the NC metrics")
    if simplex:
        warn_of_dimension(stats.num_classes - len(missing), stats.dim, stats.name)
    means = stats.centred_means(balance)
    lost = vanished(stats, means)
    # For stacked runs `degenerate` reports each; a warning could not say which.
    if stats.runs is None and lost:
        warn(f"{name}the class means have vanished or are all the same: NC1–NC3 are undefined (NaN)")
    return means.masked_fill(lost[..., None, None], float("nan"))


def warn_of_dimension(k: int, d: int, name: str) -> None:
    """Warn if K classes have too few dimensions for a simplex."""
    if d < k - 1:
        warn(
            f"{name + ': ' if name else ''}{k} classes cannot form a simplex in {d} dimensions (K − 1 are needed): "
            "NC2 and NC3 cannot reach 0"
        )


def warn(message: str) -> None:
    """Warn with one location for all."""
    # With one location for all, Python shows the message once, not for every metric of the same statistics.
    warnings.warn(message, UserWarning, stacklevel=1)


def check_kind(kind: Any, *kinds: str) -> None:
    """Raise ValueError for a kind that is none of these."""
    if kind not in kinds:
        raise ValueError(f"kind is {', '.join(map(repr, kinds))}; got {kind!r}")


def off_diagonal(rows: Tensor) -> Tensor:
    """Return which elements of a K × K matrix are off its diagonal, for rows `[*, K, d]`; `[K, K]` bool."""
    return ~torch.eye(rows.shape[-2], dtype=torch.bool, device=rows.device)


def finite(matrix: Tensor) -> Tensor:
    """Return whether all elements of matrices `[*, m, n]` are finite, `[*]` bool."""
    return matrix.isfinite().flatten(-2).all(-1)


def norm(matrix: Tensor) -> Tensor:
    """Compute Frobenius norms of matrices `[*, m, n]`, `[*]`."""
    return matrix.flatten(-2).norm(dim=-1)


def unit(matrix: Tensor) -> Tensor:
    """Divide matrices `[*, m, n]` by their Frobenius norms."""
    return matrix / norm(matrix)[..., None, None]
