"""The update as a torch operator."""

import pytest
import torch

import ncollapse.kernels.update.op  # noqa: F401  (registers it)


@pytest.mark.parametrize("observed", [False, True], ids=["plain", "observed"])
@pytest.mark.parametrize(("code", "states"), [(0, 0), (0, 1), (2, 3)], ids=["sgd", "momentum", "adam"])
def test_the_operator_declares_all_that_it_changes(code: int, states: int, observed: bool) -> None:
    """And changes all that it declares. torch checks the schema, the fake tensors and the tracing."""
    params, grads, first, second, copies = ([torch.rand(3, 2) for _ in range(2)] for _ in range(5))
    steps = [torch.zeros(()) for _ in range(2)]
    firsts, seconds, counts = (t if n < states else [] for n, t in enumerate((first, second, steps)))
    values = torch.tensor([[0.1, 0.01, 0.5, 0.9, 0.999, 1e-8]], dtype=torch.float64)
    norms = torch.zeros(1, 2, dtype=torch.float64)
    copies = [c.bfloat16() for c in copies]
    extra = (copies, norms) if observed else ([], None)
    bits = 2**states - 1 + 8 * observed
    numbers = ([values], [], [], [code], [1], [0, 0], [bits, bits])
    arguments = (params, grads, firsts, seconds, counts, *extra, *numbers, None, None)
    operator = torch.ops.ncollapse.update.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(torch.library.opcheck(operator, arguments, test_utils=tests).values()) == {"SUCCESS"}
    changed = [*params, *firsts, *seconds, *counts, *(t for t in (*copies, norms) if observed)]
    before = [t.clone() for t in (*changed, *grads)]
    operator(*arguments)
    assert [not torch.equal(t, b) for t, b in zip((*changed, *grads), before, strict=True)] == [True] * len(changed) + [
        False
    ] * 2
