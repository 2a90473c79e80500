"""One vectorised pass over the logits of rows with mixed sampling settings.

A row's token depends on its own logits, settings and random number alone, never on other rows: a
non-finite row is flagged, and the caller passes one uniform number for each row, which is looked up
in that row's cumulative distribution.
"""

from collections.abc import Iterable, Sequence

import torch

from prefixd.server.engine.request import SamplingParams, TokenLogprob
from prefixd.server.engine.step import Chunk, Sampled
from prefixd.server.model.decoder import Logits

_NEVER = float("-inf")
_GREEDY_BELOW = 1e-5  # a smaller divisor overflows; vLLM uses the same limit
_HEAD = 1024  # most probable tokens that are searched for a filter's cut before sorting all


def sample(output: Logits, chunks: Sequence[Chunk]) -> list[Sampled]:
    """Sample one token for each row; row i belongs to ``chunks[i]``, whose ``sampling`` is set."""
    params = [_params(chunk) for chunk in chunks]
    largest, best_ids = output.best or output.values.max(dim=-1)
    finite = torch.isfinite(largest)
    if all(map(_is_plain, chunks, params)):
        return _sampled(best_ids, finite)
    logits = output.values.float()
    if not finite.all():
        logits = torch.where(finite[:, None], logits, 0.0)
    adjusted = _adjust(logits, chunks, params)
    token_ids = best_ids if adjusted is logits else adjusted.max(dim=-1).indices
    random = [i for i, p in enumerate(params) if p.temperature >= _GREEDY_BELOW]
    if random:
        rows = torch.tensor(random, device=logits.device)
        drawn = _draw(
            adjusted[rows], [params[i] for i in random], [chunks[i].uniform for i in random]
        )
        token_ids = token_ids.index_copy(0, rows, drawn)
    return _with_logprobs(_sampled(token_ids, finite), logits, params)


def _is_plain(chunk: Chunk, setting: SamplingParams) -> bool:
    """Whether the token is the one with the largest logit, and nothing else is asked for: then the
    logits are not read again."""
    return (
        setting.temperature < _GREEDY_BELOW
        and setting.top_logprobs is None
        and not (setting.needs_history or setting.logit_bias or chunk.banned)
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
    """Apply penalties, biases and bans; returns the same tensor when no row has any."""
    adjusted = logits
    for row, (chunk, setting) in enumerate(zip(chunks, params, strict=True)):
        if not (setting.needs_history or setting.logit_bias or chunk.banned):
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
    return adjusted


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
    filtered = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p]
    plain = [i for i in range(len(params)) if i not in set(filtered)]
    drawn = torch.empty(len(params), dtype=torch.long, device=device)
    if plain:
        rows = torch.tensor(plain, device=device)
        drawn[rows] = _look_up(probs[rows], uniform[rows])
    if filtered:
        rows = torch.tensor(filtered, device=device)
        drawn[rows] = _draw_filtered(probs[rows], [params[i] for i in filtered], uniform[rows])
    return drawn


def _look_up(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index [rows] at which the cumulative distribution of ``probs`` passes ``uniform``.

    Summed in float64: a sum over a large vocabulary loses the tail in float32.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    return index.clamp(max=probs.shape[1] - 1)[:, 0]


def _draw_filtered(
    probs: torch.Tensor, params: Sequence[SamplingParams], uniform: torch.Tensor
) -> torch.Tensor:
    """Token ids [rows] under min_p, top_k and top_p.

    Filters nearly always cut within the most probable tokens, and selecting those is much cheaper
    than sorting the vocabulary; only rows with a later cut are sorted.
    """
    ordered, ids = probs.topk(min(_HEAD, probs.shape[1]))
    kept, settled = _cut(ordered, params, vocab_size=probs.shape[1])
    drawn = ids.gather(1, _look_up(kept, uniform)[:, None])[:, 0]
    unsettled = [i for i, is_settled in enumerate(settled.tolist()) if not is_settled]
    if unsettled:
        rows = torch.tensor(unsettled, device=probs.device)
        ordered, ids = probs[rows].sort(dim=-1, descending=True, stable=True)
        kept, _ = _cut(ordered, [params[i] for i in unsettled], vocab_size=probs.shape[1])
        drawn[rows] = ids.gather(1, _look_up(kept, uniform[rows])[:, None])[:, 0]
    return drawn


def _cut(
    ordered: torch.Tensor, params: Sequence[SamplingParams], *, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero the probabilities that the filters cut. ``ordered`` holds the largest of
    ``vocab_size`` in descending order.

    Also returns [rows]: True when every token outside ``ordered`` is cut too.
    """
    device, width = ordered.device, ordered.shape[1]
    top_k = torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=device)[
        :, None
    ]
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    keep = torch.arange(width, device=device) < top_k
    keep &= ordered >= min_p * ordered[:, :1]
    ordered = ordered * keep
    # top_p applies to the mass that top_k and min_p kept: all of it when they are off.
    ended = ~keep[:, -1:] | (top_k <= width)
    unfiltered = (top_k == vocab_size) & (min_p == 0)
    mass = torch.where(unfiltered & ~ended, 1.0, ordered.sum(dim=-1, keepdim=True))
    # A token is kept while the mass before it is below top_p. The first is always kept, even when
    # top_p underflows in float32.
    before = ordered.cumsum(dim=-1) - ordered
    short = before < top_p * mass
    short[:, 0] = True
    settled = ended | (unfiltered & ~short[:, -1:])
    return ordered * short, settled[:, 0]


def _with_logprobs(
    sampled: list[Sampled], logits: torch.Tensor, params: Sequence[SamplingParams]
) -> list[Sampled]:
    """Add log-probabilities of the unmodified distribution to the rows that request them."""
    for row, setting in enumerate(params):
        if setting.top_logprobs is None or not sampled[row].finite:
            continue
        logprobs = logits[row].log_softmax(dim=-1)
        top = logprobs.topk(min(setting.top_logprobs, len(logprobs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        sampled[row] = Sampled(
            sampled[row].token_id,
            logprob=float(logprobs[sampled[row].token_id]),
            top_logprobs=tuple(TokenLogprob(token_id, logprob) for token_id, logprob in pairs),
        )
    return sampled
