"""The address a server listens on, taken before anything that takes long."""

import socket


def bind(host: str, port: int) -> socket.socket:
    """Take the address for this process; callers are refused until somebody listens on it.

    Raises OSError with a sentence that names the address.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server before this one is gone
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot listen on {address(host, port)}: {reason}") from error
    return bound


def address(host: str, port: int) -> str:
    """Host and port as a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
