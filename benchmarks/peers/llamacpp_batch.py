"""llama.cpp through its C API: all requests in one batch, each a sequence of its KV cache.

A soft prompt is given as embeddings before the prompt's tokens, in a batch of its own, since a
batch holds either. A prefix that was made of tokens is decoded once, at start, and its KV is
shared with the sequences that need it, as a server on llama.cpp can do.
"""

import ctypes
from collections.abc import Sequence

import llama_cpp as lib
import numpy as np
from safetensors.numpy import load_file

from benchmarks.peers.wire import Clock, Prefix, Request, Result, Start, serve

CONTEXT, MAX_SEQUENCES, MAX_BATCHED_TOKENS = 24_576, 64, 4096


class LlamaCppPeer:
    """A loaded model and its KV cache."""

    def __init__(self, start: Start) -> None:
        lib.llama_backend_init()
        lib.llama_log_set(_QUIET, ctypes.c_void_p(0))
        params = lib.llama_model_default_params()
        self._model = lib.llama_model_load_from_file(str(start.model).encode(), params)
        context = lib.llama_context_default_params()
        context.n_ctx = CONTEXT
        context.n_batch = context.n_ubatch = MAX_BATCHED_TOKENS
        context.n_seq_max = MAX_SEQUENCES
        context.n_threads = context.n_threads_batch = start.threads
        context.kv_unified = True
        self._context = lib.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory = lib.llama_get_memory(self._context)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._width = lib.llama_model_n_embd(self._model)
        self._soft = {n: _embeddings(p) for n, p in start.prefixes.items() if p.tokens is None}
        self._resident: dict[str, tuple[int, int]] = {}
        tokens = {name: each.tokens for name, each in start.prefixes.items() if each.tokens}
        for sequence, (name, ids) in enumerate(tokens.items(), start=MAX_SEQUENCES - len(tokens)):
            self._decode([(t, p, sequence) for p, t in enumerate(ids)], wanted=())
            self._resident[name] = (sequence, len(ids))
        self.about = {"version": lib.__version__, "precision": "bf16 weights, f16 KV"}

    def run(self, requests: Sequence[Request], output: int) -> Result:
        """Prefill all requests, then decode them together, greedily."""
        clock = Clock(len(requests))
        starts = self._prefixed(requests)
        prompt = [
            (token, starts[index] + place, index)
            for index, request in enumerate(requests)
            for place, token in enumerate(request.tokens)
        ]
        ends = np.cumsum([len(request.tokens) for request in requests]) - 1
        chosen = self._prefill(prompt, ends.tolist())
        clock.tokens()
        tokens = [[token] for token in chosen]
        places = [starts[i] + len(request.tokens) for i, request in enumerate(requests)]
        rows = range(len(requests))
        for step in range(output - 1):
            batch = [(tokens[row][-1], places[row] + step, row) for row in rows]
            for row, token in enumerate(self._decode(batch, wanted=rows)):
                tokens[row].append(token)
        result = Result(clock.seconds, clock.first, tokens)
        for row in rows:
            lib.llama_memory_seq_rm(self._memory, row, -1, -1)
        return result

    def _prefixed(self, requests: Sequence[Request]) -> list[int]:
        """Put each request's prefix before it; returns its first free position."""
        starts = []
        for row, request in enumerate(requests):
            if request.prefix is None:
                starts.append(0)
            elif request.prefix in self._resident:
                sequence, length = self._resident[request.prefix]
                lib.llama_memory_seq_cp(self._memory, sequence, row, -1, -1)
                starts.append(length)
            else:
                starts.append(len(self._soft[request.prefix]))
        rows = [row for row, request in enumerate(requests) if request.prefix in self._soft]
        if rows:
            self._decode_embeddings(rows, [self._soft[requests[row].prefix or ""] for row in rows])
        return starts

    def _prefill(self, prompt: list[tuple[int, int, int]], ends: list[int]) -> list[int]:
        chosen = []
        for begin in range(0, len(prompt), MAX_BATCHED_TOKENS):
            part = prompt[begin : begin + MAX_BATCHED_TOKENS]
            wanted = [end - begin for end in ends if begin <= end < begin + len(part)]
            chosen += self._decode(part, wanted=wanted)
        return chosen

    def _decode(
        self, entries: Sequence[tuple[int, int, int]], *, wanted: Sequence[int]
    ) -> list[int]:
        """Run (token, position, sequence) entries; returns the likeliest next token of those
        ``wanted``."""
        batch = lib.llama_batch_init(len(entries), 0, 1)
        wanted_set = set(wanted)
        for i, (token, place, sequence) in enumerate(entries):
            batch.token[i] = token
            _place(batch, i, place, sequence)
            batch.logits[i] = i in wanted_set
        batch.n_tokens = len(entries)
        self._submit(batch)
        return [self._likeliest(i) for i in wanted]

    def _decode_embeddings(self, rows: Sequence[int], values: Sequence[np.ndarray]) -> None:
        total = sum(map(len, values))
        batch = lib.llama_batch_init(total, self._width, 1)
        flat = np.ascontiguousarray(np.concatenate(values), dtype=np.float32)
        ctypes.memmove(batch.embd, flat.ctypes.data, flat.nbytes)
        places = [
            (row, place)
            for row, each in zip(rows, values, strict=True)
            for place in range(len(each))
        ]
        for i, (row, place) in enumerate(places):
            _place(batch, i, place, row)
            batch.logits[i] = False
        batch.n_tokens = total
        self._submit(batch)

    def _submit(self, batch: lib.llama_batch) -> None:
        status = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def _likeliest(self, row: int) -> int:
        pointer = lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(pointer, (self._vocabulary,)).argmax())


def _place(batch: lib.llama_batch, index: int, place: int, sequence: int) -> None:
    batch.pos[index] = place
    batch.n_seq_id[index] = 1
    batch.seq_id[index][0] = sequence


def _embeddings(prefix: Prefix) -> np.ndarray:
    """[num_virtual_tokens, hidden] in float32."""
    return load_file(prefix.folder / "adapter_model.safetensors")["prompt_embeddings"]


@lib.llama_log_callback
def _QUIET(_level: int, _text: bytes, _data: object) -> None:  # noqa: N802  # held for the process
    """Drop llama.cpp's log."""


if __name__ == "__main__":
    serve(LlamaCppPeer)
