"""NC0–NC4: the distance of a classifier's last layer from neural collapse. Each is 0 at collapse.

W is the classifier's weight `[*, K, d]` of any floating dtype, h its input features, μ_k the class means, μ_G the mean
of the class means and M the rows μ_k − μ_G; Σ_W and Σ_B are the covariances within and between classes (`ClassStats`).
`*` is nothing, or R stacked runs, and each function returns a float64 tensor of shape `[*]`. All arithmetic is float64.
A run whose features or weights are not finite has NaN metrics. Where features or weights have vanished (`degenerate`)
NC1–NC3 are NaN: zero would mean perfect collapse.

A class without samples is left out, with a warning that names it. `balance` sets the weights of classes of different
size (`ClassStats.between_cov`): "class", the default, gives each class mean the same weight (Papyan et al.).

Sources: Papyan, Han, Donoho, PNAS 117(40), 2020; Zhu et al., NeurIPS 2021, arXiv 2105.02375; Tirer et al., ICML 2023,
arXiv 2211.00644; Galanti et al., ICLR 2022, arXiv 2112.15121; Kothapalli, TMLR 2023, arXiv 2206.04041; NC0: arXiv
2602.16642.
"""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from ncollapse.kernels.class_stats.op import project_op
from ncollapse.stats import Balance, ClassStats


def nc0(weight: Tensor, *, kind: Literal["squared", "norm", "per_class"] = "squared") -> Tensor:
    """Compute the norm of the row sum of W, which is zero at collapse (arXiv 2602.16642, Proposition 2.1).

    Args:
        kind: "squared" is ‖Wᵀ1‖²; "norm" its root, which the result tables of arXiv 2602.16642 most likely hold;
            "per_class" ‖Wᵀ1‖²/K, whose limit under SignGD with decoupled decay λ is (K − 2)²/λ².
    """
    _check_kind(kind, "squared", "norm", "per_class")
    squared = weight.double().sum(-2).square().sum(-1)
    return squared.sqrt() if kind == "norm" else squared / weight.shape[-2] if kind == "per_class" else squared


def nc1(
    stats: ClassStats, *, kind: Literal["pinv", "trace_ratio", "cdnv"] = "pinv", balance: Balance = "class",
    per_class: bool = True,
) -> Tensor:  # fmt: skip
    """Compute the variability of features within their class, relative to the spread of the class means.

    Args:
        kind: "pinv" is tr(Σ_W Σ_B⁺)/K (Papyan et al. 2020), "trace_ratio" tr(Σ_W)/tr(Σ_B) (Tirer et al. 2023), "cdnv"
            the mean over pairs of classes of (tr Σ_i + tr Σ_j)/(2 ‖μ_i − μ_j‖²) (Galanti et al. 2022), which uses
            no balance.
        per_class: for "pinv", divide by K; some published code does not.

    Raises:
        ValueError: "pinv" with statistics that keep no second moment.
    """
    _check_kind(kind, "pinv", "trace_ratio", "cdnv")
    means = _usable_means(stats, balance)
    k = means.shape[-2]
    if kind == "cdnv":
        gram = means @ means.mT
        squares = gram.diagonal(dim1=-2, dim2=-1)
        distances = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * gram  # ‖μ_i − μ_j‖²
        variances = stats.within_variances()
        ratios = (variances.unsqueeze(-1) + variances.unsqueeze(-2)) / (2 * distances)
        return ratios[..., _off_diagonal(means)].mean(-1)
    scaled = means * stats.class_weights(balance).sqrt().unsqueeze(-1)  # Σ_B = scaledᵀ scaled
    if kind == "trace_ratio":
        return stats.within_trace() / scaled.square().sum((-2, -1))
    # Σ_B has the eigenvalues λ_i of the K × K matrix scaled scaledᵀ, and from its eigenvectors u_i the eigenvectors
    # v_i = scaledᵀ u_i/√λ_i. So tr(Σ_W Σ_B⁺) = Σ v_iᵀ Σ_W v_i/λ_i needs no d × d pseudo-inverse.
    not_finite = ~_finite(scaled)
    scaled = scaled.nan_to_num(0.0, 0.0, 0.0)
    values, vectors = torch.linalg.eigh(scaled @ scaled.mT)
    # Leave out directions that are only rounding error: the first, since the rows of M sum to zero, and those below the
    # rounding of the matrix or of the means before they were centred.
    values, vectors = values[..., 1:], vectors[..., 1:]
    eps = torch.finfo(values.dtype).eps * max(means.shape[-2:])
    not_centred = stats.means[..., stats.present, :]
    tiny = torch.maximum(eps * values[..., -1], (eps * _norm(not_centred)).square() / k).unsqueeze(-1)
    variances = (vectors.mT @ stats.within_cov(scaled) @ vectors).diagonal(dim1=-2, dim2=-1)
    value = torch.where(values > tiny, variances / values.square(), 0.0).sum(-1)
    return value.masked_fill(not_finite, float("nan")) / (k if per_class else 1)


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
    _check_kind(kind, "etf", "equinorm", "equiangularity")
    if isinstance(of, ClassStats):
        rows = _usable_means(of, balance, simplex=True)
    else:
        rows = of.double()
        _warn_of_dimension(rows.shape[-2], rows.shape[-1], "the weight")
    if kind == "etf":
        return _etf_distance(rows @ rows.mT)
    norms = rows.norm(dim=-1)
    if kind == "equinorm":
        return norms.std(-1, correction=0) / norms.mean(-1)
    unit = rows / norms.unsqueeze(-1)
    deviation = (unit @ unit.mT + 1 / (rows.shape[-2] - 1)).abs()
    return deviation[..., _off_diagonal(rows)].mean(-1)


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
    _check_kind(kind, "product", "difference")
    means = _usable_means(stats, balance, simplex=True)
    w = weight.double()[..., stats.present, :]
    w = w.masked_fill(degenerate(weight, stats)[..., None, None], float("nan"))
    if kind == "product":
        return _etf_distance(w @ means.mT)
    return _norm(_unit(w) - _unit(means))


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
    return differ.double().mean(-1).masked_fill(~_finite(stats.means[..., stats.present, :]), float("nan"))


