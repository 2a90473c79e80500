"""Ensembles: the request of each member, admitted as if it were alone, and all of them as one.

::

    prompts p, members a b     admitted     p0 under a, p0 under b, p1 under a, p1 under b
    mean_logprob               fused        p0 (a, b)              p1 (a, b)
    vote                       run as they are; ``votes`` chooses among the answers

All members have the recipe of the ensemble, and not their own: what differs between their rows is
the prefix.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from prefixd.server.api.admitted import Admitted, ResolvedPrefix, grouped
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import AdmittedRequest, Member
from prefixd.server.errors import BadRequest, DoesNotFit, PrefixdError, QuotaExceeded
from prefixd.server.tenants.bindings import ChosenBy
from prefixd.store.artifact.composition import Combine

_CODE = "unsupported_ensemble"


def members_of(prefix: ResolvedPrefix | None) -> list[ResolvedPrefix]:
    """What each member of an ensemble is admitted under; none without an ensemble."""
    if prefix is None:
        return []
    recipe, template = prefix.manifest.recipe, prefix.manifest.prompt_template
    manifests = (
        replace(member.manifest, recipe=recipe, prompt_template=template)
        for member in prefix.ensemble
    )
    return [ResolvedPrefix(manifest, prefix.chosen_by) for manifest in manifests]


def together(
    prefix: ResolvedPrefix,
    admitted: Sequence[Admitted],
    config: SchedulerConfig,
    *,
    has_limit: bool,
) -> Admitted:
    """One request for an ensemble, of those ``admitted`` for its members. ``has_limit``: the caller
    has set the number of tokens; otherwise there are as many as fit. Raises BadRequest, DoesNotFit
    and QuotaExceeded for rows that can never run at the same time."""
    first, combine = admitted[0], prefix.manifest.combine
    rows_of = list(zip(*(each.requests for each in admitted), strict=True))
    if combine is Combine.MEAN_LOGPROB:
        rows_of = [_limited(rows, config, has_limit=has_limit) for rows in rows_of]
        _check_resident(prefix, rows_of[0], config)
    unloaded = [each.unloaded or ((),) * len(each.requests) for each in admitted]
    warnings = chain(prefix.warnings, *(each.warnings for each in admitted))
    return replace(
        first,
        prefix=prefix,
        requests=tuple(chain(*rows_of)),
        prompt_lengths=tuple(chain(*zip(*(each.prompt_lengths for each in admitted), strict=True))),
        unloaded=tuple(chain(*zip(*unloaded, strict=True))),
        warnings=tuple(dict.fromkeys(warnings)),
        num_members=len(admitted),
    )


def fused(admitted: Admitted) -> Admitted:
    """The request as the engine runs it: where log-probabilities are averaged, all members of an
    ensemble are one request."""
    prefix = admitted.prefix
    if prefix is None or not prefix.ensemble or prefix.manifest.combine is Combine.VOTE:
        return admitted
    count = admitted.num_members
    return replace(
        admitted,
        requests=tuple(map(_fused, grouped(admitted.requests, count))),
        prompt_lengths=tuple(map(sum, grouped(admitted.prompt_lengths, count))),
        num_members=1,
    )


def check_shape(admitted: Admitted, *, stream: bool, background: bool) -> Admitted:
    """The same request. Raises BadRequest for an answer that an ensemble cannot give: a stream of
    votes, and a line of a batch whose members have to run together."""
    prefix = admitted.prefix
    if prefix is None or not prefix.ensemble:
        return admitted
    votes = prefix.manifest.combine is Combine.VOTE
    if votes and stream:
        raise BadRequest(
            "expected no stream of an ensemble with combine 'vote', which is decided by whole "
            "answers; received 'stream': true",
            code=_CODE,
            param="stream",
        )
    if background and not votes:
        raise BadRequest(
            "expected an ensemble with combine 'vote' in a batch, since all members of one with "
            "'mean_logprob' run at the same time; received 'mean_logprob'",
            code=_CODE,
            param=_param(prefix),
        )
    return admitted


def check_asked(
    prefix: ResolvedPrefix | None, *, num_choices: int, most: int, max_tokens: int | None
) -> None:
    """Raise BadRequest for what an ensemble cannot be asked."""
    if prefix is None or not prefix.ensemble:
        return
    if max_tokens == 0:
        raise BadRequest(
            "expected at least one token of output from an ensemble; received 'max_tokens': 0",
            code=_CODE,
            param="max_tokens",
        )
    if num_choices * len(prefix.ensemble) > most:
        raise BadRequest(
            f"expected at most {most} rows in one request; received {num_choices} answers of an "
            f"ensemble of {len(prefix.ensemble)}",
            param="n",
        )


def refuse_ensemble(prefix: ResolvedPrefix | None, *, what: str, param: str | None = None) -> None:
    """Raise BadRequest for an ensemble where there is one prefix or none."""
    if prefix is not None and prefix.ensemble:
        raise BadRequest(
            f"expected one prefix {what}; received an ensemble of {len(prefix.ensemble)}",
            code=_CODE,
            param=param or _param(prefix),
        )


def _param(prefix: ResolvedPrefix) -> str:
    return "prefix" if prefix.chosen_by is ChosenBy.PREFIX else "model"


def _fused(rows: Sequence[AdmittedRequest]) -> AdmittedRequest:
    first, *others = rows
    members = tuple(Member(row.prompt, row.prefix, row.inputs) for row in others)
    return replace(first, members=members)


def _limited(
    rows: Sequence[AdmittedRequest], config: SchedulerConfig, *, has_limit: bool
) -> tuple[AdmittedRequest, ...]:
    """The rows of one answer, with the same number of tokens, that fit the pool together."""
    output = min(row.stop.max_tokens for row in rows)

    def blocks(num_output: int) -> int:
        return config.blocks_together((row.prefix, len(row.prompt) + num_output) for row in rows)

    if blocks(output) > config.num_usable_blocks:
        fits = bisect_right(range(output + 1), config.num_usable_blocks, key=blocks) - 1
        if has_limit or fits < max(1, rows[0].stop.min_tokens):
            raise DoesNotFit(
                f"an ensemble of {len(rows)} with {output} tokens of output can never fit: its "
                f"rows need {blocks(output)} blocks of the KV pool, which has "
                f"{config.num_usable_blocks}",
                param="max_tokens" if fits > 0 else "prompt",
            )
        output = fits
    return tuple(replace(row, stop=replace(row.stop, max_tokens=output)) for row in rows)


def _check_resident(
    prefix: ResolvedPrefix, rows: Sequence[AdmittedRequest], config: SchedulerConfig
) -> None:
    """Raise for members that may not be in the pool at the same time."""
    count = sum({row.prefix: row.prefix.num_tokens for row in rows if row.prefix}.values())
    has = f"{prefix.manifest.reference} needs {count} at the same time"
    cap, budget = rows[0].max_resident_tokens, config.max_resident_tokens
    error: PrefixdError | None = None
    if cap is not None and count > cap:
        error = QuotaExceeded(
            f"the tenant may keep {cap} virtual tokens resident; {has}",
            param="max_resident_tokens",
        )
    elif budget is not None and count > budget:
        error = DoesNotFit(
            f"the server keeps {budget} virtual tokens resident; {has}", param=_param(prefix)
        )
    elif len(rows) > config.max_running:
        error = DoesNotFit(
            f"the server runs {config.max_running} sequences at a time; "
            f"{prefix.manifest.reference} has {len(rows)} members",
            param=_param(prefix),
        )
    if error is not None:
        raise error
