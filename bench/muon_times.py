"""A Muon step beside SGD's: Newton–Schulz by our kernels, by cuBLAS in bfloat16, and in float32.

python -m bench.muon_times --device cuda      records bench/results/muon-cuda.json

Of the parameters of ResNet9 and VGG9, convolutions in channels-last memory as the trainer has them. On a GPU a step is
a replayed CUDA graph by the GPU's clock; on a CPU, where all of Muon's are the same, wall time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.record import Record, first_line, timing_options
from bench.timing import Step, captured, compared, gpu, wall_cpu
from ncollapse import optim
from ncollapse.optim import muon
from ncollapse.train.networks.models import build

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
MODELS = ("resnet9", "vgg9")


def _muon(most_side: int, **settings: Any) -> Make:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        muon.MOST_SIDE = most_side
        return optim.Muon(params, lr=1e-3, stacked=True, **settings)

    return make


CANDIDATES: dict[str, Make] = {
    "SGD": lambda params: optim.SGD(params, lr=1e-3, momentum=0.9),
    "Muon, kernels": _muon(muon.MOST_SIDE),
    "Muon, cuBLAS": _muon(0),
    "Muon, float32": _muon(0, ns_precision="full"),
}


def parameters(model: str, device: str) -> list[Tensor]:
    """The parameters of one run, `[1, …]`, with gradients."""
    found: list[Tensor] = []
    for p in build(model, 1, 28, 10, 0).parameters():
        value = p.detach().to(device)[None].clone()
        if value.dim() == 5:
            value = value.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        found.append(nn.Parameter(value))
        found[-1].grad = torch.empty_like(value).normal_()
    return found


def main(arguments: list[str] | None = None) -> int:
    options = timing_options(__doc__, arguments, seconds=2.0)
    muon.FENCES = (0,)  # timed with any Triton
    on_gpu, most_side = options.device == "cuda", muon.MOST_SIDE
    record = Record(
        options.out / f"muon-{options.device}.json", "python -m bench.muon_times", options.device, options.commit
    )
    record.data["cases"] = cases = {}
    for model in MODELS:
        if options.only not in model:
            continue
        steps: dict[str, Step] = {}
        for name, make in CANDIDATES.items():
            try:
                steps[name] = make(parameters(model, options.device)).step
                if on_gpu:
                    steps[name] = captured(steps[name])
            except (RuntimeError, ValueError) as error:
                cases.setdefault(model, {})[name] = first_line(error)
                steps.pop(name, None)
            finally:
                muon.MOST_SIDE = most_side
        cases[model] = cases.get(model, {}) | compared(steps, gpu if on_gpu else wall_cpu, options.seconds, "SGD")[0]
        record.save()
        for name, timing in cases[model].items():
            if isinstance(timing, dict):
                print(f"{model:8} {name:14} {timing['median']:10.1f} µs a step", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
