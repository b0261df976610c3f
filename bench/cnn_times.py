"""A training step of ResNet9 and VGG9 as the trainer takes it, beside the loops that a user would write.

python -m bench.cnn_times --device cuda      records bench/results/cnn-cuda.json

One run, batches of 128 images of Fashion-MNIST's size (random: speed does not depend on them), SGD with momentum.
"nc" is the trainer's step in bfloat16: on a GPU one CUDA graph. Beside it "nc, fp32" and "nc, tf32", and with torch's
operations in place of ours "nc, torch's batch norm" and "nc, cuDNN's first layer"; `bench.step_times` has more of that.
"plain" is what most people write: a DataLoader with two workers over PIL images, torch.optim, one operation after the
other, float32. "eager" has the data on the device, channels-last, autocast to bfloat16 and torch's fused SGD;
"compiled" the same under torch.compile(mode="max-autotune"). First the trainer's step and the eager one are shown to
change the weights alike in float32: where they do not, that stands in `failed`, and all are timed nevertheless.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset
from torch.utils.flop_counter import FlopCounterMode

from bench import timing
from bench.record import Record, first_line, timing_options
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.networks import stacked_layers
from ncollapse.train.networks.models import Classifier, build
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.lane import Lane, TrainingSamples
from ncollapse.train.training.stack import Stack
from ncollapse.train.training.step import Step
from ncollapse.train.training.updates import make_updates

BATCH = 128
#: bfloat16 products a second with float32 sums, dense, of the vendor's data sheet, by the device's name.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def images(samples: int, device: torch.device) -> tuple[Dataset, Tensor]:
    """Random ones, normalised on the device, and as bytes."""
    raw = torch.randint(256, (samples, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = ((raw.float() / 255 - 0.286) / 0.353).to(device)
    y = (torch.arange(samples) % 10).to(device)
    return Dataset(x, y, x[:0], y[:0], tuple("0123456789"), "random"), raw


def batches(samples: int, device: torch.device) -> Iterator[Tensor]:
    """The indices of one full batch after the other, for ever."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(samples, generator=generator).to(device).split(BATCH)[: samples // BATCH]


class Written(MapDataset[tuple[Tensor, int]]):
    """What torchvision's MNIST and the usual transforms do with an image."""

    def __init__(self, raw: Tensor) -> None:
        from torchvision import transforms

        self._raw = raw[:, 0]
        self._transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.286,), (0.353,))])

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self._transform(Image.fromarray(self._raw[i].numpy())), i % 10


