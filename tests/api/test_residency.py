"""Warm, pin and unpin over HTTP, the tier in manifests, and the calls to the engine."""

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import PrefixHandle, PrefixKey, QueueFull
from prefixd.server.tenants.registry import Scope
from prefixd.server.testing import ByteDetokenizer
from prefixd.store.names import BlobKey
from tests.api.api_world import (
    BASE,
    POOL_BLOCKS,
    StoreBackedSource,
    World,
    error_of,
    fake_text,
    put_text,
)

BLOCK = 16
MOST_PINNED = POOL_BLOCKS * BLOCK // 4


class Pool:
    """A fake of the engine's residency calls: records them, and returns what a test sets."""

    def __init__(self) -> None:
        self.tiers: dict[PrefixKey, str] = {}
        self.preloaded: list[tuple[PrefixHandle, int | None]] = []
        self.pins: list[PrefixHandle] = []
        self.caps: Mapping[str, int] | None = None
        self.retired: list[PrefixKey] = []
        self.full: QueueFull | None = None

    def tier(self, key: PrefixKey) -> str | None:
        return self.tiers.get(key)

    def preload(self, handle: PrefixHandle, *, max_resident_tokens: int | None = None) -> None:
        if self.full is not None:
            raise self.full
        self.preloaded.append((handle, max_resident_tokens))

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        self.pins, self.caps = list(handles), caps

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        self.retired.extend(keys)


@pytest.fixture
def pool(world: World, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Replaces the engine's methods; requested before ``client``, which starts the server."""
    pool = Pool()
    for name in ("tier", "preload", "set_pins", "retire"):
        monkeypatch.setattr(world.engine, name, getattr(pool, name))
    return pool


def key(manifest: dict[str, Any], tenant: str = "acme") -> PrefixKey:
    return PrefixKey(tenant, manifest["digest"])


def handle(manifest: dict[str, Any], tenant: str = "acme") -> PrefixHandle:
    return PrefixHandle(key(manifest, tenant), manifest["num_virtual_tokens"])


# -- warm -----------------------------------------------------------------------------------------


def test_warm_passes_the_version_to_the_engine(
    pool: Pool, client: TestClient, world: World
) -> None:
    world.tenants.set_quota("acme", {"max_resident_tokens": 50})
    manifest = put_text(client, "voice", "hello", world.headers())
    answer = client.post("/v1/prefixes/voice/warm")
    assert answer.status_code == 202
    assert answer.json() == {
        "object": "prefix.residency",
        "name": "voice",
        "version": 1,
        "digest": manifest["digest"],
        "state": "queued",
    }
    assert pool.preloaded == [(handle(manifest), 50)]


@pytest.mark.parametrize("state", ["fetching", "staged", "compiling", "host"])
def test_warm_returns_the_state_of_a_loading_prefix(
    pool: Pool, client: TestClient, world: World, state: str
) -> None:
    manifest = put_text(client, "voice", "hello", world.headers())
    pool.tiers[key(manifest)] = state
    answer = client.post("/v1/prefixes/voice/warm")
    assert (answer.status_code, answer.json()["state"]) == (202, state)
    assert len(pool.preloaded) == 1


def test_warm_does_nothing_for_a_resident_prefix(
    pool: Pool, client: TestClient, world: World
) -> None:
    manifest = put_text(client, "voice", "hello", world.headers())
    pool.tiers[key(manifest)] = "resident"
    answer = client.post("/v1/prefixes/voice/warm")
    assert (answer.status_code, answer.json()["state"]) == (200, "resident")
    assert pool.preloaded == []


@pytest.mark.parametrize(
    ("reference", "body", "version"),
    [
        ("voice", None, 2),
        ("voice", {}, 2),
        ("voice", {"version": None}, 2),
        ("voice", {"version": 1}, 1),
        ("voice@1", None, 1),
        ("voice@prod", None, 1),
        ("voice@latest", {}, 2),
    ],
)
def test_warm_and_pin_take_the_version_in_path_or_body(
    *, pool: Pool, client: TestClient, world: World, reference: str, body: Any, version: int
) -> None:
    put_text(client, "voice", "one", world.headers())
    put_text(client, "voice", "two", world.headers())
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1})
    warmed = client.post(f"/v1/prefixes/{reference}/warm", json=body)
    assert (warmed.status_code, warmed.json()["version"]) == (202, version)
    pinned = client.put(f"/v1/prefixes/{reference}/pin", json=body)
    assert (pinned.status_code, pinned.json()["version"]) == (200, version)


