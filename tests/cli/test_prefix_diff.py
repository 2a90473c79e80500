"""``prefix diff``: exit status and output, against the real application."""

from typing import Any

import numpy as np

from prefixd.client import Client
from tests.api.api_world import BASE
from tests.cli.served_shell import Shell, served, shell
from tests.store.store_artifacts import config_bytes, ramp, tensors

__all__ = ["served", "shell"]

VALUES = ramp(4, BASE.embedding_width)


def upload(client: Client, name: str, values: np.ndarray, *, dtype: str = "F32", **more: Any):
    metadata = more.pop("metadata", None)
    fields = {"num_virtual_tokens": len(values), **more}
    client.upload(
        name,
        config=config_bytes(**fields),
        weights=tensors({"prompt_embeddings": values}, dtype),
        metadata=metadata,
    )


def rows(output: str) -> dict[str, list[str]]:
    """The words of each line by its first."""
    lines = [line.split() for line in output.splitlines() if line]
    return {first: rest for first, *rest in lines}


def test_equal_versions_have_status_0(shell: Shell):
    upload(shell.client, "same", VALUES, metadata={"by": "ann"})
    upload(shell.client, "other", VALUES, metadata={"by": "ann"})
    result = shell("prefix", "diff", "same", "other@1")
    assert result.stdout == "same@1 and other@1 are equal\n"
    shown = shell.json("prefix", "diff", "same", "same@latest")
    assert (shown["equal"], shown["fields"], shown["tensors"]) == (True, {}, [])


def test_metadata_alone_makes_a_difference(shell: Shell):
    upload(shell.client, "ann", VALUES, metadata={"by": "ann", "n": 1})
    upload(shell.client, "bob", VALUES, metadata={"by": "bob", "labels": {"team": "care"}})
    result = shell("prefix", "diff", "ann", "bob", code=1)
    assert rows(result.stdout) == {
        "FIELD": ["ann@1", "bob@1"],
        "labels.team": ["-", '"care"'],
        "metadata.by": ['"ann"', '"bob"'],
        "metadata.n": ["1", "-"],
    }


def test_tensors_and_config_that_differ(shell: Shell):
    changed = VALUES.copy()
    changed[2, 5] -= 0.25
    upload(shell.client, "left", VALUES, revision="a")
    upload(shell.client, "right", changed, revision=None)
    output = rows(shell("prefix", "diff", "left", "right", code=1).stdout)
    assert output["config.revision"] == ['"a"', "null"]
    assert output["prompt_embeddings"] == ["[4,", "8]", "float32", "0.25"]
    shown = shell.json("prefix", "diff", "left", "right", code=1)
    assert shown["fields"]["config.revision"] == {"left": "a", "right": None}
    assert set(shown["fields"]) == {"digest", "config.revision"}
    assert shown["tensors"] == [
        {
            "name": "prompt_embeddings",
            "shapes": [[4, 8], [4, 8]],
            "dtypes": ["float32", "float32"],
            "greatest": 0.25,
        }
    ]


def test_other_kinds_dtypes_and_shapes(shell: Shell):
    upload(shell.client, "wide", VALUES)
    upload(shell.client, "half", VALUES, dtype="F16", peft_type="P_TUNING")
    upload(shell.client, "short", VALUES[:3])
    half = rows(shell("prefix", "diff", "wide", "half", code=1).stdout)
    assert half["peft_type"] == ['"PROMPT_TUNING"', '"P_TUNING"']
    assert half["prompt_embeddings"] == ["[4,", "8]", "float32", "/", "float16", "0"]
    short = rows(shell("prefix", "diff", "wide", "short", code=1).stdout)
    assert short["num_virtual_tokens"] == ["4", "3"]
    assert short["prompt_embeddings"] == ["[4,", "8]", "/", "[3,", "8]", "float32", "-"]
    shell.client.upload_text("note", "text")
    note = rows(shell("prefix", "diff", "wide", "note", code=1).stdout)
    assert note["kind"] == ['"soft_prompt"', '"hard_prompt"']
    assert "TENSOR" not in note


def test_texts_are_a_unified_diff(shell: Shell):
    shell.client.upload_text("voice", "one\ntwo\r\n\x1b[2Jthree\n")
    shell.client.upload_text("voice", "one\ntwo\n\x1b[2Jthree")
    output = shell("prefix", "diff", "voice@1", "voice@2", code=1).stdout
    assert output.endswith(
        "\n--- voice@1\n+++ voice@2\n@@ -1,3 +1,3 @@\n one\n-two\\x0d\n-\\x1b[2Jthree\n"
        "+two\n+\\x1b[2Jthree\n\\ No newline at end of file\n"
    )


def test_an_error_has_status_2(shell: Shell):
    shell.client.upload_text("note", "text")
    assert "no prefix" in shell("prefix", "diff", "note", "note@9", code=2).stderr
    assert "no prefix" in shell("prefix", "diff", "missing", "note", code=2).stderr
    shell("prefix", "diff", "note", code=2)
    shell.environment["PREFIXD_API_KEY"] = "no\nkey"
    shell("prefix", "diff", "note", "note", code=2)
    shell.environment["PREFIXD_API_KEY"] = "pfx_wrong"
    assert "PREFIXD_API_KEY" in shell("prefix", "diff", "note", "note", code=2).stderr
