"""Settings: validation, derived values, and what the socket and the scheduler take from them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from prefixd.server.serve.engine_config import scheduler_config
from prefixd.server.serve.http import address, bind
from prefixd.server.serve.settings import ENV_PREFIX, Settings
from prefixd.server.serve.settings_reference import COMPUTED_DEFAULTS, SETTING_GROUPS


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{ENV_PREFIX}{name.upper()}", raising=False)
    monkeypatch.setenv("PREFIXD_DATA_DIR", str(tmp_path / "data"))


def test_every_setting_is_in_one_group_sorted_by_name() -> None:
    names = [name for group in SETTING_GROUPS.values() for name in group]
    assert sorted(names) == sorted(Settings.model_fields)
    assert all(list(group) == sorted(group) for group in SETTING_GROUPS.values())


def test_settings_without_a_fixed_default_describe_what_they_do() -> None:
    optional = {name for name, field in Settings.model_fields.items() if field.default is None}
    assert set(COMPUTED_DEFAULTS) == optional


def test_every_setting_has_a_description() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_PORT", "1234")
    assert Settings().port == 1234
    assert Settings(port=1).port == 1


def test_the_address_of_a_kubernetes_service_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_PORT", "tcp://10.0.0.1:8000")
    assert Settings().port == 8000
    assert Settings(port=9000).port == 9000
    monkeypatch.setenv("PREFIXD_PORT", "http://10.0.0.1")
    with pytest.raises(ValidationError):
        Settings()


def test_settings_are_frozen_and_validated() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Settings(dtype="int8")


def test_the_catalog_is_in_the_data_folder_without_a_database_url(tmp_path: Path) -> None:
    assert Settings().catalog_url == f"sqlite:///{tmp_path}/data/catalog.sqlite3"
    secret = Settings(database_url="postgresql://u:pass@h/d")
    assert secret.catalog_url.endswith("u:pass@h/d")
    assert "pass" not in repr(secret)


def test_a_bound_address_is_formatted_and_free_after_closing() -> None:
    with bind("127.0.0.1", 0) as bound:
        host, port = bound.getsockname()
        assert address(host, port) == f"127.0.0.1:{port}"
    bind(host, port).close()
    assert address("::1", 8000) == "[::1]:8000"


def test_scheduler_limits_follow_the_settings() -> None:

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
