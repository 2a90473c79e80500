"""Metrics: functions of a held-out row and the generated text."""

import json
import re
from collections.abc import Mapping

Row = Mapping[str, object]

CATEGORIES = ("billing", "shipping", "account", "technical")
PRIORITIES = ("low", "normal", "high")

MAX_BULLET_WORDS = 8
# fmt: off
PIRATE_WORDS = frozenset({
    "aboard", "anchor", "arr", "aye", "booty", "captain", "cannon", "crew", "deck",
    "gold", "hammock", "harbor", "island", "mast", "matey", "plank", "plunder", "pirate",
    "rum", "sail", "sails", "sailor", "sea", "seas", "ship", "shore", "tide", "treasure",
    "ye", "yer",
})
# fmt: on
MIN_PIRATE_WORDS = 3


def exact(row: Row, output: str) -> dict[str, bool]:
    """`right`: the output equals the expected answer, ignoring case and a final full stop."""
    return {"right": output.strip().rstrip(".").lower() == str(row["answer"]).lower()}


def triage(row: Row, output: str) -> dict[str, bool]:
    """`valid`: only a JSON object with exactly the two keys and allowed values."""
    expected = json.loads(str(row["answer"]))
    ticket = _json_object(output)
    category, priority = ticket.get("category"), ticket.get("priority")
    valid = (
        set(ticket) == {"category", "priority"}
        and category in CATEGORIES
        and priority in PRIORITIES
    )
    return {
        "valid": valid,
        "category": valid and category == expected["category"],
        "priority": valid and priority == expected["priority"],
    }


def bullets(_row: Row, output: str) -> dict[str, bool]:
    """`in style`: exactly three lines, each a dash and one to eight words."""
    lines = output.strip().split("\n")
    short = [
        line.startswith("- ") and 1 <= len(line[2:].split()) <= MAX_BULLET_WORDS for line in lines
    ]
    return {"in style": len(lines) == 3 and all(short)}


def pirate(_row: Row, output: str) -> dict[str, bool]:
    """`greets`: starts with "Ahoy"; `in style`: also has three different pirate words."""
    words = set(re.findall(r"[a-z]+", output.lower()))
    greets = output.lstrip().startswith("Ahoy")
    return {
        "greets": greets,
        "in style": greets and len(words & PIRATE_WORDS) >= MIN_PIRATE_WORDS,
    }


def letter(_row: Row, output: str) -> dict[str, bool]:
    """`greets`: starts with "Dear friend,"; `in style`: also ends with "Yours, Carol"."""
    text = output.strip()
    greets = text.startswith("Dear friend,")
    return {"greets": greets, "in style": greets and text.endswith("Yours, Carol")}


def contains(row: Row, output: str) -> dict[str, bool]:
    """`right`: the output contains one of the accepted strings, ignoring case."""
    return {"right": _accepted(row, output)}


def json_answer(row: Row, output: str) -> dict[str, bool]:
    """`valid`: only {"answer": <string>}; `right`: valid, with an accepted answer."""
    answer = _json_object(output)
    text = answer.get("answer")
    valid = set(answer) == {"answer"} and isinstance(text, str)
    return {"valid": valid, "right": valid and _accepted(row, str(text))}


def _accepted(row: Row, text: str) -> bool:
    accepted = row["accept"]
    assert isinstance(accepted, list)
    return any(str(entry).lower() in text.lower() for entry in accepted)


def _json_object(output: str) -> dict[str, object]:
    try:
        value = json.loads(output)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
