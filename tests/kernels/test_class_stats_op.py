"""Class statistics as torch operators, with the CPU's kernel or reference."""

import pytest
import torch

from class_stats_cases import MOMENTS, batch, check, copied, empty, same_bits
from ncollapse.kernels.class_stats.op import class_stats_op, project_op
from ncollapse.kernels.class_stats.reference import class_stats_reference, project_reference

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("runs", [None, 2])
def test_the_operator_declares_all_that_it_changes(runs: int | None, moment: str) -> None:
    """And changes all that it declares. torch checks the schema, the fake tensors and the tracing."""
    features, labels = batch(20, 3, 6, runs=runs)
    state = empty(3, 6, moment, runs=runs)
    result = torch.library.opcheck(class_stats_op, (features, labels, *state, False), test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}
    before = copied(state), features.clone(), labels.clone()
    class_stats_op(features, labels, *state, False)
    class_stats_op(features, labels + 9, *state, False)
    changed = [
        name for name, t, b in zip(state._fields, state, before[0], strict=True) if t is not None and not t.equal(b)
    ]
    written = ["counts", "shifts", "sums", "squares", *(["scatter"] if moment != "trace" else []), "refused"]
    assert changed == written
    assert features.equal(before[1])
    assert labels.equal(before[2])


@pytest.mark.parametrize("runs", [None, 2])
def test_the_operator_of_projections(runs: int | None) -> None:
    features, labels = batch(20, 3, 6, runs=runs, dtype=torch.bfloat16)
    lead = () if runs is None else (runs,)
    shifts, axes = torch.randn(*lead, 3, 6), torch.randn(*lead, 2, 6)
    arguments = features, labels, shifts, axes
    assert set(torch.library.opcheck(project_op, arguments, test_utils=CHECKS).values()) == {"SUCCESS"}
    torch.testing.assert_close(project_op(*arguments), project_reference(*arguments), rtol=1e-5, atol=1e-4)
    # With any strides.
    strided = project_op(features.mT.contiguous().mT, labels.repeat_interleave(2)[::2], shifts, axes.mT.contiguous().mT)
    torch.testing.assert_close(strided, project_reference(*arguments), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("moment", MOMENTS)
def test_in_a_compiled_function(moment: str) -> None:
    """One graph for batches of any size, with the bits of the eager function."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x)
        class_stats_op(h, y, *state, False)
        return h.sum()

    state, eager, expected = empty(4, 7, moment), empty(4, 7, moment), empty(4, 7, moment, dtype=torch.float64)
    for rows in (30, 17, 1):
        features, labels = batch(rows, 4, 7)
        step(features, labels)
        class_stats_op(torch.relu(features), labels, *eager, False)
        class_stats_reference(torch.relu(features), labels, expected)
    assert same_bits(state, eager)
    check(state, expected)
