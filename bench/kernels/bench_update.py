"""A step of the optimizers: rule × parameters × dtype × implementation, on gradients that stay the same."""

from collections.abc import Callable

import pytest

from bench.kernels.conftest import DEVICE
from bench.optim_cases import RULES, TOLERANCE, Case, Parameters, built, difference
from bench.peers import PEERS, is_installed, peers_of

_LARGE = {"cpu": "25M", "cuda": "100M"}


def cases(device: str, *, everything: bool) -> list[tuple[Case, tuple[str, ...]]]:
    if everything:
        sizes = [(shapes, dtype) for shapes in ("tiny", "resnet9", _LARGE[device]) for dtype in ("fp32", "bf16")]
        found = [(rule, *size) for rule in RULES for size in sizes]
    else:
        found = [(rule, shapes, "fp32") for rule in ("sgd", "adamw", "signumw") for shapes in ("tiny", "resnet9")]
        found += [("lion", "tiny", "fp32"), ("adamw", _LARGE[device], "fp32")]
        found += [(rule, "resnet9", "bf16") for rule in ("sgd", "adamw")]
    made = [Case(rule, shapes, _candidates(rule, shapes, everything), dtype) for rule, shapes, dtype in found]
    return [(case, case.candidates) for case in made]


def _candidates(rule: str, shapes: str, everything: bool) -> tuple[str, ...]:
    has_torch = RULES[rule].theirs is not None
    names = ["nc", *(["torch fused", "torch foreach"] if has_torch else ["by hand"])]
    # To compile a thousand tensors takes minutes.
    if everything and shapes != "tiny":
        names += ["nc compiled", *(["torch compiled"] if has_torch else [])]
    return (*names, *peers_of(rule))


def marks(name: str) -> list[pytest.MarkDecorator]:
    absent = name in PEERS and not is_installed(name)
    return [pytest.mark.skip(reason=f"{name} is not installed")] if absent else []


class Prepared:
    """The candidates after the steps of the check, and how far each then is from the baseline."""

    def __init__(self, case: Case) -> None:
        parameters = Parameters(case, DEVICE)
        self.candidates, self.failed = built(case, parameters, capturable=False)
        baseline = self.candidates[case.candidates[1]]
        self.apart = {n: difference(case, c, baseline, parameters.start) for n, c in self.candidates.items()}


@pytest.mark.filterwarnings("default")  # of peers
def test_update(case: Case, name: str, prepared: Callable[[Case], Prepared], timed: Callable[..., None]) -> None:
    made = prepared(case)
    if name in made.failed:
        pytest.skip(f"{name}: {made.failed[name]}")
    apart, one = made.apart[name], made.candidates[name]
    assert apart <= TOLERANCE[case.dtype], f"{name} is {apart:.1e} from {case.candidates[1]}"
    compiled = {"compile_seconds": round(one.compile_seconds, 1)} if one.compile_seconds else {}
    timed(f"{case}: a step", name, one.step, one.bytes, difference=float(f"{apart:.1e}"), **compiled)
