"""The verbs that talk to a server, on a real socket: output, requests, errors."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prefixd.server.cli.main import app
from prefixd.server.cli.output import printable
from tests.clients.loopback import Loopback
from tests.clients.samples import MANIFEST

CHAT_EVENTS = (
    'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    'data: {"choices":[{"index":0,"delta":{"content":"Ahoy,\\u001b[2J"}}]}\n\n'
    'data: {"choices":[{"index":0,"delta":{"content":" 🦜!"}}]}\n\n'
    "data: [DONE]\n\n"
).encode()


class Shell:
    """Runs ``prefixd`` verbs against the loopback server, as a user's environment would."""

    def __init__(self, url: str) -> None:
        self.environment = {"PREFIXD_URL": url, "PREFIXD_API_KEY": "pfx_secret"}

    def __call__(self, *arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, arguments, env=self.environment, input=stdin)


@pytest.fixture
def shell(server: Loopback) -> Shell:
    return Shell(server.url)


def test_push_a_folder(shell: Shell, server: Loopback, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    server.reply(MANIFEST, status=201)
    result = shell("prefix", "push", "triage", str(tmp_path), "--task-id", "1")
    assert result.exit_code == 0
    assert result.stdout == (f"triage@3  uploaded  soft_prompt, 12 virtual tokens, {'ab' * 6}\n")
    assert server.seen[0].parts["weights"] == b"weights"
    assert server.seen[0].parts["metadata"] == b'{"task_id":1}'
    assert server.seen[0].headers["authorization"] == "Bearer pfx_secret"


def test_push_shows_the_warnings_of_the_server(shell: Shell, server: Loopback):
    server.reply(MANIFEST | {"warnings": ["3 of 4 layers\x1b[2J see nothing"]}, status=201)
    result = shell("prefix", "push", "voice", "--text", "Hello")
    assert result.exit_code == 0
    assert result.stderr == "prefixd: 3 of 4 layers\\u001b[2J see nothing\n"


@pytest.mark.parametrize("source", ["option", "file", "stdin"])
def test_push_a_text(source: str, shell: Shell, server: Loopback, tmp_path: Path):
    file = tmp_path / "voice.txt"
    file.write_text("Grüezi", "utf-8")
    arguments = {"option": ["--text", "Grüezi"], "file": [str(file)], "stdin": ["-"]}[source]
    server.reply(MANIFEST, status=200)
    result = shell("prefix", "push", "voice", *arguments, stdin="Grüezi")
    assert result.exit_code == 0
    assert "already there" in result.stdout
    assert server.seen[0].json == {"kind": "text", "text": "Grüezi"}


def test_push_reads_the_info_of_a_folder_and_flags_replace_it(
    shell: Shell, server: Loopback, tmp_path: Path
):
    (tmp_path / "prefix.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "prefixd.json").write_text('{"metadata": {"by": "ann"}, "version": 3}')
    server.reply(MANIFEST, status=201)
    server.reply(MANIFEST, status=201)
    assert shell("prefix", "push", "voice", str(tmp_path)).exit_code == 0
    options = ["--metadata", '{"by": "bob"}']
    assert shell("prefix", "push", "voice", str(tmp_path), *options).exit_code == 0
    text = {"kind": "text", "text": "one\r\ntwo\n"}
    assert [seen.json for seen in server.seen] == [
        {**text, "metadata": {"by": "ann"}},
        {**text, "metadata": {"by": "bob"}},
    ]


def test_push_of_a_folder_with_a_malformed_info_fails_before_anything_is_sent(
    shell: Shell, server: Loopback, tmp_path: Path
):
    (tmp_path / "prefix.txt").write_text("x")
    (tmp_path / "prefixd.json").write_text('{"labels": {}}')
    result = shell("prefix", "push", "voice", str(tmp_path))
    assert result.exit_code == 1
    assert "received 'labels'" in result.stderr
    assert server.seen == []


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_push_keeps_the_line_ends_of_a_text(
    source: str, shell: Shell, server: Loopback, tmp_path: Path
):
    file = tmp_path / "voice.txt"
    file.write_bytes(b"a\r\nb\r")
    server.reply(MANIFEST)
    argument = str(file) if source == "file" else "-"
    assert shell("prefix", "push", "voice", argument, stdin=b"a\r\nb\r").exit_code == 0
    assert server.seen[0].json == {"kind": "text", "text": "a\r\nb\r"}


@pytest.mark.parametrize("kind", ["file", "stdin"])
def test_push_of_binary_data_suggests_the_folder(kind: str, shell: Shell, tmp_path: Path):
    file = tmp_path / "prefix.dat"
    file.write_bytes(b"\x90\xf6\x00")
    source = str(file) if kind == "file" else "-"
    result = shell("prefix", "push", "voice", source, stdin=file.read_bytes())
    assert result.exit_code == 2
    message = " ".join(result.stderr.replace("│", " ").split())
    assert "is not text in UTF-8, from byte 0; to upload a prefix that PEFT wrote" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "damaged safetensors: the file does not begin with a header"),
        ("adapter_model.bin", "damaged pickle"),
    ],
)
def test_push_of_damaged_weights_names_their_format(
    name: str, message: str, shell: Shell, tmp_path: Path
):
    (tmp_path / name).write_bytes(b"\x90\xf6\x00")
    result = shell("prefix", "push", "voice", str(tmp_path / name))
    assert result.exit_code == 1
    assert f"{name}: {message}" in result.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["x.txt", "--text", "y"], ["--text", "y", "--metadata", "[1]"]]
)
def test_push_requires_one_source_and_a_json_object_as_metadata(arguments: list[str], shell: Shell):
    assert shell("prefix", "push", "voice", *arguments).exit_code == 2


