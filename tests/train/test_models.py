"""The networks: parameter counts, shapes, equal initial weights for equal seeds."""

import pytest
import torch

from ncollapse.train.networks.models import MIN_SIZE, MODELS, build


@pytest.mark.parametrize(
    ("name", "channels", "size", "count"),
    [("mlp", 1, 8, 8_970), ("resnet9", 1, 28, 6_571_978), ("vgg9", 1, 28, 4_691_274), ("resnet9", 3, 32, 6_573_130)],
)
def test_parameter_counts(name: str, channels: int, size: int, count: int) -> None:
    model = build(name, channels, size, 10, 0)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_features_feed_the_head(name: str, channels: int) -> None:
    model = build(name, channels, MIN_SIZE[name], 7, 0)
    images = torch.randn(5, channels, MIN_SIZE[name], MIN_SIZE[name])
    features = model.features(images)
    assert features.shape == (5, model.fc.in_features)
    model.eval()
    assert torch.equal(model(images), model.fc(model.features(images)))
    assert model(images).shape == (5, 7)


def test_the_seed_sets_only_the_weights() -> None:
    before = torch.get_rng_state()
    a, b, c = (build("cnn", 1, 8, 10, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.fc.weight, b.fc.weight)
    assert not torch.equal(a.fc.weight, c.fc.weight)