class Case:
    """The candidates for one model."""

    def __init__(self, model: str, width: int, samples: int, device: torch.device) -> None:
        self.model, self.width, self.device = model, width, device
        self.data, self._raw = images(samples, device)

    def built(self) -> Classifier:
        return build(self.model, 1, 28, 10, 0, self.width)

    def ours(self, precision: str) -> tuple[Step, Stack]:
        """The trainer's step."""
        run = RunConfig(model=self.model, precision=precision, lr=0.01)  # type: ignore[arg-type]
        stack = Stack.of([self.built()], self.device)
        return Step([Lane(stack, make_updates(stack, [run], Plugins()), TrainingSamples(self.data))]), stack

    def stepping(self, precision: str, around: Callable[[], Any] = contextlib.nullcontext) -> timing.Step:
        """Steps of the trainer, set up (and, on a GPU, captured) in a context."""
        step, _ = self.ours(precision)
        source = batches(len(self.data.train_y), self.device)
        with arithmetic(precision), around():
            for _ in range(5):
                step(next(source))

        def one() -> None:
            with arithmetic(precision), around():
                step(next(source))

        return one

    def plain(self) -> timing.Step:
        model = self.built().to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        pinned = self.device.type == "cuda"
        loader = DataLoader(
            Written(self._raw), BATCH, shuffle=True, num_workers=2, pin_memory=pinned, drop_last=True,
            persistent_workers=True,
        )  # fmt: skip
        source = itertools.chain.from_iterable(itertools.repeat(loader))

        def step() -> None:
            x, y = next(source)
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(self.device)), y.to(self.device)).backward()
            optimizer.step()

        return step

    def eager(
        self, *, compiled: bool = False, half: bool = True, dtype: torch.dtype = torch.float32
    ) -> tuple[timing.Step, Classifier]:
        model = self.built().to(self.device, dtype, memory_format=torch.channels_last)
        run = torch.compile(model, mode="max-autotune") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
        source = batches(len(self.data.train_y), self.device)

        def step() -> None:
            batch = next(source)
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                loss = F.cross_entropy(run(self.data.train_x[batch].to(dtype)), self.data.train_y[batch])
            loss.backward()
            optimizer.step()

        return step, model

    def check(self) -> float:
        """Distance of the trainer's step from the eager one in float32, relative to what they change.

        Raises:
            AssertionError: ours is further from float64 than rounding takes the eager one, and than 1e-3.
        """
        with arithmetic("fp32"):
            mine, stack = self.ours("fp32")
            mine(next(batches(len(self.data.train_y), self.device)))
            changed = {}
            for dtype in (torch.float32, torch.float64):
                step, model = self.eager(half=False, dtype=dtype)
                step()
                changed[dtype] = self._change(model.state_dict())
        ours, eager, exact = self._change(stack.state_dict(0)), changed[torch.float32], changed[torch.float64]
        distance, rounding = (float((one - exact).norm() / exact.norm()) for one in (ours, eager))
        assert distance < max(1e-3, 2 * rounding), f"{distance:.1e} from float64, the eager step {rounding:.1e}"
        return float((ours - eager).norm() / exact.norm())

    def _change(self, state: dict[str, Tensor]) -> Tensor:
        """The change of all weights since their start, as one float64 vector.

        One step, and all weights together: rounding grows 30 times with each step that follows, also between float32
        and float64 of the same loop, and what a bias learns is little more than that.
        """
        start = {name: value.detach().double() for name, value in self.built().named_parameters()}
        return torch.cat([(state[name].cpu().double() - value).flatten() for name, value in start.items()])

    def flops(self) -> int:
        """Of forward and backward, by torch's counter; one multiplication and one sum are two."""
        x, y = self.data.train_x[:BATCH], self.data.train_y[:BATCH]
        model = self.built().to(self.device)
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(x), y).backward()
        return counter.get_total_flops()

    def profile(self) -> list[dict[str, Any]]:
        """Microseconds of the device in a step that is no graph, by operation, the dearest first."""
        step, _ = self.ours("bf16")
        source, on_gpu = batches(len(self.data.train_y), self.device), self.device.type == "cuda"
        count = 10 if on_gpu else 1
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
        with arithmetic("bf16"):
            for _ in range(5 if on_gpu else 1):
                step._work(next(source), None)
            with torch.profiler.profile(activities=kinds) as profiler:
                for _ in range(count):
                    step._work(next(source), None)
                (torch.cuda.synchronize if on_gpu else torch.cpu.synchronize)()
        taken = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = [
            {"operation": event.key, "us": round(getattr(event, taken) / count, 2), "calls": event.count / count}
            for event in profiler.key_averages()
            if getattr(event, taken) > 0
        ]
        return sorted(events, key=lambda event: -event["us"])[:40]


def torchs_batch_norm() -> Any:
    """The trainer with torch's operations in place of the fused one."""

    def unfused(
        x: Tensor, *vectors: Tensor, train: bool, momentum: float, eps: float, pool: bool, residual: Any
    ) -> Any:
        return batch_norm_relu_reference(x, *vectors, train, momentum, eps, pool, residual)

    return mock.patch.object(stacked_layers, "batch_norm_relu", unfused)


def cudnns_first_layer() -> Any:
    """The trainer with a convolution where it has a matrix product."""
    return mock.patch.object(stacked_layers, "is_small_filter", _none)


def _none(weight: Tensor) -> bool:
    """A function, since a mock would keep the tensors that it is called with."""
    return False


