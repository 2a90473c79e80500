"""A base in the serving dtype equals the one that transformers loads in that dtype."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prefixd.server.model.load import DTYPES, prepare_base

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_take_the_serving_dtype_and_rotary_frequencies_stay_exact(
    dtype: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=DTYPES[dtype])
    base = prepare_base(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"),
        None,
        name="tiny",
        dtype=dtype,
        device="cpu",
    ).module
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(reference, kind)())
        assert expected, kind
        for name, tensor in getattr(base, kind)():
            torch.testing.assert_close(tensor, expected.pop(name), rtol=0, atol=0, msg=name)
        assert not expected
