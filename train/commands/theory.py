"""`ncollapse theory`: NC0 under every optimizer in the unconstrained features model, simulated and predicted.

Heavy libraries are imported inside functions, since the command line imports `Setting`.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from ncollapse.optimizer_table import OPTIMIZERS, TABLE
from ncollapse.train.engine.options import hide_default
from ncollapse.train.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ncollapse.plot.step_lines import Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The model and how it is trained: fixed features e_k, full-batch cross-entropy, learning rate ÷ 10 at ⅓ and ⅔."""

    classes: int = 10
    """K, at least 2."""
    dim: Annotated[int | None, hide_default] = None
    """Features d, at least K; by default K."""
    steps: int = 3_000
    """Steps of the optimizer."""
    lr: float = 0.03
    """Learning rate η before its drops."""
    momentum: float = 0.5
    """Momentum β, β₁ of optimizers with two betas; the bound on sign descent grows with it."""
    weight_decay: float = 0.05
    """Weight decay λ."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        K = self.classes
        bounds = (
            ("classes", K >= 2, "be at least 2"),
            ("dim", self.d >= K, f"be at least the number of classes, {K}"),
            ("steps", self.steps >= 3, "be at least 3"),
            ("lr", 0 < self.lr < math.inf, "be positive"),
            ("momentum", 0 <= self.momentum < 1, "lie in [0, 1)"),
            ("weight-decay", 0 <= self.weight_decay < math.inf, "be at least 0"),
        )
        for name, valid, requirement in bounds:
            if not valid:
                raise UserError(f"--{name} must {requirement}; got {getattr(self, name.replace('-', '_'))}")

    @property
    def d(self) -> int:
        """Number of features."""
        return self.classes if self.dim is None else self.dim

    @property
    def lrs(self) -> "NDArray[np.float64]":
        """Learning rate η of each step, `[steps]`."""
        import numpy as np

        return self.lr * np.power(0.1, 3 * np.arange(self.steps) // self.steps, dtype=np.float64)


def trajectories(setting: Setting) -> "list[Trajectory]":
    """Simulate every optimizer from the same initial weights; in the order of `OPTIMIZERS`."""
    import torch

    from ncollapse import ufm
    from ncollapse.plot.step_lines import Trajectory

    shared: dict[str, Any] = {"lr": setting.lrs, "steps": setting.steps, "momentum": setting.momentum}
    shared |= {"weight_decay": setting.weight_decay}
    found: dict[str, Trajectory] = {}
    for own_stack in (False, True):
        names = [row.name for row in TABLE.values() if row.own_stack == own_stack]
        couplings = [c for name in names if (c := TABLE[name].coupling) is not None]
        run = ufm.simulate(
            names, setting.classes, setting.d, seed=setting.seed, betas=(setting.momentum, 0.999),
            coupling=torch.tensor(couplings, dtype=torch.float64, device="cpu"), **shared,
        )  # fmt: skip
        for name, c, start, nc0 in zip(names, couplings, run.start, run.nc0, strict=True):
            prediction = ufm.predict(
                name, setting.classes, setting.d, start=start, coupling=c, features="fixed", **shared
            )
            found[name] = Trajectory(name, c, run.steps, nc0, prediction)
    return [found[name] for name in OPTIMIZERS]


def print_theory(setting: Setting, out: Path, console: Console) -> None:
    """Print a table, and write theory.png and theory.svg into a folder, made if missing.

    Raises:
        UserError: the folder cannot be written to.
    """
    from ncollapse.plot.step_lines import nc0_over_steps
    from ncollapse.plot.style import encode
    from ncollapse.train.results.atomic_write import write_whole

    found = trajectories(setting)
    numbers = (Column(name, justify="right") for name in ("start", "end", "predicted"))
    table = Table(
        "NC0", *numbers, "", "theory (theorem)", box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0)
    )
    for one in found:
        theory = one.prediction
        predicted = ("–", "") if theory is None else (f"{theory.nc0[-1]:.3g}", theory.kind)
        measured = (f"{one.nc0[0]:.3g}", f"{one.nc0[-1]:.3g}")
        table.add_row(TABLE[one.optimizer].label, *measured, *predicted, TABLE[one.optimizer].theorem)

    def say(text: object) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    K, λ = setting.classes, setting.weight_decay
    say(f"Unconstrained features model, K = {K}, d = {setting.d}, features e_k; NC0 = ‖Wᵀ1‖²")
    say(f"{setting.steps} steps, η = {setting.lr:g} ÷ 10 at ⅓ and ⅔, β = {setting.momentum:g}, λ = {λ:g}")
    console.print(table)
    for one in found:
        theory = one.prediction
        if theory is not None and theory.holds_until is not None and theory.holds_until < setting.steps:
            held = f"{TABLE[one.optimizer].label}: {theory.kind} to step {theory.holds_until:,}"
            say(f"{held}; then the softmax underflows (logit gap {theory.largest_gap:.0f})")
    say("Theorems of arXiv 2602.16642" + (f"; K(K − 2)²/λ² = {K * (K - 2) ** 2 / λ**2:.3g}" if λ else ""))
    image, vectors = encode(nc0_over_steps(found))
    for name, content in (("theory.png", image), ("theory.svg", vectors.encode())):
        write_whole(out / name, content)
        say(out / name)
