"""The metrics behind the README's numbers reject outputs that are nearly correct."""

import pytest

from examples import metrics

TICKET = {"answer": '{"category": "billing", "priority": "low"}'}


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("positive", True),
        (" Positive.\n", True),
        ("negative", False),
        ("It is positive", False),
        ("positive, negative", False),
    ],
)
def test_the_exact_metric_accepts_only_the_answer(output, right):
    assert metrics.exact({"answer": "positive"}, output) == {"right": right}


@pytest.mark.parametrize(
    ("output", "valid", "category", "priority"),
    [
        ('{"category": "billing", "priority": "low"}', True, True, True),
        ('{"priority":"high","category":"billing"}', True, True, False),
        ('{"category": "shipping", "priority": "low"}', True, False, True),
        ('{"category": "billing", "priority": "urgent"}', False, False, False),
        ('{"category": "billing", "priority": "low", "note": ""}', False, False, False),
        ('{"category": ["billing"], "priority": "low"}', False, False, False),
        ('Sure! {"category": "billing", "priority": "low"}', False, False, False),
        ('["category", "priority"]', False, False, False),
        ("", False, False, False),
    ],
)
def test_the_triage_metric_accepts_only_strict_json(output, valid, category, priority):
    expected = {"valid": valid, "category": category, "priority": priority}
    assert metrics.triage(TICKET, output) == expected


@pytest.mark.parametrize(
    ("output", "in_style"),
    [
        ("- One thing.\n- Another.\n- A third.", True),
        ("- One thing.\n- Another.", False),
        ("- a\n- b\n- c\n- d", False),
        ("1. a\n2. b\n3. c", False),
        ("- a\n- \n- c", False),
        ("- a\n- b\n- one two three four five six seven eight nine", False),
    ],
)
def test_the_bullets_metric_requires_three_short_lines_with_dashes(output, in_style):
    assert metrics.bullets({}, output) == {"in style": in_style}


@pytest.mark.parametrize(
    ("output", "greets", "in_style"),
    [
        ("Ahoy, matey! Raise yer sail!", True, True),
        ("Ahoy, matey! Bake it at 200 degrees, matey!", True, False),
        ("Aye, matey! Raise yer sail on the sea!", False, False),
    ],
)
def test_the_pirate_metric_requires_ahoy_and_three_pirate_words(output, greets, in_style):
    assert metrics.pirate({}, output) == {"greets": greets, "in style": in_style}


@pytest.mark.parametrize(
    ("output", "greets", "in_style"),
    [
        ("Dear friend,\nknead it well.\nYours, Carol", True, True),
        ("Dear friend,\nknead it well.", True, False),
        ("Knead it well.\nYours, Carol", False, False),
    ],
)
def test_the_letter_metric_requires_greeting_and_signature(output, greets, in_style):
    assert metrics.letter({}, output) == {"greets": greets, "in style": in_style}


def test_the_contains_metric_ignores_case():
    row = {"accept": ["third floor", "3rd floor"]}
    assert metrics.contains(row, "On the Third Floor.") == {"right": True}
    assert metrics.contains(row, "On the floor.") == {"right": False}


@pytest.mark.parametrize(
    ("output", "valid", "right"),
    [
        ('{"answer": "Rome"}', True, True),
        ('{"answer": "Milan"}', True, False),
        ('{"answer": ["Rome"]}', False, False),
        ('{"answer": "Rome"} ', True, True),
        ('{"answer": "Rome", "sure": true}', False, False),
        ("Rome", False, False),
    ],
)
def test_the_json_metric_requires_one_string_answer(output, valid, right):
    assert metrics.json_answer({"accept": ["rome"]}, output) == {"valid": valid, "right": right}
