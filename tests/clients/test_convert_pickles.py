"""Hostile pickles are refused: nothing in them is executed, and no size they state is believed."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixd.client.convert.pickles import MAX_PICKLE_BYTES
from prefixd.client.errors import FormatError
from tests.clients.foreign_files import embeddings, memory_below, read

MIB = 1024 * 1024


def zip_of(pickled: bytes, **storages: bytes) -> bytes:
    """The container of PyTorch 1.6 and later around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", data)
    return buffer.getvalue()


def legacy_of(pickled: bytes) -> bytes:
    """The older container around any pickle; it lists no storages."""
    head: list[Any] = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [pickle.dumps(value, protocol=2) for value in head]
    return b"".join((*parts, pickled, pickle.dumps([], protocol=2)))


def tensor_pickle(*, size: object, offset: object = 0, shape: str = "(4,)", stride: str = "(1,)"):
    """A pickle of one float32 tensor with any numbers in it."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number(size)
        + b"tQ"
        + number(offset)
        + numbers(shape)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


def number(value: object) -> bytes:
    return f"I{value}\n".encode()


def numbers(text: str) -> bytes:
    return b"(" + b"".join(number(item) for item in text.strip("(),").split(",") if item) + b"t"


# -- code -----------------------------------------------------------------------------------------


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def payloads(path: Path) -> dict[str, bytes]:
    """Pickles that create a file at ``path`` when the standard library reads them."""
    system, command = b"cos\nsystem\n", text(f"touch {path}")
    python = text(f"open({str(path)!r}, 'w').close()")
    imported = b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
    touch = Touch(os.system, f"touch {path}")
    return {
        "reduce-0": pickle.dumps(touch, protocol=0),
        "reduce-2": pickle.dumps({"prompt_embeddings": touch}, protocol=2),
        "reduce-4": pickle.dumps([touch], protocol=4),
        "eval": b"cbuiltins\neval\n" + python + b"\x85R.",
        "exec-python-2": b"c__builtin__\nexec\n" + python + b"\x85R.",
        "nested-getattr": b"cbuiltins\ngetattr\n("
        + imported
        + text("system")
        + b"tR"
        + command
        + b"\x85R.",
        "INST": b"(" + command + b"ios\nsystem\n.",
        "OBJ": b"(csubprocess\nPopen\n](" + text("touch") + text(str(path)) + b"eo.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + command + b"\x85R.",
        "STACK_GLOBAL-dotted": b"\x80\x04"
        + text("os")
        + text("path.os.system")
        + b"\x93"
        + command
        + b"\x85R.",
        "memo": system + b"q\x000h\x00" + command + b"\x85R.",
        "set-item": b"}" + text("a") + system + command + b"\x85Rs.",
        "persistent-id": system + command + b"\x85RQ.",
        "in-a-tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(" + system + command + b"\x85RtR.",
        "popped": system + command + b"\x85R0N.",
    }


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {"zip": zip_of, "legacy": legacy_of}


@pytest.mark.parametrize("name", payloads(Path("x")))
def test_code_in_a_pickle_is_not_executed(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickled = payloads(marker)[name]
    with suppress(Exception):
        process = pickle.loads(pickled)
        process.wait()
    assert marker.exists(), "the payload has no effect that could be observed"
    marker.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    for container in CONTAINERS.values():
        for file in (tmp_path / "adapter_model.bin", tmp_path / "decoder.pt"):
            file.write_bytes(container(pickled))
            with pytest.raises(FormatError, match=r"refused|expected a pickle of tensors"):
                read(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"ctorch\nload\n.",
        b"ctorch.storage\n_load_from_bytes\n.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"ccopyreg\n_reconstructor\n.",
        b"ctorch.nn.modules.container\nModuleList\n.",
        b"ctorch\nFloatStorage\n)R.",  # a class, not a builder
        b"ctorch\nFloatStorage\n)\x81.",
        b"ctorch\nFloatStorage\n}b.",
        b"ctorch.nn.modules.container\nParameterList\n)R.",
        b"ctorch.nn.modules.container\nParameterList\n)}\x92.",  # NEWOBJ_EX
        b"ctorch.nn.modules.container\nParameterList\n)\x81}(X\x05\x00\x00\x00__abcK\x01ub.",
        b"ccollections\nOrderedDict\n]R.",
        b"ccollections\nOrderedDict\nK\x01\x85R.",
        b"]}b.",
        b"NNb.",
        b"\x82\x01.",  # EXT1
        b"Pabc\n.",  # PERSID
        b"K\x01Q.",
        b")Q.",
        b"(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQ.",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x01K\x01K\x01tQ.",
        b"K\x01K\x02\x93.",
        b"C\x01a.",  # bytes
        b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a.",  # bytearray
        b"}NNs.",
        b"}]K\x01s.",
        b"(K\x01d.",
        b"h\x05.",
        b"R.",
        b"t.",
        b"e.",
        b"NNa.",
        b".",
        b"N",
        b"",
        b"\xff.",
        b"X\xff\xff\xff\xffa.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",  # BINUNICODE8 of 2 ** 63 bytes
        b"\x8b\xff\xff\xff\x7fa.",  # LONG4 of 2 GB
        b"I" + b"9" * 5000 + b"\n.",
    ],
    ids=lambda pickled: repr(pickled[:40]),
)
@pytest.mark.parametrize("container", CONTAINERS)
def test_other_pickles_are_refused(pickled: bytes, container: str, tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    file.write_bytes(CONTAINERS[container](pickled))
    with memory_below(4 * MIB), pytest.raises(FormatError):
        read(file)


# -- nests ----------------------------------------------------------------------------------------

LEVELS = 100_000


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"]" * LEVELS + b"a" * (LEVELS - 1) + b".", "at most 8192 values on the stack"),
        (b"(" * LEVELS + b"t" * LEVELS + b".", "at most 64 nested values"),
        (b"(" * 65 + b"t" * 65 + b".", "at most 64 nested values"),
        (b"K\x01" * LEVELS + b".", "at most 8192 values on the stack"),
        (b")" + b"\x85" * LEVELS + b".", "expected tensors, found a tuple"),  # (((),),)
        (b"K\x01" + b"2\x86" * LEVELS + b".", "found a tuple"),  # 2 ** LEVELS leaves
        (b"})" + b"\x85" * LEVELS + b"Ns.", "keys that are not names"),
        (b"}" + text("a") + b")" + b"\x85" * LEVELS + b"s.", "found the names 'a'"),
    ],
    ids=["lists", "tuples", "marks", "stack", "tuples-of-one", "doubled", "key", "value"],
)
def test_deep_nests_are_refused(pickled: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    file.write_bytes(zip_of(pickled))
    with pytest.raises(FormatError, match=message):
        read(file)


def test_a_long_pickle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    file.write_bytes(zip_of(b"N0" * MAX_PICKLE_BYTES + b"N."))
    with pytest.raises(FormatError, match=f"at most {MAX_PICKLE_BYTES} bytes"):
        read(file)
    file.write_bytes(legacy_of(b"N0" * MAX_PICKLE_BYTES + b"N."))
    with pytest.raises(FormatError, match="damaged pickle"):
        read(file)


# -- sizes ----------------------------------------------------------------------------------------

FLOATS = np.arange(8, dtype=np.float32)


@pytest.mark.parametrize(
    "claims",
    [
        {"size": 2**29},  # 2 GB
        {"size": 2**47},
        {"size": -1},
        {"size": 2**70},
        {"size": 9},
        {"size": 7},
        {"size": 8, "offset": 5},
        {"size": 8, "offset": -1},
        {"size": 8, "offset": 2**60},
        {"size": 8, "stride": "(3,)"},
        {"size": 8, "stride": "(-1,)"},
        {"size": 8, "shape": "(9,)", "stride": "(0,)"},  # expanded from one element
        {"size": 8, "shape": "(65536,65536)", "stride": "(0,0)"},
        {"size": 8, "shape": "(4,)", "stride": "(1,1)"},
        {"size": 8, "shape": "(1,1,1,1,1,1,1,1,1)", "stride": "(1,1,1,1,1,1,1,1,1)"},
    ],
    ids=str,
)
def test_tensors_beyond_their_storage_are_refused(claims: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    file.write_bytes(zip_of(tensor_pickle(**claims), _0=FLOATS.tobytes()))
    with memory_below(4 * MIB), pytest.raises(FormatError):
        read(file)


def test_a_tensor_within_its_storage_is_read(tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    claims: dict[str, Any] = {"size": 8, "offset": 1, "shape": "(2,3)", "stride": "(1,2)"}
    file.write_bytes(zip_of(tensor_pickle(**claims), _0=FLOATS.tobytes()))
    assert embeddings(read(file)).tolist() == [[1, 3, 5], [2, 4, 6]]


@pytest.mark.parametrize("claimed", [2**29, 9, 7])
def test_storages_of_the_older_container_are_compared_with_the_file(
    claimed: int, tmp_path: Path
) -> None:
    file = tmp_path / "decoder.pt"
    torch.save(torch.zeros(2, 4), file, _use_new_zipfile_serialization=False)
    data = bytearray(file.read_bytes())
    data[-40:-32] = struct.pack("<Q", claimed)
    file.write_bytes(data)
    with memory_below(4 * MIB), pytest.raises(FormatError, match="expected 8 elements"):
        read(file)


def test_a_checkpoint_of_two_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    pickled = tensor_pickle(size=2**29, shape=f"(1,{2**29})", stride="(1,1)")
    listed = pickle.dumps(["0"], protocol=2)
    data = legacy_of(pickled).removesuffix(pickle.dumps([], protocol=2)) + listed
    file.write_bytes(data + struct.pack("<Q", 2**29))
    with file.open("r+b") as sparse:
        sparse.truncate(len(data) + 8 + 2**31)
    with memory_below(4 * MIB), pytest.raises(FormatError, match="at most 1073741824 bytes"):
        read(file)


def test_a_damaged_storage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    data = zip_of(tensor_pickle(size=8, shape="(2,4)", stride="(4,1)"), _0=FLOATS.tobytes())
    file.write_bytes(data)
    assert embeddings(read(file)).tolist() == FLOATS.reshape(2, 4).tolist()
    file.write_bytes(data.replace(FLOATS.tobytes(), FLOATS[::-1].tobytes()))
    with pytest.raises(FormatError, match="damaged entry"):
        read(file)


def test_an_older_container_that_ends_early_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    torch.save(torch.zeros(2, 4), file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    for length in range(0, len(data), 3):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        if length > 1:
            with pytest.raises(FormatError):
                read(tmp_path / "cut.pt")


def test_an_entry_that_states_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    archive = zip_of(tensor_pickle(size=2**29), _0=FLOATS.tobytes())
    sizes = struct.pack("<II", 32, 32)
    assert archive.count(sizes) == 2
    file = tmp_path / "decoder.pt"
    for compressed, size in ((2**31, 2**31), (32, 2**29), (2**29, 2**29)):
        file.write_bytes(archive.replace(sizes, struct.pack("<II", compressed, size)))
        with memory_below(4 * MIB), pytest.raises(FormatError):
            read(file)


def test_a_compressed_storage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "decoder.pt"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(size=2**20))
        archive.writestr("archive/data/0", bytes(2**22))
    file.write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match="not compressed"):
        read(file)
