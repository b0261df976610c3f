"""The optimizers of a stack's runs behind one interface: ncollapse's in one object, others in one object a run."""

import abc
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ncollapse.optimizer_table import row_of
from ncollapse.train.config import RunConfig
from ncollapse.train.errors import out_of_memory
from ncollapse.train.networks.precision import exact_products
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.checkpoints import OptimizerStates
from ncollapse.train.training.foreign import foreign_error, load_exactly, make_foreign, set_mode
from ncollapse.train.training.randomness import Generators, forget_normal_number
from ncollapse.train.training.stack import Stack, make_optimizer


def in_memory_of_their_own(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients as optimizers need them, which view them in other shapes and change them in place.

    Autograd may give two parameters one tensor, such as those of a sum, and any layout.
    """
    found, seen = list[Tensor | None](), set[int]()
    for grad in grads:
        if grad is not None:
            grad = grad.contiguous()
            if (memory := grad.untyped_storage().data_ptr()) in seen:
                grad = grad.clone()
            seen.add(memory)
        found.append(grad)
    return found


class Updates(abc.ABC):
    """The optimizers of a stack.

    Attributes:
        why_no_graph: why a CUDA graph cannot hold their step; empty where it can.
        reads_in_place: their step keeps no gradient, and is faster where the gradients' memory stays the same.
        takes_rows: they take the gradients of the stack's `rows`, not of its `params`.
    """

    why_no_graph: str = ""
    reads_in_place: bool = False
    takes_rows: bool = False

    @abc.abstractmethod
    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rates of an epoch, counted from 0."""

    @abc.abstractmethod
    def step(self) -> None:
        """Update the stack's parameters by their gradients."""

    @abc.abstractmethod
    def states(self) -> OptimizerStates:
        """Return the states, for a checkpoint or a smaller stack."""

    @abc.abstractmethod
    def load(self, states: OptimizerStates) -> None:
        """Continue from states that were taken while training."""

    @abc.abstractmethod
    def train(self, rows: Collection[int]) -> None:
        """Prepare the parameters of these runs for training, if they are others than those to evaluate."""

    @abc.abstractmethod
    def eval(self, rows: Collection[int]) -> None:
        """Prepare the parameters of these runs for an evaluation, if they are others than those to train."""


def make_updates(
    stack: Stack, runs: Sequence[RunConfig], plugins: Plugins, states: OptimizerStates | None = None
) -> Updates:
    """Make the optimizers of a stack's runs, which are all ncollapse's or all others.

    For runs in bfloat16 the stack gets copies of its weights, which every step renews.

    Args:
        states: to continue from; None: from the beginning.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: the states are of other parameters.
        UserError, OwnCodeError: as `make_foreign`.
    """
    updates = (_Foreign if row_of(runs[0].optimizer).foreign else _Stacked)(stack, runs, plugins)
    if states is None:
        updates.train(range(len(runs)))
    else:
        updates.load(states)
    return updates


class _Stacked(Updates):
    reads_in_place = True

    def __init__(self, stack: Stack, runs: Sequence[RunConfig], plugins: Plugins) -> None:
        self._optimizer, self._runs = make_optimizer(stack, runs), runs
        self._lr = self._optimizer.param_groups[0]["lr"]
        self._base_lr = self._lr.clone()
        if not row_of(runs[0].optimizer).own_stack:
            self.step = self._optimizer.step  # type: ignore[method-assign]  # a call less in every step

    def begin_epoch(self, epoch: int) -> None:
        factors = [run.lr_factor(epoch) for run in self._runs]
        # In place, since CUDA graphs read this tensor.
        self._lr.copy_(self._base_lr * torch.tensor(factors, dtype=torch.float64, device=self._lr.device))

    def step(self) -> None:
        with exact_products():  # as in the head, whose gradient such a step multiplies: its row sum is zero
            self._optimizer.step()

    def states(self) -> OptimizerStates:
        return OptimizerStates(stacked=self._optimizer.state_dict()["state"])

    def load(self, states: OptimizerStates) -> None:
        # Runs that have been removed may have needed states that the others do not have.
        names = set(self._optimizer.state_names)
        state = {p: {n: v for n, v in of.items() if n in names} for p, of in states.stacked.items()}
        groups = self._optimizer.state_dict()["param_groups"]
        if state:
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._lr = self._optimizer.param_groups[0]["lr"]

    def train(self, rows: Collection[int]) -> None:
        """Do nothing: the same parameters are trained and evaluated."""

    def eval(self, rows: Collection[int]) -> None:
        """Do nothing: the same parameters are trained and evaluated."""


class _Foreign(Updates):
    """One optimizer a run, on parameters that are the rows of the stack's; a row that is not contiguous is copied.

    Most optimizers view their parameters and gradients in other shapes, which only contiguous ones allow.
    """

    def __init__(self, stack: Stack, runs: Sequence[RunConfig], plugins: Plugins) -> None:
        self._stack, self._runs, self._device = stack, runs, stack.weight.device
        if runs[0].precision == "bf16":
            params = stack.params.values()
            stack.use_copies({p: torch.empty_like(p, dtype=torch.bfloat16).detach().copy_(p.detach()) for p in params})
        by_param = [param.detach().unbind() for param in stack.params.values()]
        self._rows = list(zip(*by_param, strict=True))
        self.takes_rows = bool(stack.rows)
        if self.takes_rows:
            self._params = [list(stack.rows.values())]
        else:
            self._params = [[nn.Parameter(row.contiguous()) for row in rows] for rows in self._rows]
        self._optimizers = [make_foreign(run, p, plugins) for run, p in zip(runs, self._params, strict=True)]
        self._lrs = [
            [float(group["lr"]) if "lr" in group else None for group in o.param_groups] for o in self._optimizers
        ]
        groups = [(run, group) for run, o in zip(runs, self._optimizers, strict=True) for group in o.param_groups]
        slow = sorted({row_of(run.optimizer).label for run, group in groups if not group.get("capturable")})
        self.why_no_graph = f"{', '.join(slow)} cannot be captured" if slow else ""
        self._updated = set(range(len(runs)))
        self._random: list[Generators] = []
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        self._random = []
        for run, optimizer, lrs in zip(self._runs, self._optimizers, self._lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                if lr is None:
                    continue
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * run.lr_factor(epoch))  # in place, since CUDA graphs read it
                else:
                    group["lr"] = lr * run.lr_factor(epoch)
            if len(self._runs) > 1:
                self._random.append(Generators.of(self._device, run.seed, epoch, 0))  # as the epoch of a run alone

    def step(self) -> None:
        if len(self._runs) == 1:
            forget_normal_number()  # as in a stack, so that the next ones are the same
        if self.takes_rows:
            for i in self._updated.copy():
                self._step(i)
            return
        params = self._stack.params.values()
        # Some optimizers keep the gradient, and a replayed graph writes the next one into the same memory.
        stacked = [param.grad.clone() if param.is_cuda and param.grad is not None else param.grad for param in params]
        in_dtype = [None if grad is None else grad.to(param.dtype) for param, grad in zip(params, stacked, strict=True)]
        grads = [None if grad is None else grad.unbind() for grad in in_memory_of_their_own(in_dtype)]
        # A graph cannot hold the states of generators: what is drawn in one depends on the other runs.
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        alone = len(self._runs) == 1 or capturing
        before, drawing = None, -1  # the generators before this step, and the run that draws from its own
        try:
            for i in sorted(self._updated):
                for param, of_runs in zip(self._params[i], grads, strict=True):
                    param.grad = None if of_runs is None else of_runs[i]
                if not alone:  # what a run draws is what it would draw alone
                    held = self._random[i].take_turn()
                    if before is None:
                        before = held
                    else:
                        self._random[drawing] = held
                    drawing = i
                self._step(i)
        finally:
            if before is not None:
                self._random[drawing] = before.take_turn()
        for name, copy in self._stack.copies.items():
            copy.data.copy_(self._stack.params[name].detach())

    def _step(self, i: int) -> None:
        try:
            self._optimizers[i].step()
        except Exception as error:
            if out_of_memory(error):
                raise
            tensors = [t for param in self._params[i] for t in (param, param.grad) if t is not None]
            if all(bool(t.isfinite().all()) for t in tensors):
                raise foreign_error(self._runs[i], error) from error
            # The run has diverged, which decompositions of matrices refuse: the next evaluation finds that.
            self._updated.remove(i)
            for row in self._rows[i]:
                row.fill_(float("nan"))
            return
        self._write_back(i)

    def _write_back(self, i: int) -> None:
        """Write parameters that are copies, or to which the optimizer has assigned other memory, into the stack."""
        for param, row in zip(self._params[i], self._rows[i], strict=True):
            if param.data_ptr() != row.data_ptr():
                row.copy_(param.detach())

    def states(self) -> OptimizerStates:
        return OptimizerStates(single=[optimizer.state_dict() for optimizer in self._optimizers])

    def load(self, states: OptimizerStates) -> None:
        for optimizer, saved in zip(self._optimizers, states.single, strict=True):
            load_exactly(optimizer, saved)

    def train(self, rows: Collection[int]) -> None:
        self._set_mode("train", rows)

    def eval(self, rows: Collection[int]) -> None:
        self._updated &= set(rows)  # the others have ended
        self._set_mode("eval", rows)

    def _set_mode(self, mode: str, rows: Collection[int]) -> None:
        for i in self._updated.intersection(rows):
            try:
                if set_mode(self._optimizers[i], mode):
                    self._write_back(i)
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise foreign_error(self._runs[i], error) from error
