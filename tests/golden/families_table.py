"""How each family is served: the table of docs/models.md.

``python -m tests.golden.families_table`` writes it.
"""

import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from prefixd.server.engine.request import PrefixHandle
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.prefix import KVPrefix, SoftPrompt
from tests.golden.families import FAMILIES, family_model
from tests.golden.golden_harness import (
    Adapter,
    Served,
    make_adapter,
    plain_generate,
    prompts,
    serve,
)

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
KINDS = {  # column of the table: PEFT type
    "soft prompt": "PROMPT_TUNING",
    "P-tuning": "P_TUNING",
    "KV prefix": "PREFIX_TUNING",
    "CPT": "CPT",
}
COLUMNS = ("base", "text", *KINDS)
VIRTUAL_TOKENS = 21
COUNT = 12


@dataclass(frozen=True)
class Row:
    """One line of the table: how each kind was found equal, or why the model is refused."""

    name: str
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"| {self.name} | {' | '.join(self.cells)} |"


def measure(name: str, folder: Path) -> Row:
    """Serve a family and compare all kinds with PEFT and transformers."""
    model = family_model(name)
    try:
        served = serve(model)
    except UnsupportedModel as error:
        return Row(name, (f"refused: {error}", *[""] * (len(COLUMNS) - 1)))
    try:
        return Row(name, tuple(_cells(model, served, folder)))
    finally:
        served.engine.stop()


def _cells(model: Any, served: Served, folder: Path) -> list[str]:
    text = prompts(3, seed=5)[2]
    plain = _compared(served, None, lambda prompt: plain_generate(model, prompt, COUNT))
    under_text = _compared(
        served,
        served.add_tokens(text),
        lambda prompt: plain_generate(model, [*text, *prompt], COUNT),
    )
    cells = [plain, under_text]
    width = served.base.shape.embedding_width
    for kind, peft_type in KINDS.items():
        token_dim = None if peft_type == "PREFIX_TUNING" else width
        adapter = make_adapter(model, peft_type, VIRTUAL_TOKENS, folder / kind, token_dim=token_dim)
        cells.append(_adapter_cell(model, served, adapter))
    return cells


def _adapter_cell(model: Any, served: Served, adapter: Adapter) -> str:
    handle = served.add(adapter)
    try:
        adapter.generate([3], 1)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        # PEFT itself cannot run this kind on this family: give transformers the same prefix.
        prefix = served.prefixes[handle.key]
        return (
            _compared(served, handle, lambda prompt: _generate_under(model, prefix, prompt)) + "*"
        )
    return _compared(served, handle, lambda prompt: adapter.generate(prompt, COUNT))


def _compared(
    served: Served, handle: PrefixHandle | None, reference: Callable[[list[int]], list[int]]
) -> str:
    """Whether all tokens are equal, and whether the prefix changes any."""
    changed = handle is None
    for prompt in prompts(3, seed=2):
        tokens = served.generate(prompt, handle, count=COUNT)
        if tokens != reference(prompt):
            return "differs"
        changed = changed or tokens != served.generate(prompt, count=COUNT)
    return "equal" if changed else "no effect"


def _generate_under(model: Any, prefix: Any, prompt: list[int]) -> list[int]:
    """transformers' greedy tokens under a prefix, without PEFT."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {
        "attention_mask": torch.ones(1, prefix.num_tokens + len(prompt), dtype=torch.long),
        "max_new_tokens": COUNT,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.no_grad():
        if isinstance(prefix, SoftPrompt):
            embeddings = torch.cat([prefix.embeddings, model.get_input_embeddings()(ids[0])])
            out = model.generate(inputs_embeds=embeddings[None], **options)
            return list(out[0].tolist())
        assert isinstance(prefix, KVPrefix)
        heads = model.config.get_text_config().num_key_value_heads
        split = prefix.kv.view(len(prefix.kv), prefix.num_tokens, heads, -1).transpose(1, 2)[
            :, None
        ]
        cache = DynamicCache()
        for layer in range(len(split) // 2):
            cache.update(split[2 * layer], split[2 * layer + 1], layer)
        out = model.generate(input_ids=ids, past_key_values=cache, **options)
        return list(out[0, len(prompt) :].tolist())


def read_table() -> dict[str, Row]:
    """The rows of docs/models.md."""
    table = PAGE.read_text("utf-8").partition("<!-- families:begin -->")[2]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows[1:]]
    return {name: Row(name, tuple(rest)) for name, *rest in cells}


def write_table() -> None:
    """Measure every family and replace the table of docs/models.md."""
    lines = [f"| Family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        lines += [str(measure(name, Path(folder) / name)) for name in FAMILIES]
    table = "<!-- families:begin -->\n" + "\n".join(lines) + "\n<!-- families:end -->"
    page = PAGE.read_text("utf-8")
    pattern = "<!-- families:begin -->.*<!-- families:end -->"
    PAGE.write_text(re.sub(pattern, lambda _: table, page, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write_table()
