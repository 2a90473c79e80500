"""Prefixes of other tools as PEFT's config and tensors.

============================  ====================================================================
Cartridges                    ``{trainable,frozen}_{keys,values}``: for each layer
                              [1, KV heads, tokens, head_dim]
P-tuning v2                   ``prefix_encoder.embedding.weight``: [tokens, layers * 2 * KV width],
                              or [tokens, hidden] and the linear layers ``trans.0``, ``trans.2``
text-generation-inference     one tensor, [tokens, hidden]
TensorRT-LLM                  [tasks, tokens, hidden] or [tokens, hidden]
KoboldAI                      [tokens, hidden]
============================  ====================================================================

A KV prefix of PEFT is [tokens, layers, K and V, KV heads, head_dim], with all axes except the first
flat. P-tuning v2 has the same order.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prefixd.client.convert.symbols import shown
from prefixd.client.convert.tensors import (
    Array,
    Tensor,
    check_size,
    same_dtype,
    widened,
    write_safetensors,
)
from prefixd.client.errors import FormatError

EMBEDDINGS = "prompt_embeddings"
MULTITASK = {"prefix_task_cols", "prefix_task_rows"}
ADAPTION = (".adaption_prompt", ".adaption_gate")

Read = Callable[..., Tensor]
"""``read(stored, name=…)``: the values of a tensor of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A prefix in PEFT's form: fields of ``adapter_config.json``, and ``prompt_embeddings``.

    ``origin`` names the format it comes from; ``notes`` say what of the file is not in it.
    ``is_task``: it is one of the tasks of the file, so that no task is left to choose.
    """

    origin: str
    config: dict[str, object]
    embeddings: Tensor
    metadata: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_task: bool = False

    def config_file(self) -> bytes:
        """The bytes of ``adapter_config.json``."""
        return json.dumps(self.config, indent=2, sort_keys=True).encode("ascii")

    def weights_file(self) -> bytes:
        """The bytes of ``adapter_model.safetensors``."""
        return write_safetensors({EMBEDDINGS: self.embeddings})


def soft_prompt(tensor: Tensor, *, origin: str) -> Converted:
    """Embeddings of virtual tokens, [tokens, hidden], as prompt tuning."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise FormatError(
            f"expected embeddings [tokens, hidden], found the shape {list(tensor.shape)}"
        )
    config = _config("PROMPT_TUNING", tokens=tensor.shape[0], token_dim=tensor.shape[1])
    return Converted(origin, config, tensor)


def prompt_table(tensor: Tensor, *, task_id: int | None) -> Converted:
    """One task of a table of TensorRT-LLM as prompt tuning.

    The table pads shorter tasks with rows of zeros at the end, which are left out.
    """
    if len(tensor.shape) == 2:
        tensor = tensor.replace(tensor.values[np.newaxis])
    if len(tensor.shape) != 3:
        raise FormatError(
            "expected [tasks, tokens, hidden] or [tokens, hidden], found the shape "
            f"{list(tensor.shape)}"
        )
    tasks = tensor.shape[0]
    if task_id is None and tasks != 1:
        raise FormatError(
            f"the table has {tasks} tasks: choose one with --task-id, 0 to {tasks - 1}"
        )
    if not 0 <= (task_id or 0) < tasks:
        raise FormatError(f"expected a task id from 0 to {tasks - 1}, found {task_id}")
    rows = tensor.values[task_id or 0]
    used = np.flatnonzero(rows.any(axis=1)) if tasks > 1 else np.arange(len(rows))
    length = int(used[-1]) + 1 if len(used) else 0
    notes = () if length == len(rows) else (f"left out {len(rows) - length} rows of padding",)
    prompt = soft_prompt(tensor.replace(rows[:length]), origin="TensorRT-LLM")
    return replace(prompt, notes=notes, is_task=True)


def cartridge(checkpoint: Mapping[Any, Any], read: Read) -> Converted:
    """A checkpoint of Cartridges' TrainableCache. Early versions say fixed instead of frozen."""
    frozen = "fixed" if "fixed_keys" in checkpoint else "frozen"
    names = {f"{part}_{kind}" for part in (frozen, "trainable") for kind in ("keys", "values")}
    if set(checkpoint) not in (names, {"trainable_keys", "trainable_values"}):
        raise FormatError(
            f"expected a cartridge with {', '.join(sorted(names))}; found {listed(checkpoint)}"
        )
    parts = [_cache(checkpoint, part, read) for part in (frozen, "trainable")]
    used = [part for part in parts if part is not None]
    if not used or any(part.shape[1:] != used[0].shape[1:] for part in used):
        raise FormatError("expected the same layers, KV heads and head_dim in all of a cartridge")
    values: Array = np.concatenate([part.values for part in used])
    tokens, layers, _, heads, head_dim = values.shape
    if values.size == 0:
        raise FormatError(f"expected a cartridge with values, found the shape {list(values.shape)}")
    config = _config("CARTRIDGE", tokens=tokens, token_dim=heads * head_dim)
    config |= {"num_layers": layers, "num_attention_heads": heads}
    config["num_frozen_tokens"] = 0 if parts[0] is None else len(parts[0].values)
    dtype = same_dtype(used, name="cartridge")
    return Converted("Cartridges", config, Tensor(dtype, values.reshape(tokens, -1)))


