"""Ensembles: the tokens that transformers and PEFT give when the members' predictions are averaged.

The reference has no KV cache and no batch: each token is one forward pass of each member over all
tokens so far, under PEFT's own model.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    Member,
    PrefixHandle,
    SamplingParams,
)
from prefixd.server.engine.sequence import seeded_uniform
from prefixd.server.engine.step import Step
from prefixd.server.model.prefix import SoftPrompt
from tests.golden.golden_harness import (
    Adapter,
    RequestFailed,
    Served,
    make_adapter,
    prompts,
    tiny_model,
)
from tests.golden.test_golden_constrained import Thirds, allowed_after
from tests.golden.test_golden_mixed import evict_everything, preempt_often

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 12
GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.3, repetition_penalty=1.2, top_k=40, seed=11)
LENGTHS = {"PROMPT_TUNING": 5, "PREFIX_TUNING": 21, "P_TUNING": 16}


@dataclass
class Ensemble:
    """Four members: three adapters, and the base, each with a PEFT model for the reference."""

    models: list[Any]
    handles: list[PrefixHandle | None]

    def start(
        self, served: Served, prompt: list[int], sampling: SamplingParams = GREEDY, **more: Any
    ) -> Callable[[], list[int]]:
        """Submit the ensemble; the third member has another prompt."""
        first, *others = zip(self.handles, self.prompts(prompt), strict=True)
        members = tuple(Member(tuple(own), handle) for handle, own in others)
        return served.start(
            prompt, first[0], count=COUNT, sampling=sampling, members=members, tenant="t", **more
        )

    def prompts(self, prompt: list[int]) -> list[list[int]]:
        return [prompt, prompt, [7, *prompt], prompt]

    def agreed(self, prompt: list[int], output: list[int]) -> tuple[int, ...]:
        """For each member, the tokens of ``output`` that it alone would have chosen."""
        return tuple(
            sum(
                int(last_logits(model, [*own, *output[:i]]).argmax()) == token
                for i, token in enumerate(output)
            )
            for model, own in zip(self.models, self.prompts(prompt), strict=True)
        )

    def expected(
        self,
        prompt: list[int],
        sampling: SamplingParams = GREEDY,
        allowed: Callable[[tuple[int, ...]], range] | None = None,
    ) -> list[int]:
        output: list[int] = []
        for index in range(COUNT):
            rows = [
                last_logits(model, [*own, *output]).log_softmax(-1)
                for model, own in zip(self.models, self.prompts(prompt), strict=True)
            ]
            combined = torch.stack(rows).mean(0).log_softmax(-1)
            if allowed is not None:
                ids = torch.tensor(list(allowed(tuple(output))), device=combined.device)
                kept = torch.full_like(combined, float("-inf"))
                combined = kept.index_copy(0, ids, combined[ids])
            output.append(chosen(combined, [*prompt, *output], sampling, index))
        return output


@torch.no_grad()
def last_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, -1].float()


def chosen(logprobs: torch.Tensor, tokens: list[int], sampling: SamplingParams, index: int) -> int:
    if sampling.temperature == 0:
        return int(logprobs.argmax())
    penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    scores = penalty(torch.tensor([tokens]), logprobs[None].cpu())[0]
    probs = (scores / sampling.temperature).softmax(-1).double()
    ordered, ids = probs.sort(descending=True, stable=True)
    kept = ordered[: sampling.top_k].cumsum(0)
    assert sampling.seed is not None
    draw = seeded_uniform(sampling.seed, index) * kept[-1]
    return int(ids[int((kept <= draw).sum())])


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Served, Any], Ensemble]:
    def make(served: Served, model: Any) -> Ensemble:
        adapters: list[Adapter] = [
            make_adapter(model, peft_type, length, tmp_path / peft_type)
            for peft_type, length in LENGTHS.items()
        ]
        handles: list[PrefixHandle | None] = [served.add(adapter) for adapter in adapters]
        return Ensemble([*(each.model for each in adapters), model], [*handles, None])

    return make


@pytest.mark.parametrize(
    ("architecture", "tight", "kernels"),
    [
        ("llama", False, "auto"),
        ("llama", True, "auto"),
        ("gpt2", True, "auto"),
        ("llama", True, "paged"),  # the GPU's decoder, one step ahead
    ],
)
def test_an_ensemble_gives_the_tokens_of_the_averaged_predictions(
    architecture: str,
    tight: bool,
    kernels: str,
    made: Callable[[Served, Any], Ensemble],
    serving: Callable[..., Served],
) -> None:
    model = tiny_model(architecture)
    options = {"block_size": 4, "num_blocks": 80, "max_prefill_chunk": 7} if tight else {}
    served = serving(model, kernels=kernels, **options)
    ensemble = made(served, model)
    asked = [(p, SEEDED if i % 2 else GREEDY) for i, p in enumerate(prompts(6, seed=2))]
    expected = [ensemble.expected(prompt, sampling) for prompt, sampling in asked]
    assert len({tuple(tokens) for tokens in expected}) == len(asked)
    if tight:
        preempt_often(served)
    with served.held():
        waits = [ensemble.start(served, prompt, sampling) for prompt, sampling in asked]
        plain = [served.start(p, h, count=8) for p in prompts(2) for h in ensemble.handles]
    assert [wait() for wait in waits] == expected
    for wait in plain:
        wait()
    assert served.stats().preemptions > 0 or not tight


@pytest.mark.parametrize("kernels", ["auto", "paged"])
def test_a_constraint_applies_to_what_all_members_predict(
    kernels: str, made: Callable[[Served, Any], Ensemble], serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, kernels=kernels)
    ensemble = made(served, model)
    asked = prompts(3, seed=12)
    with served.held():
        waits = [ensemble.start(served, prompt, constraint=Thirds()) for prompt in asked]
        free = [ensemble.start(served, prompt) for prompt in asked]
    expected = [ensemble.expected(prompt, allowed=allowed_after) for prompt in asked]
    assert [wait() for wait in waits] == expected
    assert [wait() for wait in free] == [ensemble.expected(prompt) for prompt in asked]


@pytest.mark.parametrize("kernels", ["auto", "paged"])
def test_the_end_tells_how_often_each_member_agreed(
    kernels: str, made: Callable[[Served, Any], Ensemble], serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, kernels=kernels)
    ensemble = made(served, model)
    ends: list[tuple[int, ...]] = []
    submit = served.engine.submit

    def watch(request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        def note(event: Event) -> None:
            if isinstance(event, FinishEvent):
                ends.append(event.agreed)
            on_event(event)

        submit(request, note)

    served.engine.submit = watch  # type: ignore[method-assign, assignment]
    (prompt,) = prompts(1, seed=4)
    output = ensemble.start(served, prompt)()
    assert ends == [ensemble.agreed(prompt, output)]
    assert len(set(ends[0])) > 1
    assert served.generate(prompt)
    assert ends[1] == (), "a plain request has no members"


def passes(served: Served, start: Callable[[], Sequence[Callable[[], list[int]]]]) -> int:
    """Forward passes that the requests take that ``start`` submits, all before the first."""
    before, submit = served.stats().steps, served.runner.submit
    planned, released = threading.Event(), threading.Event()

    def submit_later(step: Step) -> None:
        planned.set()
        released.wait()
        submit(step)

    served.runner.submit = submit_later
    try:
        other = served.start([3], count=1)
        planned.wait()
        waits = [other, *start()]
    finally:
        served.runner.submit = submit
        released.set()
    for wait in waits:
        wait()
    return served.stats().steps - before - 1


@pytest.mark.parametrize("max_tokens_per_step", [4096, 200])
def test_16_ensembles_of_4_take_as_many_passes_as_64_plain_rows(
    max_tokens_per_step: int,
    made: Callable[[Served, Any], Ensemble],
    serving: Callable[..., Served],
) -> None:
    model = tiny_model("llama")
    sizes = {"max_prefill_chunk": 4096, "max_tokens_per_step": max_tokens_per_step}
    served = serving(model, num_blocks=512, max_running=64, **sizes)
    ensemble = made(served, model)
    for handle in ensemble.handles:
        served.generate([3], handle, count=1)  # resident from here on
    asked = prompts(16, seed=5)

    def plain() -> list[Callable[[], list[int]]]:
        return [
            served.start(own, handle, count=COUNT, kv_reuse=False)
            for prompt in asked
            for handle, own in zip(ensemble.handles, ensemble.prompts(prompt), strict=True)
        ]

    together = passes(served, lambda: [ensemble.start(served, prompt) for prompt in asked])
    assert together == passes(served, plain)
    assert (together == COUNT) is (max_tokens_per_step == 4096)


def test_a_member_with_nan_fails_its_ensemble_and_no_other_request(
    made: Callable[[Served, Any], Ensemble], serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, num_blocks=33)  # no more than the model has positions
    ensemble = made(served, model)
    asked = prompts(3, seed=8)
    expected = [ensemble.expected(prompt) for prompt in asked]
    width = served.base.shape.embedding_width
    bad = served.put(SoftPrompt(torch.full((4, width), float("nan"))))
    with_bad = Ensemble(ensemble.models, [ensemble.handles[0], None, bad, None])
    for _ in range(2):  # the poisoned blocks are freed and used again
        with served.held():
            failing = with_bad.start(served, asked[0])
            waits = [ensemble.start(served, prompt) for prompt in asked]
        assert [wait() for wait in waits] == expected
        with pytest.raises(RequestFailed, match="non-finite logits for this request"):
            failing()
        evict_everything(served)


def test_members_share_kv_with_plain_requests(
    made: Callable[[Served, Any], Ensemble], serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, block_size=4)
    ensemble = made(served, model)
    (prompt,) = prompts(1, seed=6)
    first = ensemble.start(served, prompt)()
    before = served.stats().kv_reused_tokens
    assert ensemble.start(served, prompt)() == first
    again = served.stats().kv_reused_tokens
    assert again - before >= 4 * (len(prompt) - 8)
    served.generate(prompt, ensemble.handles[0], count=1)
    assert served.stats().kv_reused_tokens > again
    assert served.stats().prefix_compiles == 3
