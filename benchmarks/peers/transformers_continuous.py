"""transformers' continuous batching over a paged KV cache. It takes tokens only.

A prefix that was made of tokens runs as those tokens before the prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks.peers.wire import Clock, Request, Result, Start, serve


class ContinuousPeer:
    """A loaded model."""

    def __init__(self, start: Start) -> None:
        torch.set_num_threads(start.threads)
        dtype = getattr(torch, start.dtype)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            start.model, dtype=dtype
        ).eval()
        self._tokens = {name: each.tokens or () for name, each in start.prefixes.items()}
        self.about = {"version": transformers.__version__, "precision": start.dtype}

    def run(self, requests: Sequence[Request], output: int) -> Result:
        """All requests at once; when the first token came is not known."""
        prompts = [
            [*(self._tokens[each.prefix] if each.prefix else ()), *each.tokens] for each in requests
        ]
        config = transformers.GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        clock = Clock(len(requests))
        # With its warm-up, or under inference mode, it fails on a CPU.
        outputs = self._model.generate_batch(
            inputs=prompts, generation_config=config, warmup=False, progress_bar=False
        )
        seconds = clock.seconds
        by_number = sorted(outputs.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return Result(seconds, clock.first, [each.generated_tokens for _, each in by_number])


if __name__ == "__main__":
    serve(ContinuousPeer)
