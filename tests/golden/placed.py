"""Prompts with virtual tokens inside: for the engine, and for transformers' ``inputs_embeds``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefixd.server.engine.inputs import PLACEHOLDER, InputRun
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.model.prefix import InputEmbeddings, SoftPrompt
from tests.golden.golden_harness import Served

Piece = list[int] | tuple[int, int]
"""Token ids, or a range of the virtual tokens of the prompt."""


def soft_prompt(served: Served, rows: int, *, seed: int) -> torch.Tensor:
    """Random embeddings [rows, embedding_width] that change the output."""
    generator = torch.Generator().manual_seed(seed)
    width = served.base.shape.embedding_width
    return torch.randn(rows, width, generator=generator) * 0.3


def reference(model: Any, prompt: torch.Tensor, pieces: Sequence[Piece], count: int) -> list[int]:
    """transformers' greedy tokens after these input embeddings, one piece after another."""
    embed = model.get_input_embeddings()
    parts = [
        embed(torch.tensor(piece, dtype=torch.long, device=model.device))
        if isinstance(piece, list)
        else prompt[piece[0] : piece[1]].to(model.device)
        for piece in pieces
    ]
    embeddings = torch.cat(parts)[None]
    with torch.no_grad():
        out = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=model.device),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = out[0].tolist()
    assert len(tokens) == count
    return tokens


@dataclass(frozen=True)
class Placed:
    """What stands in front as a prefix, and the prompt behind it."""

    prefix: PrefixHandle | None
    prompt: list[int]
    inputs: tuple[InputRun, ...]

    def start(self, served: Served, **options: Any) -> Callable[[], list[int]]:
        return served.start(self.prompt, self.prefix, inputs=self.inputs, **options)


def place(
    served: Served, key: PrefixKey, pieces: Sequence[Piece], *, shared: bool = True
) -> Placed:
    """The pieces as a request. ``shared``: those in front are a prefix."""
    whole = served.prefixes[key]
    assert isinstance(whole, SoftPrompt)
    pieces = list(pieces)
    front: list[tuple[int, int]] = []
    while shared and pieces and isinstance(pieces[0], tuple):
        front.append(pieces[0])
        pieces = pieces[1:]
    prompt: list[int] = []
    runs = []
    for piece in pieces:
        if isinstance(piece, list):
            prompt += piece
            continue
        part = key._replace(rows=(piece,))
        rows = served.fetch(part)
        assert isinstance(rows, SoftPrompt)
        payload = InputEmbeddings(rows.embeddings, part.content.encode())
        runs.append(InputRun(len(prompt), payload))
        prompt += [PLACEHOLDER] * rows.num_tokens
    rows_in_front = sum(stop - start for start, stop in front)
    handle = PrefixHandle(key._replace(rows=tuple(front)), rows_in_front) if front else None
    return Placed(handle, prompt, tuple(runs))
