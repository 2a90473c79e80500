"""Sampling without waiting for the device: settings go there in one copy, results come in one.

::

    host      prepare ── settings ──>                        ──> unpack: list[Sampled]
    device                   sample_rows(logits, settings) ── packed ──>
                                     └─ count table += tokens

The tokens are those of ``sampler.sample``. In ``sample_rows`` no value is read back, and no shape
depends on data: it can be captured into a CUDA graph for a given ``Plan``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from prefixd.server.engine.request import SamplingParams, TokenLogprob
from prefixd.server.engine.step import Chunk, Sampled
from prefixd.server.model.decoder import Logits
from prefixd.server.model.draws import Filters, cut, head, in_order, likeliest, look_up, weights
from prefixd.server.model.sampling_inputs import Rows, SamplingInputs
from prefixd.server.model.sampling_plan import Plan
from prefixd.server.model.token_counts import OF_PROMPT, TokenCounts

Inputs = Mapping[str, torch.Tensor]
_NEVER = float("-inf")
_ALIGNED = 8  # logits: rows that begin at equal alignments are reduced in the same order on a GPU


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call whose settings are on the device; ``params`` are those of its rows (no padding)."""

    plan: Plan
    inputs: Inputs
    params: Sequence[SamplingParams]


class DeviceSampler:
    """Samples rows of logits [n, ids] on ``device``. Not thread-safe."""

    def __init__(self, device: torch.device, *, num_ids: int, max_rows: int) -> None:
        """``num_ids`` is the width of the logits, ``max_rows`` the most sequences of a step."""
        self._width = -(-num_ids // _ALIGNED) * _ALIGNED
        self._num_ids = num_ids
        self._inputs = SamplingInputs(device, num_ids=self._width)
        self.counts = TokenCounts(device, max_rows=max_rows, num_ids=self._width)
        self._is_cuda = device.type == "cuda"

    def prepare(
        self,
        chunks: Sequence[Chunk],
        *,
        rows: Sequence[int] | None = None,
        num_rows: int | None = None,
    ) -> Prepared:
        """Send the settings of the rows of ``chunks``: one each, and one for each proposed token.

        ``rows`` are those of the logits that they are (None: the first ones, in order), when others
        are sampled in another call. ``num_rows`` pads the rows to that number.
        """
        params, banned, uniforms, masks = _asked(chunks)
        slots, drafted = self._penalties(chunks)
        asked = Rows(
            params=params,
            banned=banned,
            num_rows=len(params) if num_rows is None else num_rows,
            listed=rows,
            slots=slots,
            drafted=drafted,
            masked=tuple(masks),
        )
        plan, inputs = self._inputs.send(asked, uniforms, list(masks.values()))
        return Prepared(plan, inputs, params)

    def keep(self, chunks: Sequence[Chunk]) -> None:
        """Keep what is counted for the penalties of ``chunks``: they are prepared after others of
        the same step."""
        self.counts.keep(chunks)

    def _penalties(
        self, chunks: Sequence[Chunk]
    ) -> tuple[dict[int, int], dict[int, Sequence[int]]]:
        """By row: its place in the count table, and the proposed tokens before it."""
        slots: dict[int, int] = {}
        drafted: dict[int, Sequence[int]] = {}
        penalised = [chunk for chunk in chunks if chunk.history]
        if not penalised:
            return slots, drafted
        places = iter(self.counts.prepare(penalised))
        row = 0
        for chunk in chunks:
            if chunk.history:
                rows = range(row, row + 1 + chunk.num_drafts)
                slots |= dict.fromkeys(rows, next(places))
                if chunk.draft is not None:
                    drafted |= {each: chunk.draft.tokens[: each - row] for each in rows}
            row += 1 + chunk.num_drafts
        return slots, drafted

    def run(self, output: Logits, prepared: Prepared) -> torch.Tensor:
        """Sample on the device. Returns the packed results there, int32: the first n are the tokens
        of the rows."""
        return sample_rows(output, prepared.plan, prepared.inputs, self.counts.table)

    def to_host(self, packed: torch.Tensor) -> torch.Tensor:
        """Begin the copy of the results to the host; they are there once the device's stream has
        come as far."""
        if not self._is_cuda:
            return packed
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        return host.copy_(packed, non_blocking=True)

    def unpack(self, packed: torch.Tensor, prepared: Prepared) -> list[Sampled]:
        """The samples of the rows, from results on the host. The token of a row that is not finite
        means nothing."""
        plan, params = prepared.plan, prepared.params
        rows, asked = plan.rows, plan.logprobs
        numbers = packed.tolist()
        finite = map(bool, numbers[rows : rows + len(params)])
        sampled = list(map(Sampled, numbers[: len(params)], finite))
        if not asked:
            return sampled
        top = min(plan.top, self._num_ids)
        ids = packed[2 * rows : 2 * rows + asked * top].view(asked, top).tolist()
        logprobs = packed[2 * rows + asked * top :].view(torch.float32).view(asked, -1).tolist()
        wanted = [row for row, each in enumerate(params) if each.top_logprobs is not None]
        for row, (own, *values), top_ids in zip(wanted, logprobs, ids, strict=True):
            if sampled[row].finite:
                sampled[row].logprob = own
                sampled[row].top_logprobs = tuple(
                    map(TokenLogprob, top_ids[: params[row].top_logprobs], values)
                )
        return sampled

    def sample(self, output: Logits, chunks: Sequence[Chunk]) -> list[Sampled]:
        """Sample and wait for the result."""
        prepared = self.prepare(chunks)
        packed = self.to_host(self.run(output, prepared))
        if self._is_cuda:
            torch.cuda.current_stream().synchronize()
        return self.unpack(packed, prepared)


def _asked(
    chunks: Sequence[Chunk],
) -> tuple[list[SamplingParams], list[Sequence[int]], list[float], dict[int, bytes]]:
    """Settings, banned ids and draws, of each row, and the masks by row."""
    params: list[SamplingParams] = []
    banned: list[Sequence[int]] = []
    uniforms: list[float] = []
    masks: dict[int, bytes] = {}
    for chunk in chunks:
        assert chunk.sampling is not None
        if chunk.mask is not None:
            masks[len(params)] = chunk.mask
        params.append(chunk.sampling)
        banned.append(chunk.banned)
        uniforms.append(chunk.uniform)
        if chunk.draft is not None:
            count, num_banned = chunk.num_drafts, chunk.draft.num_banned
            params += [chunk.sampling] * count
            banned += [chunk.banned] * num_banned + [()] * (count - num_banned)
            uniforms += chunk.draft.uniforms
    return params, banned, uniforms, masks


def sample_rows(
    output: Logits, plan: Plan, inputs: Inputs, counts: torch.Tensor | None
) -> torch.Tensor:
    """Packed results [k] int32: tokens and finite flags of the rows, then ids of the alternatives
    of the rows that ask for log-probabilities, then the bits of the latter, the token's own first.

    Counts the tokens in ``counts``.
    """
    values, best = output.values, output.best
    if plan.listed:
        rows = inputs["rows"]
        values = values.index_select(0, rows)
        best = best and (best[0].index_select(0, rows), best[1].index_select(0, rows))
    largest, tokens = best or values.max(dim=-1)
    finite = torch.isfinite(largest)
    packed = [tokens, finite]
    if plan.reads_logits:
        num_ids = values.shape[1]
        logits = values.float()
        if num_ids % _ALIGNED:
            logits = pad(logits, (0, -num_ids % _ALIGNED), value=_NEVER)
        adjusted = _adjust(logits, plan, inputs, counts)
        if adjusted is not logits and plan.has_greedy:
            tokens = adjusted.max(dim=-1).indices
        # A row that is not finite may have drawn any index.
        tokens = _draw(adjusted, tokens, plan, inputs).clamp(max=num_ids - 1)
        packed = [tokens, finite]
        if plan.logprobs:
            packed += _logprobs(logits, tokens, inputs["logprob_rows"], min(plan.top, num_ids))
    if plan.penalised:
        assert counts is not None
        rows = inputs["penalised_rows"]
        place = inputs["penalised_slots"] * counts.shape[1] + tokens.index_select(0, rows)
        counted = inputs["penalised_counts"] * finite.index_select(0, rows)
        counts.view(-1).index_add_(0, place, counted)
    return torch.cat([part.int().view(-1) for part in packed])


def _adjust(
    logits: torch.Tensor, plan: Plan, inputs: Inputs, counts: torch.Tensor | None
) -> torch.Tensor:
    """Apply penalties, biases, bans and masks; the same tensor when no row has any."""
    if not plan.adjusts:
        return logits
    adjusted = logits.clone()
    if plan.penalised:
        assert counts is not None
        seen = counts.index_select(0, inputs["penalised_slots"])
        if plan.drafted:
            seen.view(-1).index_add_(0, inputs["drafted_index"], inputs["drafted_value"])
        rows = inputs["penalised_rows"]
        adjusted.index_copy_(0, rows, _penalised(adjusted.index_select(0, rows), seen, inputs))
    flat = adjusted.view(-1)
    if plan.biases:
        flat.index_add_(0, inputs["bias_index"], inputs["bias_value"])
    if plan.bans:
        flat.index_fill_(0, inputs["ban_index"], _NEVER)
    if plan.masked:
        rows = inputs["masked_rows"]
        outside = _outside(inputs["mask_words"].view(plan.masked, -1), adjusted.shape[1])
        masked = adjusted.index_select(0, rows).masked_fill_(outside, _NEVER)
        adjusted.index_copy_(0, rows, masked)
    return adjusted


def _outside(words: torch.Tensor, num_ids: int) -> torch.Tensor:
    """The ids [rows, num_ids] that bit masks of int32 words have not."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words[:, :, None].bitwise_right_shift(bits) & 1).view(len(words), -1)[:, :num_ids] == 0


def _penalised(logits: torch.Tensor, seen: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Repetition over prompt and output, the others over the output."""
    repetition = inputs["repetition"][:, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen != 0, repeated, logits)
    count = seen & (OF_PROMPT - 1)
    penalty = inputs["frequency"][:, None] * count + inputs["presence"][:, None]
    return torch.where(count > 0, logits - penalty, logits)


def _draw(logits: torch.Tensor, tokens: torch.Tensor, plan: Plan, inputs: Inputs) -> torch.Tensor:
    """Tokens [rows]: those given, except in the rows with a temperature."""
    for name, size in (("plain", plan.plain), ("head", plan.heads), ("sort", plan.sorts)):
        if not size:
            continue
        rows = inputs.get(f"{name}_rows")  # None: all
        group = logits if rows is None else logits.index_select(0, rows)
        probs = (group / inputs[f"{name}_temperature"][:, None]).softmax(dim=-1)
        uniform = inputs[f"{name}_uniform"]
        if name == "plain":
            drawn = look_up(weights(probs), uniform)
        else:
            filters = Filters(
                *(inputs[f"{name}_{filter_}"] for filter_ in ("top_k", "top_p", "min_p"))
            )
            ordered, ids = head(probs, plan.width) if name == "head" else in_order(probs)
            kept, _ = cut(ordered, filters, num_ids=probs.shape[1])
            drawn = ids.gather(1, look_up(kept, uniform)[:, None])[:, 0]
        tokens = drawn if rows is None else tokens.index_copy(0, rows, drawn)
    return tokens


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, top: int
) -> list[torch.Tensor]:
    """Of the unmodified distribution: ids [m, top], and the bits [m, 1 + top] of the
    log-probabilities of the token and of the most likely ones."""
    logprobs = logits.index_select(0, rows).log_softmax(dim=-1)
    own = logprobs.gather(1, tokens.index_select(0, rows)[:, None])
    values, ids = likeliest(logprobs, top)
    return [ids, torch.cat([own, values], dim=1).view(torch.int32)]
