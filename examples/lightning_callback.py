"""Lightning: a LightningModule with an optimizer of ncollapse, and a callback that measures and logs NC0–NC4."""

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ncollapse as nc


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return nc.optim.Adam(self.parameters(), lr=1e-3, weight_decay=5e-4, coupling=1.0)


class NeuralCollapse(lightning.Callback):
    """Measures on the training data after every `every`-th epoch; metrics are logged as nc/nc0, nc/nc1, …"""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.history: list[nc.NCResult] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every:
            return
        group = torch.distributed.group.WORLD if trainer.world_size > 1 else None  # each process has a share
        result = nc.measure(pl_module, trainer.train_dataloader, group=group)
        pl_module.log_dict({f"nc/{name}": float(value) for name, value in result.as_dict().items()})
        self.history.append(result)


if __name__ == "__main__":
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(x.float() / 16, y), batch_size=128, shuffle=True)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    model, probe = Classifier(), NeuralCollapse(every=5)
    trainer = lightning.Trainer(max_epochs=20, accelerator="cpu", callbacks=[probe], **options)
    trainer.fit(model, loader)
    print("NC1:", ", ".join(f"{result.nc1:.3g}" for result in probe.history))
    print("NC0:", ", ".join(f"{result.nc0:.3g}" for result in probe.history))
