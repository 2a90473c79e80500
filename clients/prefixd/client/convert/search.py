"""Where in a folder the prefix is: in the folder itself, or in the one sub-folder that has one."""

import re
from collections.abc import Iterator
from pathlib import Path

from prefixd.client.errors import FormatError
from prefixd.client.folders import COMPOSITION_FILE, CONFIG_FILE, TEXT_FILE, WEIGHTS_FILE

PICKLED_WEIGHTS_FILE = "adapter_model.bin"
ENCODER_FILE = "encoder.pt"
TRAINED_WEIGHTS_FILE = "model.safetensors"
"""The Trainer's checkpoint of a model that is not PEFT's."""

MAX_DEPTH = 2
"""Sub-folders that are searched: run/checkpoint-50, and outputs/run/checkpoint-50."""

_PREFIX_FILES = {CONFIG_FILE, WEIGHTS_FILE, PICKLED_WEIGHTS_FILE, TEXT_FILE, COMPOSITION_FILE}
_SUFFIXES = {".pt", ".bin", ".npy", ".zip"}
_TRAINER_FILES = {"optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin", "training_args.bin"}
_CHECKPOINT = re.compile(r"checkpoint-\d{1,12}", re.ASCII)


def find_prefix(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder with PEFT's files or a text, or the one file in another format; and what to tell
    the user of the choice.

    Of the Trainer's ``checkpoint-N`` the last is taken. FormatError when there is no prefix, or
    several: the message lists them.
    """
    places = _places(folder)
    if places:
        return _only(places, folder), ()
    candidates = list(_search(folder, MAX_DEPTH))
    if not candidates:
        raise FormatError(
            f"{folder}: expected {CONFIG_FILE} and {WEIGHTS_FILE}, {TEXT_FILE}, or a file in a "
            f"format that docs/formats.md lists; found {_names(folder)}"
        )
    note = ""
    if len(candidates) > 1 and _are_checkpoints(candidates):
        note = f", the last of {len(candidates)} checkpoints"
        candidates = [max(candidates, key=lambda path: int(path.name.partition("-")[2]))]
    chosen = _only(candidates, folder)
    return _only(_places(chosen), chosen), (f"took {chosen}{note}",)


def _are_checkpoints(folders: list[Path]) -> bool:
    """Whether all are a Trainer's checkpoint-N of one run."""
    same_run = len({folder.parent for folder in folders}) == 1
    return same_run and all(_CHECKPOINT.fullmatch(folder.name) for folder in folders)


def _places(folder: Path) -> list[Path]:
    """The folder itself if it has PEFT's files or a text, else its files in other formats."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if names & _PREFIX_FILES:
        return [folder]
    if ENCODER_FILE in names:
        return [folder / ENCODER_FILE]
    files = sorted(
        name
        for name in names - _TRAINER_FILES
        if Path(name).suffix in _SUFFIXES or name == TRAINED_WEIGHTS_FILE
    )
    return [folder / name for name in files]


def _search(folder: Path, depth: int) -> Iterator[Path]:
    """The nearest sub-folders with a prefix."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        if _places(path):
            yield path
        elif depth > 1:
            yield from _search(path, depth - 1)


def _only(places: list[Path], folder: Path) -> Path:
    if len(places) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in places[:20])
        raise FormatError(f"{folder} holds several prefixes: {names}. Name one of them")
    return places[0]


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "an empty folder") + more
