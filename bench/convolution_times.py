"""Convolutions of maps of few pixels by our kernels and by cuDNN: the values, and the gradients of the maps, on a GPU.

python -m bench.convolution_times --device cuda      records bench/results/convolution-cuda.json

Every case first checks both against float32's convolution of the same numbers, then they take turns in CUDA graphs of
ten; nothing is asserted of time. Recorded are microseconds, and `difference`, ‖difference‖/‖value‖. "nc, parts alone"
is the first of our two kernels, without the sum of the parts.

The cases: the two layers of ResNet9 and the last of VGG9 that are of 3 × 3 pixels; half as many images, and channels;
maps of 4 × 4 and of 7 × 7 pixels, which the trainer leaves to cuDNN. What is not faster is to be deleted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.record import Record, first_line, timing_options
from bench.timing import Step, captured, compared, gpu
from ncollapse.kernels.convolution import small_convolution, small_convolution_input_grad
from ncollapse.kernels.convolution.reference import (
    small_convolution_input_grad_reference,
    small_convolution_reference,
)
from ncollapse.train.networks.precision import arithmetic

#: Of `difference`: a value is rounded to bfloat16, by up to 2⁻⁹ of itself.
TOLERANCE = 4e-3
GRAPH_STEPS = 10
BASELINE, PARTS = "cuDNN", "nc, parts alone"
WAYS = {
    "values": (small_convolution, small_convolution_reference),
    "gradient": (small_convolution_input_grad, small_convolution_input_grad_reference),
}


@dataclass(frozen=True)
class Case:
    """Maps `[samples, channels, size, size]`, and filters that keep the number of channels, or change it."""

    samples: int = 128
    inputs: int = 512
    outputs: int = 512
    size: int = 3

    def __str__(self) -> str:
        return f"[{self.samples}, {self.inputs}, {self.size}, {self.size}] to {self.outputs} channels"

    def tensors(self, direction: str) -> tuple[Tensor, Tensor]:
        """Maps, or a gradient of the result, and weights."""
        channels = self.inputs if direction == "values" else self.outputs
        shapes = (self.samples, channels, self.size, self.size), (self.outputs, self.inputs, 3, 3)
        torch.manual_seed(0)
        x, weight = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
            for shape in shapes
        )
        return x, weight / (3 * channels**0.5)


#: The most telling first: time may run out.
CASES = (
    Case(), Case(inputs=256), Case(samples=64), Case(samples=256), Case(inputs=256, outputs=256), Case(size=4),
    Case(size=2), Case(inputs=256, size=7),
)  # fmt: skip


class NoLaunch:
    """In place of a kernel: nothing is launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


def run(case: Case, direction: str, seconds: float) -> dict[str, Any]:
    """Check and time a case."""
    from ncollapse.kernels.convolution import gpu_kernels

    x, weight = case.tensors(direction)
    ours, cudnns = WAYS[direction]
    exact = cudnns(x.float(), weight.float())
    steps: dict[str, Step] = {"nc": lambda: ours(x, weight), BASELINE: lambda: cudnns(x, weight)}
    apart = {name: float((step().float() - exact).norm() / exact.norm()) for name, step in steps.items()}
    assert apart["nc"] <= TOLERANCE, f"nc is {apart['nc']:.1e} from float32"
    replays = {name: captured(step, GRAPH_STEPS) for name, step in steps.items()}
    with mock.patch.object(gpu_kernels, "add_parts_kernel", NoLaunch()):
        replays[PARTS] = captured(steps["nc"], GRAPH_STEPS)
    timed, _ = compared(replays, gpu, seconds, BASELINE, GRAPH_STEPS)
    return {"difference": {name: float(f"{value:.1e}") for name, value in apart.items()}, **timed}


def main(arguments: list[str] | None = None) -> int:
    options = timing_options(__doc__, arguments, seconds=0.5)
    if options.device != "cuda":
        print("convolution_times: --device cuda is needed; on a CPU these convolutions are torch's own")
        return 1
    end = time.monotonic() + 60 * options.minutes
    limits = f"--seconds {options.seconds:g} --minutes {options.minutes:g}"
    command = f"python -m bench.convolution_times --device cuda {limits}"
    record = Record(options.out / "convolution-cuda.json", command, "cuda", options.commit)
    record.data |= {"tolerance": TOLERANCE, "baseline": BASELINE, "cases": [], "left_out": []}
    refused = 0
    for case in CASES:
        for direction in WAYS:
            name = f"{case}, {direction}"
            if options.only not in name:
                continue
            if time.monotonic() > end:
                record.data["left_out"].append(name)
                continue
            result: dict[str, Any] = {"case": name}
            try:
                with arithmetic("bf16"):  # cuDNN as the trainer has it
                    result |= run(case, direction, options.seconds)
                told = ", ".join(f"{way} {result[way]['median']:.1f} µs" for way in ("nc", PARTS, BASELINE))
            except Exception as error:  # one case does not cost the others
                result["refused"] = told = first_line(error)
                refused += 1
            print(f"{name:<50} {told}", flush=True)
            record.data["cases"].append(result)
            record.save()
    record.save()
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
