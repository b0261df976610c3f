"""Augmentation: the views drawn, the images gathered, and runs that do not depend on their stack."""

import dataclasses

import pytest
import torch

from ncollapse.train.config import RunConfig
from ncollapse.train.data.augment import PAD, draw_views, gather_images, pad_images
from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import UserError
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")


def test_views_are_drawn_for_every_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert draw_views("none", 100, generator) is None
    assert torch.equal(generator.get_state(), state)  # runs without augmentation draw nothing
    for augment, crops, flips in (("flip", False, True), ("crop", True, False), ("flip-crop", True, True)):
        views = draw_views(augment, 2000, generator)
        assert views is not None
        assert set(views[:, :2].unique().tolist()) == (set(range(2 * PAD + 1)) if crops else {0})
        assert set(views[:, 2].unique().tolist()) == ({0, 1} if flips else {0})
        if flips:
            assert 0.45 < views[:, 2].double().mean() < 0.55


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_cropped_and_flipped(channels: int) -> None:
    images = torch.randn(5, channels, 9, 9)
    index = torch.tensor([4, 0, 2])
    assert torch.equal(gather_images(images, index, None, 9), images[index])
    flips = torch.tensor([[0, 0, 1], [0, 0, 0], [0, 0, 1]])
    flipped = gather_images(pad_images(images, "flip"), index, flips, 9)
    assert torch.equal(flipped, torch.stack([images[4].flip(-1), images[0], images[2].flip(-1)]))
    assert flipped.is_contiguous(memory_format=torch.channels_last)
    wide = pad_images(images, "crop")
    assert torch.equal(gather_images(wide, index, torch.tensor([[PAD, PAD, 0]] * 3), 9), images[index])
    views = torch.tensor([[0, 8, 0], [3, 1, 1], [8, 0, 0]])
    expected = [wide[4, :, 0:9, 8:17], wide[0, :, 3:12, 1:10].flip(-1), wide[2, :, 8:17, 0:9]]
    assert torch.equal(gather_images(wide, index, views, 9), torch.stack(expected))
    stacked = gather_images(wide, torch.stack([index, index + 0]), torch.stack([views, views.flip(0)]), 9)
    assert stacked.shape == (2, 3, channels, 9, 9)
    assert torch.equal(stacked[0], torch.stack(expected))


def test_images_need_not_be_square() -> None:
    images, index = torch.randn(3, 2, 6, 10), torch.tensor([2, 0])
    flipped = gather_images(pad_images(images, "flip"), index, torch.tensor([[0, 0, 1], [0, 0, 0]]), 6)
    assert torch.equal(flipped, torch.stack([images[2].flip(-1), images[0]]))
    wide = pad_images(images, "crop")
    cropped = gather_images(wide, index, torch.tensor([[8, 1, 0], [0, 3, 1]]), 6)
    assert torch.equal(cropped, torch.stack([wide[2, :, 8:14, 1:11], wide[0, :, 0:6, 3:13].flip(-1)]))


@pytest.mark.parametrize("samples", [torch.zeros(5, 7), torch.zeros(5, 7, 3), torch.zeros(5, 3, 8, 8).long()])
def test_only_images_are_augmented(samples: torch.Tensor) -> None:
    index = torch.tensor([[1, 2], [0, 3]])
    assert torch.equal(gather_images(pad_images(samples, "none"), index, None, 1), samples[index])
    with pytest.raises(UserError, match=r"augment flip needs images \[C, H, W\]; samples are \[.* of torch"):
        pad_images(samples, "flip")


def evaluations(training: Training) -> list[Evaluation]:
    return [event for event in training if isinstance(event, Evaluation)]


def test_runs_see_the_same_views_in_every_stack_and_after_a_resume(digits: Dataset) -> None:
    run = RunConfig(model="cnn", augment="flip-crop", epochs=4, limit=200, eval_every=4, lr=0.05)
    others = [run, dataclasses.replace(run, seed=1), dataclasses.replace(run, lr=0.01)]
    alone = evaluations(Training([run], digits, CPU))[-1].values
    together = evaluations(Training(others, digits, CPU))[-1].values
    assert together["train_loss"][0] == pytest.approx(alone["train_loss"][0], rel=1e-4)
    half = Training([run], digits, CPU)
    checkpoint = next(half.checkpoint() for event in half if event == 2)
    assert evaluations(Training([run], digits, CPU, checkpoint=checkpoint))[-1].values == alone
    plain = evaluations(Training([dataclasses.replace(run, augment="none")], digits, CPU))[-1].values
    assert plain["train_loss"][0] != pytest.approx(alone["train_loss"][0], rel=0.01)


def test_images_too_small_to_crop_are_refused(digits: Dataset) -> None:
    tiny = dataclasses.replace(digits, train_x=digits.train_x[..., :4, :4], val_x=digits.val_x[..., :4, :4])
    with pytest.raises(UserError, match="augment crop mirrors 4 pixels at the edges: images must be larger"):
        Training([RunConfig(augment="crop")], tiny, CPU)
