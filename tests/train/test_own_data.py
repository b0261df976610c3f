"""Data of the user's: what tensors and arrays become, by their type and shape; where it comes from; what is wrong."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Subset

from ncollapse.train.data.arrays import channels_are_last
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.own import Data
from ncollapse.train.data.sets import load
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.plugins import Plugins

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 8, 8), np.uint8)
VECTORS = RNG.normal(size=(6, 5))
TOKENS = RNG.integers(0, 50, (6, 7))
Y = np.arange(6) % 3


def dataset(x: Any, y: Any = Y, classes: Any = None) -> Dataset:
    """The data set of samples that are also its test samples."""
    return Data(x, y, x, y, classes).dataset(CPU, "data mine")


def fault(*args: Any) -> str:
    with pytest.raises(UserError) as error:
        Data(*args)
    return str(error.value)


def loaded(name: str, plugins: Plugins, options: str = "", *, in_memory: bool = True) -> Dataset:
    return load(name, CPU, data_dir=None, download=False, options=options, plugins=plugins, in_memory=in_memory)


def given_data(value: Any) -> Plugins:
    return Plugins(given={"data": {"mine": value}})


def refused(value: Any, options: str = "", *, in_memory: bool = True) -> str:
    """The message about data that were given in Python."""
    with pytest.raises(UserError) as error:
        loaded("mine", given_data(value), options, in_memory=in_memory)
    return str(error.value)


@pytest.mark.parametrize(
    ("x", "shape", "dtype"),
    [
        (BYTES, (1, 8, 8), torch.float32),
        (BYTES[:, None], (1, 8, 8), torch.float32),
        (BYTES[..., None], (1, 8, 8), torch.float32),
        (BYTES.reshape(6, 64), (64,), torch.float32),
        (RNG.integers(0, 256, (6, 10, 9, 3), np.uint8), (3, 10, 9), torch.float32),
        (RNG.random((6, 3, 10, 9), np.float32), (3, 10, 9), torch.float32),
        (RNG.random((6, 10, 9, 3)), (3, 10, 9), torch.float32),
        (RNG.random((6, 8, 5)), (8, 5), torch.float32),  # a sequence of vectors
        (RNG.integers(0, 256, (6, 3, 4, 8, 8), np.uint8), (3, 4, 8, 8), torch.float32),  # videos
        (VECTORS, (5,), torch.float32),
        (VECTORS > 0, (5,), torch.float32),
        (torch.from_numpy(VECTORS).bfloat16(), (5,), torch.float32),
        (TOKENS, (7,), torch.int64),
        (TOKENS.astype(np.int16), (7,), torch.int64),
        (TOKENS.astype(np.uint32), (7,), torch.int64),
    ],
)
def test_samples_have_the_form_that_their_type_and_shape_say(
    x: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    data = dataset(x)
    assert (data.input_shape, data.input_dtype, data.num_classes) == (shape, dtype, 3)
    assert data.train_y.tolist() == Y.tolist()
    assert data.classes == ("0", "1", "2")
    assert torch.equal(data.train_x, data.val_x)
    assert data.notes == ()


def test_channels_and_size_are_those_of_images_and_vectors() -> None:
    images, vectors, sequences = dataset(BYTES), dataset(VECTORS), dataset(RNG.random((6, 8, 5)))
    assert (images.channels, images.size) == (1, 8)
    assert (vectors.channels, vectors.size) == (5, 1)
    with pytest.raises(UserError, match=r"samples of shape \[8, 5\] have no channels: they are no images"):
        _ = sequences.channels


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((3, 32, 32), False), ((32, 32, 3), True), ((1, 28, 28), False), ((28, 28, 1), True), ((13, 64, 64), False),
        ((64, 64, 13), True), ((3, 3, 3), False), ((2, 8, 4), False), ((8, 2, 4), True), ((5, 5, 5), False),
        ((5, 6, 7), False), ((32, 32), False),
    ],
)  # fmt: skip
def test_channels_first_and_last_are_told_apart(shape: tuple[int, ...], last: bool) -> None:
    assert channels_are_last(shape) == last


def test_bytes_are_standardised_per_channel_and_floats_taken_as_they_are() -> None:
    x = RNG.integers(0, 256, (6, 10, 10, 3), np.uint8)
    test = RNG.integers(0, 256, (4, 10, 10, 3), np.uint8)
    data = Data(x, Y, test, Y[:4]).dataset(CPU, "mine")
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    for found, raw in ((data.train_x, x), (data.val_x, test)):
        np.testing.assert_allclose(found, ((raw - mean) / std).transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    flat = BYTES.reshape(6, 64)
    np.testing.assert_allclose(dataset(flat).train_x, (flat - flat.mean()) / flat.std(), rtol=1e-5, atol=1e-6)
    assert torch.equal(dataset(VECTORS).train_x, torch.from_numpy(VECTORS).float())
    assert torch.equal(dataset(TOKENS).train_x, torch.from_numpy(TOKENS))


def test_sixteen_bits_are_scaled_to_bytes() -> None:
    assert torch.equal(Data(BYTES.astype(np.uint16) * 257, Y, BYTES, Y).x, Data(BYTES, Y, BYTES, Y).x)
    assert Data(torch.tensor(BYTES.astype(np.uint16)), Y, BYTES, Y).x.max() <= 1


def test_own_digits_are_the_built_in_ones(digits: Dataset) -> None:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(
        x.reshape(-1, 8, 8).astype(np.uint8), y, test_size=0.2, stratify=y, random_state=0
    )  # the split of the built-in ones
    mine = Data(parts[0], parts[2], parts[1], parts[3]).dataset(CPU, "mine")
    assert mine.fingerprint == digits.fingerprint
    for name in ("train_x", "train_y", "val_x", "val_y"):
        assert torch.equal(getattr(mine, name), getattr(digits, name))


@pytest.mark.parametrize(
    ("x", "fingerprint"),
    [
        (np.arange(30, dtype=np.uint8).reshape(6, 5), "60076d73a1121b6d"),
        (np.arange(30, dtype=np.float64).reshape(6, 5) / 3, "d5298ef5ba514572"),
        (np.arange(30, dtype=np.int32).reshape(6, 5), "f5e4dd4ef5c76f9e"),
    ],
)
def test_fingerprints_are_of_the_values_on_every_machine(x: np.ndarray, fingerprint: str) -> None:
    assert dataset(x).fingerprint == fingerprint
    for same in (torch.from_numpy(x), x.astype(x.dtype.newbyteorder(">")), np.asfortranarray(x), x[::-1][::-1]):
        assert dataset(same).fingerprint == fingerprint
    frozen = x.copy()
    frozen.flags.writeable = False
    assert dataset(frozen).fingerprint == fingerprint  # and torch does not warn
    other = x.copy()
    other[-1, -1] += 1
    assert dataset(other).fingerprint != fingerprint
    assert dataset(x, Y[::-1]).fingerprint != fingerprint
    assert dataset(x, Y, list("abcd")).fingerprint != fingerprint  # another number of classes
    assert dataset(x, Y, list("abc")).fingerprint == fingerprint


@pytest.mark.parametrize(
    "y",
    [Y.tolist(), tuple(Y), torch.from_numpy(Y), Y.astype(np.uint8), Y[:, None], np.eye(3)[Y], torch.eye(3).bool()[Y]],
    ids=["list", "tuple", "tensor", "bytes", "column", "one-hot", "one-hot of booleans"],
)
def test_labels_may_be_integers_or_one_hot(y: Any) -> None:
    data = dataset(VECTORS, y)
    assert data.train_y.dtype == torch.int64
    assert data.train_y.tolist() == Y.tolist()
    assert data.num_classes == 3


def test_a_class_without_training_samples_is_said() -> None:
    data = dataset(VECTORS, Y, ["cat", "dog", "fish", "wolf"])
    assert data.notes == ("no training samples of 1 of the 4 classes: wolf",)
    assert dataset(VECTORS, np.eye(9)[Y]).notes == (
        "no training samples of 6 of the 9 classes: 3, 4, 5, 6, 7 and 1 more",
    )
    assert dataset(VECTORS, Y, np.array(["cat", "dog", "fish"])).classes == ("cat", "dog", "fish")


NAN = VECTORS.copy()
NAN[2, 3] = np.nan


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((VECTORS, Y[:5], VECTORS, Y), "y has 5 labels of 6 samples"),
        ((VECTORS, Y, VECTORS, Y[:5]), "y_test has 5 labels of 6 samples"),
        ((VECTORS, Y, VECTORS[:, :4], Y), "x has samples [5], x_test has [4]"),
        ((VECTORS, Y, BYTES.reshape(6, 64)[:, :5], Y), "x has values of the type torch.float32, x_test of torch.uint8"),
        ((VECTORS, Y, NAN, Y), "x_test[2, 3] is nan; values must be finite in float32"),
        ((VECTORS * 1e300, Y, VECTORS, Y), "x[0, 0] is inf; values must be finite in float32"),
        ((VECTORS[:0], Y[:0], VECTORS, Y), "x has the shape [0, 5]"),
        ((VECTORS[:, 0], Y, VECTORS, Y), "x has the shape [6]; samples are [N, …]"),
        ((VECTORS.tolist(), Y, VECTORS, Y), "x is a list; give a tensor or an array: torch.stack(…), np.array(…)"),
        (("mnist", Y, VECTORS, Y), "x is a str; give a tensor or an array"),
        ((VECTORS.astype(str), Y, VECTORS, Y), "x has values of the type <U"),
        ((VECTORS.astype(object), Y, VECTORS, Y), "x has values of the type object, not numbers"),
        ((VECTORS * 1j, Y, VECTORS, Y), "x has values of the type complex128, not numbers"),
        ((torch.eye(6).to_sparse(), Y, VECTORS, Y), "x is a torch.sparse_coo tensor"),
        ((TOKENS - 5, Y, TOKENS, Y), "integers are tokens, which count from 0"),
        ((VECTORS, Y.astype(float), VECTORS, Y), "y has values of the type torch.float64; labels are integers"),
        ((VECTORS, Y - 1, VECTORS, Y), "y[0] is -1; labels of 3 classes are 0 to 2"),
        ((VECTORS, Y, VECTORS, Y, ["cat", "dog"]), "y[2] is 2; labels of 2 classes are 0 to 1"),
        ((VECTORS, Y * 500, VECTORS, Y), "a label is 1,000 of only 6 training samples: number the classes from 0"),
        ((VECTORS, Y * 0, VECTORS, Y * 0), "y has a single class; a classifier needs two"),
        ((VECTORS, np.array(list("abcabc")), VECTORS, Y), "not numbers: number them, as np.unique(…, return_inverse"),
        ((VECTORS, [[1, 2], [3]], VECTORS, Y), "y is no array: "),
        ((VECTORS, np.ones((6, 3)), VECTORS, Y), "y has the shape [6, 3], but is not one-hot"),
        ((VECTORS, np.eye(3)[Y], VECTORS, np.eye(4)[Y]), "y is one-hot of 3 classes, y_test of 4"),
        ((VECTORS, np.eye(3)[Y], VECTORS, Y, ["cat", "dog"]), "2 names, but the labels are one-hot of 3 classes"),
        ((VECTORS, np.zeros((6, 3, 3), int), VECTORS, Y), "y has the shape [6, 3, 3]; labels are integers [N]"),
        ((VECTORS, Y, VECTORS, Y, 3), "classes is a int; give the names of the classes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(args: tuple[Any, ...], message: str) -> None:
    assert message in fault(*args)


def test_a_constant_channel_is_refused() -> None:
    x = np.stack([BYTES, BYTES * 0], 1)
    with pytest.raises(UserError, match="data mine: a channel of the training images is constant"):
        dataset(x)
    assert dataset(VECTORS * 0).train_x.sum() == 0  # floats are the user's


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


def test_frames_and_series_are_arrays() -> None:
    data = dataset(pd.DataFrame(VECTORS), pd.Series(Y, index=list("abcdef")), pd.Index(["cat", "dog", "fish"]))
    assert data.fingerprint == dataset(VECTORS).fingerprint
    assert data.classes == ("cat", "dog", "fish")


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
    assert "training data: sample 0: test_own_data.py, line" in refused(pair(lambda image: image.no_such))
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


TYPES = st.one_of(
    arrays.boolean_dtypes(), arrays.integer_dtypes(endianness="?"), arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?"), arrays.complex_number_dtypes(), arrays.unicode_string_dtypes(max_len=3),
)  # fmt: skip
ANYTHING = st.one_of(
    arrays.arrays(TYPES, arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6)),
    st.lists(st.integers(-2, 6), max_size=6), st.none(), st.text(max_size=3),
)  # fmt: skip
KINDS: dict[type, Any] = {
    np.uint8: st.integers(0, 255), np.uint16: st.integers(0, 65_535), np.bool_: st.booleans(),
    np.float32: st.floats(-9, 9, width=32), np.float64: st.floats(-9, 9), np.int32: st.integers(0, 99),
}  # fmt: skip


@st.composite
def data_parts(draw: st.DrawFn) -> list[Any]:
    """Samples, labels and names of classes that fit together, or with one of them replaced by anything."""
    kind = draw(st.sampled_from(list(KINDS)))
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6))
    parts: list[Any] = []
    for samples in (draw(st.integers(3, 6)), draw(st.integers(1, 6))):
        seed = draw(st.integers(0, 99))
        values = np.random.default_rng(seed).permuted(np.resize(draw(st.lists(KINDS[kind], min_size=2)), 6**4 * 6))
        parts += [np.resize(values, (samples, *shape)).astype(kind), np.arange(samples) % 3]
    parts.append(draw(st.sampled_from([None, list("abc"), list("abcd")])))
    if (broken := draw(st.integers(-5, 4))) >= 0:
        parts[broken] = draw(ANYTHING)
    return parts


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(parts=data_parts())
def test_any_arrays_are_a_data_set_or_an_error_in_words(parts: list[Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of casts that overflow
            data = Data(*parts).dataset(CPU, "mine")
    except UserError:
        return
    assert len(data.train_x) == len(data.train_y) > 0
    assert len(data.val_x) == len(data.val_y) > 0
    assert data.input_shape == tuple(data.val_x.shape[1:])
    assert data.input_dtype in (torch.float32, torch.int64)
    assert data.train_x.dtype == data.val_x.dtype
    assert bool(data.train_x.isfinite().all())
    for labels in (data.train_y, data.val_y):
        assert 0 <= int(labels.min()) <= int(labels.max()) < data.num_classes
    assert data.num_classes >= 2
    assert len(data.fingerprint) == 16
