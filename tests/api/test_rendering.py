"""Chat templates of tenants: rendered in another process, which no template can harm."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from prefixd.server.api.rendering import renderer as rendering
from prefixd.server.api.rendering.renderer import RenderPlaces, TemplateFailed, TemplateRenderer
from prefixd.server.errors import TooManyTemplates, Unavailable
from tests.api.api_world import World, error_of, fake_text, put_text

MESSAGES = [{"role": "user", "content": "hi"}]
GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ALLOCATES = "{{ 'a' * 1000000000 }}"
DOUBLES = (
    "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}"
)
READS = "{{ messages.__class__ }}"
WHEN_TOLD = "{% if messages[0].content == 'now' %}HERE{% endif %}" + GOOD
"""Harmless with any other message, such as the one that an upload renders."""


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def render(renderer: TemplateRenderer, template: str, **variables: Any) -> str:
    return renderer.render(
        template, {"messages": MESSAGES, **variables}, tenant="acme", max_characters=1000
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (GOOD, "<user>hi"),
        ("{% if x %}\n  a\n{% endif %}{{ x | tojson }}", '  a\n{"k": "<é>"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ messages | length }}{{ missing }}{{ missing is defined }}", "1False"),
    ],
)
def test_a_template_has_what_chat_templates_use(
    renderer: TemplateRenderer, template: str, text: str
) -> None:
    assert render(renderer, template, x={"k": "<é>"}) == text


@pytest.mark.parametrize(
    ("template", "cause", "message"),
    [
        (READS, "forbidden", "access to attribute '__class__' of a list object"),
        ("{{ ''.__class__.__mro__ }}", "forbidden", "attribute '__class__' of a str object"),
        ("{{ messages.append(1) }}", "forbidden", "attribute 'append'"),
        ("{{ '{0.__class__}'.format(messages) }}", "forbidden", "__class__"),
        (ALLOCATES, "limits", "256 MiB"),
        (DOUBLES, "limits", "256 MiB"),
        ("{{ 'a' * 1001 }}", "limits", "more than 1000 characters"),
        ("{% for x %}", "syntax", "line 1"),
        ("{{ raise_exception('no system turn') }}", "rejected", "no system turn"),
        ("{{ a.b.c }}", "failed", "UndefinedError"),
        ("{% include '/etc/passwd' %}", "failed", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "limits", "nests too deep"),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_why_and_the_next_one_renders(
    renderer: TemplateRenderer, template: str, cause: str, message: str
) -> None:
    with pytest.raises(TemplateFailed) as failed:
        render(renderer, template)
    assert failed.value.cause == cause
    assert message in str(failed.value)
    assert render(renderer, GOOD) == "<user>hi"
    assert renderer.num_started == 1


def test_a_template_that_never_ends_is_stopped_and_delays_no_other(
    renderer: TemplateRenderer,
) -> None:
    causes: list[str] = []

    def loop() -> None:
        try:
            render(renderer, LOOPS)
        except TemplateFailed as failed:
            causes.append(failed.cause)

    looping = threading.Thread(target=loop)
    looping.start()
    assert render(renderer, GOOD) == "<user>hi"
    assert causes == []  # it still runs
    looping.join()
    assert causes == ["limits"]
    assert renderer.num_started == 1


class HeldRenderer(TemplateRenderer):
    """Renders of the tenant ``held`` begin and wait for ``gate``."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.gate = threading.Semaphore(0), threading.Event()

    def _reply(self, request: bytes) -> bytes:
        if b"held" in request:
            self.began.release()
            assert self.gate.wait(30)
        return b'{"text": "rendered"}'


def test_a_tenant_renders_at_most_two_templates_at_a_time_and_leaves_the_others_room() -> None:
    renderer, refused, texts = HeldRenderer(), threading.Semaphore(0), list[str]()
    outcomes: list[str] = []
    renderer.count = outcomes.append

    def of_one_tenant() -> None:
        try:
            texts.append(renderer.render("held", {}, tenant="acme", max_characters=9))
        except TooManyTemplates:
            refused.release()

    threads = [threading.Thread(target=of_one_tenant) for _ in range(10)]
    for thread in threads:
        thread.start()
    assert all(renderer.began.acquire(timeout=30) for _ in range(2))
    assert all(refused.acquire(timeout=30) for _ in range(6))  # two more wait
    assert renderer.render("free", {}, tenant="beta", max_characters=9) == "rendered"
    assert not renderer.began.acquire(blocking=False)
    renderer.gate.set()
    for thread in threads:
        thread.join()
    assert texts == ["rendered"] * 4
    assert sorted(outcomes) == ["refused"] * 6 + ["rendered"] * 5


