"""One vectorised pass over the logits of rows with mixed sampling settings.

A row's token depends on its own logits, settings and random number alone, never on other rows: a
non-finite row is flagged, and the caller passes one uniform number for each row, which is looked up
in that row's cumulative distribution.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from prefixd.server.engine.request import SamplingParams, TokenLogprob
from prefixd.server.engine.step import Chunk, Sampled
from prefixd.server.model.decoder import Logits
from prefixd.server.model.draws import (
    GREEDY_BELOW,
    Filters,
    cut,
    head,
    head_width,
    in_order,
    look_up,
    weights,
)

_NEVER = float("-inf")


def sample(output: Logits, chunks: Sequence[Chunk]) -> list[Sampled]:
    """Sample one token for each row; row i belongs to ``chunks[i]``, whose ``sampling`` is set."""
    largest, best_ids = output.best or output.values.max(dim=-1)
    finite = torch.isfinite(largest)
    sampled = _sampled(best_ids, finite)
    asked = [row for row, chunk in enumerate(chunks) if not _is_plain(chunk)]
    if asked:
        few = _sample_asked(
            _select(output.values, asked).float(),
            [chunks[row] for row in asked],
            best_ids=_select(best_ids, asked),
            finite=_select(finite, asked),
        )
        for row, token in zip(asked, few, strict=True):
            sampled[row] = token
    return sampled


def _sample_asked(
    logits: torch.Tensor, chunks: Sequence[Chunk], *, best_ids: torch.Tensor, finite: torch.Tensor
) -> list[Sampled]:
    """The tokens of rows that are not plain."""
    params = [_params(chunk) for chunk in chunks]
    if not finite.all():
        logits = torch.where(finite[:, None], logits, 0.0)
    adjusted = _adjust(logits, chunks, params)
    token_ids = best_ids if adjusted is logits else adjusted.max(dim=-1).indices
    random = [i for i, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
    if random:
        token_ids = token_ids.index_copy(
            0,
            torch.tensor(random, device=logits.device),
            _draw(
                _select(adjusted, random),
                [params[i] for i in random],
                [chunks[i].uniform for i in random],
            ),
        )
    return _with_logprobs(_sampled(token_ids, finite), logits, params)


def _is_plain(chunk: Chunk) -> bool:
    """Whether the token is the one with the largest logit, and nothing else is asked for: then the
    logits are not read again."""
    setting = _params(chunk)
    return (
        setting.temperature < GREEDY_BELOW
        and setting.top_logprobs is None
        and not (setting.needs_history or setting.logit_bias or chunk.banned)
        and chunk.mask is None
    )


def _sampled(token_ids: torch.Tensor, finite: torch.Tensor) -> list[Sampled]:
    return [
        Sampled(token_id, finite=ok)
        for token_id, ok in zip(token_ids.tolist(), finite.tolist(), strict=True)
    ]


def _params(chunk: Chunk) -> SamplingParams:
    assert chunk.sampling is not None
    return chunk.sampling


def _adjust(
    logits: torch.Tensor, chunks: Sequence[Chunk], params: Sequence[SamplingParams]
) -> torch.Tensor:
    """Apply penalties, biases, bans and masks; returns the same tensor when no row has any."""
    adjusted = logits
    for row, (chunk, setting) in enumerate(zip(chunks, params, strict=True)):
        if not (setting.needs_history or setting.logit_bias or chunk.banned or chunk.mask):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        if setting.needs_history:
            _penalise(adjusted[row], chunk, setting)
        if setting.logit_bias:
            ids = torch.tensor(list(setting.logit_bias), device=logits.device)
            bias = torch.tensor(list(setting.logit_bias.values()), device=logits.device)
            adjusted[row].index_add_(0, ids, bias.float())
        if chunk.banned:
            adjusted[row, _within(chunk.banned, adjusted.shape[1])] = _NEVER
        if chunk.mask:
            adjusted[row].masked_fill_(_outside(chunk.mask, adjusted.shape[1]), _NEVER)
    return adjusted


def _outside(mask: bytes, num_logits: int) -> torch.Tensor:
    """The ids [num_logits] that a bit mask has not."""
    held = np.frombuffer(mask, dtype=np.uint8)[: -(-num_logits // 8)]
    bits = np.unpackbits(~held, bitorder="little", count=min(8 * len(held), num_logits))
    outside = torch.from_numpy(bits).bool()
    return pad(outside, (0, num_logits - len(outside)), value=True)


def _within(token_ids: Iterable[int], num_logits: int) -> list[int]:
    return [token_id for token_id in token_ids if 0 <= token_id < num_logits]


def _penalise(row: torch.Tensor, chunk: Chunk, setting: SamplingParams) -> None:
    """Apply penalties in place: repetition over prompt and output, the others over the output."""
    # A prompt may have ids with an embedding and without a logit.
    seen = torch.tensor(_within(set(chunk.history), len(row)), device=row.device).long()
    values = row[seen]
    row[seen] = torch.where(
        values > 0, values / setting.repetition_penalty, values * setting.repetition_penalty
    )
    output = torch.tensor(chunk.history[chunk.num_prompt_tokens :], device=row.device)
    if len(output):
        ids, counts = torch.unique(output, return_counts=True)
        row[ids] -= setting.frequency_penalty * counts + setting.presence_penalty


def _draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> torch.Tensor:
    """Token ids [rows] at temperature, by inverse of the cumulative distribution.

    Rows with a filter are looked up in order of probability, the others in order of token id, so
    the order depends on the row's own settings alone.
    """
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)
    uniform = torch.tensor(uniforms, device=device, dtype=torch.float64)
    probs = (logits / temperature[:, None]).softmax(dim=-1)
    filtered = [i for i, p in enumerate(params) if p.is_filtered]
    if not filtered:
        return look_up(weights(probs), uniform)
    drawn = torch.empty(len(params), dtype=torch.long, device=device)
    plain = [i for i, p in enumerate(params) if not p.is_filtered]
    if plain:
        drawn[plain] = look_up(weights(_select(probs, plain)), _select(uniform, plain))
    drawn[filtered] = _draw_filtered(
        _select(probs, filtered), [params[i] for i in filtered], _select(uniform, filtered)
    )
    return drawn


def _select(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows; the tensor itself where they are all."""
    if len(rows) == len(values):
        return values
    return values.index_select(0, torch.tensor(rows, device=values.device))


