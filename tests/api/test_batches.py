"""/v1/batches: from an input of lines to the files with their answers."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.api.batches import line_request, worker
from prefixd.server.api.batches.assembly import Assembly
from prefixd.server.api.batches.line_runner import LineRunner, Stop
from prefixd.server.api.batches.lines import LineRefused, parse_line
from prefixd.server.engine.request import AdmittedRequest
from prefixd.server.tenants.batch_records import BatchRecord, LineAnswer
from prefixd.server.tenants.batches import LeaseLost, NewBatch
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.retention import Expired, remove_expired
from prefixd.server.tenants.tables import batch_answers, batches
from prefixd.store.db.database import reading, utc_now, writing
from tests.api.api_batches import create, ended, line, lines_of, upload
from tests.api.api_world import World, error_of, fake_text, put_text
from tests.api.composed import put_soft

Row = dict[str, Any]


def content(count: int) -> bytes:
    return b"".join(line(f"p{number}", {"prompt": f"p{number}"}) for number in range(count))


@contextmanager
def serving(world: World, **options: Any) -> Iterator[TestClient]:
    """A client of a server that runs batches."""
    app = world.make_app(batch_options=BatchOptions(max_lines=4), **options)
    with TestClient(app, headers=world.headers()) as client:
        yield client


def idle(world: World, *, key: str | None = None) -> TestClient:
    """A client of a server whose engine does not run."""
    headers = world.headers() if key is None else {"authorization": f"Bearer {key}"}
    return TestClient(world.app, headers=headers)


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    """As that of the other tests; the server runs batches."""
    with serving(world) as client:
        yield client


def test_a_batch_answers_every_line_in_order(client: TestClient, world: World) -> None:
    prompts = [f"p{number}" for number in range(30)]
    created = create(client, content(30), metadata={"for": "test"})
    assert created["status"] == "validating"
    batch = ended(client, created["id"])
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert batch["error_file_id"] is None
    assert batch["metadata"] == {"for": "test"}
    assert batch["expires_at"] == batch["created_at"] + 24 * 3600
    for earlier, later in (
        ("created_at", "in_progress_at"),
        ("in_progress_at", "finalizing_at"),
        ("finalizing_at", "completed_at"),
    ):
        assert batch[earlier] <= batch[later]
    answers = lines_of(client, batch["output_file_id"])
    assert [answer["custom_id"] for answer in answers] == prompts
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        assert body["choices"][0]["text"] == fake_text(None, prompt, 4)
    assert len({answer["id"] for answer in answers}) == 30
    file = client.get(f"/v1/files/{batch['output_file_id']}").json()
    assert file["purpose"] == "batch_output"
    assert client.get("/v1/batches").json()["data"] == [batch]


def test_a_line_gets_what_a_request_gets(client: TestClient, world: World) -> None:
    put_text(client, "voice", "a voice", world.headers())
    body = {"model": "voice", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    url = "/v1/chat/completions"
    created = create(client, line("a", body, url=url), endpoint=url)
    (answer,) = lines_of(client, ended(client, created["id"])["output_file_id"])
    direct = client.post(url, json={**body, "temperature": 0}).json()
    ours = answer["response"]["body"]
    for response in (ours, direct):
        for name in ("id", "created"):
            del response[name]
        response["usage"].pop("prompt_tokens_details", None)
    assert ours == direct
    assert answer["response"]["request_id"] == f"{created['id']}-1"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "hi"}],
                "structured_outputs": {"choice": ["yes", "no"]},
            },
        ),
    ],
)
def test_each_endpoint_runs(client: TestClient, url: str, body: Row) -> None:
    request = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "tiny", **body}}
    created = create(client, json.dumps(request).encode(), endpoint=url)
    batch = ended(client, created["id"])
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}, batch
    (answer,) = lines_of(client, batch["output_file_id"])
    direct = client.post(url, json=request["body"])
    assert answer["response"]["body"].keys() == direct.json().keys()


def test_lines_run_in_the_background_class(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[AdmittedRequest] = []
    submit = world.engine.submit

    def recorded(request: AdmittedRequest, *arguments: Any, **options: Any) -> None:
        submitted.append(request)
        submit(request, *arguments, **options)

    monkeypatch.setattr(world.engine, "submit", recorded)
    with serving(world, max_request_seconds=100.0) as client:
        lines = line("a", {"prompt": "x"}) + line("b", {"prompt": "x", "timeout": 50.0})
        ended(client, create(client, lines)["id"])
        client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
    shown = [(request.background, request.timeout_s) for request in submitted]
    # The server's limit is not for what waits until it is idle.
    assert sorted(shown[:2], key=str) == [(True, 50.0), (True, None)]
    assert shown[2:] == [(False, 100.0)]


def test_lines_that_fail_are_in_the_error_file(client: TestClient) -> None:
    lines = content(2) + line("bad", {"model": "none", "prompt": "x"}) + line("odd", {"prompt": 1})
    batch = ended(client, create(client, lines)["id"])
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    assert len(lines_of(client, batch["output_file_id"])) == 2
    bad, odd = lines_of(client, batch["error_file_id"])
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 404)
    assert bad["response"]["body"]["error"]["code"] == "model_not_found"
    assert bad["response"]["body"]["error"]["request_id"] == bad["response"]["request_id"]
    assert (odd["custom_id"], odd["response"]["status_code"]) == ("odd", 400)


def test_lines_compose_prefixes_and_only_votes_are_ensembles_of_them(client: TestClient) -> None:
    names = ["alice", "bob"]
    for name, fill in zip(names, (0.25, 0.75), strict=True):
        put_soft(client, name, fill=fill)
    composed: dict[str, Row] = {
        "stack": {"stack": names},
        "vote": {"ensemble": names, "combine": "vote"},
        "mean": {"ensemble": names},
    }
    lines = [line(name, {"prompt": "x", "prefix": prefix}) for name, prefix in composed.items()]
    batch = ended(client, create(client, b"".join(lines))["id"])
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    answers = {each["custom_id"]: each for each in lines_of(client, batch["output_file_id"])}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "temperature": 0}
    for name in ("stack", "vote"):
        alone = client.post("/v1/completions", json={**body, "prefix": composed[name]}).json()
        choices = answers[name]["response"]["body"]["choices"]
        assert choices[0]["text"] == alone["choices"][0]["text"]
    (failed,) = lines_of(client, batch["error_file_id"])
    error = failed["response"]["body"]["error"]
    assert (failed["custom_id"], error["code"]) == ("mean", "unsupported_ensemble")
    assert "expected an ensemble with combine 'vote' in a batch" in error["message"]


def test_an_invalid_input_fails_with_the_errors_of_its_lines(client: TestClient) -> None:
    lines = content(1) + b"{\n\n" + line("p0", {"prompt": "x"}) + line("c", {}, method="GET")
    batch = ended(client, create(client, lines)["id"])
    assert batch["status"] == "failed"
    assert batch["failed_at"] is not None
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["errors"]["object"] == "list"
    errors = [(error["line"], error["code"], error["param"]) for error in batch["errors"]["data"]]
    assert errors == [
        (2, "invalid_json_line", None),
        (4, "duplicate_custom_id", "custom_id"),
        (5, "invalid_method", "method"),
    ]
    assert (batch["output_file_id"], batch["error_file_id"]) == (None, None)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"custom_id": ', "what was received is not, or ends too early at column 15"),
        (b'{"custom_id": ' + b"1" * 5000 + b"}", "expected integers of fewer digits"),
    ],
)
def test_errors_of_a_line_have_no_sentences_of_the_parser(raw: bytes, said: str) -> None:
    """Which name a line 1 and functions of Python."""
    with pytest.raises(LineRefused, match=said) as refused:
        parse_line(7, raw, endpoint="/v1/completions")
    assert refused.value.code == "invalid_json_line"


def test_a_field_with_half_a_surrogate_pair_is_named_in_the_errors(client: TestClient) -> None:
    """No text of Unicode has one, so no response could be written with it."""
    unknown: Row = {"\ud800": 1}
    lines = line("a", {"prompt": "x"}, **unknown)
    batch = ended(client, create(client, lines)["id"])
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["param"]) == ("unknown_field", "\\ud800")
    assert client.get("/v1/batches").json()["data"] == [batch]


@pytest.mark.parametrize(
    "text", ['{"prompt":"ééé中"}', '{"prompt":[1,2,3,4]}', r'{"prompt":"\ud800"}']
)
def test_a_body_is_no_longer_than_in_its_line(text: str) -> None:
    """The limit of a body applies to the line."""
    fields = '"custom_id":"a","method":"POST","url":"/v1/completions"'
    raw = f'{{{fields},"body":{text}}}'.encode()
    parsed = parse_line(1, raw, endpoint="/v1/completions")
    assert len(parsed.body) <= len(text.encode())
    assert json.loads(parsed.body) == json.loads(text)


def test_a_line_that_became_too_long_gets_the_answer_of_the_route(world: World) -> None:
    """The limit was lowered after the input was validated."""
    created = half_done(world, idle(world))
    world.body_limits = replace(world.body_limits, max_body_bytes=40)
    with serving(world) as client:
        batch = ended(client, created)
        answers = lines_of(client, batch["error_file_id"])
    assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    assert [answer["response"]["status_code"] for answer in answers] == [413, 413]


def test_an_input_with_more_lines_than_the_tenant_may_have_fails(
    client: TestClient, world: World
) -> None:
    world.tenants.set_quota("acme", {"max_batch_lines": 2})
    assert ended(client, create(client, content(2))["id"])["status"] == "completed"
    batch = ended(client, create(client, content(3))["id"])
    (error,) = batch["errors"]["data"]
    assert (batch["status"], error["line"], error["code"]) == ("failed", 3, "too_many_lines")


def test_refused_lines_run_again(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_request, "_MOST_RETRY_S", 0.01)
    world.tenants.set_quota("acme", {"max_concurrent_requests": 1})
    batch = ended(client, create(client, content(12))["id"])
    assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
    retried = world.metrics.registry.get_sample_value(
        "prefixd_batch_lines_total", {"outcome": "retried"}
    )
    assert retried is not None
    assert retried > 0


def test_a_batch_is_cancelled_while_its_lines_run(client: TestClient, world: World) -> None:
    world.runner.gate.clear()
    created = create(client, content(8))
    while client.get(f"/v1/batches/{created['id']}").json()["status"] != "in_progress":
        pass
    assert world.runner.entered.wait(30)
    cancelled = client.post(f"/v1/batches/{created['id']}/cancel").json()
    assert cancelled["status"] == "cancelling"
    batch = ended(client, created["id"])
    world.runner.gate.set()
    assert batch["status"] == "cancelled"
    assert batch["request_counts"] == {"total": 8, "completed": 0, "failed": 8}
    errors = lines_of(client, batch["error_file_id"])
    assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}
    assert [error["response"] for error in errors] == [None] * 8
    refused = client.post(f"/v1/batches/{created['id']}/cancel")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "batch_ended")


def test_a_batch_that_fails_on_a_server_waits_for_its_next_poll(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another one runs: then it is released, and may be taken again."""
    tried: list[str] = []

    def broken(_self: Assembly, batch: BatchRecord) -> Path:
        tried.append(batch.id)
        raise RuntimeError("broken")

    monkeypatch.setattr(worker, "_POLL_S", 3600.0)
    world.runner.gate.clear()
    with serving(world) as client:
        create(client, content(1))
        assert world.runner.entered.wait(30)
        monkeypatch.setattr(Assembly, "input_of", broken)
        created = create(client, content(1))["id"]
        while not tried:
            pass
        for _ in range(50):
            assert client.get(f"/v1/batches/{created}").json()["status"] == "validating"
        assert len(tried) <= 2, "what was running, and the new batch, each wake the worker once"
        world.runner.gate.set()


