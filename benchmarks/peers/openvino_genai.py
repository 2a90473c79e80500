"""OpenVINO GenAI's continuous batching. It takes tokens only.

A prefix that was made of tokens runs as those tokens before the prompt; option ``caching`` keeps
its KV across requests.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.wire import Clock, Request, Result, Start, serve

KV_GIB, MAX_BATCHED_TOKENS, MAX_SEQUENCES = 2, 4096, 64
PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


class OpenVinoPeer:
    """A compiled model."""

    def __init__(self, start: Start) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = KV_GIB
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.max_num_seqs = MAX_SEQUENCES
        scheduler.enable_prefix_caching = bool(start.options.get("caching"))
        precision = PRECISIONS[start.dtype]
        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": start.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(start.model), scheduler_config=scheduler, device="CPU", properties=properties
        )
        self._tokens = {name: each.tokens or () for name, each in start.prefixes.items()}
        self._count = 0
        self.about = {
            "version": openvino_genai.__version__.partition("-")[0],
            "precision": f"{precision} inference and KV, float32 weights in the file",
            "capabilities": " ".join(capabilities),
        }

    def run(self, requests: Sequence[Request], output: int) -> Result:
        """Add all requests, then step until none is left."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output
        config.ignore_eos = True
        config.do_sample = False
        prompts = [
            [*(self._tokens[each.prefix] if each.prefix else ()), *each.tokens] for each in requests
        ]
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in requests]
        clock = Clock(len(requests))
        handles = []
        for each in inputs:
            self._count += 1
            handles.append(self._pipeline.add_request(self._count, each, config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    clock.token(index)
                    for part in handle.read().values():
                        tokens[index] += part.generated_ids
        return Result(clock.seconds, clock.first, tokens)


if __name__ == "__main__":
    serve(OpenVinoPeer)
