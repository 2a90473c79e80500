"""A complete server in this process, on 127.0.0.1, from settings to the model's runner.

Only the runner may be wrapped, to inject faults.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from prefixd.server.engine.engine import Engine
from prefixd.server.serve.build import Server, build_server
from prefixd.server.serve.settings import Settings

structlog.configure(
    processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
    logger_factory=structlog.stdlib.LoggerFactory(),
)


class _ListeningServer(uvicorn.Server):
    """A uvicorn server that reports when it listens, and on which event loop it runs."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.listening.set()


@dataclass
class RunningServer:
    """A running server. ``keys`` are by tenant."""

    url: str
    loaded: Server
    runner: Any
    keys: dict[str, str]
    _server: _ListeningServer = field(repr=False)

    @property
    def engine(self) -> Engine:
        return self.loaded.engine

    @property
    def base(self) -> str:
        """The name of the bare base in the ``model`` field."""
        return self.loaded.served.name

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}

    def tasks(self) -> list[str]:
        """Tasks on the server's event loop, except the one of this call."""

        async def names() -> list[str]:
            this_task = asyncio.current_task()
            return [str(task.get_coro()) for task in asyncio.all_tasks() if task is not this_task]

        assert self._server.loop is not None
        return asyncio.run_coroutine_threadsafe(names(), self._server.loop).result(30)

    def settle(self, *, tasks: int, timeout_s: float = 60.0) -> None:
        """Wait until the engine is idle and the server has at most ``tasks`` tasks; fail after
        ``timeout_s`` seconds."""
        pause, deadline = threading.Event(), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            idle = not stats.running and not stats.waiting and self.engine.idle
            if idle and len(self.tasks()) <= tasks:
                return
            pause.wait(0.02)
        raise AssertionError(
            f"the server did not become idle: {self.engine.core.scheduler!r}, tasks {self.tasks()}"
        )


@contextmanager
def running(
    model: Path,
    data: Path,
    *,
    tenants: tuple[str, ...] = ("acme", "beta", "crow"),
    wrap: Callable[[Any], Any] = lambda runner: runner,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Serve ``model`` with the data folder ``data`` for the duration of the block.

    At the end the scheduler's integrity is checked. Calls on the catalog wait for a minute unless
    ``settings`` say otherwise: a busy machine may pause during any of them.
    """
    data.mkdir(exist_ok=True)
    given: dict[str, Any] = {"threads": 1, "host": "127.0.0.1", "catalog_timeout": 60, **settings}
    loaded = build_server(Settings(model=str(model), data_dir=data, **given))
    pipeline = loaded.engine.core._pipeline
    runner = pipeline.runner = wrap(pipeline.runner)
    known = {tenant.name for tenant in loaded.tenants.list_tenants()}
    for name in tenants:
        if name not in known:
            loaded.tenants.create_tenant(name)
    keys = {name: loaded.tenants.create_key(tenant=name).text for name in tenants}
    config = uvicorn.Config(
        loaded.app, port=0, log_config=None, access_log=False, ws="none", lifespan="on"
    )
    uvicorn_server = _ListeningServer(config)
    thread = threading.Thread(target=uvicorn_server.run, name="uvicorn")
    thread.start()
    try:
        assert uvicorn_server.listening.wait(60), "the server does not listen"
        port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
        yield RunningServer(f"http://127.0.0.1:{port}", loaded, runner, keys, uvicorn_server)
    finally:
        uvicorn_server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"
        loaded.tenants._engine.dispose()
    loaded.engine.core.scheduler.check_integrity()
