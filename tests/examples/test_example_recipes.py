"""The recipes of the examples, on a real server with the demo model.

A chat that says only its model and the user's message gives the answers of the evaluation.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import transformers

from examples.tasks import ALL, Task, TextTask
from prefixd.client import Client
from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model

pytestmark = [pytest.mark.slow, pytest.mark.demo_model]

EXAMPLES = Path(__file__).parents[2] / "examples"
SYSTEM = "You are a pirate. Answer in one short sentence."


@dataclass(frozen=True)
class Served:
    """A server with all examples, in float32."""

    url: str
    key: str
    folder: Path

    def client(self) -> Client:
        return Client(self.url, api_key=self.key, timeout=300)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.key}"}
        url = f"{self.url}/v1/chat/completions"
        answer = httpx2.post(url, json=body, headers=headers, timeout=300)
        assert answer.status_code == 200, answer.text
        received: dict[str, Any] = answer.json()
        return received

    def texts(self, model: str, prompts: list[str], **fields: Any) -> list[str]:
        """The answers to single messages, asked together."""

        def ask(prompt: str) -> str:
            messages = [{"role": "user", "content": prompt}]
            answer = self.chat({"model": model, "messages": messages, **fields})
            text: str = answer["choices"][0]["message"]["content"]
            return text

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, prompts))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data = tmp_path_factory.mktemp("data")
    admin(data, "tenant", "create", "examples")
    issued = admin(data, "key", "create", "--tenant", "examples")
    assert isinstance(issued, dict)
    folder = demo_model(default_cache_dir())
    with ServerProcess(data_dir=data, port=0, model=str(folder)) as server:
        url = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        served = Served(url, str(issued["key"]), folder)
        with served.client() as client:
            for task in ALL:
                client.upload_folder(task.name, EXAMPLES / task.name)
        yield served


@pytest.fixture(scope="module")
def reference(served: Served) -> tuple[Any, Any]:
    """transformers' model and tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(served.folder)


def results(task: Task | TextTask) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        (EXAMPLES / "results" / f"{task.name}.json").read_text("utf-8")
    )
    return report


@pytest.mark.parametrize("task", ALL, ids=[task.name for task in ALL])
def test_a_chat_with_model_and_message_alone_gives_the_committed_answers(
    served: Served, task: Task | TextTask
) -> None:
    rows = results(task)["rows"]
    answers = served.texts(task.name, [row["prompt"] for row in rows])
    assert answers == [row["prefix"] for row in rows]


def test_a_text_trained_prefix_needs_its_recipe(served: Served) -> None:
    task = next(task for task in ALL if task.name == "verdict")
    report = results(task)
    trained: int = report["totals"]["prefix"]["right"]
    prompts = [row["prompt"] for row in report["rows"]]
    path = EXAMPLES / "data" / f"{task.held_out}.test.jsonl"
    held_out = [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def score(**fields: Any) -> int:
        answers = served.texts("verdict", prompts, **fields)
        scores = [task.score(row, text) for row, text in zip(held_out, answers, strict=True)]
        return sum(each["right"] for each in scores)

    assert score() >= 0.9 * trained
    with served.client() as client:
        recipe = client.show_prefix("verdict").recipe
        client.patch_metadata("verdict", {"prompt_template": None})
        assert score(max_tokens=task.max_new_tokens, temperature=0) < 0.9 * trained
        warned = served.chat(
            {"model": "verdict", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        )
        assert "has no prompt_template" in warned["warnings"][0]
        client.patch_metadata("verdict", {"prompt_template": recipe.prompt_template})


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "How do I bake bread?"}],
        [
            {"role": "system", "content": "Never say sea."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ahoy!"},
            {"role": "user", "content": "Why do cats purr?"},
        ],
    ],
)
def test_the_tokens_under_a_system_text_are_those_of_the_whole_conversation(
    served: Served, reference: tuple[Any, Any], messages: list[dict[str, str]]
) -> None:
    with served.client() as client:
        uploaded = client.upload_text("pirate", SYSTEM, role="system").prefix
    model, tokenizer = reference
    system, others = SYSTEM, messages
    if messages[0]["role"] == "system":
        system, others = f"{SYSTEM}\n\n{messages[0]['content']}", messages[1:]
    whole = [{"role": "system", "content": system}, *others]
    prompt = tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
    body = {"model": "pirate", "messages": messages, "temperature": 0, "max_tokens": 24}
    answer = served.chat(body | {"return_token_ids": True})
    head = uploaded.num_virtual_tokens
    assert head > 0.8 * len(tokenizer(SYSTEM)["input_ids"])
    assert answer["prompt_token_ids"] == prompt[head:]
    assert answer["usage"]["prompt_tokens"] == len(prompt) - head
    assert answer["choices"][0]["token_ids"] == output[0, len(prompt) :].tolist()
