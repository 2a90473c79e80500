"""Which decoder serves a base: the choice of the setting ``cpu_kernels``."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.cpu.library import (
    LibraryUnavailable,
    NativeLibrary,
    find_or_compile_library,
)
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoder_check import DecoderRefused, Evidence, check_decoder
from prefixd.server.model.exact import NotExact
from prefixd.server.model.lean import LeanDecoder
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.memory import return_free_memory
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.native import NativeDecoder, refuse_native
from prefixd.server.model.parts import Parts

log = logging.getLogger(__name__)

CHOICES = ("auto", "module", "torch", *KERNELS)
"""Values of the setting. ``auto``: the fastest native kernels that fit the model and the processor,
else lean layers in torch, else the unmodified module."""


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
) -> Decoder:
    """Make the decoder of ``choice`` and check it; in place of one that fails, ``auto`` takes the
    next slower one, of a base that ``load`` loads again. Raises DecoderUnavailable."""
    failed = None
    for attempt in ("auto", "torch", "module") if choice == "auto" else (choice,):
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
                ),
                evidence,
                num_blocks,
            )
        except (DecoderRefused, RuntimeError) as reason:
            if choice != "auto" or attempt == "module":
                raise DecoderUnavailable(f"cpu_kernels is {choice}, but {reason}") from reason
            failed = reason.decoder if isinstance(reason, DecoderRefused) else attempt
            log.warning("a slower decoder serves: %s", reason)
    raise AssertionError("the module is not refused")


def _checked(decoder: Decoder, evidence: Evidence, num_blocks: int) -> Decoder:
    """The decoder; the unmodified module has been checked before. Raises DecoderRefused."""
    if decoder.name != "module":
        check_decoder(decoder, evidence, num_blocks=num_blocks)
    return_free_memory()
    return decoder


def make_decoder(
    base: LoadedBase,
    choice: str,
    *,
    num_blocks: int,
    block_size: int,
    data_folder: Path,
    threads: int = 1,
) -> Decoder:
    """Make the decoder of ``choice``, one of CHOICES. ``data_folder`` holds compiled libraries;
    ``threads`` are for packing weights, until ``set_threads`` sets others.

    Any but ``module`` takes the weights from the base's module. Raises DecoderUnavailable for a
    choice other than ``auto`` that does not fit.
    """
    if base.device.type != "cpu" and choice not in {"auto", "module"}:
        raise DecoderUnavailable(
            f"cpu_kernels is {choice} and the device {base.device}; expected auto or module there"
        )
    if choice == "module" or base.device.type != "cpu":
        return ModuleDecoder(base, num_blocks=num_blocks, block_size=block_size)
    try:
        parts = Parts(base)
    except NotExact as reason:
        _require_auto(choice, reason)
        log.info("the unmodified module serves: %s", reason)
        return ModuleDecoder(base, num_blocks=num_blocks, block_size=block_size)
    if choice != "torch":
        try:
            library, kernels = native_kernels(parts, choice, block_size, data_folder)
        except (NotExact, LibraryUnavailable) as reason:
            _require_auto(choice, reason)
            log.info("lean layers in torch serve, no native kernels: %s", reason)
        else:
            return NativeDecoder(
                parts,
                library,
                kernels=kernels,
                num_blocks=num_blocks,
                block_size=block_size,
                threads=threads,
            )
    return LeanDecoder(parts, num_blocks=num_blocks, block_size=block_size)


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
