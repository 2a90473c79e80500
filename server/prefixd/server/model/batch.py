"""The flat layout of a step for one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from prefixd.server.engine.step import Chunk, CompileChunk
from prefixd.server.model.prefix import (
    HardPrompt,
    InputEmbeddings,
    InputTokens,
    SoftPrompt,
    Stack,
)
from prefixd.server.model.rows import Row


@dataclass(slots=True)
class FlatBatch:
    """One forward pass as a flat row of tokens: ``rows`` one after another.

    ``token_ids`` [num_tokens] is 0 where the input is given: ``inputs`` holds the place in the flat
    tokens and the embeddings [n, embedding_width] of each run of n such tokens. ``outputs`` are the
    flat tokens whose logits are wanted. ``pending`` holds the places in the flat tokens of those
    that the step before samples, and which of its samples each is.
    """

    rows: list[Row] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    inputs: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    pending: list[tuple[int, int]] = field(default_factory=list)


def lay_out(
    chunks: Sequence[Chunk],
    compiles: Sequence[CompileChunk] = (),
    *,
    outputs: list[int] | None = None,
) -> FlatBatch:
    """Chunks, then compiles, in one pass. ``outputs``: by default the last token of each chunk with
    ``sampling``, and its proposed tokens; then the tokens before the targets of each chunk."""
    batch = FlatBatch()
    before_targets: list[int] = []
    for chunk in chunks:
        batch.rows.append(
            Row(
                len(batch.token_ids),
                chunk.start,
                chunk.length,
                chunk.block_table,
                chunk.num_prefix_tokens,
                chunk.side_blocks,
                chunk.gated,
                chunk.source,
            )
        )
        offset = len(batch.token_ids)
        batch.token_ids += chunk.tokens
        for given in chunk.inputs:
            first, length = offset + given.offset, given.stop - given.start
            if isinstance(given.payload, InputTokens):
                tokens = given.payload.token_ids[given.start : given.stop]
                batch.token_ids[first : first + length] = tokens
                continue
            assert isinstance(given.payload, InputEmbeddings)
            batch.token_ids[first : first + length] = [0] * length
            values = given.payload.embeddings[given.start : given.stop]
            batch.inputs.append((first, values))
        if chunk.targets is not None:
            first = offset + chunk.targets.offset
            before_targets += range(first, first + len(chunk.targets.tokens))
        if chunk.sampling is not None:
            batch.outputs.append(len(batch.token_ids) - 1)
        if chunk.draft is not None:
            num_before = len(batch.token_ids)
            batch.token_ids += chunk.draft.tokens
            batch.outputs += range(num_before, len(batch.token_ids))
    for part in compiles:
        offset, length = len(batch.token_ids), part.stop - part.start
        batch.rows.append(
            Row(offset, part.start, length, part.block_table, side_blocks=part.side_blocks)
        )
        assert isinstance(part.payload, HardPrompt | SoftPrompt | Stack)
        payload = part.payload if isinstance(part.payload, Stack) else Stack((part.payload,))
        for place, piece, start, stop in payload.within(part.start, part.stop):
            if isinstance(piece, HardPrompt):
                batch.token_ids += piece.token_ids[start:stop]
            else:
                assert isinstance(piece, SoftPrompt)
                batch.inputs.append((offset + place, piece.embeddings[start:stop]))
                batch.token_ids += [0] * (stop - start)
    batch.outputs += before_targets
    if outputs is not None:
        batch.outputs = outputs
    return batch
