"""The events of a stream are those of plain serialization, byte for byte."""

import json

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from prefixd.server.api.generate import event_encoder
from prefixd.server.api.generate.answer_options import AnswerOptions
from prefixd.server.api.generate.event_encoder import EventEncoder, sse_event
from prefixd.server.api.generate.formatter import ChatFormatter, CompletionFormatter
from prefixd.server.api.token_times import TokenTimes, TokenTimesCollector
from prefixd.server.engine.request import (
    FinishEvent,
    FinishReason,
    PositionLogprobs,
    TokenEvent,
    TokenLogprob,
)
from prefixd.server.testing import ByteTokenizer

TEXTS = ["a", ' "quoted" \\ \n\t\x00\x1f\x7f', "<text>", "é 漢 😀\u2028", ',"logprobs":null}']
LOGPROBS = (PositionLogprobs(TokenLogprob(97, -0.5), (TokenLogprob(98, -1.0),), None, 0),)
ENVELOPE = {"id": "<text>", "object": "x", "created": 1, "model": "<text>", "prefix": None}


@pytest.mark.parametrize("wants_usage", [False, True])
@pytest.mark.parametrize("kind", [CompletionFormatter, ChatFormatter])
def test_events_equal_plain_serialization(
    kind: type[CompletionFormatter | ChatFormatter], wants_usage: bool
) -> None:
    formatter = kind(ByteTokenizer(), AnswerOptions(top_logprobs=1))
    encoder = EventEncoder(formatter, ENVELOPE, wants_usage=wants_usage)
    usage = {"usage": None} if wants_usage else {}

    def plain(*entries: dict[str, object]) -> bytes:
        return b"".join(sse_event({**ENVELOPE, "choices": [entry], **usage}) for entry in entries)

    assert encoder.openings(2) == plain(*formatter.openings(2))
    tokens = [(i % 3, TokenEvent(i % 3, text, (5,))) for i, text in enumerate(TEXTS * 2)]
    expected = plain(*(formatter.delta(choice, event) for choice, event in tokens))
    assert encoder.batch([*tokens, (0, TokenEvent(0, "", (6,)))]) == expected
    probable = TokenEvent(1, "a", (97,), LOGPROBS)
    assert encoder.batch([(1, probable)]) == plain(formatter.delta(1, probable))
    finish = FinishEvent(1, FinishReason.STOP, completion_tokens=1)
    assert encoder.batch([(1, finish)]) == plain(formatter.closing(1, finish))
    assert encoder.usage({"n": 1}) == sse_event({**ENVELOPE, "choices": [], "usage": {"n": 1}})


def test_only_the_text_of_a_token_is_serialized(monkeypatch: pytest.MonkeyPatch) -> None:
    serialized = []

    def to_json(value: object) -> bytes:
        serialized.append(value)
        return json.dumps(value).encode()

    monkeypatch.setattr(event_encoder, "to_json", to_json)
    encoder = EventEncoder(ChatFormatter(ByteTokenizer()), ENVELOPE, wants_usage=False)
    encoder.batch([(0, TokenEvent(0, "first", (1,)))])
    serialized.clear()
    encoder.batch([(0, TokenEvent(0, "second", (1,)))])
    assert serialized == ["second"]


def test_token_times_are_shown_as_a_histogram_that_observed_each_token() -> None:
    edges = (0.001, 0.0025, 1.0)
    expected, shown = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("t_seconds", "Text.", ["kind"], buckets=edges, registry=expected)
    times = {"a": TokenTimes(edges), "b": TokenTimes(edges)}
    shown.register(TokenTimesCollector("t_seconds", "Text.", "kind", times.items()))
    histogram.labels("b")
    for seconds, num_tokens in [(0.0005, 2), (0.001, 1), (0.5, 3), (7.0, 1)]:
        times["a"].observe(seconds, num_tokens)
        for _ in range(num_tokens):
            histogram.labels("a").observe(seconds)
    samples = [
        [(s.name, s.labels, s.value) for family in registry.collect() for s in family.samples]
        for registry in (shown, expected)
    ]
    assert sorted(samples[0], key=str) == sorted(samples[1], key=str)
    assert generate_latest(shown).startswith(b"# HELP t_seconds Text.\n# TYPE t_seconds histogram")
