"""NC0–NC4: the distance of a classifier's last layer from neural collapse. Each is 0 at collapse.

W is the classifier's weight `[*, K, d]` of any floating dtype, h its input features, μ_k the class means, μ_G the mean
of the class means and M the rows μ_k − μ_G; Σ_W and Σ_B are the covariances within and between classes (`ClassStats`).
`*` is nothing, or R stacked runs, and each function returns a float64 tensor of shape `[*]`. All arithmetic is float64.
One rule says what is undefined: a quantity that has under- or overflowed, or is smaller than its own rounding error, is
NaN, since zero would mean perfect collapse. So NC1–NC3 are NaN where the features have vanished, and NC2 of W and NC3
where W has (`degenerate`); a run whose features or weights are not finite has NaN metrics.

A class without samples is left out, with a warning that names it. `balance` sets the weights of classes of different
size (`ClassStats.between_cov`): "class", the default, gives each class mean the same weight (Papyan et al.).

Sources: Papyan, Han, Donoho, PNAS 117(40), 2020; Zhu et al., NeurIPS 2021, arXiv 2105.02375; Tirer et al., ICML 2023,
arXiv 2210.16658; Galanti et al., ICLR 2022, arXiv 2112.15121; Kothapalli, TMLR 2023, arXiv 2206.04041; NC0: arXiv
2602.16642.
"""

from typing import Literal

import torch
from torch import Tensor

from ncollapse.further_metrics import effective_rank, global_logits, gnc2, matrices, mean_rank, nc5, unc3
from ncollapse.moments import defined
from ncollapse.nearest import agreement, nearest_class
from ncollapse.stats import Balance, ClassStats
from ncollapse.usable import (
    check_kind,
    finite,
    norm,
    off_diagonal,
    prefix,
    unit,
    usable_means,
    vanished,
    warn,
    warn_of_dimension,
)

__all__ = [
    "agreement", "degenerate", "effective_rank", "global_logits", "gnc2", "matrices", "mean_rank", "nc0", "nc1", "nc2",
    "nc3", "nc4", "nc5", "nearest_class", "unc3",
]  # fmt: skip


def nc0(weight: Tensor, *, kind: Literal["squared", "norm", "per_class"] = "squared") -> Tensor:
    """Compute the norm of the row sum of W, which is zero at collapse (arXiv 2602.16642, Proposition 2.1).

    Args:
        kind: "squared" is ‖Wᵀ1‖²; "norm" its root, which the result tables of arXiv 2602.16642 most likely hold;
            "per_class" ‖Wᵀ1‖²/K, whose limit under SignGD with decoupled decay λ is (K − 2)²/λ².
    """
    check_kind(kind, "squared", "norm", "per_class")
    squared = weight.double().sum(-2).square().sum(-1)
    return defined(squared.sqrt() if kind == "norm" else squared / weight.shape[-2] if kind == "per_class" else squared)


def nc1(
    stats: ClassStats, *, kind: Literal["pinv", "trace_ratio", "cdnv"] = "pinv", balance: Balance = "class",
    within: Literal["sample", "class"] = "sample", per_class: bool = True, exponent: float = 1.0,
) -> Tensor:  # fmt: skip
    """Compute the variability of features within their class, relative to the spread of the class means.

    Args:
        kind: "pinv" is tr(Σ_W Σ_B⁺)/K (Papyan et al. 2020), "trace_ratio" tr(Σ_W)/tr(Σ_B) (Tirer et al. 2023), "cdnv"
            the mean over pairs of classes of (tr Σ_i + tr Σ_j)/(2 ‖μ_i − μ_j‖^2p) (Galanti et al. 2022), which uses
            no balance.
        within: for "trace_ratio", the classes' weights in Σ_W: "sample", that of all samples (Papyan et al.), or
            "class", each the same. Statistics keep the second moment of all samples together, so "pinv" has only the
            former.
        per_class: for "pinv", divide by K; some published code does not.
        exponent: p of "cdnv"; a larger one lets pairs of close classes count for more. Where two means coincide
            the value is ∞.

    NaN, with a warning, if no class has two samples: the variability within classes is then unknown.

    Raises:
        ValueError: "pinv" with statistics that keep no second moment, or with within="class".
    """
    check_kind(kind, "pinv", "trace_ratio", "cdnv")
    if within == "class" and kind == "pinv":
        raise ValueError(
            'nc1: "pinv" needs within="sample"; statistics keep one second moment, of all samples together'
        )
    means = usable_means(stats, balance)
    k = means.shape[-2]
    if stats.counts.max() < 2:
        warn(f"{prefix(stats)}every class has one sample: NC1 is unknown (NaN)")
        return means.new_full(means.shape[:-2], float("nan"))
    if kind == "cdnv":
        # From differences: where two means nearly agree, ‖μ_i‖² + ‖μ_j‖² − 2 μ_i·μ_j is only rounding error.
        distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
        others = ~torch.eye(k, dtype=torch.bool, device=means.device)
        weights = torch.where(others, distances ** (-2 * exponent), 0.0).sum(-1) / (k * (k - 1))
        value, rounding = ((weights * variances).sum(-1) for variances in stats.variances())
        return value.where(stats.within_trace().isfinite() & (value >= rounding), torch.nan)
    scaled = means * stats.class_weights(balance).sqrt().unsqueeze(-1)  # Σ_B = scaledᵀ scaled
    if kind == "trace_ratio":
        return defined(stats.within_trace(within) / scaled.square().sum((-2, -1)))
    # Σ_B has the eigenvalues λ_i of the K × K matrix scaled scaledᵀ, and from its eigenvectors u_i the eigenvectors
    # v_i = scaledᵀ u_i/√λ_i. So tr(Σ_W Σ_B⁺) = Σ v_iᵀ Σ_W v_i/λ_i needs no d × d pseudo-inverse.
    not_finite = ~finite(scaled)
    scaled = scaled.nan_to_num(0.0, 0.0, 0.0)
    # Of norm 1, so that squares do not underflow: NC1 is then that of Σ_B/c², divided by c².
    c = norm(scaled).clamp(min=torch.finfo(torch.float64).tiny)[..., None, None]
    scaled = scaled / c
    values, vectors = torch.linalg.eigh(scaled @ scaled.mT)
    # Leave out directions that are only rounding error: the first, since the rows of M sum to zero, and those below the
    # rounding of the matrix or of the means before they were centred.
    values, vectors = values[..., 1:], vectors[..., 1:]
    eps = torch.finfo(values.dtype).eps * max(means.shape[-2:])
    not_centred = stats.means[..., stats.present, :] / c
    tiny = torch.maximum(eps * values[..., -1], (eps * norm(not_centred)).square() / k).unsqueeze(-1)
    inverse = torch.where(values > tiny, 1 / values, 0.0)
    variances = (vectors.mT @ stats.within_cov(scaled) @ vectors).diagonal(dim1=-2, dim2=-1) * inverse
    _, rounding = stats.variances()
    # The rounding error of the second moment in any direction is that of its trace at most.
    rounding = (stats.class_weights("sample") * rounding).sum(-1) * inverse.sum(-1)
    value = defined((variances * inverse).sum(-1), rounding) / c[..., 0, 0].square()
    return defined(value.masked_fill(not_finite, float("nan")) / (k if per_class else 1))


