"""A request is sent again only where that does no harm, a bounded number of times."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from prefixd.client import AsyncClient, Client, protocol, protocol_admin, protocol_users, scores
from prefixd.client.errors import (
    ApiError,
    ClientError,
    ConnectError,
    DeadlineError,
    NotFoundError,
    ProtocolError,
    RateLimitError,
    ServerError,
    StreamInterruptedError,
    TimedOutError,
    TransportError,
    UnavailableError,
)
from prefixd.client.transport import RetryPolicy
from prefixd.client.wire import Call, Repeat, Response, StreamCall, error_of
from tests.clients.samples import MANIFEST

POLICY = RetryPolicy(max_retries=2, first_wait=1.0, max_wait=5.0)
REFUSED, UNANSWERED, LOST = Repeat
HELLO = [{"role": "user", "content": "Hi"}]


def unavailable(code: str | None = None, retry_after: float | None = None) -> ApiError:
    return UnavailableError("full", status=503, code=code, retry_after=retry_after)


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (ConnectError("x"), (REFUSED, UNANSWERED, LOST)),
        (RateLimitError("slow down", status=429), (REFUSED, UNANSWERED, LOST)),
        (unavailable("overloaded"), (REFUSED, UNANSWERED, LOST)),
        (unavailable("unavailable"), (REFUSED, UNANSWERED, LOST)),
        (unavailable("too_many_connections"), (REFUSED, UNANSWERED, LOST)),
        (unavailable("shutting_down"), (UNANSWERED, LOST)),
        (unavailable("storage_unavailable"), (UNANSWERED, LOST)),
        (unavailable(), (UNANSWERED, LOST)),
        (TransportError("x"), (UNANSWERED, LOST)),
        (ServerError("x", status=502), (UNANSWERED, LOST)),
        (DeadlineError("x", status=504), (LOST,)),
        (DeadlineError("x", status=504, code="deadline_exceeded"), ()),
        (TimedOutError("x"), ()),
        (StreamInterruptedError("x"), ()),
        (ProtocolError("x"), ()),
        (ServerError("x", status=500), ()),
        (NotFoundError("x", status=404), ()),
    ],
)
def test_which_failures_are_retried(error: ClientError, retried: tuple[Repeat, ...]) -> None:
    for repeat in Repeat:
        waits = [POLICY.wait(error, attempt=n, jitter=0.0, repeat=repeat) for n in (1, 2, 3)]
        assert waits == ([0.5, 1.0, None] if repeat in retried else [None] * 3), repeat


def wait(error: ClientError, attempt: int = 1, jitter: float = 0.0) -> float | None:
    return POLICY.wait(error, attempt=attempt, jitter=jitter, repeat=REFUSED)


def test_retry_after_replaces_the_wait() -> None:
    assert wait(unavailable("overloaded", 3.0), jitter=0.9) == 3.0


def test_no_retry_when_retry_after_exceeds_max_wait() -> None:
    assert wait(unavailable("overloaded", 60.0)) is None


@pytest.mark.parametrize(
    ("header", "waited"),
    [("2", 2.0), ("0", 0.0)]
    + [(wrong, 0.5) for wrong in ("nan", "inf", "-inf", "-1", "", "Mon, 30 Nov 2026 16:00:00 GMT")],
)
def test_retry_after_counts_if_it_is_a_time_to_wait(header: str, waited: float) -> None:
    refused = Response(429, {"retry-after": header}, b"{}")
    assert wait(error_of(refused)) == waited


def test_jitter_spreads_the_wait_over_its_upper_half() -> None:
    assert wait(ConnectError("x"), attempt=2, jitter=0.5) == 1.5


def test_waits_double_up_to_the_longest() -> None:
    policy = RetryPolicy(max_retries=9, first_wait=1.0, max_wait=5.0)
    waits = [
        policy.wait(ConnectError("x"), attempt=n, jitter=0.0, repeat=REFUSED) for n in range(1, 6)
    ]
    assert waits == [0.5, 1.0, 2.0, 2.5, 2.5]


@pytest.mark.parametrize(
    ("call", "repeat"),
    [
        (protocol.show_prefix("x"), LOST),
        (protocol.upload_text("x", "x"), LOST),
        (protocol.upload_artifact("x", b"x"), LOST),
        (protocol.upload("x", config=b"", weights=b""), LOST),
        (protocol.set_alias("x", "prod", version=1), LOST),
        (protocol.pin("x"), LOST),
        (protocol.warm("x"), LOST),
        (protocol_users.bind_user("ann", "x"), LOST),
        (protocol_users.set_default("x"), LOST),
        (protocol_users.import_bindings(b""), LOST),
        (protocol_admin.create_tenant("x"), LOST),
        (protocol_admin.create_key(), REFUSED),
        (protocol_admin.rotate_key("x"), REFUSED),
        (protocol_admin.revoke_key("x"), REFUSED),
        (protocol_admin.set_quota("x", {}), REFUSED),
        (protocol.patch_metadata("x", {}), REFUSED),
        (protocol.delete_prefix("x"), REFUSED),
        (protocol.delete_version("x", 1), REFUSED),
        (protocol.remove_alias("x", "prod"), REFUSED),
        (protocol_users.unbind_user("x"), REFUSED),
        (protocol.complete("x", model="x"), UNANSWERED),
        (protocol.stream_chat([], model="x"), UNANSWERED),
        (scores.loglikelihood(["x"], model="x", prompt="x"), UNANSWERED),
    ],
)
def test_how_each_kind_of_call_may_be_repeated(
    call: Call[Any] | StreamCall, repeat: Repeat
) -> None:
    request = call.request
    assert request.repeat is repeat
    if repeat is LOST and request.method != "GET" and not request.path.endswith("/warm"):
        assert request.headers["idempotency-key"]


# ── A connection that is lost after the request ──────────────────────────────────────────────


def response(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)


@contextmanager
def losing(*responses: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request for each of ``responses`` and sends it; for None it closes the
    connection instead. Yields its URL and the heads of the requests."""
    heads: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        for sent in responses:
            try:
                connection, _ = listener.accept()
            except TimeoutError:  # fewer requests than expected: the test fails by their heads
                return
            with connection, connection.makefile("rb") as received:
                lines = list(iter(received.readline, b"\r\n"))
                heads.append(b"".join(lines))
                sizes = [line.split()[1] for line in lines if line.startswith(b"content-length")]
                received.read(int(sizes[0]) if sizes else 0)
                if sent is not None:
                    connection.sendall(sent)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heads
        thread.join(30)


