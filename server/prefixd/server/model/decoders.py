"""Which decoder serves a base: the choice of the setting ``cpu_kernels``."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefixd.server.model.buffers import NO_STEP, StepSizes
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.cpu.library import (
    LibraryUnavailable,
    NativeLibrary,
    find_or_compile_library,
)
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoder_check import DecoderRefused, Evidence, check_decoder
from prefixd.server.model.exact import NotExact
from prefixd.server.model.graphs import cuda_graphs
from prefixd.server.model.lean import LeanDecoder
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.memory import return_free_memory
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.native import NativeDecoder, refuse_native
from prefixd.server.model.paged import PagedDecoder
from prefixd.server.model.paged_module import PagedModuleDecoder
from prefixd.server.model.pair_decoder import PairDecoder
from prefixd.server.model.parts import Parts

log = logging.getLogger(__name__)

CHOICES = ("auto", "module", "torch", *KERNELS)
"""Values of the setting. ``auto`` on a CPU: the fastest native kernels that fit the model and the
processor, else lean layers in torch, else the unmodified module."""

PAGED = ("paged", "paged_module")
"""What ``auto`` takes on a GPU before the unmodified module: lean layers with our kernels, else the
module with attention by our kernels. On a CPU, whose operators are slow references, tests take
them."""


class DecoderUnavailable(Exception):
    """The decoder that the setting names cannot serve; the message says why."""


def choose_decoder(
    load: Callable[[], LoadedBase],
    base: LoadedBase,
    choice: str,
    *,
    evidence: Evidence,
    num_blocks: int,
    block_size: int,
    data_folder: Path,
    threads: int = 1,
    sizes: StepSizes = NO_STEP,
) -> Decoder:
    """Make the decoder of ``choice`` and check it; in place of one that fails, ``auto`` takes the
    next slower one, of a base that ``load`` loads again. On a GPU decode steps are then captured.
    Raises DecoderUnavailable."""
    on_gpu = base.device.type != "cpu"
    attempts = (*PAGED, "module") if on_gpu else ("auto", "torch", "module")
    failed = None
    for attempt in attempts if choice == "auto" else (choice,):
        if attempt == failed:
            continue
        if failed is not None:
            base = load()  # the weights were taken from the module
        try:
            return _checked(
                make_decoder(
                    base,
                    attempt,
                    num_blocks=num_blocks,
                    block_size=block_size,
                    data_folder=data_folder,
                    threads=threads,
                    sizes=sizes,
                ),
                evidence,
                num_blocks=num_blocks,
                sizes=sizes,
            )
        except Exception as reason:
            # Triton's errors, which only a GPU gives, have no class in common.
            if not (on_gpu or isinstance(reason, DecoderRefused | RuntimeError)):
                raise
            if choice != "auto" or attempt == "module":
                raise DecoderUnavailable(f"cpu_kernels is {choice}, but {reason}") from reason
            failed = reason.decoder if isinstance(reason, DecoderRefused) else attempt
            log.warning("a slower decoder serves: %s", reason)
    raise AssertionError("the module is not refused")


def _checked(decoder: Decoder, evidence: Evidence, *, num_blocks: int, sizes: StepSizes) -> Decoder:
    """The decoder, with graphs on a GPU; the unmodified module has been checked before. Raises
    DecoderRefused."""
    if decoder.name != "module":
        check_decoder(decoder, evidence, num_blocks=num_blocks)
    if isinstance(decoder, PagedDecoder) and decoder.device.type == "cuda":
        try:
            decoder.capture(sizes.decoding, new_graph=cuda_graphs())
        except RuntimeError as reason:
            log.warning("decode steps run without graphs: %s", reason)
    return_free_memory()
    return decoder


def make_pair_decoder(
    base: LoadedBase, choice: str, *, num_blocks: int, block_size: int
) -> PairDecoder:
    """Make the decoder of an encoder-decoder, which ``check_pair`` has checked. Raises
    DecoderUnavailable for a choice other than ``auto`` and ``module``."""
    if choice not in {"auto", "module"}:
        raise DecoderUnavailable(
            f"cpu_kernels is {choice}, but {base.name} is an encoder-decoder, which its module's "
            "layers alone compute; expected auto or module"
        )
    return PairDecoder(base, num_blocks=num_blocks, block_size=block_size)


def make_decoder(
    base: LoadedBase,
    choice: str,
    *,
    num_blocks: int,
    block_size: int,
    data_folder: Path,
    threads: int = 1,
    sizes: StepSizes = NO_STEP,
) -> Decoder:
    """Make the decoder of ``choice``, one of CHOICES or PAGED. ``data_folder`` holds compiled
    libraries; ``threads`` are for packing weights, until ``set_threads`` sets others.

    Any but ``module`` takes the weights from the base's module. Raises DecoderUnavailable for a
    choice other than ``auto`` and those of PAGED that does not fit.
    """
    pool: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size}
    on_gpu = base.device.type != "cpu"
    if on_gpu and choice not in {"auto", "module", *PAGED}:
        raise DecoderUnavailable(
            f"cpu_kernels is {choice} and the device {base.device}; expected auto or module there"
        )
    if choice == "module":
        return ModuleDecoder(base, **pool, sizes=sizes)
    if on_gpu or choice in PAGED:
        return _paged(base, choice, pool, sizes)
    try:
        parts = Parts(base)
    except NotExact as reason:
        _require_auto(choice, reason)
        log.info("the unmodified module serves: %s", reason)
        return ModuleDecoder(base, **pool)
    if choice != "torch":
        try:
            library, kernels = native_kernels(parts, choice, block_size, data_folder)
        except (NotExact, LibraryUnavailable) as reason:
            _require_auto(choice, reason)
            log.info("lean layers in torch serve, no native kernels: %s", reason)
        else:
            return NativeDecoder(parts, library, kernels=kernels, **pool, threads=threads)
    return LeanDecoder(parts, **pool)


def _paged(
    base: LoadedBase, choice: str, pool: dict[str, Any], sizes: StepSizes
) -> ModuleDecoder | PagedDecoder:
    """The first that fits the model: lean layers with our kernels, unless ``choice`` leaves them
    out, the module with our attention, the unmodified module."""
    if choice != "paged_module":
        try:
            return PagedDecoder(Parts(base), **pool, sizes=sizes)
        except NotExact as reason:
            log.info("the layers of the unmodified module serve: %s", reason)
    try:
        return PagedModuleDecoder(base, **pool, sizes=sizes)
    except NotExact as reason:
        log.info("the unmodified module serves: %s", reason)
    return ModuleDecoder(base, **pool, sizes=sizes)


def _require_auto(choice: str, reason: Exception) -> None:
    """Raise DecoderUnavailable where the setting names a decoder."""
    if choice != "auto":
        raise DecoderUnavailable(f"cpu_kernels is {choice}, but {reason}") from reason


def native_kernels(
    parts: Parts, choice: str, block_size: int, data_folder: Path
) -> tuple[NativeLibrary, str]:
    """The library, and the kernels of it that serve: those of ``choice``, ``auto`` or one of
    KERNELS. Raises NotExact, LibraryUnavailable."""
    refuse_native(parts, block_size=block_size)
    library = find_or_compile_library(data_folder)
    return library, choose_kernels(library, choice, parts.base.dtype)


def choose_kernels(library: NativeLibrary, choice: str, dtype: torch.dtype) -> str:
    """The kernels of ``choice``, ``auto`` or one of KERNELS. Raises LibraryUnavailable."""
    kernels = _best(library, dtype) if choice == "auto" else choice
    if kernels not in library.kernels:
        raise LibraryUnavailable(
            f"{library.states()[kernels]}; available here: {', '.join(library.kernels)}"
        )
    return kernels


def _best(library: NativeLibrary, dtype: torch.dtype) -> str:
    """The fastest kernels: those after AVX-512 differ from it in bfloat16 alone."""
    suited = KERNELS if dtype is torch.bfloat16 else KERNELS[: KERNELS.index("avx512") + 1]
    return [kernels for kernels in library.kernels if kernels in suited][-1]
