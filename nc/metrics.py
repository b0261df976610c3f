"""NC0–NC4: how far a classifier's last layer is from neural collapse. 0 is collapse in every one of them.

W is the classifier's weight `[*, K, d]`, h its input features, μ_k the class means, μ_G the mean of the class means and
M the rows μ_k − μ_G. `*` is nothing, or R stacked runs, and each function returns a float64 tensor of shape `[*]`. All
arithmetic is float64. A run whose features or weights are not finite has NaN metrics; where features or weights have
vanished (`degenerate`) NC1–NC3 are NaN, never a zero that would read as perfect collapse.

A class without samples takes no part, with a warning that names it.

Sources: Papyan, Han, Donoho, PNAS 117(40), 2020; Zhu et al., NeurIPS 2021, arXiv 2105.02375; NC0: arXiv 2602.16642.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor

from nc.stats import ClassStats


def nc0(weight: Tensor) -> Tensor:
    """‖Wᵀ1‖², the squared norm of the row sum of W; collapse needs it to vanish (arXiv 2602.16642, Proposition 2.1).

    Divided by K it is the quantity whose limit under SignGD with decoupled decay is (K − 2)²/λ².
    """
    return weight.double().sum(-2).square().sum(-1)


def nc0_norm(weight: Tensor) -> Tensor:
    """‖Wᵀ1‖, the root of `nc0`: most likely what the result tables of arXiv 2602.16642 hold."""
    return nc0(weight).sqrt()


def nc1(stats: ClassStats, *, kind: Literal["pinv", "trace_ratio"] = "pinv") -> Tensor:
    """Variability of features within their class, relative to the spread of the class means.

    Args:
        kind: "pinv" is tr(Σ_W Σ_B⁺)/K (Papyan et al. 2020), "trace_ratio" tr(Σ_W)/tr(Σ_B) (Tirer et al. 2023).
    """
    means = _usable_means(stats)
    within = stats.within_cov()
    k = means.shape[-2]
    if kind == "trace_ratio":
        return within.diagonal(dim1=-2, dim2=-1).sum(-1) * k / means.square().sum((-2, -1))
    # Σ_B = MᵀM/K has rank ≤ K − 1, so that its pseudo-inverse needs only the right singular vectors v_i of M:
    # tr(Σ_W Σ_B⁺)/K = Σ v_iᵀ Σ_W v_i / s_i².
    bad = means.isfinite().all(-1).all(-1).logical_not()
    _, s, vh = torch.linalg.svd(means.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
    # Directions that are rounding alone: the K-th, since the rows of M sum to zero, and whatever lies below the
    # rounding of the means before they were centred.
    s, vh = s[..., : k - 1], vh[..., : k - 1, :]
    tiny = torch.finfo(s.dtype).eps * max(means.shape[-2:]) * _size(stats).unsqueeze(-1)
    along = (vh @ within * vh).sum(-1)
    value = torch.where(s > tiny, along / s.square(), 0.0).sum(-1)
    return value.masked_fill(bad, float("nan"))


def nc2(stats: ClassStats, *, kind: Literal["etf", "equinorm", "equiangularity"] = "etf") -> Tensor:
    """Distance of the centred class means M from a simplex equiangular tight frame.

    Args:
        kind: "etf" is ‖MMᵀ/‖MMᵀ‖_F − (I − 11ᵀ/K)/√(K−1)‖_F (Zhu et al. 2021), "equinorm" the coefficient of variation
            of the norms ‖μ_k − μ_G‖, "equiangularity" the mean over pairs of |cos + 1/(K−1)| (Papyan et al. 2020).
    """
    means = _usable_means(stats, simplex=True)
    if kind == "etf":
        return _etf_distance(means @ means.mT)
    norms = means.norm(dim=-1)
    if kind == "equinorm":
        return norms.std(-1, correction=0) / norms.mean(-1)
    k = means.shape[-2]
    unit = means / norms.unsqueeze(-1)
    deviation = (unit @ unit.mT + 1 / (k - 1)).abs()
    off_diagonal = ~torch.eye(k, dtype=torch.bool, device=means.device)
    return deviation[..., off_diagonal].mean(-1)


def nc3(weight: Tensor, stats: ClassStats, *, kind: Literal["product", "difference"] = "product") -> Tensor:
    """Distance between the classifier and the centred class means (self-duality).

    Args:
        kind: "product" is ‖WMᵀ/‖WMᵀ‖_F − (I − 11ᵀ/K)/√(K−1)‖_F (Zhu et al. 2021), "difference"
            ‖W/‖W‖_F − M/‖M‖_F‖_F (Papyan et al. 2020).
    """
    means = _usable_means(stats, simplex=True)
    w = weight.double()[..., stats.present, :]
    w = w.masked_fill(degenerate(weight, stats)[..., None, None], float("nan"))
    if kind == "product":
        return _etf_distance(w @ means.mT)
    return (_unit(w) - _unit(means)).flatten(-2).norm(dim=-1)


def nc4(features: Tensor, logits: Tensor, stats: ClassStats) -> Tensor:
    """Share of samples whose predicted class is not that of the nearest class mean (Papyan et al. 2020).

    Args:
        features: `[*, N, d]`.
        logits: `[*, N, K]` of the same samples, bias included.
        stats: of the training data; distances are centred at μ_G, so that an offset of all features costs no digits.
    """
    if features.shape[-2] == 0:
        raise ValueError("nc4 needs at least one sample")
    present = stats.present.nonzero().squeeze(-1)
    means = stats.centred_means().to(features.dtype)
    centred = features - stats.global_mean.unsqueeze(-2).to(features.dtype)
    score = centred @ means.mT - means.square().sum(-1).unsqueeze(-2) / 2
    differ = (logits.argmax(-1) != present[score.argmax(-1)]).double().mean(-1)
    return differ.masked_fill(~(means.isfinite().all(-1).all(-1)), float("nan"))


def degenerate(weight: Tensor, stats: ClassStats) -> Tensor:
    """`[*]` bool: whether features or classifier have vanished, so that their geometry means nothing.

    Either the class means differ by no more than float32 rounding of the means themselves, or all of W Mᵀ is so small
    (below 1e-6) that the softmax cannot tell the classes apart. Strong decay does this.
    """
    means = stats.centred_means()
    return _vanished(stats, means) | ((weight.double() @ means.mT).flatten(-2).norm(dim=-1) < 1e-6)


def _vanished(stats: ClassStats, means: Tensor) -> Tensor:
    return means.flatten(-2).norm(dim=-1) <= torch.finfo(torch.float32).eps * _size(stats)


def _size(stats: ClassStats) -> Tensor:
    """Frobenius norm of the class means before they are centred, `[*]`."""
    return stats.means[..., stats.present, :].flatten(-2).norm(dim=-1)


def _usable_means(stats: ClassStats, *, simplex: bool = False) -> Tensor:
    """M with NaN in runs where it has vanished; warns of what makes the metrics of all runs questionable."""
    missing = stats.present.logical_not().nonzero().flatten().tolist()
    if len(missing) > stats.num_classes - 2:
        raise ValueError(f"NC metrics need samples of at least two classes; got {stats.num_classes - len(missing)}")
    if missing:
        warnings.warn(f"no samples of class {', '.join(map(str, missing))}: left out of the NC metrics", stacklevel=3)
    if simplex and stats.dim < stats.num_classes - 1:
        warnings.warn(
            f"{stats.num_classes} classes cannot form a simplex in {stats.dim} dimensions (K − 1 are needed): "
            "NC2 and NC3 cannot reach 0",
            stacklevel=3,
        )
    means = stats.centred_means()
    return means.masked_fill(_vanished(stats, means)[..., None, None], float("nan"))


def _unit(matrix: Tensor) -> Tensor:
    return matrix / matrix.flatten(-2).norm(dim=-1)[..., None, None]


def _etf_distance(gram: Tensor) -> Tensor:
    """Frobenius distance of the normalised `[*, K, K]` matrix from the normalised simplex (I − 11ᵀ/K)/√(K−1)."""
    k = gram.shape[-1]
    simplex = (torch.eye(k, dtype=gram.dtype, device=gram.device) - 1 / k) / (k - 1) ** 0.5
    return (_unit(gram) - simplex).flatten(-2).norm(dim=-1)
