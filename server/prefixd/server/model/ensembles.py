"""Ensembles: one token for several rows, from the average of their log-probabilities.

::

    logits of the rows     log_softmax, float32     mean      log_softmax        sample
    a  [ ........ ]   ->   [ ........ ]  \\
    b  [ ........ ]   ->   [ ........ ]  -->   [ ........ ] -> [ ........ ]  -> one token,
    c  [ ........ ]   ->   [ ........ ]  /                                      given to all rows

Penalties, temperature and filters apply once, to what comes out. (Lester et al., 2021, section 6,
let the answers of the members vote; that needs no common step.)
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk, Sampled
from prefixd.server.model.decoder import Logits
from prefixd.server.model.sampler import sample

_ALONE = Chunk(-1, (), 0, (), sampling=SamplingParams(temperature=0))


def combine(values: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities [groups, ids] in float32: of each group of rows of the logits ``values``
    [n, ids] the average, renormalised. NaN where a row of the group holds NaN or +inf."""
    rows = torch.tensor([row for group in groups for row in group], device=values.device)
    logprobs = values.index_select(0, rows).float().log_softmax(dim=-1)
    parts = torch.split(logprobs, [len(group) for group in groups])
    return torch.stack([part.mean(dim=0) for part in parts]).log_softmax(dim=-1)


def sample_all(output: Logits, chunks: Sequence[Chunk]) -> list[Sampled]:
    """As ``sample``, where some rows are of ensembles. The token of one is at its first row; what
    is at the others means nothing."""
    groups = groups_of(chunks)
    if not groups:
        return sample(output, chunks)
    sampled = sample(output, [chunk if chunk.ensemble is None else _ALONE for chunk in chunks])
    own = [[sampled[row].token_id for row in rows] for rows in groups]
    leaders = [chunks[rows[0]] for rows in groups]
    tokens = sample(Logits(combine(output.values, groups)), leaders)
    for rows, token, likeliest in zip(groups, tokens, own, strict=True):
        token.agreed = tuple(token_id == token.token_id for token_id in likeliest)
        sampled[rows[0]] = token
    return sampled


def groups_of(chunks: Sequence[Chunk]) -> list[list[int]]:
    """The places in ``chunks`` of the rows of each ensemble."""
    places = [place for place, chunk in enumerate(chunks) if chunk.ensemble is not None]
    return [list(group) for _, group in groupby(places, key=lambda place: chunks[place].ensemble)]
