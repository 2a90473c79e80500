"""Verbs on the configured catalog: tenants, keys, audit."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from alembic import command
from sqlalchemy import text

from prefixd.server.cli.serve import load_server
from prefixd.server.serve.settings import Settings
from prefixd.server.tenants import key_text as keys
from prefixd.server.tenants.registry import Tenants
from prefixd.store.db.database import open_database, writing
from prefixd.store.db.migrate import HEAD, configured, revision
from tests.cli.cli_runner import run, run_json

NO_DATABASE = "postgresql://postgres@127.0.0.1:1/none"


def run_failing_doctor(*arguments: str) -> Any:
    results = json.loads(run("doctor", *arguments, "--device", "cpu", "--json", code=1).stdout)
    assert not results["catalog"]["ok"]
    return results["catalog"]


def test_tenants_and_keys_are_created_listed_and_revoked() -> None:
    assert run_json("tenant", "create", "acme")["name"] == "acme"
    assert "already exists" in run("tenant", "create", "acme", code=1).stderr
    assert [t["name"] for t in run_json("tenant", "ls")] == ["acme"]
    made = run_json("key", "create", "--tenant", "acme", "--label", "ci")
    assert keys.parse(made["key"]) is not None
    assert made["scopes"] == ["read", "generate", "write"]
    listed = run_json("key", "ls", "--tenant", "acme")
    assert [key["key_id"] for key in listed] == [made["key_id"]]
    assert "key" not in listed[0]
    database = open_database(Settings().catalog_url)
    assert Tenants(database).authenticate(made["key"]).tenant == "acme"
    database.dispose()
    assert run_json("key", "revoke", made["key_id"])["revoked_at"]


def test_a_new_tenant_has_limits_and_one_from_before_is_marked() -> None:
    run("tenant", "create", "new")
    database = open_database(Settings().catalog_url)
    with writing(database) as connection:
        statement = "INSERT INTO tenants (name, created_at) VALUES ('old', '2026-01-01 00:00:00')"
        connection.execute(text(statement))
    database.dispose()
    run("tenant", "quota", "new", "max_users=7", "max-keys=none")
    new, old = run("tenant", "ls").stdout.splitlines()
    assert new.endswith("max_users=7 max_keys=none")
    assert old.endswith("no-limits")
    by_name = {tenant["name"]: tenant for tenant in run_json("tenant", "ls")}
    assert by_name["new"]["unlimited"] == ["max_keys"]
    assert by_name["old"]["unlimited"] == list(by_name["old"]["quota"])
    run("key", "create", "--tenant", "new")
    shown = run_json("tenant", "show", "new")
    assert (shown["keys"], shown["used"]["max_keys"], shown["quota"]["max_users"]) == (1, 1, 7)
    lines = [line.split() for line in run("tenant", "show", "new").stdout.splitlines()]
    assert ["no", "limit", "of", "max_keys"] in lines
    assert ["max_users", "7", "0"] in lines
    assert ["max_keys", "none", "1"] in lines
    assert "no tenant" in run("tenant", "show", "missing", code=1).stderr


def test_the_default_limits_are_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = run_json("tenant", "create", "a", "--default-quota", "max_users=9,max_keys=none")
    assert (quota["quota"]["max_users"], quota["unlimited"]) == (9, ["max_keys"])
    monkeypatch.setenv("PREFIXD_DEFAULT_QUOTA", "none")
    unlimited = run_json("tenant", "create", "b")
    assert unlimited["unlimited"] == list(unlimited["quota"])
    monkeypatch.setenv("PREFIXD_DEFAULT_QUOTA", "max_cats=1")
    message = run("tenant", "create", "c", code=1).stderr
    assert "PREFIXD_DEFAULT_QUOTA" in message
    assert "expected one of max_prefixes" in message


def test_a_tenant_may_store_a_quarter_of_a_small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=4000))
    assert run_json("tenant", "create", "a")["quota"]["max_bytes"] == 1000
    chosen = run_json("tenant", "create", "b", "--default-quota", "max_bytes=5000")
    assert chosen["quota"]["max_bytes"] == 5000


def test_a_key_is_printed_alone_on_standard_output(tmp_path: Path) -> None:
    run("tenant", "create", "acme", "--data-dir", str(tmp_path / "other"))
    result = run(
        "key", "create", "--tenant", "acme", "--scope", "read", "--scope", "admin",
        "--expires-in-days", "1", "--data-dir", str(tmp_path / "other"),
    )  # fmt: skip
    assert keys.parse(result.stdout.strip()) is not None
    assert "cannot be shown again" in result.stderr
    shown = run("key", "ls", "--data-dir", str(tmp_path / "other")).stdout
    assert "read,admin" in shown
    assert result.stdout.strip() not in shown


def test_labels_reach_the_terminal_without_control_characters() -> None:
    run("tenant", "create", "acme")
    run("key", "create", "--tenant", "acme", "--label", "ci\x9b2J")
    for verb in (("key", "ls"), ("audit",)):
        shown = run(*verb).stdout
        assert "ci" in shown
        assert "\x9b" not in shown


def test_key_verbs_report_unknown_tenants_scopes_and_keys() -> None:
    assert "no tenant" in run("key", "create", "--tenant", "unknown", code=1).stderr
    run("tenant", "create", "acme")
    result = run("key", "create", "--tenant", "acme", "--scope", "root", code=1)
    assert "read, generate, write, admin" in result.stderr
    assert "no key" in run("key", "revoke", "nothing", code=1).stderr


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (("--database-url", NO_DATABASE), "the database cannot be used: "),
        (("--database-url", "no url"), "the database cannot be used: "),
        (("--database-url", "mysql://host/name"), "sqlite or postgresql"),
        (("--data-dir", "/dev/null/x"), "/dev/null"),
    ],
)
def test_a_catalog_that_cannot_be_opened_gives_a_one_line_message(
    place: tuple[str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:

    for verb in (("tenant", "ls"), ("key", "ls"), ("audit",), ("gc",), ("migrate",)):
        message = run(*verb, *place, code=1).stderr
        assert message.startswith("prefixd: ")
        assert reason in message
        assert message.count("\n") == 1
    result = run_failing_doctor(*place)
    assert reason.removeprefix("the database cannot be used: ") in result["detail"]
    assert len(result["detail"]) > len("1")
    field = place[0].removeprefix("--").replace("-", "_")
    fields: dict[str, Any] = {field: place[1]}
    with pytest.raises(typer.Exit):
        load_server(Settings(**fields))
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["migrate", "doctor", "copy"])
def test_an_older_catalog_is_migrated_before_it_is_used(tmp_path: Path, verb: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    database = open_database(f"sqlite:///{old}/catalog.sqlite3")
    with writing(database) as connection:
        command.upgrade(configured(connection), "0004")
        connection.execute(text("INSERT INTO prefixes VALUES (1, 'acme', 'style', 2, 1)"))
        connection.execute(
            text(
                "INSERT INTO versions (prefix_id, version, tenant, digest, fingerprint, kind,"
                " num_virtual_tokens, size_bytes, metadata_json, created_at) VALUES (1, 1, 'acme',"
                f" '{'a' * 64}', 'f', 'hard_prompt', 9, 113, '{{}}', '2026-01-01')"
            )
        )
    database.dispose()
    place = ["--data-dir", str(old)]
    if verb == "migrate":
        assert run_json("migrate", *place) == {"from": "0004", "to": HEAD}
    elif verb == "doctor":
        results = run_json("doctor", *place, "--model", "org/model", "--device", "cpu")
        assert results["catalog"]["ok"]
    else:
        assert run_json("copy", *place, "--to-data-dir", str(new))["rows"]["latest_versions"] == 1
    for folder in (old, new) if verb == "copy" else (old,):
        database = open_database(f"sqlite:///{folder}/catalog.sqlite3")
        with database.connect() as connection:
            rows = connection.execute(text("SELECT fingerprint, version FROM latest_versions"))
            assert rows.all() == [("f", 1)]
        assert revision(database) == HEAD
        database.dispose()


def test_lifetimes_beyond_the_calendar_are_rejected() -> None:
    run("tenant", "create", "acme")
    made = run_json("key", "create", "--tenant", "acme")
    days = run("key", "create", "--tenant", "acme", "--expires-in-days", "1e9", code=2)
    assert "Invalid value for '--expires-in-days'" in days.stderr
    hours = run("key", "rotate", made["key_id"], "--overlap-hours", "1e12", code=2)
    assert "Invalid value for '--overlap-hours'" in hours.stderr


def test_quotas_key_rotation_and_audit_log() -> None:
    run("tenant", "create", "acme")
    shown = run_json("tenant", "quota", "acme", "max_prefixes=5", "tokens-per-minute=1000")
    assert (shown["max_prefixes"], shown["tokens_per_minute"]) == (5, 1000)
    assert run_json("tenant", "quota", "acme", "max_prefixes=none")["max_prefixes"] is None
    lines = run("tenant", "quota", "acme").stdout.splitlines()
    assert "tokens_per_minute         1000" in lines
    assert len({line.rindex(" ") for line in lines}) == 1  # values in one column
    assert "tokens_per_minute=1000" in run("tenant", "ls").stdout
    for bad in ("max_prefixes=-1", "max_prefixes", "else=1", "requests_per_minute=0"):
        run("tenant", "quota", "acme", bad, code=1)
    assert "no tenant" in run("tenant", "quota", "unknown", "max_bytes=1", code=1).stderr
    old = run_json("key", "create", "--tenant", "acme")
    new = run_json("key", "rotate", old["key_id"], "--overlap-hours", "2")
    assert keys.parse(new["key"]) is not None
    assert "replaced" in run("key", "ls").stdout
    assert "replaced" in run("key", "rotate", old["key_id"], code=1).stderr
    log = run_json("audit", "--tenant", "acme", "--limit", "2")
    assert [one["action"] for one in log] == ["key.rotate", "key.create"]
    assert "key.rotate" in run("audit").stdout
    assert new["key"] not in run("audit", "--json").stdout


def test_weight_and_kv_reuse_of_a_tenant() -> None:
    made = run_json("tenant", "create", "acme", "--weight", "2.5", "--no-kv-reuse")
    assert (made["weight"], made["kv_reuse"]) == (2.5, False)
    assert "weight=2.5 kv_reuse=off" in run("tenant", "ls").stdout
    assert run("tenant", "set", "acme").stdout.split() == ["weight", "2.5", "kv_reuse", "off"]
    changed = run_json("tenant", "set", "acme", "--kv-reuse")
    assert (changed["weight"], changed["kv_reuse"]) == (2.5, True)
    assert run("tenant", "set", "acme", "--weight", "1").stdout.split()[1] == "1"
    assert "weight" not in run("tenant", "ls").stdout
    assert "from 0.01 to 100" in run("tenant", "set", "acme", "--weight", "0", code=1).stderr
    assert "no tenant" in run("tenant", "set", "unknown", "--weight", "2", code=1).stderr
    assert run_json("audit")[0]["detail"] == {"weight": 1.0}


@pytest.mark.parametrize("option", ["--limit", "--before"])
@pytest.mark.parametrize("number", ["0", "-1", str(2**63)])
def test_numbers_that_no_entry_can_have_are_an_error(option: str, number: str) -> None:
    assert "Invalid value" in run("audit", option, number, code=2).stderr


@pytest.mark.parametrize("verb", [("audit",), ("key", "ls")])
def test_a_filter_by_an_unknown_tenant_is_an_error(verb: tuple[str, ...]) -> None:
    run("tenant", "create", "acme")
    run(*verb, "--tenant", "acme")
    result = run(*verb, "--tenant", "nosuch", code=1)
    assert "nosuch" in result.stderr
    assert result.stdout == ""
