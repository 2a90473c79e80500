"""The demo: what it plans, how it minds its server, and the whole of it on the real model."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefixd.client.errors import NotFoundError
from prefixd.client.types import PrefixUsed
from prefixd.server.cli.demo import show, traffic
from prefixd.server.cli.demo.child import DemoFailed, ServerProcess, child_environment
from prefixd.server.cli.demo.plan import (
    FRIENDS,
    SUPPORT,
    DemoRequest,
    Example,
    by_question,
    metric,
    plan_requests,
    read_examples,
)
from tests.clients.loopback import Loopback

ROOT = Path(__file__).parents[2]
DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"Ahoy"}}]}\n\ndata: [DONE]\n\n'

# Speaks and obeys as `prefixd serve` does, with standard library alone.
FAKE_SERVER = """
import http.server, json, sys, threading
def say(**entry): print(json.dumps(entry), file=sys.stderr, flush=True)
print("a library's own words", file=sys.stderr, flush=True)
say(event="loading", arguments=sys.argv[1:])
if {fails}: sys.exit("no such model")
asked = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(200 if len(asked) > 1 else 503)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
say(event="serving", url=f"http://127.0.0.1:{{server.server_port}}")
server.serve_forever()
"""


def _program(tmp_path: Path, *, fails: bool = False) -> tuple[str, str]:
    path = tmp_path / "fake_server.py"
    path.write_text(FAKE_SERVER.format(fails=fails))
    return sys.executable, str(path)


def _example(name: str, *questions: str) -> Example:
    prompts = tuple(({"role": "user", "content": question},) for question in questions)
    return Example(name, Path("nowhere"), "what it does", 8, prompts)


EXAMPLES = [
    _example("triage", "lost?", "late?"),
    _example("bob", "bread?"),
    _example("alice", "bread?"),
]


# ── The plan ─────────────────────────────────────────────────────────────────────────────────


def test_every_prompt_is_asked_and_each_question_once_under_the_bare_base():
    planned = [(ask.prefix, ask.question) for ask in plan_requests(EXAMPLES)]
    assert planned == [
        ("triage", "lost?"),
        ("bob", "bread?"),
        ("alice", "bread?"),
        ("triage", "late?"),
        (None, "lost?"),
        (None, "bread?"),
    ]


def test_answers_to_one_question_stand_together_with_the_base_first():
    assert by_question(plan_requests(EXAMPLES)) == [[4, 0], [5, 1, 2], [3]]


def test_the_committed_examples_make_a_demo():
    found = read_examples(ROOT / "examples")
    planned = plan_requests(found)
    assert len(planned) >= 16
    assert len({ask.prefix for ask in planned} - {None}) >= 4
    assert {ask.tenant for ask in planned} == {SUPPORT, FRIENDS}
    assert {ask.prefix for ask in planned} == {None, *(example.name for example in found)}


def test_a_metric_is_found_by_its_whole_name():
    page = "# HELP steps_total x\nsteps_total_created 1.0\nsteps_total 41.0\n"
    assert metric(page, "steps_total") == 41.0
    with pytest.raises(KeyError, match="steps_max"):
        metric(page, "steps_max")


# ── The server's process ─────────────────────────────────────────────────────────────────────


def test_the_child_is_awaited_logged_and_ended(tmp_path: Path):
    said: list[str] = []
    with ServerProcess(data_dir=tmp_path, port=0, program=_program(tmp_path)) as server:
        url = server.wait_until_ready(timeout=30, on_event=said.append)
        assert url.startswith("http://127.0.0.1:")
        process = server._process
        assert process.poll() is None
    assert process.returncode is not None
    assert said == ["", "loading", "serving"]
    lines = (tmp_path / "server.log").read_text().splitlines()
    arguments = json.loads(lines[1])["arguments"]
    assert arguments[:3] == ["serve", "--model", "demo"]
    assert ["--data-dir", str(tmp_path)] == arguments[arguments.index("--data-dir") :][:2]


def test_a_child_that_ends_early_has_the_last_word(tmp_path: Path):
    program = _program(tmp_path, fails=True)
    with (
        ServerProcess(data_dir=tmp_path, port=0, program=program) as server,
        pytest.raises(DemoFailed, match="no such model"),
    ):
        server.wait_until_ready(timeout=30, on_event=lambda _: None)


def test_a_child_that_is_late_is_given_up(tmp_path: Path):
    silent = (sys.executable, "-c", "import signal; signal.pause()")
    with (
        ServerProcess(data_dir=tmp_path, port=0, program=silent) as server,
        pytest.raises(DemoFailed, match="in time"),
    ):
        server.wait_until_ready(timeout=0, on_event=lambda _: None)
    assert server._process.returncode is not None


def test_another_servers_settings_stay_out_of_the_demo():
    given = {"PATH": "/bin", "PREFIXD_DATABASE_URL": "postgresql://prod", "PREFIXD_DEVICE": "cpu"}
    assert child_environment(given) == {
        "PATH": "/bin",
        "PREFIXD_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


# ── Traffic and what is shown ────────────────────────────────────────────────────────────────


def test_all_are_asked_at_once_and_answers_keep_their_order(server: Loopback):
    headers: dict[str, Any] = {"x_prefixd_prefix": "bob@2", "x_prefixd_prefix_digest": "ff"}
    for _ in range(3):
        server.stream(DELTA, **headers)
    message = {"role": "user", "content": "Hi"}
    requests = [DemoRequest(FRIENDS, name, (message,), 8) for name in ("bob", None, "alice")]
    done: list[int] = []
    answers = traffic.send_all(
        server.url,
        requests,
        keys={FRIENDS: "pfx_a"},
        base="smol",
        on_answer=lambda: done.append(1),
    )
    assert [answer.text for answer in answers] == ["Ahoy"] * 3
    assert answers[0].prefix == PrefixUsed(name="bob", version=2, digest="ff")
    assert all(0 < answer.first_token_s <= answer.total_s for answer in answers)
    assert len(done) == 3
    models = [seen.json["model"] for seen in server.seen if isinstance(seen.json, dict)]
    assert sorted(models) == ["alice", "bob", "smol"]


def test_a_failed_request_fails_the_demo(server: Loopback):
    server.reply({"error": {"message": "no such prefix"}}, status=404)
    ask = DemoRequest(FRIENDS, "bob", ({"role": "user", "content": "Hi"},), 8)
    with pytest.raises(NotFoundError):
        traffic.send_all(server.url, [ask], keys={FRIENDS: "k"}, base="b", on_answer=lambda: None)


@pytest.mark.parametrize(
    ("passes", "distinct", "holds"), [(9, 2, True), (9, 1, False), (0, 2, False)]
)
def test_the_proof_needs_two_prefixes_in_one_pass(passes: int, distinct: int, holds: bool):
    assert show.Proof(16, passes, distinct, 1.0).holds is holds


def test_the_table_names_versions_and_first_tokens():
    requests = plan_requests(EXAMPLES[1:])
    used = PrefixUsed(name="bob", version=3, digest="ff")
    answers = [
        traffic.Answer("Ahoy [matey]!\n\n\x1b[2J", used, 0.25, 1.0),
        traffic.Answer("- a", PrefixUsed(name="alice", version=1, digest="ee"), 0.5, 1.0),
        traffic.Answer("Knead.", None, 0.125, 1.0),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show.answers_table(requests, answers))
    text = console.export_text()
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines()]
    assert [FRIENDS, "bare base", "125 ms", "Knead."] in rows
    assert [FRIENDS, "bob@3", "250 ms", "Ahoy [matey]!"] in rows
    assert [FRIENDS, "alice@1", "500 ms", "- a"] in rows


# ── All of it ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.timeout(600)
def test_the_demo_shows_what_it_promises(tmp_path: Path):
    command = [sys.executable, "-P", "-m", "prefixd.server", "demo", "--once", "--port", "0"]
    command += ["--data-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    proof = re.search(r"carried\s+(\d+)\s+distinct prefixes", done.stdout)
    assert proof is not None
    assert int(proof[1]) >= 8
    assert "neither tenant can see" in done.stdout
