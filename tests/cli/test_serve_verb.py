"""``prefixd serve`` and ``prefixd doctor``: flags, help, and errors before the model is loaded."""

import gc
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import typer

from prefixd.server.cli.serve import _run, load_server, show_first_key
from prefixd.server.serve.settings import Settings
from prefixd.server.serve.settings_reference import SETTING_GROUPS, settings_by_group
from prefixd.server.tenants.registry import Tenants
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from tests.cli.cli_runner import run, run_json
from tests.model.tiny_folder import edit_tensors, save_folder, tiny_llama

PANEL = re.compile(r"^╭─ (.+?) ─+╮$(.*?)^╰", re.MULTILINE | re.DOTALL)


def test_serve_help_is_grouped_by_theme_and_sorted() -> None:
    panels = dict(PANEL.findall(run("serve", "--help").stdout))
    assert list(panels) == ["Options", *SETTING_GROUPS]
    for group, settings in settings_by_group().items():
        flags = re.findall(r"^│ +(--[a-z-]+)", panels[group], re.MULTILINE)
        assert flags == [setting.flag for setting in settings]


def test_serve_help_shows_the_default_of_each_setting() -> None:
    text = re.sub(r"[│\s]+", " ", run("serve", "--help").stdout)
    for settings in settings_by_group().values():
        for setting in settings:
            start = text.index(f" {setting.flag} ")
            entry = text[start : text.index("]", text.index("[default: ", start))]
            default = f"({setting.default})" if setting.is_computed else setting.default
            assert entry.endswith(f"[default: {default}"), setting.flag


def test_serve_help_lists_each_flag_with_its_variable() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"PREFIXD_{name.upper()}" in text


def test_an_invalid_value_names_the_flag_and_the_variable() -> None:
    result = run("serve", "--port", "x", code=1)
    assert "--port (PREFIXD_PORT)" in result.stderr
    assert "integer" in result.stderr


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--trusted-proxies", "10.0.0.0/99", "addresses or networks like 10.0.0.0/8"),
        ("--default-quota", "max_users=x", "LIMIT=NUMBER or LIMIT=none"),
        ("--max-connections", "0", "greater than or equal to 1; received '0'"),
        ("--write-timeout", "abc", "a valid number; received 'abc'"),
        ("--device", "tpu", "'auto', 'cpu' or 'cuda'; received 'tpu'"),
    ],
)
def test_an_invalid_value_is_one_sentence(flag: str, value: str, sentence: str) -> None:
    message = run("serve", flag, value, code=1).stderr
    assert f"): expected {sentence}" in message
    assert value in message


def test_a_boolean_setting_takes_true_or_false() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    assert "--kv-reuse true|false" in text
    assert "--kv-reuse (PREFIXD_KV_REUSE)" in run("serve", "--kv-reuse", "maybe", code=1).stderr


def test_doctor_reports_each_check(tmp_path: Path) -> None:
    model = str(save_folder(tiny_llama(), tmp_path / "model"))
    results = run_json("doctor", "--model", model, "--device", "cpu")
    assert set(results) == {"data", "catalog", "torch", "device", "kernels", "int8", "model"}
    assert all(result["ok"] for result in results.values())
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run("doctor", "--data-dir", str(blocked / "x"), "--device", "cpu", code=1)
    assert "FAIL data" in result.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--cpu-kernels", "torch"), "quantize is int8 and cpu_kernels is torch; expected auto or"),
        (("--dtype", "float16"), "native kernels alone compute, but the dtype is torch.float16"),
    ],
)
def test_doctor_and_start_name_why_int8_cannot_run(
    words: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_folder(tiny_llama(), tmp_path / "model"))
    common = ("--model", model, "--device", "cpu", *words)
    results = json.loads(run("doctor", *common, "--quantize", "int8", "--json", code=1).stdout)
    failed = [name for name, result in results.items() if not result["ok"]]
    assert failed == ["int8"]
    assert reason in results["int8"]["detail"]
    off = run_json("doctor", *common)["int8"]["detail"]
    assert off == f"off; with it, a start would fail: {results['int8']['detail']}"
    values: dict[str, Any] = {words[0].removeprefix("--").replace("-", "_"): words[1]}
    with pytest.raises(typer.Exit):
        load_server(Settings(model=model, device="cpu", quantize="int8", **values))
    assert capsys.readouterr().err.splitlines()[-1] == f"prefixd: {results['int8']['detail']}"


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "../nowhere/model", "a/b/c"])
def test_a_missing_model_folder_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:

    sentence = f"the model folder {model} does not exist"
    results = json.loads(
        run("doctor", "--model", model, "--device", "cpu", "--json", code=1).stdout
    )
    assert results["model"] == {"ok": False, "detail": sentence}
    with pytest.raises(typer.Exit):
        load_server(Settings(model=model, device="cpu"))
    assert capsys.readouterr().err == f"prefixd: {sentence}\n"


