"""``prefixd doctor --integrity``: one line for each finding, on both stacks, next to a server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixd.server.serve.catalog import CatalogParts, open_catalog
from prefixd.server.serve.settings import Settings
from prefixd.server.tenants.principal import Actor
from prefixd.store.names import BlobKey
from tests.cli.cli_runner import run, run_json
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE, config_bytes, soft, spool

ACTOR = Actor(tenant=None, key_id=None)


@pytest.fixture(params=["sqlite-files", "postgres-s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Options of a configured store."""
    options = ["--data-dir", str(tmp_path / "data")]
    if request.param == "postgres-s3":
        options += ["--database-url", request.getfixturevalue("postgres_url")]
        options += ["--blobs-url", request.getfixturevalue("s3_url")]
    return options


@pytest.fixture
def catalog(place: list[str]) -> Iterator[CatalogParts]:
    """An open store, as a server has it, with a prefix of the tenant acme."""
    names = [option.removeprefix("--").replace("-", "_") for option in place[::2]]
    values: Any = dict(zip(names, place[1::2], strict=True))
    catalog = open_catalog(Settings(**values))
    catalog.tenants.create_tenant("acme")
    yield catalog
    catalog.database.dispose()


@pytest.fixture
def blob(catalog: CatalogParts, tmp_path: Path) -> BlobKey:
    """The blob of the prefix ``support``."""
    published = changes.publish_peft(
        catalog.store,
        tenant="acme",
        name="support",
        config=config_bytes(),
        weights=spool(tmp_path, soft()),
        metadata=None,
        base=BASE,
    )
    return BlobKey("acme", published.manifest.digest)


def test_store_without_findings(place: list[str], catalog: CatalogParts, blob: BlobKey) -> None:
    catalog.bindings.bind("acme", "alice", "support@1", actor=ACTOR)
    catalog.bindings.set_default("acme", "support", actor=ACTOR)
    output = run("doctor", "--integrity", *place).stdout
    assert output.startswith("ok   integrity 0 findings; checked 1 versions, ")
    answer = run_json("doctor", "--integrity", *place)
    assert answer["ok"] is True
    assert answer["findings"] == []
    assert answer["checked"]["bindings"] == answer["checked"]["default_prefixes"] == 1
    assert blob.digest not in output


def test_each_finding_is_a_line(place: list[str], catalog: CatalogParts, blob: BlobKey) -> None:
    catalog.store._blobs.delete(tenant=blob.tenant, digest=blob.digest)
    catalog.bindings.bind("acme", "alice\u200d", "support@2", actor=ACTOR)
    catalog.bindings.bind("acme", "bob", "support@1", actor=ACTOR)
    catalog.bindings.bind("acme", "carol", "support@absent", actor=ACTOR)
    catalog.bindings.bind("acme", "dave", "support@99999999999999999999", actor=ACTOR)
    catalog.bindings.bind("acme", "erin", "@", actor=ACTOR)
    catalog.bindings.set_default("acme", "absent", actor=ACTOR)
    *findings, summary = run("doctor", "--integrity", *place, code=1).stdout.splitlines()
    assert [line.partition(": tenant acme, ")[2].partition(":")[0] for line in findings] == [
        "support@1",
        "the binding of the user 'alice\\u200d'",
        "the binding of the user 'carol'",
        "the binding of the user 'dave'",
        "the binding of the user 'erin'",
        "the default prefix",
    ]
    assert summary.startswith("FAIL integrity 6 findings; ")
    answer = json.loads(run("doctor", "--integrity", "--json", *place, code=1).stdout)
    assert answer["ok"] is False
    assert [finding["problem"] for finding in answer["findings"]] == [
        "blob_missing",
        *["target_missing"] * 5,
    ]
    assert set(answer["findings"][0]) == {"problem", "tenant", "subject", "detail"}


def test_binding_of_a_deleted_prefix_is_found(
    place: list[str], catalog: CatalogParts, blob: BlobKey
) -> None:
    catalog.bindings.bind("acme", "alice", "support", actor=ACTOR)
    changes.delete(catalog.store, tenant=blob.tenant, name="support")
    assert "'alice'" in run("doctor", "--integrity", *place, code=1).stdout
    catalog.bindings.unbind("acme", "alice", actor=ACTOR)
    run("doctor", "--integrity", *place)


def test_interrupted_upload_is_found(
    place: list[str], catalog: CatalogParts, tmp_path: Path
) -> None:
    del catalog
    uploads = tmp_path / "data" / "uploads"
    uploads.mkdir()
    (uploads / "upload-1").write_bytes(b"half")
    assert "uploads/upload-1" in run("doctor", "--integrity", *place, code=1).stdout


def test_store_that_cannot_be_read_ends_the_check(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}"
    result = run("doctor", "--integrity", "--database-url", url, code=1)
    assert result.stderr.startswith("prefixd: the database cannot be used")
