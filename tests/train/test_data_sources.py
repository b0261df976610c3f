"""Where data of the user's come from: functions in files, Python, data sets as torchvision's, .npz files."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.own import Data
from ncollapse.train.data.sets import load
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.plugins import Plugins

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 8, 8), np.uint8)
VECTORS = RNG.normal(size=(6, 5))
Y = np.arange(6) % 3


def dataset(x: Any) -> Dataset:
    """The data set of samples that are also its test samples."""
    return Data(x, Y, x, Y).dataset(CPU, "data mine")


def loaded(name: str, plugins: Plugins, options: str = "", *, in_memory: bool = True) -> Dataset:
    return load(name, CPU, data_dir=None, download=False, options=options, plugins=plugins, in_memory=in_memory)


def given_data(value: Any) -> Plugins:
    return Plugins(given={"data": {"mine": value}})


def refused(value: Any, options: str = "", *, in_memory: bool = True) -> str:
    """The message about data that were given in Python."""
    with pytest.raises(UserError) as error:
        loaded("mine", given_data(value), options, in_memory=in_memory)
    return str(error.value)


CODE = """
import numpy as np
import torch
from ncollapse.train.data.own import Data

def load(samples, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(samples) % 2
    return rng.normal(size=(samples, 3)), y, rng.normal(size=(4, 3)), y[:4]

def raises():
    return torch.zeros(2) @ torch.zeros(3)

def leaves():
    raise SystemExit("no data today")

def uneven():
    x = torch.zeros(3, 4)
    return Data(x, [0, 1], x, [0, 1, 1])

def uneven_tuple():
    x = torch.zeros(3, 4)
    return x, [0, 1], x, [0, 1, 1]

def nothing():
    pass
"""


@pytest.fixture
def mine(tmp_path: Path) -> Plugins:
    (tmp_path / "mine.py").write_text(CODE)
    return Plugins(tmp_path)


def test_a_function_in_a_file_is_called_with_its_options(mine: Plugins) -> None:
    data = loaded("mine.py:load", mine, '{"samples": 10}')
    assert data.train_x.shape == (10, 3)
    assert loaded("mine.py:load", mine, '{"samples": 10}').fingerprint == data.fingerprint
    assert loaded("mine.py:load", mine, '{"samples": 10, "seed": 1}').fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("load", "", "mine.py:load (mine.py, line 6): missing a required argument: 'samples'; data_options are its"),
        ("load", '{"sample": 3}', "(mine.py, line 6): missing a required argument: 'samples'"),
        ("nothing", '{"n": 3}', "got an unexpected keyword argument 'n'; data_options are its arguments, it takes ()"),
        ("raises", "", "data mine.py:raises: mine.py, line 12: RuntimeError: inconsistent tensor size"),
        ("leaves", "", "data mine.py:leaves: mine.py, line 15: SystemExit: no data today"),
        ("uneven", "", "data mine.py:uneven: mine.py, line 19: y has 2 labels of 3 samples"),
        ("uneven_tuple", "", "data mine.py:uneven_tuple (mine.py, line 21): y has 2 labels of 3 samples"),
        ("nothing", "", "data mine.py:nothing (mine.py, line 25) is a NoneType; it must be Data(…), (x, y, x_test, "),
        ("absent", "", "data mine.py:absent: mine.py has no 'absent'; it has Data, load, raises"),
    ],
)
def test_faults_of_a_function_name_file_and_line(mine: Plugins, name: str, options: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        loaded(f"mine.py:{name}", mine, options)
    assert message in str(error.value)
    assert isinstance(error.value, OwnCodeError) == (name in ("raises", "leaves"))


def test_data_reach_other_processes() -> None:
    plugins = pickle.loads(pickle.dumps(given_data(Data(BYTES, Y, BYTES, Y))))
    assert loaded("mine", plugins).fingerprint == dataset(BYTES).fingerprint


def test_data_may_be_given_in_python() -> None:
    whole = Data(VECTORS, Y, VECTORS, Y)
    four = (VECTORS, Y, VECTORS, Y)
    for value in (whole, four, lambda: whole, lambda: four, lambda: ((VECTORS, Y), (VECTORS, Y))):
        assert loaded("mine", given_data(value)).fingerprint == dataset(VECTORS).fingerprint
    assert "data mine: data_options are arguments of a function; data given in Python takes none" in refused(
        whole, '{"n": 1}'
    )
    assert "is a list of int, int; it must be Data" in refused([1, 2])
    assert "in_memory = false streams a pair (train, test) of data sets; these are in memory" in refused(
        whole, in_memory=False
    )
    with pytest.raises(UserError, match="digits is read into memory"):
        load("digits", CPU, data_dir=None, download=False, in_memory=False)


class Pictures:
    """A data set in the style of torchvision's: Pillow's images of a mode, unless a transform changes them."""

    def __init__(self, images: np.ndarray, mode: str = "L", transform: Callable[[Any], Any] | None = None) -> None:
        self.images, self.mode, self.transform = images, mode, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        image = Image.fromarray(self.images[i])
        image = image if self.mode.startswith("I") else image.convert(self.mode)
        return (self.transform(image) if self.transform else image), int(Y[i])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_pictures_are_read_into_memory(mode: str) -> None:
    images = BYTES.astype(np.uint16) * 257 if mode == "I;16" else BYTES
    data = loaded("mine", given_data((Pictures(images, mode), Pictures(images[:4], mode))))
    assert data.input_shape == (1 if mode in ("L", "I;16") else 3, 8, 8)
    assert torch.allclose(data.train_x[:, :1], dataset(BYTES).train_x)
    assert data.val_y.tolist() == Y[:4].tolist()


def test_a_data_set_gives_tensors_classes_and_parts_of_itself() -> None:
    from torchvision.transforms.functional import to_tensor

    pictures = Pictures(BYTES, transform=to_tensor)
    pictures.classes = ["cat", "dog", "fish"]  # type: ignore[attr-defined]
    data = loaded("mine", given_data(lambda: (Subset(pictures, range(5)), Subset(pictures, [5]))))
    assert data.classes == ("cat", "dog", "fish")
    assert torch.equal(data.train_x[:, 0], torch.from_numpy(BYTES[:5]).float() / 255)
    assert data.val_y.tolist() == [2]


def test_transforms_that_draw_at_random_draw_the_same_every_time() -> None:
    def noisy(image: Any) -> torch.Tensor:
        return torch.rand(2) + np.random.rand() + torch.from_numpy(np.asarray(image).astype(np.float32)).mean()

    plugins = given_data((Pictures(BYTES, transform=noisy), Pictures(BYTES, transform=noisy)))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = loaded("mine", plugins)
    assert torch.equal(torch.rand(3), expected)  # the process's own generator is as it was
    assert loaded("mine", plugins).fingerprint == first.fingerprint


def test_faults_of_a_data_set_name_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Pictures(BYTES)

    def pair(transform: Callable[[Any], Any]) -> tuple[Pictures, Pictures]:
        return Pictures(BYTES, transform=transform), good

    calls = iter(range(100))
    uneven = pair(lambda image: torch.zeros(2 if next(calls) < 3 else 3))
    assert "data mine, training data: sample 3 is [3] of torch.float32, sample 0 [2]" in refused(uneven)
    assert "training data: sample 0: test_data_sources.py, line" in refused(pair(lambda image: image.no_such))
    assert "test data is empty" in refused((good, Pictures(BYTES[:0])))
    assert "x of sample 0 is a str" in refused(pair(lambda image: "x"))

    class Single(Pictures):
        def __getitem__(self, i: int) -> Any:
            return {"image": i}

    assert "sample 0 is a dict; samples are pairs (x, label)" in refused((Single(BYTES), good))

    class Named(Pictures):
        def __getitem__(self, i: int) -> Any:
            return self.images[i], "cat"

    assert "the label of sample 0 is <U3 'cat'; labels are integers" in refused((Named(BYTES), good))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert "6 samples [8, 8] take 0.0 GiB, of 0.0 that are free: stream them" in refused((good, good))


def test_an_npz_file_is_read(tmp_path: Path) -> None:
    arrays_of_it = {"x_train": VECTORS, "y_train": Y, "x_test": VECTORS, "y_test": Y}
    np.savez(tmp_path / "x.npz", **arrays_of_it)
    assert loaded("x.npz", Plugins(tmp_path)).fingerprint == dataset(VECTORS).fingerprint
    np.savez_compressed(tmp_path / "x.npz", classes=np.array(["cat", "dog", "fish"]), **arrays_of_it)
    assert loaded("x.npz", Plugins(tmp_path)).classes == ("cat", "dog", "fish")


def test_faults_of_an_npz_file_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"

    def fails(message: str, options: str = "") -> None:
        with pytest.raises(UserError, match=message):
            loaded("x.npz", Plugins(tmp_path), options)

    fails("no file x.npz")
    np.savez(path, x_train=VECTORS, y_train=Y, images=VECTORS)
    fails("x.npz: no x_test, y_test; the file has x_train, y_train, images")
    np.savez(path, x_train=VECTORS.astype(object), y_train=Y, x_test=VECTORS, y_test=Y)
    fails("x.npz: not an .npz file of arrays: Object arrays cannot be loaded")
    np.savez(path, x_train=VECTORS, y_train=Y + 1, x_test=VECTORS, y_test=Y - 9)
    fails(r"x.npz: y_test\[0\] is -9; labels of 4 classes are 0 to 3")
    np.savez(path, x_train=VECTORS, y_train=Y, x_test=VECTORS, y_test=Y)
    fails("data_options are arguments of a function; an .npz file takes none", '{"n": 1}')
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails("x.npz: not an .npz file of arrays: File is not a zip file")
    damaged = bytearray(whole)
    damaged[200] ^= 255
    path.write_bytes(damaged)
    fails("x.npz: not an .npz file of arrays: ")
    path.write_bytes(whole)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    fails("x.npz: 0.0 GiB, of 0.0 that are free")
