"""Workload W: 32 requests of 64 prompt and 64 output tokens, greedy, no early end.

Case ``base``: no request has a prefix. Case ``mixed``: request i runs under soft prompt i, 20
virtual tokens each, all different.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REQUESTS, PROMPT, OUTPUT, VIRTUAL = 32, 64, 64, 20
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and one PEFT adapter folder for each."""

    prompts: list[list[int]]
    adapters: list[Path]


def make(model: Any, tokenizer: Any, folder: Path) -> Workload:
    """Cut prompts from the text of the license; make soft prompts of noisy word embeddings."""
    tokens = tokenizer.encode(" ".join(TEXT.read_text().split()))
    stride = (len(tokens) - PROMPT) // (REQUESTS - 1)
    prompts = [tokens[i * stride : i * stride + PROMPT] for i in range(REQUESTS)]
    generator = torch.Generator().manual_seed(0)
    table = model.get_input_embeddings().weight.detach().float()
    adapters = []
    for i in range(REQUESTS):
        ids = torch.randint(1000, 40000, (VIRTUAL,), generator=generator)
        noise = 0.02 * torch.randn(VIRTUAL, table.shape[1], generator=generator)
        adapters.append(_save(table[ids] + noise, folder / f"soft-{i:02}"))
    return Workload(prompts, adapters)


def _save(values: torch.Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"prompt_embeddings": values.contiguous()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": len(values),
        "token_dim": values.shape[1],
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
