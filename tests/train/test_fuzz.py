"""Hostile and damaged inputs, a few of each kind: `tests/support/fuzzing.py` says what must hold."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzzing
from ncollapse.train.errors import UserError
from ncollapse.train.grid import load_grid
from ncollapse.train.results.checkpoint_file import seal, unseal

FEW = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(("kind", "trials"), [("grid", 400), ("option", 20), ("checkpoint", 30), ("image", 80)])
def test_what_is_damaged_is_refused_with_words(kind: str, trials: int) -> None:
    said = [fuzzing.trial(kind, seed) for seed in range(trials)]
    assert said.count("refused") > trials / 4


@pytest.mark.parametrize("part", range(2))
def test_a_damaged_folder_leads_nowhere_else_and_to_no_other_number(part: int) -> None:
    said = [fuzzing.trial("store", seed) for seed in range(part, 40, 2)]
    assert said.count("refused") > len(said) / 4


@FEW
@given(text=st.text(max_size=200) | st.text(st.sampled_from("[]{}=\"'.,#\n truefalsinan0123"), max_size=60))
def test_any_text_is_a_grid_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text, "utf-8", errors="replace")
    with contextlib.suppress(UserError):
        load_grid(str(path))


@FEW
@given(content=st.binary(max_size=50), epoch=st.integers(1, 10**6), data=st.data())
def test_any_flipped_bit_of_a_checkpoint_is_seen(content: bytes, epoch: int, data: st.DataObject) -> None:
    whole = seal(content, epoch)
    assert unseal(whole, epoch) == content
    flipped = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UserError, match="damaged"):
        unseal(bytes(flipped), epoch)
    with pytest.raises(UserError, match=f"is of epoch {epoch}, not of epoch {epoch + 1}"):
        unseal(whole, epoch + 1)


def test_a_repetition_is_the_same_trial(tmp_path: Path) -> None:
    for kind in fuzzing.KINDS:
        assert fuzzing.trial(kind, 3) == fuzzing.trial(kind, 3)
        assert re.fullmatch("taken|refused", fuzzing.trial(kind, 3))
