"""How much of our own code a request passes through.

``python -m benchmarks.footprint [--rounds 5] [--list] [--json FILE]``, from the root of a checkout

Everything runs in this process: the application of the tests' ``api_world`` over the fake runner,
called through ASGI. Packages are known by their folders and no module of them is imported by name,
so the script runs unmodified before and after a refactoring. It knows two layouts: the packages
``server``, ``prefix_store`` and ``clients`` in the root, or folders of these names that hold
portions of one namespace package ``prefixd``.

- A function is a code object of a tracked file below the three folders. Comprehensions and
  generator expressions belong to the function around them; lambdas count. Tests do not count, nor
  does the file of the fake runner, which stands in for the model.
- A call is the start of a frame. Resuming a coroutine or a generator is not a call, so figures do
  not depend on how often a task is woken. Loops that started before the request, such as the
  engine's, do not count, but what they call does.
- A class is the type of a first argument named ``self``.
- Code that dataclasses and pydantic generate has no file and does not count.

All threads are profiled, from the request until no call of ours is seen for a while after its
response. Calls are medians over the rounds. Files, functions and classes are those seen in every
round, so a background task that happens to run in one of them does not count. The prefix is
resident, and each path has run a few times before.
"""

import argparse
import dis
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
from fastapi.testclient import TestClient
from safetensors.numpy import save

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("server", "prefix_store", "clients")
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
WARM_UP = 3
FURTHER = 32
QUIET_S = 0.1
VIRTUAL_TOKENS = 3
TITLES = {
    "completion": "One-token completion, prefix resident",
    "streaming": "The same, streaming",
    "upload": "Upload of a soft prompt",
}


class Function(NamedTuple):
    """A function of ours; ``file`` is relative to the root."""

    file: str
    name: str
    line: int


