"""transformers' ``generate`` on one static batch of all requests.

Soft prompts are concatenated before the word embeddings. A prefix that was made of tokens runs as
those tokens before the prompt: ``generate`` has nothing that keeps it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from benchmarks.peers.wire import Clock, Prefix, Request, Result, Start, serve


class StaticPeer:
    """A loaded model with the embeddings of all prefixes."""

    def __init__(self, start: Start) -> None:
        torch.set_num_threads(start.threads)
        dtype = getattr(torch, start.dtype)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            start.model, dtype=dtype
        ).eval()
        self._embed = self._model.get_input_embeddings()
        self._prefixes = {name: self._embedded(each) for name, each in start.prefixes.items()}
        self.about = {"version": transformers.__version__, "precision": start.dtype}

    @torch.inference_mode()
    def _embedded(self, prefix: Prefix) -> torch.Tensor:
        """[num_virtual_tokens, hidden]."""
        if prefix.tokens is not None:
            embedded: torch.Tensor = self._embed(torch.tensor(prefix.tokens))
            return embedded
        weights = load_file(prefix.folder / "adapter_model.safetensors")["prompt_embeddings"]
        return weights.to(self._model.dtype)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], output: int) -> Result:
        """All requests must have the same length, so that none is padded."""
        ids = torch.tensor([request.tokens for request in requests])
        clock = Clock(len(requests))
        inputs: dict[str, torch.Tensor] = {"input_ids": ids}
        if requests[0].prefix is not None:
            prefixes = [self._prefixes[request.prefix or ""] for request in requests]
            inputs = {"inputs_embeds": torch.cat([torch.stack(prefixes), self._embed(ids)], 1)}
        width = next(iter(inputs.values())).shape[1]
        generated = self._model.generate(
            **inputs,
            attention_mask=torch.ones(len(ids), width, dtype=torch.long),
            min_new_tokens=output,
            max_new_tokens=output,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[FirstToken(clock)],
        )
        seconds = clock.seconds
        return Result(seconds, clock.first, generated[:, -output:].tolist())


class FirstToken:
    """A logits processor that changes nothing: its first call is the end of the prefill, of request
    ``index`` or of all."""

    def __init__(self, clock: Clock, index: int | None = None) -> None:
        self._clock = clock
        self._index = index

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._index is None:
            self._clock.tokens()
        else:
            self._clock.token(self._index)
        return scores


if __name__ == "__main__":
    serve(StaticPeer)
