"""Where in a folder the prefix is."""

from pathlib import Path

import pytest

from prefixd.client.convert.search import find_prefix
from prefixd.client.convert.sources import read_source
from prefixd.client.errors import FormatError


def make(folder: Path, *names: str) -> Path:
    """Empty files, with their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


CHECKPOINT = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
)
"""What the Trainer writes with an adapter."""


def checkpoint(name: str) -> list[str]:
    return [f"{name}/{file}" for file in CHECKPOINT]


@pytest.mark.parametrize(
    ("names", "expected", "note"),
    [
        (CHECKPOINT, "", None),
        (["prefix.txt", "x.pt"], "", None),
        (["pytorch_model.bin", *CHECKPOINT[2:]], "pytorch_model.bin", None),
        (["cache_last.pt", "config.yaml"], "cache_last.pt", None),
        (["table.npy"], "table.npy", None),
        (["decoder.pt"], "decoder.pt", None),
        (["encoder.pt", "decoder.pt"], "encoder.pt", None),
        (checkpoint("final"), "final", "took {}/final"),
        (
            ["run/checkpoint-1/decoder.pt"],
            "run/checkpoint-1/decoder.pt",
            "took {}/run/checkpoint-1",
        ),
        (
            [*checkpoint("checkpoint-90"), *checkpoint("checkpoint-100"), "runs/events"],
            "checkpoint-100",
            "took {}/checkpoint-100, the last of 2 checkpoints",
        ),
        ([*CHECKPOINT, *checkpoint("checkpoint-100")], "", None),
        ([".cache/adapter_config.json", *checkpoint("final")], "final", "took {}/final"),
    ],
)
def test_the_prefix_of_a_folder(
    names: list[str], expected: str, note: str | None, tmp_path: Path
) -> None:
    place, notes = find_prefix(make(tmp_path, *names))
    assert place == tmp_path / expected
    assert notes == (() if note is None else (note.format(tmp_path),))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.pt", "b.npy"], "{} holds several prefixes: a.pt, b.npy. Name one of them"),
        (
            [*checkpoint("final"), *checkpoint("checkpoint-2"), *checkpoint("checkpoint-1")],
            "{} holds several prefixes: checkpoint-1, checkpoint-2, final. Name one of them",
        ),
        (
            [*checkpoint("a/checkpoint-1"), *checkpoint("b/checkpoint-2")],
            "{} holds several prefixes: a/checkpoint-1, b/checkpoint-2. Name one of them",
        ),
        (
            ["checkpoint-1/a.pt", "checkpoint-1/b.pt"],
            "{}/checkpoint-1 holds several prefixes: a.pt",
        ),
        (["1/2/3/decoder.pt"], "found 1"),
        (
            ["README.md", *CHECKPOINT[2:]],
            (
                "{}: expected adapter_config.json and adapter_model.safetensors, prefix.txt, or a "
                "file in a format that docs/formats.md lists; found README.md, optimizer.pt"
            ),
        ),
        ([], "found an empty folder"),
    ],
)
def test_a_folder_without_one_prefix(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as raised:
        find_prefix(make(tmp_path, *names))
    assert message.format(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["adapter_config.json", "README.md"],
            (
                "{}: expected adapter_model.safetensors or adapter_model.bin next to "
                "adapter_config.json"
            ),
        ),
        (
            ["adapter_model.bin"],
            "{}: expected adapter_config.json next to adapter_model.bin",
        ),
        (["encoder.pt", "decoder.pt"], "{}/encoder.pt: a prompt of an encoder-decoder model"),
    ],
)
def test_half_an_adapter(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as raised:
        read_source(str(make(tmp_path, *names)))
    assert message.format(tmp_path) in str(raised.value)


def test_a_weights_file_selects_its_folder(tmp_path: Path) -> None:
    make(tmp_path, *CHECKPOINT)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        prefix = read_source(str(source))
        assert prefix is not None
        assert prefix.origin == "PEFT"
