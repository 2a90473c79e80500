"""A server for tests: real store, tenants, engine and HTTP; only the model is a fake."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine as Database

from prefixd.server.api.anthropic_errors import is_of_anthropic
from prefixd.server.api.app import create_app
from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.catalog_metrics import CatalogCollector
from prefixd.server.api.dependencies import BodyLimits
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.generate.constraints import ConstraintLoader
from prefixd.server.api.generate.inputs import InputLoader
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.prefixes.residency import pin_room
from prefixd.server.api.request_record import Tracer
from prefixd.server.api.served import DecoderInfo, ServedModel
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.prefix_source import PrefixUnavailable
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.errors import Conflict
from prefixd.server.model.grammar.compiler import LLGuidanceCompiler
from prefixd.server.model.grammar.source import Vocabulary
from prefixd.server.model.tokenizer import Tokenizer
from prefixd.server.serve.lifespan import make_lifespan
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.batches import Batches
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.registry import Scope, Tenants
from prefixd.server.testing import (
    EOS,
    VOCAB_SIZE,
    ByteDetokenizer,
    ByteTokenizer,
    FakeEmbeddings,
    FakeRunner,
    FakeStaged,
    byte_tokenizer_json,
    fake_generate,
)
from prefixd.store.artifact.artifact import read_artifact
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.kinds import TextRole
from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from prefixd.store.disk import DiskGuard
from prefixd.store.store import PrefixStore
from tests.migrated import made

# Through the standard library, whose level hides the access log from the tests' output. Plain
# tracebacks: formatting the local variables of a server takes seconds.
structlog.configure(
    processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
    logger_factory=structlog.stdlib.LoggerFactory(),
)

BASE = BaseSpec(
    name="tiny",
    fingerprint="f" * 64,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    embedding_width=8,
    max_virtual_tokens=64,
    dtype="float32",
    max_abs_embedding=100.0,
    max_abs_kv=100.0,
)
COMPILER = LLGuidanceCompiler(
    lambda: Vocabulary(byte_tokenizer_json(), VOCAB_SIZE, VOCAB_SIZE, (EOS,))
)
DECODER = DecoderInfo("fake", "cpu", "float32")
MAX_POSITIONS = 400
POOL_BLOCKS = 32
CATALOG_WAIT_S = 60.0
"""A busy machine may pause during any call."""
BODY_LIMITS = {
    "max_body_bytes": 64 * 1024,
    "max_prefix_bytes": 32 * 1024,
    "max_import_bytes": 1024 * 1024,
    "max_input_bytes": 64 * 1024,
}
LIMITS: dict[str, Any] = {
    "body_timeout": 5.0,
    "min_body_rate": 1024,
    "max_choices": 16,
    "max_request_seconds": None,
    "kv_reuse": True,
    "batch_options": BatchOptions(),
}


@dataclass
class StoreBackedSource:
    """A PrefixSource that reads the real blobs, for their lengths."""

    store: PrefixStore
    base: BaseSpec

    def fetch(self, key: PrefixKey) -> FakeStaged:
        # A byte is a token: texts that are joined have as many as apart.
        lengths = [self._length(key.tenant, digest) for digest in key.digests]
        counts = [stop - start for start, stop in key.rows]
        is_blend = key.composition is not None and key.composition.kind == "blend"
        return FakeStaged(sum(counts or (lengths[:1] if is_blend else lengths)))

    def _length(self, tenant: str, digest: str) -> int:
        try:
            path = self.store.fetch(tenant=tenant, digest=digest)
        except Exception as error:
            raise PrefixUnavailable(f"the prefix {digest} is no longer in the store") from error
        artifact = read_artifact(path, base=self.base, count_tokens=_count_tokens)
        return artifact.num_virtual_tokens

    def embeddings(self, key: PrefixKey) -> FakeEmbeddings:
        return FakeEmbeddings(key.content.encode(), self.fetch(key).num_tokens)


def _count_tokens(text: str, *, role: TextRole = TextRole.RAW) -> int:
    tokenizer = ByteTokenizer()
    system = role is TextRole.SYSTEM
    return len(tokenizer.encode_system(text) if system else tokenizer.encode_prefix(text))


class GatedRunner(FakeRunner):
    """A FakeRunner that can be paused, or made to fail.

    ``hold_after`` closes the gate after that many steps and sets ``held``, so that a test can act
    during a response. A test must wait for ``held`` before it opens the gate, which would close
    again otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hold_after: int | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.fail = False
        self.held = threading.Event()

    def run(self, step: Step) -> StepOutput:
        self.entered.set()
        assert self.gate.wait(30), "the test never opened the gate"
        if self.fail:
            raise RuntimeError("a secret of the device")
        output = super().run(step)
        if len(self.steps) == self.hold_after:
            self.gate.clear()
            self.held.set()
        return output


