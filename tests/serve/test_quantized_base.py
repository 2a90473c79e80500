"""A server over a quantized checkpoint: what it answers, shows, shares and refuses."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from fastapi.testclient import TestClient

from prefixd.server.cli.serve import load_server
from prefixd.server.serve.build import Server, build_server
from prefixd.server.serve.checks import model_origin
from prefixd.server.serve.settings import Settings
from tests.api.api_world import put_text
from tests.cli.cli_runner import run
from tests.model.quantized_folders import plain_folder, torchao_folder
from tests.model.tiny_folder import edit_json

PROMPT = "a prompt of more than two blocks, so that some are shared"
SCHEME = "torchao Int8WeightOnlyConfig"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_folder(tmp_path_factory.mktemp("base") / "plain")


@pytest.fixture(scope="module")
def rounded(plain: Path) -> Path:
    return torchao_folder(plain, plain.parent / "rounded", "weights")


@pytest.fixture(scope="module")
def rows(plain: Path) -> Path:
    return torchao_folder(plain, plain.parent / "rows", "rows")


def settings(folder: Path, data_dir: Path, **values: Any) -> Settings:
    fixed = {"kv_tokens": 1024, "threads": 1, "served_model_name": "base"}
    chosen = {"cpu_kernels": "module", **fixed, **values}
    return Settings(model=str(folder), data_dir=data_dir, **chosen)


Start = Callable[..., tuple[Server, TestClient]]


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Start servers over one data folder, with a key of one tenant."""
    with ExitStack() as stack:

        def started(folder: Path, **values: Any) -> tuple[Server, TestClient]:
            server = build_server(settings(folder, tmp_path, **values))
            stack.callback(server.tenants._engine.dispose)
            if not any(each.name == "acme" for each in server.tenants.list_tenants()):
                server.tenants.create_tenant("acme")
            key = server.tenants.create_key(tenant="acme").text
            client = TestClient(server.app, headers={"Authorization": f"Bearer {key}"})
            return server, stack.enter_context(client)

        yield started


def complete(client: TestClient, model: str = "dog") -> Any:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    return client.post("/v1/completions", json=body | {"ignore_eos": True})


def names(server: Server) -> set[Any]:
    return set(server.engine.core.scheduler.memory.pool._blocks)


def test_answers_are_those_of_transformers(rounded: Path, start: Start) -> None:
    server, client = start(rounded)
    model = transformers.AutoModelForCausalLM.from_pretrained(rounded)
    tokenizer = transformers.AutoTokenizer.from_pretrained(rounded)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        own = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
    answer = complete(client, "base")
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == tokenizer.decode(own[0, ids.shape[1] :])
    shown = client.get("/health/ready").json()["decoder"]
    assert shown["weights"] == SCHEME
    assert shown["kernels"] == "module"
    labels = {name: str(value) for name, value in shown.items()}
    empty = dict.fromkeys(("perplexity_ratio", "top1_agreement", "tensor_parallel"), "")
    registry = server.metrics.registry
    assert registry.get_sample_value("prefixd_decoder_info", labels | empty) == 1


def test_a_quantized_copy_takes_its_originals_prefixes_and_never_its_kv(
    plain: Path, rounded: Path, rows: Path, start: Start
) -> None:
    servers = [start(plain)]
    manifest = put_text(servers[0][1], "dog", "You are a dog.", {})
    for folder in (rounded, rows):
        servers.append(start(folder, fingerprint_of=str(plain)))
        shown = servers[-1][1].get("/v1/prefixes/dog").json()
        assert shown["fingerprint"] == manifest["fingerprint"]
    answers = []
    for server, client in servers:
        for _ in range(2):  # the second time, KV is reused
            answer = complete(client)
            assert answer.status_code == 200, answer.text
        answers.append(answer.json()["choices"][0]["logprobs"]["token_logprobs"])
        assert server.engine.stats().kv_reused_tokens > 0
    assert answers[0] != answers[1] != answers[2] != answers[0]
    pools = [names(server) for server, _ in servers]
    assert all(pools)
    assert not pools[0] & pools[1] | pools[1] & pools[2] | pools[0] & pools[2]


def test_prefixes_of_the_original_are_refused_without_its_name(
    plain: Path, rounded: Path, start: Start
) -> None:
    put_text(start(plain)[1], "dog", "You are a dog.", {})
    answer = complete(start(rounded)[1])
    assert answer.status_code in {404, 409}
    assert "fingerprint" in answer.json()["error"]["message"]


def test_doctor_names_the_scheme_and_the_original(
    plain: Path, rounded: Path, tmp_path: Path
) -> None:
    text = model_origin(settings(rounded, tmp_path, fingerprint_of=str(plain)))
    assert text.endswith(f"can be served, quantized with {SCHEME}, for prefixes of {plain}")
    assert "quantized" not in model_origin(settings(plain, tmp_path))
    looked_up = settings(Path("org/name"), tmp_path, fingerprint_of=str(plain))
    assert model_origin(looked_up).endswith(f"Hugging Face, and compared with {plain} at start")


@pytest.mark.parametrize(
    "case",
    [
        ({"quantize": "int8", "cpu_kernels": "auto"}, "quantize is int8, which rounds plain"),
        ({"tensor_parallel": 2}, "tensor_parallel is 2: only plain weights can be divided"),
    ],
)
def test_a_start_that_cannot_be_ends_with_the_reason(
    case: tuple[dict[str, Any], str],
    plain: Path,
    rounded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values, reason = case
    with pytest.raises(typer.Exit):
        load_server(settings(rounded, tmp_path, **values))
    assert reason in capsys.readouterr().err


QUANTIZED = f"names rounded: expected the model that .*; received one .* quantized with {SCHEME}"


@pytest.mark.parametrize(
    "case",
    [
        ("rounded", "other", "names other, whose rms_norm_eps is 0.5; rounded has 1e-06"),
        ("rounded", "rounded", QUANTIZED),
        ("plain", "rounded", QUANTIZED),
        ("plain", "plain", "original of plain, which is not quantized; expected a quantized"),
    ],
)
def test_doctor_and_start_refuse_an_original_in_the_same_words(
    case: tuple[str, str, str],
    plain: Path,
    rounded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, original, reason = case
    folders = {"plain": plain, "rounded": rounded, "other": tmp_path / "other"}
    shutil.copytree(plain, folders["other"])
    edit_json(folders["other"] / "config.json", rms_norm_eps=0.5)
    words = ["--model", str(folders[model]), "--fingerprint-of", str(folders[original])]
    words += ["--data-dir", str(tmp_path), "--device", "cpu", "--json"]
    results = json.loads(run("doctor", *words, code=1).stdout)
    assert [name for name, result in results.items() if not result["ok"]] == ["model"]
    refusal = results["model"]["detail"]
    assert re.search(f"fingerprint_of .*{reason}", refusal), refusal
    for ranks in (1, 2):
        values = {"fingerprint_of": str(folders[original]), "tensor_parallel": ranks}
        with pytest.raises(typer.Exit):
            load_server(settings(folders[model], tmp_path, **values))
        assert capsys.readouterr().err.splitlines()[-1] == f"prefixd: {refusal}"
