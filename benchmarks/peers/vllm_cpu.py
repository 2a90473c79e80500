"""vLLM's CPU build, driven through its engine in this process.

A prefix is given as ``prompt_embeds``: vLLM has no other way to take a soft prompt, and a prefix
that was made of tokens is given as their word embeddings. Option ``embeds``: whether the engine
accepts them; ``caching``: its prefix caching, which can keep a prefix across requests.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.wire import Clock, Prefix, Request, Result, Start, serve

MAX_LEN, MAX_BATCHED_TOKENS, MAX_SEQUENCES, KV_GIB = 4096, 4096, 64, 2


class VllmPeer:
    """A loaded engine with the embeddings of all prefixes."""

    def __init__(self, start: Start) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE=str(KV_GIB),
            VLLM_CPU_OMP_THREADS_BIND=f"0-{start.threads - 1}" if start.threads > 1 else "0",
            VLLM_CPU_NUM_OF_RESERVED_CPU="0",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="WARNING",
            HF_HUB_OFFLINE="1",
        )
        import torch  # noqa: PLC0415  # after the variables above, which are read at import
        import vllm  # noqa: PLC0415
        from safetensors.torch import load_file  # noqa: PLC0415

        self._load_file = load_file
        self._torch: Any = torch
        caching = bool(start.options.get("caching"))
        self._engine = vllm.LLM(
            model=str(start.model),
            dtype=start.dtype,
            max_model_len=MAX_LEN,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            enable_prompt_embeds=bool(start.options.get("embeds")),
            enable_prefix_caching=caching,
            disable_log_stats=True,
            seed=0,
        ).llm_engine
        self._vllm: Any = vllm
        weights = load_file(start.model / "model.safetensors")
        self._table = weights["model.embed_tokens.weight"].to(getattr(torch, start.dtype))
        self._prefixes = {}
        if start.options.get("embeds"):
            self._prefixes = {name: self._embedded(each) for name, each in start.prefixes.items()}
        self._count = 0
        self.about = {
            "version": vllm.__version__,
            "precision": start.dtype,
            "caching": str(caching),
            "kernels": str(torch.backends.cpu.get_cpu_capability()),
            "preloaded": " ".join(Path(each).name for each in _preloaded()),
        }

    def _embedded(self, prefix: Prefix) -> Any:
        """[num_virtual_tokens, hidden]."""
        if prefix.tokens is not None:
            return self._table[list(prefix.tokens)]
        loaded = self._load_file(prefix.folder / "adapter_model.safetensors")
        return loaded["prompt_embeddings"].to(self._table.dtype)

    def _prompt(self, request: Request) -> dict[str, Any]:
        if request.prefix is None:
            return {"prompt_token_ids": list(request.tokens)}
        parts = [self._prefixes[request.prefix], self._table[list(request.tokens)]]
        return {"prompt_embeds": self._torch.cat(parts, 0)}

    def run(self, requests: Sequence[Request], output: int) -> Result:
        """Add all requests, then step until none is left. The embeddings of a request are looked
        up before the clock starts."""
        sampling = self._vllm.SamplingParams(
            temperature=0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        prompts = [self._prompt(request) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        clock = Clock(len(requests))
        self._count += 1
        for index, prompt in enumerate(prompts):
            self._engine.add_request(f"{self._count}-{index}", prompt, sampling)
        while self._engine.has_unfinished_requests():
            for answer in self._engine.step():
                index = int(answer.request_id.split("-")[1])
                tokens[index] = list(answer.outputs[0].token_ids)
                if tokens[index]:
                    clock.token(index)
        return Result(clock.seconds, clock.first, tokens)


def _preloaded() -> list[str]:
    return [each for each in os.environ.get("LD_PRELOAD", "").split(":") if each]


if __name__ == "__main__":
    serve(VllmPeer)
