"""Files in the formats of other tools, recognised by their content."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prefixd.client.convert.archives import opened_archive
from prefixd.client.convert.checkpoints import Checkpoint, opened_checkpoint
from prefixd.client.convert.formats import (
    EMBEDDINGS,
    Converted,
    cartridge,
    is_of_prefix_encoder,
    listed,
    peft_tensors,
    prefix_encoder,
    prompt_table,
    soft_prompt,
)
from prefixd.client.convert.search import ENCODER_FILE
from prefixd.client.convert.symbols import StoredTensor, shown
from prefixd.client.convert.tables import MAGIC, read_kobold, read_table
from prefixd.client.convert.tensors import write_safetensors
from prefixd.client.errors import FormatError

MAX_BASE_CONFIG_BYTES = 1024 * 1024


def read_prefix(path: Path, *, task_id: int | None) -> Converted:
    """The prefix in a file; FormatError, with the path, for a file that holds none."""
    with _named(path):
        if path.name == ENCODER_FILE:
            raise FormatError(
                "a prompt of an encoder-decoder model; expected decoder.pt alone, of a decoder"
            )
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
        if magic == MAGIC:
            return prompt_table(read_table(path), task_id=task_id)
        if magic[:2] == b"PK" and _is_kobold(path):
            tensor, metadata = read_kobold(path)
            return replace(soft_prompt(tensor, origin="KoboldAI"), metadata=metadata)
        with opened_checkpoint(path) as checkpoint:
            return _of_checkpoint(checkpoint, path)


def read_peft_weights(path: Path) -> bytes:
    """The tensors of PEFT's ``adapter_model.bin`` as the bytes of a safetensors file."""
    with _named(path), opened_checkpoint(path) as checkpoint:
        if not isinstance(checkpoint.value, dict):
            raise FormatError(f"expected tensors by name, found {shown(checkpoint.value)}")
        return write_safetensors(peft_tensors(checkpoint.value, checkpoint.tensor))


def _is_kobold(path: Path) -> bool:
    with opened_archive(path) as archive:
        return "tensor.npy" in archive.NameToInfo


def _of_checkpoint(checkpoint: Checkpoint, path: Path) -> Converted:
    value, read = checkpoint.value, checkpoint.tensor
    if isinstance(value, StoredTensor):
        return soft_prompt(read(value, name="tensor"), origin="text-generation-inference")
    if not isinstance(value, dict):
        raise FormatError(f"expected tensors, found {shown(value)}")
    if EMBEDDINGS in value:
        raise FormatError("PEFT's weights: expected adapter_config.json next to them")
    if "trainable_keys" in value:
        return cartridge(value, read)
    if any(map(is_of_prefix_encoder, value)):
        converted = prefix_encoder(value, read)
        return replace(converted, config=converted.config | _base_facts(path.parent, converted))
    raise FormatError(
        "expected a prefix of PEFT, Cartridges, P-tuning v2 or text-generation-inference, found "
        f"the names {listed(value)}"
    )


def _base_facts(folder: Path, converted: Converted) -> dict[str, object]:
    """What the base's ``config.json`` next to a prefix encoder says, as the Trainer saves it.

    The tensor alone has layers * 2 * KV width columns, which several models share.
    """
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > MAX_BASE_CONFIG_BYTES:
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise FormatError("the config.json next to it is not valid JSON") from None
    fields = config if isinstance(config, dict) else {}
    layers = fields.get("num_hidden_layers", fields.get("num_layers"))
    if type(layers) is not int or layers < 1:
        return {}
    if converted.embeddings.shape[1] % (2 * layers):
        raise FormatError(
            f"the config.json next to it says {layers} layers, which do not divide the "
            f"{converted.embeddings.shape[1]} columns"
        )
    return {"num_layers": layers}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the path before the message of an error."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
