"""The demo model's weights in the form that each engine loads, and the prefixes as PEFT folders.

Everything is made once in a folder and then reused. All forms hold the same dequantized weights:
``float32`` and ``bfloat16`` are Hugging Face folders, ``gguf`` is llama.cpp's file in bfloat16,
``openvino`` is made by its own environment (``peers/export_openvino.py``).
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.workloads import (
    KV_TOKENS,
    LARGEST_ID,
    SMALLEST_ID,
    SOFT_TOKENS,
    kv_names,
    soft_names,
)
from prefixd.server.model.demo import default_cache_dir, demo_model

NOISE = 0.02


def model_path(folder: Path, form: str) -> Path:
    """The weights in one form, made on first use. Raises FileNotFoundError for a form that another
    environment makes and has not made."""
    if form == "float32":
        return demo_model(default_cache_dir())
    path = folder / "models" / (f"{form}.gguf" if form == "gguf" else form)
    makers = {"bfloat16": _make_bfloat16, "gguf": _make_gguf}
    if not path.exists():
        if form not in makers:
            raise FileNotFoundError(f"{path} does not exist: run benchmarks/peers/install.sh")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}-{os.getpid()}")
        makers[form](partial)
        partial.rename(path)
    return path


def _make_bfloat16(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  # slow

    source = demo_model(default_cache_dir())
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def _make_gguf(target: Path) -> None:
    from benchmarks.gguf_bfloat16 import write_bfloat16  # noqa: PLC0415  # needs gguf

    write_bfloat16(target)


def prefixes(folder: Path) -> Mapping[str, dict[str, Any]]:
    """Every prefix, as the pipe wants it: soft prompts of noisy word embeddings, and KV prefixes
    that hold the KV of random tokens, so that an engine without KV prefixes can run the tokens."""
    index = folder / "prefixes" / "index.json"
    if not index.exists():
        shutil.rmtree(index.parent, ignore_errors=True)
        index.parent.mkdir(parents=True)
        index.write_text(json.dumps(_make_prefixes(index.parent)))
    described: dict[str, dict[str, Any]] = json.loads(index.read_text())
    return described


@torch.inference_mode()
def _make_prefixes(folder: Path) -> dict[str, dict[str, Any]]:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # slow

    model = AutoModelForCausalLM.from_pretrained(demo_model(default_cache_dir())).eval()
    generator = torch.Generator().manual_seed(0)
    table = model.get_input_embeddings().weight.float()
    described: dict[str, dict[str, Any]] = {}
    for name in soft_names():
        ids = torch.randint(SMALLEST_ID, LARGEST_ID, (SOFT_TOKENS,), generator=generator)
        noise = NOISE * torch.randn(SOFT_TOKENS, table.shape[1], generator=generator)
        save_peft(folder / name, "PROMPT_TUNING", table[ids] + noise, model.config)
        described[name] = _described(folder / name, "soft", None)
    for name in kv_names():
        ids = torch.randint(SMALLEST_ID, LARGEST_ID, (1, KV_TOKENS), generator=generator)
        cache = model(ids, use_cache=True).past_key_values
        save_peft(folder / name, "PREFIX_TUNING", _flat(cache), model.config)
        described[name] = _described(folder / name, "kv", ids[0].tolist())
    return described


def _described(folder: Path, kind: str, tokens: list[int] | None) -> dict[str, Any]:
    return {"folder": str(folder), "kind": kind, "tokens": tokens}


def _flat(cache: Any) -> torch.Tensor:
    """[tokens, layers * 2 * kv_heads * head_dim]: PEFT's layout, keys before values."""
    states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
    # Each is [1, kv_heads, tokens, head_dim].
    return torch.cat([state[0].transpose(0, 1).flatten(1) for state in states], 1)


def save_peft(folder: Path, peft_type: str, values: torch.Tensor, config: Any) -> None:
    """Write a prefix as PEFT saves it."""
    folder.mkdir(parents=True)
    save_file({"prompt_embeddings": values.contiguous()}, folder / "adapter_model.safetensors")
    width = config.hidden_size
    if peft_type == "PREFIX_TUNING":
        width = config.head_dim * config.num_key_value_heads
    described = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": len(values),
        "token_dim": width,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_key_value_heads,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    if peft_type == "PREFIX_TUNING":
        described |= {"prefix_projection": False, "encoder_hidden_size": width}
    (folder / "adapter_config.json").write_text(json.dumps(described))
