"""A pulled folder loads in PEFT and gives the tokens of the adapter that was uploaded."""

import json
from pathlib import Path

import peft
import pytest

from prefixd.client.artifacts import read_artifact
from prefixd.client.folders import write_version
from prefixd.client.types import Prefix
from prefixd.store.artifact.artifact import pack_peft
from tests.clients.samples import MANIFEST
from tests.golden.golden_harness import (
    Adapter,
    make_adapter,
    peft_configs,
    plain_generate,
    prompts,
    tiny_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 12


@pytest.mark.parametrize("peft_type", list(peft_configs(1)))
def test_pulled_folder_in_peft_gives_the_tokens_of_the_upload(
    peft_type: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    adapter = make_adapter(model, peft_type, 9, tmp_path / "adapter")
    packed = pack_peft(
        (adapter.folder / "adapter_config.json").read_bytes(),
        adapter.folder / "adapter_model.safetensors",
        tmp_path / "stored",
        task_id=adapter.task_id,
    )
    manifest = json.dumps(MANIFEST | {"digest": packed.digest})
    prefix = Prefix.model_validate_json(manifest)
    stored = read_artifact((tmp_path / "stored").read_bytes(), prefix)
    write_version(tmp_path / "pulled", prefix, stored)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "pulled").eval()
    pulled = Adapter(loaded, tmp_path / "pulled", adapter.task_id)
    for prompt in prompts(3, seed=5):
        tokens = adapter.generate(prompt, COUNT)
        assert pulled.generate(prompt, COUNT) == tokens
        assert tokens != plain_generate(tiny_model("llama"), prompt, COUNT)
