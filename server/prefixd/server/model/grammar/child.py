"""The process in which grammars are compiled first: what they take too much of ends it.

    python -m prefixd.server.model.grammar.child

A line of JSON on standard input is the vocabulary, and each later one a grammar; each is answered
by one on standard output. A timer of CPU time ends the process, as do a limit on its address space
and a small stack.
"""

import json
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from llguidance import LLTokenizer

from prefixd.server.engine.constraint import Grammar, GrammarKind, GrammarRefused
from prefixd.server.model.grammar.source import Vocabulary, new_matcher, one_line
from prefixd.server.model.grammar.subset import subschemas

MAX_SECONDS = 2.0
"""CPU time of one grammar."""

MAX_BYTES = 256 * 2**20
"""Memory that one grammar may take, in addition to what the process has."""

MAX_MASK_SECONDS = 0.01
"""CPU time of a token under a grammar, in the median of those that are tried. llguidance's limits
do not bound it where a regular expression nests repetitions."""

_STACK_BYTES = 2**20  # a thread of the server has at least twice as much
_STEPS, _MIN_TIMED = 16, 4
_MAX_LOCATED = 200


def main() -> None:
    """Answer until standard input ends."""
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    vocabulary = Vocabulary(**json.loads(sys.stdin.readline()))
    try:
        tokenizer = vocabulary.load()
    except ValueError as error:
        _answer(error=one_line(str(error)))
        return
    _answer(error=None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = _address_space() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        fields = json.loads(line)
        grammar = Grammar(**{**fields, "kind": GrammarKind(fields["kind"])})
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # SIGPROF ends the process
        answer = _try(tokenizer, grammar)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(**answer)


def _try(
    tokenizer: LLTokenizer, grammar: Grammar, clock: Callable[[], float] = time.thread_time
) -> dict[str, Any]:
    try:
        matcher = new_matcher(tokenizer, grammar)
    except GrammarRefused as refused:
        return _located(tokenizer, grammar, refused.message)
    rng, seconds = random.Random(0), list[float]()
    for _ in range(_STEPS):
        began = clock()
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return {"error": one_line(matcher.get_error())}
        if matcher.is_stopped():
            break
        places = [place for place, byte in enumerate(mask) if byte]
        if not places:
            break
        place = rng.choice(places)
        bits = [bit for bit in range(8) if mask[place] >> bit & 1]
        if not matcher.consume_token(place * 8 + rng.choice(bits)):
            if not seconds and matcher.is_error():  # no output gets beyond its first token
                return {"error": one_line(matcher.get_error()), "over_limit": True}
            break  # an end, or a token that only the trial's walk reaches
        seconds.append(clock() - began)
    timed = seconds[1:]  # the first mask fills caches
    if len(timed) >= _MIN_TIMED and median(timed) > MAX_MASK_SECONDS:
        limit = f"{1000 * MAX_MASK_SECONDS:g} ms"
        return {"error": f"a token under it takes more than {limit}", "over_limit": True}
    return {"error": None}


def _located(tokenizer: LLTokenizer, grammar: Grammar, message: str) -> dict[str, Any]:
    """Why a grammar is refused, and where if that is known."""
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        root = json.loads(grammar.source)
        return {"error": message, "where": _locate(tokenizer, root, "$")}
    for place, text in grammar.schemas:
        try:
            new_matcher(tokenizer, Grammar(GrammarKind.JSON_SCHEMA, text))
        except GrammarRefused as refused:
            where = _locate(tokenizer, json.loads(text), place) or place
            return {"error": refused.message, "where": where}
    return {"error": message}


def _locate(tokenizer: LLTokenizer, root: dict[str, Any], place: str) -> str | None:
    """The path of the innermost schema that is refused by itself; None: only the whole is."""
    where, schema, left = None, root, _MAX_LOCATED
    while True:
        for path, inner in subschemas(schema, where or place):
            left -= 1
            if left <= 0:
                return where
            # References are looked up at the root.
            whole = {**{name: root[name] for name in ("$defs", "definitions") if name in root}}
            text = json.dumps({**whole, **inner})
            try:
                new_matcher(tokenizer, Grammar(GrammarKind.JSON_SCHEMA, text))
            except GrammarRefused:
                where, schema = path, inner
                break
        else:
            return where


def _answer(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text("ascii").split()[0]
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    main()