def _draw_filtered(
    probs: torch.Tensor, params: Sequence[SamplingParams], uniform: torch.Tensor
) -> torch.Tensor:
    """Token ids [rows] under min_p, top_k and top_p.

    Filters nearly always cut within the most probable tokens, and selecting those is much cheaper
    than sorting the vocabulary; only rows with a later cut are sorted.
    """
    num_ids = probs.shape[1]
    width = head_width(max(p.top_k or num_ids for p in params))
    ordered, ids = head(probs, width)
    kept, settled = cut(ordered, _filters(params, probs), num_ids=num_ids)
    drawn = ids.gather(1, look_up(kept, uniform)[:, None])[:, 0]
    unsettled = [i for i, is_settled in enumerate(settled.tolist()) if not is_settled]
    if unsettled:
        ordered, ids = in_order(_select(probs, unsettled))
        kept, _ = cut(ordered, _filters([params[i] for i in unsettled], probs), num_ids=num_ids)
        index = look_up(kept, _select(uniform, unsettled))
        drawn[unsettled] = ids.gather(1, index[:, None])[:, 0]
    return drawn


def _filters(params: Sequence[SamplingParams], probs: torch.Tensor) -> Filters:
    num_ids, device = probs.shape[1], probs.device
    return Filters(
        top_k=torch.tensor([min(p.top_k or num_ids, num_ids) for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], device=device),
        min_p=torch.tensor([p.min_p for p in params], device=device),
    )


def _with_logprobs(
    sampled: list[Sampled], logits: torch.Tensor, params: Sequence[SamplingParams]
) -> list[Sampled]:
    """Add log-probabilities of the unmodified distribution to the rows that request them."""
    for row, setting in enumerate(params):
        if setting.top_logprobs is None or not sampled[row].finite:
            continue
        logprobs = logits[row].log_softmax(dim=-1)
        sampled[row].logprob = float(logprobs[sampled[row].token_id])
        sampled[row].top_logprobs = _likeliest(logprobs, setting.top_logprobs)
    return sampled


def _likeliest(logprobs: torch.Tensor, count: int) -> tuple[TokenLogprob, ...]:
    """The tokens with the largest log-probabilities, equal ones in order of id: as
    ``draws.likeliest``, faster where a shape may depend on data."""
    if not count:
        return ()
    least = logprobs.topk(min(count, len(logprobs))).values[-1]
    ids = (logprobs >= least).nonzero()[:, 0]
    values, order = logprobs[ids].sort(descending=True, stable=True)
    return tuple(map(TokenLogprob, ids[order[:count]].tolist(), values[:count].tolist()))
