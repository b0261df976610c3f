"""Which block, chunk and number of warps suit the update kernel: measured on this GPU, recorded in bench/results.

python -m bench.tune_update --minutes 3

The kernel works in place, so that the library never tunes it while it is used: its constants are set in
kernels/update/gpu.py, from what this prints. Every setting first proves that it computes the same bits.
"""

import math
import time
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.optim_cases import RULES, Case, Parameters
from bench.record import Record, first_line, recording
from bench.timing import Step, Yardstick, captured, gpu, interleaved

#: (BLOCK, WARPS) × CHUNK. BLOCK is doubled for bfloat16 parameters, as the library does.
BLOCKS = [(512, 4), (1024, 4), (1024, 8), (256, 2), (512, 2), (2048, 8), (2048, 4)]
CHUNKS = [4096, 8192, 2048, 16384]
CASES = [
    (rule, shapes, dtype) for shapes in ("resnet9", "100M") for rule in ("adam", "sgd") for dtype in ("fp32", "bf16")
]
STEPS = 10  # in a CUDA graph

Setting = tuple[int, int, int]  # BLOCK, CHUNK, WARPS


def settings() -> list[Setting]:
    """All that are tried, the library's own first."""
    from ncollapse.kernels.update.gpu import BLOCK, CHUNK, WARPS

    own = (BLOCK, CHUNK, WARPS)
    others = [(block, chunk, warps) for chunk, (block, warps) in product(CHUNKS, BLOCKS)]
    return [own, *(s for s in others if s != own)]


class Trial:
    """Steps of one rule over one parameter list, with any setting, over the same memory."""

    def __init__(self, rule: str, shapes: str, dtype: str) -> None:
        case = Case(rule, shapes, (), dtype)
        self.name, self.rule, self.parameters = str(case), RULES[rule], Parameters(case, "cuda")
        self.parameters.new_grads()
        self.params = self.parameters.fresh()
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.bytes = 0

    def step_with(self, setting: Setting) -> tuple[Step, list[Tensor]]:
        """A CUDA graph of steps with these constants, and the parameters after two steps from the start."""
        from ncollapse.kernels.update import gpu as kernel

        with torch.no_grad():
            for param, start in zip(self.params, self.parameters.start, strict=True):
                param.copy_(start)
            for tensor in (t for state in self.state.values() for t in state.values()):
                tensor.zero_()
        kernel.BLOCK, kernel.CHUNK, kernel.WARPS = setting
        optimizer = self.rule.ours(self.params, **self.rule.numbers)
        for param, state in self.state.items():
            optimizer.state[param].update(state)
        for _ in range(2):
            optimizer.step()
        after = [p.detach().clone() for p in self.params]
        self.state = {p: dict(optimizer.state[p]) for p in self.params}
        states = [t for state in self.state.values() for t in state.values() if t.dim()]
        self.bytes = sum(3 * p.nbytes for p in self.params) + sum(2 * t.nbytes for t in states)
        return captured(optimizer.step, STEPS), after


def tune(trial: Trial, tried: list[Setting], seconds: float, end: float, yardstick: Yardstick) -> dict[str, Any]:
    """Time every setting that is right, in turns."""
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    expected: list[Tensor] = []
    for setting in tried:
        if steps and time.monotonic() > end:
            failed[str(setting)] = "out of time"
            continue
        try:
            step, after = trial.step_with(setting)
        except Exception as error:  # too many registers or too large a block for this GPU: the next
            failed[str(setting)] = first_line(error)
            continue
        expected = expected or after
        if not all(torch.equal(a, b) for a, b in zip(after, expected, strict=True)):
            failed[str(setting)] = "computes something else"
            continue
        steps[str(setting)] = step
    steps["copy"] = captured(yardstick.step, STEPS)
    timings, _ = interleaved(steps, gpu, seconds, STEPS)
    copy = yardstick.bytes / timings.pop("copy").median / 1e3
    rows = []
    for setting in tried:
        if timing := timings.get(str(setting)):
            rate = trial.bytes / timing.median / 1e3
            block, chunk, warps = setting
            rows.append(
                {"block": block, "chunk": chunk, "warps": warps, **timing.record()}
                | {"gb_per_s": round(rate, 1), "share_of_copy": round(rate / copy, 3)}
            )
    return {"case": trial.name, "copy_gb_per_s": round(copy, 1), "failed": failed, "settings": rows}


def best_over_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings measured in every case, by the geometric mean of their time over the library's own setting's."""
    ratios: dict[tuple[int, ...], list[float]] = {}
    for case in cases:
        own = case["settings"][0]["median"]
        for row in case["settings"]:
            ratios.setdefault((row["block"], row["chunk"], row["warps"]), []).append(row["median"] / own)
    means = [
        (math.exp(sum(map(math.log, r)) / len(r)), setting) for setting, r in ratios.items() if len(r) == len(cases)
    ]
    return [{"block": b, "chunk": c, "warps": w, "time": round(mean, 3)} for mean, (b, c, w) in sorted(means)]


def main(arguments: list[str] | None = None) -> int:
    parser = recording(__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="what is timed by then is recorded")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune_update: there is no CUDA GPU here")
        return 1
    end = time.monotonic() + 60 * options.minutes
    command = f"python -m bench.tune_update --minutes {options.minutes:g}"
    record = Record(options.out / "update-tuning.json", command, "cuda", options.commit)
    tried, yardstick = settings(), Yardstick("cuda", 0)
    record.data |= {"own": dict(zip(("block", "chunk", "warps"), tried[0], strict=True)), "cases": []}
    for k, names in enumerate(CASES):
        left = end - time.monotonic()
        if left < 5:
            break
        share = left / (len(CASES) - k)
        case = tune(Trial(*names), tried, min(5.0, share / 4), time.monotonic() + share * 3 / 4, yardstick)
        record.data["cases"].append(case)
        record.data["best"] = best_over_all(record.data["cases"])
        record.save()
        torch.cuda.empty_cache()
        own, best = case["settings"][0], min(case["settings"], key=lambda row: row["median"])
        print(
            f"{case['case']:<20} own {own['median']:8.1f} µs, {own['share_of_copy']:.0%} of a copy;  best "
            f"{best['block']}/{best['chunk']}/{best['warps']} {best['median']:8.1f} µs, {best['share_of_copy']:.0%}",
            flush=True,
        )
    for row in record.data.get("best", [])[:5]:
        print(f"BLOCK {row['block']:5} CHUNK {row['chunk']:5} WARPS {row['warps']}: {row['time']:.3f} of own time")
    return 0 if record.data["cases"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
