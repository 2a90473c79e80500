"""A server whose bucket hangs, answers 503 or cuts bodies: refusals in time, streams that go on,
and recovery without a restart."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.engine.runner import BlockingRunner
from prefixd.server.engine.step import Step, StepOutput
from tests.faults.faults_outage import (
    HealthProber,
    call_all,
    check_integrity,
    check_recovers,
    check_refused,
    request,
    wait_until,
)
from tests.faults.faults_server import RunningServer, running
from tests.faulty_bucket import Fault, FaultyBucket, faulty_bucket

pytestmark = pytest.mark.slow

NUM_COLD = 6
TEXT = " ".join(["a"] * 8)
LONG = {"prompt": [5, 6, 7], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
STEP_S = 0.02
"""A stream of ``LONG`` lasts over a second, so that a fault begins while it runs."""

FAULTS = {Fault.HANG: 0, Fault.UNAVAILABLE: 0, Fault.CUT_RESPONSE: 10}


@pytest.fixture
def bucket(
    s3_url: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyBucket]:
    del s3_url
    with faulty_bucket(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def http(server: RunningServer) -> Iterator["Caller"]:
    caller = Caller(server)
    yield caller
    caller.close()


@pytest.fixture
def server(
    bucket: FaultyBucket, s3_url: str, tiny_folder: Path, tmp_path: Path
) -> Iterator[RunningServer]:
    del bucket
    with running(tiny_folder, tmp_path / "data", blobs_url=s3_url, wrap=PacedRunner) as server:
        yield server


def test_bucket_that_fails(
    server: RunningServer, http: "Caller", bucket: FaultyBucket, s3_url: str, tmp_path: Path
) -> None:
    for number in range(NUM_COLD * len(FAULTS)):
        assert http.upload(f"cold-{number}").status_code == 201
    assert http.upload("warm").status_code == 201
    expected = http.generate("warm").json()["choices"][0]["text"]
    shutil.rmtree(tmp_path / "data" / "blob-copies" / "acme")
    cold = iter(range(NUM_COLD * len(FAULTS)))
    with HealthProber(server.url) as health, ThreadPoolExecutor() as pool:
        for fault, limit in FAULTS.items():
            names = [f"cold-{next(cold)}" for _ in range(NUM_COLD)]

            def begun(before: int = server.runner.num_steps) -> bool:
                return bool(server.runner.num_steps > before)

            running_stream = pool.submit(http.stream, "warm")
            wait_until(begun, timeout_s=30)
            bucket.limit, bucket.fault = limit, fault
            calls = call_all(server.url, http.requests_of_bucket(names))
            check_refused(calls, status=503, code="storage_unavailable")
            assert bucket.fault is fault
            # What needs no bucket works.
            assert http.generate("warm").json()["choices"][0]["text"] == expected
            assert http.delete_alias(names[0]).status_code == 204
            assert running_stream.result() == expected
            bucket.fault = Fault.NONE

            def works(names: list[str] = names) -> None:
                for name in names:
                    assert http.generate(name, max_tokens=1).status_code == 200
                assert http.upload(f"new-{names[0]}").status_code in {200, 201}

            check_recovers(works)
    health.check_live()
    assert {status for status, _ in health.ready} == {200}
    check_integrity(tmp_path / "data", "--blobs-url", s3_url)


class PacedRunner(BlockingRunner):
    """A runner whose steps take at least ``STEP_S``, and are counted."""

    num_steps = 0

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._never = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, step: Step) -> StepOutput:
        self.num_steps += 1
        self._never.wait(STEP_S)
        output: StepOutput = self._inner.run(step)
        return output


class Caller:
    """Requests of the tenant acme, one at a time or as a list."""

    def __init__(self, server: RunningServer) -> None:
        self._url = server.url
        self._headers = server.headers("acme")
        self._http = httpx2.Client(base_url=server.url, headers=self._headers, timeout=60)
        self.close = self._http.close

    def upload(self, name: str) -> httpx2.Response:
        return self._http.put(f"/v1/prefixes/{name}", json=text_of(name))

    def generate(self, name: str, **changes: int) -> httpx2.Response:
        return self._http.post("/v1/completions", json={"model": name, **LONG, **changes})

    def delete_alias(self, name: str) -> httpx2.Response:
        """Set an alias and remove it again: changes of the catalog alone."""
        path = f"/v1/prefixes/{name}/aliases/beta"
        assert self._http.put(path, json={"version": 1}).status_code == 200
        return self._http.delete(path)

    def stream(self, name: str) -> str:
        """The text of a stream."""
        with self._http.stream(
            "POST", "/v1/completions", json={"model": name, "stream": True, **LONG}
        ) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        return "".join(event["choices"][0]["text"] for event in events if event["choices"])

    def requests_of_bucket(self, names: list[str]) -> list[httpx2.Request]:
        """Cold loads, uploads and downloads."""

        def one(method: str, path: str, **content: Any) -> httpx2.Request:
            return request(self._url, method, path, self._headers, **content)

        loads = [one("POST", "/v1/completions", json={"model": name, **LONG}) for name in names]
        uploads = [
            one("PUT", f"/v1/prefixes/new-{name}", json=text_of(f"new {name}")) for name in names
        ]
        downloads = [one("GET", f"/v1/prefixes/{name}/versions/1/content") for name in names[:4]]
        return [*loads, *uploads, *downloads]


def text_of(name: str) -> dict[str, str]:
    return {"kind": "text", "text": f"{TEXT} {name}"}
