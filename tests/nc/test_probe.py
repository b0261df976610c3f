"""`measure` on ordinary modules."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nc import ClassStats, measure, metrics


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(200, 6), torch.arange(200) % 4


def test_measures_in_eval_mode_and_restores_it(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = Net()
    model.body[3].eval()
    running = model.body[1].running_mean.clone()
    result = measure(model, data)
    assert [model.training, model.fc.training, model.body[3].training] == [True, True, False]
    assert torch.equal(model.body[1].running_mean, running)
    model.eval()
    with torch.no_grad():
        features = model.body(data[0])
        logits = model.fc(features)
    stats = ClassStats(4, 12)
    stats.update(features, data[1])
    assert result.nc0 == metrics.nc0(model.fc.weight).item()
    assert result.nc1 == pytest.approx(metrics.nc1(stats).item())
    assert result.nc4 == metrics.nc4(features, logits, stats).item()
    assert result.train_accuracy == (logits.argmax(1) == data[1]).double().mean().item()
    assert set(result.as_dict()) == {"nc0", "nc1", "nc2", "nc3", "nc4", "train_accuracy", "degenerate"}


def test_a_loader_and_a_pair_of_tensors_agree(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = Net()
    expected = measure(model, data).as_dict()
    assert measure(model, DataLoader(TensorDataset(*data), 33)).as_dict() == pytest.approx(expected, rel=1e-5)
    assert measure(model, data, batch_size=7).as_dict() == pytest.approx(expected, rel=1e-5)


def test_errors_say_what_to_do_and_restore_the_model(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"no module 'head'.*linear layers: body.0, fc"):
        measure(model, data, head="head")
    with pytest.raises(TypeError, match="'body' is a Sequential"):
        measure(model, data, head="body")
    with pytest.raises(ValueError, match="no batches"):
        measure(model, [])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\)"):
        measure(model, (data[0], data[1] + 1))
    assert model.training
    assert not model.fc._forward_hooks
