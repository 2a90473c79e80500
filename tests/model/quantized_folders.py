"""Small checkpoints with quantized weights, made as users make them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerTensor,
)

from tests.model.tiny_folder import edit_json, save_folder, tiny_llama, tiny_tokenizer

WIDTH = 32

SCHEMES: dict[str, Any] = {
    "weights": Int8WeightOnlyConfig(),
    "rows": Int8DynamicActivationInt8WeightConfig(),
    "batch": Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()),
    "float8": Float8WeightOnlyConfig(),
}
"""Schemes of torchao: weights in int8; inputs too, by row; inputs by batch; weights in float8."""


def plain_folder(folder: Path, **config: Any) -> Path:
    """A Llama whose attention matters, unquantized."""
    model = tiny_llama(hidden_size=WIDTH, intermediate_size=2 * WIDTH, **config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4.0)
    return save_folder(model, folder)


def torchao_folder(plain: Path, folder: Path, scheme: str) -> Path:
    """What transformers saves of ``plain``, quantized by torchao."""
    config = transformers.TorchAoConfig(SCHEMES[scheme])
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def float8_folder(plain: Path, folder: Path) -> Path:
    """``plain`` with the layers in float8 and a scale for each block, as DeepSeek saves them."""
    size = WIDTH // 2
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // size, size, columns // size, size)
        scales = blocks.abs().amax((1, 3)) / 448
        scaled = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        tensors |= {name: scaled.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_folder(tiny_llama(), folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((plain / "config.json").read_text())
    edit_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [size, size],
        },
    )
    return folder
