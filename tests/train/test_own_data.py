"""Data of the user's: what tensors and arrays become, by their type and shape, and what is wrong with them."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ncollapse.train.data.arrays import channels_are_last
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.own import Data
from ncollapse.train.errors import UserError

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


def test_frames_and_series_are_arrays() -> None:
    data = dataset(pd.DataFrame(VECTORS), pd.Series(Y, index=list("abcdef")), pd.Index(["cat", "dog", "fish"]))
    assert data.fingerprint == dataset(VECTORS).fingerprint
    assert data.classes == ("cat", "dog", "fish")


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