def test_a_newline_after_the_api_key_is_ignored(shell: Shell, server: Loopback):
    shell.environment["PREFIXD_API_KEY"] = "pfx_secret\r\n"
    server.reply({"data": [], "next_after": None})
    assert shell("prefix", "ls").exit_code == 0
    assert server.seen[0].headers["authorization"] == "Bearer pfx_secret"


@pytest.mark.parametrize("key", ["pfx_secr…", "pfx_sec\nret"])
def test_an_invalid_api_key_is_not_printed(shell: Shell, server: Loopback, key: str):
    shell.environment["PREFIXD_API_KEY"] = key
    result = shell("prefix", "ls")
    assert result.exit_code == 1
    assert "the API key" in result.stderr
    assert "sec" not in result.stderr
    assert server.seen == []


def test_ls_requests_every_page(shell: Shell, server: Loopback):
    server.reply({"data": [MANIFEST], "next_after": "triage"})
    server.reply({"data": [MANIFEST | {"name": "voice", "aliases": []}], "next_after": None})
    lines = shell("prefix", "ls").stdout.splitlines()
    assert lines == [
        "PREFIX    KIND         TOKENS  BASE  ALIASES      LABELS  DIGEST        CREATED",
        "triage@3  soft_prompt  12      tiny  latest,prod  -       abababababab  2026-11-21 10:00",
        "voice@3   soft_prompt  12      tiny  -            -       abababababab  2026-11-21 10:00",
    ]
    assert server.seen[1].query == {"after": "triage"}


def test_versions_requests_every_page(shell: Shell, server: Loopback):
    server.reply({"data": [MANIFEST], "next_before": 3})
    server.reply({"data": [MANIFEST | {"version": 2}], "next_before": None})
    lines = shell("prefix", "versions", "triage").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["PREFIX", "triage@3", "triage@2"]
    assert server.seen[1].query == {"before": "3"}


@pytest.mark.parametrize(
    ("arguments", "reply"),
    [
        (["ls"], {"data": [MANIFEST]}),
        (["versions", "triage"], {"data": [MANIFEST]}),
        (["show", "triage@prod"], MANIFEST),
    ],
)
def test_listings_take_json(arguments: list[str], reply: object, shell: Shell, server: Loopback):
    server.reply(reply)
    result = shell("prefix", *arguments, "--json")
    output = json.loads(result.stdout)
    prefix = output[0] if isinstance(output, list) else output
    assert (prefix["digest"], prefix["aliases"]) == ("ab" * 32, ["latest", "prod"])
    assert prefix["created_at"] == "2026-11-21T10:00:00+00:00"


def test_show_prints_one_field_on_a_line(shell: Shell, server: Loopback):
    server.reply(MANIFEST)
    assert "num_virtual_tokens       12\n" in shell("prefix", "show", "triage").stdout


def test_base_all_lists_the_versions_for_every_base(shell: Shell, server: Loopback):
    for _ in range(2):
        server.reply({"data": [MANIFEST], "next_after": "triage", "next_before": 3})
        server.reply({"data": [MANIFEST | {"base": "other"}]})
    lines = shell("prefix", "ls", "--base", "all").stdout.splitlines()
    assert [line.split()[3] for line in lines] == ["BASE", "tiny", "other"]
    lines = shell("prefix", "versions", "triage", "--base", "all").stdout.splitlines()
    assert [line.split()[3] for line in lines] == ["BASE", "tiny", "other"]
    assert [seen.query for seen in server.seen] == [
        {"base": "all"},
        {"base": "all", "after": "triage"},
        {"base": "all"},
        {"base": "all", "before": "3"},
    ]
    assert shell("prefix", "ls", "--base", "some").exit_code == 2


