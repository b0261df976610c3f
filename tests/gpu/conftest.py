"""What only a GPU can show: graphs, streams, synchronisation, training. `make gpu` runs it, then the benchmarks."""

import pytest
import torch

from devices import GPU_MARKS


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in GPU_MARKS:
        item.add_marker(mark)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)
