"""Files in the forms that the tools also write, and small files that claim large contents."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prefixd.client.convert.sources import read_source
from prefixd.client.errors import FormatError
from prefixd.client.folders import PeftContent
from tests.clients.foreign_files import (
    PrefixEncoder,
    embeddings,
    memory_below,
    parameters,
    read,
    save_cartridge,
)
from tests.clients.test_convert_pickles import CONTAINERS, MIB, tensor_pickle, text, zip_of

KEYS, VALUES = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(1))


def test_a_cartridge_in_the_older_container(tmp_path: Path) -> None:
    save_cartridge(tmp_path / "zip.pt", KEYS, VALUES, frozen=2)
    saved = torch.load(tmp_path / "zip.pt", weights_only=False)
    torch.save(saved, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    expected = embeddings(read(tmp_path / "zip.pt"))
    assert expected.shape == (5, 3 * 2 * 2 * 4)
    assert torch.equal(embeddings(read(tmp_path / "legacy.pt")), expected)


def test_another_module_in_the_older_container_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    torch.save(torch.nn.Linear(2, 2), file, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"'torch\.nn\.modules\.linear\.Linear': refused"):
        read(file)
    module = b"(" + text("module") + b"ctorch\nFloatStorage\nNNtQ."
    file.write_bytes(zip_of(module))
    with pytest.raises(FormatError, match="found another module: refused"):
        read(file)


@pytest.mark.parametrize("container", [list, tuple, parameters], ids=["list", "tuple", "module"])
@pytest.mark.parametrize("frozen", ["missing", None, []], ids=str)
def test_a_cartridge_without_frozen_tokens(
    container: Callable[[Any], Any], frozen: Any, tmp_path: Path
) -> None:
    layers = [x if container is parameters else x[:, None] for x in (KEYS, VALUES)]
    parts = {
        f"trainable_{n}": container(x) for n, x in zip(("keys", "values"), layers, strict=True)
    }
    if frozen != "missing":
        parts |= {"frozen_keys": frozen, "frozen_values": frozen}
    torch.save(parts, tmp_path / "x.pt")
    save_cartridge(tmp_path / "expected.pt", KEYS, VALUES, frozen=0)
    expected = embeddings(read(tmp_path / "expected.pt"))
    assert torch.equal(embeddings(read(tmp_path / "x.pt")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [None, 8])
def test_a_prefix_encoder_in_safetensors(
    hidden: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    encoder = PrefixEncoder(tokens=5, width=48, hidden=hidden).to(dtype)
    state = {f"transformer.prefix_encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {"base.weight": torch.zeros(3, 3), "base.ids": torch.arange(4)}
    folder = tmp_path / "run" / "checkpoint-30"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_hidden_layers": 3}')
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, tmp_path / "expected.bin")
    expected = embeddings(read(tmp_path / "expected.bin"))
    for path in (folder.parent, folder, folder / "model.safetensors"):
        prefix = read(path)
        assert torch.equal(embeddings(prefix), expected)
        assert isinstance(prefix.content, PeftContent)
        assert isinstance(prefix.content.config, bytes)
        assert json.loads(prefix.content.config)["num_layers"] == 3


NAME = "prefix_encoder.embedding.weight"


def entry(**fields: Any) -> bytes:
    known = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    return json.dumps({NAME: known | fields}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": ' + b"[" * 50_000, "not valid JSON"),
        (b'{"a": 1}', "'a' has no shape and offsets"),
        (entry(shape=[500_000_000], data_offsets=[0, 2_000_000_000]), "is not within the file"),
        (entry(shape=[20_000, 25_000]), "at most 1073741824 bytes of values, found 2000000000"),
        (entry(shape=[-2, -2]), "is not within the file"),
        (entry(shape=[1] * 9), "is not within the file"),
        (entry(shape=[2, 3]), "expected 24 bytes by its size and dtype, found 16"),
        (entry(data_offsets=[-8, 8]), "is not within the file"),
        (entry(dtype="I32"), "expected floating-point numbers, found I32"),
        (entry(dtype=[]), "is not within the file"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_other_safetensors_are_refused(header: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with memory_below(4 * MIB), pytest.raises(FormatError, match=message):
        read(file)


def test_a_header_of_two_gigabytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**31) + b"{}")
    with memory_below(MIB), pytest.raises(FormatError, match="within the 10 bytes of the file"):
        read(file)


def test_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(2, 4)}, file)
    with pytest.raises(FormatError, match=r"expected adapter_config\.json next to them"):
        read(file)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".npy", ".zip"])
def test_a_pickle_of_protocol_0_is_not_a_text(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"prefix{suffix}"
    file.write_bytes(b"cos\nsystem\n(Vtrue\ntR.")
    with pytest.raises(FormatError, match=r"'os\.system': refused"):
        read_source(str(file))


PAIRS = b"".join(text(str(n)) + b"N\x86" for n in range(900))
CALLS = 100_000


@pytest.mark.parametrize(
    "pickled",
    [
        b"ccollections\nOrderedDict\nq\x00](" + PAIRS + b"e\x85q\x01" + b"h\x00h\x01R0" * CALLS,
        b"ctorch._utils\n_rebuild_tensor\nq\x00("
        + b"N" * 8000
        + b"tq\x01"
        + b"h\x00h\x01R0" * CALLS,
    ],
    ids=["OrderedDict", "tensor"],
)
@pytest.mark.parametrize("container", CONTAINERS)
def test_one_argument_of_many_calls_is_refused(
    container: str, pickled: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "decoder.pt"
    file.write_bytes(CONTAINERS[container](pickled + b"N."))
    with memory_below(24 * MIB), pytest.raises(FormatError):
        read(file)


def test_one_state_of_many_lists_is_refused(tmp_path: Path) -> None:
    tensor = tensor_pickle(size=8).removesuffix(b".") + b"q\x01"
    items = b"".join(text(str(n)) + b"h\x01" for n in range(500))
    state = b"}" + text("_parameters") + b"}(" + items + b"usq\x02"
    lists = b"ctorch.nn.modules.container\nParameterList\n)\x81" + b"h\x02b" * CALLS
    file = tmp_path / "decoder.pt"
    file.write_bytes(zip_of(tensor + state + lists + b"."))
    with (
        memory_below(24 * MIB),
        pytest.raises(FormatError, match="values in the calls of a pickle"),
    ):
        read(file)


@pytest.mark.parametrize(
    "shape",
    [(1,) * 100, (0, 10**11, 10**11, 10**11)],
    ids=["rank", "product"],
)
def test_arrays_that_numpy_cannot_hold_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    data = bytes(4) if 0 not in shape else b""
    file = tmp_path / "x.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    with pytest.raises(FormatError, match=f"expected a table, found {len(shape)} axes"):
        read(file)
    if len(shape) < 9:
        numbers = ",".join(map(str, shape))
        pickled = tensor_pickle(size=8, shape=numbers, stride=numbers)
        (tmp_path / "x.pt").write_bytes(zip_of(pickled, _0=bytes(32)))
        with pytest.raises(FormatError, match="expected at most 1099511627776 elements"):
            read(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.zip"
    for value in (1.0, 2.0):
        with zipfile.ZipFile(file, "a") as archive, archive.open("tensor.npy", "w") as stream:
            np.save(stream, np.full((2, 4), value, np.float32))
    with pytest.raises(FormatError, match="different names in the archive, found two alike"):
        read(file)