def call_both(url: str, name: str, *args: Any, **kwargs: Any) -> list[Any]:
    """The outcomes of a method of a synchronous and of an asynchronous client: what it returns or
    raises."""
    outcomes: list[Any] = []

    async def ignore(_: float) -> None:
        pass

    async def asynchronously() -> None:
        async with AsyncClient(url, sleep=ignore) as client:
            try:
                outcomes.append(await getattr(client, name)(*args, **kwargs))
            except ClientError as error:
                outcomes.append(error)

    with Client(url, sleep=lambda _: None) as client:
        try:
            outcomes.append(getattr(client, name)(*args, **kwargs))
        except ClientError as error:
            outcomes.append(error)
    anyio.run(asynchronously)
    return outcomes


def test_a_lost_upload_is_sent_again_under_its_key() -> None:
    manifest = response(MANIFEST)
    with losing(None, manifest, None, manifest) as (url, heads):
        uploads = call_both(url, "upload_text", "triage", "x")
    assert [upload.prefix.reference for upload in uploads] == ["triage@3"] * 2
    keys = [head.split(b"idempotency-key: ")[1].split(b"\r\n")[0] for head in heads]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_a_lost_answer_is_asked_for_again_and_a_lost_delete_is_not() -> None:
    answer = {"id": "c", "model": "m", "choices": [{"index": 0, "text": "Hi"}]}
    with losing(None, None, response(answer), None, response(answer)) as (url, _):
        answers = call_both(url, "complete", "x", model="m")
    assert [one.text for one in answers] == ["Hi", "Hi"]
    with losing(None, None) as (url, heads):
        errors = call_both(url, "delete_prefix", "x")
    assert [type(error) for error in errors] == [TransportError, TransportError]
    assert len(heads) == 2


def test_a_whole_answer_that_was_cut_is_asked_for_again() -> None:
    answer = response({"id": "c", "model": "m", "choices": [{"index": 0, "text": "Hi"}]})
    with losing(answer[:-9], answer, answer[:-9], answer) as (url, heads):
        answers = call_both(url, "complete", "x", model="m")
    assert [one.text for one in answers] == ["Hi", "Hi"]
    assert len(heads) == 4


def test_a_stream_that_has_begun_is_not_asked_for_again() -> None:
    chunk = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    begun = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + chunk
    with losing(None, begun) as (url, heads), Client(url, sleep=lambda _: None) as client:
        chunks = iter(client.stream_chat(HELLO, model="m"))
        assert next(chunks).text == "a"
        with pytest.raises(TransportError):
            next(chunks)
    assert len(heads) == 2
