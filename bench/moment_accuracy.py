"""What NC1 loses by the way its second moment is summed, emulated on any machine; recorded in bench/results.

python -m bench.moment_accuracy

Matrix units take tf32 (11 bits) or bfloat16 (8 bits), rounded or cut off, and sum in float32. Each way gets the same
features, 512 at a time; its NC1 is held against float64 of the same features. All but the last two sum about the first
sample of each class; "bf16 × 2" is what a GPU does here.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from bench.record import Record, recording

K, D, NORM, AT_ONCE, SEEDS = 10, 128, 10.0, 512, 5
Parts = tuple[Tensor, ...]


def rounded(x: Tensor, bits: int, cut: bool) -> Tensor:
    """Float32 numbers to so many leading bits, to the nearest or cut off."""
    drop = 24 - bits
    i = x.view(torch.int32)
    if not cut:
        i = i + (1 << (drop - 1)) - 1 + ((i >> drop) & 1)
    return (i & -(1 << drop)).view(torch.float32)


def split(x: Tensor, bits: int, parts: int, cut: bool) -> Parts:
    found: list[Tensor] = []
    for _ in range(parts):
        found.append(rounded(x, bits, cut))
        x = x - found[-1]
    return tuple(found)


#: name -> bits, parts, cut off, whether products of two low parts count.
WAYS: dict[str, tuple[int, int, bool, bool]] = {
    "fp32": (24, 1, True, True), "tf32": (11, 1, False, True), "tf32 cut off": (11, 1, True, True),
    "tf32 × 2, no low·low": (11, 2, False, False), "bf16": (8, 1, False, True),
    "bf16 × 2, no low·low": (8, 2, False, False), "bf16 × 2": (8, 2, False, True),
}  # fmt: skip


def product(parts: Parts, low: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0].T @ parts[0]
    high, rest = parts
    mixed = high.T @ rest
    total = high.T @ high + (mixed + mixed.T)
    return total + rest.T @ rest if low else total


def nc1(within: Tensor, means: Tensor) -> float:
    """In float64."""
    centred = means - means.mean(0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    s, v = s[: K - 1], v[: K - 1]
    return float(((v @ within * v).sum(1) / s.square()).sum())


def errors(noise: float, offset: float, outlier: float, seed: int) -> dict[str, float]:
    """Relative errors of NC1.

    Args:
        noise: of the samples, over the norm of the class means.
        outlier: how many times further from its class the first sample is, about which we sum.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(6000) % K
    means = torch.randn(K, D, generator=g, dtype=torch.float64)
    means = offset + NORM * means / means.norm(dim=1, keepdim=True)
    away = NORM * noise * torch.randn(len(y), D, generator=g, dtype=torch.float64)
    away[:K] *= outlier
    h = (means[y] + away).float()
    exact = h.double().view(-1, K, D).mean(0)
    residuals = h.double() - exact[y]
    truth = nc1(residuals.T @ residuals / len(y), exact)

    def error(second: Tensor, summed: Tensor) -> float:
        """Of Σ zzᵀ with z = h − s, given z whose class sums are to be taken off."""
        sums = summed.view(-1, K, D).sum(0).double()
        return abs(nc1((second.double() - sums.T @ sums * K / len(y)) / len(y), exact) / truth - 1)

    def summed(z: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(D, D)
        for part in z.split(AT_ONCE):
            total += of(part)
        return total

    z = h - h[:K][y]  # about the first sample of each class
    found = {}
    for name, (bits, parts, cut, low) in WAYS.items():
        second = summed(z, lambda t, how=(bits, parts, cut), low=low: product(split(t, *how), low))
        found[name] = error(second, z)
    for name, shift in (("E[xxᵀ] − μμᵀ", torch.zeros(D)), ("one shift", h[0])):
        found[name] = error(summed(h - shift, lambda t: t.T @ t), h - shift)
    return found


def main() -> int:
    options = recording(__doc__).parse_args()
    record = Record(options.out / "moment-accuracy.json", "python -m bench.moment_accuracy", "cpu", options.commit)
    record.data |= {
        "classes": K,
        "dim": D,
        "mean_norm": NORM,
        "seeds": SEEDS,
        "unit": "relative error of NC1",
        "rows": [],
    }
    for outlier in (1.0, 30.0):
        for offset in (0.0, 50.0, 1000.0):
            for noise in (1e-2, 1e-3, 1e-4):
                each = [errors(noise, offset, outlier, seed) for seed in range(SEEDS)]
                row = {name: float(f"{statistics.median(e[name] for e in each):.1e}") for name in each[0]}
                record.data["rows"].append({"noise": noise, "offset": offset, "first_sample": outlier, "median": row})
                print(f"noise {noise:g}, offset {offset:g}, first sample × {outlier:g}: {row}", flush=True)
    record.save()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
