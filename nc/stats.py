"""Streaming statistics of a layer's features by class: all that NC1–NC4 need."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ncollapse.kernels.class_stats.op import class_stats_op
from ncollapse.kernels.class_stats.reference import State, moved
from ncollapse.moments import defined, merge, totals, within

Moment = Literal["full", "projected", "trace"]
Balance = Literal["class", "sample", "sample_mean"]


class ClassStats:
    """Counts, means and within-class second moment of features, accumulated batch by batch in one read of the features.

    The sums are kept about a shift per class, near its first samples, so that they stay accurate near collapse
    (`ncollapse.kernels.class_stats`). Nothing waits for a GPU until a result is read; every result is float64.

    Args:
        num_classes: K ≥ 2.
        dim: d, the feature dimension.
        moment: the part of the second moment to keep. "full": d × d values; NC1 is exact after one pass. "projected":
            the projection on `axes`, at most K × K values; NC1 is exact if the class means lie in their span. It is for
            a second pass, which `projected()` begins. "trace": only the trace for each class, which the others keep
            too; it suffices for all metrics but the NC1 with the pseudo-inverse.
        axes: `[*, m, d]`, directions whose span contains the centred class means, such as the class means of an earlier
            pass; for "projected" only.
        runs: R for stacked runs with features `[R, B, d]`; None for one model with `[B, d]`. `*` below is R or nothing.
        nan_policy: "raise" refuses a batch with values that are NaN or infinite, with an error that counts them.
            "propagate" adds it; the results of its run are then NaN.
        name: of the layer, for errors and warnings.
        device: of the features.
        dtype: of shifts and second moment, float32 or float64. None: float64 if the first features are float64, else
            float32. Sums and squares of K × d values are float64 in any case.

    A refused batch does not change the statistics, but perhaps the shifts that they are kept about. On a CPU `update`
    raises the error; on other devices the first read of a result raises it, once.
    """

    def __init__(
        self, num_classes: int, dim: int, *, moment: Moment = "full", axes: Tensor | None = None,
        runs: int | None = None, nan_policy: Literal["raise", "propagate"] = "raise", name: str = "",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if num_classes < 2 or dim < 1 or (runs is not None and runs < 1):
            raise ValueError(
                f"ClassStats needs num_classes ≥ 2, dim ≥ 1 and runs ≥ 1 or None; got {num_classes}, {dim} and {runs}"
            )
        if moment not in get_args(Moment) or nan_policy not in ("raise", "propagate"):
            raise ValueError(
                "ClassStats: moment is 'full', 'projected' or 'trace', nan_policy 'raise' or 'propagate'; "
                f"got {moment!r} and {nan_policy!r}"
            )
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"ClassStats: dtype is torch.float32 or torch.float64, not {dtype}")
        run_shape = () if runs is None else (runs,)
        if (axes is None) == (moment == "projected"):
            raise ValueError(
                "ClassStats: moment='projected' needs axes, and the others take none; `projected()` sets both"
            )
        if axes is not None and (axes.shape[:-2] != run_shape or axes.shape[-1] != dim):
            raise ValueError(f"ClassStats: axes must be {(*run_shape, 'm', dim)}, got {tuple(axes.shape)}")
        self.num_classes, self.dim, self.runs = num_classes, dim, runs
        self.moment, self.nan_policy, self.name = moment, nan_policy, name

        if axes is not None:
            # Orthonormal, so that a vector in their span is the sum of its projections.
            axes = torch.linalg.qr(axes.detach().double().nan_to_num(0.0, 0.0, 0.0).mT).Q.mT
        self._axes, self._dtype = axes, dtype
        self._state = self._empty(torch.float32 if dtype is None else dtype, device)

    def _empty(self, dtype: torch.dtype, device: torch.device | str | None) -> State:
        return State.empty(
            self.num_classes, self.dim, runs=self.runs, scatter=self.moment != "trace", axes=self._axes, dtype=dtype,
            device=device,
        )  # fmt: skip

    def _settle(self, dtype: torch.dtype) -> None:
        """Take this dtype if none was given and no batch was added."""
        if self._dtype is None:
            self._dtype = dtype
            if dtype != self._state.shifts.dtype:
                self._state = self._empty(dtype, self.device)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: `[*, B, d]`, any floating dtype and strides.
            labels: `[B]` integers in [0, K), in any order, shared by stacked runs.

        Raises:
            ValueError: wrong shapes or device, labels out of range, values that are not finite.
            TypeError: labels that are not integers, features that are not floating.

        After an error the statistics are as they were before the call.
        """
        expected = (*self._state.squares.shape[:-1], labels.shape[0] if labels.dim() == 1 else "B", self.dim)
        if labels.dim() != 1 or tuple(features.shape) != expected:
            raise ValueError(
                f"{self._label}.update: expected features {expected} with labels [B]; "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{self._label}.update: labels must be integers, got {labels.dtype}")
        if not features.is_floating_point():
            raise TypeError(f"{self._label}.update: features must be floating, got {features.dtype}")
        device = self._state.counts.device
        if not (features.device == labels.device == device):
            raise ValueError(
                f"{self._label}.update: features on {features.device} and labels on {labels.device}, statistics on "
                f"{device}; move them, or the statistics with `to`"
            )
        if self._dtype is None:
            self._settle(torch.float64 if features.dtype == torch.float64 else torch.float32)
        class_stats_op(features.detach(), labels.long(), *self._state, self.nan_policy == "propagate")
        if device.type == "cpu" and not torch.compiler.is_compiling():
            self._report()

    def projected(self) -> "ClassStats":
        """Return empty statistics for a second pass over the same features, which keep no d × d matrix.

        Their axes span the centred class means of this pass.
        """
        return ClassStats(
            self.num_classes, self.dim, moment="projected", axes=self.centred_means(), runs=self.runs,
            nan_policy=self.nan_policy, name=self.name, device=self.device, dtype=self._state.shifts.dtype,
        )  # fmt: skip

    def of_run(self, run: int) -> "ClassStats":
        """Return a copy of the statistics of one of the stacked runs, as those of one model.

        Raises:
            ValueError: these are not of stacked runs.
            IndexError: there is no such run.
        """
        if self.runs is None:
            raise ValueError(f"{self._label}.of_run: these are the statistics of one model, not of stacked runs")
        shared = ("counts", "refused")
        tensors = {name: (t if name in shared else t[run]).clone() for name, t in self._tensors().items()}
        one = copy.copy(self)
        one.runs, one._axes = None, None if self._axes is None else self._axes[run]
        one._state = State(**{name: tensors.get(name) for name in State._fields})  # type: ignore[arg-type]
        return one

    def merge(self, other: "ClassStats") -> None:
        """Add the batches of `other`; `other` does not change.

        Its sums are moved to the shifts of these statistics in float64 (Chan et al. 1979).

        Raises:
            ValueError: `other` has another shape, moment or axes.
        """
        kind, other_kind = ((s.num_classes, s.dim, s.runs, s.moment) for s in (self, other))
        if kind != other_kind:
            raise ValueError(f"{self._label}.merge: cannot add (K, d, R, moment) = {other_kind} to {kind}")
        self._settle(other._state.shifts.dtype)
        theirs = other._state.to(self.device)
        if self._state.axes is not None and not torch.equal(self._state.axes, theirs.axes):  # type: ignore[arg-type]
            raise ValueError(
                f"{self._label}.merge: the projections are on other axes; create both with one `projected()`"
            )
        merge(self._state, theirs)

    def all_reduce(self, group: Any = None) -> None:
        """Merge the statistics of all processes of a `torch.distributed` group into each of them.

        All must have the same axes. A class's shift becomes that of the first process that has samples of it. The
        network carries 2 · K × d values, and for the moment d × d or m × m.
        """
        rank, double = dist.get_rank(group), int(self._state.shifts.dtype == torch.float64)
        ours = torch.nn.functional.pad(self._state.counts, (0, 1), value=double)
        gathered = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, ours, group=group)
        counts = torch.stack(gathered)
        # A process without samples has no dtype of its own yet.
        self._settle(torch.float64 if counts[:, -1].any() else torch.float32)
        state = self._state
        owner = (counts[:, :-1] > 0).int().argmax(0)  # argmax gives the first of equal values
        owned = ((owner == rank) & (state.counts > 0)).unsqueeze(-1)
        shifts = torch.where(owned, state.shifts.double(), 0.0)
        dist.all_reduce(shifts, group=group)
        sums = totals(moved(state, shifts))
        for total in sums:
            dist.all_reduce(total, group=group)
        for kept, total in zip((state.shifts, *totals(state)), (shifts, *sums), strict=True):
            kept.copy_(total)

    def reset(self) -> None:
        """Remove all batches; keep the axes."""
        for name, tensor in self._tensors().items():
            if name != "axes":
                tensor.zero_()

    def to(self, device: torch.device | str) -> "ClassStats":
        """Move the statistics, in place, and return them."""
        self._state = self._state.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all tensors by name (`ncollapse.kernels.class_stats.reference.State`), for `torch.save`."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of a `state_dict`.

        Raises:
            ValueError: it is of statistics of another shape or moment; nothing has changed then.
        """
        tensors = self._tensors()
        theirs, ours = (
            ", ".join(sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in each.items()))
            for each in (state, tensors)
        )
        if theirs != ours:
            raise ValueError(f"{self._label}.load_state_dict: it holds {theirs}; these statistics hold {ours}")
        self._settle(state["shifts"].dtype)
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    @property
    def device(self) -> torch.device:
        """Device of the statistics."""
        return self._state.counts.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of shifts and second moment: float32 as long as it is open."""
        return self._state.shifts.dtype

    @property
    def counts(self) -> Tensor:
        """Number of samples of each class, `[K]` int64."""
        self._report()
        return self._state.counts

    @property
    def present(self) -> Tensor:
        """Whether a class has samples, `[K]` bool."""
        return self.counts > 0

    @property
    def means(self) -> Tensor:
        """Class means μ_k, `[*, K, d]` float64; NaN for a class without samples."""
        return self._state.shifts.double() + self._state.sums / self.counts.unsqueeze(-1)

    @property
    def global_mean(self) -> Tensor:
        """μ_G, `[*, d]` float64: the mean of the class means, each class with the same weight (Papyan et al. 2020)."""
        return self.means[..., self.present, :].mean(-2)

    def class_weights(self, balance: Balance = "class") -> Tensor:
        """Return each class's weight w_k in Σ_B, 1/K' or ("sample") n_k/N, for the K' classes with samples; float64."""
        counts = self.counts[self.present].double()
        return counts / counts.sum() if balance == "sample" else torch.full_like(counts, 1 / len(counts))

    def centred_means(self, balance: Balance = "class") -> Tensor:
        """Return M, rows μ_k − μ_G of the K' classes with samples, `[*, K', d]` float64.

        With balance="class" μ_G is the mean of the class means (Papyan et al. 2020), with "sample" and "sample_mean"
        that of all samples.
        """
        if balance not in get_args(Balance):
            raise ValueError(f"balance is 'class', 'sample' or 'sample_mean', not {balance!r}")
        means = self.means[..., self.present, :]
        weights = self.class_weights("class" if balance == "class" else "sample")
        return means - (weights.unsqueeze(-1) * means).sum(-2, keepdim=True)

    def between_cov(self, balance: Balance = "class") -> Tensor:
        """Compute Σ_B = Σ_k w_k (μ_k − μ_G)(μ_k − μ_G)ᵀ over classes with samples, `[*, d, d]` float64.

        w_k is that of `class_weights` and μ_G that of `centred_means`: with "sample_mean" 1/K' and the samples' mean.
        """
        means = self.centred_means(balance)
        return means.mT @ (self.class_weights(balance).unsqueeze(-1) * means)

    def within_variances(self) -> Tensor:
        """Compute tr Σ_k = (1/n_k) Σ ‖h − μ_k‖² of each of the K' classes with samples, `[*, K']` float64.

        Where rounding, under- or overflow leaves no digit of it, it is NaN; of equal samples it is 0.
        """
        variances, rounding = self.variances()
        return defined(variances, rounding)

    def within_trace(self, balance: Balance = "sample") -> Tensor:
        """Compute tr Σ_W = Σ_k w_k tr Σ_k, `[*]` float64; NaN as in `within_variances`.

        With balance="sample" w_k = n_k/N, so that Σ_W is that of all samples (Papyan et al. 2020); with "class" each of
        the K' classes weighs the same, as the means do in Σ_B.
        """
        weights = self.class_weights(balance)
        variances, rounding = self.variances()
        return defined((weights * variances).sum(-1), (weights * rounding).sum(-1))

    def variances(self) -> tuple[Tensor, Tensor]:
        """Return tr Σ_k, and a bound of its rounding error which is 0 where all samples are equal; `[*, K']` float64.

        Squares are summed in float64, but those of a sample in the dtype of the shifts.
        """
        counts = self.counts[self.present].double()
        sums = self._state.sums[..., self.present, :] / counts.unsqueeze(-1)
        squares, offset = self._state.squares[..., self.present] / counts, sums.square().sum(-1)
        info = torch.finfo(self._state.shifts.dtype)
        rounding = info.eps * squares + self.dim * info.tiny
        return squares - offset, rounding.masked_fill((squares == 0) & (sums == 0).all(-1), 0.0)

    def within_cov(self, directions: Tensor | None = None) -> Tensor:
        """Compute Σ_W = (1/N) Σ (h − μ_y)(h − μ_y)ᵀ over all samples, `[*, d, d]` float64 (Papyan et al. 2020).

        Args:
            directions: D `[*, m, d]` float64: compute D Σ_W Dᵀ `[*, m, m]` instead, which costs less.

        Raises:
            ValueError: moment="trace" keeps no second moment; moment="projected" needs directions.

        Warns:
            UserWarning: with moment="projected", more than 0.1 % of the directions lies outside the span of the axes.
        """
        axes = self._state.axes
        if self._state.scatter is None or (axes is not None and directions is None):
            raise ValueError(
                f"{self._label}: moment={self.moment!r} does not keep the second moment that this needs; moment='full' "
                "does. For NC1 'projected' suffices; nc1(kind='trace_ratio') and 'cdnv' need none"
            )
        self._report()
        if axes is not None and directions is not None:
            projected = directions @ axes.double().mT
            residual = (directions - projected @ axes.double()).flatten(-2).norm(dim=-1)
            share = residual / directions.flatten(-2).norm(dim=-1)
            if (share > 1e-3).any():
                warnings.warn(
                    f"{self._label}: {share.nan_to_num(0.0).max():.1%} of the class means lie outside the axes on "
                    "which the second moment is projected, and NC1 omits that part; use `projected()` of the same data",
                    stacklevel=2,
                )
            directions = projected
        return within(self._state, directions)

    def _report(self) -> None:
        """Raise an error for the batches refused since the last call; waits for the GPU."""
        batches, labels, values = self._state.refused.tolist()
        if not batches:
            return
        self._state.refused.zero_()
        reasons = [f"{labels} labels outside [0, {self.num_classes})"] if labels else []
        if values:
            reasons.append(f"{values} values that are NaN or infinite (nan_policy='propagate' accepts them)")
        batch = "the batch was" if batches == 1 else f"{batches} batches were"
        raise ValueError(f"{self._label}: {batch} refused, for {' and '.join(reasons)}; the statistics hold all others")

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._state._asdict().items() if tensor is not None}

    @property
    def _label(self) -> str:
        return f"ClassStats of {self.name!r}" if self.name else "ClassStats"
