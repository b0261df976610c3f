"""Models of the user's that would train with wrong numbers are refused, with what to do; look-alikes are not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse.train.errors import UserError
from ncollapse.train.networks.architecture import Architecture, build, parts_of
from ncollapse.train.networks.forms import form_of
from ncollapse.train.networks.model_trial import try_model
from ncollapse.train.networks.whole_module import WholeModule
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.stack import Stack, make_stack


class Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.middle(self.hidden(x.flatten(1)))))

    def middle(self, x: Tensor) -> Tensor:
        return x.relu()

    def after(self, logits: Tensor) -> Tensor:
        return logits


class Masked(Net):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.hidden.weight.register_hook(lambda grad: 0 * grad)


class Noting(Net):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.hidden.weight.register_post_accumulate_grad_hook(lambda _: None)


class Counting(Net):
    """Without an influence on the first steps."""

    steps = 0

    def middle(self, x: Tensor) -> Tensor:
        self.steps += self.training
        return x.relu() if self.steps < 1000 else x


class Averaging(Net):
    centre: Tensor | float = 0.0

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
        return (x - self.centre).relu()


class Last(Net):
    """Evaluates with what it has seen in the last batch of the training."""

    centre: Tensor | float = 0.0

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = x.detach().mean(0)
        return (x - self.centre).relu()


class Prepared(Net):
    """Scales its first layer by its first batch, as ActNorm."""

    ready = False

    def middle(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.hidden.weight.data.div_(x.detach().std())
            self.ready = True
        return x.relu()


class Own(Net):
    """Has a generator of its own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self._generator = torch.Generator().manual_seed(0)

    def middle(self, x: Tensor) -> Tensor:
        return x.relu() * torch.rand(x.shape, generator=self._generator)


class Late(Net):
    centre: Tensor | None

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("centre", None)

    def middle(self, x: Tensor) -> Tensor:
        if self.centre is None:
            self.centre = x.detach().mean(0)
        return (x - self.centre).relu()


class Growing(Net):
    seen: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("seen", torch.zeros(1))

    def middle(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean().view(1)])
        return x.relu()


class Tempered(Net):
    def after(self, logits: Tensor) -> Tensor:
        return logits / 0.1 if self.training else logits


class TemperedInPlace(Net):
    def after(self, logits: Tensor) -> Tensor:
        return logits.div_(0.1) if self.training else logits


class Storing(Net):
    """Keeps nothing that it reads again."""

    hidden_output: Tensor | None = None
    samples = 0

    def middle(self, x: Tensor) -> Tensor:
        self.hidden_output, self.samples = x, len(x)
        return x.relu()


class Activations(Net):
    hidden_output: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        self.hidden_output = x.relu()
        return self.hidden_output


class Buffered(Net):
    centre: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("centre", torch.zeros(8))

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
        return (x - self.centre).relu()


GIVEN = {
    c.__name__: c
    for c in (
        Masked, Noting, Counting, Averaging, Last, Prepared, Own, Late, Growing, Tempered, TemperedInPlace, Storing,
        Activations, Buffered,
    )
}  # fmt: skip
PLUGINS = Plugins(given={"model": GIVEN})
BATCH: Any = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("Masked", r"has a hook on hidden.weight, which would not run: compute in forward"),
        ("Noting", r"has a hook on hidden.weight"),
        ("Counting", r"keeps steps from step to step, which no checkpoint holds.*make it a buffer"),
        ("Averaging", r"keeps centre from step to step"),
        ("Last", r"keeps centre from step to step"),
        ("Prepared", r"keeps ready from step to step"),
        ("Own", r"keeps something from step to step"),
        ("Late", r"its forward pass registers centre: register it in __init__"),
        ("Growing", r"its forward pass gives another shape to seen"),
        ("Tempered", r"in training mode too it must return the logits of its head head"),
        ("TemperedInPlace", r"in training mode too it must return the logits of its head head"),
    ],
)
def test_models_that_would_train_with_other_numbers_are_refused(model: str, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        try_model(Architecture(model, 4, (1, 8, 8)), PLUGINS, *BATCH)
    assert "test_model_trial.py, line" in str(caught.value)


@pytest.mark.parametrize("model", ["Storing", "Activations", "Buffered"])
def test_what_is_stored_and_not_read_again_is_allowed(model: str) -> None:
    batch = BATCH[0].clone()
    try_model(Architecture(model, 4, (1, 8, 8)), PLUGINS, *BATCH)
    assert torch.equal(BATCH[0], batch)


def test_a_tensor_that_changes_from_step_to_step_is_not_shared_by_runs() -> None:
    form = form_of(Architecture("Averaging", 4, (1, 8, 8)), "fp32", PLUGINS)
    assert (form.kind, form.reason) == ("alone", "it changes centre, which is no parameter or buffer")


def test_what_is_stored_prevents_no_form_and_no_copy() -> None:
    architecture = Architecture("Activations", 4, (1, 8, 8))
    assert form_of(architecture, "fp32", PLUGINS).kind == "layers"
    stack = make_stack([build(architecture, 0, PLUGINS)], architecture, torch.device("cpu"), "fp32", PLUGINS)
    alone = Stack.of([build(architecture, 0, PLUGINS)], torch.device("cpu"), _whole(architecture))
    for one in (stack, alone):
        one(BATCH[0], train=True)[1].sum().backward()
        model = one.model(0)
        assert all(param.grad is None for param in model.parameters())
        torch.testing.assert_close(model.eval()(BATCH[0]), one(BATCH[0], train=False)[1][0])


def _whole(architecture: Architecture) -> WholeModule:
    return WholeModule(build(architecture, 0, PLUGINS), parts_of(architecture, PLUGINS), 3, vmapped=False)
