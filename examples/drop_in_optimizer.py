"""torch.optim.AdamW replaced by ncollapse's in a plain training loop, and then a share of its weight decay coupled."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import ncollapse as nc
from ncollapse.optim import AdamW

x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
x = x.float() / 16


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model: nn.Module, opt: torch.optim.Optimizer, epochs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(256):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()


# Begin with torch's optimizer. Ours takes its state dict and goes on; torch's takes ours, too.
before, after = make_model(), make_model()
theirs = torch.optim.AdamW(before.parameters(), lr=3e-3, weight_decay=0.1)
train(before, theirs, epochs=10)
ours = AdamW(after.parameters(), lr=3e-3, weight_decay=0.1)
after.load_state_dict(before.state_dict())
ours.load_state_dict(theirs.state_dict())
train(before, theirs, epochs=10)
train(after, ours, epochs=10)
difference = max((p - q).abs().max().item() for p, q in zip(before.parameters(), after.parameters(), strict=True))
print(f"Largest difference of a weight after 80 more steps by torch's and by ours: {difference:.0e}")

# coupling 0 is AdamW, 1 is Adam with L2 regularisation. Decoupled decay keeps NC0 = ‖Wᵀ1‖² above its start.
print(f"NC0 at the start: {nc.measure(make_model(), (x, y)).nc0:.3g}")
for coupling in (0.0, 0.5, 1.0):
    model = make_model()
    train(model, AdamW(model.parameters(), lr=3e-3, weight_decay=0.03, coupling=coupling), epochs=30)
    print(f"coupling {coupling}: NC0 = {nc.measure(model, (x, y)).nc0:.3g}")
