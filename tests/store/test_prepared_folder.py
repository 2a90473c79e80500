"""A data folder that the benchmarks fill by copying rows is one that uploads could have filled."""

from pathlib import Path

from benchmarks.catalog_folder import READY, TENANT, is_prepared, name_of, prepare
from prefixd.server.serve.catalog import open_catalog, open_integrity
from prefixd.server.serve.settings import Settings
from prefixd.store.artifact.artifact import inspect_artifact
from prefixd.store.artifact.base_spec import BaseSpec

BASE = BaseSpec(
    name="tiny",
    fingerprint="f" * 64,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    embedding_width=8,
    max_virtual_tokens=64,
    dtype="bfloat16",
    max_abs_embedding=100.0,
    max_abs_kv=100.0,
)


def test_a_prepared_folder_holds_its_prefixes_and_is_used_again(tmp_path: Path):
    folder = tmp_path / "data"
    assert not is_prepared(folder, count=12, virtual_tokens=3)
    assert prepare(folder, count=12, virtual_tokens=3, base=BASE) > 0
    settings = Settings(data_dir=folder)
    with open_integrity(settings) as integrity:
        assert list(integrity.findings()) == []
        assert integrity.counts()["versions"] == 12
    catalog = open_catalog(settings)
    digests = set()
    for number in range(12):
        manifest = catalog.store.resolve(tenant=TENANT, reference=name_of(number), base=BASE)
        path = catalog.store.fetch(tenant=TENANT, digest=manifest.digest)
        summary = inspect_artifact(path, base=BASE, count_tokens=len)
        assert (summary.num_virtual_tokens, manifest.num_virtual_tokens) == (3, 3)
        digests.add(manifest.digest)
    assert len(digests) == 12
    # An upload after it gets the next free id.
    with catalog.store.publish_text(
        tenant=TENANT, name="more", text="hi", metadata=None, base=BASE, count_tokens=len
    ) as (_, published):
        assert published.created
    catalog.database.dispose()
    assert is_prepared(folder, count=12, virtual_tokens=3)
    assert not is_prepared(folder, count=13, virtual_tokens=3)
    marker = (folder / READY).stat().st_mtime_ns
    assert prepare(folder, count=12, virtual_tokens=3, base=BASE) == 0.0
    assert prepare(folder, count=4, virtual_tokens=3, base=BASE) > 0
    assert (folder / READY).stat().st_mtime_ns != marker
