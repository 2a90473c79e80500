"""The fake world behind a real socket, in its own process.

``python -m tests.faults.fake_child FOLDER STEP_SECONDS``. Every tenant has the default limits. It
reads a JSON object of the limits of acme from standard input, prints the port and the keys as JSON,
and serves until standard input ends.
"""

import gc
import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import uvicorn

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.serve.http import bind
from prefixd.server.serve.logging import configure
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.quotas import DEFAULT_QUOTA
from tests.api.api_world import GatedRunner, make_world


class SteadyRunner(GatedRunner):
    """A runner whose every step takes the same time."""

    seconds = 0.0

    def run(self, step: Step) -> StepOutput:
        time.sleep(self.seconds)
        output = super().run(step)
        self.steps.clear()
        return output


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    configure("error", "json")
    runner = SteadyRunner()
    runner.seconds = seconds
    with make_world(folder, runner=runner) as world:
        world.limiter = Limiter(world.database)
        for name in ("acme", "beta"):
            world.tenants.set_quota(name, asdict(DEFAULT_QUOTA))
        world.tenants.set_quota("acme", json.loads(sys.stdin.readline()))
        world.add_tenant("acme")
        listener = bind("127.0.0.1", 0)
        config = uvicorn.Config(
            world.make_app(), log_config=None, access_log=False, ws="none", lifespan="on"
        )
        server = uvicorn.Server(config)

        def stop_at_end() -> None:
            sys.stdin.read()
            server.should_exit = True

        gc.collect()
        gc.freeze()  # as ``prefixd serve`` does
        threading.Thread(target=stop_at_end, daemon=True).start()
        print(json.dumps({"port": listener.getsockname()[1], "keys": world.keys}), flush=True)
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
