"""CPT configs over HTTP: PEFT writes three numbers for each token, one a line."""

from dataclasses import replace

from fastapi.testclient import TestClient

from tests.api.api_world import BASE, World, error_of
from tests.api.test_prefix_routes import files, weights
from tests.store.test_store_config_fields import cpt_config

COUNT = 8000


def test_a_cpt_config_of_200_kb_is_accepted(world: World) -> None:
    world.served = replace(world.served, base=replace(BASE, max_virtual_tokens=COUNT))
    world.body_limits = replace(world.body_limits, max_prefix_bytes=1024 * 1024)
    config = cpt_config(COUNT)
    assert len(config) > 200_000
    upload = files(config=("adapter_config.json", config), weights=("w", weights(rows=COUNT)))
    with TestClient(world.make_app(), headers=world.headers()) as client:
        answer = client.put("/v1/prefixes/long", files=upload)
    assert answer.status_code == 201, answer.text
    assert answer.json()["num_virtual_tokens"] == COUNT
    assert answer.json()["peft_type"] == "CPT"


def test_a_config_over_256_kib_is_refused_with_the_limit(client: TestClient) -> None:
    config = cpt_config(12_000)
    assert len(config) > 256 * 1024
    answer = client.put("/v1/prefixes/long", files=files(config=("adapter_config.json", config)))
    assert answer.status_code == 413
    message = error_of(answer)["message"]
    assert "at most 262144 bytes in the part 'config'; received at least " in message


def test_modules_to_save_are_refused(client: TestClient) -> None:
    config = cpt_config(3).replace(b"{", b'{"modules_to_save": ["lm_head"],', 1)
    answer = client.put("/v1/prefixes/tuned", files=files(config=("adapter_config.json", config)))
    assert answer.status_code == 422
    assert error_of(answer)["param"] == "modules_to_save"
