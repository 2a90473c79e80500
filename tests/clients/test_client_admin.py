"""Administration through the client, against the real application."""

from collections.abc import Iterator

import anyio
import pytest

from prefixd.client import AsyncClient, Client, errors, protocol_admin
from prefixd.client.wire import Response
from tests.api.api_world import World, make_world
from tests.clients.loopback import serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    with make_world(tmp_path_factory.mktemp("world")) as world, serving(world.app) as url:
        world.add_tenant("operator")
        yield world, url


@pytest.fixture
def operator(served: tuple[World, str]) -> Iterator[Client]:
    world, url = served
    with Client(url, api_key=world.keys["operator:all"]) as client:
        yield client


def test_the_life_of_a_tenant(operator: Client):
    made = operator.create_tenant("new", weight=2, quota={"max_prefixes": 3})
    assert (made.name, made.weight, made.kv_reuse) == ("new", 2.0, True)
    assert made.quota["max_prefixes"] == 3
    assert operator.set_tenant("new", kv_reuse=False).kv_reuse is False
    assert operator.set_quota("new", {"max_prefixes": None}).quota["max_prefixes"] is None
    assert operator.show_tenant("new").weight == 2.0
    first = operator.list_tenants(limit=1)
    assert first.next_after == first.tenants[0].name
    rest = operator.list_tenants(after=first.next_after)
    assert "new" in [one.name for one in rest.tenants]
    with pytest.raises(errors.ConflictError):
        operator.create_tenant("new")
    with pytest.raises(errors.BadRequestError, match="weight"):
        operator.set_tenant("new", weight=0.0)


def test_the_life_of_a_key(operator: Client, served: tuple[World, str]):
    made = operator.create_key(tenant="acme", scopes=["read"], label="ci", expires_in_seconds=60.0)
    assert (made.scopes, made.state, made.label) == (("read",), "active", "ci")
    assert made.expires_at is not None
    assert made.secret is not None
    assert made.secret not in repr(made)
    with Client(served[1], api_key=made.secret) as reader:
        assert reader.list_prefixes().prefixes == ()
        with pytest.raises(errors.PermissionDeniedError):
            reader.list_tenants()
    successor = operator.rotate_key(made.key_id, overlap_seconds=5)
    assert successor.secret != made.secret
    page = operator.list_keys(tenant="acme", limit=1000)
    states = {one.key_id: (one.state, one.replaced_by, one.secret) for one in page.keys}
    assert states[made.key_id] == ("replaced", successor.key_id, None)
    assert operator.revoke_key(made.key_id).state == "revoked"
    with pytest.raises(errors.NotFoundError):
        operator.revoke_key("nothing")


def test_the_log(operator: Client):
    operator.create_tenant("logged", weight=3)
    newest = operator.read_audit(limit=1)
    (entry,) = newest.entries
    assert (entry.action, entry.subject) == ("tenant.create", "logged")
    assert dict(entry.detail) == {"weight": 3.0}
    assert entry.request_id
    older = operator.read_audit(before=newest.next_before, tenant="acme")
    assert {one.tenant for one in older.entries} == {"acme"}


def test_both_shells_have_every_call(served: tuple[World, str]):
    names = [name for name in vars(protocol_admin) if name.split("_")[0] in _VERBS]
    assert len(names) == 10
    for shell in (Client, AsyncClient):
        assert all(hasattr(shell, name) for name in names)

    async def asynchronously() -> str:
        world, url = served
        async with AsyncClient(url, api_key=world.keys["acme:admin"]) as client:
            return (await client.list_tenants()).tenants[0].name

    assert anyio.run(asynchronously) == "acme"


_VERBS = {"list", "create", "show", "set", "rotate", "revoke", "read"}


def test_nothing_is_sent_that_was_not_said():
    assert protocol_admin.create_key().request.json == {}
    assert protocol_admin.set_tenant("a", weight=2).request.json == {"weight": 2}
    assert protocol_admin.set_quota("a", {"max_bytes": None}).request.json == {"max_bytes": None}
    assert dict(protocol_admin.read_audit(limit=3).request.params) == {"limit": 3}


def test_another_programs_answer_is_no_tenant():
    with pytest.raises(errors.ProtocolError, match="weight"):
        protocol_admin.show_tenant("a").parse(
            Response(200, {}, b'{"name": "a", "created_at": "2026-01-01T00:00:00Z"}')
        )
