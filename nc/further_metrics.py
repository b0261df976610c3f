"""What other packages measure beside NC0–NC4; shapes and rules are those of `metrics`, from where these are imported.

Sources: hyperspherical uniformity: Liu et al., ICLR 2023, arXiv 2303.06484; GNC2 and UNC3: Wu and Papyan, NeurIPS 2024,
arXiv 2405.17767; effective rank: Roy and Vetterli, EUSIPCO 2007; NC5: Ben Ammar et al., ICLR 2024, arXiv 2310.06823.
"""

from typing import Literal

import torch
from torch import Tensor

from ncollapse.moments import defined
from ncollapse.stats import Balance, ClassStats
from ncollapse.usable import check_kind, finite, off_diagonal, usable_means


def gnc2(
    of: ClassStats | Tensor, *, kind: Literal["mean", "variation"] = "variation",
    kernel: Literal["log", "riesz"] = "log", exponent: float = 1.0, balance: Balance = "class",
) -> Tensor:  # fmt: skip
    """Compute the hyperspherical uniformity of class means or weights: GNC2, for any number of classes.

    With u_k the rows divided by their norms, a pair's energy is log 1/‖u_i − u_j‖, or ‖u_i − u_j‖^−s. For K ≤ d + 1 the
    simplex has the least mean energy, with all distances √(2K/(K − 1)); for more classes, where no simplex exists, the
    least is that of evenly spread points, as far as the sphere allows.

    Args:
        of: the statistics, for their centred class means, or W `[*, K, d]`, which is not centred.
        kind: "mean" is the mean energy over pairs; "variation" its standard deviation over pairs divided by the mean of
            the absolute energies, which is 0 for a simplex.
        kernel: "log" or "riesz".
        exponent: s of "riesz".
    """
    check_kind(kind, "mean", "variation")
    if kernel not in ("log", "riesz") or not exponent > 0:
        raise ValueError(f"gnc2: kernel is 'log' or 'riesz', exponent positive; got {kernel!r} and {exponent:g}")
    distances = pair_distances(rows_of(of, balance))
    energies = -distances.log() if kernel == "log" else distances**-exponent
    return mean_energy(energies) if kind == "mean" else energy_variation(energies)


def unc3(weight: Tensor, stats: ClassStats, *, balance: Balance = "class") -> Tensor:
    """Compute uniform duality: the coefficient of variation over classes of cos(w_k, μ_k − μ_G).

    It is 0 where all rows of W have the same angle to their class means, as where they are parallel (NC3). NaN where
    the mean cosine is not positive: W and means are then not aligned at all.

    Args:
        weight: W `[*, K, d]`.
        stats: of the head's input.
    """
    means = usable_means(stats, balance)
    w = weight.double()[..., stats.present, :]
    cosines = (w * means).sum(-1) / (w.norm(dim=-1) * means.norm(dim=-1))
    middle = cosines.mean(-1)
    return defined((cosines.std(-1, correction=0) / middle).where(middle > 0, torch.nan))


def global_logits(weight: Tensor, bias: Tensor | None, stats: ClassStats) -> Tensor:
    """Compute ‖W μ_G + b‖, the norm of the logits at the mean of the class means.

    Where it is 0, W h + b = W (h − μ_G): the classifier sees centred features, as
    the theory of centred means assumes.

    Args:
        weight, bias: W `[*, K, d]` and b `[*, K]`, or None.
        stats: of the head's input.
    """
    logits = (weight.double() @ stats.global_mean.unsqueeze(-1)).squeeze(-1)
    return defined((logits if bias is None else logits + bias.double()).norm(dim=-1))


def effective_rank(of: ClassStats | Tensor, *, balance: Balance = "class") -> Tensor:
    """Compute exp(−Σ p_i log p_i), p_i = σ_i/Σσ, of the singular values σ_i (Roy and Vetterli 2007); K − 1 at collapse.

    Args:
        of: the statistics, for their centred class means, or W `[*, K, d]`.
    """
    return entropy_rank(spectrum(rows_of(of, balance), of.dtype)[1])


def mean_rank(of: ClassStats | Tensor, *, balance: Balance = "class") -> Tensor:
    """Count the singular values above max(K, d)·ε times the largest, ε being the rounding of the dtype; float64.

    Args:
        of: as in `effective_rank`. At collapse the centred class means have rank K − 1.
    """
    rows = rows_of(of, balance)
    return numerical_rank(spectrum(rows, of.dtype)[1], max(rows.shape[-2:]), of.dtype)