@dataclass
class Window:
    """The calls of ours while one request ran."""

    calls: Counter[Function] = field(default_factory=Counter)
    classes: set[str] = field(default_factory=set)


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks, relative to the root."""
    command = ["git", "ls-files", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [Path(line) for line in listed.stdout.splitlines()]


def product_files() -> list[Path]:
    paths = tracked(*(f"{folder}/*.py" for folder in FOLDERS))
    return [path for path in paths if "tests" not in path.parts]


@cache
def _start(code: CodeType) -> int:
    """The offset at which a frame of ``code`` starts; resumed frames are at a later one."""
    return next(i.offset for i in dis.get_instructions(code) if i.opname == "RESUME")


class Recorder:
    """A profile function for all threads. It records only while a window is open."""

    def __init__(self, excluded: set[str | None]) -> None:
        # The absolute path in a code object, to the path relative to the root.
        files = {str(ROOT / path): str(path) for path in product_files()}
        self._files = {file: name for file, name in files.items() if file not in excluded}
        self._events: list[tuple[CodeType, type | None]] | None = None

    def __call__(self, frame: FrameType, event: str, _arg: object) -> None:
        events, code = self._events, frame.f_code
        if events is None or event != "call" or code.co_filename not in self._files:
            return
        if code.co_name in COMPREHENSIONS or frame.f_lasti != _start(code):
            return
        is_method = code.co_argcount > 0 and code.co_varnames[0] == "self"
        events.append((code, type(frame.f_locals["self"]) if is_method else None))

    def measure(self, send: Callable[[], None]) -> Window:
        """What ``send`` calls, on any thread, until all is quiet."""
        events: list[tuple[CodeType, type | None]] = []
        self._events = events
        send()
        count = -1
        while count != len(events):
            count = len(events)
            time.sleep(QUIET_S)
        self._events = None
        window = Window()
        for code, owner in events:
            file = self._files[code.co_filename]
            window.calls[Function(file, code.co_qualname, code.co_firstlineno)] += 1
            if owner is not None:
                window.classes.add(f"{owner.__module__}.{owner.__qualname__}")
        return window


@dataclass
class Footprint:
    """One path over all rounds."""

    windows: list[Window] = field(default_factory=list)

    @property
    def functions(self) -> list[Function]:
        return sorted(set.intersection(*(set(window.calls) for window in self.windows)))

    @property
    def classes(self) -> list[str]:
        return sorted(set.intersection(*(window.classes for window in self.windows)))

    @property
    def calls(self) -> float:
        return statistics.median(window.calls.total() for window in self.windows)

    def figures(self) -> dict[str, float]:
        return {
            "files": len({function.file for function in self.functions}),
            "functions": len(self.functions),
            "classes": len(self.classes),
            "calls": self.calls,
        }


def import_world() -> Any:
    """The ``api_world`` of this checkout, over the packages of this checkout."""
    portions = [ROOT / folder for folder in FOLDERS if (ROOT / folder / "prefixd").is_dir()]
    helpers = {ROOT / path.parent for path in tracked("*.py") if "tests" in path.parts}
    sys.path[:0] = map(str, [*portions, ROOT])
    sys.path += map(str, sorted(helpers))
    return importlib.import_module("api_world")


@contextmanager
def serving(api_world: Any) -> Iterator[tuple[TestClient, Recorder]]:
    """A running application whose threads are all profiled, and a client of it."""
    with tempfile.TemporaryDirectory() as folder, api_world.make_world(Path(folder)) as world:
        fakes = {sys.modules[base.__module__].__file__ for base in type(world.runner).__mro__[:-1]}
        recorder = Recorder(fakes)
        # Before the lifespan starts the engine's thread and any other.
        threading.setprofile(recorder)
        sys.setprofile(recorder)
        try:
            with TestClient(world.app, headers=world.headers()) as client:
                yield client, recorder
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


# No two begin alike, so KV reuse finds nothing.
_prompts = (f"{number:05}"[::-1] for number in itertools.count())


def complete(client: TestClient, max_tokens: int, *, stream: bool) -> None:
    body = {"model": "resident", "prompt": next(_prompts), "ignore_eos": True}
    body |= {"max_tokens": max_tokens, "stream": stream}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


def upload(client: TestClient, name: str, *, fill: float, width: int) -> None:
    rows = np.full((VIRTUAL_TOKENS, width), fill, dtype=np.float32)
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "token_dim": width}
    config["num_virtual_tokens"] = VIRTUAL_TOKENS
    files = {
        "config": ("adapter_config.json", json.dumps(config).encode(), "application/json"),
        "weights": ("weights", save({"prompt_embeddings": rows}), "application/octet-stream"),
    }
    answer = client.put(f"/v1/prefixes/{name}", files=files)
    assert answer.status_code == 201, answer.text


def measure(rounds: int) -> dict[str, Footprint]:
    """Every path, ``rounds`` times after the warm-up. Each upload is a new prefix."""
    api_world = import_world()
    footprints: dict[str, Footprint] = {}
    width = api_world.BASE.embedding_width
    with serving(api_world) as (client, recorder):
        upload(client, "resident", fill=0.5, width=width)
        for number in range(WARM_UP + rounds):
            paths: dict[str, Callable[[], None]] = {
                "completion": lambda: complete(client, 1, stream=False),
                "long completion": lambda: complete(client, 1 + FURTHER, stream=False),
                "streaming": lambda: complete(client, 1, stream=True),
                "long streaming": lambda: complete(client, 1 + FURTHER, stream=True),
                "upload": partial(upload, client, f"new-{number}", fill=number / 1024, width=width),
            }
            for name, send in paths.items():
                window = recorder.measure(send)
                if number >= WARM_UP:
                    footprints.setdefault(name, Footprint()).windows.append(window)
    return footprints


def per_token(footprints: dict[str, Footprint]) -> dict[str, float]:
    """Calls for each token after the first."""
    return {
        path: (footprints[f"long {path}"].calls - footprints[path].calls) / FURTHER
        for path in ("completion", "streaming")
    }


def count_lines() -> dict[str, int]:
    """Size of the product; ``code`` leaves out blank lines and comments and has docstrings."""
    paths = product_files()
    lines = [line.strip() for path in paths for line in (ROOT / path).read_text().splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    return {"files": len(paths), "lines": len(lines), "code": len(code)}


def table(footprints: dict[str, Footprint], size: dict[str, int]) -> str:
    rows = ["| | Files | Functions | Classes | Calls |", "|---|---|---|---|---|"]
    for path, title in TITLES.items():
        cells = " | ".join(f"{figure:g}" for figure in footprints[path].figures().values())
        rows.append(f"| {title} | {cells} |")
    for path, calls in per_token(footprints).items():
        rows += [f"| Each further token, {path} | | | | {calls:.1f} |"]
    rows += ["", "Product code: {files} files, {lines} lines, {code} of them code.".format(**size)]
    return "\n".join(rows)


def listing(footprints: dict[str, Footprint]) -> str:
    """Files, functions with their calls, and classes of each path."""
    lines = []
    for path, footprint in footprints.items():
        lines.append(f"\n# {path}")
        for file, functions in groupby(footprint.functions, key=lambda function: function.file):
            lines.append(f"\n{file}")
            for function in functions:
                calls = statistics.median(window.calls[function] for window in footprint.windows)
                lines.append(f"  {calls:5g}  {function.name}:{function.line}")
        lines += ["\nClasses", *(f"  {name}" for name in footprint.classes)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--list", action="store_true", help="print files, functions and classes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    footprints, size = measure(options.rounds), count_lines()
    print(table(footprints, size))
    if options.list:
        print(listing(footprints))
    if options.json is not None:
        paths = {path: footprint.figures() for path, footprint in footprints.items()}
        calls = per_token(footprints)
        report = {"paths": paths, "calls_per_further_token": calls, "size": size}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
