"""The table of optimizers agrees with the optimizers."""

import inspect

import pytest

from ncollapse import optim
from ncollapse.optimizer_table import FAMILY_COLOURS, PAPER_OPTIMIZERS, TABLE, OptimizerRow
from ncollapse.train.config import RunConfig

ROWS = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)


@ROWS
def test_a_row_takes_the_numbers_of_its_class(row: OptimizerRow) -> None:
    arguments = inspect.signature(optim.by_name(row.family)).parameters
    found = {"momentum"} if {"momentum", "betas"} & arguments.keys() else set()
    found |= {"beta2"} if "betas" in arguments else set()
    found |= {"eps"} & arguments.keys()
    assert set(row.takes) == found


@ROWS
def test_a_row_gives_a_run_its_family_and_coupling(row: OptimizerRow) -> None:
    run = RunConfig(optimizer=row.name)
    assert (run.family, run.coupling) == (row.family, row.coupling)
    assert row.dashed == (row.coupling == 0)
    assert (row.colour, row.dark_colour) == FAMILY_COLOURS[row.family]


def test_only_rules_that_work_by_element_share_stacks() -> None:
    assert all(optim.by_name(row.family).rule.elementwise != row.own_stack for row in TABLE.values())


def test_the_paper_compares_six() -> None:
    assert PAPER_OPTIMIZERS == ("sgd", "sgdw", "signum", "signumw", "adam", "adamw")
