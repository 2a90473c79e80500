"""The child's end of the pipe between the comparison and an engine: one JSON object per line.

::

    comparison -> child    {"model": ..., "dtype": ..., "threads": ..., "prefixes": {...}, ...}
    child -> comparison    {"ready": {"version": ..., "precision": ...}}
    comparison -> child    {"output": 64, "requests": [{"tokens": [...], "prefix": "soft-00"}]}
    child -> comparison    {"seconds": 2.9, "first": [0.4, ...], "tokens": [[...], ...]}

The clock starts when all prompts are in memory and ends with the last token, so reading the line
is not measured. An error is an answer too: ``{"error": "..."}``.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Prefix:
    """A prefix as a PEFT folder. ``tokens`` are those whose KV it holds, if it was made of any."""

    folder: Path
    kind: str
    tokens: tuple[int, ...] | None


@dataclass(frozen=True)
class Start:
    """What an engine loads. ``dtype`` is a name of torch's; ``options`` are the engine's own."""

    model: Path
    dtype: str
    threads: int
    prefixes: dict[str, Prefix]
    scratch: Path
    options: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One greedy request; ``prefix`` None is the bare base."""

    tokens: tuple[int, ...]
    prefix: str | None


@dataclass(frozen=True)
class Result:
    """``seconds`` until the last token; ``first`` the seconds until each request's first token,
    empty where the engine does not tell; ``tokens`` the output of each request."""

    seconds: float
    first: list[float]
    tokens: list[list[int]]


class Peer(Protocol):
    """An engine that is loaded, with all prefixes resident where it can keep them."""

    @property
    def about(self) -> dict[str, str]:
        """At least ``version`` and ``precision``, for the report."""
        ...

    def run(self, requests: Sequence[Request], output: int) -> Result:
        """Generate exactly ``output`` tokens for each request, all of them at once."""
        ...


def serve(load: Callable[[Start], Peer]) -> None:
    """Load the engine and run what the comparison asks for, until the pipe is closed."""
    # Killed with the comparison, also while stopped (prctl's PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    answers = _own_stdout()
    start = json.loads(sys.stdin.readline())
    try:
        peer = load(_start_of(start))
        _answer(answers, {"ready": peer.about})
        for line in sys.stdin:
            _answer(answers, _run(peer, json.loads(line)))
    except Exception as error:
        _answer(answers, {"error": f"{type(error).__name__}: {error}"})
        raise


def _own_stdout() -> Any:
    """The pipe for answers; what libraries print from now on goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _answer(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _start_of(value: dict[str, Any]) -> Start:
    prefixes = {
        name: Prefix(Path(each["folder"]), each["kind"], each["tokens"] and tuple(each["tokens"]))
        for name, each in value["prefixes"].items()
    }
    return Start(
        model=Path(value["model"]),
        dtype=value["dtype"],
        threads=value["threads"],
        prefixes=prefixes,
        scratch=Path(value["scratch"]),
        options=value["options"],
    )


def _run(peer: Peer, work: dict[str, Any]) -> dict[str, Any]:
    requests = [Request(tuple(each["tokens"]), each["prefix"]) for each in work["requests"]]
    result = peer.run(requests, work["output"])
    return {"seconds": result.seconds, "first": result.first, "tokens": result.tokens}


class Clock:
    """Times of one run, from its construction on."""

    def __init__(self, num_requests: int) -> None:
        self._first: list[float | None] = [None] * num_requests
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self._began

    def token(self, index: int) -> None:
        """Note that request ``index`` has a token."""
        if self._first[index] is None:
            self._first[index] = self.seconds

    def tokens(self) -> None:
        """Note that every request has a token."""
        for index in range(len(self._first)):
            self.token(index)

    @property
    def first(self) -> list[float]:
        """Seconds until each request's first token; empty unless all are known."""
        known = [seconds for seconds in self._first if seconds is not None]
        return known if len(known) == len(self._first) else []