def _cache(checkpoint: Mapping[Any, Any], part: str, read: Read) -> Tensor | None:
    """Keys and values of all layers, [tokens, layers, 2, KV heads, head_dim]; None without any."""
    kinds = [checkpoint.get(f"{part}_{kind}") for kind in ("keys", "values")]
    if all(layers is None or layers in ([], ()) for layers in kinds):
        return None
    keys, values = (list(layers) if isinstance(layers, list | tuple) else None for layers in kinds)
    if keys is None or values is None or len(keys) != len(values):
        raise FormatError(f"expected {part}_keys and {part}_values to list the same layers")
    pairs = list(zip(keys, values, strict=True))
    shape: tuple[int, ...] = getattr(keys[0], "shape", ())
    for stored in (*keys, *values):
        if len(shape) != 4 or shape[:1] != (1,) or getattr(stored, "shape", ()) != shape:
            raise FormatError(
                f"expected tensors of one shape [1, KV heads, tokens, head_dim] in {part}_keys and "
                f"{part}_values, found {shown(stored)}"
            )
    check_size((len(pairs), 2, *shape), name=f"{part}_keys and {part}_values")
    tensors = [read(stored, name=part) for pair in pairs for stored in pair]
    dtype = same_dtype(tensors, name=part)
    stacked = np.stack([tensor.values[0] for tensor in tensors])  # [2 layers, heads, tokens, dim]
    _, heads, tokens, head_dim = stacked.shape
    by_token = stacked.transpose(2, 0, 1, 3)
    return Tensor(dtype, by_token.reshape(tokens, len(pairs), 2, heads, head_dim))


_PREFIX_ENCODER = re.compile(
    r"(?P<lead>|.*\bprefix_encoder\.)(?P<name>embedding\.weight|trans\.[02]\.(?:weight|bias))"
)


def is_of_prefix_encoder(name: object) -> re.Match[str] | None:
    """The match of a tensor's name, such as ``transformer.prefix_encoder.trans.0.weight``."""
    return _PREFIX_ENCODER.fullmatch(name) if isinstance(name, str) else None


def prefix_encoder(checkpoint: Mapping[Any, Any], read: Read) -> Converted:
    """The prefix encoder of P-tuning v2 as prefix tuning.

    Its network, ``trans.2(tanh(trans.0(embedding)))``, is applied in float32. Other tensors of the
    checkpoint, such as the frozen base, are left out.
    """
    encoders: dict[str, dict[str, object]] = {}
    for key, stored in checkpoint.items():
        if match := is_of_prefix_encoder(key):
            encoders.setdefault(match["lead"], {})[match["name"]] = stored
    if len(encoders) != 1:
        raise FormatError(f"expected one prefix encoder, found {listed(encoders)}")
    (weights,) = encoders.values()
    layers = [f"trans.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")]
    expected = {"embedding.weight", *layers} if len(weights) > 1 else {"embedding.weight"}
    if set(weights) != expected:
        raise FormatError(
            f"expected {', '.join(sorted(expected))} of a prefix encoder; found {listed(weights)}"
        )
    embeddings = read(weights["embedding.weight"], name="embedding.weight")
    if len(weights) > 1:
        embeddings = _project(embeddings, *(read(weights[name], name=name) for name in layers))
    if len(embeddings.shape) != 2 or 0 in embeddings.shape:
        raise FormatError(
            "embedding.weight: expected [tokens, layers * 2 * KV width], found the shape "
            f"{list(embeddings.shape)}"
        )
    unused = len(checkpoint) - len(weights)
    notes = (f"left out {unused} tensors that are not of the prefix encoder",) if unused else ()
    config = _config("PREFIX_TUNING", tokens=embeddings.shape[0], token_dim=None)
    return Converted("P-tuning v2", config, embeddings, notes=notes)


def _project(
    embeddings: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor
) -> Tensor:
    """[tokens, hidden] to [tokens, layers * 2 * KV width], float32."""
    shapes = [tensor.shape for tensor in (embeddings, first, first_bias, second, second_bias)]
    if [len(shape) for shape in shapes] != [2, 2, 1, 2, 1] or not (
        shapes[0][1] == shapes[1][1]
        and (shapes[1][0],) == shapes[2] == shapes[3][1:]
        and shapes[3][:1] == shapes[4]
    ):
        raise FormatError(
            "expected embedding.weight, trans.0 and trans.2 that fit together, found the shapes "
            + ", ".join(str(list(shape)) for shape in shapes)
        )
    check_size((shapes[0][0], shapes[3][0]), name="the values of the prefix encoder")
    check_size((shapes[0][0], shapes[1][0]), name="the hidden layer of the prefix encoder")
    with np.errstate(over="ignore", invalid="ignore"):  # the server refuses what is not finite
        hidden = np.tanh(widened(embeddings) @ widened(first).T + widened(first_bias))
        return Tensor("float32", hidden @ widened(second).T + widened(second_bias))


def peft_tensors(checkpoint: Mapping[Any, Any], read: Read) -> dict[str, Tensor]:
    """The tensors of PEFT's ``adapter_model.bin`` for a prefix."""
    names = {EMBEDDINGS} | (MULTITASK if MULTITASK & set(checkpoint) else set())
    if checkpoint and all(str(name).endswith(ADAPTION) for name in checkpoint):
        names = set(checkpoint)  # of which layers, the server compares with the config
    if set(checkpoint) != names:
        raise FormatError(
            f"expected {', '.join(sorted(names))}; found {listed(checkpoint)}. A prefix must not "
            "carry weights of the base model (LoRA, modules_to_save, resized embeddings)"
        )
    return {name: read(checkpoint[name], name=name) for name in sorted(names)}


def listed(names: Mapping[Any, Any]) -> str:
    """The first names of a checkpoint, for messages."""
    first = ", ".join(shown(name) for name in list(names)[:4])
    return first if len(names) <= 4 else f"{first} and {len(names) - 4} more"


def _config(peft_type: str, *, tokens: int, token_dim: int | None) -> dict[str, object]:
    return {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "token_dim": token_dim,
    }
