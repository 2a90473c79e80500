"""transformers' continuous batching over a paged KV cache. It takes tokens only.

A prefix that was made of tokens runs as those tokens before the prompt. The manager stays alive
between runs: its start allocates the cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.peers.wire import Clock, Request, Result, Start, serve

PAGES, MAX_BATCHED_TOKENS = 256, 4096


class ContinuousPeer:
    """A loaded model whose manager runs."""

    def __init__(self, start: Start) -> None:
        torch.set_num_threads(start.threads)
        dtype = getattr(torch, start.dtype)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(start.model, dtype=dtype)
        self._manager = model.eval().init_continuous_batching(
            generation_config=transformers.GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=PAGES, max_batch_tokens=MAX_BATCHED_TOKENS, allow_block_sharing=False
            ),
        )
        self._manager.start()
        self._tokens = {name: each.tokens or () for name, each in start.prefixes.items()}
        self.about = {"version": transformers.__version__, "precision": start.dtype}

    def run(self, requests: Sequence[Request], output: int) -> Result:
        """Add all requests, then wait for the last token."""
        prompts = [
            [*(self._tokens[each.prefix] if each.prefix else ()), *each.tokens] for each in requests
        ]
        clock = Clock(len(requests))
        names = self._manager.add_requests(prompts, max_new_tokens=output, streaming=True)
        index_of = {name: index for index, name in enumerate(names)}
        tokens: list[list[int]] = [[] for _ in requests]
        remaining = len(requests)
        while remaining:
            answer = self._manager.get_result(timeout=60)
            if answer is None or answer.error:
                raise RuntimeError(f"no result: {answer and answer.error}")
            index = index_of[answer.request_id]
            clock.token(index)
            tokens[index] = list(answer.generated_tokens)
            remaining -= answer.is_finished()
        return Result(clock.seconds, clock.first, tokens)


if __name__ == "__main__":
    serve(ContinuousPeer)
