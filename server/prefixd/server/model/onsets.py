"""Positions from which a feature that the config names begins to change the output."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_NAMES = re.compile(
    r"window(?!.*(layers|pattern))|chunk_size|floor|original_max_position|index_topk|dense_len"
    r"|^(?!num_|n_)(?!.*(token|layer|embed))"
    r".*(onset|threshold|cutoff|switch|begin|start|after|until|position|limit|horizon)"
)
"""Config keys that hold such a position: windows, attention chunks, floors of a scaling with the
position, the length from which rotary embeddings are scaled, sparse attention, and what names a
start or a limit without counting layers or tokens."""


@dataclass(frozen=True, slots=True)
class Onset:
    """``key`` of the config, and the first position that the feature can change."""

    key: str
    position: int


def onsets_of(config: Any, *, context: int) -> list[Onset]:
    """Onsets below ``context`` positions, one for each position, in rising order."""
    text = config.get_text_config(decoder=True).to_dict()
    by_position = {position: key for key, position in _numbers(text, "") if 1 < position < context}
    return [Onset(by_position[position], position) for position in sorted(by_position)]


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    """Whole numbers under matching keys, with the path to them."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
    elif (
        isinstance(value, int | float)
        and _NAMES.search(key.rpartition(".")[2])
        and value == value // 1
    ):
        yield key, int(value)