@dataclass
class Clock:
    """The limiter's clock, in seconds."""

    now: float = 1_800_000_000.0


@dataclass
class World:
    """The parts that a test may use. ``app`` is the application over them, with LIMITS."""

    store: PrefixStore
    tenants: Tenants
    bindings: Bindings
    batches: Batches
    limiter: Limiter
    audit: AuditLog
    idempotency: Idempotency
    engine: Engine
    served: ServedModel
    metrics: Metrics
    drain_state: DrainState
    body_limits: BodyLimits
    disk: DiskGuard
    runner: GatedRunner
    keys: dict[str, str]
    clock: Clock
    database: Database
    app: FastAPI = field(init=False)

    def __post_init__(self) -> None:
        self.app = self.make_app()
        self.metrics.registry.register(CatalogCollector(self.app.state.catalog))

    def make_app(
        self,
        *,
        engine: Engine | None = None,
        trace: Tracer | None = None,
        wait_s: float = CATALOG_WAIT_S,
        **limits: Any,
    ) -> FastAPI:
        """An application over these parts, except those given here."""
        engine = engine or self.engine
        room = pin_room(engine.config, None)
        access = CatalogAccess.make(wait_s=wait_s)
        inputs = InputLoader(StoreBackedSource(self.store, self.served.base).embeddings)
        constraints = ConstraintLoader(COMPILER, self.metrics)
        return create_app(
            store=self.store,
            tenants=self.tenants,
            bindings=self.bindings,
            batches=self.batches,
            limiter=self.limiter,
            audit=self.audit,
            idempotency=self.idempotency,
            engine=engine,
            served=self.served,
            metrics=self.metrics,
            drain_state=self.drain_state,
            pin_room=room,
            catalog=access,
            inputs=inputs,
            constraints=constraints,
            give_embeddings=lambda rows, name: FakeEmbeddings(name, len(rows)),
            body_limits=self.body_limits,
            disk=self.disk,
            trace=trace,
            lifespan=make_lifespan(
                engine=engine,
                store=self.store,
                tenants=self.tenants,
                limiter=self.limiter,
                disk=self.disk,
                fingerprint=self.served.base.fingerprint,
                pin_room=room,
                inputs=inputs,
                constraints=constraints,
                catalog=access,
                database=self.database,
                trace=trace,
            ),
            **{**LIMITS, **limits},
        )

    def add_tenant(self, name: str) -> None:
        """Keys ``name`` (all scopes except admin), ``name:all``, ``name:scope`` of each scope."""
        tenants = self.tenants
        if name not in {known.name for known in tenants.list_tenants()}:
            tenants.create_tenant(name)
        self.keys[name] = tenants.create_key(tenant=name).text
        self.keys[f"{name}:all"] = tenants.create_key(tenant=name, scopes=list(Scope)).text
        for scope in Scope:
            self.keys[f"{name}:{scope}"] = tenants.create_key(tenant=name, scopes=[scope]).text

    def headers(self, tenant: str = "acme") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}


