"""PEFT: all adapters loaded over one base, one request after another.

A ``PeftModel`` holds prompts or KV prefixes and not both, so there are two over the same base.
The time to a request's first token includes
the requests before it.
"""

from collections.abc import Sequence
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
        self._base: Any = base.eval()
        self._models: dict[str, Any] = {}
        by_kind: dict[str, Any] = {}
        for name, each in start.prefixes.items():
            if each.kind in by_kind:
                by_kind[each.kind].load_adapter(each.folder, adapter_name=name)
            else:
                model = peft.PeftModel.from_pretrained(base, each.folder, adapter_name=name)
                by_kind[each.kind] = model.eval()
            self._models[name] = by_kind[each.kind]
        self.about = {"version": peft.__version__, "precision": start.dtype}

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], output: int) -> Result:
        """One request after another."""
        clock = Clock(len(requests))
        tokens = [self._one(request, output, clock, i) for i, request in enumerate(requests)]
        return Result(clock.seconds, clock.first, tokens)

    def _one(self, request: Request, output: int, clock: Clock, index: int) -> list[int]:
        ids = torch.tensor([request.tokens])
        model = self._base
        if request.prefix is not None:
            model = self._models[request.prefix]
            model.set_adapter(request.prefix)
        generated = model.generate(
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
