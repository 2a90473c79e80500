"""Reference outputs of the tiny base under any prefix.

It shares no code with the server: an unmodified transformers model with the prefix as a cache,
without blocks, or with virtual tokens among its input embeddings; PEFT's for an adaption prompt.
Rows are padded on the right, which does not affect a causal model.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
import transformers

from tests.faults.faults_model import KINDS, KV_HEADS, LAYERS, MAX_TOKENS, Content, make_model

_MARGIN = 0.05
"""The minimum difference between the two largest logits for a token to be compared. Server and
reference differ by about 1e-4."""


def with_adaption_prompt(model: Any, content: Content) -> Any:
    """A copy of the model with an adaption prompt in PEFT's layers."""
    model = copy.deepcopy(model)
    config = peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=content.length, adapter_layers=len(content.values)
    )
    peft.AdaptionPromptModel(model, {"default": config}, "default")  # replaces layers of the model
    tensors = {n.removeprefix("base_model.model."): t for n, t in content.tensors.items()}
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    return model.eval()


Head = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [rows, kv_heads, P, head_dim] by layer; empty without a prefix."""


@dataclass
class Reference:
    """Greedy outputs of the plain model for ``prompts`` under any content, cached."""

    prompts: list[tuple[int, ...]]
    model: Any = field(default_factory=make_model)
    _cached: dict[Content | None, list[list[int]]] = field(default_factory=dict)

    def answer(self, content: Content | None, prompt: int) -> list[int]:
        """Up to MAX_TOKENS tokens after prompt number ``prompt``; it stops before a token whose
        two largest logits are nearly equal, since rounding may change it."""
        if content not in self._cached:
            self._cached[content] = self._answers_under(content)
        return self._cached[content][prompt]

    def _answers_under(self, content: Content | None) -> list[list[int]]:
        if content is None:
            return self._answers([], self.prompts, MAX_TOKENS)
        if content.kind in KINDS:
            return self._answers(self._compiled([content]), self.prompts, MAX_TOKENS)
        if content.kind == "adaption":
            model = with_adaption_prompt(self.model, content)
            return replace(self, model=model)._answers([], self.prompts, MAX_TOKENS)
        placed = [content.around(prompt) for prompt in self.prompts]
        return self._answers([], placed, MAX_TOKENS, virtual=content.values)

    def agrees(
        self, content: Content | None, prompt: int, answers: list[list[int]], *, count: int
    ) -> bool:
        """Whether all of ``answers`` have ``count`` tokens and start with the expected ones."""
        expected = self.answer(content, prompt)[:count]
        return all(len(one) == count and one[: len(expected)] == expected for one in answers)

    def each(self, contents: list[Content], count: int) -> dict[Content, list[int]]:
        """Up to ``count`` tokens after the first prompt under each of ``contents``, which must
        have equal lengths; runs them in one batch."""
        tokens_by_content: dict[Content, list[int]] = {}
        for kind in KINDS:
            same_kind = [content for content in contents if content.kind == kind]
            if same_kind:
                rows = [self.prompts[0]] * len(same_kind)
                answers = self._answers(self._compiled(same_kind), rows, count)
                tokens_by_content.update(zip(same_kind, answers, strict=True))
        return tokens_by_content

    @torch.inference_mode()
    def _answers(
        self,
        head: Head,
        prompts: Sequence[tuple[int, ...]],
        count: int,
        *,
        virtual: torch.Tensor | None = None,
    ) -> list[list[int]]:
        """``virtual`` are the embeddings of ids from VOCAB on."""
        table = self.model.get_input_embeddings().weight
        table = table if virtual is None else torch.cat([table, virtual])
        rows = [list(prompt) for prompt in prompts]
        certain = [count] * len(rows)
        for step in range(count):
            best = self._logits(head, rows, table).topk(2)  # [rows, 2]
            margins = (best.values[:, 0] - best.values[:, 1]).tolist()
            for index, row in enumerate(rows):
                if margins[index] < _MARGIN:
                    certain[index] = min(certain[index], step)
                row.append(int(best.indices[index, 0]))
        return [
            row[len(prompt) : len(prompt) + most]
            for row, prompt, most in zip(rows, prompts, certain, strict=True)
        ]

    def _logits(self, head: Head, rows: list[list[int]], table: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] of each row's last token."""
        longest, cache, past = max(map(len, rows)), transformers.DynamicCache(), 0
        for layer, (keys, values) in enumerate(head):
            past = keys.shape[2]
            size = (len(rows), -1, -1, -1)
            cache.update(keys.expand(size), values.expand(size), layer)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        logits = self.model(
            inputs_embeds=table[ids],
            position_ids=torch.arange(past, past + longest)[None],
            past_key_values=cache,
        ).logits
        return logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]

    @torch.inference_mode()
    def _compiled(self, contents: list[Content]) -> Head:
        """The KV of prefixes of one kind and length, one row for each."""
        kind, values = contents[0].kind, torch.stack([content.values for content in contents])
        if kind == "kv":
            shape = (len(contents), -1, 2 * LAYERS, KV_HEADS, contents[0].head_dim)
            by_layer = values.view(shape).permute(2, 0, 3, 1, 4)  # [2 * layers, rows, heads, P, hd]
            return [(by_layer[2 * i], by_layer[2 * i + 1]) for i in range(LAYERS)]
        cache = transformers.DynamicCache()
        argument = "input_ids" if kind == "text" else "inputs_embeds"
        self.model(**{argument: values}, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]