def test_a_line_that_is_stopped_before_it_runs_gives_back_its_slot(
    world: World, tmp_path: Path
) -> None:
    """The batch was cancelled between its slot and its first step."""
    batch = world.batches.get(create(idle(world), content(1))["id"], tenant="acme")
    slots = StoppingSlots(1)
    parts: Any = SimpleNamespace(metrics=world.metrics)
    runner = LineRunner(batch, parts, slots=slots)
    slots.on_acquired = partial(runner.stop, Stop.CANCELLED)
    path = tmp_path / "in.jsonl"
    path.write_bytes(content(1))
    asyncio.run(runner.run(path, done=set(), seconds=60.0))
    assert not slots.locked()


class StoppingSlots(asyncio.Semaphore):
    """Calls ``on_acquired`` as soon as a slot is taken, before its taker goes on."""

    on_acquired: Callable[[], object]

    async def acquire(self) -> Literal[True]:
        acquired = await super().acquire()
        asyncio.get_running_loop().call_soon(self.on_acquired)
        return acquired


def half_done(world: World, client: TestClient, **changes: Any) -> str:
    """A batch of three lines of which a server that was killed answered the second."""
    created = create(client, content(3))["id"]
    holder = "killed"
    claimed = world.batches.claim(holder, working_on=_nothing())
    assert claimed is not None
    assert claimed.id == created
    world.batches.begin(holder, created, total=3)
    answer = LineAnswer(2, failed=False, answer_json='{"custom_id": "p1"}')
    world.batches.commit(holder, created, [answer])
    with writing(world.database) as connection:
        values = {"leased_until": 0.0, **changes}
        connection.execute(update(batches).where(batches.c.id == created).values(values))
    return str(created)


