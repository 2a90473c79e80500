"""What layers see of a prefix, and what is said of them."""

from pathlib import Path

import numpy as np
import pytest
import transformers

from prefixd.server.model.decoders import make_decoder
from prefixd.server.model.layers import LayerAttention, LayerCache, Layers
from prefixd.server.model.load import prepare_base
from prefixd.server.model.row_groups import Visibility
from tests.model.broken_models import GATED, random_model


def attention(layer: int = 0, **options: object) -> LayerAttention:
    return LayerAttention(layer, layer, direct=True, heads=4, scale=1.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 7}, {"chunk": 1}, {"chunk": 5}])
@pytest.mark.parametrize("count", [1, 4, 5, 6, 12])
def test_a_token_after_a_prefix_sees_it_as_long_as_attention_does(
    options: dict[str, int], count: int
) -> None:
    positions = np.arange(count, count + 30)
    sees = Visibility(**options).first(positions) < count
    expected = attention(**options).tokens_in_sight(count)
    assert expected == sees.sum()
    assert sees[:expected].all()
    hidden = attention(**options).never_in_sight(count)
    assert hidden == min(count, Visibility(**options).first(positions).min())


def test_a_warning_counts_the_layers_that_lose_sight_of_a_prefix() -> None:
    layers = Layers(
        {},
        {
            0: attention(0, window=16),
            1: attention(1),
            2: attention(2, window=16),
            3: attention(3, chunk=32),
        },
    )
    sees = "layers see no virtual token after the first"
    assert layers.sight_warnings(20) == [
        f"1 of 4 {sees} 12 tokens of prompt and output (chunks of 32 tokens)",
        (
            f"2 of 4 {sees} 15 tokens of prompt and output, and never the first 5 of the prefix "
            "(a sliding window of 16 tokens)"
        ),
    ]
    assert layers.sight_warnings(None) == [
        "2 of 4 layers see virtual tokens only within a sliding window of 16 tokens",
        "1 of 4 layers see virtual tokens only within chunks of 32 tokens",
    ]
    for count in (20, None):
        assert Layers({}, {0: attention(softcap=9.0)}).sight_warnings(count) == []


def plain(**options: object) -> Layers:
    caches = {layer: LayerCache(layer, 2, 8, 8) for layer in range(2)}
    return Layers(caches, {0: attention(0), 1: attention(1, **options)})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, None),
        ({"window": 16}, "a sliding window of 16 tokens in layer 1"),
        ({"chunk": 8, "softcap": 5.0}, "chunks of 8 tokens and a soft cap of 5.0 in layer 1"),
        ({"sinks": True}, "sinks in layer 1"),
        ({"alibi": True}, "alibi in layer 1"),
    ],
)
def test_what_is_not_plain_attention_is_named(options: dict[str, object], named: str) -> None:
    assert plain(**options).beyond_plain() == named


@pytest.mark.parametrize(
    ("caches", "reason"),
    [
        ([(2, 8, 8), (2, 8, 8)], None),
        ([(2, 8, 8)], "1 of its 2 layers cache keys and values"),
        ([(2, 8, 8), (2, 16, 16)], "its layers differ in the size of their keys and values"),
        ([(1, 32, 16)] * 2, "it caches two states of 32 and 16 numbers"),
    ],
)
def test_a_kv_prefix_needs_one_shape_in_all_layers(
    caches: list[tuple[int, int, int]], reason: str | None
) -> None:
    layers = Layers({i: LayerCache(i, *shape) for i, shape in enumerate(caches)}, {})
    refused = layers.kv_prefix_refused(2)
    assert refused is None if reason is None else reason in str(refused)


def test_unseen_is_what_all_layers_that_read_it_have_lost() -> None:
    caches = {0: LayerCache(0, 2, 8, 8), 1: LayerCache(1, 2, 8, 8)}
    first, last = attention(0, window=10), attention(1)
    assert Layers(caches, {0: first, 1: last}).unseen_part(100) == 0.45
    shared = LayerAttention(2, 0, direct=True, heads=4, scale=1.0)
    assert Layers(caches, {0: first, 1: last, 2: shared}).unseen_part(100) == 0


@pytest.mark.parametrize(("choice", "name"), [("auto", "torch"), ("paged", "module")])
def test_windows_are_served_by_the_next_decoder_and_named_in_the_log(
    choice: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.MistralConfig(**GATED, sliding_window=64)
    base = prepare_base(random_model(config), None, name="m", dtype="float32", device="cpu")
    with caplog.at_level("INFO"):
        decoder = make_decoder(base, choice, num_blocks=9, block_size=16, data_folder=tmp_path)
    assert decoder.name == name
    assert "m has a sliding window of 64 tokens in layer 0" in caplog.text
