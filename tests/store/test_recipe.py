"""Recipes: what is one, what is refused, and which changes are counted."""

from typing import Any

import pytest

from prefixd.store.artifact.metadata import MAX_METADATA_BYTES, encode_metadata
from prefixd.store.artifact.recipe import Example, Input, Recipe
from prefixd.store.artifact.template import MAX_TEMPLATE_BYTES, TemplateKind
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home

JINJA = "{% for message in messages %}{{ message.content }}{% endfor %}"
FULL = {
    "prompt_template": "Text: {prompt} Label:",
    "input": "text",
    "temperature": 0,
    "top_p": 0.5,
    "max_tokens": 8,
    "stop": ["\n", "END"],
    "examples": [{"prompt": "a", "answer": "b"}],
}


def test_a_recipe_is_read_from_metadata_with_its_template_in_either_place(home: Home) -> None:
    recipe = Recipe(
        "Text: {prompt} Label:", Input.TEXT, 0.0, 0.5, 8, ("\n", "END"), (Example("a", "b"),)
    )
    inner = {name: value for name, value in FULL.items() if name != "prompt_template"}
    outer = {"prompt_template": FULL["prompt_template"], "recipe": inner}
    for name, metadata in (("a", {"recipe": FULL}), ("b", outer), ("c", outer | {"recipe": FULL})):
        manifest = home.put(name, metadata={**metadata, "owner": "ann"}).manifest
        assert (manifest.recipe, manifest.recipe_revision) == (recipe, 1)
        assert manifest.prompt_template == "Text: {prompt} Label:"
        assert manifest.metadata == {"owner": "ann"}


@pytest.mark.parametrize(
    ("recipe", "kind", "takes"),
    [
        (Recipe(), None, Input.CHAT),
        (Recipe("A {prompt}"), TemplateKind.PLAIN, Input.TEXT),
        (Recipe("A {prompt}", Input.CHAT), TemplateKind.PLAIN, Input.CHAT),
        (Recipe('{{"q": {prompt}}}'), TemplateKind.PLAIN, Input.TEXT),
        (Recipe("{{prompt} is {prompt}"), TemplateKind.PLAIN, Input.TEXT),
        (Recipe("{prefix:0:1}{prompt}"), TemplateKind.PLACED, Input.CHAT),
        (Recipe(JINJA), TemplateKind.JINJA, Input.CHAT),
        (Recipe("{{ messages[0].content }}"), TemplateKind.JINJA, Input.CHAT),
        (Recipe("no place"), None, Input.CHAT),  # as earlier servers stored it
        (Recipe("{prefix:x}"), None, Input.CHAT),
        (Recipe(input=Input.TEXT), None, Input.TEXT),
    ],
)
def test_a_template_says_what_it_is_and_takes(
    recipe: Recipe, kind: TemplateKind | None, takes: Input
) -> None:
    assert (recipe.template_kind, recipe.takes) == (kind, takes)


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ([], None, "an object; got an array"),
        ({"top_k": 1}, None, "the fields prompt_template, input, temperature"),
        ({"input": "texts"}, "input", "chat or text; got 'texts'"),
        ({"temperature": 2.5}, "temperature", "a number from 0 to 2; got 2.5"),
        ({"temperature": True}, "temperature", "got true"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1; got 0"),
        ({"top_p": "1"}, "top_p", "got '1'"),
        ({"max_tokens": 0}, "max_tokens", "a whole number from 1; got 0"),
        ({"max_tokens": 2.0}, "max_tokens", "got 2.0"),
        ({"stop": [""]}, "stop", "up to 16 texts"),
        ({"stop": ["x"] * 17}, "stop", "up to 16 texts"),
        ({"stop": {"a": 1}}, "stop", "got an object"),
        ({"examples": [{"prompt": "a"}]}, "examples", "another item 0"),
        ({"examples": [{"prompt": "a", "answer": 1}]}, "examples", "another item 0"),
        ({"examples": "a"}, "examples", "a list of at most 16"),
        ({"prompt_template": "{prompt} b"}, "prompt_template", "one in metadata and another"),
    ],
)
def test_a_field_outside_its_range_is_refused_by_name(
    fields: Any, field: str | None, expected: str
) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        encode_metadata({"prompt_template": "{prompt} a", "recipe": fields}, base=BASE)
    place = "metadata.recipe" if field is None else f"metadata.recipe.{field}"
    assert (refused.value.code, refused.value.param) == ("malformed_recipe", place)
    assert expected in refused.value.message


@pytest.mark.parametrize(
    ("template", "received"),
    [
        ("", "{prompt} 0 times, and no Jinja"),
        ("{{prompt}} Label:", "{prompt} 0 times, and no Jinja"),
        ("{question} Label:", "{prompt} 0 times, and no Jinja"),
        ("{prompt} {prompt}", "{prompt} 2 times, and no Jinja"),
        ("{prompt}" + "é" * (MAX_TEMPLATE_BYTES // 2), str(MAX_TEMPLATE_BYTES + 8)),
    ],
)
def test_a_new_template_that_cannot_be_applied_is_refused(
    home: Home, template: str, received: str
) -> None:
    home.put(metadata={"prompt_template": JINJA})
    with pytest.raises(ArtifactRefused, match=received) as upload:
        home.put("other", metadata={"recipe": {"prompt_template": template}})
    with (
        pytest.raises(ArtifactRefused, match=received) as patch,
        home.store.change("acme") as tx,
    ):
        tx.merge_metadata("style", 1, {"prompt_template": template}, base=BASE)
    assert upload.value.code == patch.value.code == "malformed_template"


def test_the_template_has_a_limit_of_its_own() -> None:
    long = "{prompt}" + "x" * (MAX_TEMPLATE_BYTES - len("{prompt}"))
    encode_metadata({"prompt_template": long, "note": "x" * (MAX_METADATA_BYTES - 20)}, base=BASE)


def test_each_change_of_the_recipe_is_counted_and_no_other_change(home: Home) -> None:
    first = home.put(metadata={"recipe": {"max_tokens": 8}, "owner": "ann"}).manifest
    revisions = [first.recipe_revision]
    patches: list[dict[str, Any]] = [
        {"owner": "bob"},
        {"recipe": {"max_tokens": 8}},
        {"recipe": {"temperature": 0.5}},
        {"prompt_template": "Q: {prompt}"},
        {"recipe": {"prompt_template": "A: {prompt}"}},
        {"recipe": {"prompt_template": None}},
        {"recipe": {"max_tokens": None, "temperature": None}},
        {"recipe": None},
    ]
    for patch in patches:
        with home.store.change("acme") as tx:
            manifest = tx.merge_metadata("style", 1, patch, base=BASE)
        revisions.append(manifest.recipe_revision)
        assert manifest.digest == first.digest
    assert revisions == [1, 1, 1, 2, 3, 4, 5, 6, 6]
    assert manifest.recipe == Recipe()
    again = home.put(metadata={"recipe": {"max_tokens": 9}}).manifest
    assert (again.version, again.recipe_revision) == (1, 7)


def test_metadata_of_that_name_from_before_recipes_stays_in_the_free_part(home: Home) -> None:
    home.put(metadata={})
    with home.store.change("acme") as tx:
        tx.connection.exec_driver_sql(
            'UPDATE versions SET metadata_json = \'{"recipe": "sourdough"}\''
        )
    manifest = home.store.resolve(tenant="acme", reference="style", base=BASE)
    assert (manifest.recipe, manifest.metadata) == (Recipe(), {"recipe": "sourdough"})
