"""Measure NC0–NC5 of a torchvision model on data of one's own: several layers, test and out-of-distribution data."""

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ncollapse as nc

# Your data: any DataLoader, data set or pair of tensors. Here: eight digits to learn, two that the model never sees.
images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
images = nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 16, size=16).expand(-1, 3, -1, -1)
known = labels < 8
data = TensorDataset(images[known], labels[known])
train_data, test_data = torch.utils.data.Subset(data, range(600)), torch.utils.data.Subset(data, range(600, 800))
unknown = images[~known][:100]

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=8)
opt = nc.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-4)
for _ in range(3):
    for x, y in DataLoader(train_data, batch_size=30, shuffle=True):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()

result = nc.measure(
    model,
    DataLoader(train_data, batch_size=200),  # without shuffling or augmentation
    layers=("layer1", "layer2", "layer3", "layer4"),  # names of model.named_modules()
    test=DataLoader(test_data, batch_size=200),
    ood=unknown,
)
assert result.test is not None
print("NC1 by layer:", ", ".join(f"{name} {layer.nc1:.3g}" for name, layer in result.layers.items()))
print(f"train: accuracy {result.train_accuracy:.2f}, NC0 {result.nc0:.3g}, NC2 {result.nc2:.3g}, NC3 {result.nc3:.3g}")
print(f"test: accuracy {result.test.train_accuracy:.2f}, NC1 {result.test.nc1:.3g}, NC4 {result.test.nc4:.3g}")
print(f"NC5, of the two unknown digits: {result.nc5:.3g}")
