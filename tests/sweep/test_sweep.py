"""Families are served with the tokens of PEFT and transformers, or refused, as the page says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.families import EXPERTS, FAMILIES
from tests.sweep.sweep_kinds import KINDS
from tests.sweep.sweep_models import SWEEP, WINDOW, sweep_model
from tests.sweep.sweep_page import read_page
from tests.sweep.sweep_row import examine

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUICK = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_next", "bloom")
"""Part of ``make check``: full attention, a window, sinks, latents, a state, ALiBi."""

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


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.sweep) for n in SWEEP]
)
def test_a_family_is_served_or_refused_as_the_page_says(name: str, tmp_path: Path) -> None:
    assert examine(name, tmp_path) == read_page()[name]


def test_the_page_has_a_row_for_each_family_and_a_result_for_each_kind() -> None:
    page = read_page()
    assert sorted(page) == sorted(SWEEP)
    for row in page.values():
        assert bool(row.refused) != bool(row.cells)
        assert row.refused or list(row.cells) == list(KINDS)
        words = {cell.partition(":")[0] for cell in row.cells.values()}
        assert words <= {"equal", "none", "refused"}, row
        assert row.refused or row.cells["base"] == row.cells["text"] == "equal", row


@pytest.mark.parametrize("name", [*SERVED_BEFORE, *EXPERTS])
def test_what_was_served_and_mixtures_of_experts_are_served(name: str) -> None:
    assert not read_page()[name].refused


def test_of_61_families_at_least_52_are_served() -> None:
    families = list(FAMILIES)[:61]
    assert families == sorted(families), "the popular families come first"
    page = read_page()
    assert sum(not page[family].refused for family in families) >= 52


def _without_attention_in_one_layer(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()


def _with_one_head_of_less_weight(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight.data[:16] *= 0.5


@pytest.mark.parametrize("change", [_without_attention_in_one_layer, _with_one_head_of_less_weight])
def test_a_model_that_attends_differently_turns_all_kinds_red(change: Any, tmp_path: Path) -> None:
    model = sweep_model("llama")
    change(model)
    row = examine("llama", tmp_path, served_model=model)
    found = {cell.partition(":")[0] for cell in row.cells.values()}
    assert found - {"none"} == {"differs"}


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_window_longer_by_one_turns_all_kinds_red(name: str, tmp_path: Path) -> None:
    row = examine(name, tmp_path, served_model=sweep_model(name, window=WINDOW + 1))
    found = {cell.partition(":")[0] for cell in row.cells.values()}
    assert found - {"none"} == {"differs"}
