"""Scores of prompt tokens equal those of transformers and PEFT, under every kind of prefix."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle, Scoring
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoders import PAGED
from prefixd.server.model.prefix import SoftPrompt
from tests.golden.golden_harness import (
    Served,
    make_adapter,
    make_adaption_prompt,
    plain_generate,
    prompts,
    tiny_model,
)
from tests.golden.placed import place
from tests.golden.scores import TOLERANCE, check, reference, start
from tests.golden.test_golden_mixed import preempt_often
from tests.model.cpu.native_library import native_library

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXT = [7, 11, 13, 17, 19]


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        ("llama", "auto"),
        ("llama", "paged"),
        pytest.param("gpt2", "module", marks=pytest.mark.slow),
        *(
            pytest.param("llama", kernels, marks=pytest.mark.slow)
            for kernels in ("module", "torch", *PAGED[1:], *KERNELS)
        ),
    ],
)
def test_scores_of_a_mixed_batch_equal_those_of_peft(
    architecture: str, kernels: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    if kernels in KERNELS and (state := native_library().states()[kernels]) != "available":
        pytest.skip(f"{kernels}: {state}")
    model = tiny_model(architecture)
    served = serving(model, kernels=kernels, max_prefill_chunk=16, max_scored=9)
    adapters = [
        make_adapter(model, peft_type, length, tmp_path / peft_type)
        for peft_type, length in (("PROMPT_TUNING", 21), ("PREFIX_TUNING", 33))
    ]
    if architecture == "llama":
        adapters.append(make_adaption_prompt(model, 6, tmp_path / "adaption"))
    prefixes = [*map(served.add, adapters), served.add_tokens(TEXT), None]
    preempt_often(served)
    texts = [*prompts(11, seed=4), prompts(30, seed=5)[0] * 4]
    with served.held():
        waits = [
            start(served, text, prefixes[i % len(prefixes)], count=i % 3)
            for i, text in enumerate(texts)
        ]
        busy = [served.start(text, None, count=8) for text in texts[:3]]
    for i, (text, wait) in enumerate(zip(texts, waits, strict=True)):
        kind = i % len(prefixes)
        if kind < len(adapters):
            expected = reference(adapters[kind].model, text)
        elif kind == len(adapters):
            expected = reference(model, [*TEXT, *text])[len(TEXT) :]
        else:
            expected = reference(model, text)
        check(wait(), text, expected)
    for text, tokens in zip(texts, busy, strict=False):
        assert tokens() == plain_generate(model, text, 8)
    assert served.stats().preemptions > 0


def test_the_first_token_is_scored_behind_the_last_virtual_one(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    """The virtual tokens but the last are the prefix, and the last one is in the prompt."""
    model = tiny_model("llama")
    adapter = make_adapter(model, "PROMPT_TUNING", 17, tmp_path)
    served = serving(model)
    prefix = served.add(adapter)
    text = served.add_tokens(TEXT)
    prompt = prompts(1, seed=6)[0]
    soft = place(served, prefix.key, [(16, 17), prompt], shared=False)
    front = PrefixHandle(prefix.key._replace(rows=((0, 16),)), 16)
    scored = start(served, soft.prompt, front, inputs=soft.inputs)()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    expected = logits[-len(prompt) - 1 : -1].log_softmax(dim=-1)
    check(scored, prompt, expected)
    cut = PrefixHandle(text.key._replace(rows=((0, len(TEXT) - 1),)), len(TEXT) - 1)
    scored = start(served, [TEXT[-1], *prompt], cut)()
    check(scored, prompt, reference(model, [*TEXT, *prompt])[len(TEXT) - 1 :])


def test_choices_share_the_blocks_of_their_prompt(serving: Callable[..., Served]) -> None:
    model = tiny_model("llama")
    served = serving(model)
    prompt = prompts(30, seed=5)[0] * 2
    choices = [text[:6] for text in prompts(4, seed=8)]
    for choice in choices:
        whole = [*prompt, *choice]
        scored = start(served, whole, scoring=Scoring(len(prompt), top=1))()
        check(scored, whole, reference(model, whole)[len(prompt) - 1 :])
    stats = served.stats()
    assert stats.kv_reused_tokens == (len(choices) - 1) * ((len(prompt) - 1) // 16 * 16)


def test_scores_that_are_not_finite_fail_their_request_alone(
    serving: Callable[..., Served],
) -> None:
    model = tiny_model("llama")
    served = serving(model, max_prefill_chunk=8)
    width = served.base.shape.embedding_width
    broken = served.put(SoftPrompt(torch.full((3, width), float("nan"))))
    prompt = prompts(1, seed=6)[0] * 2
    with served.held():
        failing = start(served, prompt, broken)
        fine = start(served, prompt)
    with pytest.raises(AssertionError, match="non-finite logits"):
        failing()
    check(fine(), prompt, reference(model, prompt))


@pytest.mark.slow
def test_scores_of_int8_equal_the_log_probabilities_of_its_output(
    serving: Callable[..., Served],
) -> None:
    served = serving(tiny_model("llama"), quantize="int8")
    for prompt in prompts(3, seed=2):
        written = start(served, prompt, count=8)()
        again = start(served, [*prompt, *written.tokens], scoring=Scoring(len(prompt)))()
        expected = torch.tensor([position.sampled.logprob for position in written.logprobs])
        torch.testing.assert_close(again.values, expected, atol=TOLERANCE, rtol=0)
