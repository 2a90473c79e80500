"""What a path, or the id of a repository on the Hub, holds.

::

    folder   adapter_config.json    PEFT: adapter_model.safetensors or adapter_model.bin
             prefix.txt             a text
             composition.json       a stack, a blend or an ensemble
             one other file         as below
             sub-folders            the one of them with a prefix; of checkpoint-N the last
    file     ZIP or pickle          torch.save: Cartridges, P-tuning v2, text-generation-inference
             safetensors            P-tuning v2
             ZIP with tensor.npy    KoboldAI
             .npy                   TensorRT-LLM
             anything else          a text
    ORG/NAME[@REVISION]             a repository of the Hub, unless there is such a path
"""

import json
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from prefixd.client.convert.hub import HUB_ID, download
from prefixd.client.convert.search import PICKLED_WEIGHTS_FILE, find_prefix
from prefixd.client.errors import FormatError
from prefixd.client.folders import (
    CONFIG_FILE,
    INFO_FILE,
    WEIGHTS_FILE,
    CompositionContent,
    Content,
    PeftContent,
    TextContent,
    read_folder,
    write_new,
)

_SUFFIXES = {".pt", ".pth", ".bin", ".npy", ".zip", ".safetensors"}
"""Names of files that are never a text."""

_MAGICS = (b"PK\x03\x04", b"\x93NUMPY", *(b"\x80" + bytes([version]) for version in range(2, 6)))


@dataclass(frozen=True, slots=True)
class Source:
    """A prefix in the form that is uploaded.

    ``origin`` names the format it was read from. ``task_id`` is the caller's, or None when it chose
    a task of the file and is not to be sent. ``notes`` are sentences for the user.
    """

    content: Content
    origin: str = "PEFT"
    task_id: int | None = None
    notes: tuple[str, ...] = ()


def read_source(source: str, *, task_id: int | None = None) -> Source | None:
    """Read a folder, a file in one of the formats above, or a repository of the Hub.

    None for a text file and for a path that does not exist. Raises FormatError, and DownloadError
    for a repository that cannot be read. ``task_id`` chooses a task of a TensorRT-LLM table.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, task_id)
    if path.is_file():
        if (
            path.name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE)
            and path.with_name(CONFIG_FILE).exists()
        ):
            return _read_folder(path.parent, task_id)
        with path.open("rb") as file:
            is_text = path.suffix not in _SUFFIXES and not file.read(8).startswith(_MAGICS)
        return None if is_text else _read_file(path, task_id)
    if not HUB_ID.fullmatch(source):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        download(source, Path(scratch))
        try:
            return _loaded(_read_folder(Path(scratch), task_id))
        except FormatError as error:
            raise FormatError(str(error).replace(scratch, source)) from None


def write_folder(source: Source, folder: Path) -> None:
    """Write PEFT's two files, and ``prefixd.json`` for a task id and metadata, into a new folder.

    Raises FormatError for a text, and as ``folders.write_new``.
    """
    content = source.content
    if not isinstance(content, PeftContent):
        found = "a text" if isinstance(content, TextContent) else "a composition"
        raise FormatError(
            f"expected a file or a folder to convert, found {found}: push it as it is"
        )
    task_id = content.task_id if source.task_id is None else source.task_id
    info = {"task_id": task_id, "metadata": content.metadata}
    files = {} if info == dict.fromkeys(info) else {INFO_FILE: json.dumps(info, indent=2).encode()}
    write_new(
        folder,
        files | {WEIGHTS_FILE: _bytes(content.weights), CONFIG_FILE: _bytes(content.config)},
    )


def _bytes(part: bytes | Path) -> bytes:
    return part.read_bytes() if isinstance(part, Path) else part


def _read_folder(folder: Path, task_id: int | None) -> Source:
    place, notes = find_prefix(folder)
    if place.is_file():
        prefix = _read_file(place, task_id)
        return replace(prefix, notes=(*notes, *prefix.notes))
    content = read_folder(place)
    if isinstance(content, TextContent):
        return Source(content, "text", task_id, notes)
    if isinstance(content, CompositionContent):
        return Source(content, "composition", task_id, notes)
    weights = [name for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE) if (place / name).is_file()]
    if not weights or not (place / CONFIG_FILE).is_file():
        missing = CONFIG_FILE if weights else f"{WEIGHTS_FILE} or {PICKLED_WEIGHTS_FILE}"
        raise FormatError(f"{place}: expected {missing} next to {(*weights, CONFIG_FILE)[0]}")
    if WEIGHTS_FILE not in weights:
        _require_numpy(place / PICKLED_WEIGHTS_FILE)
        from prefixd.client.convert.readers import (  # noqa: PLC0415 - it needs numpy
            read_peft_weights,
        )

        content = replace(content, weights=read_peft_weights(place / PICKLED_WEIGHTS_FILE))
    return Source(content, "PEFT", task_id, notes)


def _read_file(path: Path, task_id: int | None) -> Source:
    _require_numpy(path)
    from prefixd.client.convert.readers import read_prefix  # noqa: PLC0415 - it needs numpy

    converted = read_prefix(path, task_id=task_id)
    content = PeftContent(
        converted.config_file(), converted.weights_file(), metadata=converted.metadata or None
    )
    sent = None if converted.is_task else task_id
    return Source(content, converted.origin, sent, converted.notes)


def _loaded(source: Source) -> Source:
    """The same with its files in memory: the folder is about to be removed."""
    content = source.content
    if isinstance(content, PeftContent):
        content = replace(content, config=_bytes(content.config), weights=_bytes(content.weights))
    return replace(source, content=content)


def _require_numpy(path: Path) -> None:
    if find_spec("numpy") is None:
        raise FormatError(
            f"{path}: the package numpy is not installed: pip install 'prefixd[convert]'"
        )
