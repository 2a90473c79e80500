"""prefixd in its own process: the server's engine with its real catalog, prefixes and threads,
without HTTP around the requests.

The parts are put together by ``prefixd serve``'s own code from ``PREFIXD_*`` variables, prefixes
are uploaded to the application and warmed, and requests go to ``Engine.submit``.
"""

import prefixd.server.cli.main  # noqa: F401  # sets OpenMP's variables before torch reads them

import gc
import importlib.metadata
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from benchmarks.peers.wire import Clock, Prefix, Request, Result, Start, serve
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishEvent,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from prefixd.server.serve import build
from prefixd.server.serve.settings import Settings

TENANT = "bench"
RESIDENT_S = 120.0


class _Run:
    """Collects the events of one run; ``done`` is set when every request has ended."""

    def __init__(self, num_requests: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_requests)]
        self.ends: dict[int, FinishEvent] = {}
        self.done = threading.Event()
        self.clock = Clock(num_requests)
        self.seconds = 0.0

    def on_event(self, index: int, event: Any) -> None:
        """Called on the engine's thread, with an event or several at once."""
        events: Iterable[Any] = event if isinstance(event, list | tuple) else (event,)
        for each in events:
            if isinstance(each, TokenEvent):
                self.clock.token(index)
                self.tokens[index] += each.token_ids
            else:
                self.ends[index] = each
        if len(self.ends) == len(self.tokens):
            self.seconds = self.clock.seconds
            self.done.set()


class PrefixdPeer:
    """A loaded server whose engine runs."""

    def __init__(self, start: Start) -> None:
        settings = Settings()
        server = build.build_server(settings)
        self._engine = server.engine
        self._kv_reuse = settings.kv_reuse
        self._count = 0
        self._closing = ExitStack()
        server.tenants.create_tenant(TENANT)
        key = server.tenants.create_key(tenant=TENANT).text
        headers = {"authorization": f"Bearer {key}"}
        self._http = self._closing.enter_context(TestClient(server.app, headers=headers))
        self._handles = {name: self._upload(name, each) for name, each in start.prefixes.items()}
        for name, handle in self._handles.items():
            self._warm(name, handle)
        gc.collect()  # as `prefixd serve` does before it serves
        gc.freeze()
        self.about = {
            "version": importlib.metadata.version("prefixd"),
            "precision": settings.dtype,
            "revision": _revision(),
            "kv_reuse": str(settings.kv_reuse),
            "decoder": _decoder(server.engine),
        }

    def _upload(self, name: str, prefix: Prefix) -> PrefixHandle:
        files = {
            "config": prefix.folder.joinpath("adapter_config.json").read_bytes(),
            "weights": prefix.folder.joinpath("adapter_model.safetensors").read_bytes(),
        }
        answer = self._http.put(f"/v1/prefixes/{name}", files=files)
        answer.raise_for_status()
        manifest = answer.json()
        key = PrefixKey(TENANT, manifest["digest"])
        return PrefixHandle(key, manifest["num_virtual_tokens"])

    def _warm(self, name: str, handle: PrefixHandle) -> None:
        """Make a prefix resident, as an operator would."""
        deadline = time.monotonic() + RESIDENT_S
        while self._engine.tier(handle.key) != "resident":
            self._http.post(f"/v1/prefixes/{name}/warm").raise_for_status()
            if time.monotonic() > deadline:
                raise TimeoutError(f"prefix {name} was not resident after {RESIDENT_S:g} s")
            time.sleep(0.02)

    def run(self, requests: Sequence[Request], output: int) -> Result:
        """Submit all requests at once; the prefixes are resident."""
        admitted = [self._admitted(request, output) for request in requests]
        run = _Run(len(admitted))
        for index, request in enumerate(admitted):
            self._engine.submit(request, partial(run.on_event, index))
        run.done.wait()
        failed = [end for end in run.ends.values() if end.reason is not FinishReason.LENGTH]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed, the first with {failed[0]}")
        return Result(run.seconds, run.clock.first, run.tokens)

    def _admitted(self, request: Request, output: int) -> AdmittedRequest:
        self._count += 1
        return AdmittedRequest(
            request_id=str(self._count),
            tenant=TENANT,
            prompt=request.tokens,
            prefix=None if request.prefix is None else self._handles[request.prefix],
            sampling=SamplingParams(temperature=0.0),
            stop=StopParams(max_tokens=output),
            kv_reuse=self._kv_reuse,
        )


def _decoder(engine: Any) -> str:
    """Which decoder runs the passes. Commits before there were several have transformers' modules,
    as ``module`` has; those before steps were in flight have the runner in the core."""
    core = vars(engine.core)
    runner = core["_pipeline"].runner if "_pipeline" in core else core["_runner"]
    return str(getattr(getattr(runner, "decoder", None), "name", "module"))


def _revision() -> str:
    """The commit of the product's code, with ``+`` when files differ from it; for code that no
    repository tracks the name of its folder, which the comparison names after the commit."""
    folder = Path(build.__file__).parent
    if not _git(folder, "ls-files", "build.py"):
        return folder.parents[3].name
    return _git(folder, "describe", "--always", "--dirty=+", "--exclude", "*")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    serve(PrefixdPeer)
