"""The ways in which the batch-norm kernels sum: all rows in one program; parts that the last, or a kernel, merges.

tests/kernels/test_batch_norm_kernels.py tests what holds whichever way the size of the maps decides on.
"""

import math

import pytest
import torch
from torch import Tensor

import interpreter
from batch_norm_cases import (
    EPS,
    KINDS,
    MOMENTUM,
    WAYS,
    Case,
    Result,
    case,
    check,
    choose,
    close,
    forward,
    gradient,
    kernels,
    poisoned,
    run,
    same_bits,
)
from devices import only
from ncollapse.kernels.batch_norm import counters, gpu, op
from ncollapse.kernels.batch_norm.op import fused, moments_op
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

# (With pooling no map is small: the default decides on parts.)
WAYS_OF_KINDS = [(way, kind) for way in WAYS for kind in KINDS if (way, kind) != ("small", "pool")]
IN_PARTS = WAYS[1:]


def checked(given: Case, grad: Tensor, channels: Tensor | None = None) -> Result:
    """Run the kernels and compare with the reference, at these channels; return what the kernels computed."""
    with poisoned():
        ours = run(kernels, given, grad)
    check(ours, given, grad, channels)
    return ours


@pytest.mark.parametrize(("way", "kind"), WAYS_OF_KINDS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 70, 2, 5), torch.float32), ((2, 1, 2, 3), torch.float32), ((2, 3, 7, 7), torch.bfloat16)], ids=str,
)  # fmt: skip
def test_every_way(
    device: torch.device, shape: tuple[int, int, int, int], way: str, kind: str, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    choose(way, monkeypatch)
    monkeypatch.setattr(gpu, "SUMMED", 512)
    given = case(shape, dtype, kind, device=device)
    checked(given, gradient(given))


@pytest.mark.parametrize("rows", [2, 255, 256, 257])
def test_small_maps_of_any_size(device: torch.device, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("small", monkeypatch)
    given = case((rows, 9, 1, 1), kind="residual", mean=20.0, device=device)
    checked(given, gradient(given))


@pytest.mark.parametrize("way", WAYS)
def test_one_element(device: torch.device, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is its own mean; the variance is 0, and unbiased 0/0. (`batch_norm_relu` leaves it to torch, which refuses.)"""
    choose(way, monkeypatch)
    mean, var = torch.ones(1, device=device), torch.ones(1, device=device)
    x = torch.full((1, 1, 1, 1), 3.0, device=device)
    weight, bias = torch.full((1,), 2.0, device=device), torch.full((1,), 0.5, device=device)
    with interpreter.quiet(), poisoned():
        y = fused(x, weight, bias, mean, var, True, MOMENTUM, EPS, False, None)
    assert y.item() == 0.5
    assert mean.item() == pytest.approx(1.2)
    assert var.isnan().all()


@only("interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", IN_PARTS)
@pytest.mark.parametrize("programs", [2, 128])
def test_partial_sums(
    device: torch.device, programs: int, way: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part is shorter than the others, or than a tile; there are more parts than are added at once."""
    choose(way, monkeypatch, programs=programs)
    monkeypatch.setattr(gpu, "SUMMED", 16)
    monkeypatch.setattr(gpu, "WINDOWS", 16)
    monkeypatch.setattr(gpu, "ADDED_PARTS", 8)
    given = case((2, 3, 9, 5), kind=kind, mean=30.0, device=device)
    checked(given, gradient(given, 1e-4))


@pytest.mark.parametrize("way", WAYS)
def test_the_variance_is_accurate_far_from_zero(
    device: torch.device, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean 1,000, deviation 0.01: float32 has steps of 6e-5 there. The running statistics have the moments."""
    choose(way, monkeypatch)
    given = case((4, 9, 14, 14), mean=1e3, std=1e-2, device=device)
    with interpreter.quiet(), poisoned():
        fused(
            given.x, given.weight, given.bias, given.running_mean, given.running_var, True, 1.0, 0.0, False, None
        )  # fmt: skip
    exact = given.x.double()
    close("mean", given.running_mean, exact.mean((0, 2, 3)), rtol=3e-7, atol=0.0)
    close("variance", given.running_var, exact.var((0, 2, 3)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("way", "kind"), WAYS_OF_KINDS)
def test_a_non_finite_value_affects_its_channel_alone(
    device: torch.device, way: str, kind: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(way, monkeypatch)
    monkeypatch.setattr(gpu, "SUMMED", 64)
    given = case((2, 5, 6, 7), kind=kind, device=device)
    grad = gradient(given)
    given.x[-1, 3, 2, 4] = value
    ours = checked(given, grad, torch.arange(5, device=device) != 3)
    assert ours.y[:, 3].isnan().all()
    assert ours.x[:, 3].isnan().all()
    assert ours.weight[3].isnan()
    assert not ours.running_var[3].isfinite()
    theirs = run(batch_norm_relu_reference, given.copy(torch.float64), grad.double())
    close("bias", ours.bias, theirs.bias, rtol=1e-5, atol=1e-5)  # ReLU passes NaN on


@pytest.mark.parametrize("way", WAYS)
def test_values_whose_squares_are_too_large_for_float32(
    device: torch.device, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal, so that no deviation is: also where a part is missing."""
    choose(way, monkeypatch)
    given = case((4, 3, 16, 16), device=device)
    given.x.fill_(2.0**100)
    with interpreter.quiet(), poisoned():
        y = forward(kernels, given)
    close("y", y, given.bias.clamp(min=0).view(1, 3, 1, 1).expand_as(y), rtol=0.0, atol=0.0)
    close("running_mean", given.running_mean, torch.full((3,), 0.1 * 2.0**100), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("way", "kind"), list(zip(WAYS, ("residual", "pool", "plain"), strict=True)))
def test_stacked_runs_are_what_each_is_alone(
    device: torch.device, way: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit where the parts are the same, as here: the runs' channels lie side by side in the maps."""
    choose(way, monkeypatch)
    runs = [case((2, 64, 4, 4), torch.bfloat16, kind, mean=float(r), device=device) for r in range(2)]
    grads = [gradient(given) for given in runs]
    joined = {
        name: torch.cat([getattr(given, name) for given in runs], 1 if value.dim() == 4 else 0)
        for name, value in vars(runs[0]).items()
        if torch.is_tensor(value)
    }
    for name in ("x", "residual"):
        if name in joined:
            joined[name] = joined[name].contiguous(memory_format=torch.channels_last)
    together = run(kernels, Case(**joined, pool=kind == "pool"), torch.cat(grads, 1))
    for r, (given, grad) in enumerate(zip(runs, grads, strict=True)):
        for name, alone in vars(run(kernels, given, grad)).items():
            if alone is not None:
                own = getattr(together, name).tensor_split(2, 1 if alone.dim() == 4 else 0)[r]
                assert torch.equal(own, alone), name


@only("interpreter")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_whichever_program_is_last(
    device: torch.device, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose("last program", monkeypatch, programs=7)
    monkeypatch.setattr(gpu, "SUMMED", 64)
    monkeypatch.setattr(gpu, "WINDOWS", 64)
    given = case((2, 3, 12, 9), kind=kind, device=device)
    grad = gradient(given)
    first = run(kernels, given, grad)
    order: list[int] = []
    interpreter.run_backwards(monkeypatch, order)
    assert same_bits(run(kernels, given, grad), first)
    assert 6 in order
    assert order != sorted(order)


def test_each_launch_has_counters_of_its_own_which_end_at_zero(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what a launch that failed has left in its own harms no other."""
    choose("last program", monkeypatch)
    given: list[Tensor] = []

    def recorded(count: int, device: torch.device) -> Tensor:
        given.append(counters.zero_counters(count, device))
        return given[-1]

    monkeypatch.setattr(gpu, "zero_counters", recorded)
    some = case((2, 130, 6, 6), device=device)
    run(kernels, some, gradient(some))
    assert [len(g) for g in given] == [3, 3]
    assert given[0].data_ptr() != given[1].data_ptr()
    for g in given:
        assert g.tolist() == [0, 0, 0]
        g.fill_(1)
    checked(some, gradient(some))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A GPU whose memory is the CPU's; the last element says whether its stream is captured."""
    captured = [False]
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[-1])
    monkeypatch.setattr(counters, "_reserves", {})
    monkeypatch.setattr(counters, "_allocated", [])
    return captured


def test_no_two_captured_launches_share_counters(pretended: list[bool]) -> None:
    device = torch.device("cuda", 0)
    eager = [counters.zero_counters(3, device) for _ in range(2)]
    pretended.append(True)
    taken = [counters.zero_counters(count, device) for count in (1, 8, 383)]
    pretended.append(False)
    eager.append(counters.zero_counters(3, device))  # between two captures
    pretended.append(True)
    taken.append(counters.zero_counters(5, device))
    addresses = [range(t.data_ptr(), t.data_ptr() + 4 * len(t), 4) for t in (*eager, *taken)]
    assert len({address for each in addresses for address in each}) == sum(len(each) for each in addresses)
    (reserve,) = counters._allocated
    assert all(t.untyped_storage().data_ptr() == reserve.untyped_storage().data_ptr() for t in taken)
    assert not any(t.any() for t in taken)
    assert all((t.data_ptr() - reserve.data_ptr()) % 16 == 0 for t in taken)  # as all addresses that Triton gets


def test_a_reserve_is_replaced_in_time_and_stays_allocated(pretended: list[bool]) -> None:
    device = torch.device("cuda", 0)
    pretended.append(True)
    own = counters.zero_counters(2, device)  # nothing was reserved: the graph zeroes its own
    assert not counters._allocated
    for _ in range(3):
        pretended.append(False)
        counters.zero_counters(1, device)
        pretended.append(True)
        counters.zero_counters(counters.RESERVED // 2 + 1, device)
    too_many = counters.zero_counters(counters.RESERVED, device)
    assert len(counters._allocated) == 3
    reserved = {t.untyped_storage().data_ptr() for t in counters._allocated}
    assert len(reserved) == 3
    assert not reserved & {own.untyped_storage().data_ptr(), too_many.untyped_storage().data_ptr()}


@only("cuda")
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_and_branches_run_side_by_side(device: torch.device, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs of two branches each, replayed on two streams, give the bits of each branch alone, every time."""
    choose("last program", monkeypatch)
    given = [case((128, 64, 14, 14), torch.bfloat16, kind, mean=float(r), device=device) for r in range(4)]
    grads = [gradient(each) for each in given]
    for each in given:
        each.x.requires_grad_()
    alone = [run(kernels, each, grad) for each, grad in zip(given, grads, strict=True)]

    def step(r: int) -> tuple[Tensor, Tensor]:
        y = forward(kernels, given[r])
        return y.detach(), torch.autograd.grad(y, given[r].x, grads[r])[0]

    graphs, results = [], []
    for g in range(2):
        graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(2)]
        with torch.cuda.graph(graph):
            main = torch.cuda.current_stream()
            for r, stream in enumerate(streams):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    results.append(step(2 * g + r))
            for stream in streams:
                main.wait_stream(stream)
        graphs.append(graph)
    replaying = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for graph, stream in zip(graphs, replaying, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(5):
                    graph.replay()
        torch.cuda.synchronize()
        for (y, x_grad), expected in zip(results, alone, strict=True):
            assert torch.equal(y, expected.y)
            assert torch.equal(x_grad, expected.x)


@only("cuda")
def test_two_streams_run_side_by_side(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("last program", monkeypatch)
    given = [case((128, 64, 14, 14), mean=float(r), device=device) for r in range(2)]
    alone = [moments(each.x) for each in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for each, stream, found in zip(given, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(moments(each.x))
    torch.cuda.synchronize()
    for expected, found in zip(alone, results, strict=True):
        assert all(torch.equal(each, expected) for each in found)


@only("cuda")
@pytest.mark.parametrize(("way", "kind"), WAYS_OF_KINDS)
def test_dependent_launches_change_no_bit(
    device: torch.device, way: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel reads what the one before it writes, and follows it at once: called one by one, and in a graph."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("no kernel starts there before the one before it has ended")
    choose(way, monkeypatch)
    given = case((16, 64, 8, 8), torch.bfloat16, kind, device=device)
    leaves = [given.x.requires_grad_(), given.weight.requires_grad_(), given.bias.requires_grad_()]

    def layers() -> tuple[Tensor, ...]:
        y, running = given.x, (given.running_mean.clone(), given.running_var.clone())
        for _ in range(3):
            added = y if kind == "residual" else None
            y = forward(kernels, Case(y, given.weight, given.bias, *running, added, given.pool))
        return y.detach(), *running, *torch.autograd.grad(y, leaves, y.detach().cos())

    expected = layers()
    monkeypatch.setattr(gpu, "DEPENDENT", True)
    results, graph = [layers() for _ in range(20)], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for _ in range(20):
        graph.replay()
        results.append(tuple(each.clone() for each in captured))
    for found in results:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_launches_are_dependent_only_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    device, generations = torch.device("cuda", 0), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: generations[-1])
    options = {"num_warps": 4}
    assert not gpu.DEPENDENT  # unmeasured
    assert gpu._options(options, device) == {"num_warps": 4, "DEPENDENT": False}
    monkeypatch.setattr(gpu, "DEPENDENT", True)
    assert gpu._options(options, device) == {"num_warps": 4, "DEPENDENT": True, "launch_pdl": True}
    generations.append((8, 9))
    assert gpu._options(options, device) == {"num_warps": 4, "DEPENDENT": False}
    generations.append((9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu._options(options, device) == {"num_warps": 4, "DEPENDENT": False}
    assert options == {"num_warps": 4}


def test_options_are_those_that_triton_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For AMD's GPUs it refuses what it does not know."""
    compiler = pytest.importorskip("triton.backends.amd.compiler")
    options = gpu.OPTIONS, gpu.MERGED_OPTIONS, gpu.FINISH_OPTIONS, gpu.SMALL_OPTIONS
    assert all(gpu._allowed(each) == each for each in options)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(gpu, "DEPENDENT", True)
    for each in options:
        allowed = gpu._options(each, torch.device("cuda", 0))
        assert not allowed.pop("DEPENDENT")
        assert allowed.keys() <= compiler.HIPOptions.__dataclass_fields__.keys()
        assert allowed["num_warps"] == each["num_warps"]


def moments(x: Tensor) -> Tensor:
    running = x.new_zeros(2, x.shape[1], dtype=torch.float32)
    return torch.stack(moments_op(x, *running, MOMENTUM, EPS))


def test_by_default_the_size_decides() -> None:
    """3 × 3 maps of a batch of 128 are small; what the second-level cache does not hold takes more programs."""
    maps = torch.empty(128, 512, 7, 7, device="meta", dtype=torch.bfloat16)
    assert op._is_small(maps[:, :, :3, :3], pool=False)
    assert not op._is_small(maps[:, :, :3, :3], pool=True)
    assert not op._is_small(maps[:, :500, :3, :3], pool=False)
    assert not op._is_small(maps, pool=False)
    assert 128 * 128 * 28 * 28 <= gpu.MERGED_ELEMENTS < 128 * 24 * 128 * 14 * 14
    assert gpu.MERGE_SUMS
