"""A tiny random base, prefixes of every kind for it, and what plain transformers answers.

The oracle shares nothing with the server: an unmodified transformers model, the prefix as a cache,
no blocks, no batch of strangers. Rows are padded on the right, which a causal model cannot see.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS = 211, 32, 2, 4, 2
HEAD_DIM = HIDDEN // HEADS
MOST_TOKENS = 24
"""The longest answer the oracle gives."""

_MARGIN = 0.05
"""How far the best logit must lie before the second for float noise to decide nothing. The two
sides differ by about 1e-4."""

TINY = "tiny"
"""What the base is called."""

KINDS = ("soft", "text", "kv")


def make_model() -> Any:
    """The base: random, with logits far enough apart that a wrong prefix changes every answer."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(5.0)
    model.lm_head.weight.data.mul_(200.0)
    return model


def save_model(folder: Path) -> Path:
    """The base as a folder to serve. Its tokenizer has a word ``w<id>`` for each id."""
    make_model().save_pretrained(folder)
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    """Token ids of a text the tiny model said."""
    return [int(word.removeprefix("w")) for word in text.split()]


@dataclass(frozen=True)
class Content:
    """What a prefix says: random, of one kind, told apart by its seed."""

    kind: str
    length: int
    seed: int

    @cached_property
    def values(self) -> torch.Tensor:
        """Token ids [P]; embeddings [P, hidden]; or keys and values [P, layers * 2 * kv width]."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "text":
            return torch.randint(3, VOCAB, (self.length,), generator=generator)
        width = HIDDEN if self.kind == "soft" else LAYERS * 2 * KV_HEADS * HEAD_DIM
        return 0.5 * torch.randn(self.length, width, generator=generator)

    def body(self) -> dict[str, Any]:
        """The upload, as keyword arguments of an httpx2 ``put``."""
        if self.kind == "text":
            text = " ".join(f"w{token}" for token in self.values.tolist())
            return {"json": {"kind": "text", "text": text}}
        config = {
            "peft_type": "PROMPT_TUNING" if self.kind == "soft" else "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.length,
            "token_dim": HIDDEN if self.kind == "soft" else KV_HEADS * HEAD_DIM,
            "num_transformer_submodules": 1,
            "num_attention_heads": HEADS if self.kind == "soft" else KV_HEADS,
            "num_layers": LAYERS,
            "prefix_projection": False,
        }
        weights = save({"prompt_embeddings": self.values.contiguous()})
        return {
            "files": {
                "config": ("adapter_config.json", json.dumps(config).encode()),
                "weights": ("adapter_model.safetensors", weights),
            }
        }


def library(
    count: int, *, lengths: tuple[int, ...] = (5, 16, 20, 37), seed: int = 0
) -> list[Content]:
    """Prefixes of all kinds and lengths, all different."""
    return [
        Content(KINDS[i % len(KINDS)], lengths[i % len(lengths)], 1000 * seed + i)
        for i in range(count)
    ]


def make_prompts(count: int, *, lengths: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts, all different."""
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(3, VOCAB) for _ in range(lengths[i % len(lengths)]))
        for i in range(count)
    ]


Head = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [rows, kv_heads, P, head_dim] by layer; empty without a prefix."""


@dataclass
class Oracle:
    """Greedy answers of the plain model to ``prompts`` under any content, kept once known."""

    prompts: list[tuple[int, ...]]
    model: Any = field(default_factory=make_model)
    _known: dict[Content | None, list[list[int]]] = field(default_factory=dict)

    def answer(self, content: Content | None, prompt: int) -> list[int]:
        """Up to MOST_TOKENS tokens after prompt number ``prompt``; fewer where the model itself
        is nearly undecided, so that nothing is compared that noise may change."""
        if content not in self._known:
            head = [] if content is None else self._compiled([content])
            self._known[content] = self._answers(head, self.prompts, MOST_TOKENS)
        return self._known[content][prompt]

    def agrees(
        self, content: Content | None, prompt: int, answers: list[list[int]], *, count: int
    ) -> bool:
        """Whether all of ``answers`` have ``count`` tokens, and the right ones."""
        want = self.answer(content, prompt)[:count]
        return all(len(one) == count and one[: len(want)] == want for one in answers)

    def each(self, contents: list[Content], count: int) -> dict[Content, list[int]]:
        """Up to ``count`` tokens after the first prompt under each of ``contents``, which must
        have one length: hundreds of them at once."""
        found: dict[Content, list[int]] = {}
        for kind in KINDS:
            alike = [content for content in contents if content.kind == kind]
            if alike:
                rows = [self.prompts[0]] * len(alike)
                answers = self._answers(self._compiled(alike), rows, count)
                found.update(zip(alike, answers, strict=True))
        return found

    @torch.inference_mode()
    def _answers(
        self, head: Head, prompts: Sequence[tuple[int, ...]], count: int
    ) -> list[list[int]]:
        rows = [list(prompt) for prompt in prompts]
        sure = [count] * len(rows)
        for step in range(count):
            best = self._logits(head, rows).topk(2)  # [rows, 2]
            margins = (best.values[:, 0] - best.values[:, 1]).tolist()
            for index, row in enumerate(rows):
                if margins[index] < _MARGIN:
                    sure[index] = min(sure[index], step)
                row.append(int(best.indices[index, 0]))
        return [
            row[len(prompt) : len(prompt) + most]
            for row, prompt, most in zip(rows, prompts, sure, strict=True)
        ]

    def _logits(self, head: Head, rows: list[list[int]]) -> torch.Tensor:
        """Logits [rows, vocab] of each row's last token."""
        longest, cache, past = max(map(len, rows)), transformers.DynamicCache(), 0
        for layer, (keys, values) in enumerate(head):
            past = keys.shape[2]
            size = (len(rows), -1, -1, -1)
            cache.update(keys.expand(size), values.expand(size), layer)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        logits = self.model(
            input_ids=ids,
            position_ids=torch.arange(past, past + longest)[None],
            past_key_values=cache,
        ).logits
        return logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]

    @torch.inference_mode()
    def _compiled(self, contents: list[Content]) -> Head:
        """The heads of prefixes of one kind and length, a row for each."""
        kind, values = contents[0].kind, torch.stack([content.values for content in contents])
        if kind == "kv":
            shape = (len(contents), -1, 2 * LAYERS, KV_HEADS, HEAD_DIM)
            by_layer = values.view(shape).permute(2, 0, 3, 1, 4)  # [2 * layers, rows, heads, P, hd]
            return [(by_layer[2 * i], by_layer[2 * i + 1]) for i in range(LAYERS)]
        cache = transformers.DynamicCache()
        given = "input_ids" if kind == "text" else "inputs_embeds"
        self.model(**{given: values}, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]