def test_a_batch_of_a_killed_server_resumes(either_world: World) -> None:
    world = either_world
    created = half_done(world, idle(world))
    with serving(world) as client:
        batch = ended(client, created)
        answers = lines_of(client, batch["output_file_id"])
        assert [answer["custom_id"] for answer in answers] == ["p0", "p1", "p2"]
        assert answers[1] == {"custom_id": "p1"}
        assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    with pytest.raises(LeaseLost):
        world.batches.commit("killed", created, [])


def test_an_expired_batch_has_what_was_answered(world: World) -> None:
    created = half_done(world, idle(world), expires_at=utc_now() - timedelta(seconds=1))
    world.runner.gate.clear()
    with serving(world) as client:
        batch = ended(client, created)
        world.runner.gate.set()
        assert batch["status"] == "expired"
        assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
        assert lines_of(client, batch["output_file_id"]) == [{"custom_id": "p1"}]
        first, last = lines_of(client, batch["error_file_id"])
        assert (first["custom_id"], last["custom_id"]) == ("p0", "p2")
        assert first["error"]["code"] == "batch_expired"


def test_a_batch_that_expires_before_its_lines_may_run_has_no_files(world: World) -> None:
    with serving(world) as client:
        file_id = upload(client, content(2))["id"]
        new = NewBatch("/v1/completions", file_id, "24h", timedelta(0), {})
        key_id = world.keys["acme"].split("_")[1]
        created = world.batches.create(new, actor=Actor("acme", key_id))
        batch = ended(client, created.id)
    assert (batch["status"], batch["output_file_id"]) == ("expired", None)