@pytest.mark.parametrize(("method", "verb"), [("POST", "warm"), ("PUT", "pin")])
@pytest.mark.parametrize(
    ("reference", "body", "status"),
    [
        ("voice@1", {"version": 1}, 400),
        ("voice", {"version": 0}, 400),
        ("voice", {"version": "1"}, 400),
        ("voice", {"alias": "prod"}, 400),
        ("voice", {"version": 2}, 404),
        ("voice@prod", None, 404),
        ("other", None, 404),
        ("vo ice", None, 400),
    ],
)
def test_warm_and_pin_reject_unknown_versions(
    *,
    pool: Pool,
    client: TestClient,
    world: World,
    method: str,
    verb: str,
    reference: str,
    body: Any,
    status: int,
) -> None:
    put_text(client, "voice", "hello", world.headers())
    answer = client.request(method, f"/v1/prefixes/{reference}/{verb}", json=body)
    assert answer.status_code == status
    error_of(answer)
    assert pool.preloaded == []
    assert pool.pins == []


@pytest.mark.parametrize(("method", "verb"), [("POST", "warm"), ("PUT", "pin")])
def test_warm_and_pin_reject_a_prefix_over_quota_corrupt_or_of_another_base(
    pool: Pool, client: TestClient, world: World, method: str, verb: str
) -> None:
    def refused() -> tuple[int, str]:
        answer = client.request(method, f"/v1/prefixes/voice/{verb}")
        return answer.status_code, error_of(answer)["code"]

    manifest = put_text(client, "voice", "hello", world.headers())
    world.tenants.set_quota("acme", {"max_resident_tokens": 4})
    assert refused() == (429, "insufficient_quota")
    world.tenants.set_quota("acme", {"max_resident_tokens": None})
    world.store._report_corrupt(BlobKey("acme", manifest["digest"]), "damaged")
    assert refused() == (500, "corrupt_prefix")
    put_text(client, "voice", "hello", world.headers())
    other = type(BASE)(**{**{f: getattr(BASE, f) for f in BASE.__slots__}, "fingerprint": "e" * 64})
    object.__setattr__(world.served, "base", other)
    assert refused() == (409, "base_mismatch")
    assert pool.preloaded == []
    assert pool.pins == []


def test_warm_on_a_full_or_draining_engine_returns_retry_after(
    pool: Pool, client: TestClient, world: World
) -> None:
    put_text(client, "voice", "hello", world.headers())
    pool.full = QueueFull("9 prefixes wait to be warmed", retry_after=2.5)
    answer = client.post("/v1/prefixes/voice/warm")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert "9 prefixes" in error_of(answer)["message"]
    pool.full = None
    world.drain_state.close()
    answer = client.post("/v1/prefixes/voice/warm")
    assert answer.status_code == 503
    assert pool.preloaded == []


def test_warm_counts_as_a_request_of_the_tenant(
    pool: Pool, client: TestClient, world: World
) -> None:
    put_text(client, "voice", "hello", world.headers())
    world.tenants.set_quota("acme", {"requests_per_minute": 1})
    answer = client.post("/v1/prefixes/voice/warm")
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    refused = client.post("/v1/prefixes/voice/warm")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    assert len(pool.preloaded) == 1


def test_a_failed_warm_up_does_not_fail_the_upload(
    pool: Pool, client: TestClient, world: World
) -> None:
    body = {"kind": "text", "text": "hello"}
    first = client.put("/v1/prefixes/voice?warm=true", json=body)
    assert first.status_code == 201
    assert [one for one, _ in pool.preloaded] == [handle(first.json())]
    assert client.put("/v1/prefixes/voice?warm=true", json=body).status_code == 200
    assert len(pool.preloaded) == 2
    assert client.put("/v1/prefixes/voice", json=body).status_code == 200
    assert len(pool.preloaded) == 2
    pool.full = QueueFull("full", retry_after=1.0)
    again = client.put("/v1/prefixes/other?warm=true", json={"kind": "text", "text": "two"})
    assert again.status_code == 201
    assert client.put("/v1/prefixes/voice?warm=perhaps", json=body).status_code == 400