def nc2(
    of: ClassStats | Tensor, *, kind: Literal["etf", "equinorm", "equiangularity"] = "etf", balance: Balance = "class"
) -> Tensor:
    """Compute the distance from a simplex equiangular tight frame.

    Args:
        of: the statistics, for their centred class means M (Kothapalli 2023), or W `[*, K, d]`, which is not centred
            and then takes the place of M below.
        kind: "etf" is ‖MMᵀ/‖MMᵀ‖_F − (I − 11ᵀ/K)/√(K−1)‖_F (Zhu et al. 2021), "equinorm" the coefficient of variation
            of the rows' norms, "equiangularity" the mean over pairs of |cos + 1/(K−1)| (both Papyan et al. 2020).
    """
    check_kind(kind, "etf", "equinorm", "equiangularity")
    if isinstance(of, ClassStats):
        rows = usable_means(of, balance, simplex=True)
    else:
        rows = of.double()
        warn_of_dimension(rows.shape[-2], rows.shape[-1], "the weight")
    if kind == "etf":
        return _etf_distance(rows @ rows.mT)
    norms = rows.norm(dim=-1)
    if kind == "equinorm":
        return norms.std(-1, correction=0) / norms.mean(-1)
    directions = rows / norms.unsqueeze(-1)
    deviation = (directions @ directions.mT + 1 / (rows.shape[-2] - 1)).abs()
    return deviation[..., off_diagonal(rows)].mean(-1)


def nc3(
    weight: Tensor, stats: ClassStats, *, kind: Literal["product", "difference"] = "product", balance: Balance = "class"
) -> Tensor:
    """Compute the distance between the classifier and the centred class means (self-duality).

    Args:
        stats: of the head's input.
        kind: "product" is ‖WMᵀ/‖WMᵀ‖_F − (I − 11ᵀ/K)/√(K−1)‖_F (Zhu et al. 2021), "difference"
            ‖W/‖W‖_F − M/‖M‖_F‖_F (Papyan et al. 2020), which the tables of arXiv 2602.16642 most likely hold: their
            NC3 starts at 1.41, as this does.
    """
    check_kind(kind, "product", "difference")
    means = usable_means(stats, balance, simplex=True)
    w = weight.double()[..., stats.present, :]
    w = w.masked_fill(degenerate(weight, stats)[..., None, None], float("nan"))
    if kind == "product":
        return _etf_distance(w @ means.mT)
    return norm(unit(w) - unit(means))


def nc4(features: Tensor, logits: Tensor, stats: ClassStats) -> Tensor:
    """Compute the share of samples whose predicted class is not that of the nearest class mean (Papyan et al. 2020).

    Args:
        features: `[*, N, d]`.
        logits: `[*, N, K]` of the same samples, bias included.
        stats: of the training data.

    Raises:
        ValueError: no samples.
    """
    if features.shape[-2] == 0:
        raise ValueError("nc4 needs at least one sample")
    differ = logits.argmax(-1) != nearest_class(features, stats.means)
    return differ.double().mean(-1).masked_fill(~finite(stats.means[..., stats.present, :]), float("nan"))


def degenerate(weight: Tensor, stats: ClassStats) -> Tensor:
    """Return whether features or classifier have vanished, so that their geometry is meaningless; `[*]` bool.

    Either the class means differ by no more than the rounding of the means themselves, in the dtype of the statistics;
    or ‖W Mᵀ‖_F is below 1e-6, so that the softmax cannot distinguish the classes; or the variances within the classes
    have under- or overflowed. Strong decay causes this. `NCResult.undefined` names the metrics that are NaN.
    """
    means = stats.centred_means()
    lost = finite(means) & stats.within_trace().isnan()
    return vanished(stats, means) | (norm(weight.double() @ means.mT) < 1e-6) | lost


def _etf_distance(gram: Tensor) -> Tensor:
    """Compute the Frobenius distance of the normalised matrix `[*, K, K]` from the simplex (I − 11ᵀ/K)/√(K−1)."""
    k = gram.shape[-1]
    simplex = (torch.eye(k, dtype=gram.dtype, device=gram.device) - 1 / k) / (k - 1) ** 0.5
    return norm(unit(gram) - simplex)