def test_rollback_to_a_version_or_to_the_highest_one_below(shell: Shell, server: Loopback):
    server.reply(MANIFEST | {"version": 1})
    assert shell("prefix", "rollback", "triage", "1").stdout == "triage is triage@1\n"
    assert server.seen[0].json == {"version": 1}
    server.reset()
    server.reply(MANIFEST)
    server.reply({"data": [MANIFEST | {"version": 2}], "next_before": 2})
    server.reply(MANIFEST | {"version": 2})
    assert shell("prefix", "rollback", "triage").stdout == "triage is triage@2\n"
    assert [f"{seen.method} {seen.path}" for seen in server.seen] == [
        "GET /v1/prefixes/triage@latest",
        "GET /v1/prefixes/triage/versions",
        "PUT /v1/prefixes/triage/aliases/latest",
    ]
    assert server.seen[1].query == {"limit": "1", "before": "3"}
    assert server.seen[2].json == {"version": 2}


def test_rollback_below_the_lowest_version_is_an_error(shell: Shell, server: Loopback):
    server.reply(MANIFEST)
    server.reply({"data": []})
    result = shell("prefix", "rollback", "triage")
    assert result.exit_code == 1
    assert "triage@3 is the lowest version of triage for the base tiny" in result.stderr
    assert len(server.seen) == 2


def test_rm_of_one_version(shell: Shell, server: Loopback):
    server.reply("", status=204)
    assert shell("prefix", "rm", "triage@3").stdout == "triage@3 deleted\n"
    assert f"{server.seen[0].method} {server.seen[0].path}" == (
        "DELETE /v1/prefixes/triage/versions/3"
    )
    for reference in ("triage@prod", "triage@", "triage@²"):
        result = shell("prefix", "rm", reference)
        assert result.exit_code == 2
        assert "NAME@3" in result.stderr
    assert len(server.seen) == 1


def test_alias_unalias_and_rm(shell: Shell, server: Loopback):
    server.reply(MANIFEST)
    server.reply("", status=204)
    server.reply("", status=204)
    assert shell("prefix", "alias", "triage", "prod", "3").stdout == "triage@prod is triage@3\n"
    assert server.seen[0].json == {"version": 3}
    assert shell("prefix", "unalias", "triage", "prod").exit_code == 0
    assert shell("prefix", "rm", "triage").stdout == "triage deleted\n"
    assert [f"{seen.method} {seen.path}" for seen in server.seen] == [
        "PUT /v1/prefixes/triage/aliases/prod",
        "DELETE /v1/prefixes/triage/aliases/prod",
        "DELETE /v1/prefixes/triage",
    ]


def test_alias_from_another_one_prints_the_number(shell: Shell, server: Loopback):
    server.reply(MANIFEST)
    assert shell("prefix", "alias", "triage", "prod", "latest").stdout == (
        "triage@prod is triage@3\n"
    )
    assert server.seen[0].json == {"version": "latest"}


def test_warm_pin_and_unpin(shell: Shell, server: Loopback):
    residency = {"name": "triage", "version": 3, "digest": "ab" * 32, "state": "fetching"}
    server.reply(residency, status=202)
    server.reply(residency, status=202)
    server.reply(MANIFEST | {"pinned": True})
    server.reply("", status=204)
    assert shell("prefix", "warm", "triage@prod").stdout == "triage@3  fetching\n"
    shown = json.loads(shell("prefix", "warm", "triage", "--json").stdout)
    assert shown == residency
    assert shell("prefix", "pin", "triage@3").stdout == "triage@3  pinned\n"
    assert shell("prefix", "unpin", "triage").stdout == "triage unpinned\n"
    assert [f"{seen.method} {seen.path}" for seen in server.seen] == [
        "POST /v1/prefixes/triage@prod/warm",
        "POST /v1/prefixes/triage/warm",
        "PUT /v1/prefixes/triage@3/pin",
        "DELETE /v1/prefixes/triage/pin",
    ]


