"""LLaMA-Adapter as PEFT saves it, pushed and shown by the command line."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from tests.api.api_world import BASE, World, make_world
from tests.cli.served_shell import Shell, shell
from tests.clients.loopback import serving
from tests.model.tiny_folder import tiny_llama

__all__ = ["shell"]

pytestmark = [  # of PEFT, by transformers
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTH, LAYERS = 3, 2
SHOWN = {"kind": "adaption_prompt", "peft_type": "ADAPTION_PROMPT", "num_virtual_tokens": LENGTH}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    base = replace(BASE, attention_module="model.layers.{}.self_attn")
    folder = tmp_path_factory.mktemp("world")
    with make_world(folder, base=base) as world:
        world.served = replace(world.served, prefix_warnings=lambda _: ["not in sight"])
        with serving(world.make_app()) as url:
            yield world, url


@pytest.fixture(scope="module")
def adapted() -> peft.PeftModel:
    """A Llama of the served base's sizes, with an adaption prompt in each layer."""
    model = tiny_llama(hidden_size=BASE.embedding_width, num_key_value_heads=2)
    config = peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=LAYERS
    )
    wrapped = peft.get_peft_model(model, config)
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape)
    return wrapped


@pytest.mark.parametrize("is_pickled", [False, True], ids=["safetensors", "bin"])
def test_a_folder_that_peft_saved_is_pushed_and_shown(
    shell: Shell,
    adapted: peft.PeftModel,
    tmp_path: Path,
    is_pickled: bool,
) -> None:
    folder, name = tmp_path / "saved", "bin" if is_pickled else "safe"
    adapted.save_pretrained(str(folder), safe_serialization=not is_pickled)
    assert (folder / f"adapter_model.{'bin' if is_pickled else 'safetensors'}").is_file()
    pushed = shell("prefix", "push", name, folder)
    assert "not in sight" not in pushed.stderr  # all tokens see it
    line = pushed.stdout
    assert line.startswith(f"{name}@1  uploaded  adaption_prompt, 3 virtual tokens, ")
    (row,) = (r for r in shell("prefix", "ls").stdout.splitlines() if r.startswith(name))
    assert row.split()[:5] == [f"{name}@1", "adaption_prompt", "3", "tiny", "latest"]
    assert SHOWN.items() <= shell.json("prefix", "show", name).items()
    lines = shell("prefix", "show", name).stdout.splitlines()
    assert {(key, str(value)) for key, value in SHOWN.items()} <= {(*s.split(),) for s in lines}
    pulled = tmp_path / "pulled"
    shell("prefix", "pull", name, pulled)
    again = shell("prefix", "push", name, pulled).stdout
    assert again.startswith(f"{name}@1  already there")
