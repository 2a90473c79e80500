"""The real PostgreSQL and moto's S3, started for a test run and ended by their process ids.

PostgreSQL is Debian's package ``postgresql``: installed when it is missing and the run is root,
and skipped only with ``PREFIXD_TEST_POSTGRES=skip``.
"""

import http.client
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
}

S3_TIMEOUT_S = 60.0
"""How long moto may take to respond: a busy machine does not make it unavailable."""


@dataclass(frozen=True, slots=True)
class Postgres:
    """A running PostgreSQL: ``url`` plus a database's name is its SQLAlchemy URL."""

    binaries: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/"

    def execute(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(f"{self.url}{database}", autocommit=True) as connection:
            connection.execute(statement)


def install(package: str, *, program: str, otherwise: Callable[[str], NoReturn]) -> None:
    """Install a Debian package for its ``program`` as root, or say why not to ``otherwise``."""
    if shutil.which(program) or postgres_binaries(program):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        otherwise(f"this test needs {program}: apt-get install {package}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", package]):
        done = subprocess.run(
            ["apt-get", "-qq", *command],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            otherwise(f"apt-get {' '.join(command)} failed: {done.stderr[-2000:]}")


def postgres_binaries(program: str = "initdb") -> Path | None:
    """Where Debian keeps the newest PostgreSQL's programs, or where PATH has them."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    on_path = shutil.which(program)
    folders += [Path(on_path).resolve().parent] if on_path else []
    found = [folder for folder in folders if (folder / program).exists()]
    return found[-1] if found else None


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A PostgreSQL on loopback with a fresh data directory; fast, so not durable."""
    if os.environ.get("PREFIXD_TEST_POSTGRES") == "skip":
        pytest.skip("PREFIXD_TEST_POSTGRES=skip")
    install("postgresql", program="initdb", otherwise=pytest.fail)
    binaries = postgres_binaries()
    assert binaries is not None, "the package postgresql brought no initdb"
    with tempfile.TemporaryDirectory(prefix="prefixd-pg-") as folder:
        as_user: dict[str, str | int] = {}
        if os.geteuid() == 0:  # it refuses to run as root
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            as_user = {"user": user.pw_uid, "group": user.pw_gid}
        initdb = [f"{binaries}/initdb", "-D", f"{folder}/data", "-U", "postgres", "-A", "trust"]
        initdb += ["--no-sync", "-E", "UTF8", "--locale", "C.UTF-8"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **as_user)  # type: ignore[call-overload]
        options = [f"-k{folder}", "-hlocalhost", "-cfsync=off"]
        options += ["-csynchronous_commit=off", "-cfull_page_writes=off", "-cmax_connections=200"]
        command = [f"{binaries}/postgres", "-D", f"{folder}/data", *options]
        # SIGQUIT: at once, without writing what is removed anyway, which may take half a minute.
        with running(command, port="-p", stop=signal.SIGQUIT, cwd=folder, **as_user) as port:
            server = Postgres(binaries, port)
            wait_until_it_answers(server)
            yield server


def wait_until_it_answers(server: Postgres) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            server.execute("SELECT 1")
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, "PostgreSQL did not come up"
            time.sleep(0.05)
        else:
            return


@contextmanager
def running_s3() -> Iterator[str]:
    """moto's S3 on loopback; its endpoint."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1"]
    with running(command, port="-p", stop=signal.SIGTERM) as port:
        yield f"http://127.0.0.1:{port}"


def make_bucket(endpoint: str, name: str) -> None:
    host = endpoint.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
    finally:
        connection.close()


@contextmanager
def running(
    command: Sequence[str], *, port: str, stop: signal.Signals, **options: object
) -> Iterator[int]:
    """A server process, from when its port answers until it ended; its port, which it is given by
    the option ``port``. Another program may have that by the time the server asks for it: then
    another one is tried."""
    for left in reversed(range(5)):
        number = free_port()
        process = subprocess.Popen(
            [*command, port, str(number)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **options,  # type: ignore[call-overload]
        )
        try:
            listening = listens(process, number)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if listening:
            break
        assert left, f"{command[0]} ended with {process.returncode}"
    try:
        yield number
    finally:
        process.send_signal(stop)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listens(process: "subprocess.Popen[bytes]", port: int) -> bool:
    """Whether the process came to listen on its port; False when it ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, f"{process.args!r} does not listen"
            time.sleep(0.05)
        else:
            return process.poll() is None
    return False


def free_port() -> int:
    """One that the system gives to no socket of another test: it chooses from 32768 up. Until the
    server listens, its port would else answer for another server."""
    while True:
        number = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", number))
            return number
