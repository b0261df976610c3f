"""Claim 12: Theorems 3.1–3.4 against the unconstrained features model, simulated with ncollapse's optimizers."""

import contextlib
import functools
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ncollapse.formatting import number
from ncollapse.optimizer_table import TABLE
from ncollapse.train.commands.theory import Setting
from ncollapse.train.findings.claim import Comparison, Finding, Verdict

#: NC0 as simulated and as predicted, `[T]` each, up to the last step for which the prediction is known to hold.
_Run = tuple[NDArray[np.float64], NDArray[np.float64]]

#: Momenta β at which each theorem is tested; Theorems 3.3 and 3.4 are stated for 0.
_MOMENTA = (0.0, 0.5, 0.9)
#: theorem -> optimizer: those of the table of optimizers, in order.
_THEOREMS = dict(
    sorted((found[1], row.name) for row in TABLE.values() if (found := re.search(r"\((3\.\d)\)", row.theorem)))
)
#: Relative deviation from an exact prediction that the rounding of float64 explains.
_EXACT = 1e-9
#: Share of the start below which NC0 is not compared: the row sum of a matrix is then the rounding of its entries.
_FLOOR = 1e-8
#: Numbers of steps at which NC0 is compared.
_RECORDED = 100


@functools.cache
def theorems() -> Finding:
    """Test Theorems 3.1–3.4 in the setting of `ncollapse theory`, at three momenta; 0.5 s, once in a process."""
    simulated = _simulate(Setting())
    parts = tuple(_compare(theorem, simulated[name]) for theorem, name in _THEOREMS.items())
    exact = max(part.value for part in parts[:3])
    bound = parts[3]
    return Finding(
        12,
        "The theorems on NC0 hold in the unconstrained features model: SGD and SGDW (3.1, 3.2), sign descent with "
        "decoupled (3.3) and coupled (3.4) decay.",
        f"Simulation in float64 (K = 10, {Setting().steps:,} steps, momenta {', '.join(f'{β:g}' for β in _MOMENTA)}) "
        f"against the prediction at {_RECORDED} steps. 3.1–3.3 are exact: the largest relative deviation is at most "
        f"{number(_EXACT)} while NC0 is at least {number(_FLOOR)} of its start (below, float64 rounds it). "
        "3.4 is a bound: NC0 never exceeds it, rises above its start and ends below it.",
        f"largest deviation from 3.1–3.3: {number(exact)}; 3.4: at most {number(bound.value)} of the bound, NC0 "
        f"{number(bound.more['start'])} → {number(bound.more['peak'])} → {number(bound.more['end'])}",
        parts,
        (),
    )


def _simulate(setting: Setting) -> dict[str, list[_Run]]:
    """Return optimizer -> a run for each momentum, all trained as one stack."""
    import torch

    from ncollapse import ufm

    runs = [(name, momentum) for momentum in _MOMENTA for name in _THEOREMS.values()]
    couplings = [float(TABLE[name].coupling or 0) for name, _ in runs]
    lrs = setting.lrs
    with _one_thread():
        found = ufm.simulate(
            [name for name, _ in runs], setting.classes, setting.d, n=1, lr=lrs, steps=setting.steps, features="fixed",
            record=_RECORDED, seed=setting.seed, weight_decay=setting.weight_decay,
            momentum=torch.tensor([momentum for _, momentum in runs], dtype=torch.float64, device="cpu"),
            coupling=torch.tensor(couplings, dtype=torch.float64, device="cpu"),
        )  # fmt: skip
    simulated: dict[str, list[_Run]] = {}
    for (name, momentum), coupling, start, nc0 in zip(runs, couplings, found.start, found.nc0, strict=True):
        predicted = ufm.predict(
            name, setting.classes, setting.d, start=start, lr=lrs, steps=setting.steps, momentum=momentum,
            weight_decay=setting.weight_decay, coupling=coupling, features="fixed",
        )  # fmt: skip
        assert predicted is not None  # each has a theorem
        held = found.steps <= (predicted.holds_until or 0)
        simulated.setdefault(name, []).append((nc0[held], predicted.nc0[found.steps[held]]))
    return simulated


def _compare(theorem: str, runs: list[_Run]) -> Comparison:
    name = f"{TABLE[_THEOREMS[theorem]].label} ({theorem})"
    worst = {
        "start": max(float(nc0[0]) for nc0, _ in runs),
        "peak": max(float(nc0.max()) for nc0, _ in runs),
        "end": max(float(nc0[-1]) for nc0, _ in runs),
    }
    if theorem == "3.4":
        of = "largest share of the bound"
        value = max(float((nc0 / bound)[1:].max()) for nc0, bound in runs)
        rises_and_falls = all(nc0.max() > nc0[0] > nc0[-1] for nc0, _ in runs)
        holds = value <= 1 + _EXACT and rises_and_falls
    else:
        of = "largest relative deviation"
        value = max(_deviation(nc0, predicted) for nc0, predicted in runs)
        goes_up = theorem == "3.3"
        holds = value <= _EXACT and all((nc0[-1] > nc0[0]) == goes_up for nc0, _ in runs)
    verdict: Verdict = "holds" if holds else "fails"
    return Comparison(name, of, value, verdict, len(runs), "momenta", more=worst)


def _deviation(nc0: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    above = predicted >= _FLOOR * predicted[0]
    return float(np.abs(nc0[above] / predicted[above] - 1).max())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: a step on 10 × 10 matrices costs less than handing it to others."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
