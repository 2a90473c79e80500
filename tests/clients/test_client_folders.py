"""Folders of our own layout: PEFT's files or a text, with ``prefixd.json``."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefixd.client import folders
from prefixd.client.errors import FormatError
from prefixd.client.folders import PeftContent, TextContent, read_folder


def peft_folder(folder: Path, **info: Any) -> Path:
    (folder / "adapter_config.json").write_bytes(b'{"peft_type":"CPT"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    if info:
        (folder / "prefixd.json").write_text(json.dumps(info))
    return folder


def test_folder_without_info_has_neither_task_nor_metadata(tmp_path: Path):
    content = read_folder(peft_folder(tmp_path))
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    assert content == PeftContent(config, weights, None, None)


def test_info_has_task_and_metadata_and_its_other_fields_are_information(tmp_path: Path):
    info = {"name": "a", "version": 3, "digest": "ff", "kind": "soft_prompt", "base": "tiny"}
    content = read_folder(peft_folder(tmp_path, task_id=1, metadata={"by": "Zoë"}, **info))
    assert (content.task_id, content.metadata) == (1, {"by": "Zoë"})


@pytest.mark.parametrize("text", ["", "a\r\nb\rc\n", "\ufeffGrüße 🦊", "no newline", "\n\n"])
def test_text_is_read_byte_for_byte(text: str, tmp_path: Path):
    (tmp_path / "prefix.txt").write_bytes(text.encode())
    assert read_folder(tmp_path) == TextContent(text)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"task_id": 1, "task_id": 2}', "a key occurs twice"),
        (b'{"metadata": {"a": NaN}}', "NaN is not JSON"),
        (b'{"metdata": {}}', "'metdata'"),
        (b'{"task_id": "1"}', "task_id to be a whole number"),
        (b'{"task_id": true}', "task_id to be a whole number"),
        (b'{"metadata": [1]}', "metadata to be a JSON object"),
        (b'{"role": "user"}', "role to be raw, system or null"),
    ],
)
def test_malformed_info_is_refused_with_its_path(raw: bytes, message: str, tmp_path: Path):
    (peft_folder(tmp_path) / "prefixd.json").write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        read_folder(tmp_path)
    assert str(tmp_path / "prefixd.json") in str(caught.value)


def test_a_recipe_file_and_a_role_are_read_and_sent(tmp_path: Path):
    (tmp_path / "prefix.txt").write_text("hi")
    (tmp_path / "recipe.json").write_text('{"max_tokens": 8}')
    (tmp_path / "prefixd.json").write_text('{"role": "system", "metadata": {"by": "ann"}}')
    content = read_folder(tmp_path)
    assert content == TextContent("hi", None, {"by": "ann"}, {"max_tokens": 8}, "system")
    sent = {"kind": "text", "text": "hi", "role": "system"}
    for metadata, expected in ((None, {"by": "ann"}), ({"by": "bob"}, {"by": "bob"})):
        call = folders.upload_folder("a", tmp_path, metadata=metadata)
        assert call.request.json == sent | {"metadata": expected | {"recipe": {"max_tokens": 8}}}


def test_two_recipes_or_a_role_without_a_text_are_refused(tmp_path: Path):
    peft_folder(tmp_path, role="system")
    with pytest.raises(FormatError, match="only a text has a role"):
        read_folder(tmp_path)
    peft_folder(tmp_path, metadata={"recipe": {}})
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(FormatError, match="expected one recipe"):
        read_folder(tmp_path)


def test_text_next_to_an_adapter_is_refused(tmp_path: Path):
    (peft_folder(tmp_path) / "prefix.txt").write_text("x")
    with pytest.raises(FormatError, match="it has both"):
        read_folder(tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "prefix.txt").write_bytes(b"ab\xff")
    with pytest.raises(FormatError, match=r"prefix\.txt is not text in UTF-8, from byte 2"):
        read_folder(tmp_path)


NOTHING: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("info", "options", "sent"),
    [
        (NOTHING, NOTHING, None),
        ({"task_id": None, "metadata": None}, NOTHING, None),
        ({"metadata": {}}, NOTHING, {}),
        (NOTHING, {"metadata": {}}, {}),
        ({"task_id": 1, "metadata": {"a": 1}}, NOTHING, {"a": 1, "task_id": 1}),
        ({"task_id": 1, "metadata": {"a": 1}}, {"task_id": 0}, {"a": 1, "task_id": 0}),
        ({"task_id": 1, "metadata": {"a": 1}}, {"metadata": {"b": 2}}, {"b": 2, "task_id": 1}),
        ({"task_id": 1}, {"metadata": {"task_id": 2}}, {"task_id": 2}),
        ({"task_id": 1}, {"metadata": {"task_id": 2}, "task_id": 3}, {"task_id": 3}),
        ({"task_id": 1, "metadata": {"a": 1}}, {"metadata": {}}, {"task_id": 1}),
    ],
)
def test_arguments_replace_what_the_folder_says(
    info: dict[str, Any], options: dict[str, Any], sent: object, tmp_path: Path
):
    call = folders.upload_folder("triage", peft_folder(tmp_path, **info), **options)
    parts = {part.name: part.content for part in call.request.parts}
    assert parts.get("metadata") == (
        None if sent is None else json.dumps(sent, separators=(",", ":")).encode()
    )


def test_folder_with_a_text_is_uploaded_as_a_text(tmp_path: Path):
    (tmp_path / "prefix.txt").write_bytes(b"Be brief.\r\n")
    (tmp_path / "prefixd.json").write_text('{"metadata": {"by": "ann"}}')
    call = folders.upload_folder("brief", tmp_path, warm=True)
    expected = {"kind": "text", "text": "Be brief.\r\n", "metadata": {"by": "ann"}}
    assert (call.request.json, call.request.params) == (expected, {"warm": "true"})