def nearest_class(features: Tensor, means: Tensor) -> Tensor:
    """Return the class with the nearest mean, `[*, N]` int64.

    Features are centred on the average of the means, so that an offset common to all features costs no accuracy.

    Args:
        features: `[*, N, d]`.
        means: `[*, K, d]` float64; a class whose row is NaN is never the nearest.
    """
    absent = means.isnan().any(-1)
    centre = means.nan_to_num(0.0).sum(-2, keepdim=True) / (~absent).sum(-1, keepdim=True).clamp(min=1).unsqueeze(-1)
    dtype = torch.promote_types(features.dtype, torch.float32)
    centre = centre.to(dtype)
    axes = (means - centre).nan_to_num(0.0)
    labels = torch.zeros(features.shape[-2], dtype=torch.int64, device=features.device)
    products = project_op(features.detach(), labels, centre, axes.to(dtype))
    # ‖h − μ‖² is smallest where (h − c)·(μ − c) − ‖μ − c‖²/2 is largest; c is the centre.
    half = (axes.square().sum(-1) / 2).to(dtype).masked_fill(absent, float("inf"))
    return (products - half.unsqueeze(-2)).argmax(-1)


def degenerate(weight: Tensor, stats: ClassStats) -> Tensor:
    """Return whether features or classifier have vanished, so that their geometry is meaningless; `[*]` bool.

    Either the class means differ by no more than the float32 rounding of the means themselves, or ‖W Mᵀ‖_F is below
    1e-6, so that the softmax cannot distinguish the classes. Strong decay causes this.
    """
    means = stats.centred_means()
    return _vanished(stats, means) | (_norm(weight.double() @ means.mT) < 1e-6)


def _vanished(stats: ClassStats, means: Tensor) -> Tensor:
    return _norm(means) <= torch.finfo(torch.float32).eps * _norm(stats.means[..., stats.present, :])


def _usable_means(stats: ClassStats, balance: Balance, *, simplex: bool = False) -> Tensor:
    """Return M, with NaN for runs where it has vanished; warn of missing classes and too few dimensions."""
    prefix = f"{stats.name}: " if stats.name else ""
    missing = stats.present.logical_not().nonzero().flatten().tolist()
    if len(missing) > stats.num_classes - 2:
        raise ValueError(
            f"{prefix}NC metrics need samples of at least two classes; got {stats.num_classes - len(missing)}"
        )
    if missing:
        _warn(f"{prefix}no samples of class {', '.join(map(str, missing))}: left out of the NC metrics")
    if simplex:
        _warn_of_dimension(stats.num_classes - len(missing), stats.dim, stats.name)
    means = stats.centred_means(balance)
    vanished = _vanished(stats, means)
    # For stacked runs `degenerate` reports each; a warning could not say which.
    if stats.runs is None and vanished:
        _warn(f"{prefix}the class means have vanished or are all the same: NC1–NC3 are undefined (NaN)")
    return means.masked_fill(vanished[..., None, None], float("nan"))


def _warn_of_dimension(k: int, d: int, name: str) -> None:
    if d < k - 1:
        _warn(
            f"{name + ': ' if name else ''}{k} classes cannot form a simplex in {d} dimensions (K − 1 are needed): "
            "NC2 and NC3 cannot reach 0"
        )


def _warn(message: str) -> None:
    # With one location for all, Python shows the message once, not for every metric of the same statistics.
    warnings.warn(message, UserWarning, stacklevel=1)


def _check_kind(kind: Any, *kinds: str) -> None:
    if kind not in kinds:
        raise ValueError(f"kind is {', '.join(map(repr, kinds))}; got {kind!r}")


def _off_diagonal(rows: Tensor) -> Tensor:
    return ~torch.eye(rows.shape[-2], dtype=torch.bool, device=rows.device)


def _finite(matrix: Tensor) -> Tensor:
    return matrix.isfinite().flatten(-2).all(-1)


def _norm(matrix: Tensor) -> Tensor:
    return matrix.flatten(-2).norm(dim=-1)


def _unit(matrix: Tensor) -> Tensor:
    return matrix / _norm(matrix)[..., None, None]


def _etf_distance(gram: Tensor) -> Tensor:
    """Compute the Frobenius distance of the normalised matrix `[*, K, K]` from the simplex (I − 11ᵀ/K)/√(K−1)."""
    k = gram.shape[-1]
    simplex = (torch.eye(k, dtype=gram.dtype, device=gram.device) - 1 / k) / (k - 1) ** 0.5
    return _norm(_unit(gram) - simplex)
