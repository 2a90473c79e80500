"""Run by ``test_bad_clients``: the fake world behind the socket of ``prefixd serve``.

``python -m tests.faults.clients_child FOLDER DESCRIPTORS MAX_CONNECTIONS``; 0 connections is the
default. Prints a JSON line with the port and the keys when it listens.
"""

import json
import resource
import sys
import time
from pathlib import Path

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.serve.connection_limits import ConnectionLimits, raise_descriptor_limit
from prefixd.server.serve.http import ConnectionTimeouts, bind, uvicorn_config
from prefixd.server.serve.logging import configure
from prefixd.server.serve.shutdown import DrainingServer
from tests.api import api_world

STEP_S = 0.005
"""Time of a step, in seconds: the fake model's alone would be that of the tests' machine."""

WRITE_TIMEOUT_S = 60.0
"""Longer than a round: the stalled readers are there during all of it."""


def main() -> None:
    folder, descriptors, connections = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors // 2, descriptors))
    limits = ConnectionLimits.of(
        descriptors=raise_descriptor_limit(),
        total=connections or None,
        per_address=connections or None,
        trusted="",
    )
    configure("info", "json")
    api_world.POOL_BLOCKS = 4096
    with api_world.make_world(folder) as world:
        run = world.runner.run

        def run_in_time(step: Step) -> StepOutput:
            time.sleep(STEP_S)
            output = run(step)
            world.runner.steps.clear()
            return output

        world.runner.run = run_in_time  # type: ignore[method-assign]
        listener = bind("127.0.0.1", 0)
        config = uvicorn_config(
            world.app,
            timeouts=ConnectionTimeouts(30.0, WRITE_TIMEOUT_S),
            limits=limits,
            metrics=world.metrics,
        )
        print(json.dumps({"port": listener.getsockname()[1], "keys": world.keys}), flush=True)
        DrainingServer(
            config, drain_state=world.drain_state, engine=world.engine, drain_timeout_s=0
        ).run(sockets=[listener])


if __name__ == "__main__":
    main()
