"""Scores of prompt tokens: their log-probabilities, from the logits before each of them.

::

    logits [n, ids] ── slices of rows ── log-softmax in float32 ──> packed [n, 3 + 2 * top] int32
                                                                         │ one copy to the host
    | finite | likelier | logprob | top ids ... | top logprobs ... |  <──┘  unpack

No value is read back on the device, and no shape depends on data.
"""

from collections.abc import Sequence
from itertools import chain

import torch

from prefixd.server.engine.request import PromptScore, TokenLogprob
from prefixd.server.engine.step import Chunk, Targets
from prefixd.server.model.draws import likeliest
from prefixd.server.model.transfer import on_device

_SLICE = 2**22
"""Logits of one slice: copies in float32, of which there are a few at a time, take 16 MiB each."""

_NEVER = float("-inf")


def scored_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks with targets, in order."""
    return [chunk for chunk in chunks if chunk.targets is not None]


def score(logits: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Packed scores of the targets of ``chunks``, on the device of ``logits`` [n, ids]: a row for
    each target, in order."""
    targets = list(map(_targets, chunks))
    num_ids = logits.shape[1]
    top = min(max(each.top for each in targets), num_ids)
    tokens = on_device(list(chain.from_iterable(t.tokens for t in targets)), logits.device)
    size = max(1, _SLICE // num_ids)
    return torch.cat(
        [
            _score_slice(rows.float(), of_rows, top)
            for rows, of_rows in zip(
                torch.split(logits, size), torch.split(tokens, size), strict=True
            )
        ]
    )


def _score_slice(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> torch.Tensor:
    """Of one slice [m, ids] float32. A token without a logit cannot follow."""
    finite = torch.isfinite(logits.max(dim=-1).values)
    logits = torch.where(finite[:, None], logits, 0.0)
    logprobs = logits.log_softmax(dim=-1)
    has_logit = (tokens >= 0) & (tokens < logits.shape[1])
    place = torch.where(has_logit, tokens, 0)[:, None]
    own = torch.where(has_logit[:, None], logprobs.gather(1, place), _NEVER)
    num_likelier = (logprobs > own).sum(dim=-1)
    values, ids = likeliest(logprobs, top)
    bits = torch.cat([own, values], dim=1).view(torch.int32)
    numbers = torch.stack([finite.int(), num_likelier.int(), bits[:, 0]], dim=1)
    return torch.cat([numbers, ids.int(), bits[:, 1:]], dim=1)


def unpack(
    packed: torch.Tensor, chunks: Sequence[Chunk]
) -> dict[int, Sequence[PromptScore] | None]:
    """The scores by sequence id, from packed ones in host memory; None where logits were not
    finite."""
    top = (packed.shape[1] - 3) // 2
    finite = packed[:, 0].tolist()
    num_likelier, ids = packed[:, 1].tolist(), packed[:, 3 : 3 + top].tolist()
    bits = torch.cat([packed[:, 2:3], packed[:, 3 + top :]], dim=1)
    logprobs = bits.view(torch.float32).tolist()
    scored: dict[int, Sequence[PromptScore] | None] = {}
    first = 0
    for chunk in chunks:
        targets = _targets(chunk)
        rows = range(first, first + len(targets.tokens))
        first = rows.stop
        scored[chunk.seq_id] = None
        if all(finite[rows.start : rows.stop]):
            scored[chunk.seq_id] = [
                PromptScore(
                    logprobs[row][0],
                    num_likelier[row],
                    tuple(map(TokenLogprob, ids[row][: targets.top], logprobs[row][1:])),
                )
                for row in rows
            ]
    return scored


def _targets(chunk: Chunk) -> Targets:
    assert chunk.targets is not None
    return chunk.targets