# -- pins -----------------------------------------------------------------------------------------


def test_a_pin_reaches_the_engine_and_the_manifest(
    pool: Pool, client: TestClient, world: World
) -> None:
    first = put_text(client, "voice", "one", world.headers())
    put_text(client, "tone", "three", world.headers())
    assert first["pinned"] is False
    answer = client.put("/v1/prefixes/voice/pin")
    assert answer.status_code == 200
    assert answer.json() == {**first, "pinned": True}
    assert pool.pins == [handle(first)]
    theirs = put_text(client, "voice", "one", world.headers("beta"))
    client.put("/v1/prefixes/voice/pin", headers=world.headers("beta"))
    assert pool.pins == [handle(first), handle(theirs, "beta")]
    second = put_text(client, "voice", "two", world.headers())
    shown = client.get("/v1/prefixes/voice/versions").json()["data"]
    assert [(one["version"], one["pinned"]) for one in shown] == [(2, False), (1, True)]
    client.put("/v1/prefixes/voice/pin")
    assert pool.pins == [handle(theirs, "beta"), handle(second)]  # the oldest first
    assert client.delete("/v1/prefixes/voice/pin").status_code == 204
    assert pool.pins == [handle(theirs, "beta")]
    gone = client.delete("/v1/prefixes/voice/pin")
    assert (gone.status_code, error_of(gone)["code"]) == (404, "prefix_not_found")
    assert client.get("/v1/prefixes/voice").json()["pinned"] is False


def test_deleting_a_prefix_unpins_it(pool: Pool, client: TestClient, world: World) -> None:
    manifest = put_text(client, "voice", "one", world.headers())
    client.put("/v1/prefixes/voice/pin")
    client.delete("/v1/prefixes/voice")
    assert pool.pins == []
    assert pool.retired == [key(manifest)]


def test_pins_of_a_tenant_are_limited_by_its_resident_tokens(
    pool: Pool, client: TestClient, world: World
) -> None:
    put_text(client, "a", "x" * 10, world.headers())
    put_text(client, "b", "y" * 11, world.headers())
    world.tenants.set_quota("acme", {"max_resident_tokens": 20})
    put_text(client, "theirs", "z" * 30, world.headers("beta"))  # a version that acme does not have
    client.put("/v1/prefixes/theirs/pin", headers=world.headers("beta"))
    assert client.put("/v1/prefixes/a/pin").status_code == 200
    assert pool.caps == {"acme": 20}
    refused = client.put("/v1/prefixes/b/pin")
    assert refused.status_code == 429
    error = error_of(refused)
    assert (error["code"], error["param"]) == ("insufficient_quota", "max_resident_tokens")
    assert "20" in error["message"]
    assert "21" in error["message"]
    assert client.get("/v1/prefixes/b").json()["pinned"] is False
    assert len(pool.pins) == 2
    world.tenants.set_quota("acme", {"max_resident_tokens": 21})
    assert client.put("/v1/prefixes/b/pin").status_code == 200


