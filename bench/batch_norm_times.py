"""Batch norm with ReLU, pooling or a residual, and the cross-entropy's gradient, against torch's operations on a GPU.

python -m bench.batch_norm_times --device cuda --minutes 2
python -m bench.batch_norm_times          to see that it works: small maps, no graphs, torch's operations throughout

Every case first checks what the candidates compute against float64; then they take turns, and nothing is asserted of
time. Of each is recorded, in microseconds:

- `difference`: of the outputs and of the gradients from float64, ‖difference‖/‖value‖, the largest. There too ReLU and
  pooling choose by what has been rounded to the maps' dtype. Compiled code does not round in between, so that pooling
  chooses another pixel here and there: its difference is recorded, and not judged;
- `eager`: wall time of forward and backward, called from Python, of `nc` and torch's operations;
- `step`, `forward`: the GPU's time of both and of forward alone, ten of them in a CUDA graph, with the GB/s that the
  fused operation's reads and writes make (x twice, the result once; x and its gradient twice, the gradient of x once)
  and their `share` of a device copy's. Maps that fit the second-level cache may have more than all of it.

`nc` sums in the way that it is set to, the other names that begin with it without one novelty each, `nc, before`
without any, and `nc, dependent launches` with one more (`SWITCHES`): what is not faster is to be deleted.

`resnet9` is the sum over its eight layers, batch 128, 28 × 28 images.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.record import Record, first_line, timing_options
from bench.timing import Step, Yardstick, captured, compared, gpu, wall_cpu, wall_cuda
from ncollapse.kernels.batch_norm import batch_norm_relu, op
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference
from ncollapse.kernels.cross_entropy import cross_entropy_grad
from ncollapse.kernels.cross_entropy.reference import cross_entropy_grad_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Of `difference`. In bfloat16 a value is rounded by up to 2⁻⁹ of itself, twice where a residual is added. In float32
#: about one value in a million is so near to zero, or to its neighbour, that a rounding decides what has a gradient.
TOLERANCE = {"fp32": 2e-3, "bf16": 1e-2}
MOMENTUM, EPS = 0.1, 1e-5
GRAPH_STEPS = 10
BASELINE, COMPILED = "torch", "torch compiled"
#: Settings of `kernels.batch_norm`, each of which turns something newer off: the merging of parts by the last program
#: of moments, that of backward's sums, one program for all rows of a small map.
NOVELTIES: dict[str, dict[str, Any]] = {
    "moments merged by a kernel": {"MERGED_ELEMENTS": 0},
    "sums merged by a kernel": {"MERGE_SUMS": False},
    "small maps in parts": {"SMALL_ROWS": 0},
}
SWITCHES = {f"nc, {name}": settings for name, settings in NOVELTIES.items()}
#: Unmeasured, and so off: kernels that start while the one before them still runs (from sm_90 on).
SWITCHES["nc, dependent launches"] = {"DEPENDENT": True}
SWITCHES["nc, before"] = {name: value for settings in NOVELTIES.values() for name, value in settings.items()}


@dataclass(frozen=True)
class Case:
    """Maps `[samples, channels, size, size]`, and what follows ReLU."""

    samples: int
    channels: int
    size: int
    kind: str  # "plain", "pool" or "residual"
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"[{self.samples}, {self.channels}, {self.size}, {self.size}] {self.dtype}, {self.kind}"


#: Channels, size and kind of the layers of ResNet9 for 28 × 28 images.
RESNET9 = [
    (64, 28, "plain"), (128, 28, "pool"), (128, 14, "plain"), (128, 14, "residual"), (256, 14, "pool"),
    (512, 7, "pool"), (512, 3, "plain"), (512, 3, "residual"),
]  # fmt: skip


def cases(device: str) -> list[Case]:
    """The most telling first, those of ResNet9: time may run out."""
    found = [Case(128, channels, size, kind) for channels, size, kind in RESNET9]
    found += [Case(128, 24 * 16, 28, "pool"), Case(128, 24 * 32, 14, "pool"), Case(1024, 64, 28, "plain")]
    found += [*(Case(1024, 128, 28, kind) for kind in ("pool", "residual")), Case(128, 64, 28, "plain", "fp32")]
    return found if device == "cuda" else [replace(case, samples=4, channels=8) for case in dict.fromkeys(found)]


class Maps:
    """The tensors of a case, the gradient that comes in, and forward and backward over them."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        def maps(size: int) -> Tensor:
            made = random(case.samples, case.channels, size, size).to(DTYPES[case.dtype])
            return made.contiguous(memory_format=torch.channels_last)

        self.x, self.pool = maps(case.size).requires_grad_(), case.kind == "pool"
        self.residual = maps(case.size).requires_grad_() if case.kind == "residual" else None
        self.grad = maps(case.size // 2 if self.pool else case.size)
        self.weight, self.bias = (1 + 0.1 * random(case.channels)).requires_grad_(), random(case.channels)
        self.bias.requires_grad_()
        self.running = [torch.zeros(case.channels, device=device), torch.ones(case.channels, device=device)]
        reads = 2 * self.x.nbytes + (0 if self.residual is None else self.residual.nbytes)
        self.forward_bytes: int = reads + self.grad.nbytes
        self.step_bytes: int = self.forward_bytes + 2 * (self.x.nbytes + self.grad.nbytes) + self.x.nbytes

    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias, *([] if self.residual is None else [self.residual])]

    def step(self, forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The output and the gradients."""
        y = forward(self.x, self.weight, self.bias, *self.running, self.pool, self.residual)
        return y.detach(), *torch.autograd.grad(y, self.leaves(), self.grad)

    def exact(self) -> tuple[Tensor, ...]:
        """The same in float64, but for the rounding of what ReLU and pooling choose by."""
        wide = [t.detach().double().requires_grad_() for t in self.leaves()]
        z = F.batch_norm(wide[0], None, None, *wide[1:3], True, MOMENTUM, EPS)
        y = F.relu(z + (z.to(self.x.dtype).double() - z).detach())
        y = F.max_pool2d(y, 2) if self.pool else y if self.residual is None else wide[3] + y
        return y.detach(), *torch.autograd.grad(y, wide, self.grad.double())


def ours(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, pool: bool, more: Tensor | None) -> Tensor:
    return batch_norm_relu(
        x, weight, bias, mean, var, train=True, momentum=MOMENTUM, eps=EPS, pool=pool, residual=more
    )  # fmt: skip


def by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, pool: bool, more: Tensor | None
) -> Tensor:
    return batch_norm_relu_reference(x, weight, bias, mean, var, True, MOMENTUM, EPS, pool, more)


def candidates(compiled: bool) -> dict[str, Callable[..., Tensor]]:
    ways = {"nc": ours, BASELINE: by_torch} | dict.fromkeys(SWITCHES, ours)
    return ways | ({COMPILED: torch.compile(by_torch, dynamic=False)} if compiled else {})


@contextlib.contextmanager
def switched(name: str) -> Iterator[None]:
    """Within it, kernels sum as this candidate does. A graph that is captured there stays so."""
    from ncollapse.kernels.batch_norm import gpu

    with contextlib.ExitStack() as stack:
        for setting, value in SWITCHES.get(name, {}).items():
            stack.enter_context(mock.patch.object(op if setting == "SMALL_ROWS" else gpu, setting, value))
        yield


def differences(maps: Maps, ways: dict[str, Callable[..., Tensor]], tolerance: float) -> dict[str, float]:
    """From float64; raises AssertionError where one is too large."""
    exact, found = maps.exact(), {}
    for name, way in ways.items():
        with switched(name):
            parts = zip(maps.step(way), exact, strict=True)
        apart = max(float((a.double() - b).norm() / b.norm()) for a, b in parts)
        found[name] = float(f"{apart:.1e}")
        assert apart <= tolerance or name == COMPILED, f"{name} is {apart:.1e} from float64"
    return found


def run(
    case: Case, seconds: float, copy: Yardstick | None, result: dict[str, Any], save: Callable[[], None], *,
    compiled: bool,
) -> None:  # fmt: skip
    """Fill what is recorded of a case, and save it after each group of timings.

    Args:
        copy: None: on a CPU.
    """
    maps, ways = Maps(case, "cpu" if copy is None else "cuda"), candidates(compiled)
    result["difference"] = differences(maps, ways, TOLERANCE[case.dtype])
    steps: dict[str, Step] = {name: lambda way=way: maps.step(way) for name, way in ways.items()}
    unswitched = {name: step for name, step in steps.items() if name not in SWITCHES}
    result["eager"], _ = compared(unswitched, wall_cpu if copy is None else wall_cuda, seconds, BASELINE)
    save()

    def forwards(way: Callable[..., Tensor]) -> Step:
        return lambda: way(maps.x, maps.weight, maps.bias, *maps.running, maps.pool, maps.residual)

    once = {name: forwards(way) for name, way in ways.items()}
    for group, timed, moved in (("step", steps, maps.step_bytes), ("forward", once, maps.forward_bytes)):
        if copy is None:
            result[group], _ = compared(timed, wall_cpu, seconds, BASELINE)
            continue
        replays = {}
        for name, step in timed.items():
            with switched(name):
                replays[name] = captured(step, GRAPH_STEPS)
        replays["copy"] = captured(copy.step, GRAPH_STEPS)
        found, _ = compared(replays, gpu, seconds, BASELINE, GRAPH_STEPS)
        most = copy.bytes / found["copy"]["median"]
        for name in timed:
            rate = moved / found[name]["median"]
            found[name] |= {"gb_per_s": round(rate / 1e3, 1), "share": round(rate / most, 3)}
        result[group] = found
        save()


def cross_entropy(device: str, seconds: float) -> dict[str, Any]:
    """Of 24 runs, of one, and of a thousand classes."""
    return {str(list(s)): slopes(s, device, seconds) for s in ((24, 128, 10), (1, 128, 10), (1, 1024, 1000))}


def slopes(shape: tuple[int, int, int], device: str, seconds: float) -> dict[str, Any]:
    logits, labels = torch.randn(shape, device=device), torch.randint(shape[2], shape[:2], device=device)
    ways = {"nc": cross_entropy_grad, BASELINE: cross_entropy_grad_reference}
    exact = cross_entropy_grad_reference(logits.double(), labels)
    for name, way in ways.items():
        apart = float((way(logits, labels).double() - exact).norm() / exact.norm())
        assert apart <= 1e-6, f"{name} is {apart:.1e} from float64"
    steps: dict[str, Step] = {name: lambda way=way: way(logits, labels) for name, way in ways.items()}
    if device == "cpu":
        return compared(steps, wall_cpu, seconds, BASELINE)[0]
    replays = {name: captured(step, GRAPH_STEPS) for name, step in steps.items()}
    return compared(replays, gpu, seconds, BASELINE, GRAPH_STEPS)[0]


def whole_network(results: list[dict[str, Any]], device: str) -> dict[str, Any] | None:
    """Microseconds of a step in all layers of ResNet9; None if they were not all timed."""
    layers = {str(case) for case in cases(device)[: len(RESNET9)]}
    timed = [r["step"] for r in results if r["case"] in layers and "step" in r]
    if len(timed) < len(layers):
        return None
    names = [name for name in timed[0] if name not in ("copy", "others")]
    return {name: round(sum(step[name]["median"] for step in timed), 1) for name in names}


def line(result: dict[str, Any]) -> str:
    """A case in a line: our median, our speed against torch's operations, and our share of a copy's bandwidth."""
    if "refused" in result:
        return f"{result['case']:<40} refused: {result['refused']}"
    ours = {group: result[group]["nc"] for group in ("eager", "step", "forward")}
    parts = [f"{group} {one['median']:8.1f} µs ({one.get('speed', math.nan):5.2f}×)" for group, one in ours.items()]
    share = result["step"]["nc"].get("share")
    return f"{result['case']:<40} {'  '.join(parts)}" + (f"  {share:.0%} of a copy" if share else "")


def main(arguments: list[str] | None = None) -> int:
    flags = {"no-compile": "leave out torch.compile, which takes seconds a case"}
    options = timing_options(__doc__, arguments, seconds=1.0, flags=flags)
    device, end = options.device, time.monotonic() + 60 * options.minutes
    limits = f"--seconds {options.seconds:g} --minutes {options.minutes:g}"
    command = f"python -m bench.batch_norm_times --device {device} {limits}"
    command += " --no-compile" if options.no_compile else ""
    record = Record(options.out / f"norm-{device}.json", command, device, options.commit)
    record.data |= {"tolerance": TOLERANCE, "baseline": BASELINE, "cases": [], "left_out": []}
    copy = Yardstick("cuda", 0) if device == "cuda" else None
    todo = [case for case in cases(device) if options.only in str(case)]
    for n, case in enumerate(todo):
        if time.monotonic() > end:
            record.data["left_out"] = [str(c) for c in todo[n:]]
            break
        torch.compiler.reset()  # or a function that is compiled for many shapes gives up
        result: dict[str, Any] = {"case": str(case)}
        record.data["cases"].append(result)
        try:
            run(case, options.seconds, copy, result, record.save, compiled=not options.no_compile)
        except Exception as error:  # one case does not cost the others
            result["refused"] = first_line(error)
        record.data["resnet9"] = whole_network(record.data["cases"], device)
        record.save()
        print(line(result), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    try:
        record.data["cross_entropy"] = cross_entropy(device, options.seconds / 2)
    except Exception as error:
        record.data["cross_entropy"] = {"refused": first_line(error)}
    record.save()
    if sums := record.data.get("resnet9"):
        print("ResNet9, all layers: " + ", ".join(f"{name} {us:.0f} µs" for name, us in sums.items()))
    results = (*record.data["cases"], record.data["cross_entropy"])
    return 1 if any("refused" in result for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
