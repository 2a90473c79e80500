"""Stacks and blends give transformers' tokens for the same input embeddings, one after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from prefixd.server.engine.request import Composition, PrefixHandle, PrefixKey, SamplingParams
from prefixd.server.model.prefix import SoftPrompt, StorePrefixSource
from prefixd.server.testing import ByteTokenizer
from prefixd.store.artifact.artifact import Artifact
from prefixd.store.artifact.composition import composition_digest
from prefixd.store.artifact.kinds import Kind
from tests.golden.golden_harness import DEVICE, Served, prompts, tiny_model
from tests.golden.placed import Piece, reference, soft_prompt
from tests.golden.test_golden_mixed import preempt_often

COUNT = 12
BOS = 1
SEEN = list(range(20, 31))
"""Tokens whose keys and values are the KV prefix."""

STACKS = [
    ["text", "soft"],
    ["soft", "text"],
    ["kv", "text", "soft"],
    ["kv", "soft"],
    ["text", "more", "soft", "text", "other"],
    ["soft", "other"],
    ["kv", "soft", "text", "more"],
]
TEXTS = {"text": "be kind", "more": " and brief."}


class OpeningTokenizer(ByteTokenizer):
    """Bytes behind one opening token."""

    def encode_prefix(self, text: str) -> list[int]:
        return [BOS, *super().encode_prefix(text)]


@dataclass
class Parts:
    """Artifacts by digest, which is their name here."""

    model: Any
    served: Served
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for seed, name in enumerate(("soft", "other")):
            self._add(name, Kind.SOFT_PROMPT, soft_prompt(self.served, 9, seed=seed).numpy())
        self._add("kv", Kind.KV_PREFIX, kv_of(self.model, SEEN))
        for name, text in TEXTS.items():
            self._add(name, Kind.HARD_PROMPT, None, text)

    def _add(
        self, name: str, kind: Kind, values: "np.ndarray[Any, Any] | None", text: str | None = None
    ) -> None:
        rows = len(text or "") if values is None else len(values)
        self.artifacts[name] = Artifact(
            kind, None, rows, None, None, None, values=values, text=text
        )

    def put(self, kind: Kind, names: Sequence[str], weights: Sequence[float] = ()) -> PrefixHandle:
        """A composition, loaded as a server loads it."""
        key = PrefixKey(
            "t",
            composition_digest(kind, names, weights),
            composition=Composition(str(kind), tuple(names), tuple(weights)),
        )
        source = StorePrefixSource(
            lambda part: self.artifacts[part.digest], self.served.base, OpeningTokenizer()
        )
        prefix = source.fetch(key)
        self.served.prefixes[PrefixKey("t", key.digest)] = prefix
        return PrefixHandle(key, prefix.num_tokens)

    def embeddings(self) -> torch.Tensor:
        """The rows of both soft prompts, for ``reference``."""
        values = [self.artifacts[name].values for name in ("soft", "other")]
        return torch.cat([torch.from_numpy(rows) for rows in values])

    def pieces(self, names: Sequence[str], prompt: list[int]) -> list[Piece]:
        """What transformers reads instead of a stack and a prompt."""
        pieces: list[Piece] = []
        is_open = False
        for name in names:
            match name:
                case "soft":
                    pieces.append((0, 9))
                case "other":
                    pieces.append((9, 18))
                case "kv":
                    pieces.append(SEEN)
                case _:
                    pieces.append([*([] if is_open else [BOS]), *TEXTS[name].encode()])
                    is_open = True
        return [*pieces, prompt]


def kv_of(model: Any, tokens: list[int]) -> "np.ndarray[Any, Any]":
    """The keys and values that ``model`` computes for ``tokens``, as PEFT stores them."""
    with torch.no_grad():
        ids = torch.tensor([tokens], device=DEVICE)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    halves = [half[0] for layer in cache.layers for half in (layer.keys, layer.values)]
    rows = torch.stack(halves).permute(2, 0, 1, 3).reshape(len(tokens), -1)
    return rows.cpu().contiguous().numpy()


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_stack_gives_the_tokens_of_all_its_members_one_after_another(
    architecture: str, chunk: int, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    served = serving(model, block_size=4, num_blocks=300, max_prefill_chunk=chunk)
    parts, outputs = Parts(model, served), set()
    for names, prompt in zip(STACKS, prompts(len(STACKS), seed=3), strict=True):
        expected = reference(model, parts.embeddings(), parts.pieces(names, prompt), COUNT)
        handle = parts.put(Kind.STACK, names)
        assert served.generate(prompt, handle, count=COUNT) == expected, names
        assert served.generate(prompt, handle, count=COUNT) == expected, "from reused KV"
        outputs.add(tuple(expected))
    assert len(outputs) == len(STACKS)
    assert served.stats().prefix_compiles == len(STACKS)


def test_a_blend_gives_the_tokens_of_the_mean_of_its_members(
    serving: Callable[..., Served],
) -> None:
    model = tiny_model("llama")
    served = serving(model)
    parts, outputs = Parts(model, served), set()
    one, other = parts.embeddings().split(9)
    for weight in (0.75, 0.5, 0.125):
        mean = one * weight + other * (1 - weight)
        handle = parts.put(Kind.BLEND, ["soft", "other"], [weight, 1 - weight])
        assert handle.num_tokens == 9
        prompt = prompts(1, seed=4)[0]
        expected = reference(model, mean, [(0, 9), prompt], COUNT)
        assert served.generate(prompt, handle, count=COUNT) == expected
        outputs.add(tuple(expected))
    assert len(outputs) == 3


def test_seeds_give_the_tokens_of_the_same_embeddings_as_one_soft_prompt(
    serving: Callable[..., Served],
) -> None:
    model = tiny_model("llama")
    served = serving(model, block_size=4, num_blocks=200)
    parts = Parts(model, served)
    embed = model.get_input_embeddings()
    names = ["soft", "text", "other"]
    with torch.no_grad():
        rows = [
            embed(torch.tensor(piece, device=DEVICE)).cpu()
            if isinstance(piece, list)
            else parts.embeddings()[piece[0] : piece[1]]
            for piece in parts.pieces(names, [5])[:-1]
        ]
    plain = served.put(SoftPrompt(torch.cat(rows).to(served.base.dtype)))
    handle = parts.put(Kind.STACK, names)
    drawn = []
    for seed in range(3):
        sampling = SamplingParams(temperature=1.0, seed=seed)
        prompt = prompts(1, seed=5)[0]
        options: dict[str, Any] = {"count": COUNT, "sampling": sampling}
        drawn.append(served.start(prompt, handle, **options)())
        assert drawn[-1] == served.start(prompt, plain, **options)()
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.parametrize("host_tokens", [0, 1000])
def test_compositions_that_leave_the_pool_and_preempted_sequences_give_the_same_tokens(
    host_tokens: int, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    single = serving(model, block_size=4, num_blocks=400)
    parts = Parts(model, single)
    handles = [parts.put(Kind.STACK, names) for names in STACKS]
    handles.append(parts.put(Kind.BLEND, ["soft", "other"], [0.5, 0.5]))
    requests = [(p, handles[i % len(handles)]) for i, p in enumerate(prompts(24, seed=6))]
    expected = [single.generate(prompt, handle, count=COUNT) for prompt, handle in requests]
    tight = serving(
        model, block_size=4, num_blocks=60, max_prefill_chunk=7, host_tokens=host_tokens
    )
    tight.prefixes = single.prefixes
    preempt_often(tight)
    for _ in range(2):
        waits = [tight.start(prompt, handle, count=COUNT) for prompt, handle in requests]
        assert [wait() for wait in waits] == expected
    stats = tight.stats()
    assert stats.preemptions >= 5
    assert stats.prefix_loads["store"] >= len(handles)
    assert (stats.prefix_loads["host"] > 0) is (host_tokens > 0)