def test_pins_of_all_tenants_are_limited(pool: Pool, client: TestClient, world: World) -> None:
    """Pins are counted in full blocks, as in the pool: one token takes a block."""
    for position in range(MOST_PINNED // BLOCK):
        tenant = ("acme", "beta")[position % 2]
        name = f"p{position}"
        put_text(client, name, f"{position}", world.headers(tenant))
        pinned = client.put(f"/v1/prefixes/{name}/pin", headers=world.headers(tenant))
        assert pinned.status_code == 200
    put_text(client, "last", "x", world.headers())
    refused = client.put("/v1/prefixes/last/pin")
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (409, "pins_full")
    assert str(MOST_PINNED) in error["message"]
    assert str(MOST_PINNED + BLOCK) in error["message"]
    # The same bytes under another name take no additional room.
    put_text(client, "same", "0", world.headers())
    assert client.put("/v1/prefixes/same/pin").status_code == 200
    client.delete("/v1/prefixes/p2/pin")
    assert client.put("/v1/prefixes/last/pin").status_code == 200


def test_concurrent_pins_do_not_exceed_the_limit(
    either_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool()
    for name in ("tier", "set_pins", "retire"):
        monkeypatch.setattr(either_world.engine, name, getattr(pool, name))
    room = MOST_PINNED // BLOCK
    statuses: list[int] = []
    with TestClient(either_world.app, headers=either_world.headers()) as client:
        for position in range(room + 4):
            put_text(client, f"p{position}", f"{position}", either_world.headers())
        barrier = threading.Barrier(room + 4)

        def pin(position: int) -> None:
            barrier.wait()
            statuses.append(client.put(f"/v1/prefixes/p{position}/pin").status_code)

        threads = [threading.Thread(target=pin, args=(one,)) for one in range(room + 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(statuses) == [200] * room + [409] * 4
    assert len(pool.pins) == room


def test_pins_are_in_the_audit_log(pool: Pool, client: TestClient, world: World) -> None:
    put_text(client, "voice", "hello", world.headers())
    client.put("/v1/prefixes/voice@latest/pin")
    client.delete("/v1/prefixes/voice/pin")
    client.delete("/v1/prefixes/voice/pin")
    log = client.get("/v1/admin/audit?limit=2", headers=world.headers("acme:admin")).json()["data"]
    assert [(one["action"], one["subject"], one["detail"]) for one in reversed(log)] == [
        ("pin.set", "voice", {"version": 1}),
        ("pin.remove", "voice", {}),
    ]


# -- retirement ----------------------------------------------------------------------------------


def test_a_version_without_references_is_retired(
    pool: Pool, client: TestClient, world: World
) -> None:
    one = put_text(client, "voice", "one", world.headers())
    two = put_text(client, "voice", "two", world.headers())
    assert pool.retired == [key(one)]
    pool.retired.clear()
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 2})
    put_text(client, "voice", "three", world.headers())
    assert pool.retired == []
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 3})
    assert pool.retired == [key(two)]
    pool.retired.clear()
    put_text(client, "copy", "three", world.headers())
    client.delete("/v1/prefixes/voice")
    assert set(pool.retired) == {key(one), key(two)}


def test_the_same_version_of_another_tenant_is_not_retired(
    pool: Pool, client: TestClient, world: World
) -> None:
    put_text(client, "voice", "same", world.headers())
    put_text(client, "voice", "same", world.headers("beta"))
    put_text(client, "voice", "else", world.headers("beta"))
    assert [one.tenant for one in pool.retired] == ["beta"]


# -- the tier ------------------------------------------------------------------------------------


def test_a_manifest_shows_the_current_tier(pool: Pool, client: TestClient, world: World) -> None:
    manifest = put_text(client, "voice", "hello", world.headers())
    assert client.get("/v1/prefixes/voice").json()["tier"] is None
    pool.tiers[key(manifest)] = "host"
    for path in ("/v1/prefixes", "/v1/prefixes/voice/versions"):
        assert [one["tier"] for one in client.get(path).json()["data"]] == ["host"]
    assert client.get("/v1/prefixes/voice@1").json() == {**manifest, "tier": "host"}


def test_warm_needs_the_scope_generate_and_pin_the_scope_write(
    pool: Pool, client: TestClient, world: World
) -> None:
    put_text(client, "voice", "hello", world.headers())
    for method, path, wanted in (
        ("POST", "/v1/prefixes/voice/warm", Scope.GENERATE),
        ("PUT", "/v1/prefixes/voice/pin", Scope.WRITE),
        ("DELETE", "/v1/prefixes/voice/pin", Scope.WRITE),
    ):
        for scope in Scope:
            answer = client.request(method, path, headers=world.headers(f"acme:{scope}"))
            assert (answer.status_code < 300) == (scope is wanted)


# -- with the real engine -------------------------------------------------------------------------


def wait_for_tier(client: TestClient, reference: str, tier: str | None) -> None:
    """The engine sends no event when a prefix has become resident."""
    pause = threading.Event()
    for _ in range(5000):
        if client.get(f"/v1/prefixes/{reference}").json()["tier"] == tier:
            return
        pause.wait(0.002)
    raise AssertionError(f"{reference} never came to be {tier}")


