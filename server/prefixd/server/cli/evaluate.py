"""``prefixd eval``: how often prefixes and the base answer examples of a file right."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from prefixd.client.folders import decode_text
from prefixd.client.sync import Client
from prefixd.server.cli.options import JsonFlag, connected
from prefixd.server.cli.output import fail, print_columns, print_json

_KEYS = {"prompt", "messages", "answer", "choices"}


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a file: ``answer`` is a text, or with ``choices`` the index of one of them."""

    question: str | list[Any]
    answer: str | int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """How one model did. ``metric`` is ``accuracy`` if all examples have choices, ``exact_match``
    if none has, otherwise ``correct``."""

    model: str
    metric: str
    examples: int
    correct: int
    value: float


@connected
def evaluate(
    client: Client,
    *,
    data: Annotated[
        Path,
        typer.Argument(
            help="JSON lines with `prompt` or `messages`, and `answer`: the expected text, or with "
            "`choices` (of a prompt) the index of the right one.",
        ),
    ],
    prefixes: Annotated[
        list[str] | None,
        typer.Option("--prefix", "-p", help="NAME, NAME@3 or NAME@alias. Several: each of them."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base without a prefix too.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens of one answer.")
    ] = 32,
    as_json: JsonFlag = False,
) -> None:
    """Answer the examples of a file greedily under each prefix, and print how many are right.

    With choices the one of the highest log-likelihood counts as the answer, else the answer must
    equal the expected text, apart from whitespace around it. The recipe of a prefix is applied.
    """
    examples = _examples(data)
    models = list(prefixes or ())
    if base or not models:
        models.append(client.list_models()[0].id)
    scores = [_score(client, model, examples, max_tokens) for model in models]
    if as_json:
        print_json(scores)
        return
    rows = [[s.model, s.metric, f"{s.value:.4f}", s.correct, s.examples] for s in scores]
    print_columns(["MODEL", "METRIC", "VALUE", "CORRECT", "EXAMPLES"], rows)


def _score(client: Client, model: str, examples: Sequence[Example], max_tokens: int) -> Score:
    correct = sum(_is_right(client, model, example, max_tokens) for example in examples)
    with_choices = sum(bool(example.choices) for example in examples)
    metric = {0: "exact_match", len(examples): "accuracy"}.get(with_choices, "correct")
    return Score(model, metric, len(examples), correct, correct / len(examples))


def _is_right(client: Client, model: str, example: Example, max_tokens: int) -> bool:
    if example.choices:
        scored = client.loglikelihood(
            example.choices, model=model, prompt=str(example.question), apply_recipe=True
        )
        return scored.best == example.answer
    if isinstance(example.question, str):
        completion = client.complete(
            example.question,
            model=model,
            max_tokens=max_tokens,
            temperature=0.0,
            apply_recipe=True,
        )
    else:
        completion = client.chat(
            example.question, model=model, max_tokens=max_tokens, temperature=0.0
        )
    return completion.text.strip() == str(example.answer).strip()


def _examples(path: Path) -> list[Example]:
    """The examples of a file. Ends the verb for a line that is none."""
    examples = []
    # splitlines would also split at the U+2028 that a JSON string may have.
    lines = decode_text(path.read_bytes(), source=path).split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            examples.append(_example(line, partial(_refuse, f"{path}:{number}")))
    if not examples:
        fail(f"{path}: expected one example a line; received none")
    return examples


def _refuse(place: str, why: str) -> NoReturn:
    fail(f"{place}: {why}")


def _example(line: str, refuse: Callable[[str], NoReturn]) -> Example:
    try:
        fields = json.loads(line)
    except ValueError:
        refuse("expected a JSON object; received other text")
    if not isinstance(fields, dict) or not set(fields) <= _KEYS or "answer" not in fields:
        refuse("expected an object with 'answer', and 'prompt' or 'messages', and 'choices'")
    prompt, messages, answer = fields.get("prompt"), fields.get("messages"), fields["answer"]
    choices = fields.get("choices", [])
    if isinstance(prompt, str) == isinstance(messages, list):
        refuse("expected either 'prompt', a text, or 'messages', a list")
    if not isinstance(choices, list) or not all(isinstance(each, str) for each in choices):
        refuse("expected 'choices' to be a list of texts")
    if not choices:
        if not isinstance(answer, str):
            refuse("expected 'answer' to be a text")
        return Example(prompt if isinstance(prompt, str) else messages or [], answer)
    if not isinstance(prompt, str):
        refuse("expected 'prompt' with 'choices'")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        refuse(f"expected 'answer' to be one of the choices, or an index below {len(choices)}")
    return Example(prompt, answer, tuple(choices))
