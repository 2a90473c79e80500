"""Run by ``test_draining``: the fake world under the server that drains, in its own process.

``python draining_child.py FOLDER PATIENCE STEP_SECONDS``. Prints a JSON line with the port and a
key when it listens, and one with the threads that are left when it has ended.
"""

import json
import sys
import threading
import time
from pathlib import Path

import structlog
import uvicorn

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.serve.header_timeout import impatient
from prefixd.server.serve.logging import configure
from prefixd.server.serve.shutdown import DrainingServer
from tests.api.api_world import make_world

log = structlog.get_logger("draining_child")


def main() -> None:
    folder, patience, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    configure("info", "json")
    with make_world(folder) as world:
        run = world.runner.run

        def slowly(step: Step) -> StepOutput:
            log.info("a step begins")
            time.sleep(seconds)
            return run(step)

        world.runner.run = slowly  # type: ignore[method-assign]
        config = uvicorn.Config(
            world.app, http=impatient(30), port=0, lifespan="on", log_config=None, access_log=False
        )
        bound = config.bind_socket()
        print(json.dumps({"port": bound.getsockname()[1], "key": world.keys["acme"]}), flush=True)
        DrainingServer(
            config,
            drain_state=world.drain_state,
            engine=world.engine,
            patience=patience,
            closing=1,
        ).run(sockets=[bound])
        world.engine.loop.scheduler.check_integrity()
        staying = [one for one in threading.enumerate() if one is not threading.main_thread()]
        for thread in staying:
            thread.join(None if not thread.daemon else 0)
        left = [one.name for one in staying if one.is_alive() and one.name != "last-resort"]
        print(json.dumps({"threads": left}), flush=True)


if __name__ == "__main__":
    main()
