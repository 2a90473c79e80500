"""What ``prefixd doctor`` reports of the native kernels; loads no torch."""

from prefixd.server.model.cpu.library import LibraryUnavailable, find_library
from prefixd.server.serve.settings import Settings


def describe_kernels(settings: Settings) -> str:
    """The fastest kernel set here, where its library comes from, and why the others do not serve;
    or why there is no library."""
    try:
        library = find_library(settings.root)
    except LibraryUnavailable as error:
        return f"torch alone, no native library: {error}"
    states = library.states()
    best = library.kernels[-1]
    slower = ", ".join(library.kernels[:-1]) or "none"
    missing = "; ".join(
        f"not {name}: {state}" for name, state in states.items() if name not in library.kernels
    )
    text = f"{best} ({library.origin}, {library.path}); slower ones: {slower}"
    return f"{text}; {missing}" if missing else text