def complete(client: TestClient, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": "x", "max_tokens": 6, "temperature": 0.0, **fields}
    return client.post("/v1/completions", json=body)


def loads(world: World) -> int:
    return world.engine.stats().prefix_loads.get("store", 0)


def test_a_warmed_prefix_is_resident_before_the_first_request(
    client: TestClient, world: World
) -> None:
    digest = put_text(client, "voice", "hello", world.headers())["digest"]
    assert client.post("/v1/prefixes/voice/warm").status_code == 202
    wait_for_tier(client, "voice", "resident")
    again = client.post("/v1/prefixes/voice/warm")
    assert (again.status_code, again.json()["state"]) == (200, "resident")
    assert loads(world) == 1
    assert complete(client, "voice").json()["choices"][0]["text"] == fake_text(digest, "x", 6)
    assert loads(world) == 1
    client.put("/v1/prefixes/tone?warm=true", json={"kind": "text", "text": "be kind"})
    wait_for_tier(client, "tone", "resident")


def test_a_pinned_prefix_stays_resident_while_others_are_swapped(
    client: TestClient, world: World
) -> None:
    digest = put_text(client, "kept", "k" * 60, world.headers())["digest"]
    client.put("/v1/prefixes/kept/pin")
    wait_for_tier(client, "kept", "resident")
    for position in range(2 * POOL_BLOCKS // 4):
        put_text(client, f"p{position}", f"{position:060}", world.headers())
        assert complete(client, f"p{position}").status_code == 200
        assert client.get("/v1/prefixes/kept").json()["tier"] == "resident"
    assert complete(client, "kept").json()["choices"][0]["text"] == fake_text(digest, "x", 6)
    before = loads(world)
    client.delete("/v1/prefixes/kept/pin")
    for position in range(2 * POOL_BLOCKS // 4):
        complete(client, f"p{position}")
    assert loads(world) > before
    wait_for_tier(client, "kept", None)


def test_a_restarted_server_loads_its_pins_before_the_first_request(world: World) -> None:
    with TestClient(world.app, headers=world.headers()) as client:
        put_text(client, "voice", "hello", world.headers())
        client.put("/v1/prefixes/voice/pin")
    old = world.engine
    engine = Engine(
        config=old.config,
        runner=world.runner,
        source=StoreBackedSource(world.store, BASE),
        detokenizer=ByteDetokenizer,
    )
    again = world.make_app(engine=engine)
    with TestClient(again, headers=world.headers()) as client:
        wait_for_tier(client, "voice", "resident")
        assert engine.stats().pinned_prefixes == 1


def test_a_deleted_prefix_is_evicted_after_its_last_stream(world: World) -> None:
    with TestClient(world.app, headers=world.headers()) as client:
        digest = put_text(client, "voice", "hello", world.headers())["digest"]
        complete(client, "voice")
        wait_for_tier(client, "voice", "resident")
        world.runner.hold_after = len(world.runner.steps) + 3
        answers: list[Any] = []
        running = threading.Thread(
            target=lambda: answers.append(complete(client, "voice", max_tokens=40))
        )
        running.start()
        assert world.runner.held.wait(30)
        assert client.delete("/v1/prefixes/voice").status_code == 204
        assert complete(client, "voice").status_code == 404
        world.runner.hold_after = None
        world.runner.gate.set()
        running.join(30)
        assert answers[0].json()["choices"][0]["text"] == fake_text(digest, "x", 40)
        put_text(client, "voice", "hello", world.headers())
        wait_for_tier(client, "voice", None)


def test_a_replaced_version_is_evicted_and_loaded_again_on_request(
    client: TestClient, world: World
) -> None:
    first = put_text(client, "voice", "one", world.headers())["digest"]
    complete(client, "voice")
    wait_for_tier(client, "voice@1", "resident")
    put_text(client, "voice", "two", world.headers())
    wait_for_tier(client, "voice@1", None)
    assert complete(client, "voice@1").json()["choices"][0]["text"] == fake_text(first, "x", 6)
