"""The table of example prefixes: kind, training settings, metric."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples import metrics

Score = Callable[[Mapping[str, object], str], dict[str, bool]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One prefix, trained on `data/<rows>.train.jsonl`, scored on `data/<held_out>.test.jsonl`."""

    name: str
    peft_type: str
    num_virtual_tokens: int
    init_text: str = ""  # initializes the virtual tokens; P-tuning starts from its random encoder
    instruction: str  # the comparison: the same task written as a system message
    score: Score
    rows: str = ""  # default: the name
    held_out: str = ""  # default: the name
    template: str = ""  # a text with {prompt}, in place of the chat template
    max_new_tokens: int
    steps: int
    learning_rate: float = 1e-2
    batch_size: int = 8
    dtype: str = "float32"  # of the saved file; evaluation is float32
    trained_in: str = "bfloat16"  # the base during training; the virtual tokens are float32
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """A hard prompt: `<name>/prefix.txt`, used unchanged and not trained."""

    name: str
    instruction: str
    score: Score
    max_new_tokens: int
    held_out: str = ""


HANDBOOK = (
    "Acme handbook. The office opens at 7:30 in the morning. The wifi password is blue-heron-42. "
    "Expenses go to Priya in finance. You have 27 days of holiday per year. The printer is on the "
    "third floor, beside the kitchen. Lunch is free on Wednesdays. The office dog is called "
    "Biscuit. The emergency number is 5511."
)

TRAINED = (
    Task(
        name="sentiment",
        peft_type="PROMPT_TUNING",
        num_virtual_tokens=12,
        init_text=(
            "Classify the sentiment of the text in one word: positive, negative or neutral."
        ),
        instruction=(
            "Classify the sentiment of the user's text. "
            "Answer with one word: positive, negative or neutral."
        ),
        score=metrics.exact,
        max_new_tokens=8,
        steps=60,
    ),
    Task(
        name="verdict",
        peft_type="PROMPT_TUNING",
        num_virtual_tokens=12,
        init_text="The sentiment of each text is positive, negative or neutral.",
        instruction=(
            "Classify the sentiment of the user's text. "
            "Answer with one word: positive, negative or neutral."
        ),
        score=metrics.exact,
        rows="sentiment",
        held_out="sentiment",
        template="Text: {prompt} Label:",
        max_new_tokens=8,
        steps=40,
        trained_in="float32",
    ),
    Task(
        name="emoji",
        peft_type="PROMPT_TUNING",
        num_virtual_tokens=10,
        init_text="Answer with one emoji that shows how the writer feels: 🎉 😢 😡 😱 😴 😋",
        instruction="Answer with exactly one emoji out of these: 🎉 😢 😡 😱 😴 😋",
        score=metrics.exact,
        max_new_tokens=8,
        steps=100,
    ),
    Task(
        name="language",
        peft_type="P_TUNING",
        num_virtual_tokens=8,
        instruction=(
            "Which language is the user's text written in? "
            "Answer with one word: English, French, German, Spanish or Italian."
        ),
        score=metrics.exact,
        max_new_tokens=8,
        steps=40,
        learning_rate=3e-3,
    ),
    Task(
        name="triage",
        peft_type="PREFIX_TUNING",
        num_virtual_tokens=12,
        init_text=(
            "You sort support tickets. Answer in JSON with a category (billing, shipping, account "
            "or technical) and a priority (low, normal or high)."
        ),
        instruction=(
            "You sort support tickets. Answer only with JSON like "
            '{"category": "billing", "priority": "low"}. The category is billing, shipping, '
            "account or technical. The priority is low, normal or high."
        ),
        score=metrics.triage,
        max_new_tokens=28,
        steps=60,
        dtype="float16",
    ),
    Task(
        name="alice",
        peft_type="P_TUNING",
        num_virtual_tokens=16,
        instruction=(
            "Answer with exactly three short bullet points. Start each line with a dash. "
            "Use at most eight words per line. Write nothing else."
        ),
        score=metrics.bullets,
        held_out="questions",
        max_new_tokens=64,
        steps=50,
        learning_rate=3e-3,
    ),
    Task(
        name="bob",
        peft_type="PREFIX_TUNING",
        num_virtual_tokens=12,
        init_text=(
            "Answer like a cheerful pirate. Start with Ahoy, matey! and speak of the sea, "
            "the ship, the crew and treasure."
        ),
        instruction=(
            "Answer like a cheerful pirate, in one or two sentences. "
            "Start with Ahoy, matey! and use pirate words."
        ),
        score=metrics.pirate,
        held_out="questions",
        max_new_tokens=64,
        steps=60,
        dtype="float16",
    ),
    Task(
        name="handbook",
        peft_type="CARTRIDGE",
        num_virtual_tokens=32,
        init_text=HANDBOOK,
        instruction=HANDBOOK,
        score=metrics.contains,
        max_new_tokens=32,
        steps=70,
        dtype="bfloat16",
    ),
)

TEXT = (
    TextTask(
        name="json-answers",
        instruction=(
            'Answer only with JSON like {"answer": "Paris"}. Keep the answer to one or two words.'
        ),
        score=metrics.json_answer,
        max_new_tokens=32,
    ),
    TextTask(
        name="carol",
        instruction=(
            'Answer as a short, warm letter. Begin with "Dear friend," and end with "Yours, Carol".'
        ),
        score=metrics.letter,
        held_out="questions",
        max_new_tokens=80,
    ),
)

ALL = (*TRAINED, *TEXT)