@pytest.mark.parametrize("begun", [True, False])
def test_a_batch_of_a_revoked_key_fails(world: World, *, begun: bool) -> None:
    issued = world.tenants.create_key(tenant="acme")
    client = idle(world, key=issued.text)
    created = half_done(world, client) if begun else create(client, content(3))["id"]
    world.tenants.revoke_key(issued.record.key_id)
    with serving(world) as client:
        batch = ended(client, created)
        (error,) = batch["errors"]["data"]
        assert (batch["status"], error["code"]) == ("failed", "invalid_api_key")
        assert issued.record.key_id in error["message"]
        if begun:
            assert lines_of(client, batch["output_file_id"]) == [{"custom_id": "p1"}]
            errors = lines_of(client, batch["error_file_id"])
            assert {entry["error"]["code"] for entry in errors} == {"invalid_api_key"}


def test_a_batch_of_a_rotated_key_goes_on_with_its_successor(world: World) -> None:
    issued = world.tenants.create_key(tenant="acme")
    created = create(idle(world, key=issued.text), content(1))["id"]
    world.tenants.rotate_key(issued.record.key_id, overlap=timedelta(0))
    with serving(world) as client:
        assert ended(client, created)["status"] == "completed"


def test_a_server_that_stops_releases_its_batches(world: World) -> None:
    world.runner.gate.clear()
    with serving(world) as client:
        created = create(client, content(4))["id"]
        while client.get(f"/v1/batches/{created}").json()["status"] != "in_progress":
            pass
        assert world.runner.entered.wait(30)
        world.runner.gate.set()
    record = world.batches.get(created, tenant="acme")
    if not record.has_ended:  # unless the lines were faster
        assert world.batches.claim("another", working_on=_nothing()) is not None


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, 400, "invalid_request", "endpoint"),
        ({"completion_window": "25"}, 400, "invalid_request", "completion_window"),
        ({"completion_window": "15d"}, 400, "invalid_request", "completion_window"),
        ({"input_file_id": "file-" + "0" * 32}, 404, "file_not_found", "input_file_id"),
        ({"input_file_id": "x"}, 400, "invalid_request", "input_file_id"),
        ({"metadata": {"k": "v" * 513}}, 400, "invalid_request", "metadata.k"),
        ({"stream": True}, 400, "unknown_field", "stream"),
    ],
)
def test_other_batches_are_refused(
    client: TestClient, changes: Row, status: int, code: str, param: str | None
) -> None:
    body = {"endpoint": "/v1/completions", "completion_window": "24h", **changes}
    body.setdefault("input_file_id", upload(client, content(1))["id"])
    refused = client.post("/v1/batches", json=body)
    error = error_of(refused)
    assert (refused.status_code, error["code"], error["param"]) == (status, code, param)


