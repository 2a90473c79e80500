"""The native decoder over int8 layers: the setting ``quantize``.

The check of other decoders, against the model's own logits, cannot pass rounded weights. In its
place the decoder must predict ordinary text nearly as well as the unrounded model.
"""

import logging
from pathlib import Path

import torch

from prefixd.server.model.calibration import find_peaks
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.cpu.library import (
    LibraryUnavailable,
    compiler_or,
    find_library,
    processor_flags,
)
from prefixd.server.model.decoders import DecoderUnavailable, choose_kernels, native_kernels
from prefixd.server.model.exact import NotExact
from prefixd.server.model.int8 import Int8Parts
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.memory import return_free_memory
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.native import NativeDecoder, require_dtype
from prefixd.server.model.parts import Parts
from prefixd.server.model.plain_texts import CALIBRATION, EVALUATION, count_blocks, tokens_of
from prefixd.server.model.quality import Quality, predict, require_acceptable

log = logging.getLogger(__name__)


def require_native(choice: str, device: torch.device) -> None:
    """Raise DecoderUnavailable where the setting ``cpu_kernels`` or the device excludes native
    kernels."""
    if device.type != "cpu":
        raise DecoderUnavailable(f"quantize is int8 and the device {device}; expected the CPU")
    if choice not in {"auto", *KERNELS}:
        raise DecoderUnavailable(
            f"quantize is int8 and cpu_kernels is {choice}; expected auto or one of "
            f"{', '.join(KERNELS)}: native kernels alone compute int8"
        )


def describe_int8(choice: str, dtype: torch.dtype, device: torch.device, data_folder: Path) -> str:
    """The kernels that would compute int8, and by which products; compiles and loads nothing else.
    Raises DecoderUnavailable where no model could start, with the reason of a start."""
    require_native(choice, device)
    try:
        require_dtype(dtype)
        try:
            library = find_library(data_folder)
        except LibraryUnavailable as missing:
            return f"the next start compiles the native library with {compiler_or(missing).version}"
        kernels = choose_kernels(library, choice, dtype)
    except (NotExact, LibraryUnavailable) as reason:
        raise _unavailable(reason) from reason
    return f"{kernels}, by {_products(kernels)}"


def _products(kernels: str) -> str:
    """The instructions that multiply int8 in a kernel set: those of processor.cpp."""
    if kernels == "amx":
        return "AMX-INT8"
    if kernels == "avx512_bf16" or (kernels == "avx512" and "avx512_vnni" in processor_flags()):
        return "AVX512-VNNI"
    return "products of 16-bit pairs"


def _unavailable(reason: Exception) -> DecoderUnavailable:
    return DecoderUnavailable(f"quantize is int8, which native kernels alone compute, but {reason}")


def make_int8_decoder(
    base: LoadedBase,
    choice: str,
    *,
    num_blocks: int,
    block_size: int,
    data_folder: Path,
    threads: int = 1,
) -> tuple[NativeDecoder, Quality]:
    """Round the model, make the native decoder of it and measure its quality; arguments as of
    ``make_decoder``. Raises DecoderUnavailable, UnsupportedModel."""
    require_native(choice, base.device)
    try:
        library, kernels = native_kernels(Parts(base), choice, block_size, data_folder)
    except (NotExact, LibraryUnavailable) as reason:
        raise _unavailable(reason) from reason
    texts = tokens_of(base, EVALUATION)
    unrounded = ModuleDecoder(
        base, num_blocks=1 + count_blocks(texts, block_size), block_size=block_size
    )
    expected = predict(unrounded, texts)
    peaks = find_peaks(base, tokens_of(base, CALIBRATION), block_size=block_size)
    try:
        decoder = NativeDecoder(
            Int8Parts(base, peaks),
            library,
            kernels=kernels,
            num_blocks=num_blocks,
            block_size=block_size,
            threads=threads,
        )
        quality = Quality.of(predict(decoder, texts, num_blocks=num_blocks), expected)
    except RuntimeError as reason:
        raise DecoderUnavailable(f"quantize is int8, but {reason}") from reason
    log.info("int8: %s", quality)
    require_acceptable(quality, base.name)
    return_free_memory()
    return decoder, quality
