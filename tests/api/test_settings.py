"""Settings and the command line over them."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from prefixd.server.cli.main import app
from prefixd.server.serve.listening import address, bind
from prefixd.server.serve.settings import ENV_PREFIX, Settings
from prefixd.server.tenants import keys
from prefixd.server.tenants.registry import Tenants
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)
    monkeypatch.setenv("PREFIXD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_every_field_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_the_environment_and_what_wins_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_PORT", "1234")
    assert Settings().port == 1234
    assert Settings(port=1).port == 1


def test_settings_are_frozen_and_judged() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Settings(dtype="int8")


def test_the_catalog_is_in_the_data_folder_unless_told(tmp_path: Path) -> None:
    assert Settings().catalog_url == f"sqlite:///{tmp_path}/data/catalog.sqlite3"
    secret = Settings(database_url="postgresql://u:pass@h/d")
    assert secret.catalog_url.endswith("u:pass@h/d")
    assert "pass" not in repr(secret)


def test_serve_explains_each_flag_with_its_variable() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"PREFIXD_{name.upper()}" in text


def test_a_bad_flag_is_named() -> None:
    result = run("serve", "--port", "x", code=1)
    assert "--port (PREFIXD_PORT)" in result.stderr
    assert "integer" in result.stderr


def test_help_is_quick_because_it_imports_little() -> None:
    code = (
        "import sys; from prefixd.server.cli.main import app; "
        "heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy', 'uvicorn'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_sleeping_openmp_threads_are_asked_for() -> None:
    code = "import os, prefixd.server.cli.main; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.strip() == "passive"


def test_tenants_and_keys() -> None:
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


def test_a_key_for_people(tmp_path: Path) -> None:
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


def test_what_a_tenant_wrote_does_not_steer_the_operators_terminal() -> None:
    run("tenant", "create", "acme")
    run("key", "create", "--tenant", "acme", "--label", "ci\x9b2J")
    for verb in (("key", "ls"), ("audit",)):
        shown = run(*verb).stdout
        assert "ci" in shown
        assert "\x9b" not in shown


def test_refusals_of_the_key_command() -> None:
    assert "no tenant" in run("key", "create", "--tenant", "nobody", code=1).stderr
    run("tenant", "create", "acme")
    result = run("key", "create", "--tenant", "acme", "--scope", "root", code=1)
    assert "read, generate, write, admin" in result.stderr
    assert "no key" in run("key", "revoke", "nothing", code=1).stderr


def test_doctor(tmp_path: Path) -> None:
    found = run_json("doctor", "--model", str(tmp_path), "--device", "cpu")
    assert set(found) == {"data", "catalog", "torch", "device", "model"}
    assert all(result["ok"] for result in found.values())
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run("doctor", "--data-dir", str(blocked / "x"), "--device", "cpu", code=1)
    assert "FAIL data" in result.stdout


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "../nowhere/model", "a/b/c"])
def test_a_model_folder_that_is_not_there_is_called_that(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefixd.server.cli.main import _load

    sentence = f"the model folder {model} does not exist"
    found = json.loads(run("doctor", "--model", model, "--device", "cpu", "--json", code=1).stdout)
    assert found["model"] == {"ok": False, "detail": sentence}
    with pytest.raises(typer.Exit):
        _load(Settings(model=model, device="cpu"))
    assert capsys.readouterr().err == f"prefixd: {sentence}\n"


def test_a_name_that_is_no_folder_is_one_on_hugging_face() -> None:
    found = run_json("doctor", "--model", "org/model", "--device", "cpu")
    assert found["model"]["detail"] == "org/model would be looked up on Hugging Face"


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["serve", "--port", port, "--model", "/nowhere", "--data-dir", str(tmp_path)]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "prefixd.server", *words],
            check=False,
            timeout=60,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == f"prefixd: cannot listen on 127.0.0.1:{port}: address already in use\n"


def test_an_address_can_be_told_and_is_free_again() -> None:
    with bind("127.0.0.1", 0) as bound:
        host, port = bound.getsockname()
        assert address(host, port) == f"127.0.0.1:{port}"
    bind(host, port).close()
    assert address("::1", 8000) == "[::1]:8000"


NO_DATABASE = "postgresql://postgres@127.0.0.1:1/none"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (("--database-url", NO_DATABASE), "the database cannot be used: "),
        (("--database-url", "no url"), "the database cannot be used: "),
        (("--database-url", "mysql://host/name"), "sqlite or postgresql"),
        (("--data-dir", "/dev/null/x"), "/dev/null"),
    ],
)
def test_a_catalog_that_cannot_be_opened_is_a_sentence(
    place: tuple[str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefixd.server.cli.main import _load

    for verb in (("tenant", "ls"), ("key", "ls"), ("audit",), ("gc",), ("migrate",)):
        said = run(*verb, *place, code=1).stderr
        assert said.startswith("prefixd: ")
        assert reason in said
        assert said.count("\n") == 1
    result = run_failing_doctor(*place)
    assert reason.removeprefix("the database cannot be used: ") in result["detail"]
    assert len(result["detail"]) > len("1")
    field = place[0].removeprefix("--").replace("-", "_")
    fields: dict[str, Any] = {field: place[1]}
    with pytest.raises(typer.Exit):
        _load(Settings(**fields))
    assert reason in capsys.readouterr().err


def run_failing_doctor(*arguments: str) -> Any:
    found = json.loads(run("doctor", *arguments, "--device", "cpu", "--json", code=1).stdout)
    assert not found["catalog"]["ok"]
    return found["catalog"]


def test_a_lifetime_that_no_calendar_has_is_refused() -> None:
    run("tenant", "create", "acme")
    made = run_json("key", "create", "--tenant", "acme")
    days = run("key", "create", "--tenant", "acme", "--expires-in-days", "1e9", code=2)
    assert "Invalid value for '--expires-in-days'" in days.stderr
    hours = run("key", "rotate", made["key_id"], "--overlap-hours", "1e12", code=2)
    assert "Invalid value for '--overlap-hours'" in hours.stderr


def test_quotas_rotation_and_the_log() -> None:
    run("tenant", "create", "acme")
    shown = run_json("tenant", "quota", "acme", "max_prefixes=5", "tokens-per-minute=1000")
    assert (shown["max_prefixes"], shown["tokens_per_minute"]) == (5, 1000)
    assert run_json("tenant", "quota", "acme", "max_prefixes=none")["max_prefixes"] is None
    assert "tokens_per_minute        1000" in run("tenant", "quota", "acme").stdout
    assert "tokens_per_minute=1000" in run("tenant", "ls").stdout
    for bad in ("max_prefixes=-1", "max_prefixes", "else=1", "requests_per_minute=0"):
        run("tenant", "quota", "acme", bad, code=1)
    assert "no tenant" in run("tenant", "quota", "nobody", "max_bytes=1", code=1).stderr
    old = run_json("key", "create", "--tenant", "acme")
    new = run_json("key", "rotate", old["key_id"], "--overlap-hours", "2")
    assert keys.parse(new["key"]) is not None
    assert "replaced" in run("key", "ls").stdout
    assert "replaced" in run("key", "rotate", old["key_id"], code=1).stderr
    log = run_json("audit", "--tenant", "acme", "--limit", "2")
    assert [one["action"] for one in log] == ["key.rotate", "key.create"]
    assert "key.rotate" in run("audit").stdout
    assert new["key"] not in run("audit", "--json").stdout


def test_weights_and_reuse() -> None:
    made = run_json("tenant", "create", "acme", "--weight", "2.5", "--no-kv-reuse")
    assert (made["weight"], made["kv_reuse"]) == (2.5, False)
    assert "weight=2.5 kv_reuse=off" in run("tenant", "ls").stdout
    assert run("tenant", "set", "acme").stdout.split() == ["weight", "2.5", "kv_reuse", "off"]
    changed = run_json("tenant", "set", "acme", "--kv-reuse")
    assert (changed["weight"], changed["kv_reuse"]) == (2.5, True)
    assert run("tenant", "set", "acme", "--weight", "1").stdout.split()[1] == "1"
    assert "weight" not in run("tenant", "ls").stdout
    assert "from 0.01 to 100" in run("tenant", "set", "acme", "--weight", "0", code=1).stderr
    assert "no tenant" in run("tenant", "set", "nobody", "--weight", "2", code=1).stderr
    assert run_json("audit")[0]["detail"] == {"weight": 1.0}


def test_the_first_key_goes_to_the_terminal_and_not_to_the_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    import structlog

    from prefixd.server.cli.main import _show_first_key

    database = open_database(Settings().catalog_url)
    upgrade(database)
    tenants = Tenants(database)
    with structlog.testing.capture_logs() as lines:
        _show_first_key(tenants)
        printed = capfd.readouterr()
        _show_first_key(tenants)
    (text,) = re.findall(r"pfx_\w+", printed.err)
    assert tenants.authenticate(text).is_operator
    assert printed.out == ""
    assert capfd.readouterr().err == ""
    assert lines == []
    database.dispose()


def test_the_queue_and_the_pool_are_bounded_as_told() -> None:
    from prefixd.server.serve.build import scheduler_config

    config = scheduler_config(Settings(kv_tokens=1000))
    assert config.num_usable_blocks == 63
    assert (config.max_waiting_tokens, config.max_queue_wait_s) == (8000, 60.0)
    assert (config.max_resident_tokens, config.host_tokens) == (None, 0)
    told = scheduler_config(
        Settings(
            max_waiting_tokens=7,
            max_queue_wait=0,
            max_resident_tokens=320,
            host_kv_tokens=640,
            max_prefix_wait=0.25,
        )
    )
    assert (told.max_waiting_tokens, told.max_queue_wait_s) == (7, None)
    assert (told.max_resident_tokens, told.host_tokens) == (320, 640)
    assert told.max_prefix_wait_s == 0.25


def options(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
    for name, verb in getattr(command, "commands", {}).items():
        yield from options(verb, *path, name)
    if not hasattr(command, "commands"):
        for one in command.params:
            if one.param_type_name == "option" and one.name != "help":
                yield " ".join((*path, one.opts[0])), one.envvar


def test_every_flag_has_a_variable() -> None:
    found = dict(options(typer.main.get_command(app)))
    assert len(found) > 100
    assert [flag for flag, variable in found.items() if not variable] == []


def test_a_switch_is_true_or_false() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    assert "--kv-reuse true|false" in text
    assert "--kv-reuse (PREFIXD_KV_REUSE)" in run("serve", "--kv-reuse", "maybe", code=1).stderr
