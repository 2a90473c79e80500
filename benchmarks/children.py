"""Engines as child processes that stay loaded: one is running, the others are stopped."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.engines import OURS, Engine
from benchmarks.host import Load, LoadMeter

ROOT = Path(__file__).resolve().parents[1]
PORTIONS = ("server", "prefix_store", "clients")
LOAD_S, RUN_S = 600.0, 300.0
_SHOWN = 15
# What would give an engine other settings than the comparison's.
_NOT_INHERITED = ("PREFIXD_", "VLLM_", "OMP_", "GOMP_", "MKL_", "PYTHONPATH")


class EngineFailed(Exception):
    """An engine could not be loaded, or failed in a run; the message says why."""


@dataclass(frozen=True)
class Measured:
    """One run of an engine: the child's answer, and the load of the machine meanwhile."""

    seconds: float
    first: list[float]
    tokens: list[list[int]]
    load: Load


class Child:
    """One engine in a process and session of its own; its threads take no CPU time between runs,
    because the session is stopped."""

    def __init__(
        self, engine: Engine, python: Path, start: Mapping[str, Any], *, ours: Collection[int] = ()
    ) -> None:
        """``ours``: sessions of the comparison, which are no foreign load. ``wait`` must be called
        before the first run."""
        self.engine = engine
        self.about: dict[str, str] = {}
        self._ours = {os.getsid(0), *ours}
        self._scratch = Path(tempfile.mkdtemp(prefix=f"bench-{engine.name}-"))
        self._log = self._scratch / "log"
        libraries = preloaded(engine, python)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"benchmarks.peers.{engine.module}"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=child_environment(engine, start, self._scratch) | libraries,
                start_new_session=True,
            )
        self._send({**start, "scratch": str(self._scratch), "options": dict(engine.options)})

    @property
    def session(self) -> int:
        """The id of the session of all of the engine's processes."""
        return self._process.pid

    def wait(self) -> None:
        """Until the engine is loaded. Raises EngineFailed."""
        self.about = self._receive(LOAD_S)["ready"]
        self.pause()

    def run(self, requests: Sequence[Mapping[str, Any]], output: int) -> Measured:
        """Run requests and check that each has exactly ``output`` tokens. Raises EngineFailed."""
        self.resume()
        try:
            meter = LoadMeter(measured=self.session, ours=self._ours)
            self._send({"requests": requests, "output": output})
            answer = self._receive(RUN_S)
            load = meter.read()
        finally:
            self.pause()
        lengths = [len(tokens) for tokens in answer["tokens"]]
        if lengths != [output] * len(requests):
            raise EngineFailed(
                f"{self.engine.name}: expected {len(requests)} x {output} tokens, got {lengths}"
            )
        return Measured(answer["seconds"], answer["first"], answer["tokens"], load)

    def pause(self) -> None:
        """Stop all of the engine's threads."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self.session, number)

    def _send(self, value: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(self._why("ended")) from None

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(limit_s, self._signal, [signal.SIGKILL])
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:  # a timer that runs on would keep an interrupted comparison alive
            timer.cancel()
        if not line:
            raise EngineFailed(self._why(f"ended, or gave no answer in {limit_s:g} s"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(self._why(answer["error"]))
        return answer

    def _why(self, what: str) -> str:
        tail = self._log.read_text(errors="replace").splitlines()[-_SHOWN:]
        return "\n    ".join([f"{self.engine.name}: {what}; the end of its log:", *tail])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()
        shutil.rmtree(self._scratch, ignore_errors=True)


def child_environment(engine: Engine, start: Mapping[str, Any], scratch: Path) -> dict[str, str]:
    """The variables of an engine's process: none of the caller's that change an
    engine. One that is set to nothing is not set."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)
    }
    chosen = {
        **inherited,
        "HF_HUB_OFFLINE": "1",
        "PREFIXD_DATA_DIR": str(scratch / "data"),
        "PREFIXD_MODEL": str(start["model"]),
        "PREFIXD_DTYPE": start["dtype"],
        "PREFIXD_THREADS": str(start["threads"]),
        "PREFIXD_LOG_LEVEL": "warning",
        **({} if engine.module == OURS.module else {"OMP_NUM_THREADS": str(start["threads"])}),
        **engine.variables,
        **({"PYTHONPATH": str(start["code"])} if start.get("code") else {}),
    }
    return {name: value for name, value in chosen.items() if value}


def preloaded(engine: Engine, python: Path) -> dict[str, str]:
    """LD_PRELOAD with the libraries that the engine wants and that are here."""
    folders = (python.parents[1], Path("/usr/lib"))
    files = [
        str(file) for pattern in engine.preload for root in folders for file in root.glob(pattern)
    ]
    return {"LD_PRELOAD": ":".join(files)} if files else {}


def interpreter(engine: Engine, folder: Path) -> Path:
    """The Python of an engine's environment. Raises EngineFailed where it is not installed."""
    if not engine.environment:
        return Path(sys.executable)
    python = folder / engine.environment / "bin" / "python"
    if not python.exists():
        raise EngineFailed(
            f"{engine.name}: {python} does not exist: run benchmarks/peers/install.sh {folder}"
        )
    return python


def checkout(revision: str, folder: Path) -> str:
    """PYTHONPATH of the product at a commit of this repository, in a folder of its own.

    Raises EngineFailed for an unknown commit.
    """
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    tree = folder / "revisions" / commit[:12]
    if not tree.exists():
        partial = Path(tempfile.mkdtemp(prefix=".revision-", dir=folder))
        with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, *PORTIONS))) as archive:
            archive.extractall(partial, filter="data")
        tree.parent.mkdir(exist_ok=True)
        partial.rename(tree)
    return os.pathsep.join(str(tree / portion) for portion in PORTIONS)


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise EngineFailed(f"{' '.join(command)}: {done.stderr.decode().strip()}")
    return done.stdout
