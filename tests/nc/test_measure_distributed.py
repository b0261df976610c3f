"""`measure` over two processes, each with its share of the data: DDP, sharded and tensor-parallel models."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import copy, sys, warnings, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from ncollapse import measure

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
group = dist.group.WORLD
torch.manual_seed(0)
N, K = 120, 4
labels = torch.arange(N) % K
x = torch.randn(N, 6) + torch.eye(K, 6)[labels]
plain = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, K))
mine = slice(0, 50) if rank == 0 else slice(50, N)
share = (x[mine], labels[mine])
other, strange = x.flip(1) + torch.eye(K, 6)[labels], x - 1
whole = measure(plain, (x, labels), layers=("0",), test=(other, labels), ood=strange)


def same(result, name, rel=1e-5):
    assert result.head == "2", name
    expected = whole.as_dict()
    for key, value in result.as_dict().items():
        near = abs(value - expected[key]) <= rel * max(1.0, abs(expected[key]))
        assert near or (value != value and expected[key] != expected[key]), (name, key, value, expected[key])
    told = [None, None]
    assert result.nearest_mean_accuracy == whole.nearest_mean_accuracy or "previous" in name, name
    assert result.nc4_per_class == whole.nc4_per_class, name
    dist.all_gather_object(told, repr(result.as_dict()))
    assert told[0] == told[1], f"{name}: the same numbers in every process"


options = {"layers": ("0",), "group": group, "batch_size": 16}
more = {"test": (other[mine], labels[mine]), "ood": strange[mine]}
none = {"test": (other[:0], labels[:0]), "ood": strange[:0]}
every = {"test": (other, labels), "ood": strange}
assert measure(plain, share).train_accuracy != whole.train_accuracy
for name, several in (
    ("all kept", {}), ("nothing kept", {"keep_bytes": 0}), ("projected", {"moment": "projected"}),
    ("a process without test data", every if rank else none),
):
    result = measure(plain, share, **options, **(more | several))
    same(result, "test data, " + name)
    assert set(result.as_dict()) == set(whole.as_dict())
    assert result.test.layers["0"].nc4_per_class == whole.test.layers["0"].nc4_per_class
same(measure(plain, share, **options), "all kept")
same(measure(plain, share, keep_bytes=30 * 40 * 4, **options), "nothing kept")
same(measure(plain, share, keep_bytes=55 * 40 * 4, **options), "kept by one process")
same(measure(plain, share, moment="projected", **options), "projected")
same(measure(plain, share, previous=whole, **options), "previous")
nothing = (x[:0], labels[:0])
same(measure(plain, (x, labels) if rank else nothing, **options), "a process without data")
same(measure(plain, (x, labels) if not rank else nothing, moment="projected", **options), "a process without data")
several = measure(plain, share, head=["2"], **options)
same(several["2"], "several heads")

wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
wrapped.compile(backend="eager")
with torch.no_grad():
    wrapped(share[0])
for _ in range(2):
    same(measure(wrapped, share, **options), "DDP, compiled in place")

mesh = init_device_mesh("cpu", (2,))
sharded = copy.deepcopy(plain)
for layer in (sharded[0], sharded[2], sharded):
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
same(measure(sharded, share, **options), "FSDP, more batches in one process")

parallel = parallelize_module(copy.deepcopy(plain), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
result = measure(parallel, (x, labels))  # all processes have the same data
assert abs(result.nc1 - whole.nc1) < 1e-4 * whole.nc1 and result.nc4 == whole.nc4, "tensor-parallel"

for wrong, message in ((share if rank else (share[0], share[1] + 9), "outside"), (nothing, "no samples")):
    try:
        measure(plain, wrong, **options)
    except (ValueError, RuntimeError) as error:
        assert message in str(error), error
    else:
        raise AssertionError("no error")
for wrong, message in (
    (share if rank else nothing, "one has no batch"),
    (share if rank else (share[0], share[1] + 9), "outside"),
):
    try:
        measure(sharded, wrong, **options)
    except (ValueError, RuntimeError) as error:
        assert message in str(error), error
    else:
        raise AssertionError("no error")

data = TensorDataset(x, labels)
loader = DataLoader(data, 16, sampler=DistributedSampler(data))
same(measure(plain, loader, **options), "a distributed sampler")
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    measure(plain, loader)
assert any("this process's share of the data only" in str(w.message) for w in warned)
dist.destroy_process_group()
"""


def test_every_process_has_the_result_of_all_data(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
