"""A cold prefix adds at most one chunk to each pass while streams run.

``benchmarks/cold_load.py`` measures the same in seconds on the demo model.
"""

import asyncio
import itertools
import threading
from pathlib import Path

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.testing import FakeRunner
from tests.faults.faults_model import Content
from tests.faults.faults_server import running
from tests.faults.faults_traffic import caller, complete, greedy

STREAMS, COLD, CHUNK, LONG = 16, 1024, 64, 900


class SlowRunner(FakeRunner):
    """Delays every step until the cold prefix is compiled, so that the streams do not end before
    all of them have started and the prefix is loaded."""

    compiled = False

    def run(self, step: Step) -> StepOutput:
        self.compiled = self.compiled or bool(step.compiles)
        if not self.compiled:
            threading.Event().wait(0.02)
        return super().run(step)


def test_a_cold_prefix_adds_at_most_one_chunk_to_a_step_and_every_stream_decodes_in_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with running(
        tiny_folder,
        tmp_path / "data",
        wrap=lambda _: SlowRunner(),
        max_prefill_chunk=CHUNK,
        max_virtual_tokens=COLD,
    ) as server:

        async def scenario() -> None:
            async with caller(server.url, server.keys["acme"]) as http:
                content = Content("soft", COLD, 1)
                response = await http.put("/v1/prefixes/cold", **content.body())
                assert response.status_code == 201, response.text
                streams = [
                    asyncio.create_task(complete(http, greedy("tiny", [5, 6, 7 + i], LONG)))
                    for i in range(STREAMS)
                ]
                while server.engine.stats().running < STREAMS:
                    await http.get("/health/live")
                cold_answer = await complete(http, greedy("cold", [9], 4))
                assert cold_answer.ok, cold_answer
                for answer in await asyncio.gather(*streams):
                    assert answer.ok, answer

        asyncio.run(scenario())
        steps: list[Step] = server.runner.steps
    compiling = [number for number, step in enumerate(steps) if step.compiles]
    sizes = [sum(part.stop - part.start for part in steps[i].compiles) for i in compiling]
    assert sum(sizes) == COLD
    assert max(sizes) <= CHUNK
    assert len(compiling) >= COLD // CHUNK
    running_ids = [{chunk.seq_id for chunk in steps[i].chunks} for i in compiling]
    assert len(running_ids[0]) >= STREAMS, "the streams ended before the load: raise LONG"
    for before, after in itertools.pairwise(compiling):
        # Each step has the same sequences as the one before, each with its next token.
        previous = {chunk.seq_id: chunk for chunk in steps[before].chunks}
        current = {chunk.seq_id: chunk for chunk in steps[after].chunks}
        assert after == before + 1
        assert set(current) == set(previous)
        assert all(
            current[one].start == previous[one].start + len(previous[one].tokens) for one in current
        )
        assert all(len(chunk.tokens) == 1 for chunk in current.values())
