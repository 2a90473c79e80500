"""The texts of the self-check, and how they are run over KV blocks in several passes.

::

    pass        0          1           2           3
    five      | a b      | c         | d         | e e e e .. e   copies share the KV of a..d
    block     | 0 .. 7   | 8         | 9 .. 20   |
    chunk     | prefix   | one chunk | the rest  |                the prefix is compiled

Every pass but the last mixes texts, and every text is cut in several places.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.step import BlockCopy, Chunk, CompileChunk
from prefixd.server.model.batch import lay_out
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.prefix import HardPrompt

_COMPARED = 16
"""Positions of a long text whose logits are compared: the head costs as much as several layers."""

_COPIES = 16
"""Equal tokens in the last pass. All choose the same experts, which shows a limited capacity."""


@dataclass(frozen=True, slots=True)
class Text:
    """``ends[i]`` positions are in the pool after pass i. The first ``prefix`` positions are
    compiled as a prefix, which ``copies`` sequences share; each runs the rest."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    prefix: int = 0
    copies: int = 1

    @property
    def compared(self) -> list[int]:
        """Positions whose logits are compared: around every cut, and evenly spread."""
        length = len(self.tokens)
        near = {end + i for end in self.ends for i in (-2, -1, 0, 1)}
        spread = range(0, length, max(1, length // _COMPARED))
        return sorted(position for position in near | set(spread) if 0 <= position < length)

    def num_blocks(self, block_size: int, state_blocks: int) -> int:
        """Blocks that the prefix and the sequences need, each with ``state_blocks`` for a state."""
        own = -(-len(self.tokens) // block_size) - self.prefix // block_size
        states = state_blocks * (self.copies + (self.prefix > 0))
        return -(-self.prefix // block_size) + self.copies * own + states


@dataclass(frozen=True, slots=True)
class Part:
    """Positions ``start .. stop`` of text ``text`` in one pass of ``sequences`` sequences."""

    text: int
    start: int
    stop: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Compared:
    """Logits [n, vocab] over KV blocks in one pass, and of which part and position each is."""

    rows: list[tuple[Part, int]]
    logits: torch.Tensor


def short_texts(
    *, block_size: int, chunk: int, context: int, vocab_size: int, seed: int
) -> list[Text]:
    """Three texts: of 5 tokens, across a block border, and across a prefix's and a chunk's end."""
    size = block_size
    prefix = size // 2 + 1
    plans: list[tuple[tuple[int, ...], int, int]] = [
        ((2, 3, 4, 5), 4, _COPIES),
        ((size // 2, size // 2 + 1, size + 5), 0, 1),
        ((prefix, prefix + chunk, prefix + chunk + size // 2 + 5), prefix, 1),
    ]
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for planned, compiled, copies in plans:
        ends = tuple(min(end, context) for end in planned)
        tokens = _tokens(ends[-1], vocab_size, generator)
        texts.append(Text(tokens, ends, compiled if compiled < ends[-1] else 0, copies))
    return texts


def long_text(length: int, *, chunk: int, vocab_size: int, seed: int) -> Text:
    """A text run alone in chunks."""
    tokens = _tokens(length, vocab_size, torch.Generator().manual_seed(seed))
    return Text(tokens, (*range(chunk, length, chunk), length))


def _tokens(length: int, vocab_size: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())


def run_in_blocks(decoder: Decoder, texts: Sequence[Text]) -> Iterator[Compared]:
    """Run all passes on an unused pool; yields the logits at every compared position."""
    placed = _place(texts, decoder.block_size, decoder.state_blocks)
    for number in range(max(len(text.ends) for text in texts)):
        compared = _run_pass(decoder, placed, number)
        if compared is not None:
            yield compared


@dataclass(frozen=True, slots=True)
class _Placed:
    """A text, the blocks of its prefix, and the block table of each of its sequences; ``side``
    and ``sides`` are the blocks of their states."""

    text: Text
    shared: list[int]
    tables: list[list[int]]
    side: list[int]
    sides: list[list[int]]

    def copies(self, block_size: int) -> list[BlockCopy]:
        """Copies of the prefix's partial block and of its state, for each sequence."""
        full = self.text.prefix // block_size
        copies = [
            BlockCopy(*pair) for own in self.sides for pair in zip(self.side, own, strict=False)
        ]
        if full < len(self.shared):
            copies += [BlockCopy(self.shared[-1], table[full]) for table in self.tables]
        return copies


def _place(texts: Sequence[Text], block_size: int, state_blocks: int) -> list[_Placed]:
    """Assign blocks, from block 1."""
    free = itertools.count(1)
    placed = []
    for text in texts:
        shared = list(itertools.islice(free, -(-text.prefix // block_size)))
        full = shared[: text.prefix // block_size]
        own = -(-len(text.tokens) // block_size) - len(full)
        tables = [[*full, *itertools.islice(free, own)] for _ in range(text.copies)]
        side = list(itertools.islice(free, state_blocks if text.prefix else 0))
        sides = [list(itertools.islice(free, state_blocks)) for _ in range(text.copies)]
        placed.append(_Placed(text, shared, tables, side, sides))
    return placed


def _run_pass(decoder: Decoder, placed: list[_Placed], number: int) -> Compared | None:
    chunks: list[tuple[int, Chunk]] = []  # with the number of the text
    compiles: list[tuple[int, CompileChunk]] = []
    for index, place in enumerate(placed):
        text = place.text
        start, stop = (0, *text.ends)[number : number + 2] if number < len(text.ends) else (0, 0)
        if start == stop:
            continue
        if stop <= text.prefix:
            key, payload = PrefixKey("", str(index)), HardPrompt(text.tokens[: text.prefix])
            compiled = CompileChunk(key, payload, start, stop, place.shared, place.side)
            compiles.append((index, compiled))
            continue
        if start == text.prefix:
            decoder.copy(place.copies(decoder.block_size))
        tokens = text.tokens[start:stop]
        chunks += [
            (index, Chunk(0, tokens, start, table, side_blocks=side))
            for table, side in zip(place.tables, place.sides, strict=True)
        ]
    spans = [(index, chunk.start, chunk.start + len(chunk.tokens)) for index, chunk in chunks]
    spans += [(index, part.start, part.stop) for index, part in compiles]  # the flat order
    if not spans:  # texts cut short by the context
        return None
    keep: list[int] = []
    rows: list[tuple[Part, int]] = []
    offset = 0
    for index, start, stop in spans:
        part = Part(index, start, stop, len(spans))
        for position in placed[index].text.compared:
            if start <= position < stop:
                keep.append(offset + position - start)
                rows.append((part, position))
        offset += stop - start
    batch = lay_out([c for _, c in chunks], [c for _, c in compiles], outputs=keep)
    return Compared(rows, decoder.forward(batch).values)
