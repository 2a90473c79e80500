"""Families are served with the tokens of PEFT and transformers, or refused with a reason."""

from pathlib import Path

import pytest

from tests.golden.families import EXPERTS, FAMILIES
from tests.golden.families_table import COLUMNS, measure, read_table

SERVED_BEFORE = [
    "arcee",
    "bitnet",
    "cohere",
    "dots1",
    "ernie4_5",
    "gemma",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "olmo",
    "olmo2",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "starcoder2",
    "lfm2, attention only",
]
"""Served by the first release: none may be lost."""


def test_the_table_has_a_row_for_each_family_and_a_result_for_each_kind() -> None:
    table = read_table()
    assert list(table) == list(FAMILIES)
    for row in table.values():
        assert len(row.cells) == len(COLUMNS)
        refused = row.cells[0].startswith("refused: ") and not any(row.cells[1:])
        assert refused or set(row.cells) <= {"equal", "equal*"}, row


@pytest.mark.parametrize("name", [*SERVED_BEFORE, *EXPERTS])
def test_what_was_served_and_mixtures_of_experts_are_served(name: str) -> None:
    assert set(read_table()[name].cells) <= {"equal", "equal*"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_is_served_or_refused_as_the_table_says(name: str, tmp_path: Path) -> None:
    assert measure(name, tmp_path) == read_table()[name]
