"""The row sum of a classifier under sign descent, with torch's cross-entropy and with ours.

python -m bench.row_sum      records bench/results/row-sum-cpu.json

A network 20 → 32 → K on 64 samples; SignumW without momentum trains the head, SGD the rest. NC0 may not exceed the
bound of `ncollapse.ufm.predict`, which holds where the gradient's row sum is zero. Recorded of each loss: the first
step above the bound, and NC0 and its bound at the end.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.record import Record, recording
from ncollapse import cross_entropy, metrics, optim, ufm

#: K, λ, η, steps, dtype of the network.
CASES = (
    (2, 0.002, 0.05, 4000, torch.float32), (2, 0.002, 0.05, 4000, torch.float64), (2, 0.01, 0.05, 2000, torch.float32),
    (3, 0.005, 0.05, 3000, torch.float32), (10, 0.005, 0.05, 3000, torch.float32),
)  # fmt: skip
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch": nn.functional.cross_entropy,
    "ncollapse": cross_entropy,
}


def trained(
    loss: Callable[[Tensor, Tensor], Tensor], k: int, decay: float, lr: float, steps: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Train one network and compare its NC0 with the bound."""
    torch.manual_seed(0)
    x = torch.randn(64, 20, dtype=dtype)
    y = torch.bucketize(x[:, 0].contiguous(), torch.linspace(-1, 1, k + 1, dtype=dtype)[1:-1])
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, k)).to(dtype)
    head: Tensor = net[2].weight
    optimizer = optim.SignumW([head], lr=lr, weight_decay=decay, momentum=0.0)
    rest = torch.optim.SGD([p for p in net.parameters() if p is not head], lr=0.1)
    nc0 = [metrics.nc0(head.detach()).item()]
    for _ in range(steps):
        net.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
        rest.step()
        nc0.append(metrics.nc0(head.detach()).item())
    bound = ufm.predict("signumw", k, 32, start=nc0[0], lr=lr, steps=steps, weight_decay=decay)
    assert bound is not None
    above = np.flatnonzero(np.array(nc0) > bound.nc0 * (1 + 1e-3) + 1e-6)
    return {
        "first_above": int(above[0]) if above.size else None, "nc0": float(f"{nc0[-1]:.4g}"),
        "bound": float(f"{bound.nc0[-1]:.4g}"), "loss": float(f"{loss(net(x), y).item():.2g}"),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = recording(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    record = Record(options.out / "row-sum-cpu.json", "python -m bench.row_sum", "cpu", options.commit)
    record.data["cases"] = []
    for k, decay, lr, steps, dtype in CASES:
        case: dict[str, Any] = {"K": k, "decay": decay, "lr": lr, "steps": steps, "dtype": str(dtype).split(".")[1]}
        case |= {name: trained(loss, k, decay, lr, steps, dtype) for name, loss in LOSSES.items()}
        record.data["cases"].append(case)
        record.save()
        print(case, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
