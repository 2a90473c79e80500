"""A prefix in a folder of its own: PEFT's two files or a text, and ``prefixd.json``.

::

    adapter_config.json, adapter_model.safetensors    as PEFT's save_pretrained writes them,
    prefix.txt                                        or the text of a hard prompt in UTF-8,
    composition.json                                  or {"stack": […]}, {"blend": {…}} or
                                                      {"ensemble": […], "combine": …}
    recipe.json                                       optional: how to call it
    prefixd.json                                      optional: {"task_id": 1, "metadata": {…}},
                                                      and {"role": "system"} of a text

``prefixd.json`` has what an upload needs in addition to the content. Its other fields describe the
version that the folder was pulled from; they are information, and no upload sends them.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Unpack

from prefixd.client import protocol
from prefixd.client.artifacts import Artifact
from prefixd.client.errors import FormatError
from prefixd.client.types import Prefix, Uploaded, composition_of
from prefixd.client.wire import Call, Preconditions, Progress

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEXT_FILE = "prefix.txt"
COMPOSITION_FILE = "composition.json"
INFO_FILE = "prefixd.json"
RECIPE_FILE = "recipe.json"

SENT = ("task_id", "metadata", "role")
"""Fields of ``prefixd.json`` that an upload sends."""

INFORMATION = ("name", "version", "digest", "kind", "base", "fingerprint", "created_at")
"""Fields of ``prefixd.json`` that describe where the folder came from."""

MAX_CONFIG_BYTES = 256 * 1024
"""Largest config that a server accepts: one that is longer when indented is written as short as
possible."""


@dataclass(frozen=True, slots=True)
class PeftContent:
    """The config and the safetensors of a PEFT prefix: bytes, or the files that hold them.

    ``metadata`` None: the folder has none, which is not the same as an empty one. ``recipe`` is
    that of a file of its own.
    """

    config: bytes | Path
    weights: bytes | Path
    task_id: int | None = None
    metadata: Mapping[str, object] | None = None
    recipe: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class TextContent:
    """The text of a hard prompt and its role (None: ``raw``), and the others as in
    ``PeftContent``."""

    text: str
    task_id: int | None = None
    metadata: Mapping[str, object] | None = None
    recipe: Mapping[str, object] | None = None
    role: str | None = None


@dataclass(frozen=True, slots=True)
class CompositionContent:
    """The members of a stack, a blend or an ensemble, and the others as in ``PeftContent``."""

    composition: Mapping[str, object]
    task_id: int | None = None
    metadata: Mapping[str, object] | None = None
    recipe: Mapping[str, object] | None = None


Content = PeftContent | TextContent | CompositionContent


def upload_folder(
    name: str,
    folder: Path,
    *,
    metadata: Mapping[str, object] | None = None,
    task_id: int | None = None,
    warm: bool = False,
    progress: Progress | None = None,
    **conditions: Unpack[Preconditions],
) -> Call[Uploaded]:
    """Upload a folder as a new version of ``name``: PEFT's files, ``prefix.txt`` or
    ``composition.json``.

    ``metadata`` and ``task_id`` replace those of its ``prefixd.json``; a ``recipe.json`` is sent
    with them. Raises ``FormatError`` for a folder that ``read_folder`` refuses; a missing file
    raises OSError when the call is sent.
    """
    content = read_folder(folder)
    return upload_content(
        name,
        content,
        metadata=metadata,
        task_id=task_id,
        warm=warm,
        progress=progress,
        **conditions,
    )


def upload_content(
    name: str,
    content: Content,
    *,
    metadata: Mapping[str, object] | None = None,
    task_id: int | None = None,
    warm: bool = False,
    progress: Progress | None = None,
    **conditions: Unpack[Preconditions],
) -> Call[Uploaded]:
    """Upload what was read from a folder; ``metadata`` and ``task_id`` replace its own.
    ``progress`` is of files, not of a text."""
    fields = dict(metadata if metadata is not None else content.metadata or {})
    task = fields.get("task_id", content.task_id) if task_id is None else task_id
    if task is not None:
        fields["task_id"] = task
    if content.recipe is not None:
        fields.setdefault("recipe", content.recipe)
    sent = None if metadata is None and content.metadata is None and not fields else fields
    if isinstance(content, TextContent):
        return protocol.upload_text(
            name, content.text, role=content.role, metadata=sent, warm=warm, **conditions
        )
    if isinstance(content, CompositionContent):
        return protocol.upload_composition(
            name, content.composition, metadata=sent, warm=warm, **conditions
        )
    return protocol.upload(
        name,
        config=content.config,
        weights=content.weights,
        metadata=sent,
        warm=warm,
        progress=progress,
        **conditions,
    )


def read_folder(folder: Path) -> Content:
    """Read ``prefixd.json``, ``recipe.json``, ``prefix.txt`` and ``composition.json`` of a folder;
    PEFT's files are not opened here.

    Raises ``FormatError`` for malformed files, two recipes, a text that is not UTF-8, and a folder
    with more than one of a text, a composition and PEFT's files.
    """
    task_id, metadata, role = _read_info(folder / INFO_FILE)
    recipe_file = folder / RECIPE_FILE
    recipe = _parse_object(recipe_file) if recipe_file.exists() else None
    if recipe is not None and "recipe" in (metadata or {}):
        raise FormatError(f"{folder}: expected one recipe; {INFO_FILE} has another")
    config, weights, text = (folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, TEXT_FILE))
    composition = folder / COMPOSITION_FILE
    kept = [path.name for path in (text, composition, config, weights) if path.exists()]
    if kept[1:] and kept != [CONFIG_FILE, WEIGHTS_FILE]:
        raise FormatError(f"{folder}: expected either {kept[0]} or {kept[1]}; it has both")
    if not text.exists():
        if role is not None:
            raise FormatError(f"{folder}: only a text has a role")
        if composition.exists():
            return CompositionContent(_parse_object(composition), task_id, metadata, recipe)
        return PeftContent(config, weights, task_id, metadata, recipe)
    text_of = decode_text(text.read_bytes(), source=text)
    return TextContent(text_of, task_id, metadata, recipe, role)


def check_new(folder: Path) -> None:
    """Raise ``FormatError`` unless ``folder`` is an empty folder or does not exist."""
    if folder.is_dir():
        for entry in folder.iterdir():
            raise FormatError(f"{folder} is not empty, it has {entry.name!a}: name a new folder")
    elif folder.exists():
        raise FormatError(f"{folder} is a file: name a new folder")


def write_version(folder: Path, prefix: Prefix, artifact: Artifact) -> None:
    """Write a version into a new folder, so that its upload has the same digest.

    Raises as ``write_new``.
    """
    write_new(folder, _files_of(prefix, artifact))


def write_new(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by name into a new folder.

    They get their names when all of them are complete, in the order of ``contents``: the one that
    ``read_folder`` needs is the last. When it fails nothing remains. Raises ``FormatError`` as
    ``check_new``, and OSError.
    """
    check_new(folder)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as scratch:
            for name, data in contents.items():
                _write_durably(Path(scratch, name), data)
            for name in contents:
                Path(scratch, name).replace(folder / name)
                written.append(folder / name)
    except BaseException:
        for path in written:
            path.unlink()
        if created:
            folder.rmdir()
        raise


