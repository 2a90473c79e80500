"""``prefix pull`` and ``prefix push`` against the real application: every kind keeps its digest."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.client import folders
from prefixd.client.artifacts import read_artifact
from prefixd.client.errors import ProtocolError
from prefixd.client.folders import read_folder, write_version
from prefixd.client.types import Prefix
from prefixd.store.artifact.artifact import pack_peft
from prefixd.store.artifact.config import MAX_CONFIG_BYTES
from tests.api.test_stored_file import KINDS, P
from tests.cli.served_shell import Shell, served, shell
from tests.clients.samples import MANIFEST
from tests.store.store_artifacts import config_bytes, soft, spool, tensors

__all__ = ["served", "shell"]

METADATA = {
    "by": "Zoë",
    "nested": {"b": [1, 2.5, None, True], "a": -0.0, "big": 10**30},
    "labels": {"team": "care"},
    "description": "",
    "prompt_template": "Q: {prompt}\nA:",
}
CONFIGS = {
    "as PEFT writes it": lambda fields: json.dumps(fields, indent=2, sort_keys=True),
    "compact and reversed": lambda fields: json.dumps(
        dict(reversed(fields.items())), separators=(",", ":"), ensure_ascii=False
    ),
    "spaced": lambda fields: " \n" + json.dumps(fields, indent="\t\t") + "\r\n ",
}
SAME = ("digest", "kind", "dtype", "metadata", "labels", "description", "prompt_template")


@pytest.mark.parametrize("spelling", CONFIGS)
@pytest.mark.parametrize("peft_type", KINDS)
def test_pulled_folder_of_any_peft_type_is_the_same_version_when_pushed(
    shell: Shell, tmp_path: Path, peft_type: str, spelling: str
):
    name = f"{peft_type}-{len(spelling)}"
    fields = {"zz": "🦊 é \u2028", "peft_type": peft_type, "x": [1e15, 0.1, 10**40, {"b": {}}]}
    config = CONFIGS[spelling](fields | {"num_virtual_tokens": P}).encode()
    metadata = METADATA | ({"task_id": 2} if "TASK" in peft_type else {})
    weights = tensors(*KINDS[peft_type])
    first = shell.client.upload(name, config=config, weights=weights, metadata=metadata).prefix
    pulled = tmp_path / "new" / "folder"
    assert shell.json("prefix", "pull", f"{name}@1", pulled)["digest"] == first.digest
    assert {path.name for path in pulled.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "prefixd.json",
    }
    assert (pulled / "adapter_model.safetensors").read_bytes() == weights
    info = json.loads((pulled / "prefixd.json").read_text("utf-8"))
    assert (info["version"], info["digest"], info["base"]) == (1, first.digest, "tiny")
    assert info["task_id"] == (2 if "TASK" in peft_type else None)
    assert info["metadata"] == METADATA
    again = shell.json("prefix", "push", name, pulled)
    assert again["version"] == 1
    copy = shell.json("prefix", "push", f"{name}-copy", pulled)
    for shown in (again, copy):
        assert {key: shown[key] for key in SAME} == {
            key: json.loads(first.model_dump_json())[key] for key in SAME
        }


@pytest.mark.parametrize("text", ["a\r\nb\n", "\ufeffGrüße 🦊", "no newline", "\n\x00\x1b[0m "])
def test_pulled_text_is_the_same_version_when_pushed(shell: Shell, tmp_path: Path, text: str):
    name = f"text-{len(text)}"
    metadata = {"task_id": "free in a text", "by": "ann"}
    first = shell.client.upload_text(name, text, metadata=metadata).prefix
    shell("prefix", "pull", name, tmp_path / "folder")
    assert (tmp_path / "folder" / "prefix.txt").read_bytes() == text.encode()
    del metadata["task_id"]
    info = json.loads((tmp_path / "folder" / "prefixd.json").read_text("utf-8"))
    assert info["metadata"] == first.metadata
    copy = shell.json("prefix", "push", f"{name}-copy", tmp_path / "folder")
    assert (copy["digest"], copy["metadata"]) == (first.digest, first.metadata)


def test_role_and_recipe_of_a_text_are_pulled_and_pushed(shell: Shell, tmp_path: Path):
    (tmp_path / "kind.txt").write_text("Be kind.")
    recipe = {"temperature": 0.5, "stop": ["\\n"], "examples": [{"prompt": "a", "answer": "b"}]}
    metadata = json.dumps({"recipe": recipe})
    push: list[str | Path] = ["prefix", "push", "kind", tmp_path / "kind.txt", "--role", "system"]
    first = shell.json(*push, "--metadata", metadata)
    assert (first["role"], first["recipe"]["stop"]) == ("system", ["\\n"])
    shell("prefix", "pull", "kind", tmp_path / "folder")
    info = json.loads((tmp_path / "folder" / "prefixd.json").read_text("utf-8"))
    assert (info["role"], info["metadata"]) == ("system", {"recipe": recipe})
    copy = shell.json("prefix", "push", "copy", tmp_path / "folder")
    assert all(copy[name] == first[name] for name in ("digest", "role", "recipe"))


def test_flags_replace_task_and_metadata_of_a_pulled_folder(shell: Shell, tmp_path: Path):
    config = config_bytes("MULTITASK_PROMPT_TUNING")
    weights = tensors(*KINDS["MULTITASK_PROMPT_TUNING"])
    metadata = {"task_id": 1, "by": "ann"}
    shell.client.upload("tasks", config=config, weights=weights, metadata=metadata)
    shell("prefix", "pull", "tasks", tmp_path / "folder")
    other = shell.json("prefix", "push", "tasks", tmp_path / "folder", "--task-id", "0")
    assert (other["version"], other["metadata"]) == (2, {"task_id": 0, "by": "ann"})


def test_pull_into_a_folder_with_files_is_refused(shell: Shell, tmp_path: Path):
    shell.client.upload_text("note", "text")
    (tmp_path / "mine").write_text("mine")
    result = shell("prefix", "pull", "note", tmp_path, code=1)
    assert "is not empty, it has 'mine': name a new folder" in result.stderr
    result = shell("prefix", "pull", "note", tmp_path / "mine", code=1)
    assert "is a file" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    shell("prefix", "pull", "note", tmp_path / "empty")
    assert (tmp_path / "empty" / "prefix.txt").read_text() == "text"


def test_pull_of_an_unknown_version_leaves_no_folder(shell: Shell, tmp_path: Path):
    shell.client.upload_text("note", "text")
    assert "no prefix" in shell("prefix", "pull", "note@9", tmp_path / "new", code=1).stderr
    assert list(tmp_path.iterdir()) == []


# ── Without a server ─────────────────────────────────────────────────────────────────────────


def stored(tmp_path: Path, config: bytes) -> tuple[Prefix, bytes]:
    """A version as the server stores it, and its manifest."""
    packed = pack_peft(config, spool(tmp_path, soft()), tmp_path / "stored")
    manifest = MANIFEST | {"digest": packed.digest, "metadata": {}}
    prefix = Prefix.model_validate_json(json.dumps(manifest))
    return prefix, (tmp_path / "stored").read_bytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(
        st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=40)
@given(value=JSON)
def test_any_config_gives_the_same_digest_again(
    tmp_path_factory: pytest.TempPathFactory, value: object
):
    tmp_path = tmp_path_factory.mktemp("stored")
    prefix, data = stored(tmp_path, config_bytes(x=value))
    write_version(tmp_path / "folder", prefix, read_artifact(data, prefix))
    config = (tmp_path / "folder" / "adapter_config.json").read_bytes()
    weights = tmp_path / "folder" / "adapter_model.safetensors"
    assert pack_peft(config, weights, tmp_path / "again").digest == prefix.digest


@pytest.mark.parametrize(
    "filler",
    ["1", "1e15", "-0.0", "0.1", "12345e-9", '"é"', '"1.50e2\\"1.50"', "[[[1.5]]]", "9" * 4000],
)
def test_config_near_the_limit_stays_within_it(tmp_path: Path, filler: str):
    start = config_bytes()[:-1] + b',"x":['
    count = (MAX_CONFIG_BYTES - len(start) - 2) // (len(filler.encode()) + 1)
    prefix, data = stored(tmp_path, start + ",".join([filler] * count).encode() + b"]}")
    write_version(tmp_path / "folder", prefix, read_artifact(data, prefix))
    written = (tmp_path / "folder" / "adapter_config.json").read_bytes()
    assert len(written) <= MAX_CONFIG_BYTES
    weights = tmp_path / "folder" / "adapter_model.safetensors"
    assert pack_peft(written, weights, tmp_path / "again").digest == prefix.digest


@given(value=JSON)
def test_shortest_spelling_of_any_config_has_the_same_value(value: object):
    spelled = folders._shortest_json({"x": value})
    assert json.dumps(json.loads(spelled)) == json.dumps({"x": value})
    plain = json.dumps({"x": value}, separators=(",", ":"), ensure_ascii=False)
    assert len(spelled) <= len(plain.encode())


@pytest.mark.parametrize("cut", [0, 10, 200, -1])
def test_incomplete_file_is_refused(tmp_path: Path, cut: int):
    prefix, data = stored(tmp_path, config_bytes())
    with pytest.raises(ProtocolError, match="the server sent one with"):
        read_artifact(data[:cut], prefix)


def test_format_of_a_later_server_is_refused(tmp_path: Path):
    prefix, data = stored(tmp_path, config_bytes())
    later = data.replace(b'"format":1', b'"format":2')
    renamed = prefix.model_copy(update={"digest": sha256(later).hexdigest()})
    with pytest.raises(ProtocolError, match="format 2: update prefixd"):
        read_artifact(later, renamed)


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", range(6))
def test_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, step: int
):
    """Interrupted at each write and at each rename: no file remains."""
    prefix, data = stored(tmp_path, config_bytes())
    folder = tmp_path / "folder"
    if existing:
        folder.mkdir()
    calls = iter(range(100))

    def interrupted(act: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if next(calls) == step:
                raise KeyboardInterrupt
            return act(*arguments)

        return run

    monkeypatch.setattr(folders, "_write_durably", interrupted(folders._write_durably))
    monkeypatch.setattr(Path, "replace", interrupted(Path.replace))
    with pytest.raises(KeyboardInterrupt):
        write_version(folder, prefix, read_artifact(data, prefix))
    assert folder.exists() == existing
    assert not existing or list(folder.iterdir()) == []


@pytest.mark.parametrize("step", range(3))
def test_folder_of_a_killed_pull_is_no_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    """Killed before any of the renames: the files that have their names are not a prefix."""
    prefix, data = stored(tmp_path, config_bytes())
    names: list[str] = []

    def noted(source: Path, target: Path) -> Path:
        names.append(target.name)
        return source

    monkeypatch.setattr(Path, "replace", noted)
    write_version(tmp_path / "folder", prefix, read_artifact(data, prefix))
    present = tmp_path / "present"
    present.mkdir()
    for name in names[:step]:
        (present / name).write_bytes(b"{}")
    content = read_folder(present)
    assert isinstance(content, folders.PeftContent)
    assert not Path(str(content.config)).exists()
    assert names[-1] == "adapter_config.json"
