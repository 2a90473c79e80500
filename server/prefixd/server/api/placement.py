"""Where the virtual tokens of a version stand: in front as a resident prefix, or inside a prompt.

Virtual tokens that nothing places stand in front, in order, and so do those that are placed before
any text. These are a prefix in the pool, shared as ever. The others are embeddings in the prompt.

::

    8 virtual tokens, "{prefix:2:4}Tweet: {prompt}{prefix:4:8} Label:"
    in front 0 1 2 3, then: "Tweet: ", the prompt, 4 5 6 7, " Label:"
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from prefixd.server.engine.request import Composition, PrefixHandle, PrefixKey, Ranges
from prefixd.server.errors import Conflict
from prefixd.store.artifact.composition import Member, composition_digest
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.template import Piece, Rows, check_template, parse_template
from prefixd.store.catalog.pins import Pinned
from prefixd.store.errors import ArtifactRefused
from prefixd.store.store import Manifest


@dataclass(frozen=True, slots=True)
class Layout:
    """Virtual tokens in front, of which there are ``num_front``, and the pieces behind them."""

    front: Ranges
    num_front: int
    pieces: tuple[Piece, ...]


def lay_out(pieces: Sequence[Piece], num_virtual_tokens: int) -> Layout:
    """The layout of pieces whose ranges fit a prefix of so many virtual tokens."""
    first = next((i for i, piece in enumerate(pieces) if not isinstance(piece, Rows)), len(pieces))
    front: list[tuple[int, int]] = []
    placed = sorted(piece for piece in pieces if isinstance(piece, Rows))
    stops, starts = [0, *(rows.stop for rows in placed)], [rows.start for rows in placed]
    unplaced = zip(stops, [*starts, num_virtual_tokens], strict=True)
    leading = (piece for piece in pieces[:first] if isinstance(piece, Rows))
    for start, stop in (*unplaced, *leading):
        if front and front[-1][1] == start:
            front[-1] = front[-1][0], stop
        elif start < stop:
            front.append((start, stop))
    return Layout(tuple(front), sum(stop - start for start, stop in front), tuple(pieces[first:]))


def template_layout(template: str | None, *, kind: Kind, num_virtual_tokens: int) -> Layout | None:
    """The layout of a template; None: it places nothing. Raises ArtifactRefused."""
    check_template(template, kind=kind, num_virtual_tokens=num_virtual_tokens)
    pieces = None if template is None else parse_template(template)
    return None if pieces is None else lay_out(pieces, num_virtual_tokens)


def layout_of(manifest: Manifest) -> Layout | None:
    """The layout of a version's template; None: it places nothing. Raises Conflict for a template
    that was stored before templates were checked, and does not fit."""
    try:
        return template_layout(
            manifest.prompt_template,
            kind=manifest.kind,
            num_virtual_tokens=manifest.num_virtual_tokens,
        )
    except ArtifactRefused as refused:
        raise Conflict(
            f"the metadata of {manifest.reference} must be changed before it can be used: "
            f"{refused.message}",
            code=refused.code,
            param="model",
        ) from None


def front_of(whole: PrefixHandle, layout: Layout | None) -> PrefixHandle | None:
    """What stands in front of the text, of a whole prefix: all of it without a layout; None:
    nothing."""
    if not whole.num_tokens:
        return None
    if layout is None or layout.front == ((0, whole.num_tokens),):
        return whole
    if not layout.num_front:
        return None
    return PrefixHandle(whole.key._replace(rows=layout.front), layout.num_front)


def without_last(front: PrefixHandle, kind: Kind) -> tuple[PrefixHandle | None, Rows | None]:
    """What stands in front without its last row, and that row, which is to stand in the prompt: the
    model's output there predicts the first token of the text. Of keys and values there is no
    output, and of a stack none is taken: all of them stay, and the row is None."""
    if kind is not Kind.HARD_PROMPT and not kind.is_soft:
        return front, None
    *others, (start, stop) = front.key.rows or ((0, front.num_tokens),)
    rows = tuple(others) if stop - start == 1 else (*others, (start, stop - 1))
    if not rows:
        return None, Rows(stop - 1, stop)
    key = front.key._replace(rows=rows)
    return PrefixHandle(key, front.num_tokens - 1), Rows(stop - 1, stop)


def whole_of(manifest: Manifest) -> PrefixHandle:
    """The whole prefix of a version."""
    return PrefixHandle(
        whole_key(manifest.tenant, manifest.digest, manifest.kind, manifest.members),
        manifest.num_virtual_tokens,
        gated=not manifest.kind.takes_positions,
    )


def whole_key(tenant: str, digest: str, kind: Kind, members: Sequence[Member]) -> PrefixKey:
    """The key of a whole version. That of a stack or a blend depends on the members alone, so that
    it is one prefix in the pool however it is named."""
    if kind not in {Kind.STACK, Kind.BLEND}:
        return PrefixKey(tenant, digest)
    parts = [(member.digest, member.weight) for member in members]
    if kind is Kind.BLEND:
        parts.sort()
    digests = tuple(digest for digest, _ in parts)
    weights = tuple(weight for _, weight in parts if weight is not None)
    composition = Composition(str(kind), digests, weights)
    return PrefixKey(tenant, composition_digest(kind, digests, weights), composition=composition)


def handle_of(manifest: Manifest) -> PrefixHandle | None:
    """What the engine keeps of a version for its requests; None: nothing stands in front. Raises
    Conflict as ``layout_of``."""
    return front_of(whole_of(manifest), layout_of(manifest))


def key_of(manifest: Manifest) -> PrefixKey | None:
    """The key of that; None also for a template that does not fit."""
    with suppress(Conflict):
        handle = handle_of(manifest)
        return None if handle is None else handle.key
    return None


def pinned_handle(pin: Pinned) -> PrefixHandle | None:
    """What a pin keeps resident; None: nothing."""
    kind = Kind.BLEND if pin.is_blend else Kind.STACK if pin.members else Kind.SOFT_PROMPT
    key = whole_key(pin.key.tenant, pin.key.digest, kind, pin.members)
    whole = PrefixHandle(key, pin.num_virtual_tokens)
    with suppress(ArtifactRefused):
        return front_of(
            whole,
            template_layout(
                pin.prompt_template,
                kind=Kind.SOFT_PROMPT,
                num_virtual_tokens=pin.num_virtual_tokens,
            ),
        )
    return None
