"""Stacks, blends and ensembles as a request names them.

::

    {"stack": ["company@prod", "alice"]}              virtual tokens one after another
    {"blend": {"formal": 0.7, "brief": 0.3}}          a weighted mean of soft prompts
    {"ensemble": ["a@1", "b@2"], "combine": "vote"}   predictions of several prefixes, combined
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.shapes import refusal
from prefixd.store.artifact.composition import (
    MAX_ENSEMBLE,
    MAX_MEMBERS,
    Combine,
    weights_problem,
)
from prefixd.store.artifact.kinds import Kind
from prefixd.store.names import REFERENCE

MemberReference = Annotated[
    str,
    Field(
        max_length=257,
        pattern=REFERENCE,
        description="A prefix reference: `name`, `name@3` or `name@alias`.",
    ),
]


@dataclass(frozen=True, slots=True)
class NamedComposition:
    """A composition whose members are references; those of a blend have weights."""

    kind: Kind
    members: tuple[tuple[str, float | None], ...]
    combine: Combine | None = None


class CompositionFields(StrictModel):
    """Exactly one of `stack`, `blend` and `ensemble`."""

    stack: list[MemberReference] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_MEMBERS,
        description="Texts and soft prompts, whose virtual tokens stand one after another; the "
        "first may be a KV prefix.",
    )
    blend: dict[MemberReference, Annotated[float, Field(gt=0, le=1)]] | None = Field(
        default=None,
        min_length=2,
        max_length=MAX_MEMBERS,
        description="Soft prompts of one length, each with its weight; the sum of them is 1.",
    )
    ensemble: list[MemberReference] | None = Field(
        default=None,
        min_length=2,
        max_length=MAX_ENSEMBLE,
        description="Prefixes whose predictions are combined; one that is named twice counts "
        "twice.",
    )
    combine: Combine | None = Field(
        default=None,
        strict=False,
        description="Of an ensemble: the mean of the log-probabilities of each next token, or the "
        "most frequent of the whole answers. Default: `mean_logprob`.",
    )

    @model_validator(mode="after")
    def _check_one(self) -> "CompositionFields":
        named = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(named) != 1:
            raise refusal(
                f"expected exactly one of 'stack', 'blend' and 'ensemble'; received "
                f"{' and '.join(map(repr, named)) or 'none of them'}"
            )
        if self.combine is not None and self.ensemble is None:
            raise refusal("expected it only with 'ensemble'; received it without", at=("combine",))
        problem = None if self.blend is None else weights_problem(self.blend.values())
        if problem is not None:
            expected, received = problem
            raise refusal(f"expected {expected}; received {received}", at=("blend",))
        return self

    @property
    def composition(self) -> NamedComposition:
        """The kind, the references and the weights."""
        if self.blend is not None:
            return NamedComposition(Kind.BLEND, tuple(self.blend.items()))
        if self.stack is not None:
            return NamedComposition(Kind.STACK, _unweighted(self.stack))
        assert self.ensemble is not None
        combine = self.combine or Combine.MEAN_LOGPROB
        return NamedComposition(Kind.ENSEMBLE, _unweighted(self.ensemble), combine)


class ComposedPrefix(CompositionFields):
    """Several prefixes for one request."""


_KINDS = ("stack", "blend", "ensemble")


def _unweighted(references: list[str]) -> tuple[tuple[str, Any], ...]:
    return tuple((reference, None) for reference in references)
