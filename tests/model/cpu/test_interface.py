"""The ctypes declarations are those of prefixd_cpu.h."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from prefixd.server.model.cpu import interface
from prefixd.server.model.cpu.build import SOURCES, abi_of, find_compiler

HEADER = (SOURCES / "prefixd_cpu.h").read_text("utf-8")
STRUCTURES = {
    "pfx_shape": interface.Shape,
    "pfx_linear": interface.Linear,
    "pfx_layer": interface.Layer,
    "pfx_step": interface.Step,
    "pfx_counters": interface.Counters,
}
VALUES: dict[str, Any] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "int": ctypes.c_int}
VALUES |= {"uint32_t": ctypes.c_uint32, "void": None, "const char *": ctypes.c_char_p}


def declared_functions() -> dict[str, tuple[str, list[str]]]:
    """Result and arguments of each function, without argument names."""
    text = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
    pattern = r"PFX_EXPORT ([\w ]+?[ *]+)(pfx_\w+)\(([^)]*)\);"
    functions = {}
    for result, name, arguments in re.findall(pattern, text):
        listed = [one.strip() for one in arguments.split(",") if one.strip() != "void"]
        functions[name] = (result.strip(), [re.sub(r"\s*\w+$", "", one) or one for one in listed])
    return functions


def test_every_function_is_declared():
    assert set(interface.FUNCTIONS) == set(declared_functions())


@pytest.mark.parametrize("name", interface.FUNCTIONS)
def test_function_has_the_types_of_the_header(name: str):
    result, arguments = declared_functions()[name]
    expected, declared = interface.FUNCTIONS[name]
    pointer = "*" in result and "char" not in result
    assert expected == (ctypes.c_void_p if pointer else VALUES[result])
    assert len(declared) == len(arguments)
    for kind, text in zip(declared, arguments, strict=True):
        structure = next((s for n, s in STRUCTURES.items() if re.search(rf"\b{n}\b", text)), None)
        if structure is not None:
            assert kind is ctypes.POINTER(structure), text
        elif "*" in text:
            assert kind is ctypes.c_void_p, text
        else:
            assert kind is VALUES[text], text


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_structures_have_the_layout_of_the_header(tmp_path: Path):
    lines = ["#include <cstddef>", '#include "prefixd_cpu.h"']
    for name, structure in STRUCTURES.items():
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for field, *_ in structure._fields_:
            offset = getattr(structure, field).offset
            lines.append(f"static_assert(offsetof({name}, {field}) == {offset});")
        count = len(structure._fields_)
        values = ", ".join(["{}"] * count)
        lines.append(f"{name} all_fields_of_{name} = {{{values}}};")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines))
    command = [*find_compiler().command, "-std=c++17", "-fsyntax-only", f"-I{SOURCES}"]
    command += ["-Wall", "-Wextra", "-Werror", str(source)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_version_and_kernel_numbers_are_those_of_the_header():
    assert abi_of() == interface.ABI
    numbers = re.search(r"enum pfx_isa \{(.*?)\}", HEADER, re.DOTALL)
    assert numbers is not None
    names = re.findall(r"PFX_(\w+) = (\d+)", numbers[1])
    assert [(name.lower(), int(number)) for name, number in names] == [
        (name, number) for number, name in enumerate(interface.KERNELS)
    ]
    assert re.search(r"PFX_F32 = 0, PFX_BF16 = 1", HEADER)
    assert (interface.F32, interface.BF16) == (0, 1)
