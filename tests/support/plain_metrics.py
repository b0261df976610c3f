"""NC0–NC4 written down plainly, from whole arrays in float64: what `measure` is compared with."""

import numpy as np
from torch import Tensor


def plain_metrics(features: Tensor, weight: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute the metrics that `NCResult` names, from features [N, d], W [K, d], logits [N, K] and labels [N]."""
    h, w = (t.detach().double().cpu().numpy() for t in (features, weight))
    y, predicted = labels.cpu().numpy(), logits.detach().double().cpu().numpy().argmax(1)
    k = len(w)
    means = np.stack([h[y == c].mean(0) for c in range(k)])
    centred = means - means.mean(0)
    within = (h - means[y]).T @ (h - means[y]) / len(h)
    between = centred.T @ centred / k
    simplex = (np.eye(k) - 1 / k) / np.sqrt(k - 1)
    # Below this the pseudo-inverse would invert rounding: K centred means span at most K - 1 directions.
    inverse = np.linalg.pinv(between, rcond=1e-10, hermitian=True)
    nearest = np.linalg.norm(h[:, None] - means[None], axis=-1).argmin(1)

    def distance(gram: np.ndarray) -> float:
        return float(np.linalg.norm(gram / np.linalg.norm(gram) - simplex))

    return {
        "nc0": float(np.square(w.sum(0)).sum()),
        "nc1": float(np.trace(within @ inverse) / k),
        "nc1_trace_ratio": float(np.trace(within) / np.trace(between)),
        "nc2": distance(centred @ centred.T),
        "nc2_weight": distance(w @ w.T),
        "nc3": distance(w @ centred.T),
        "nc3_difference": float(np.linalg.norm(w / np.linalg.norm(w) - centred / np.linalg.norm(centred))),
        "nc4": float((predicted != nearest).mean()),
        "train_accuracy": float((predicted == y).mean()),
    }
