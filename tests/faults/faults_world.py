"""A whole server in this process, on 127.0.0.1: the real thing from settings to the model's runner.

Only the runner may be wrapped, to make it fail on purpose.
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


class _Announcing(uvicorn.Server):
    """A server that says when it listens, and on which loop it runs."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.listening.set()


@dataclass
class World:
    """A running server. ``keys`` are by tenant."""

    url: str
    loaded: Server
    runner: Any
    keys: dict[str, str]
    _server: _Announcing = field(repr=False)

    @property
    def engine(self) -> Engine:
        return self.loaded.engine

    @property
    def base(self) -> str:
        """What the ``model`` field calls the bare base."""
        return self.loaded.served.name

    def headers(self, tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}"}

    def tasks(self) -> list[str]:
        """Tasks on the server's loop, this question's not among them."""

        async def names() -> list[str]:
            mine = asyncio.current_task()
            return [str(task.get_coro()) for task in asyncio.all_tasks() if task is not mine]

        assert self._server.loop is not None
        return asyncio.run_coroutine_threadsafe(names(), self._server.loop).result(30)

    def settle(self, *, tasks: int, patience: float = 60.0) -> None:
        """Wait until the engine has nothing left to do and the server no more than ``tasks`` tasks
        of its own; fail when it never comes to that."""
        turn, deadline = threading.Event(), time.monotonic() + patience
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            idle = not stats.running and not stats.waiting and self._empty_handed()
            if idle and len(self.tasks()) <= tasks:
                return
            turn.wait(0.02)
        raise AssertionError(
            f"the server never became idle: {self.engine.loop.scheduler!r}, tasks {self.tasks()}"
        )

    def _empty_handed(self) -> bool:
        return self.engine.idle


@contextmanager
def running(
    model: Path,
    data: Path,
    *,
    tenants: tuple[str, ...] = ("acme", "beta", "crow"),
    wrap: Callable[[Any], Any] = lambda runner: runner,
    **settings: Any,
) -> Iterator[World]:
    """Serve ``model`` from the data folder ``data`` while the block lasts.

    At the end the engine's books must balance.
    """
    data.mkdir(exist_ok=True)
    loaded = build_server(
        Settings(model=str(model), data_dir=data, threads=1, host="127.0.0.1", **settings)
    )
    runner = loaded.engine.loop._runner = wrap(loaded.engine.loop._runner)
    known = {tenant.name for tenant in loaded.tenants.list_tenants()}
    for name in tenants:
        if name not in known:
            loaded.tenants.create_tenant(name)
    keys = {name: loaded.tenants.create_key(tenant=name).text for name in tenants}
    config = uvicorn.Config(
        loaded.app, port=0, log_config=None, access_log=False, ws="none", lifespan="on"
    )
    server = _Announcing(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        assert server.listening.wait(60), "the server never listened"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield World(f"http://127.0.0.1:{port}", loaded, runner, keys, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"
        loaded.tenants._engine.dispose()
    loaded.engine.loop.scheduler.check_integrity()