def test_push_with_warm_makes_the_prefix_resident(shell: Shell, server: Loopback):
    server.reply(MANIFEST, status=201)
    assert shell("prefix", "push", "voice", "--text", "x", "--warm").exit_code == 0
    assert server.seen[0].query == {"warm": "true"}


def test_chat_with_a_message_prints_one_answer(shell: Shell, server: Loopback):
    server.stream(CHAT_EVENTS[:70], CHAT_EVENTS[70:])
    result = shell("chat", "Hello", "--model", "bob@prod", "--system", "Be brief.")
    assert result.exit_code == 0
    assert result.stdout == "Ahoy,\\u001b[2J 🦜!\n"
    sent = server.seen[0].json
    assert isinstance(sent, dict)
    assert sent["model"] == "bob@prod"
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


def test_chat_reads_standard_input_and_defaults_to_the_base(shell: Shell, server: Loopback):
    server.reply({"data": [{"id": "bob", "parent": "smol"}, {"id": "smol", "parent": None}]})
    server.stream(CHAT_EVENTS)
    result = shell("chat", stdin="Hello\n")
    assert result.stdout.endswith("!\n")
    sent = server.seen[1].json
    assert isinstance(sent, dict)
    assert (sent["model"], sent["messages"][0]["content"]) == ("smol", "Hello")


def test_an_api_error_is_one_line_on_standard_error(shell: Shell, server: Loopback):
    server.reply({"error": {"message": "no such prefix: 'x'"}}, status=404)
    result = shell("prefix", "show", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "prefixd: no such prefix: 'x'\n"


def test_a_missing_api_key_names_the_variable(shell: Shell, server: Loopback):
    server.reply({"error": {"message": "no key"}}, status=401)
    assert "PREFIXD_API_KEY" in shell("prefix", "ls").stderr


def test_an_unreachable_server_gives_advice(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefixd.client.transport.RetryPolicy.wait", lambda *_, **__: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        result = shell("prefix", "ls", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert result.exit_code == 1
    assert "is the server running?" in result.stderr


def test_a_missing_file_is_named_without_a_traceback(shell: Shell, tmp_path: Path):
    result = shell("prefix", "push", "triage", str(tmp_path))
    assert result.exit_code == 1
    assert "adapter_config.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_demo_without_examples_names_the_missing_file(shell: Shell, tmp_path: Path):
    result = shell("demo", "--examples", str(tmp_path), "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 1
    assert "prefixes.json" in result.stderr


def test_control_characters_are_escaped_in_output():
    assert printable("a\x1b[31mb\x07\x9bc\r\td\n") == "a\\u001b[31mb\\u0007\\u009bc\\u000d\td\n"
    assert printable("ann\u202e\u2066\ud800 \u200d") == "ann\\u202e\\u2066\\ud800 \u200d"


def test_ls_filters_by_label_and_prints_labels(shell: Shell, server: Loopback):
    labelled = {**MANIFEST, "labels": {"team": "care", "lang": "de"}}
    server.reply({"data": [labelled], "next_after": "triage"})
    server.reply({"data": [], "next_after": None})
    result = shell("prefix", "ls", "--label", "team:care", "--label", "lang:de")
    assert result.exit_code == 0
    assert "LABELS" in result.stdout
    assert "lang:de,team:care" in result.stdout
    assert [seen.query["label"] for seen in server.seen] == ["team:care,lang:de"] * 2
    server.reply(labelled)
    assert "lang:de,team:care" in shell("prefix", "show", "triage").stdout


@pytest.mark.parametrize("labels", [["team"], ["team:a", "team:b"]])
def test_ls_refuses_a_malformed_label(shell: Shell, server: Loopback, labels: list[str]):
    options = [part for label in labels for part in ("--label", label)]
    assert shell("prefix", "ls", *options).exit_code == 2
    assert server.seen == []


def test_metadata_merges_an_object_into_one_version(shell: Shell, server: Loopback):
    server.reply(MANIFEST)
    server.reply(MANIFEST)
    patch = '{"labels": {"team": null}, "description": "new"}'
    assert shell("prefix", "metadata", "triage@3", patch).stdout == "triage@3  metadata changed\n"
    assert shell("prefix", "metadata", "triage", patch).exit_code == 0
    targets = [(seen.method, seen.path) for seen in server.seen]
    assert targets == [
        ("PATCH", "/v1/prefixes/triage/versions/3"),
        ("PATCH", "/v1/prefixes/triage/versions/latest"),
    ]
    assert server.seen[0].json == {"labels": {"team": None}, "description": "new"}
    assert shell("prefix", "metadata", "triage", "[1]").exit_code == 2
