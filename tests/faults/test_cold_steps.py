"""Must be true 4, in steps: what a cold prefix may add to each pass while streams run.

The time it takes on the demo model is measured by ``benchmarks/cold_load.py``.
"""

import asyncio
import itertools
import threading
from pathlib import Path

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.testing import FakeRunner
from tests.faults.faults_model import Content
from tests.faults.faults_traffic import caller, complete, greedy
from tests.faults.faults_world import running

STREAMS, COLD, CHUNK, LONG = 16, 1024, 64, 900


class Patient(FakeRunner):
    """Until the cold prefix comes in a step takes some time, as it does with a model: the streams
    must not be over before all of them, and the prefix, are there."""

    came = False

    def run(self, step: Step) -> StepOutput:
        self.came = self.came or bool(step.compiles)
        if not self.came:
            threading.Event().wait(0.02)
        return super().run(step)


def test_a_cold_prefix_adds_one_chunk_to_a_step_and_no_stream_skips_one(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with running(
        tiny_folder,
        tmp_path / "data",
        wrap=lambda _: Patient(),
        max_prefill_chunk=CHUNK,
        max_virtual_tokens=COLD,
    ) as world:

        async def scenario() -> None:
            async with caller(world.url, world.keys["acme"]) as http:
                cold = Content("soft", COLD, 1)
                response = await http.put("/v1/prefixes/cold", **cold.body())
                assert response.status_code == 201, response.text
                streams = [
                    asyncio.create_task(complete(http, greedy("tiny", [5, 6, 7 + i], LONG)))
                    for i in range(STREAMS)
                ]
                while world.engine.stats().running < STREAMS:
                    await http.get("/health/live")
                late = await complete(http, greedy("cold", [9], 4))
                assert late.ok, late
                for answer in await asyncio.gather(*streams):
                    assert answer.ok, answer

        asyncio.run(scenario())
        steps: list[Step] = world.runner.steps
    compiling = [number for number, step in enumerate(steps) if step.compiles]
    sizes = [sum(part.stop - part.start for part in steps[i].compiles) for i in compiling]
    assert sum(sizes) == COLD
    assert max(sizes) <= CHUNK
    assert len(compiling) >= COLD // CHUNK
    beside = [{chunk.seq_id for chunk in steps[i].chunks} for i in compiling]
    assert len(beside[0]) >= STREAMS, "the streams were over before the load: raise LONG"
    for before, after in itertools.pairwise(compiling):
        # Every sequence of the step before is in this one, each with its next token.
        then = {chunk.seq_id: chunk for chunk in steps[before].chunks}
        now = {chunk.seq_id: chunk for chunk in steps[after].chunks}
        assert after == before + 1
        assert set(now) == set(then)
        assert all(now[one].start == then[one].start + len(then[one].tokens) for one in now)
        assert all(len(chunk.tokens) == 1 for chunk in now.values())
