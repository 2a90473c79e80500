"""Servers that run batches and are killed.

``python -m tests.faults.batch_kills FOLDER SEED KILLS``. Each server is forked from this process,
which has imported everything: so one costs little. One or two of them run on the catalog in FOLDER
until they are killed; a batch that has ended is checked and followed by another one. Prints what
happened as JSON; a wrong answer ends it with an error.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.api.batches import line_runner, worker
from prefixd.server.tenants.batch_records import BatchRecord
from prefixd.server.tenants.batches import Batches, NewBatch
from prefixd.server.tenants.principal import Actor
from prefixd.store.file_store import Purpose
from tests.api.api_batches import line
from tests.api.api_world import World, fake_text, make_world
from tests.faults.fake_child import SteadyRunner

LINES = 60
STEP_S = 0.002
LEASE_S = 0.15
LONGEST_LIFE_S = 0.6
LIMIT_S = 120.0


def serve(folder: Path) -> None:
    """Run batches until the process is killed."""
    worker._POLL_S = 0.02
    line_runner.GROUP_S = 0.02
    line_runner.GROUP = 8
    runner = SteadyRunner()
    runner.seconds = STEP_S
    with make_world(folder, runner=runner) as world:
        world.batches = Batches(world.database, lease_s=LEASE_S)
        app = world.make_app(batch_options=BatchOptions(max_lines=4))

        async def run() -> None:
            async with app.router.lifespan_context(app):
                await asyncio.get_running_loop().create_future()

        asyncio.run(run())


def fork_server(folder: Path) -> int:
    """The process id of a new server."""
    pid = os.fork()
    if pid == 0:
        try:
            serve(folder)
        finally:
            os._exit(3)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "a server ended by itself"


def create(world: World, number: int) -> str:
    """A batch of LINES lines that no other batch has."""
    source = world.body_limits.upload_dir / "input"
    names = [f"b{number}l{index}" for index in range(LINES)]
    source.write_bytes(b"".join(line(name, {"prompt": name}) for name in names))
    files, key_id = world.store.files, world.keys["acme"].split("_")[1]
    blob = files.write(source, tenant="acme")
    with files.change() as connection:
        file = files.add(
            connection, blob, purpose=Purpose.BATCH, filename="x", kept=None, creator=key_id
        )
    new = NewBatch("/v1/completions", file.id, "24h", timedelta(days=1), {})
    return world.batches.create(new, actor=Actor("acme", key_id)).id


def check(world: World, batch: BatchRecord, number: int) -> None:
    """Every line of an ended batch has its one answer, in order."""
    assert batch.status == "completed", batch
    assert (batch.total, batch.completed, batch.failed) == (LINES, LINES, 0), batch
    assert batch.error_file_id is None
    assert batch.output_file_id is not None
    file = world.store.files.get(batch.output_file_id, tenant="acme")
    text = world.store.fetch(tenant="acme", digest=file.digest).read_text()
    answers = [json.loads(row) for row in text.splitlines()]
    names = [f"b{number}l{index}" for index in range(LINES)]
    assert [answer["custom_id"] for answer in answers] == names
    for name, answer in zip(names, answers, strict=True):
        assert answer["response"]["body"]["choices"][0]["text"] == fake_text(None, name, 4)


def main() -> None:
    folder, rng, kills = Path(sys.argv[1]), random.Random(sys.argv[2]), int(sys.argv[3])
    seen: Counter[str] = Counter()
    current, number, killed, done = "", -1, 0, 0
    deadline = time.monotonic() + LIMIT_S
    while killed < kills or current:
        with make_world(folder) as world:  # closed before the fork: SQLite does not survive one
            if current:
                batch = world.batches.get(current, tenant="acme")
                seen[batch.status] += 1
                if batch.has_ended:
                    check(world, batch, number)
                    current, done = "", done + 1
            if not current and killed < kills:
                number += 1
                current = create(world, number)
        if not current:
            break
        assert time.monotonic() < deadline, f"{killed} kills, {seen}"
        servers = [fork_server(folder) for _ in range(rng.choice([1, 1, 2]))]
        for pid in servers:
            time.sleep(rng.random() * LONGEST_LIFE_S)
            kill(pid)
            killed += 1
    print(json.dumps({"kills": killed, "batches": done, "seen": seen}))


if __name__ == "__main__":
    main()
