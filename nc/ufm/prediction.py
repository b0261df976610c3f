"""Predictions of NC0 = ‖s‖², s = Wᵀ1, step by step (arXiv 2602.16642).

All of them follow from one identity: the row sum of the cross-entropy gradient is zero, 1ᵀ∇L = 0, since the softmax and
the one-hot target both sum to one. It holds for every network and batch, with or without a bias. It carries over to
everything linear in ∇L, such as momentum, and to an odd matrix polynomial X·p(XᵀX) as in Newton–Schulz; not to a sign,
nor to Adam's division by √v. η is the learning rate, β the momentum, λ the decay, c its coupled share.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
#: "fixed": the unit vectors e_k; "etf": a simplex; "free": trained.
Features = Literal["fixed", "etf", "free"]
#: Whose gradient: `ncollapse.cross_entropy`, or `torch.nn.functional.cross_entropy`.
Loss = Literal["ncollapse", "torch"]


@dataclass(frozen=True)
class Prediction:
    """A prediction of NC0.

    Attributes:
        kind: "exact": NC0 itself, from which a run deviates only by rounding. "bound": an upper bound of NC0.
        nc0: `[T + 1]` float64, before the first step and after each.
        limit: the limit of `nc0` as η → 0 with Ση = ∞.
        largest_gap: the largest gap between the label's logit and another up to which the prediction holds in the
            arithmetic of the run (`largest_gap`); ∞ if for all.
        holds_until: the last step up to which it is known to hold, at most T; None where the gap is not predicted.
    """

    kind: Literal["exact", "bound"]
    nc0: Floats
    limit: float
    largest_gap: float = math.inf
    holds_until: int | None = None


def largest_gap(dtype: str = "float64", loss: Loss = "ncollapse") -> float:
    """Return the gap between the label's logit and another up to which the gradient is that of the theory.

    "ncollapse": `ncollapse.cross_entropy`, `simulate` and the trainer, whose gradient by a logit is exp(−gap) at least,
    until that underflows: 745 in float64, 103 in float32. "torch": `torch.nn.functional.cross_entropy`, whose gradient
    by the label's logit is p − 1, which is only rounding error once 1 − p is below the rounding of 1: 36.7 and 16.6.
    There its row sum is no longer zero beside the entries, and a sign makes whole steps of it.

    Args:
        dtype: "float64" or "float32", of the logits.
        loss: which gradient.

    Raises:
        ValueError: another dtype or loss.
    """
    if dtype not in ("float32", "float64") or loss not in get_args(Loss):
        raise ValueError(f"dtype is 'float32' or 'float64', loss 'ncollapse' or 'torch'; got {dtype!r} and {loss!r}")
    info = np.finfo(dtype)
    return -math.log(info.smallest_subnormal if loss == "ncollapse" else info.epsneg)


def row_sum_factor(lrs: Iterable[float], *, momentum: float = 0.0, weight_decay: float, coupling: float) -> Floats:
    """The last layer's row sum under SGD or SGDW, as a multiple of its initial value: s_t = factor[t] · s_0.

    Only decay and momentum change s: v ← βv + cλs, then s ← (1 − η(1 − c)λ)s − ηv, a linear recursion that holds for
    every network and data set (arXiv 2602.16642, Theorems 3.1 and 3.2). NC0 is its square: NC0_t = factor[t]² · NC0_0.
    A real run deviates from it only by rounding. The factors are `[T + 1]` float64, beginning with 1.

    Args:
        lrs: η_t of each step, T of them.
        momentum: β; heavy ball without dampening or Nesterov.
        weight_decay, coupling: λ and c, which is 1 for SGD and 0 for SGDW.
    """
    s, v = 1.0, 0.0
    factors = [s]
    for lr in lrs:
        v = momentum * v + coupling * weight_decay * s
        s = (1 - lr * (1 - coupling) * weight_decay) * s - lr * v
        factors.append(s)
    return np.array(factors)


def predict(
    optimizer: str,
    K: int, d: int, *, start: ArrayLike, lr: ArrayLike, steps: int, momentum: float = 0.0, weight_decay: float = 0.0,
    coupling: float | None = None, features: Features | None = None, dtype: str = "float64", loss: Loss = "ncollapse",
) -> Prediction | None:  # fmt: skip
    """NC0 over the steps of a run; None where no prediction is known.

    The optimizer's rule decides (`ncollapse.optim.Rule.law`, `law_if_coupled`):

    | law | decay | any network | the model with fixed features |
    | --- | --- | --- | --- |
    | "linear" | decoupled | exact, → 0: s ← (1 − ηλ)s, for every momentum | the same |
    | "linear" | coupled, with heavy-ball momentum | exact, → 0 (`row_sum_factor`) | the same |
    | "sign" | decoupled | bound, → d(K − 2)²/λ² | exact, → K(K − 2)²/λ² |
    | "sign" | coupled, with heavy-ball momentum | none | bound, → 0 |
    | None, as Adam's | any | none | none |

    Sign descent without momentum idealises Adam and AdamW: they become it for β₁, β₂, ε → 0.

    A prediction for any network requires that this rule alone trains the last layer and that the gradient of the loss
    has row sum zero; features, bias, momentum and batches do not matter. The last column requires the features e_k and
    all classes in every batch: a sign depends on the axes, and features that move rotate them.

    "exact" and "never exceeds" hold in real arithmetic, and in floating point up to where `largest_gap` and
    `holds_until` say. The linear laws hold for every gap, up to rounding. Under a sign each gradient counts, however
    small: the softmax of float64 underflows at a gap of 745, which for a decay λ below 2/745 lies before the limit
    2/λ, so a run stops short of it; and with torch's cross-entropy a sign turns the rounding error of p − 1 into full
    steps from a gap of 16.6 on in float32 (`ncollapse.cross_entropy`). Newton–Schulz in bfloat16, as in torch.optim,
    deviates from the law by large factors.

    Args:
        optimizer: its name, as in `ncollapse.optim.by_name`.
        K, d: numbers of classes and features.
        start: W_0 `[K, d]`; or only NC0_0, which is enough for any network.
        lr, weight_decay: η, a number or `[steps]`, and λ.
        momentum: β of heavy-ball momentum, without dampening or Nesterov.
        coupling: c; by default the optimizer's own.
        features: as in `simulate`. "fixed" selects the last column; by default any network.
        dtype, loss: the arithmetic of the run, as in `largest_gap`.

    Raises:
        ValueError: an unknown optimizer, numbers out of range, arrays of the wrong shape, or NC0_0 where W_0 is needed.
    """
    from ncollapse.optim import by_name  # here, since it imports torch

    cls = by_name(optimizer)
    check_shape(K, d, features)
    lrs = learning_rates(lr, steps).tolist()
    if coupling is None:
        coupling = cls.default_coupling
    if not (0 <= momentum < 1 and 0 <= weight_decay < math.inf and 0 <= coupling <= 1):
        raise ValueError(
            "momentum lies in [0, 1), weight_decay in [0, ∞), coupling in [0, 1]; "
            f"got {momentum:g}, {weight_decay:g} and {coupling:g}"
        )
    if weight_decay == 0:
        coupling = 0.0
    weight = np.asarray(start, dtype=np.float64)
    if weight.shape not in ((), (K, d)):
        raise ValueError(f"start is W_0, of shape {(K, d)}, or NC0_0, a number; got shape {weight.shape}")
    nc0 = float(weight) if weight.ndim == 0 else float(np.square(weight.sum(0)).sum())
    if not 0 <= nc0 < math.inf:
        raise ValueError(f"start: NC0 must be at least 0 and finite; got {nc0:g}")

    gap = largest_gap(dtype, loss)
    law = cls.rule.law if coupling == 0 or cls.rule.law_if_coupled else None
    if law == "linear":
        factor = row_sum_factor(lrs, momentum=momentum, weight_decay=weight_decay, coupling=coupling)
        return Prediction("exact", nc0 * factor**2, 0.0 if weight_decay else nc0, math.inf, steps)
    if law is None or (features != "fixed" and coupling > 0) or 0 < coupling < 1:
        return None
    if features != "fixed":
        return _limited(_sign_decoupled_bound(K, d, nc0, lrs, weight_decay), loss, gap, steps)
    if weight.ndim == 0:
        raise ValueError(f"{optimizer} with fixed features: start must be W_0, of shape {(K, d)}; NC0_0 is not enough")
    if coupling == 0:
        return _sign_decoupled(weight, lrs, weight_decay, gap)
    return _limited(_sign_coupled_bound(weight, lrs, momentum, weight_decay), loss, gap, steps)


def _limited(bound: Prediction, loss: Loss, gap: float, steps: int) -> Prediction:
    """Say up to where a bound holds: a gradient that underflows to zero in whole columns keeps it, p − 1 does not."""
    if loss == "ncollapse":
        return dataclasses.replace(bound, holds_until=steps)
    return dataclasses.replace(bound, largest_gap=gap)


def _sign_decoupled(weight: Floats, lrs: list[float], weight_decay: float, gap: float) -> Prediction:
    """Exact NC0 of sign descent with decoupled decay on the features e_k, for any W_0, momentum and schedule.

    Column k of ∇L is p_k − e_k over K: for every W negative in row k and positive elsewhere, and zero for k > K. So
    sign(V) = S = [11ᵀ − 2I, 0] at every step and W ← (1 − ηλ)W − ηS, with the solution W_t = Π_t W_0 − a_t S,
    Π = ∏(1 − ηλ) and a ← (1 − ηλ)a + η, that is a = (1 − Π)/λ. With 1ᵀS = (K − 2)[1, 0], K entries of the row sum go to
    −(K − 2)/λ: NC0 → K(K − 2)²/λ² (arXiv 2602.16642, Theorem 3.3, for SignGD). The logits' gaps are Π times the initial
    ones plus 2a: they go to 2/λ. An entry of ∇L is exp(−gap)/K for large gaps, so it underflows at `gap` − log K.
    """
    K = len(weight)
    product, pull = _decay_and_pull(lrs, weight_decay, abs_factor=False)
    s = weight.sum(0)
    middle = s[:K].mean()
    # Sum around the mean, which avoids cancellation beyond that of the row sum itself.
    spread = np.square(s[:K] - middle).sum() + np.square(s[K:]).sum()
    nc0 = K * (product * middle - (K - 2) * pull) ** 2 + product**2 * spread
    logits = weight[:, :K]
    gaps = product * float((logits.diagonal() - logits).max()) + 2 * pull
    beyond = np.flatnonzero(gaps > gap - math.log(K))
    # A gradient that vanishes after step t is that of step t + 1.
    until = int(beyond[0]) if beyond.size else len(lrs)
    return Prediction("exact", nc0, _limit(K, K, float(nc0[0]), weight_decay), gap - math.log(K), until)


def _sign_decoupled_bound(K: int, d: int, nc0: float, lrs: list[float], weight_decay: float) -> Prediction:
    """Bound of sign descent with decoupled decay in any network: ‖s_t‖ ≤ Π_t‖s_0‖ + √d(K − 2)(1 − Π_t)/λ.

    V is a sum of gradients, so each of its columns sums to zero: it has entries of both signs or is zero, and its signs
    sum to K − 2 at most, in absolute value. Hence the new ‖s‖ is at most |1 − ηλ|‖s‖ + η√d(K − 2). With d = K its limit
    is that of Theorem 3.3 of arXiv 2602.16642. A gradient that consists of rounding errors has no such columns.
    """
    product, pull = _decay_and_pull(lrs, weight_decay, abs_factor=True)
    bound = (product * math.sqrt(nc0) + math.sqrt(d) * (K - 2) * pull) ** 2
    return Prediction("bound", bound, _limit(K, d, nc0, weight_decay))


def _sign_coupled_bound(weight: Floats, lrs: list[float], momentum: float, weight_decay: float) -> Prediction:
    """Bound of sign descent with momentum and coupled decay on the features e_k.

    For each column w of W, the smaller of two bounds on its sum s.

    1. The rise. A step changes s by at most Kη. Without momentum 1ᵀ(∇L + λw) = λs: if all signs of the column agree,
       the step moves s towards 0; else they sum to K − 2 at most. So the new |s| is at most max(|s| + (K − 2)η, Kη).
       From W_0 = 0 this bound is reached until the decay outweighs a gradient.
    2. The fall. Each column is a separate problem, sign descent on F = L_k/K + λ‖w‖²/2: λ-strongly convex, with a
       minimiser of sum zero, since 1ᵀ∇F = λs, so that s² ≤ (2K/λ)(F − F*). A step with entries up to η adds at most
       Mη²/2 to the first-order change of F and changes ∇F by at most Mη in the 1-norm, M = 1/K + λK (a softmax's
       variance of z is at most max z²). We have ‖∇F‖₁ ≥ ‖∇F‖₂ ≥ √(2λ(F − F*)). Let E bound the error, in the 1-norm, of
       momentum as a weighted mean of gradients. Then the new values are at most

        F − F* ← F − F* − η√(2λ(F − F*)) + 2ηE + Mη²/2,   E ← β(E + Mη).

    With η → 0 and Ση = ∞ this goes to zero, and NC0 with it (Theorem 3.4 of arXiv 2602.16642, for SignGD); with a
    constant η it stays at the order η².
    """
    K, d = weight.shape
    used = np.arange(d) < K  # the gradient of the other columns is the decay alone
    smooth = used / K + weight_decay * K
    gap = np.maximum(_objectives(weight, weight_decay) - used * _least_objective(K, weight_decay), 0.0)
    rise, error = np.abs(weight.sum(0)), np.zeros(d)
    bounds = [np.square(rise).sum()]
    for lr in lrs:
        rise = np.maximum(rise + (K - 2) * lr, K * lr) if momentum == 0 else rise + K * lr
        # Convex in F − F*, so the maximum is at an end of its interval: 0, or its own bound.
        gap = np.maximum(gap - lr * np.sqrt(2 * weight_decay * gap), 0.0) + 2 * lr * error + smooth * lr**2 / 2
        error = momentum * (error + smooth * lr)
        bounds.append(np.minimum(np.square(rise), 2 * K / weight_decay * gap).sum())
    return Prediction("bound", np.array(bounds), 0.0)


def _objectives(weight: Floats, weight_decay: float) -> Floats:
    """F of each column, `[d]`."""
    logits = weight[:, : len(weight)]
    losses = (np.logaddexp.reduce(logits, axis=0) - logits.diagonal()) / len(weight)
    return np.pad(losses, (0, weight.shape[1] - len(weight))) + weight_decay / 2 * np.square(weight).sum(0)


def _least_objective(K: int, weight_decay: float) -> float:
    """F* of a column with a gradient. By symmetry and strict convexity the minimiser is w = g(e_k − 1/K).

    There ∇F = 0 reads λg = e^{−g}/(1 + (K − 1)e^{−g}): the left side increases with g, the right side decreases.
    """
    low, high = 0.0, 1 / (weight_decay * K)
    for _ in range(100):
        g = (low + high) / 2
        low, high = (g, high) if weight_decay * g < math.exp(-g) / (1 + (K - 1) * math.exp(-g)) else (low, g)
    # Rounded down, so that the bound holds.
    return math.log1p((K - 1) * math.exp(-high)) / K + weight_decay / 2 * low**2 * (1 - 1 / K)


def _decay_and_pull(lrs: list[float], weight_decay: float, *, abs_factor: bool) -> tuple[Floats, Floats]:
    """Π ← (1 − ηλ)Π from 1 and a ← (1 − ηλ)a + η from 0, `[T + 1]` each; with |1 − ηλ| if `abs_factor`."""
    product, pull = [1.0], [0.0]
    for lr in lrs:
        factor = abs(1 - lr * weight_decay) if abs_factor else 1 - lr * weight_decay
        product.append(factor * product[-1])
        pull.append(factor * pull[-1] + lr)
    return np.array(product), np.array(pull)


def _limit(K: int, columns: int, nc0: float, weight_decay: float) -> float:
    """The limit of NC0 when `columns` entries of s go to (K − 2)/λ in absolute value and the others to 0."""
    if weight_decay == 0:
        return math.inf if K > 2 else nc0
    return columns * ((K - 2) / weight_decay) ** 2


def check_shape(K: int, d: int, features: str | None) -> None:
    """Raise ValueError for numbers of classes and features that do not make a model."""
    if K < 2 or d < 1:
        raise ValueError(f"the model needs K ≥ 2 classes and d ≥ 1 features; got K = {K} and d = {d}")
    if features is not None and features not in get_args(Features):
        raise ValueError(f"features is {', '.join(map(repr, get_args(Features)))}; got {features!r}")
    if features == "etf" and d < K - 1:
        raise ValueError(f"a simplex of {K} classes needs d ≥ K − 1 = {K - 1} features; got d = {d}")
    if features == "fixed" and d < K:
        raise ValueError(f"the features e_1 … e_{K} need d ≥ K = {K}; got d = {d}. features='etf' needs one less")


def learning_rates(lr: ArrayLike, steps: int, lead: Sequence[int] = ()) -> Floats:
    """The learning rate of every step, `[*lead, steps]`; raises ValueError for steps < 1 or an unusable `lr`."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    rates = np.asarray(lr, dtype=np.float64)
    if (wrong := rates[~((rates > 0) & (rates < np.inf))]).size:
        raise ValueError(f"lr must be positive and finite; got {wrong[0]:g}")
    try:
        return np.broadcast_to(rates, (*lead, steps))
    except ValueError:
        raise ValueError(
            f"lr is a number or has the shape [{', '.join(map(str, (*lead, steps)))}], one for each step; "
            f"got shape {list(rates.shape)}"
        ) from None
