"""What the wheel holds besides the modules."""

import zipfile
from pathlib import Path

from prefixd.server.cli.demo.plan import read_examples
from tests.packaging.wheel import ROOT


def test_wheel_holds_the_files_that_the_demo_reads(wheel: Path, tmp_path: Path) -> None:
    folder = "prefixd/server/cli/demo/examples/"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(folder)]
        archive.extractall(tmp_path, names)
    examples = read_examples(tmp_path / folder)
    expected = {"prefixes.json"}
    for example in examples:
        trained = {"adapter_config.json", "adapter_model.safetensors"}
        files = {"prefix.txt"} if example.text_file is not None else trained
        expected |= {f"{example.folder.name}/{file}" for file in files | {"recipe.json"}}
    assert {name.removeprefix(folder) for name in names} == expected
    assert [example.name for example in examples] == [
        example.name for example in read_examples(ROOT / "examples")
    ]
