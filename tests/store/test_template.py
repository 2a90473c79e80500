"""Markers in ``prompt_template``: what is one, what is text, and what is refused."""

import pytest

from prefixd.server.api.placement import pinned_handle
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.template import (
    PROMPT,
    Piece,
    Rows,
    check_template,
    num_in_front,
    parse_template,
)
from prefixd.store.catalog.pins import Pinned
from prefixd.store.errors import ArtifactRefused
from prefixd.store.names import BlobKey


def check(template: str, *, kind: Kind = Kind.SOFT_PROMPT, count: int = 8) -> None:
    check_template(template, kind=kind, num_virtual_tokens=count)


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("{prefix:0:4}A {prompt}{prefix:4:8}:", [Rows(0, 4), "A ", PROMPT, Rows(4, 8), ":"]),
        ("{prompt}{prefix:10:12}", [PROMPT, Rows(10, 12)]),
        ("{{prompt}{prefix:0:1}{prompt}", ["{prompt}", Rows(0, 1), PROMPT]),
        ("{{prefix:0:4}{prefix:0:1}{prompt}", ["{prefix:0:4}", Rows(0, 1), PROMPT]),
        ("{ {x} {{y}} {prefix} {prefix:0:1}", ["{ {x} {{y}} {prefix} ", Rows(0, 1)]),
        ("{prompt} Label:", None),
        ("{{prefix:0:4} {prompt}", None),
        ("{% for m in messages %}{{ m.content }}{{prompt}}{% endfor %}", None),
        ("", None),
    ],
)
def test_a_template_is_read_as(template: str, pieces: list[Piece] | None) -> None:
    assert parse_template(template) == (None if pieces is None else tuple(pieces))


@pytest.mark.parametrize(
    ("template", "received"),
    [
        ("{prompt}{prefix:0-4}", "'{prefix:0-4}'"),
        ("{prompt}{prefix:0:}", "'{prefix:0:}'"),
        ("{prompt}{prefix:00:4}", "'{prefix:00:4}'"),
        ("{prompt}{prefix:-1:4}", "'{prefix:-1:4}'"),
        ("{prompt}{prefix: 0:4}", "'{prefix: 0:4}'"),
        ("{prompt}{prefix:0:4", "'{prefix:0:4'"),
        ("{prompt}{prefix:\u0661:4}", "prefix:"),
        ("{prompt}{prefix:4:4}", "4:4"),
        ("{prompt}{prefix:4:2}", "4:2"),
        ("{prompt}{prefix:4:9}", "4:9"),
        ("{prompt}{prefix:0:4}{prefix:3:5}", "3 twice"),
        ("{prompt}{prefix:0:4}{prefix:0:4}", "0 twice"),
        ("{prefix:0:4} no prompt", "0 times"),
        ("{prompt}{prefix:0:4}{prompt}", "2 times"),
    ],
)
def test_a_marker_that_does_not_fit_is_refused_with_what_was_received(
    template: str, received: str
) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        check(template)
    assert (refused.value.code, refused.value.param) == (
        "malformed_template",
        "metadata.prompt_template",
    )
    assert "expected" in refused.value.message
    assert received in refused.value.message


@pytest.mark.parametrize("kind", [Kind.KV_PREFIX, Kind.HARD_PROMPT])
def test_only_a_soft_prompt_has_virtual_tokens_to_place(kind: Kind) -> None:
    with pytest.raises(ArtifactRefused, match=kind.value):
        check("{prefix:0:4}{prompt}", kind=kind)
    check("{prompt} Label:", kind=kind)


def test_a_template_that_fits_may_place_them_in_any_order_and_leave_some_out() -> None:
    check("{prefix:6:8}{prompt}{prefix:0:3} x")
    check("{prompt} twice {prompt}: without markers it is not applied")


@pytest.mark.parametrize(
    ("template", "count"),
    [
        (None, 8),
        ("{prompt} Label:", 8),
        ("{{prefix:0:4} {prompt}", 8),
        ("{prefix:6:8}{prefix:0:3}{prompt}", 8),
        ("{prefix:0:2}Tweet: {prompt}{prefix:4:8} Label:", 4),
        ("{prompt}{prefix:0:8}", 0),
        ("{prompt}{prefix:0:9}", 0),
        ("{prompt}{prefix:0-4}", 0),
    ],
)
def test_virtual_tokens_in_front_are_those_that_the_pool_keeps(
    template: str | None, count: int
) -> None:
    assert num_in_front(template, num_virtual_tokens=8) == count
    pin = Pinned(BlobKey("acme", "d"), 8, template)
    handle = pinned_handle(pin)
    assert pin.num_in_front == (handle.num_tokens if handle else 0) == count


def in_front(template: str) -> None:
    check_template(template, kind=Kind.SOFT_PROMPT, num_virtual_tokens=8, all_in_front=True)


@pytest.mark.parametrize(
    "template",
    [
        "{prefix:0:4}{prompt}",
        "{prefix:6:8}{prefix:4:6}{prompt}",
        "Q: {prefix:0:8}{prompt}",
        "{prefix:0:4}{prompt}{prefix:4:8}",
    ],
)
def test_where_all_must_stand_in_front_no_template_moves_one(template: str) -> None:
    check(template)
    with pytest.raises(ArtifactRefused, match="encoder-decoder; got others"):
        in_front(template)


def test_where_all_must_stand_in_front_a_template_may_name_them_in_order() -> None:
    in_front("{prefix:0:8}Q: {prompt}")
    in_front("{prefix:4:6}{prefix:6:8}{prompt}")
    in_front("{prompt} Label:")