def test_an_output_is_no_input(client: TestClient) -> None:
    output = ended(client, create(client, content(1))["id"])["output_file_id"]
    body = {"input_file_id": output, "endpoint": "/v1/completions", "completion_window": "1h"}
    assert error_of(client.post("/v1/batches", json=body))["param"] == "input_file_id"


def test_a_repeated_batch_under_an_idempotency_key_is_one(world: World) -> None:
    client = idle(world)
    file_id = upload(client, content(1))["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "1h"}
    send = partial(client.post, "/v1/batches", json=body, headers={"idempotency-key": "k"})
    assert send().json() == send().json()
    assert len(client.get("/v1/batches").json()["data"]) == 1


def test_open_batches_have_a_quota_and_their_input_stays(world: World) -> None:
    world.tenants.set_quota("acme", {"max_open_batches": 1})
    client = idle(world)
    created = create(client, content(1))
    body = {name: created[name] for name in ("input_file_id", "endpoint", "completion_window")}
    assert error_of(client.post("/v1/batches", json=body))["param"] == "max_open_batches"
    in_use = client.delete(f"/v1/files/{created['input_file_id']}")
    assert (in_use.status_code, error_of(in_use)["code"]) == (409, "file_in_use")
    assert world.tenants.used("acme").used["max_open_batches"] == 1


def test_outputs_expire_as_the_batch_says(client: TestClient) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    batch = ended(client, create(client, content(1), output_expires_after=expiry)["id"])
    file = client.get(f"/v1/files/{batch['output_file_id']}").json()
    assert file["expires_at"] == file["created_at"] + 3600


def test_answers_and_old_batches_are_removed(world: World) -> None:
    with serving(world) as client:
        ended(client, create(client, content(3))["id"])
    open_batch = half_done(world, idle(world))
    remove = partial(remove_expired, world.database, audit_kept=None)
    removed = remove(batches_kept=timedelta(days=1), now=utc_now() + timedelta(days=2))
    assert removed == Expired(batches=1)
    with reading(world.database) as connection:
        assert list(connection.scalars(select(batches.c.id))) == [open_batch]
        assert list(connection.scalars(select(batch_answers.c.line))) == [2]


def test_creations_cancellations_and_ends_are_audited(client: TestClient, world: World) -> None:
    batch_id = create(client, content(1))["id"]
    ended(client, batch_id)
    page, _ = world.audit.page(tenant="acme", limit=10)
    entries = [entry for entry in page if entry.subject == batch_id]
    assert [entry.action for entry in entries] == ["batch.end", "batch.create"]
    assert entries[0].detail["status"] == "completed"
    assert {entry.actor_key for entry in entries} == {world.keys["acme"].split("_")[1]}


def _nothing() -> Counter[str]:
    return Counter()
