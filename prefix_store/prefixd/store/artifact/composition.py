"""Compositions: prefixes made of other versions. What their members must be, and their digest.

::

    stack      virtual tokens one after another: texts, soft prompts, and one KV prefix in front
    blend      the weighted mean of soft prompts of one length
    ensemble   several prefixes whose predictions are combined, each in a sequence of its own

The digest of a stack or a blend covers what its KV depends on: the kind, the members' digests, and
the weights. Names are not part of it, and neither is the order of a blend.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from prefixd.store.artifact.kinds import Kind, TextRole
from prefixd.store.artifact.strict import StrictJsonError, canonical, parse_object
from prefixd.store.errors import ArtifactRefused

MAX_MEMBERS = 16
MAX_ENSEMBLE = 8
MAX_COMPOSITION_BYTES = 64 * 1024
WEIGHT_TOLERANCE = 1e-6
"""How far the sum of the weights of a blend may be from 1."""


class Combine(StrEnum):
    """How the predictions of an ensemble are combined: the mean of the log-probabilities of each
    token, or the most frequent answer."""

    MEAN_LOGPROB = "mean_logprob"
    VOTE = "vote"


class Member(NamedTuple):
    """A version that a composition is made of; ``weight`` is that of a blend's, else None, and
    ``num_positions`` are those that it takes (0: unknown, in an artifact file)."""

    name: str
    version: int
    digest: str
    kind: Kind
    weight: float | None = None
    num_positions: int = 0

    @property
    def reference(self) -> str:
        """``name@3``."""
        return f"{self.name}@{self.version}"


class Candidate(Protocol):
    """What decides whether a version can be a member: the part of a manifest that counts."""

    @property
    def reference(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def num_virtual_tokens(self) -> int: ...
    @property
    def role(self) -> TextRole | None: ...
    @property
    def places_tokens(self) -> bool: ...


class RunTokenizer(Protocol):
    """The calls of a tokenizer that a stack needs; see ``prefixd.server.api.served.Tokenizer``."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def encode_prefix(self, text: str) -> list[int]: ...
    def without_opening(self, token_ids: list[int]) -> list[int]: ...


def num_members(kind: Kind) -> tuple[int, int]:
    """The fewest and the most members of a composition."""
    return (1 if kind is Kind.STACK else 2), (
        MAX_ENSEMBLE if kind is Kind.ENSEMBLE else MAX_MEMBERS
    )


def weights_problem(weights: Collection[float]) -> tuple[str, str] | None:
    """What was expected of the weights of a blend, and what is wrong; None: nothing is."""
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        return "weights above 0", repr(wrong[0])
    total = math.fsum(weights)
    if abs(total - 1) > WEIGHT_TOLERANCE:
        return "weights with the sum 1", f"the sum {total:.9g}"
    return None


def check_members(kind: Kind, members: Sequence[Candidate]) -> None:
    """Raise ArtifactRefused for versions that cannot be the members of such a composition."""
    for place, member in enumerate(members):
        match kind:
            case Kind.STACK:
                _check_stacked(member, place)
            case Kind.BLEND:
                _check_blended(member, members[0])
            case _ if member.kind is Kind.ENSEMBLE:
                raise _refused(member, "no ensemble in an ensemble", "an ensemble")


def _check_stacked(member: Candidate, place: int) -> None:
    if member.kind not in {Kind.HARD_PROMPT, Kind.SOFT_PROMPT, Kind.KV_PREFIX}:
        expected = "texts, soft prompts, and a KV prefix in front in a stack"
        raise _refused(member, expected, f"the kind {member.kind}")
    if member.kind is Kind.KV_PREFIX and place:
        raise _refused(
            member,
            "a KV prefix only in front of a stack, since its keys and values hold the positions "
            "that it was trained at",
            f"one in place {place + 1}",
        )
    if member.role is TextRole.SYSTEM:
        raise _refused(
            member,
            "texts with the role raw in a stack, since one with the role system is a part of each "
            "rendered conversation",
            "one with the role system",
        )
    if member.places_tokens:
        raise _refused(
            member,
            "virtual tokens in front of the prompt in a stack",
            "some that its prompt_template places",
        )


