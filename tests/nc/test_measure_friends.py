"""`measure` in the training loops of other libraries, as in the README; skipped without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse import NCResult, measure

X, Y = torch.randn(96, 6), torch.arange(96) % 3


class Net(nn.Module):
    """A model as in Hugging Face: keyword arguments, and a loss beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.body(x))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {"logits": logits, **loss}


@pytest.mark.filterwarnings("ignore")  # those of the library
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)["logits"]

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(*batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    results: list[NCResult] = []

    class NeuralCollapse(lightning.Callback):  # type: ignore[name-defined,misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            result = measure(module, trainer.train_dataloader, head="net.classifier")
            module.log_dict({f"nc/{name}": float(value) for name, value in result.as_dict().items()})
            results.append(result)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=32)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(max_epochs=5, callbacks=[NeuralCollapse()], **options)
    trainer.fit(module, loader)
    assert len(results) == 5
    assert float(trainer.callback_metrics["nc/nc1"]) == pytest.approx(results[-1].nc1)
    assert results[-1].nc0 == measure(module, (X, Y), head="net.classifier").nc0


@pytest.mark.filterwarnings("ignore")  # those of the library
def test_the_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    results: list[NCResult] = []

    class NeuralCollapse(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            results.append(measure(given["model"], given["train_dataloader"], head="classifier"))

    model = Net()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=32, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = [{"x": x, "labels": int(y)} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[NeuralCollapse()])
    trainer.train()
    assert len(results) == 3
    again = measure(model, (X, Y), head="classifier")
    assert results[-1].nc1 == pytest.approx(again.nc1, rel=1e-4)
    assert results[-1].train_accuracy == again.train_accuracy
