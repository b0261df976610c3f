"""Data sets that do not fit in memory: their batches are those in memory, with and without other processes."""

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from ncollapse.train.config import RunConfig
from ncollapse.train.data import streamed
from ncollapse.train.data.sets import load
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")
PARENT = os.getpid()


class Samples:
    """Samples `[3, 6, 5]` of random numbers, three classes; what `change` makes of the sample and its number."""

    def __init__(self, samples: int, change: Any = lambda x, i: x, **attributes: Any) -> None:
        self.samples, self.change = samples, change
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> tuple[Any, int]:
        x = torch.from_numpy(np.random.default_rng(i).normal(size=(3, 6, 5))).float()
        return self.change(x + i % 3, i), i % 3


def loaded(train: Any, test: Any, *, in_memory: bool = False) -> Any:
    plugins = Plugins(given={"data": {"mine": lambda: (train, test)}})
    return load("mine", CPU, data_dir=None, download=False, plugins=plugins, in_memory=in_memory)


def refused(train: Any, test: Any) -> str:
    with pytest.raises(UserError) as error:
        loaded(train, test)
    return str(error.value)


@pytest.fixture(params=[0, 2], ids=["this process", "two processes"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(streamed, "_worker_count", lambda: request.param)
    return int(request.param)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_worker_count", lambda: 0)


def all_equal(batches: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(batches, expected, strict=True))


def test_streamed_batches_are_those_in_memory(workers: int) -> None:
    pair = Samples(50), Samples(13)
    stream, memory = loaded(*pair), loaded(*pair, in_memory=True)
    assert isinstance(stream, Streamed)
    assert (stream.input_shape, stream.input_dtype, stream.num_classes) == ((3, 6, 5), torch.float32, 3)
    order = torch.randperm(50)
    expected = [(memory.train_x[batch], memory.train_y[batch]) for batch in order.split(16)]
    assert [len(y) for _, y in expected] == [16, 16, 16, 2]  # the last, smaller batch too
    state = torch.get_rng_state()
    assert all_equal(stream.batches(order, 16, CPU), expected)
    assert torch.equal(torch.get_rng_state(), state)
    for split in ("train", "val"):
        assert all_equal(stream.evaluation_batches(split, 20, CPU), memory.evaluation_batches(split, 20, CPU))
    few = stream.limited(20).to(CPU)
    assert isinstance(few, Streamed)
    assert all_equal(few.evaluation_batches("train", 16, CPU), memory.limited(20).evaluation_batches("train", 16, CPU))
    assert stream.limited(50) is stream


def test_channels_that_are_last_come_first(alone: None) -> None:
    pair = [Samples(6, lambda x, i: x.movedim(0, -1)) for _ in range(2)]
    stream, memory = loaded(*pair), loaded(*pair, in_memory=True)
    assert stream.input_shape == (3, 6, 5)
    x = next(stream.batches(torch.arange(6), 4, CPU))[0]
    assert x.stride() == memory.train_x.stride()
    assert torch.equal(x, memory.train_x[:4])


def test_transforms_draw_the_same_with_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(x: torch.Tensor, i: int) -> torch.Tensor:
        return x + torch.rand(1) + np.random.rand()

    stream = loaded(Samples(30, noisy), Samples(6, noisy))
    order, passes = torch.randperm(30), []
    for count in (0, 2):
        monkeypatch.setattr(streamed, "_worker_count", lambda count=count: count)
        passes.append(list(stream.batches(order, 8, CPU)))
    assert all_equal(*passes)
    monkeypatch.setattr(streamed, "_worker_count", lambda: 0)
    other = dict(
        zip(order.flip(0).tolist(), torch.cat([x for x, _ in stream.batches(order.flip(0), 8, CPU)]), strict=True)
    )
    x = next(stream.batches(order, 8, CPU))[0][0]
    assert not torch.equal(x, other[int(order[0])])  # another order, as of another epoch: other samples
    assert loaded(Samples(30, noisy), Samples(6, noisy)).fingerprint == stream.fingerprint


def test_errors_of_a_data_set_name_the_line_and_the_sample(workers: int) -> None:
    def broken(x: torch.Tensor, i: int) -> torch.Tensor:
        if i == 27:
            raise ValueError("no such file")
        return x

    before = set(multiprocessing.active_children())
    stream = loaded(Samples(50, broken, targets=[i % 3 for i in range(50)]), Samples(6))
    with pytest.raises(
        OwnCodeError, match=r"sample 27: test_streamed_data.py, line \d+: ValueError: no such file"
    ) as e:
        list(stream.batches(torch.arange(50), 16, CPU))
    assert "Traceback" in e.value.log
    assert set(multiprocessing.active_children()) <= before  # its processes have ended
    uneven = loaded(Samples(50, lambda x, i: x[:, :5] if i == 27 else x), Samples(6))
    with pytest.raises(UserError, match=r"sample 27 is \[3, 5, 5\], others are \[3, 6, 5\]"):
        list(uneven.batches(torch.arange(50), 16, CPU))


def test_a_process_that_is_lost_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(x: torch.Tensor, i: int) -> torch.Tensor:
        if i == 20 and os.getpid() != PARENT:
            os._exit(1)
        return x

    monkeypatch.setattr(streamed, "_worker_count", lambda: 2)
    stream = loaded(Samples(50, lost), Samples(6))
    with pytest.warns(UserWarning, match="data mine .*DataLoader worker .*this process reads the rest"):
        batches = list(stream.batches(torch.arange(50), 8, CPU))
    monkeypatch.setattr(streamed, "_worker_count", lambda: 0)
    assert all_equal(batches, stream.batches(torch.arange(50), 8, CPU))


def test_a_pass_that_is_left_ends_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_worker_count", lambda: 2)
    before = len(multiprocessing.active_children())
    batches = loaded(Samples(50), Samples(6)).batches(torch.arange(50), 4, CPU)
    next(batches)
    assert len(multiprocessing.active_children()) == before + 2
    streamed._end_passes()
    assert len(multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("platform", "daemon", "cores", "count"),
    [("linux", False, 4, 2), ("linux", False, 2, 0), ("linux", True, 16, 0), ("darwin", False, 16, 0)],
)
def test_processes_read_where_they_may_and_there_are_cores(
    platform: str, daemon: bool, cores: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed.sys, "platform", platform)
    monkeypatch.setattr(streamed.multiprocessing, "current_process", lambda: SimpleNamespace(daemon=daemon))
    monkeypatch.setattr(streamed, "processors", lambda: cores)
    assert streamed._worker_count() == count


def test_labels_are_read_once(alone: None) -> None:
    read: list[int] = []

    def counted(x: torch.Tensor, i: int) -> torch.Tensor:
        read.append(i)
        return x

    targets = [i % 3 for i in range(40)]
    assert loaded(Samples(40, counted, targets=targets), Samples(6)).train_y.tolist() == targets
    assert len(read) == 16  # the samples of the fingerprint
    read.clear()
    part = Subset(Samples(40, counted, labels=np.array(targets)), range(10, 30))  # type: ignore[arg-type]
    assert loaded(part, Samples(6)).train_y.tolist() == targets[10:30]
    assert len(read) == 16
    read.clear()
    changed = Samples(40, counted, targets=[9] * 40, target_transform=lambda y: y % 3)
    assert loaded(changed, Samples(6)).train_y.tolist() == targets
    assert len(read) == 40 + 16


def test_the_fingerprint_is_of_labels_and_some_samples(alone: None) -> None:
    known = loaded(Samples(50), Samples(13)).fingerprint
    assert loaded(Samples(50), Samples(13)).fingerprint == known
    assert loaded(Samples(50, lambda x, i: x + (i == 49)), Samples(13)).fingerprint != known
    assert loaded(Samples(49), Samples(13)).fingerprint != known
    assert loaded(Samples(50), Samples(13, classes=list("abcd"))).fingerprint != known


def test_what_cannot_be_streamed_is_said(alone: None) -> None:
    good = Samples(6)
    assert "training data: x of sample 0 is a ndarray; streamed samples are float tensors: normalise them" in refused(
        Samples(6, lambda x, i: x.numpy()), good
    )
    assert "x of sample 0 is a torch.uint8" in refused(Samples(6, lambda x, i: x.byte()), good)
    assert "sample 0, [0, 0, 0] is nan" in refused(Samples(6, lambda x, i: x * np.nan), good)
    assert "test data: sample 0 is [3, 6, 4], others are [3, 6, 5]" in refused(
        good, Samples(6, lambda x, i: x[..., :4])
    )
    assert "sample 0 has the label 0, in the labels of all samples 1" in refused(Samples(6, targets=[1] * 6), good)
    assert "training labels[0] is 7; labels of 3 classes are 0 to 2" in refused(
        Samples(6, targets=[7] * 6, classes=list("abc")), good
    )
    assert "the training data have the classes ['a', 'b'] …, the test data ['a', 'c'] …" in refused(
        Samples(6, classes=["a", "b"]), Samples(6, classes=["a", "c"])
    )

    class Unlabelled(Samples):
        def __getitem__(self, i: int) -> tuple[Any, Any]:
            return super().__getitem__(i)[0], None

    assert "the label of sample 0 is object 'None'; labels are integers" in refused(
        Unlabelled(6, targets=[0, 1, 2, 0, 1, 2]), good
    )
    assert "training data is empty" in refused(Samples(0), good)


def test_a_folder_of_images_streams(tmp_path: Path, alone: None) -> None:

    rng = np.random.default_rng(0)
    for split, name, i in ((s, n, i) for s in ("train", "test") for n in ("cat", "dog") for i in range(3)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "mine.py").write_text(f"""
from torchvision import datasets, transforms
def load():
    change = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.25)])
    return [datasets.ImageFolder(f"{tmp_path}/{{split}}", change) for split in ("train", "test")]
""")
    stream, memory = (
        load("mine.py:load", CPU, data_dir=None, download=False, plugins=Plugins(tmp_path), in_memory=in_memory)
        for in_memory in (False, True)
    )
    assert stream.classes == ("cat", "dog")
    assert all_equal(stream.evaluation_batches("train", 4, CPU), memory.evaluation_batches("train", 4, CPU))
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(OwnCodeError, match=r"sample 4: UnidentifiedImageError"):
        list(stream.batches(torch.arange(6), 4, CPU))


def test_a_streamed_run_has_the_numbers_of_one_in_memory(alone: None) -> None:
    pair = [Samples(samples, lambda x, i: x[:, :5]) for samples in (60, 20)]
    run = RunConfig(model="mlp", optimizer="adamw", lr=0.01, epochs=2, eval_every=1, batch_size=16, limit=50, width=8)
    numbers = []
    for in_memory in (False, True):
        training = Training([run], loaded(*pair, in_memory=in_memory), CPU)
        numbers.append([event.values for event in training if isinstance(event, Evaluation)])
    assert len(numbers[0]) == 3
    assert numbers[0] == numbers[1]