def _check_blended(member: Candidate, first: Candidate) -> None:
    if member.kind is not Kind.SOFT_PROMPT:
        raise _refused(member, "soft prompts in a blend", f"the kind {member.kind}")
    if member.num_virtual_tokens != first.num_virtual_tokens:
        raise _refused(
            member,
            f"soft prompts of one length in a blend ({first.num_virtual_tokens} virtual tokens, as "
            f"{first.reference} has)",
            str(member.num_virtual_tokens),
        )


def _refused(member: Candidate, expected: str, received: str) -> ArtifactRefused:
    return ArtifactRefused(
        "unsupported_member",
        f"{member.reference}: expected {expected}; received {received}",
        param="prefix",
    )


def composition_digest(kind: Kind, digests: Sequence[str], weights: Sequence[float]) -> str:
    """The digest of what a composition compiles to: of its kind, and of digests and weights in this
    order."""
    content = {"kind": str(kind), "digests": [*digests], "weights": [*weights]}
    return hashlib.sha256(canonical(content)).hexdigest()


def write_members(members: Sequence[Member], combine: Combine | None) -> str | None:
    """Members as the catalog keeps them; None without any."""
    if not members:
        return None
    listed = [member._asdict() for member in members]
    return json.dumps({"members": listed, "combine": combine})


def read_members(text: str | None) -> tuple[tuple[Member, ...], Combine | None]:
    """What ``write_members`` wrote; None is of a version without members."""
    if text is None:
        return (), None
    stored = json.loads(text)
    members = (Member(**fields | {"kind": Kind(fields["kind"])}) for fields in stored["members"])
    combine = stored["combine"]
    return tuple(members), None if combine is None else Combine(combine)


def composition_payload(members: Sequence[Member], combine: Combine | None) -> bytes:
    """What the artifact file of a composition holds: canonical JSON."""
    listed = [
        {
            "digest": member.digest,
            "kind": str(member.kind),
            "reference": member.reference,
            "weight": member.weight,
        }
        for member in members
    ]
    return canonical({"combine": combine, "members": listed})


def parse_payload(kind: Kind, payload: bytes) -> tuple[tuple[Member, ...], Combine | None]:
    """What ``composition_payload`` wrote; raise ArtifactRefused for anything else."""
    try:
        fields = parse_object(payload)
        members = tuple(_member(each) for each in fields["members"])
        combine = None if fields["combine"] is None else Combine(fields["combine"])
    except (StrictJsonError, KeyError, TypeError, ValueError, AttributeError):
        raise _malformed(kind) from None
    fewest, most = num_members(kind)
    weights = [member.weight for member in members]
    is_right = (
        fewest <= len(members) <= most
        and (combine is not None) is (kind is Kind.ENSEMBLE)
        and all((weight is not None) is (kind is Kind.BLEND) for weight in weights)
        and composition_payload(members, combine) == payload
    )
    if not is_right or (
        kind is Kind.BLEND and weights_problem([weight or 0.0 for weight in weights]) is not None
    ):
        raise _malformed(kind)
    return members, combine


def _member(fields: Any) -> Member:
    name, _, version = fields["reference"].partition("@")
    weight = fields["weight"]
    if weight is not None and type(weight) is not float:
        raise TypeError(weight)
    return Member(name, int(version), fields["digest"], Kind(fields["kind"]), weight)


def _malformed(kind: Kind) -> ArtifactRefused:
    return ArtifactRefused(
        "malformed_artifact", f"not an artifact file: it does not hold the members of a {kind}"
    )


def encoded_runs(
    parts: Iterable[str | int], tokenizer: RunTokenizer
) -> list[tuple[int, ...] | int]:
    """The parts of a stack with token ids in place of texts; a number stands for anything else.
    Texts next to each other are one text, and the first of them has the opening tokens."""
    runs: list[str | int] = []
    for part in parts:
        last = runs[-1] if runs else None
        if isinstance(part, str) and isinstance(last, str):
            runs[-1] = last + part
        else:
            runs.append(part)
    encoded: list[tuple[int, ...] | int] = []
    is_open = False
    for run in runs:
        if isinstance(run, int):
            encoded.append(run)
            continue
        if is_open:
            ids = tokenizer.without_opening(tokenizer.encode(run, add_special_tokens=False))
        else:
            ids = tokenizer.encode_prefix(run)
        encoded.append(tuple(ids))
        is_open = True
    return encoded
