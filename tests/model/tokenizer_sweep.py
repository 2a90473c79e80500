"""The table of the tokenizer sweep: ``python -m tests.model.tokenizer_sweep`` writes it."""

from pathlib import Path

from prefixd.server.model.tokenizer import Tokenizer
from tests.model.answers import Answer
from tests.model.tokenizer_kinds import Kind, expected_text, kinds

TABLE = Path(__file__).with_name("tokenizer_sweep.md")
HEAD = """# Tokenizer sweep

Each row is a tokenizer, a prompt and an output that it writes. *Text* is the answer: what
transformers decodes prompt and output to, less the prompt's text. *Alone* is what the output's
tokens decode to without the prompt, where that differs. *Stream* has a bar between the pieces,
*Offsets* are those of the log-probabilities.

| Tokenizer | Prompt | Text | Alone | Stream | Offsets |
|---|---|---|---|---|---|
"""


def output_ids(kind: Kind, prompt: list[int]) -> list[int]:
    """The tokens of the output: those that its text adds to the prompt's."""
    tokenizer = kind.tokenizer
    whole = tokenizer.encode(kind.prompt + kind.output, add_special_tokens=False)
    size = len(tokenizer.encode(kind.prompt, add_special_tokens=False))
    return list(whole[size:])


def row(name: str, kind: Kind) -> str:
    tokenizer = Tokenizer(kind.tokenizer)
    prompt = [
        token for token in tokenizer.encode(kind.prompt) if token != kind.tokenizer.eos_token_id
    ]
    output = output_ids(kind, prompt)
    answer = Answer(tokenizer, prompt, output)
    expected = expected_text(kind.tokenizer, prompt, output)
    assert answer.text == expected, f"{name}: expected {expected!r}; received {answer.text!r}"
    alone = tokenizer.decode(output)
    pieces = "|".join(event.text for event in answer.events if event.text)
    offsets = " ".join(map(str, answer.completion()["logprobs"]["text_offset"]))
    cells = [kind.prompt, answer.text, alone if alone != answer.text else "", pieces]
    shown = [f"`{ascii(cell)[1:-1]}`".replace("|", "\\|") if cell else "" for cell in cells]
    return f"| {name} | {' | '.join(shown)} | {offsets} |"


def sweep_table() -> str:
    return HEAD + "\n".join(row(name, kind) for name, kind in kinds().items()) + "\n"


if __name__ == "__main__":
    TABLE.write_text(sweep_table(), encoding="utf-8")
