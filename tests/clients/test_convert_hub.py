"""Adapters of the Hugging Face Hub, from a server with its routes and headers on 127.0.0.1."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from prefixd.client.convert import hub
from prefixd.client.convert.sources import Source, read_source
from prefixd.client.errors import DownloadError, FormatError
from prefixd.client.folders import PeftContent
from tests.clients.loopback import serving

SENTIMENT = Path(__file__).parents[2] / "examples" / "sentiment"
CONFIG = (SENTIMENT / "adapter_config.json").read_bytes()
WEIGHTS = (SENTIMENT / "adapter_model.safetensors").read_bytes()


@dataclass
class Hub:
    """Repositories by name and revision; ``token`` opens ``org/private``."""

    url: str = ""
    repositories: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    status: int = 0

    def respond(self, request: Request) -> Response:
        token = request.headers.get("authorization")
        self.requests.append((request.scope["raw_path"].decode(), token))
        org, name, revision, file = request.path_params.values()
        if self.status:
            return Response(status_code=self.status)
        if error := self.error(f"{org}/{name}", revision, file, token):
            status, code = error
            return Response(status_code=status, headers={"x-error-code": code})
        if file == "adapter_config.json":
            return Response(self.repositories[f"{org}/{name}", revision][file])
        # Large files are on another host.
        other = self.url.replace("127.0.0.1", "localhost")
        return RedirectResponse(f"{other}/cdn/{org}/{name}/{revision}/{file}", 302)

    def error(
        self, repository: str, revision: str, file: str, token: str | None
    ) -> tuple[int, str] | None:
        known = {name for name, _ in self.repositories}
        if repository not in known or (repository == "org/private" and token != "Bearer hf_secret"):
            return 401, "RepoNotFound"
        if (repository, revision) not in self.repositories:
            return 404, "RevisionNotFound"
        return None if file in self.repositories[repository, revision] else (404, "EntryNotFound")

    def content(self, request: Request) -> Response:
        self.requests.append((request.url.path, request.headers.get("authorization")))
        org, name, revision, file = request.path_params.values()
        return Response(self.repositories[f"{org}/{name}", revision][file])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    routes = [
        Route("/{org}/{name}/resolve/{revision:path}/{file}", state.respond),
        Route("/cdn/{org}/{name}/{revision:path}/{file}", state.content),
    ]
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    with serving(Starlette(routes=routes)) as state.url:
        monkeypatch.setenv("HF_ENDPOINT", state.url + "/")
        yield state


def files(**weights: bytes) -> dict[str, bytes]:
    return {"adapter_config.json": CONFIG} | {
        f"adapter_model.{suffix}": data for suffix, data in weights.items()
    }


def read(source: str) -> Source:
    prefix = read_source(source)
    assert prefix is not None
    return prefix


def test_only_the_adapter_is_downloaded(served: Hub) -> None:
    served.repositories["org/name", "main"] = files(safetensors=WEIGHTS, bin=b"old")
    prefix = read("org/name")
    assert prefix.content == PeftContent(CONFIG, WEIGHTS)
    names = [url.rpartition("/")[2] for url, _ in served.requests]
    assert names == ["adapter_config.json", *["adapter_model.safetensors"] * 2]


def test_a_revision_may_be_a_branch_with_a_slash(served: Hub) -> None:
    served.repositories["org/name", "main"] = {}
    served.repositories["org/name", "v1.0"] = files(safetensors=WEIGHTS)
    assert read("org/name@v1.0").content == PeftContent(CONFIG, WEIGHTS)
    with pytest.raises(DownloadError, match="no such revision on the Hub: org/name@refs/pr/1"):
        read("org/name@refs/pr/1")
    assert served.requests[-1][0].endswith("/resolve/refs%2Fpr%2F1/adapter_config.json")


def test_a_pickled_adapter_is_converted(served: Hub, tmp_path: Path) -> None:
    torch.save({"prompt_embeddings": torch.ones(2, 3)}, tmp_path / "x")
    served.repositories["org/name", "main"] = files(bin=(tmp_path / "x").read_bytes())
    content = read("org/name").content
    assert isinstance(content, PeftContent)
    assert isinstance(content.weights, bytes)
    assert torch.equal(load(content.weights)["prompt_embeddings"], torch.ones(2, 3))


def test_messages_name_the_repository(served: Hub) -> None:
    served.repositories["org/name", "main"] = files(bin=b"\x80\x02cos\nsystem\n.")
    with pytest.raises(FormatError, match=r"^org/name/adapter_model\.bin: .* 'os.system': refused"):
        read("org/name")


def test_the_token_opens_a_private_repository_and_stays_with_the_hub(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.repositories["org/private", "main"] = files(safetensors=WEIGHTS)
    with pytest.raises(DownloadError, match=r"org/private.*\(401\).*private or gated and HF_TOKEN"):
        read("org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    served.requests.clear()
    assert read("org/private").content == PeftContent(CONFIG, WEIGHTS)
    tokens = [token for url, token in served.requests if "/cdn/" not in url]
    assert tokens == ["Bearer hf_secret"] * 2
    assert [token for url, token in served.requests if "/cdn/" in url] == [None]


def test_the_token_is_not_in_messages(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(DownloadError) as raised:
        read("org/private")
    assert "hf_other" not in str(raised.value)


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ({}, "expected adapter_config.json in org/name on the Hub, found none"),
        (
            files(),
            (
                "expected adapter_model.safetensors or adapter_model.bin in org/name on the Hub, "
                "found none"
            ),
        ),
        (
            files(safetensors=b"x" * 200),
            "org/name: expected adapter_model.safetensors of at most 100 bytes, got more",
        ),
    ],
    ids=["empty", "no-weights", "too-large"],
)
def test_a_repository_without_an_adapter(
    repository: dict[str, bytes], message: str, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "MAX_WEIGHTS_BYTES", 100)
    served.repositories["org/name", "main"] = repository
    with pytest.raises(DownloadError) as raised:
        read("org/name")
    assert str(raised.value) == message


def test_an_unknown_repository_and_a_failing_hub(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadError, match=r"there is no path org/none.*\(401\)"):
        read("org/none")
    served.status = 503
    with pytest.raises(DownloadError, match="cannot download org/none: the Hub responded 503"):
        read("org/none")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        DownloadError, match=r"no path org/none, .* cannot be downloaded from http://127\.0\.0\.1:1"
    ):
        read("org/none")


@pytest.mark.parametrize("endpoint", ["https://hub.invalid", "http://127.0.0.1.invalid", ""])
def test_offline_no_other_machine_is_asked(
    endpoint: str, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(DownloadError, match="no path org/name, and HF_HUB_OFFLINE forbids a down"):
        read("org/name")
    assert served.requests == []


def test_offline_a_server_on_this_machine_is_asked(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    served.repositories["org/name", "main"] = files(safetensors=WEIGHTS)
    assert read("org/name").content == PeftContent(CONFIG, WEIGHTS)


def test_offline_a_redirect_to_another_machine_is_not_followed(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    served.repositories["org/name", "main"] = files(safetensors=WEIGHTS)
    served.url = "https://cdn.invalid"
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE forbids a download from cdn\.invalid"):
        read("org/name")


def test_a_local_path_comes_first(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "prefix.txt").write_text("Ahoy", "utf-8")
    assert read("org/name").origin == "text"
    assert served.requests == []


@pytest.mark.parametrize(
    "source", ["name", "./org/name", "/org/name", "org/name/more", "org/../name", "org/na me", "-"]
)
def test_other_paths_that_do_not_exist_are_not_looked_up(source: str, served: Hub) -> None:
    assert read_source(source) is None
    assert served.requests == []
