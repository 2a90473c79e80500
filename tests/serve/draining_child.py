"""Run by ``test_draining``: the fake world under the server that drains, in its own process.

``python draining_child.py FOLDER DRAIN_TIMEOUT STEP_SECONDS CLOSING_SECONDS``. Prints a JSON line
with the port and a key when it listens, and one with the remaining threads when it has ended.
"""

import json
import sys
import threading
import time
from pathlib import Path

import structlog

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.serve.connection_limits import ConnectionLimits
from prefixd.server.serve.http import ConnectionTimeouts, bind, uvicorn_config
from prefixd.server.serve.logging import configure
from prefixd.server.serve.shutdown import DrainingServer
from tests.api.api_world import make_world

log = structlog.get_logger("draining_child")

JOIN_S = 10.0
"""Threads that end by themselves may do so after the server: on a busy machine they are late."""


def main() -> None:
    folder, drain_timeout_s, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    closing_s = int(sys.argv[4])
    configure("info", "json")
    with make_world(folder) as world:
        run = world.runner.run

        def run_slowly(step: Step) -> StepOutput:
            log.info("a step begins")
            time.sleep(seconds)
            return run(step)

        world.runner.run = run_slowly  # type: ignore[method-assign]
        listener = bind("127.0.0.1", 0)
        ready = {"port": listener.getsockname()[1], "key": world.keys["acme"]}
        print(json.dumps(ready), flush=True)
        DrainingServer(
            uvicorn_config(
                world.make_app(body_timeout=60.0),
                timeouts=ConnectionTimeouts(30.0, 30.0),
                limits=ConnectionLimits(100, 100),
                metrics=world.metrics,
            ),
            drain_state=world.drain_state,
            engine=world.engine,
            drain_timeout_s=drain_timeout_s,
            closing_s=closing_s,
        ).run(sockets=[listener])
        world.engine.core.scheduler.check_integrity()
        # The last resort is a timer: it ends with the process.
        others = {threading.main_thread()}
        others |= {thread for thread in threading.enumerate() if thread.name == "last-resort"}
        threads = set(threading.enumerate()) - others
        for thread in threads:
            thread.join(JOIN_S)
        names = [thread.name for thread in threads if thread.is_alive()]
        print(json.dumps({"threads": names}), flush=True)


if __name__ == "__main__":
    main()
