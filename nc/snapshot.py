"""The geometry of a last layer at one moment, small enough to keep of every run: what pictures of collapse are made of.

`matrices` and singular values are those of `NCResult.matrices`; the plane of three class means is that in which Papyan,
Han and Donoho (PNAS 117(40), 2020) show features, class means and classifier.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Classes and singular values that are kept, and samples of each of the three classes.
MOST_CLASSES, MOST_SAMPLES = 16, 24
#: Checksum of what follows; then the format, K, the number of singular values, of samples, and the three classes.
_HEADER = struct.Struct("<IBIBB3I")
_FORMAT, _NO_CLASS = 1, 2**32 - 1
_MOST_HALF = float(np.finfo(np.float16).max)
#: By how much a rounded cosine may exceed 1.
_ROUNDING = 1e-3

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The geometry of a last layer W `[K, d]` and its features, with k = min(K, 16) classes; arrays are float64.

    Attributes:
        classes: K. Of more than 16 the first 16 are kept.
        means: `[k, k]`, cosines of the centred class means; NaN for a class without samples, and where all means are
            the same.
        weight: `[k, k]`, cosines of the rows of W; NaN for a row that is zero.
        product: `[k, k]`, W Mᵀ divided by its largest absolute entry, M being the centred class means; NaN as in
            `means`.
        singular_values: `[s]`, the s = min(K, d, 16) largest of W; NaN where W is zero.
        row_sum: `[s]`, |cos(u_i, 1)| of the left singular vector u_i of each: 1 where W's rows share a summand, which
            is what NC0 measures.
        three: the first three classes with samples, whose means lie in the plane of the following; empty, as these
            are, where there are fewer, or their means lie on one line.
        corners: `[3, 2]`, their means in that plane: the origin is at their centre, and the mean of their norms is 1.
            The first points up (x = 0, y > 0), the second lies on the right (x > 0).
        rows: `[3, 2]`, their rows of W, projected on the plane's two directions, and divided by the mean of their
            norms; NaN where all are zero.
        samples: `[3, n, 2]`, projections of n ≤ 24 samples of each, with origin and unit of `corners`; NaN where a
            class has fewer.
    """

    classes: int
    means: Array
    weight: Array
    product: Array
    singular_values: Array
    row_sum: Array
    three: tuple[int, ...]
    corners: Array
    rows: Array
    samples: Array

    def to_bytes(self) -> bytes:
        """Return it in some hundred bytes: float16, the singular values float32; little-endian, with a checksum.

        Values beyond 65,504, of samples that are so far away, become that.
        """
        k = len(self.means)
        above = np.triu_indices(k)
        half = (
            self.means[above], self.weight[above], self.product, self.row_sum, self.corners, self.rows, self.samples
        )  # fmt: skip
        values = np.concatenate([part.ravel() for part in half]).clip(-_MOST_HALF, _MOST_HALF)
        three = self.three or (_NO_CLASS,) * 3
        rest = _HEADER.pack(
            0, _FORMAT, self.classes, len(self.singular_values), self.samples.shape[1] if self.three else 0, *three
        )[4:]
        rest += (
            self.singular_values.clip(max=float(np.finfo(np.float32).max)).astype("<f4").tobytes()
            + values.astype("<f2").tobytes()
        )
        return struct.pack("<I", zlib.crc32(rest)) + rest

    @staticmethod
    def from_bytes(content: object) -> "Snapshot":
        """Return what `to_bytes` wrote, rounded as it says.

        Raises:
            ValueError: anything else.
        """
        if not isinstance(content, bytes) or len(content) < _HEADER.size:
            raise ValueError("no snapshot: it is too short")
        checksum, version, classes, s, n, *three = _HEADER.unpack_from(content)
        if checksum != zlib.crc32(content[4:]):
            raise ValueError("a damaged snapshot: its checksum is another")
        if version != _FORMAT:
            raise ValueError(f"a snapshot of format {version}, this version of ncollapse reads {_FORMAT}")
        planar = three != [_NO_CLASS] * 3
        k, corners = min(classes, MOST_CLASSES), 3 if planar else 0
        shapes = [(k * (k + 1) // 2,)] * 2 + [(k, k), (s,), (corners, 2), (corners, 2), (corners, n, 2)]
        sizes = [int(np.prod(shape)) for shape in shapes]
        begin = _HEADER.size + 4 * s
        fits = classes >= 2 and 1 <= s <= k and n <= MOST_SAMPLES * planar
        ordered = not planar or three[0] < three[1] < three[2] < classes
        if not fits or not ordered or len(content) != begin + 2 * sum(sizes):
            raise ValueError(f"no snapshot: {classes} classes, of which {three}, in {len(content)} bytes")
        singular_values = np.frombuffer(content, "<f4", s, _HEADER.size).astype(np.float64)
        half = np.frombuffer(content, "<f2", sum(sizes), begin).astype(np.float64)
        parts = [part.reshape(shape) for part, shape in zip(np.split(half, np.cumsum(sizes)[:-1]), shapes, strict=True)]
        means, weight, product, row_sum, at, rows, samples = parts
        cosines = np.concatenate([means, weight, product.ravel(), row_sum])
        sensible = not (np.abs(cosines) > 1 + _ROUNDING).any() and not (row_sum < 0).any()
        sensible = sensible and not (singular_values < 0).any() and not (np.diff(singular_values) > 0).any()
        sensible = sensible and bool(np.isfinite(at).all()) and not np.isinf(half).any()
        if not sensible or np.isinf(singular_values).any():
            raise ValueError("no snapshot: a value of it cannot be")
        return Snapshot(
            classes, _symmetric(means, k), _symmetric(weight, k), product, singular_values, row_sum,
            tuple(three) if planar else (), at, rows, samples,
        )  # fmt: skip


def _symmetric(above: Array, k: int) -> Array:
    """Return the symmetric matrix of its entries on and above the diagonal."""
    matrix = np.empty((k, k))
    matrix[np.triu_indices(k)] = above
    matrix.T[np.triu_indices(k)] = above
    return matrix
