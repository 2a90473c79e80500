"""The demo: its requests, its server process, its output, and the whole on the real model."""

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
from prefixd.server.cli.demo.run import example_folder
from prefixd.server.model.demo import default_cache_dir, demo_model
from tests.clients.loopback import Loopback

ROOT = Path(__file__).parents[2]
DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"Ahoy"}}]}\n\ndata: [DONE]\n\n'

# Logs and responds as `prefixd serve` does, with the standard library alone.
FAKE_SERVER = """
import http.server, json, sys, threading
def log(**entry): print(json.dumps(entry), file=sys.stderr, flush=True)
print("output of a library", file=sys.stderr, flush=True)
log(event="loading", arguments=sys.argv[1:])
if {fails}: sys.exit("no such model")
paths = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        paths.append(self.path)
        self.send_response(200 if len(paths) > 1 else 503)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
log(event="serving", url=f"http://127.0.0.1:{{server.server_port}}")
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


def test_every_prompt_is_sent_and_each_question_once_to_the_bare_base():
    planned = [(request.prefix, request.question) for request in plan_requests(EXAMPLES)]
    assert planned == [
        ("triage", "lost?"),
        ("bob", "bread?"),
        ("alice", "bread?"),
        ("triage", "late?"),
        (None, "lost?"),
        (None, "bread?"),
    ]


def test_requests_are_grouped_by_question_with_the_base_first():
    assert by_question(plan_requests(EXAMPLES)) == [[4, 0], [5, 1, 2], [3]]


def test_the_committed_examples_give_enough_requests():
    examples = read_examples(ROOT / "examples")
    planned = plan_requests(examples)
    assert len(planned) >= 16
    assert len({request.prefix for request in planned} - {None}) >= 4
    assert {request.tenant for request in planned} == {SUPPORT, FRIENDS}
    assert {request.prefix for request in planned} == {
        None,
        *(example.name for example in examples),
    }


def test_the_examples_are_those_of_the_option_else_of_the_checkout(tmp_path: Path):
    (tmp_path / "prefixes.json").write_text("{}")
    assert example_folder(tmp_path) == tmp_path
    assert example_folder(None) == ROOT / "examples"
    with pytest.raises(DemoFailed, match=r"prefixes\.json does not exist: pass --examples"):
        example_folder(tmp_path / "missing")


def test_a_metric_is_matched_by_its_complete_name():
    page = "# HELP steps_total x\nsteps_total_created 1.0\nsteps_total 41.0\n"
    assert metric(page, "steps_total") == 41.0
    with pytest.raises(KeyError, match="steps_max"):
        metric(page, "steps_max")


# ── The server's process ─────────────────────────────────────────────────────────────────────


def test_the_server_process_is_awaited_logged_and_terminated(tmp_path: Path):
    events: list[str] = []
    with ServerProcess(data_dir=tmp_path, port=0, program=_program(tmp_path)) as server:
        url = server.wait_until_ready(timeout=30, on_event=events.append)
        assert url.startswith("http://127.0.0.1:")
        process = server._process
        assert process.poll() is None
    assert process.returncode is not None
    assert events == ["", "loading", "serving"]
    lines = (tmp_path / "server.log").read_text().splitlines()
    arguments = json.loads(lines[1])["arguments"]
    assert arguments[:3] == ["serve", "--model", "demo"]
    assert ["--data-dir", str(tmp_path)] == arguments[arguments.index("--data-dir") :][:2]


def test_a_server_that_exits_early_is_reported_with_its_log(tmp_path: Path):
    program = _program(tmp_path, fails=True)
    with (
        ServerProcess(data_dir=tmp_path, port=0, program=program) as server,
        pytest.raises(DemoFailed, match="no such model"),
    ):
        server.wait_until_ready(timeout=30, on_event=lambda _: None)


def test_a_server_that_is_not_ready_in_time_is_terminated(tmp_path: Path):
    silent = (sys.executable, "-c", "import signal; signal.pause()")
    with (
        ServerProcess(data_dir=tmp_path, port=0, program=silent) as server,
        pytest.raises(DemoFailed, match="in time"),
    ):
        server.wait_until_ready(timeout=0, on_event=lambda _: None)
    assert server._process.returncode is not None


def test_settings_of_another_server_do_not_reach_the_demo():
    environment = {
        "PATH": "/bin",
        "PREFIXD_DATABASE_URL": "postgresql://prod",
        "PREFIXD_DEVICE": "cpu",
    }
    assert child_environment(environment) == {
        "PATH": "/bin",
        "PREFIXD_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


# ── Traffic and what is shown ────────────────────────────────────────────────────────────────


def test_requests_are_sent_concurrently_and_answers_keep_their_order(server: Loopback):
    headers: dict[str, Any] = {"x_prefixd_prefix": "bob@2", "x_prefixd_prefix_digest": "ff"}
    for _ in range(3):
        server.stream(DELTA, **headers)
    message = {"role": "user", "content": "Hi"}
    requests = [DemoRequest(FRIENDS, name, (message,), 8) for name in ("bob", None, "alice")]
    answered: list[int] = []
    answers = traffic.send_all(
        server.url,
        requests,
        keys={FRIENDS: "pfx_a"},
        base="smol",
        on_answer=lambda: answered.append(1),
    )
    assert [answer.text for answer in answers] == ["Ahoy"] * 3
    assert answers[0].prefix == PrefixUsed(name="bob", version=2, digest="ff")
    assert all(0 < answer.first_token_s <= answer.total_s for answer in answers)
    assert len(answered) == 3
    models = [seen.json["model"] for seen in server.seen if isinstance(seen.json, dict)]
    assert sorted(models) == ["alice", "bob", "smol"]


def test_a_failed_request_fails_the_demo(server: Loopback):
    server.reply({"error": {"message": "no such prefix"}}, status=404)
    request = DemoRequest(FRIENDS, "bob", ({"role": "user", "content": "Hi"},), 8)
    with pytest.raises(NotFoundError):
        traffic.send_all(
            server.url, [request], keys={FRIENDS: "k"}, base="b", on_answer=lambda: None
        )


@pytest.mark.parametrize(
    ("passes", "distinct", "holds"), [(9, 2, True), (9, 1, False), (0, 2, False)]
)
def test_the_proof_requires_two_prefixes_in_one_pass(passes: int, distinct: int, holds: bool):
    assert show.Proof(16, passes, distinct, 1.0).holds is holds


def test_the_table_shows_versions_and_first_token_times():
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


# ── The whole demo ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.timeout(600)
def test_the_demo_proves_mixed_prefixes_on_the_real_model(tmp_path: Path):
    # Converting takes longer than the demo; the demo from the wheel begins with it.
    (tmp_path / "models").symlink_to(demo_model(default_cache_dir()).parent)
    command = [sys.executable, "-P", "-m", "prefixd.server", "demo", "--once", "--port", "0"]
    command += ["--data-dir", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    proof = re.search(r"carried\s+(\d+)\s+distinct prefixes", process.stdout)
    assert proof is not None
    assert int(proof[1]) >= 8
    assert "neither tenant can see" in process.stdout