def nc5(features: Tensor, stats: ClassStats) -> Tensor:
    """Compute the mean over classes of |cos(μ_k, μ_OOD)|: 0 if out-of-distribution data are orthogonal to all classes.

    The means are not centred (Ben Ammar et al. 2024, "ID/OOD orthogonality").

    Args:
        features: `[*, N, d]` of data that belong to none of the classes; or their mean, with N = 1.
        stats: of the training data.

    Raises:
        ValueError: no samples.
    """
    if features.shape[-2] == 0:
        raise ValueError("nc5 needs at least one sample")
    means, mean = stats.means[..., stats.present, :], features.double().mean(-2)
    cosines = (means @ mean.unsqueeze(-1)).squeeze(-1) / (means.norm(dim=-1) * mean.norm(dim=-1, keepdim=True))
    return defined(cosines.abs().mean(-1))


def matrices(weight: Tensor, stats: ClassStats) -> dict[str, Tensor]:
    """Compute the K × K matrices that show the geometry: small enough to keep at every evaluation.

    Returns:
        "means": cosines of the centred class means; "weight": cosines of the rows of W; "product": W Mᵀ; each
        `[*, K, K]` float64, with NaN for classes without samples. At collapse the former two are 1 on the diagonal and
        −1/(K − 1) elsewhere, and the last is a multiple of I − 11ᵀ/K.
    """
    w, means = weight.double(), stats.means - stats.global_mean.unsqueeze(-2)
    unit_w, unit_means = (rows / rows.norm(dim=-1, keepdim=True) for rows in (w, means))
    return {"means": unit_means @ unit_means.mT, "weight": unit_w @ unit_w.mT, "product": w @ means.mT}


def rows_of(of: ClassStats | Tensor, balance: Balance = "class") -> Tensor:
    """Return the centred class means `[*, K', d]` of statistics, or W `[*, K, d]`; float64."""
    return usable_means(of, balance) if isinstance(of, ClassStats) else of.double()


def pair_distances(rows: Tensor) -> Tensor:
    """Compute ‖u_i − u_j‖ of rows `[*, K, d]` divided by their norms, for all i ≠ j; `[*, K(K − 1)]`."""
    directions = torch.nn.functional.normalize(rows, dim=-1, eps=0.0)
    pairs = off_diagonal(rows)
    squares = (2 - 2 * directions @ directions.mT)[..., pairs]
    if (squares > 1e-3).all():
        return squares.sqrt()
    # Of rows that nearly agree the difference of products is only rounding error; for many classes this takes long.
    return torch.cdist(directions, directions, compute_mode="donot_use_mm_for_euclid_dist")[..., pairs]


def mean_energy(energies: Tensor) -> Tensor:
    """Compute the mean `[*]` of the pairs' energies `[*, n]`, which may have any sign; NaN where it is not finite."""
    mean = energies.mean(-1)
    return mean.where(mean.isfinite(), torch.nan)


def energy_variation(energies: Tensor) -> Tensor:
    """Compute the standard deviation of the pairs' energies `[*, n]` divided by their mean absolute value, `[*]`."""
    return defined(energies.std(-1, correction=0) / energies.abs().mean(-1))


def spectrum(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the left singular vectors `[*, K, r]` and singular values `[*, r]` of rows `[*, K, d]`, r = min(K, d).

    Args:
        dtype: of which the rows were before they became float64. Up to float32 they come from the K × K products of the
            rows, whose rounding is far below that of the rows: for K = 1,000 in a small part of the time.

    Where the rows are not finite or all zero, they are NaN.
    """
    finite_rows, r = rows.nan_to_num(0.0, 0.0, 0.0), min(rows.shape[-2:])
    if dtype == torch.float64:
        left, values, _ = torch.linalg.svd(finite_rows, full_matrices=False)
    else:
        squares, left = torch.linalg.eigh(finite_rows @ finite_rows.mT)
        squares, left = squares.flip(-1)[..., :r], left.flip(-1)[..., :r]
        rounding = max(rows.shape[-2:]) * torch.finfo(torch.float64).eps * squares[..., :1]
        values = torch.where(squares > rounding, squares, 0.0).sqrt()
    unknown = (~finite(rows).unsqueeze(-1)) | (values[..., :1] == 0)
    return left.masked_fill(unknown.unsqueeze(-1), torch.nan), values.masked_fill(unknown, torch.nan)


def entropy_rank(values: Tensor) -> Tensor:
    """Compute the effective rank `[*]` of singular values `[*, r]`."""
    shares = values / values.sum(-1, keepdim=True)
    return defined(torch.special.entr(shares).sum(-1).exp())


def numerical_rank(values: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Count the singular values `[*, r]`, the largest first, above size·ε times the largest; `[*]` float64."""
    bound = size * torch.finfo(dtype).eps * values[..., :1]
    return (values > bound).sum(-1).double().where(values.isfinite().all(-1), torch.nan)
