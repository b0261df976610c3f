"""`ClassStats.all_reduce` over three processes, one of them without samples."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, torch
import torch.distributed as dist
from ncollapse import ClassStats
from ncollapse.metrics import nc1

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
torch.manual_seed(0)
k, d = 7, 12
y = torch.arange(600) % k
y[:300] = y[:300].clamp(max=4)  # the first process has no samples of some classes
h = (10 * torch.randn(k, d) + 50)[y] + 1e-3 * torch.randn(600, d)
together = ClassStats(k, d)
together.update(h, y)
mine = slice(0, 300) if rank == 0 else slice(300, 600) if rank == 2 else slice(0, 0)


def close(stats, name):
    assert torch.equal(stats.counts, together.counts), name
    torch.testing.assert_close(stats.means, together.means, rtol=1e-7, atol=0)
    torch.testing.assert_close(nc1(stats), nc1(together), rtol=1e-5, atol=0)
    parts = [torch.empty_like(stats.means) for _ in range(3)]
    dist.all_gather(parts, stats.means)
    assert all(torch.equal(part, parts[0]) for part in parts), "the same bits in every process"


full = ClassStats(k, d)
full.update(h[mine], y[mine])
full.all_reduce()
close(full, "full")
projected = full.projected()
projected.update(h[mine], y[mine])
projected.all_reduce()
close(projected, "projected")
dist.destroy_process_group()
"""


def test_every_process_ends_with_the_statistics_of_all(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(3)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(outputs)
