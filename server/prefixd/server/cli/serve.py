"""``prefixd serve``: one base model and the prefixes of all tenants over HTTP."""

import gc
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from prefixd.server.cli.options import demo_model_packages, reported_errors, with_settings
from prefixd.server.cli.output import fail
from prefixd.server.serve.settings import Settings

if TYPE_CHECKING:
    from prefixd.server.serve.build import Server
    from prefixd.server.tenants.registry import Tenants


@with_settings()
def serve(settings: Settings) -> None:
    """Serve one base model and the prefixes of all tenants over HTTP."""
    import structlog

    from prefixd.server.serve import logging
    from prefixd.server.serve.data_folder import check_data_folder
    from prefixd.server.serve.http import bind
    from prefixd.server.serve.shutdown import exit_process, exits_at_signals

    logging.configure(settings.log_level, settings.log_format)
    with exits_at_signals():
        with reported_errors():
            check_data_folder(settings.root)  # before torch is imported: that takes seconds
            listener = bind(settings.host, settings.port)
        with listener:
            structlog.get_logger("prefixd").info(
                "loading", model=settings.model, dtype=settings.dtype, data_dir=str(settings.root)
            )
            server = load_server(settings)
            show_first_key(server.tenants)
            failed = _run(server, settings, listener)
        exit_process(1 if failed else 0)


def _run(server: "Server", settings: Settings, listener: socket.socket) -> bool:
    """Serve on a bound socket until a signal ends the server, or a failure: then True."""
    import structlog

    from prefixd.server.serve.connection_limits import ConnectionLimits, raise_descriptor_limit
    from prefixd.server.serve.http import ConnectionTimeouts, address, uvicorn_config
    from prefixd.server.serve.shutdown import DrainingServer

    limits = ConnectionLimits.of(
        descriptors=raise_descriptor_limit(),
        total=settings.max_connections,
        per_address=settings.max_connections_per_address,
        trusted=settings.trusted_proxies or "",
    )
    host, port = listener.getsockname()[:2]
    structlog.get_logger("prefixd").info(
        "serving",
        url=f"http://{address(host, port)}",
        model=server.served.name,
        dtype=settings.dtype,
        device=server.device,
        kernels=server.kernels,
        quantize=settings.quantize,
        weights=server.served.decoder.weights or "plain",
        tensor_parallel=settings.tensor_parallel,
        kv_tokens=settings.kv_tokens,
        max_positions=server.served.max_positions,
        max_connections=limits.total,
    )
    # A full collection of what stays, such as the modules of torch, stops every thread for 0.1 s.
    gc.collect()
    gc.freeze()
    serving = DrainingServer(
        uvicorn_config(
            server.app,
            timeouts=ConnectionTimeouts(settings.body_timeout, settings.write_timeout),
            limits=limits,
            metrics=server.metrics,
        ),
        drain_state=server.drain_state,
        engine=server.engine,
        drain_timeout_s=settings.shutdown_timeout,
    )
    if server.followers is not None:
        server.followers.watch(serving.fail)
    serving.run(sockets=[listener])
    return serving.failure is not None


def show_first_key(tenants: "Tenants") -> None:
    """On a catalog without any key, issue the operator's and print it: to the terminal and never
    to the log, which is kept and shipped elsewhere."""
    issued = tenants.bootstrap()
    if issued is not None:
        typer.echo(
            f"prefixd: the catalog has no API key yet. The operator's key, shown once:\n\n"
            f"    {issued.text}\n\nKeep it: it is not stored and cannot be shown again.",
            err=True,
        )


def load_server(settings: Settings) -> "Server":
    """A server over the real model; a model that cannot be served ends the verb with the reason."""
    gc.disable()  # modules stay: searching them for garbage takes a fifth of the import
    try:
        from prefixd.server.serve.build import MODEL_ERRORS, build_server
    finally:
        gc.freeze()
        gc.enable()

    with reported_errors():
        try:
            return build_server(settings)
        except MODEL_ERRORS as error:
            fail(str(error))
        except ImportError:
            # transformers raises this when it converts the demo model without gguf.
            if settings.model == "demo" and find_spec("gguf") is None:
                try:
                    demo_model_packages()
                except LookupError as error:
                    fail(str(error))
            raise