def _files_of(prefix: Prefix, artifact: Artifact) -> dict[str, bytes]:
    """The files of a version by name, in the order in which they get their names."""
    info = {name: getattr(prefix, name) for name in INFORMATION if name != "created_at"}
    info["created_at"] = prefix.created_at.isoformat()
    metadata = dict(prefix.metadata)
    if artifact.task_id is not None and metadata.get("task_id") == artifact.task_id:
        del metadata["task_id"]
    if prefix.labels:
        metadata["labels"] = dict(prefix.labels)
    for name in ("description", "prompt_template"):
        if getattr(prefix, name) is not None:
            metadata[name] = getattr(prefix, name)
    recipe = prefix.recipe.model_dump(
        mode="json", exclude_defaults=True, exclude={"prompt_template", "takes"}
    )
    if recipe:
        metadata["recipe"] = recipe
    role = {"role": prefix.role} if prefix.role == "system" else {}
    files = {INFO_FILE: _json(info | role | {"task_id": artifact.task_id, "metadata": metadata})}
    if prefix.members:
        return files | {COMPOSITION_FILE: _json(composition_of(prefix))}
    if artifact.config is None:
        return files | {TEXT_FILE: artifact.payload}
    config = _json(artifact.config)
    if len(config) > MAX_CONFIG_BYTES:
        config = _shortest_json(artifact.config)
    return files | {WEIGHTS_FILE: artifact.payload, CONFIG_FILE: config}


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


_STRING_OR_FLOAT = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)')


def _shortest_json(value: Mapping[str, object]) -> bytes:
    """JSON that is no longer than any other of this value: an uploaded config fits again."""

    def shorter(match: re.Match[str]) -> str:
        text = match[0]
        if text[0] == '"':
            return text
        sign, digits, exponent = Decimal(text).normalize().as_tuple()
        scientific = f"{'-' * sign}{''.join(map(str, digits))}e{exponent}"
        return min(text, scientific, key=len)

    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return _STRING_OR_FLOAT.sub(shorter, text).encode()


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def decode_text(data: bytes, *, source: object) -> str:
    """``data`` as UTF-8, with its line ends unchanged; raise ``FormatError``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{source} is not text in UTF-8, from byte {error.start}") from None


def _read_info(path: Path) -> tuple[int | None, Mapping[str, object] | None, str | None]:
    """Task id, metadata and role of a ``prefixd.json``, None each where the file or the field is
    missing."""
    if not path.exists():
        return None, None, None
    fields = _parse_object(path)
    unknown = sorted(fields.keys() - {*SENT, *INFORMATION})
    if unknown:
        raise FormatError(
            f"{path}: expected the fields {', '.join((*SENT, *INFORMATION))}; "
            f"received {unknown[0]!a}"
        )
    task_id, metadata = fields.get("task_id"), fields.get("metadata")
    if task_id is not None and type(task_id) is not int:
        raise FormatError(f"{path}: expected task_id to be a whole number or null")
    if metadata is not None and not isinstance(metadata, dict):
        raise FormatError(f"{path}: expected metadata to be a JSON object or null")
    role = fields.get("role")
    if role not in (None, "raw", "system"):
        raise FormatError(f"{path}: expected role to be raw, system or null")
    return task_id, metadata, role


def _parse_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a key that occurs twice, NaN and Infinity are refused."""
    try:
        value = json.loads(
            path.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
