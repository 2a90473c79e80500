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


def test_create_change_and_list_tenants(operator: Client):
    created = operator.create_tenant("new", weight=2, quota={"max_prefixes": 3})
    assert (created.name, created.weight, created.kv_reuse) == ("new", 2.0, True)
    assert created.quota["max_prefixes"] == 3
    assert operator.set_tenant("new", kv_reuse=False).kv_reuse is False
    assert operator.set_quota("new", {"max_prefixes": None}).quota["max_prefixes"] is None
    assert operator.show_tenant("new").weight == 2.0
    first = operator.list_tenants(limit=1)
    assert first.next_after == first.tenants[0].name
    rest = operator.list_tenants(after=first.next_after)
    assert "new" in [tenant.name for tenant in rest.tenants]
    with pytest.raises(errors.ConflictError):
        operator.create_tenant("new")
    with pytest.raises(errors.BadRequestError, match="weight"):
        operator.set_tenant("new", weight=0.0)


def test_create_rotate_list_and_revoke_keys(operator: Client, served: tuple[World, str]):
    issued = operator.create_key(
        tenant="acme", scopes=["read"], label="ci", expires_in_seconds=60.0
    )
    assert (issued.scopes, issued.state, issued.label) == (("read",), "active", "ci")
    assert issued.expires_at is not None
    assert issued.secret is not None
    assert issued.secret not in repr(issued)
    with Client(served[1], api_key=issued.secret) as reader:
        assert reader.list_prefixes().prefixes == ()
        with pytest.raises(errors.PermissionDeniedError):
            reader.list_tenants()
    successor = operator.rotate_key(issued.key_id, overlap_seconds=5)
    assert successor.secret != issued.secret
    page = operator.list_keys(tenant="acme", limit=1000)
    states = {key.key_id: (key.state, key.replaced_by, key.secret) for key in page.keys}
    assert states[issued.key_id] == ("replaced", successor.key_id, None)
    assert operator.revoke_key(issued.key_id).state == "revoked"
    with pytest.raises(errors.NotFoundError):
        operator.revoke_key("nothing")


def test_audit_log_lists_changes_newest_first(operator: Client):
    operator.create_tenant("logged", weight=3)
    newest = operator.read_audit(limit=1)
    (entry,) = newest.entries
    assert (entry.action, entry.subject) == ("tenant.create", "logged")
    assert dict(entry.detail) == {"weight": 3.0}
    assert entry.request_id
    older = operator.read_audit(before=newest.next_before, tenant="acme")
    assert {entry.tenant for entry in older.entries} == {"acme"}


def test_both_clients_have_every_admin_operation(served: tuple[World, str]):
    names = [name for name in vars(protocol_admin) if name.split("_")[0] in _VERBS]
    assert len(names) == 10
    for client_class in (Client, AsyncClient):
        assert all(hasattr(client_class, name) for name in names)

    async def asynchronously() -> str:
        world, url = served
        async with AsyncClient(url, api_key=world.keys["acme:admin"]) as client:
            return (await client.list_tenants()).tenants[0].name

    assert anyio.run(asynchronously) == "acme"


_VERBS = {"list", "create", "show", "set", "rotate", "revoke", "read"}


def test_omitted_arguments_are_not_sent():
    assert protocol_admin.create_key().request.json == {}
    assert protocol_admin.set_tenant("a", weight=2).request.json == {"weight": 2}
    assert protocol_admin.set_quota("a", {"max_bytes": None}).request.json == {"max_bytes": None}
    assert dict(protocol_admin.read_audit(limit=3).request.params) == {"limit": 3}


def test_tenant_with_a_missing_field_raises_protocol_error():
    with pytest.raises(errors.ProtocolError, match="weight"):
        protocol_admin.show_tenant("a").parse(
            Response(200, {}, b'{"name": "a", "created_at": "2026-01-01T00:00:00Z"}')
        )