def test_a_model_that_cannot_be_served_ends_the_start_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_folder(tiny_llama(), tmp_path / "model")
    edit_tensors(folder, lambda held: held.pop("lm_head.weight"))
    with pytest.raises(typer.Exit) as ended:
        load_server(Settings(model=str(folder), device="cpu"))
    assert ended.value.exit_code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"prefixd: {folder} lacks weights of LlamaForCausalLM")
    assert message.endswith("lm_head.weight")

    (folder / "tokenizer.json").unlink()
    result = run("doctor", "--model", str(folder), "--device", "cpu", code=1)
    assert f"FAIL model    {folder} holds no tokenizer" in result.stdout


def test_a_name_that_is_not_a_folder_is_looked_up_on_hugging_face() -> None:
    results = run_json("doctor", "--model", "org/model", "--device", "cpu")
    assert results["model"]["detail"] == "org/model would be looked up on Hugging Face"


def test_an_address_in_use_is_reported_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["serve", "--port", port, "--model", "/nowhere", "--data-dir", str(tmp_path)]
        process = subprocess.run(
            [sys.executable, "-P", "-m", "prefixd.server", *words],
            check=False,
            timeout=60,
            capture_output=True,
            text=True,
        )
    assert process.returncode == 1
    assert process.stderr == f"prefixd: cannot listen on 127.0.0.1:{port}: address already in use\n"


def test_the_first_key_is_printed_and_not_logged(
    capfd: pytest.CaptureFixture[str],
) -> None:
    import structlog

    database = open_database(Settings().catalog_url)
    upgrade(database)
    tenants = Tenants(database)
    with structlog.testing.capture_logs() as lines:
        show_first_key(tenants)
        printed = capfd.readouterr()
        show_first_key(tenants)
    (text,) = re.findall(r"pfx_\w+", printed.err)
    assert tenants.authenticate(text).is_operator
    assert printed.out == ""
    assert capfd.readouterr().err == ""
    assert lines == []
    database.dispose()


def test_serve_names_the_missing_packages_of_the_demo_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: Settings) -> object:
        raise ImportError("please install gguf")

    def without_gguf(name: str) -> object:
        return None if name == "gguf" else object()

    monkeypatch.setattr("prefixd.server.serve.build.build_server", failing)
    monkeypatch.setattr("prefixd.server.cli.serve.find_spec", without_gguf)
    monkeypatch.setattr("prefixd.server.cli.options.find_spec", without_gguf)
    with pytest.raises(typer.Exit) as ended:
        load_server(Settings(model="demo"))
    assert ended.value.exit_code == 1
    assert "the demo model needs gguf: pip install 'prefixd[demo]'" in capsys.readouterr().err


def test_imports_of_the_server_are_not_searched_for_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enabled: list[bool] = []

    class Build(ModuleType):
        MODEL_ERRORS = (RuntimeError,)

        @property
        def build_server(self) -> Any:
            enabled.append(gc.isenabled())  # the import of the name
            return lambda _: enabled.append(gc.isenabled())

    monkeypatch.setitem(sys.modules, "prefixd.server.serve.build", Build("build"))
    load_server(Settings(model="tiny"))
    assert enabled == [False, True]


def test_full_collections_skip_what_was_loaded_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []

    class Recorder:
        failure = None

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def fail(self, reason: str) -> None:
            raise AssertionError(reason)

        def run(self, **_: object) -> None:
            frozen.append(gc.get_freeze_count())

    monkeypatch.setattr("prefixd.server.serve.shutdown.DrainingServer", Recorder)
    monkeypatch.setattr("prefixd.server.serve.http.uvicorn_config", Recorder)
    monkeypatch.setattr(
        "prefixd.server.serve.connection_limits.raise_descriptor_limit", lambda: 1024
    )
    loaded = [[number] for number in range(1000)]  # pytest's modules are frozen already
    before = gc.get_freeze_count()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            assert not _run(MagicMock(), Settings(), listener)
        finally:
            gc.unfreeze()
    assert frozen[0] >= before + len(loaded)
