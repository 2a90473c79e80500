"""PEFT: one ``PeftModel`` with all adapters loaded, one request after another.

A request on the base runs with the adapter disabled. The time to a request's first token includes
the requests before it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import peft
import torch
import transformers

from benchmarks.peers.transformers_static import FirstToken
from benchmarks.peers.wire import Clock, Request, Result, Start, serve


class PeftPeer:
    """A loaded model with every prefix as an adapter."""

    def __init__(self, start: Start) -> None:
        torch.set_num_threads(start.threads)
        dtype = getattr(torch, start.dtype)
        base = transformers.AutoModelForCausalLM.from_pretrained(start.model, dtype=dtype)
        (first, folder), *others = ((name, each.folder) for name, each in start.prefixes.items())
        self._model: Any = peft.PeftModel.from_pretrained(base, folder, adapter_name=first)
        for name, each in others:
            self._model.load_adapter(each, adapter_name=name)
        self._model.eval()
        self.about = {"version": peft.__version__, "precision": start.dtype}

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], output: int) -> Result:
        """One request after another."""
        clock = Clock(len(requests))
        tokens = [self._one(request, output, clock, i) for i, request in enumerate(requests)]
        return Result(clock.seconds, clock.first, tokens)

    def _one(self, request: Request, output: int, clock: Clock, index: int) -> list[int]:
        ids = torch.tensor([request.tokens])
        if request.prefix is not None:
            self._model.set_adapter(request.prefix)
        on_base = request.prefix is None
        with self._model.disable_adapter() if on_base else nullcontext():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=output,
                max_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
                logits_processor=[FirstToken(clock, index)],
            )
        answer: list[int] = generated[0, -output:].tolist()
        return answer


if __name__ == "__main__":
    serve(PeftPeer)
