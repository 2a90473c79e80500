"""Compiles grammars in other processes first: what takes too much there is not compiled here."""

import json
import queue
import signal
import subprocess
import sys
from dataclasses import asdict
from select import select
from typing import Any

from prefixd.server.engine.constraint import Grammar, GrammarRefused
from prefixd.server.model.grammar.child import MAX_BYTES, MAX_SECONDS
from prefixd.server.model.grammar.source import Vocabulary

NUM_PROCESSES = 2
"""One tenant compiles one grammar at a time: it has one of these at most."""

_TIMEOUT_S = 60.0  # on a machine with too much to do; the CPU time ends first


class Trials:
    """Processes in which grammars are tried, started when they are needed. Used by any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._idle: queue.Queue[_Process | None] = queue.Queue()
        self._running: set[_Process] = set()
        self.num_started = 0
        for _ in range(NUM_PROCESSES):
            self._idle.put(None)

    def run(self, grammar: Grammar) -> None:
        """Raises GrammarRefused."""
        process = self._idle.get()
        try:
            if process is None or process.has_ended:
                self._forget(process)
                process = None
                process = _Process(self._vocabulary)
                self._running.add(process)
                self.num_started += 1
            process.run(grammar)
        finally:
            if process is not None and process.has_ended:
                self._forget(process)
                process = None
            self._idle.put(process)

    def close(self) -> None:
        """End the processes, also while they compile; a later call starts new ones."""
        for process in tuple(self._running):
            process.kill()
        for _ in range(NUM_PROCESSES):
            try:
                idle = self._idle.get_nowait()
            except queue.Empty:
                return  # its thread takes care of it
            self._forget(idle)
            self._idle.put(None)

    def _forget(self, process: "_Process | None") -> None:
        if process is not None:
            process.end()
            self._running.discard(process)


class _Process:
    """One process. Used by one thread at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "prefixd.server.model.grammar.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        )
        answer = self._ask({**asdict(vocabulary), "eos": list(vocabulary.eos)})
        if answer is None or answer["error"] is not None:
            self.end()
            reason = "the process for grammars ended" if answer is None else answer["error"]
            raise GrammarRefused(f"the model's tokenizer cannot be constrained: {reason}")

    @property
    def has_ended(self) -> bool:
        """Whether it is of no further use."""
        return self._popen.poll() is not None

    def run(self, grammar: Grammar) -> None:
        """Raises GrammarRefused; the process has ended if that is by a limit."""
        answer = self._ask(asdict(grammar))
        if answer is None:
            raise GrammarRefused(_cause_of(self._popen.wait()), over_limit=True)
        if answer["error"] is not None:
            where = answer.get("where")
            message = f"at {where}: {answer['error']}" if where else answer["error"]
            raise GrammarRefused(message, over_limit=bool(answer.get("over_limit")))

    def kill(self) -> None:
        """End it, from any thread."""
        self._popen.kill()

    def end(self) -> None:
        """End it and take its exit status."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            pipe.close()

    def _ask(self, fields: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None: the process ended instead."""
        stdin, stdout = self._popen.stdin, self._popen.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(fields).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return None
        if not select([stdout], [], [], _TIMEOUT_S)[0]:
            self._popen.kill()
            return None
        line = stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer


def _cause_of(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it takes more than {MAX_SECONDS:g} s to compile"
    if status == -signal.SIGKILL:
        return f"it was not compiled within {_TIMEOUT_S:g} s"
    return f"it takes more than {MAX_BYTES // 2**20} MiB to compile, or is nested too deeply"
