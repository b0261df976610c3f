"""Rules that no kernel knows: the reference runs them, with a warning; a kernel that is given one refuses it."""

import pytest
import torch
from torch import Tensor

from devices import NEEDS_TRITON
from ncollapse.kernels import operators
from ncollapse.kernels.update import cpu
from ncollapse.kernels.update.launch import Update
from ncollapse.kernels.update.op import parts, update_op
from ncollapse.kernels.update.reference import RULES, Hyper, Settings, Slot, UpdateRule, declared, update_reference
from ncollapse.kernels.update.table import HYPERS, MIXED, HyperTable, Lists, Table, code
from update_twins import launch_cpu, launch_triton, tensors

NUMBERS = {"lr": 0.05, "weight_decay": 0.3, "coupling": 0.4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
WARNING = "plain PyTorch updates some parameters, slowly: there is no kernel for the rule mine"


def cubic(grad: Tensor, slot: Slot, settings: Settings) -> tuple[Tensor, Hyper]:
    assert slot.first is not None
    slot.first.copy_(slot.first * 0.5 + grad)
    return slot.first**3, settings.lr


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(RULES, "mine", cubic)
    monkeypatch.setattr(operators, "_warned", set())
    return "mine"


def values(sets: int) -> Tensor:
    return torch.tensor([list(NUMBERS.values())] * sets, dtype=torch.float64)


def table(codes: list[list[int]]) -> HyperTable:
    return HyperTable(values(len(codes)), [], [], codes)


def test_a_plain_function_is_a_rule_without_a_kernel(mine: str) -> None:
    assert declared(mine) == UpdateRule(cubic)
    assert [declared(name).kernel for name in RULES] == [0, 1, 2, 3, None]
    hypers = table([[code(name, maximize=True)] for name in RULES])
    assert [hypers.rules(i) for i in range(len(RULES))] == list(RULES)
    assert hypers.rule == MIXED


@pytest.mark.compiled  # otherwise the warning names the missing compiler
@pytest.mark.parametrize("rules", [["mine"], ["sgd", "mine", "adam"]], ids=["alone", "stacked"])
def test_the_reference_runs_it(mine: str, rules: list[str]) -> None:
    param = torch.randn(len(rules), 6, 5)
    copy, grad = param.clone(), torch.randn(len(rules), 6, 5)
    slot, twin = (Slot(torch.zeros_like(param), torch.zeros_like(param), torch.tensor(0.0)) for _ in range(2))
    update = Update([0], [[code(rule) for rule in rules]])
    columns = tensors(Lists([param], [slot], [0]), [grad])
    with pytest.warns(UserWarning, match=WARNING):
        update.step(columns, [values(1)])
    update.step(columns, [values(1)])
    assert update.launches == 0
    for _ in range(2):
        update_reference(rules if len(rules) > 1 else mine, [copy], [grad], [twin], Settings(**NUMBERS))
    assert torch.equal(param, copy)
    assert slot.first is not None
    assert twin.first is not None
    assert torch.equal(slot.first, twin.first)


@pytest.mark.compiled
def test_other_parameters_keep_their_kernel(mine: str) -> None:
    params, grads = [torch.randn(9) for _ in range(2)], [torch.randn(9) for _ in range(2)]
    copies = [p.clone() for p in params]
    slots, twins = [[Slot(torch.zeros(9)) for _ in params] for _ in range(2)]
    update = Update([0, 1], [[code("sgd")], [code(mine)]])
    with pytest.warns(UserWarning, match=WARNING):
        update.step(tensors(Lists(params, slots, [0, 1]), grads), [values(2)])
    assert update.launches == 1
    for i, rule in enumerate(("sgd", mine)):
        update_reference(rule, copies[i : i + 1], grads[i : i + 1], twins[i : i + 1], Settings(**NUMBERS))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@pytest.mark.compiled
def test_the_operator_runs_it_too(mine: str) -> None:
    param, grad, first = torch.randn(9), torch.randn(9), torch.zeros(9)
    copy, twin = param.clone(), Slot(torch.zeros(9))
    bits = parts(first, None, None, None, False)
    with pytest.warns(UserWarning, match=WARNING):
        update_op(
            [param], [grad], [first], [], [], [], None, [values(1)], [], [], [code(mine)], [1], [0], [bits], None, None
        )
    update_reference(mine, [copy], [grad], [twin], Settings(**NUMBERS))
    assert torch.equal(param, copy)


def test_a_replaced_rule_does_not_run_the_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "lion", cubic)
    assert declared("lion").kernel is None
    assert table([[code("lion")]]).rules(0) == "lion"


@pytest.mark.compiled
@pytest.mark.parametrize("beside", [[], ["sgd"]], ids=["alone", "mixed"])
def test_the_cpu_kernel_refuses_an_unknown_number(mine: str, beside: list[str]) -> None:
    rules = [*beside, mine]
    params = [torch.ones(5) for _ in rules]
    count = torch.tensor(0.0)
    lists = Lists(params, [Slot(torch.zeros(5), step=count) for _ in rules], list(range(len(rules))))
    with pytest.raises(ValueError, match="does not know a rule number"):
        launch_cpu(lists, [torch.ones(5) for _ in rules], table([[code(rule)] for rule in rules]))
    assert torch.equal(params[-1], torch.ones(5))
    assert count == 0


@NEEDS_TRITON
def test_the_gpu_kernel_refuses_an_unknown_number(mine: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lists = Lists([torch.ones(5, device=device)], [Slot(torch.zeros(5, device=device))], [0])
    zeros = torch.zeros(1, len(HYPERS), dtype=torch.float64, device=device)
    with pytest.raises(Exception, match="does not know this rule"):
        launch_triton(lists, [torch.ones(5, device=device)], HyperTable(zeros, [], [], [[code(mine)]]))


@pytest.mark.compiled
def test_a_kernel_with_another_layout_is_refused() -> None:
    from ncollapse.kernels.update import _cpu

    cpu.check_layout(_cpu.layout())
    with pytest.raises(ImportError, match=r"does not match the Python sources \(nesterov, wide\); install the package"):
        cpu.check_layout(_cpu.layout() | {"nesterov": 1024, "wide": 5})
    with pytest.raises(ImportError, match="lion"):
        cpu.check_layout({name: n for name, n in _cpu.layout().items() if name != "lion"})
    assert Table(Lists([torch.ones(3)], [Slot()], [0]), torch.float32, table([[0]]), 4).programs == 1
