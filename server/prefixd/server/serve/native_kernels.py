"""What ``prefixd doctor`` reports of the kernels that serve."""

from importlib.metadata import PackageNotFoundError, version

import torch

from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.cpu.library import LibraryUnavailable, compiler_or, find_library
from prefixd.server.model.decoders import DecoderUnavailable, choose_kernels
from prefixd.server.model.exact import NotExact
from prefixd.server.model.native import require_dtype
from prefixd.server.serve.settings import Settings


def describe_kernels(settings: Settings, *, device: str) -> str:
    """What computes the model on ``device``. Raises DecoderUnavailable where the settings name
    kernels that cannot, as a start does."""
    if torch.device(device).type == "cpu":
        return _describe_native(settings)
    choice = settings.cpu_kernels
    if choice == "module":
        return "module, no kernels of its own: cpu_kernels is module"
    if choice != "auto":
        raise DecoderUnavailable(
            f"cpu_kernels is {choice} and the device {device}; expected auto or module there"
        )
    try:
        return f"paged (Triton {version('triton')}), compiled at the first start with a model"
    except PackageNotFoundError:
        return "module, no kernels of its own: Triton is not installed"


def _describe_native(settings: Settings) -> str:
    """The kernel set that serves by the settings, where its library comes from, and why the others
    do not; or why none does. Raises DecoderUnavailable where the settings name one that cannot, as
    a start does."""
    choice, dtype = settings.cpu_kernels, getattr(torch, settings.dtype)
    if settings.tensor_parallel > 1:
        return f"module, no native kernels: tensor_parallel is {settings.tensor_parallel}"
    if choice not in {"auto", *KERNELS}:
        return f"{choice}, no native kernels: cpu_kernels is {choice}"
    try:
        require_dtype(dtype)
        try:
            library = find_library(settings.root)
        except LibraryUnavailable as missing:
            compiler = compiler_or(missing).version
            named = "the native library" if choice == "auto" else choice
            return f"{named}, which the next start compiles with {compiler}: {missing}"
        kernels = choose_kernels(library, choice, dtype)
    except (NotExact, LibraryUnavailable) as reason:
        if choice == "auto":
            return f"torch alone, no native kernels: {reason}"
        raise DecoderUnavailable(f"cpu_kernels is {choice}, but {reason}") from reason
    at = library.kernels.index(kernels)
    unused = "faster in bfloat16 alone" if choice == "auto" else f"cpu_kernels is {choice}"
    states = library.states() | dict.fromkeys(library.kernels[at + 1 :], unused)
    slower = ", ".join(library.kernels[:at]) or "none"
    missing_sets = [
        f"not {name}: {state}"
        for name, state in states.items()
        if name not in library.kernels[: at + 1]
    ]
    text = f"{kernels} ({library.origin}, {library.path}); slower ones: {slower}"
    return "; ".join((text, *missing_sets))