def test_requests_of_a_tenant_that_find_no_place_wait_for_one(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one place, and none to wait in, only those that try again are rendered."""
    digest = put(client, GOOD).json()["digest"]
    monkeypatch.setattr(rendering, "RENDERS_OF_TENANT", 1)
    monkeypatch.setattr(RenderPlaces, "_wait", refused_wait)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: chat(client, "hi"), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert texts == {fake_text(digest, "<user>hi", 4)}


def refused_wait(_places: RenderPlaces, _tenant: str) -> None:
    raise TooManyTemplates("no place")


def test_a_worker_that_died_is_started_again_and_ends_when_closed() -> None:
    renderer = TemplateRenderer()
    assert render(renderer, GOOD) == "<user>hi"
    first = renderer._process
    assert first is not None
    first.kill()
    assert render(renderer, GOOD) == "<user>hi"
    assert renderer.num_started == 2
    second = renderer._process
    assert second is not None
    assert second is not first
    renderer.close()
    assert second.returncode == 0
    with pytest.raises(Unavailable):
        render(renderer, GOOD)


def test_no_variable_of_the_server_is_in_the_worker(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXD_DATABASE_URL", "a-secret")
    other = TemplateRenderer()
    render(other, GOOD)
    assert other._process is not None
    process = Path("/proc", str(other._process.pid))
    assert b"a-secret" not in (process / "environ").read_bytes()
    assert "torch" not in (process / "maps").read_text("utf-8")
    other.close()


def renders(world: World) -> dict[str, float]:
    """The metric, by outcome."""
    metrics = world.metrics.registry
    name, outcomes = "prefixd_template_renders_total", ("rendered", "failed", "refused")
    return {each: metrics.get_sample_value(name, {"outcome": each}) or 0.0 for each in outcomes}


def put(client: TestClient, template: str) -> Any:
    body = {"kind": "text", "text": "kind", "recipe": {"prompt_template": template}}
    return client.put("/v1/prefixes/mood", json=body)


def chat(client: TestClient, content: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    body = {"model": "mood", "messages": messages, "max_tokens": 4, **fields}
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("template", [ALLOCATES, READS, "{% for %}", "{{ '' }}"])
def test_an_upload_or_change_to_a_template_that_does_not_render_is_refused(
    client: TestClient, template: str
) -> None:
    refused = put(client, template)
    assert refused.status_code == 422
    assert (error_of(refused)["code"], error_of(refused)["param"]) == (
        "malformed_template",
        "metadata.prompt_template",
    )
    assert "it failed: " in error_of(refused)["message"]
    digest = put(client, GOOD).json()["digest"]
    patch = {"recipe": {"prompt_template": template}}
    changed = client.patch("/v1/prefixes/mood/versions/1", json=patch)
    assert (changed.status_code, error_of(changed)["code"]) == (422, "malformed_template")
    answer = chat(client, "hi").json()["choices"][0]["message"]["content"]
    assert answer == fake_text(digest, "<user>hi", 4)


def test_half_of_a_surrogate_pair_becomes_a_question_mark(client: TestClient) -> None:
    """No tokenizer reads one, and JSON in a text may name one."""
    digest = put(client, "{{ '\\ud800' }}" + GOOD).json()["digest"]
    assert chat(client, "hi").json()["choices"][0]["message"]["content"] == fake_text(
        digest, "?<user>hi", 4
    )
    placed = {"model": "mood", "prompt": "hi", "apply_recipe": True, "max_tokens": 4}
    answer = client.post("/v1/completions", json=placed).json()
    assert answer["choices"][0]["text"] == fake_text(digest, "?<user>hi", 4)
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": turns})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("hostile", [LOOPS, ALLOCATES, READS])
def test_a_template_that_fails_for_a_request_is_a_400_and_the_next_request_works(
    client: TestClient, world: World, hostile: str
) -> None:
    digest = put(client, WHEN_TOLD.replace("HERE", hostile)).json()["digest"]
    before = renders(world)
    with capture_logs() as logs:
        refused = chat(client, "now")
    assert renders(world) == {**before, "failed": before["failed"] + 1}
    assert refused.status_code == 400
    error = error_of(refused)
    assert (error["code"], error["param"]) == ("chat_template", "messages")
    assert error["message"].startswith("the version's prompt_template failed: ")
    [entry] = [log for log in logs if "template" in log["event"]]
    assert entry["tenant"] == "acme"
    assert entry["cause"] in {"limits", "forbidden"}
    answer = chat(client, "hi").json()["choices"][0]["message"]["content"]
    assert answer == fake_text(digest, "<user>hi", 4)
    if hostile is READS:
        placed = {"model": "mood", "prompt": "now", "apply_recipe": True}
        assert error_of(client.post("/v1/completions", json=placed))["param"] == "prompt"
    other = put_text(client, "plain", "x", world.headers("beta"))
    beta = client.post(
        "/v1/completions", json={"model": "plain", "prompt": "a"}, headers=world.headers("beta")
    )
    assert beta.json()["prefix"]["digest"] == other["digest"]
