"""``prefix push`` and ``convert`` on files of other tools."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from prefixd.server.cli.options import EXTRAS
from tests.cli.cli_runner import run
from tests.cli.test_flags import run_without
from tests.cli.test_prefix_verbs import Shell
from tests.clients.foreign_files import save_kobold, words
from tests.clients.loopback import Loopback
from tests.clients.samples import MANIFEST

SENTIMENT = Path(__file__).parents[2] / "examples" / "sentiment"


@pytest.fixture
def shell(server: Loopback) -> Shell:
    return Shell(server.url)


def pickled_sentiment(folder: Path) -> Path:
    """The example as PEFT up to 0.6 wrote it."""
    folder.mkdir(parents=True)
    shutil.copy(SENTIMENT / "adapter_config.json", folder)
    tensors = load_file(SENTIMENT / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def sent_tensors(server: Loopback) -> dict[str, torch.Tensor]:
    return load(server.seen[-1].parts["weights"])


def test_push_a_pickled_adapter(shell: Shell, server: Loopback, tmp_path: Path) -> None:
    folder = pickled_sentiment(tmp_path / "old")
    server.reply(MANIFEST, status=201)
    result = shell("prefix", "push", "x", str(folder))
    assert (result.exit_code, result.stderr) == (0, "")
    expected = load_file(SENTIMENT / "adapter_model.safetensors")
    sent = sent_tensors(server)
    assert sent.keys() == expected.keys()
    assert torch.equal(sent["prompt_embeddings"], expected["prompt_embeddings"])
    parts = server.seen[0].parts
    assert parts["config"] == (SENTIMENT / "adapter_config.json").read_bytes()
    assert "metadata" not in parts


def test_push_a_run_takes_its_checkpoint_with_a_note(
    shell: Shell, server: Loopback, tmp_path: Path
) -> None:
    shutil.copytree(SENTIMENT, tmp_path / "run" / "checkpoint-50")
    server.reply(MANIFEST, status=201)
    result = shell("prefix", "push", "x", str(tmp_path / "run"))
    assert result.exit_code == 0
    assert result.stderr == f"prefixd: took {tmp_path}/run/checkpoint-50\n"
    weights = (SENTIMENT / "adapter_model.safetensors").read_bytes()
    assert server.seen[0].parts["weights"] == weights


def test_push_a_soft_prompt_of_koboldai_sends_its_metadata(
    shell: Shell, server: Loopback, tmp_path: Path
) -> None:
    values = torch.randn(3, 8)
    meta = {"name": "Noir", "author": "me", "supported": ["gpt-neo"], "other": 1}
    save_kobold(tmp_path / "noir.zip", words(values), meta)
    server.reply(MANIFEST, status=201)
    assert shell("prefix", "push", "noir", str(tmp_path / "noir.zip")).exit_code == 0
    assert json.loads(server.seen[0].parts["metadata"]) == {
        "name": "Noir",
        "author": "me",
        "supported": ["gpt-neo"],
    }
    sent = sent_tensors(server)["prompt_embeddings"]
    assert torch.equal(sent, values.bfloat16())
    assert json.loads(server.seen[0].parts["config"])["num_virtual_tokens"] == 3


def test_a_task_of_a_table_is_chosen_here_and_not_sent(
    shell: Shell, server: Loopback, tmp_path: Path
) -> None:
    table = np.arange(24, dtype=np.float32).reshape(3, 2, 4) + 1
    np.save(tmp_path / "table.npy", table)
    result = shell("prefix", "push", "x", str(tmp_path / "table.npy"))
    assert result.exit_code == 1
    assert "has 3 tasks: choose one with --task-id, 0 to 2" in result.stderr
    server.reply(MANIFEST, status=201)
    assert (
        shell("prefix", "push", "x", str(tmp_path / "table.npy"), "--task-id", "2").exit_code == 0
    )
    assert "metadata" not in server.seen[0].parts
    assert torch.equal(sent_tensors(server)["prompt_embeddings"], torch.from_numpy(table[2]))


def test_convert_writes_a_folder_for_push(shell: Shell, server: Loopback, tmp_path: Path) -> None:
    save_kobold(tmp_path / "noir.zip", np.ones((2, 4), np.float32), {"name": "Noir"})
    target = tmp_path / "out" / "noir"
    result = run("convert", str(tmp_path / "noir.zip"), str(target))
    assert result.stdout == f"{target}  written, from KoboldAI\n"
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "prefixd.json",
    ]
    server.reply(MANIFEST, status=201)
    assert shell("prefix", "push", "x", str(target)).exit_code == 0
    assert json.loads(server.seen[0].parts["metadata"]) == {"name": "Noir"}


def test_convert_writes_new_folders_only(tmp_path: Path) -> None:
    folder = pickled_sentiment(tmp_path / "old")
    stderr = run("convert", str(folder), str(folder), code=1).stderr
    assert f"{folder} is not empty" in stderr
    assert not (folder / "adapter_model.safetensors").exists()


def test_convert_refuses_a_text_and_a_missing_path(tmp_path: Path) -> None:
    text = tmp_path / "voice.txt"
    text.write_text("Ahoy", "utf-8")
    target = str(tmp_path / "out")
    assert (
        "expected a format that docs/formats.md lists"
        in run("convert", str(text), target, code=1).stderr
    )
    missing = run("convert", str(tmp_path / "none"), target, code=1)
    assert f"{tmp_path / 'none'}: No such file" in missing.stderr
    assert not (tmp_path / "out").exists()


def test_a_format_that_needs_numpy_names_the_extra(tmp_path: Path) -> None:
    folder = pickled_sentiment(tmp_path / "old")
    result = run_without({*EXTRAS, "safetensors"}, "convert", str(folder), str(tmp_path / "new"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"prefixd: {folder}/adapter_model.bin: the package numpy is not installed: "
        "pip install 'prefixd[convert]'\n"
    )


def test_converting_needs_numpy_alone(tmp_path: Path) -> None:
    folder = pickled_sentiment(tmp_path / "old")
    missing = {*EXTRAS, "safetensors"} - {"numpy"}
    result = run_without(missing, "convert", str(folder), str(tmp_path / "new"))
    assert (result.returncode, result.stderr) == (0, "")


def test_safetensors_need_no_numpy(tmp_path: Path) -> None:
    result = run_without({*EXTRAS, "safetensors"}, "convert", str(SENTIMENT), str(tmp_path / "new"))
    assert (result.returncode, result.stderr) == (0, "")
