"""``prefixd eval``: accuracy and exact match of prefixes on the examples of a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.cli_runner import run
from tests.clients.loopback import Loopback


def write(folder: Path, *examples: object) -> str:
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, examples)) + "\n\n")
    return str(file)


def completed(text: str, **fields: Any) -> dict[str, Any]:
    return {"id": "x", "model": "m", "choices": [{"index": 0, "text": text, **fields}]}


def scored(*logprobs: float) -> dict[str, Any]:
    rest = {"num_tokens": 1, "is_greedy": False, "token_ids": [1], "token_logprobs": [-1.0]}
    choices = [{"index": i, "logprob": value, **rest} for i, value in enumerate(logprobs)]
    return {"id": "x", "model": "m", "choices": choices}


def test_exact_match_of_each_prefix_and_the_base(server: Loopback, tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prompt": "2+2=", "answer": "4"},
        {"messages": [{"role": "user", "content": "hi"}], "answer": "hello"},
    )
    message = {"index": 0, "message": {"content": "hello"}}
    base = {"object": "list", "data": [{"id": "tiny", "created": 1, "parent": None}]}
    server.reply(base)
    server.reply(completed(" 4 "))
    server.reply({**completed(""), "choices": [message]})
    server.reply(completed("5"))
    server.reply({**completed(""), "choices": [message]})
    answer = run("eval", file, "--url", server.url, "-p", "math@2", "--base", "--json")
    scores = json.loads(answer.output)
    assert [(s["model"], s["metric"], s["correct"], s["value"]) for s in scores] == [
        ("math@2", "exact_match", 2, 1.0),
        ("tiny", "exact_match", 1, 0.5),
    ]
    bodies = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    assert [body["model"] for body in bodies] == ["math@2"] * 2 + ["tiny"] * 2
    assert all(body["temperature"] == 0.0 for body in bodies)
    assert bodies[0]["apply_recipe"] is True


def test_accuracy_is_of_the_likeliest_choice(server: Loopback, tmp_path: Path) -> None:
    example = {"prompt": "2+2=", "choices": ["22", "4"], "answer": "4"}
    file = write(tmp_path, example, {**example, "answer": 1})
    server.reply(scored(-3.0, -1.5))
    server.reply(scored(-1.5, -3.0))
    answer = run("eval", file, "--url", server.url, "-p", "math")
    assert answer.output.splitlines() == [
        "MODEL  METRIC    VALUE   CORRECT  EXAMPLES",
        "math   accuracy  0.5000  1        2",
    ]
    (body, _) = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    assert server.seen[0].path == "/v1/loglikelihood"
    expected = {"model": "math", "prompt": "2+2=", "choices": ["22", "4"], "apply_recipe": True}
    assert body == expected


def test_lines_end_at_a_newline_alone(server: Loopback, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    question = "a\u2028b\u2029c\u0085d"
    example = {"prompt": question, "answer": "4"}
    file.write_bytes(json.dumps(example, ensure_ascii=False).encode() + b"\r\n")
    server.reply(completed("4"))
    run("eval", str(file), "--url", server.url, "-p", "math")
    (body,) = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    assert body["prompt"] == question


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "expected a JSON object"),
        ("[]", "an object with 'answer'"),
        ('{"prompt": "a"}', "an object with 'answer'"),
        ('{"prompt": "a", "answer": "b", "other": 1}', "an object with 'answer'"),
        ('{"answer": "b"}', "either 'prompt'"),
        ('{"prompt": "a", "messages": [], "answer": "b"}', "either 'prompt'"),
        ('{"prompt": "a", "answer": 1}', "'answer' to be a text"),
        ('{"prompt": "a", "answer": 2, "choices": ["x", "y"]}', "an index below 2"),
        ('{"messages": [], "answer": 0, "choices": ["x"]}', "'prompt' with 'choices'"),
        ("", "one example a line"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"\n{line}\n")
    answer = run("eval", str(file), "-p", "math", code=1)
    assert words in answer.stderr
    assert f"{file}:2" in answer.stderr or not line
