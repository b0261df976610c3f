"""Times of a training step of a network, of its batch norm, and of what was tried for it; what kernels compile to."""

from collections.abc import Iterator
from typing import Any

from bench.tables.markdown import device, duration, percent, read, significant, table
from ncollapse.formatting import DASH, number
from ncollapse.optimizer_table import row_of

STEPS = {
    "nc": "`--precision bf16`",
    "nc, torch's batch norm": "… with torch's batch norm, ReLU and pooling",
    "nc, cuDNN's first layer": "… with cuDNN's convolution as the first layer",
    "nc, cuDNN's trials": "… with cuDNN's deterministic algorithms chosen by the clock",
    "nc, any of cuDNN's trials": "… with any of cuDNN's algorithms chosen by the clock",
    "nc, tf32": "`--precision tf32`",
    "nc, fp32": "`--precision fp32`",
    "plain": "a plain loop: DataLoader with two workers, `torch.optim`, float32",
    "eager": "an eager one: data on the device, channels-last, bfloat16, fused SGD",
}
CNN = ("cnn-cuda.json", "cnn-cuda-h200.json")


def step() -> str:
    """A step of ResNet9 on GPUs."""
    records = [read(name) for name in CNN]
    models = [record["models"]["resnet9"] for record in records]
    rows = []
    for name, told in STEPS.items():
        cells = [told]
        for model in models:
            found = model.get(name)
            cells += (
                [f"{found['median'] / 1e3:.2f}", f"{significant(found['images_per_second'])}"]
                if found
                else [DASH, DASH]
            )
        rows.append(cells)
    floors = [(model["floor_us"], model["batch"] / model["floor_us"] * 1e6) for model in models]
    rows.append(
        [
            "arithmetic alone, at the peak of the data sheet",
            *(c for us, rate in floors for c in (f"{us / 1e3:.2f}", significant(rate))),
        ]
    )
    titles = [title for record in records for title in (f"{device(record)}, ms", "images/s")]
    return table(["a step of ResNet9, 128 images of 28 × 28", *titles], rows)


def batch_norm() -> str:
    """Batch norm with ReLU on a GPU."""
    record = read("norm-cuda.json")
    rows = []
    for case in record["cases"]:
        for name, told in {"nc": "ncollapse", "torch": "torch", "torch compiled": "torch compiled"}.items():
            step, forward = case["step"][name], case["forward"][name]
            cells = [
                duration(step["median"]),
                percent(step["share"]),
                duration(forward["median"]),
                percent(forward["share"]),
            ]
            rows.append([told, *cells, duration(case["eager"][name]["median"])])
    titles = ["forward and backward, replayed", "of a copy's GB/s", "forward, replayed", "of a copy's GB/s"]
    return table([f"{record['cases'][0]['case']}, {device(record)}", *titles, "both, called from Python"], rows)


def prototypes() -> str:
    """What an H200 said of each idea for a step."""
    rows = [
        [told, duration(before), duration(after), f"{round(100 * (after / before - 1)):+d} %"]
        for told, before, after in _ideas()
    ]
    return table(["idea", "before", "prototype", "change"], rows)


def _ideas() -> Iterator[tuple[str, float, float]]:
    record = read("prototypes-cuda.json")
    told = {
        "R=2": "two runs as branches of one graph, a run's step",
        "R=3": "three runs",
        "R=4": "four runs",
        "beside": "gradients of the weights on a branch of their own",
        "R=2 beside": "two runs, each with that branch",
        "all of cuDNN's plans": "the fastest of all of cuDNN's plans",
    }
    for model, name in (("resnet9", "ResNet9"), ("vgg9", "VGG9")):
        for key, words in told.items():
            after, before = record["step_us_per_run"][f"{model} {key}"]
            yield f"{name}: {words}", before, after
        found = record["pipelined_moments_and_sums_us"][f"{model}, pipelined moments and sums"]
        yield f"{name}: batch norm's moments and sums as pipelined loops", found["base"], found["one"]
    layers = record["batch_norm_us"]
    small = {name for name, layer in layers.items() if "apply" in layer and any("whole" in key for key in layer)}
    large = [layer for name, layer in layers.items() if name not in small]
    yield (
        f"batch norm's moments merged by the last program, 4 warps, {len(large)} larger layers",
        sum(layer["moments"] for layer in large),
        sum(layer["moments, merged 2048 128 s3 w4"][0] for layer in large),
    )
    for way, words, before in (
        ("forward", "forward", ("moments", "apply")),
        ("backward", "backward", ("backward",)),
    ):
        found = [layers[name] for name in sorted(small)]
        after = [layer[f"whole {way}, 8 columns w8"] for layer in found]
        yield (
            f"batch norm of the {len(small)} layers of 3 × 3 maps in one program, {words}",
            sum(layer[key] for layer in found for key in before),
            sum(each[0] if isinstance(each, list) else each for each in after),
        )
    convolutions = record["convolutions_us"]
    told = {
        "fwd": "forward, with batch norm's sums",
        "dgrad": "gradient of the input",
        "wgrad": "gradient of the weights",
    }
    large = [found for name, found in convolutions.items() if name != "L6"]
    for way, words in told.items():
        ours = sum(_best(found, "fwd+stats" if way == "fwd" else way) for found in large)
        yield f"own convolutions of {len(large)} large layers, {words}", sum(x[f"cudnn {way}"] for x in large), ours
    found = record["small_convolutions_us"]["L6"]
    for way in ("fwd", "dgrad"):
        words = f"own convolution of a 3 × 3 layer, {told[way].partition(',')[0]}"
        yield words, found[f"cudnn {way}"], _best(found, way)


def _best(found: dict[str, Any], way: str) -> float:
    """The fastest configuration whose error, where it was recorded, is no more than bfloat16's rounding."""
    return min(v[0] for k, v in found.items() if k.startswith(f"{way} ") and (v[1] is None or v[1] <= 2e-3))


def precision() -> str:
    """Final metrics of runs in float32 and in bfloat16."""
    metrics = ("nc0", "nc1", "nc2", "nc3")
    titles = ["CNN on digits", *(title for name in metrics for title in (f"{name.upper()}, fp32", "bf16"))]
    rows = [
        [row_of(row["optimizer"]).label, *(number(row[how][m]["median"]) for m in metrics for how in ("fp32", "bf16"))]
        for row in read("precision-cpu.json")["rows"]
    ]
    return table(titles, rows)


def kernel_code() -> str:
    """What the Triton kernels compile to, for one architecture."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in read("kernel-code.json"):
        if row["arch"] == "sm_90":
            variants.setdefault(row["kernel"], []).append(row)
    rows = []
    for kernel, found in variants.items():

        def span(name: str, found: list[dict[str, Any]] = found) -> str:
            low, high = min(row[name] for row in found), max(row[name] for row in found)
            return str(low) if low == high else f"{low} to {high}"

        names = ("registers", "spilled_bytes", "loads_128", "stores_128", "asynchronous_128", "matrix_products")
        rows.append([kernel, str(len(found)), *map(span, names)])
    titles = ["kernel, for sm_90", "variants", "registers", "spilled bytes", "128-bit loads", "128-bit stores"]
    return table([*titles, "asynchronous copies", "matrix products"], rows)
