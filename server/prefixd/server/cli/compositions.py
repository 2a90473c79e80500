"""Stacks, blends and ensembles on the command line."""

from enum import StrEnum

import typer


class Combine(StrEnum):
    """How the predictions of an ensemble are combined."""

    MEAN_LOGPROB = "mean_logprob"
    VOTE = "vote"


def composition(
    *, stack: str | None, blend: str | None, ensemble: str | None, combine: Combine | None
) -> dict[str, object] | None:
    """What the options compose, as the API takes it; None: nothing. Raises BadParameter."""
    options = {"stack": stack, "blend": blend, "ensemble": ensemble}
    named = {kind: value for kind, value in options.items() if value is not None}
    if len(named) > 1:
        raise typer.BadParameter(f"expected one of --{' and --'.join(named)}; received both")
    if combine is not None and ensemble is None:
        raise typer.BadParameter("expected it with --ensemble", param_hint="--combine")
    if blend is not None:
        return {"blend": _weights(blend)}
    if not named:
        return None
    [(kind, value)] = named.items()
    members: dict[str, object] = {kind: _parts(value, hint=f"--{kind}")}
    return members if combine is None else members | {"combine": str(combine)}


def _parts(value: str, *, hint: str) -> list[str]:
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise typer.BadParameter("expected references between commas", param_hint=hint)
    return parts


def _weights(value: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in _parts(value, hint="--blend"):
        reference, equals, number = part.partition("=")
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not equals or reference in weights:
            raise typer.BadParameter(
                "expected NAME=WEIGHT between commas, each name once, such as a=0.7,b=0.3",
                param_hint="--blend",
            )
        weights[reference] = weight
    return weights