@contextmanager
def make_world(
    tmp_path: Path,
    *,
    database_url: str | None = None,
    base: BaseSpec = BASE,
    runner: GatedRunner | None = None,
    tokenizer: Tokenizer | None = None,
    speculate: bool = False,
) -> Iterator[World]:
    """A server of ``base``; two on one folder share the catalog and the blobs. ``tokenizer``: that
    of a vocabulary other than bytes, which ``runner`` must know."""
    database, keys = _open_catalog(database_url, tmp_path / "catalog.sqlite3")
    store = PrefixStore(database, LocalBlobs(tmp_path / "blobs"))
    clock = Clock()
    runner = runner or GatedRunner()
    engine = Engine(
        config=SchedulerConfig(
            num_blocks=POOL_BLOCKS + 1, max_tokens_per_step=128, speculate=speculate
        ),
        runner=runner,
        source=StoreBackedSource(store, base),
        detokenizer=tokenizer.detokenizer if tokenizer else ByteDetokenizer,
    )
    uploads = tmp_path / "uploads"
    uploads.mkdir(exist_ok=True)
    disk = DiskGuard({"data": tmp_path}, min_free=0, reserve=None)
    yield World(
        store=store,
        tenants=Tenants(database),
        bindings=Bindings(database),
        batches=Batches(database),
        limiter=Limiter(database, now=lambda: clock.now),
        audit=AuditLog(database),
        idempotency=Idempotency(database),
        engine=engine,
        served=ServedModel(
            name=base.name,
            base=base,
            decoder=DECODER,
            max_positions=MAX_POSITIONS,
            vocab_size=VOCAB_SIZE,
            logits_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS}),
            created=1_700_000_000,
            tokenizer=tokenizer or ByteTokenizer(),
        ),
        metrics=Metrics(engine.stats, disk, DECODER),
        drain_state=DrainState(),
        body_limits=BodyLimits(upload_dir=uploads, **BODY_LIMITS),
        disk=disk,
        runner=runner,
        keys=keys,
        clock=clock,
        database=database,
    )
    runner.gate.set()
    database.dispose()


def _open_catalog(url: str | None, file: Path) -> tuple[Database, dict[str, str]]:
    """The database ``url``, or the file, with two tenants; the texts of their keys by name."""
    if url is None and not file.exists():
        contents, keys = _first_catalog()
        file.write_bytes(contents)
        return open_database(f"sqlite:///{file}"), dict(keys)
    database = open_database(url or f"sqlite:///{file}")
    upgrade(database)
    return database, _add_tenants(database)


@cache
def _first_catalog() -> tuple[bytes, dict[str, str]]:
    return made(_add_tenants)


def _add_tenants(database: Database) -> dict[str, str]:
    tenants, keys = Tenants(database), {}
    for name in ("acme", "beta"):
        with suppress(Conflict):  # another world on this folder created it
            tenants.create_tenant(name)
        keys[name] = tenants.create_key(tenant=name).text
    for scope in Scope:
        keys[f"acme:{scope}"] = tenants.create_key(tenant="acme", scopes=[scope]).text
    return keys


def put_text(client: TestClient, name: str, text: str, headers: dict[str, str]) -> dict[str, Any]:
    answer = client.put(
        f"/v1/prefixes/{name}", json={"kind": "text", "text": text}, headers=headers
    )
    assert answer.status_code in {200, 201}, answer.text
    manifest: dict[str, Any] = answer.json()
    assert manifest.pop("warnings") == []  # of the upload alone
    return manifest


def fake_text(digest: str | None, prompt: str, count: int) -> str:
    """What the fake model generates after ``prompt`` under a prefix."""
    return bytes(fake_generate(digest, list(prompt.encode()), count)).decode()


def anthropic_error_of(answer: Any, body: dict[str, Any]) -> dict[str, Any]:
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message", "details"}
    details = body["error"]["details"]
    assert set(details) == {"error_code", "param"}
    assert body["error"]["message"]
    ids = answer.headers["request-id"], answer.headers["x-request-id"]
    assert ids == (body["request_id"],) * 2
    shared = {"message": body["error"]["message"], "type": body["error"]["type"]}
    return {**shared, "code": details["error_code"], "param": details["param"]}


def error_of(answer: Any) -> dict[str, Any]:
    """The error object of a response, its shape checked; Anthropic's as that of others."""
    body = answer.json()
    if is_of_anthropic(answer.request.url.path):
        return anthropic_error_of(answer, body)
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    return error
