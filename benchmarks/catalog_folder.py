"""A data folder with many uploaded soft prompts, prepared once and used again.

The first is published by the store's own publisher. Each other one is a copy of its file with other
numbers in the tensor, under its own digest, and of its rows in the catalog: 100,000 take a minute
where as many uploads take hours. ``prefixd doctor --integrity`` finds nothing wrong with the result
(``tests/store/test_prepared_folder.py``). Nothing is synced until the end: a folder without the
marker is made again.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sqlalchemy import Connection, Table, insert, select

from prefixd.server.serve.catalog import CatalogParts, open_catalog
from prefixd.server.serve.settings import Settings
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.catalog.tables import blobs, latest_versions, prefixes, versions
from prefixd.store.names import BlobKey

TENANT = "bench"
READY = "prepared.json"
LIMITS = {"max_prefixes": 1_000_000, "max_versions": 1_000_000, "max_bytes": 2**40}
PAGE = 5000
VALUE_BYTES = 2  # bfloat16


def name_of(number: int) -> str:
    """The name of a prefix, counted from 0."""
    return f"p{number:06d}"


def is_prepared(folder: Path, *, count: int, virtual_tokens: int) -> bool:
    """Whether ``folder`` has these prefixes, of some base."""
    marker = folder / READY
    present = json.loads(marker.read_text()) if marker.exists() else {}
    return (present.get("count"), present.get("virtual_tokens")) == (count, virtual_tokens)


def prepare(folder: Path, *, count: int, virtual_tokens: int, base: BaseSpec) -> float:
    """Fill ``folder`` with ``count`` soft prompts of the tenant TENANT; seconds taken, 0.0 for a
    folder that has them. One that has others is made again."""
    wanted = {"count": count, "virtual_tokens": virtual_tokens, "fingerprint": base.fingerprint}
    marker = folder / READY
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return 0.0
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    with _catalog(folder) as catalog:
        catalog.tenants.create_tenant(TENANT)
        catalog.tenants.set_quota(TENANT, LIMITS)
        digest = _publish_first(catalog, virtual_tokens, base)
        places = folder / "blobs"
        content = (places / BlobKey(TENANT, digest).place).read_bytes()
        head = content[: -virtual_tokens * base.embedding_width * VALUE_BYTES]
        for start in range(1, count, PAGE):
            numbers = range(start, min(count, start + PAGE))
            digests = [
                _write_copy(places, head, _values(number, virtual_tokens, base))
                for number in numbers
            ]
            with catalog.database.begin() as connection:
                _copy_rows(connection, numbers, digests)
    os.sync()
    marker.write_text(json.dumps(wanted) + "\n")
    return time.perf_counter() - started


def _values(number: int, virtual_tokens: int, base: BaseSpec) -> torch.Tensor:
    """The tensor of a prefix, [virtual tokens, embedding width], bfloat16."""
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(virtual_tokens, base.embedding_width, generator=generator)
    return (0.05 * values).to(torch.bfloat16)


def _publish_first(catalog: CatalogParts, virtual_tokens: int, base: BaseSpec) -> str:
    config: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": virtual_tokens,
        "token_dim": base.embedding_width,
        "num_transformer_submodules": 1,
    }
    with tempfile.NamedTemporaryFile() as weights:
        values = _values(0, virtual_tokens, base)
        save_file({"prompt_embeddings": values}, weights.name)
        publish = catalog.store.publish_peft(
            tenant=TENANT,
            name=name_of(0),
            config=json.dumps(config).encode(),
            weights=Path(weights.name),
            metadata=None,
            base=base,
        )
        with publish as (_, published):
            return published.manifest.digest


def _write_copy(places: Path, head: bytes, values: torch.Tensor) -> str:
    """Write the blob of ``head`` and these values; its digest."""
    content = head + values.view(torch.uint8).numpy().tobytes()
    digest = sha256(content).hexdigest()
    place = places / BlobKey(TENANT, digest).place
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return digest


def _copy_rows(connection: Connection, numbers: range, digests: list[str]) -> None:
    """Rows for these prefixes, equal to those of the first but for id, name and digest."""
    first = _first_rows(connection)
    start = first[prefixes]["id"]
    of_prefix = [
        {"id": start + number, "prefix_id": start + number, "name": name_of(number)}
        for number in numbers
    ]
    of_blob = [{"digest": digest, "ticket": digest[:32]} for digest in digests]
    for table in (prefixes, blobs, versions, latest_versions):
        rows = [
            first[table] | {key: value for key, value in own.items() if key in table.c}
            for own in (a | b for a, b in zip(of_prefix, of_blob, strict=True))
        ]
        connection.execute(insert(table), rows)


def _first_rows(connection: Connection) -> dict[Table, dict[str, Any]]:
    ordered = ((table, select(table).limit(1)) for table in (blobs, versions, latest_versions))
    rows = {table: connection.execute(one).mappings().one() for table, one in ordered}
    named = select(prefixes).where(prefixes.c.name == name_of(0))
    rows[prefixes] = connection.execute(named).mappings().one()
    return {table: dict(row) for table, row in rows.items()}


@contextmanager
def _catalog(folder: Path) -> Iterator[CatalogParts]:
    folder.mkdir(parents=True)
    catalog = open_catalog(Settings(data_dir=folder))
    try:
        yield catalog
    finally:
        catalog.database.dispose()