def measured(case: Case, seconds: float, end: float, save: Callable[[dict[str, Any]], None], *, compiled: bool) -> None:
    """Fill the record of a model, and save it after each candidate.

    Args:
        end: no candidate is begun after that time.
        compiled: also time torch.compile, which takes minutes.
    """
    on_gpu = case.device.type == "cuda"
    makers: dict[str, Callable[[], timing.Step]] = {
        "nc": lambda: case.stepping("bf16"),
        "nc, torch's batch norm": lambda: case.stepping("bf16", torchs_batch_norm),
        "nc, cuDNN's first layer": lambda: case.stepping("bf16", cudnns_first_layer),
        "nc, tf32": lambda: case.stepping("tf32"),
        "nc, fp32": lambda: case.stepping("fp32"),
        "eager": lambda: case.eager()[0],
        "plain": case.plain,
    }
    if compiled:
        makers["compiled"] = lambda: case.eager(compiled=True)[0]
    record: dict[str, Any] = {"batch": BATCH, "gflop_per_step": round(case.flops() / 1e9, 2)}
    try:
        record["difference"] = float(f"{case.check():.1e}")
    except AssertionError as error:
        record["failed"] = {"check": first_line(error)}
    record["profile"] = case.profile()
    save(record)
    ours: timing.Step | None = None
    for name, maker in makers.items():  # each beside ours, and saved at once: time may run out
        if time.monotonic() > end:
            record.setdefault("left_out", []).append(name)
            continue
        try:
            step = maker()
            for _ in range(3):
                step()
        except Exception as error:  # a candidate that does not run is recorded, the others are timed
            record.setdefault("failed", {})[name] = first_line(error)
            save(record)
            continue
        ours = step if name == "nc" else ours
        timed = {"nc": ours, name: step} if ours is not None else {name: step}
        timings, _ = timing.interleaved(timed, timing.wall_cuda if on_gpu else timing.wall_cpu, seconds)
        record[name] = timings[name].record() | {"images_per_second": round(BATCH * 1e6 / timings[name].median)}
        if name != "nc" and ours is not None:
            record[name]["nc_is_faster_by"] = round(timings[name].median / timings["nc"].median, 3)
        if "nc" in record:
            record.update(floor(case, record))
        save(record)


def floor(case: Case, record: dict[str, Any]) -> dict[str, Any]:
    """What arithmetic alone would take at the data sheet's peak, and what share of it the convolutions reach."""
    name = torch.cuda.get_device_name() if case.device.type == "cuda" else ""
    peak = next((value for key, value in PEAK.items() if key in name), None)
    if peak is None:
        return {}
    flop = record["gflop_per_step"] * 1e9
    convolutions = sum(each["us"] for each in record["profile"] if "convolution" in each["operation"])
    return {
        "floor_us": round(flop / peak * 1e6, 1),
        "share_of_peak": round(flop / peak * 1e6 / record["nc"]["median"], 3),
        "convolutions_us": round(convolutions, 1),
        "convolutions_share_of_peak": round(flop / peak * 1e6 / convolutions, 3) if convolutions else None,
    }


def main(arguments: list[str] | None = None) -> int:
    flags = {"compiled": "also time torch.compile, which takes minutes"}
    options = timing_options(__doc__, arguments, seconds=20.0, flags=flags)
    device = torch.device(options.device)
    # On a CPU to see that it works: a quarter of the width, few images.
    width, samples = (64, 60_000) if device.type == "cuda" else (16, 1280)
    limits = f"--seconds {options.seconds:g} --minutes {options.minutes:g}"
    command = f"python -m bench.cnn_times --device {options.device} {limits}"
    record = Record(options.out / f"cnn-{options.device}.json", command, options.device, options.commit)
    record.data |= {"width": width, "samples": samples, "models": {}}
    end = time.monotonic() + 60 * options.minutes
    models = [model for model in ("resnet9", "vgg9") if options.only in model]
    for left, model in zip(range(len(models), 0, -1), models, strict=True):
        # Each of the models that are left has its share of the time.
        last = time.monotonic() + (end - time.monotonic()) / left

        def save(one: dict[str, Any], model: str = model) -> None:
            record.data["models"][model] = one
            record.save()

        measured(Case(model, width, samples, device), options.seconds, last, save, compiled=options.compiled)
        one = record.data["models"][model]
        for name in [key for key, value in one.items() if isinstance(value, dict) and "median" in value]:
            faster = one[name].get("nc_is_faster_by", 1.0)
            print(f"{model:8} {name:24} {one[name]['median'] / 1e3:9.3f} ms  nc is faster by {faster:7.2f}", flush=True)
        for key in ("floor_us", "share_of_peak", "convolutions_share_of_peak", "failed", "left_out"):
            if key in one:
                print(f"{model:8} {key}: {one[key]}", file=sys.stderr, flush=True)
    return 1 if any("failed" in one for one in record.data["models"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
