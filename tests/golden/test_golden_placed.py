"""Virtual tokens anywhere in a prompt give transformers' tokens for the same input embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.inputs import PLACEHOLDER, InputRun
from prefixd.server.engine.request import PrefixHandle, PrefixKey, SamplingParams
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoders import PAGED
from prefixd.server.model.prefix import InputEmbeddings, Prefix, SoftPrompt
from tests.golden.golden_harness import (
    RequestFailed,
    Served,
    make_adapter,
    plain_generate,
    prompts,
    serve,
    tiny_model,
)
from tests.golden.placed import Piece, place, reference, soft_prompt
from tests.golden.test_golden_mixed import many_prefixes, preempt_often
from tests.model.cpu.native_library import native_library

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 12
ROWS = 20


def layouts(texts: list[list[int]]) -> list[list[Piece]]:
    """Where the virtual tokens stand among the texts."""
    a, b, c = texts[:3]
    return [
        [(0, 7), a, (7, 20), b],  # some in front, some inside
        [a, (0, 20), b],
        [a, (12, 20), (0, 3), b, (3, 12)],  # in another order, at the end too
        [(4, 8), (0, 4), a, (8, 9), b, (9, 20), c],
        [a, (0, 20)],
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tokens_equal_those_of_transformers(
    architecture: str, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    served = serving(model, block_size=4, num_blocks=200)
    embeddings = soft_prompt(served, ROWS, seed=1)
    key = served.put(SoftPrompt(embeddings)).key
    outputs = set()
    for pieces in layouts(prompts(3, seed=2)):
        expected = reference(model, embeddings, pieces, COUNT)
        for shared in (True, False):
            assert (
                place(served, key, pieces, shared=shared).start(served, count=COUNT)() == expected
            )
        outputs.add(tuple(expected))
    assert len(outputs) == 5, "places do not matter: the test is too weak"


def test_with_all_pieces_in_front_tokens_equal_those_of_peft(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model)
    adapter = make_adapter(model, "P_TUNING", ROWS, tmp_path)
    key = served.add(adapter).key
    for prompt in prompts(3, seed=1):
        expected = adapter.generate(prompt, COUNT)
        in_front: list[list[Piece]] = [[(0, 20), prompt], [(0, 7), (7, 20), prompt]]
        for pieces in in_front:
            for shared in (True, False):
                placed = place(served, key, pieces, shared=shared)
                assert placed.start(served, count=COUNT)() == expected
    swapped: list[Piece] = [(7, 20), (0, 7), prompt]
    assert place(served, key, swapped).start(served, count=COUNT)() != expected
    assert served.stats().prefix_compiles == 3, "the whole prompt, two pieces, two swapped ones"


@dataclass(frozen=True)
class Mixed:
    """Requests of all kinds: under other prefixes, and with the virtual tokens of ``key`` placed.
    ``expected`` are the tokens of the one after those of the other."""

    model: Any
    prefixes: dict[PrefixKey, Prefix]
    others: list[tuple[list[int], PrefixHandle | None]]
    key: PrefixKey
    expected: list[list[int]]

    def start(self, served: Served) -> list[Callable[[], list[int]]]:
        with served.held():
            waits = [served.start(text, other, count=COUNT) for text, other in self.others]
            waits += [
                place(served, self.key, pieces).start(served, count=COUNT)
                for pieces in layouts(prompts(3, seed=2))
            ]
        return waits


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    model = tiny_model("llama")
    single = serve(model, block_size=4, num_blocks=300)
    others = many_prefixes(single, model, tmp_path_factory.mktemp("adapters"))
    texts = list(zip(prompts(len(others), seed=3), others, strict=True))
    expected = [single.generate(text, other, count=COUNT) for text, other in texts]
    embeddings = soft_prompt(single, ROWS, seed=1)
    key = single.put(SoftPrompt(embeddings)).key
    expected += [
        reference(model, embeddings, pieces, COUNT) for pieces in layouts(prompts(3, seed=2))
    ]
    single.engine.stop()
    return Mixed(model, single.prefixes, texts, key, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "chunk"),
    [("module", 1), ("module", 7), ("module", 64), *((k, 7) for k in ("torch", *PAGED, *KERNELS))],
)
def test_mixed_with_all_other_kinds_under_preemption(
    kernels: str, chunk: int, mixed: Mixed, serving: Callable[..., Served]
) -> None:
    if kernels in KERNELS and (state := native_library().states()[kernels]) != "available":
        pytest.skip(f"{kernels}: {state}")
    block_size, num_blocks = (16, 120) if kernels in KERNELS else (4, 400)
    served = serving(
        mixed.model,
        kernels=kernels,
        max_prefill_chunk=chunk,
        block_size=block_size,
        num_blocks=num_blocks,
    )
    served.prefixes = mixed.prefixes
    preempt_often(served)
    for _ in range(2):  # the second time, KV is reused
        assert [wait() for wait in mixed.start(served)] == mixed.expected
    stats = served.stats()
    assert stats.preemptions > 0
    assert stats.kv_reused_tokens > 0


def test_rows_of_two_tenants_share_nothing(serving: Callable[..., Served]) -> None:
    model = tiny_model("llama")
    served = serving(model, block_size=4)
    (text,) = prompts(1, seed=5)
    tenants: dict[PrefixKey, list[int]] = {}
    for tenant in ("ann", "bob"):
        key = PrefixKey(tenant, "same digest")
        embeddings = soft_prompt(served, ROWS, seed=len(tenants))
        served.prefixes[key] = SoftPrompt(embeddings)
        tenants[key] = reference(model, embeddings, [(0, 4), text, (4, 20)], COUNT)
    assert len(set(map(tuple, tenants.values()))) == 2
    for key, expected in tenants.items():
        placed = place(served, key, [(0, 4), text, (4, 20)])
        assert placed.start(served, count=COUNT)() == expected
    assert served.stats().kv_reused_tokens == 0


def test_a_row_that_is_not_finite_ends_its_own_request(serving: Callable[..., Served]) -> None:
    model = tiny_model("llama")
    served = serving(model, block_size=4)
    broken = torch.full((3, served.base.shape.embedding_width), float("nan"))
    inputs = (InputRun(2, InputEmbeddings(broken, b"broken")),)
    prompt = [5, 6, *[PLACEHOLDER] * 3, 7]
    texts = prompts(4, seed=5)
    for _ in range(2):  # its KV is not reused
        with served.held():
            waits = [served.start(text, count=COUNT) for text in texts]
            bad = served.start(prompt, count=COUNT, inputs=inputs)
        assert [wait() for wait in waits] == [plain_generate(model, t, COUNT) for t in texts]
        with pytest.raises(RequestFailed):
            bad()


@pytest.mark.parametrize("kernels", ["module", "paged"])
def test_penalties_and_prompt_lookup_see_no_token_in_place_of_a_row(
    kernels: str, serving: Callable[..., Served]
) -> None:
    """Token 0 is what a row is laid out as: a penalty of it would change what comes."""
    model = tiny_model("llama")
    served = serving(model, kernels=kernels, block_size=4, speculate=True)
    embeddings = soft_prompt(served, ROWS, seed=1)
    key = served.put(SoftPrompt(embeddings)).key
    text = [9, 8, 7, 6, 9, 8, 7]
    pieces: list[Piece] = [text, (0, 20), text]
    placed = place(served, key, pieces)
    sampling = SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={0: 6.0})
    tokens = placed.start(served, count=COUNT, sampling=sampling)()

    # The same by hand, token by token, with the penalty of what is text.
    seen, expected = set(text), []
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(torch.tensor(text)), embeddings, embed(torch.tensor(text))])[None]
    for _ in range(COUNT):
        with torch.no_grad():
            logits = model(inputs_embeds=inputs).logits[0, -1]
        for token in seen:
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        logits[0] += 6.0
        expected.append(int(logits.argmax()))
        seen.add(expected[-1])
        inputs = torch.cat([inputs, embed(torch.tensor([expected[-1:]]))], dim=1)
    assert tokens == expected
