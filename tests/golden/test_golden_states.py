"""Models whose layers keep a state instead of KV: the greedy tokens of transformers.

The reference is transformers' own ``generate`` from the same input embeddings, where it takes them.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from prefixd.server.engine.request import PrefixHandle
from prefixd.server.engine.step import BlockCopy, Chunk
from prefixd.server.model.batch import lay_out
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.prefix import SoftPrompt
from prefixd.server.model.runner import Runner
from prefixd.server.model.selfcheck import self_check
from tests.golden.golden_harness import VOCAB, Served, prompts, random_model

BLOCK, NUM_BLOCKS, COUNT = 4, 600, 8

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYERS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_LAYERS,
        **_LINEAR,
        **_EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
    },
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "mamba2": {"num_attention_heads": None, "num_heads": 4, "head_dim": 32, "n_groups": 1},
    "qwen3_5_text": {**_LAYERS, **_LINEAR},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax": {
        **_LAYERS,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "head_dim": 16,
        "n_routed_experts": 4,
        **_EXPERTS,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {**_LAYERS, **_LINEAR},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],  # of the same weights
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "mamba_d_state": 16,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1], "mamba_expand": 2},
    "granitemoehybrid": {
        **_LAYERS,
        **_MAMBA2,
        "mamba_expand": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
}
"""One shape of each."""

FAST = ["qwen3_next"]
SLOW_JAMBA = pytest.param("jamba", marks=pytest.mark.slow)
SLOW_OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("minimax", "mamba2", "jamba")
]
ALL = [
    *FAST,
    *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in FAST),
]


@dataclass(frozen=True)
class Model:
    """A random model, and a decoder over a copy of it that passed the self-check."""

    own: Any
    base: LoadedBase
    decoder: ModuleDecoder

    def greedy(
        self, prompt: list[int], before: torch.Tensor | None = None, *, count: int = COUNT
    ) -> list[int]:
        """The tokens of transformers after embeddings ``before`` [n, width] and a prompt."""
        inputs = self.embed(prompt)
        inputs = inputs if before is None else torch.cat([before, inputs])
        parameters = inspect.signature(self.own.prepare_inputs_for_generation).parameters
        if "inputs_embeds" not in parameters:  # generate refuses them (Falcon-H1, Nemotron-H)
            return self._recomputed(inputs, count)
        with torch.no_grad():
            out = self.own.generate(
                inputs_embeds=inputs[None],
                attention_mask=torch.ones(1, len(inputs)),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = out[0].tolist()
        assert len(tokens) == count
        return tokens

    def _recomputed(self, inputs: torch.Tensor, count: int) -> list[int]:
        """Greedy tokens after ``inputs`` [n, width], the whole text in one pass for each."""
        tokens: list[int] = []
        with torch.no_grad():
            for _ in range(count):
                logits = self.own(inputs_embeds=inputs[None], use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
                inputs = torch.cat([inputs, self.embed(tokens[-1:])])
        return tokens

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """Input embeddings [n, width]."""
        embedded: torch.Tensor = self.own.get_input_embeddings()(torch.tensor(tokens)).detach()
        return embedded

    def fill(self, value: float) -> None:
        """Leave ``value`` in all blocks of the pool but the null block."""
        for tensor in self.decoder.cache.tensors:
            tensor[:, 1:] = 255 if tensor.dtype == torch.uint8 else value


@cache
def model_of(name: str, dtype: str = "float32") -> Model:
    fields = {k: v for k, v in {**SIZES, **FAMILIES[name]}.items() if v is not None}
    own = random_model(transformers.AutoConfig.for_model(name, **fields))
    base = prepare_base(copy.deepcopy(own), None, name=name, dtype=dtype, device="cpu")
    if dtype == "float32":
        self_check(base, block_size=BLOCK, prefill_chunk=16)
    return Model(own, base, ModuleDecoder(base, num_blocks=NUM_BLOCKS, block_size=BLOCK))


@dataclass
class Bench:
    """An engine over a model's decoder, a text and a soft prompt."""

    model: Model
    served: Served
    text: PrefixHandle
    soft: PrefixHandle
    tokens: list[int]
    embeddings: torch.Tensor

    def check_mixed(self, count: int) -> None:
        """Requests under no prefix, the text and the soft prompt in the same passes."""
        handles = [None, self.text, self.soft]
        before = [None, self.model.embed(self.tokens), self.embeddings]
        asked = [(prompt, i % 3) for i, prompt in enumerate(prompts(count, seed=3))]
        with self.served.held():
            answers = [self.served.start(p, handles[kind], count=COUNT) for p, kind in asked]
        tokens = [answer() for answer in answers]
        assert tokens == [self.model.greedy(p, before[kind]) for p, kind in asked]


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """Make a bench of a family; keyword arguments are those of the scheduler."""
    started = []

    def make(name: str, *, num_blocks: int = NUM_BLOCKS, **config: Any) -> Bench:
        model = model_of(name)
        model.fill(float("nan"))
        pool = {"num_blocks": num_blocks, "block_size": BLOCK}
        pool["state_blocks"] = model.decoder.state_blocks
        served = Served(model.base, Runner(model.decoder), pool=pool)
        served.restart(**config)
        started.append(served)
        tokens = prompts(3, seed=5)[2][:13]
        width = model.base.shape.embedding_width
        embeddings = 0.3 * torch.randn(21, width, generator=torch.Generator().manual_seed(1))
        text, soft = served.add_tokens(tokens), served.put(SoftPrompt(embeddings))
        return Bench(model, served, text, soft, tokens, embeddings)

    yield make
    for served in started:
        served.close()


@pytest.mark.parametrize("name", ALL)
def test_tokens_equal_transformers_mixed_and_in_chunks(
    name: str, bench: Callable[..., Bench]
) -> None:
    """Over blocks that hold NaN when they are allocated."""
    bench(name).check_mixed(12)
    for chunk in (1, 7):
        bench(name, max_prefill_chunk=chunk).check_mixed(3)


@pytest.mark.parametrize("name", ["qwen3_next", SLOW_JAMBA])
def test_a_preempted_sequence_starts_from_a_fresh_state(
    name: str, bench: Callable[..., Bench]
) -> None:
    state = model_of(name).decoder.state_blocks
    made = bench(name, num_blocks=1 + 3 * (state + 1) + 2)
    asked = [prompt[:3] for prompt in prompts(3, seed=9)]
    with made.served.held():  # all three fit when they start, and grow by two blocks or three
        answers = [made.served.start(prompt, count=2 * COUNT) for prompt in asked]
    tokens = [answer() for answer in answers]
    assert tokens == [made.model.greedy(prompt, count=2 * COUNT) for prompt in asked]
    assert made.served.engine.core.scheduler.num_preemptions > 0


@pytest.mark.parametrize("name", ["qwen3_next", SLOW_JAMBA])
def test_a_failed_pass_leaves_no_advanced_state(
    name: str, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third pass fails when all that it writes is written."""
    made = bench(name, max_prefill_chunk=16)
    forward, passes = made.model.decoder.forward, iter(range(1000))

    def fail_late(batch: Any) -> Any:
        logits = forward(batch)
        if next(passes) == 2:
            raise RuntimeError("failed after its writes")
        return logits

    monkeypatch.setattr(made.model.decoder, "forward", fail_late)
    made.check_mixed(6)
    assert next(passes) > 3


@pytest.mark.parametrize("name", ["qwen3_next", *SLOW_OTHERS])
def test_a_prefix_returns_from_host_memory_with_its_state(
    name: str, bench: Callable[..., Bench]
) -> None:
    state = model_of(name).decoder.state_blocks
    made = bench(name, num_blocks=1 + 2 * state + 12, host_tokens=10_000, max_prefill_chunk=7)
    prompt = prompts(1, seed=8)[0][:5]
    expected = made.model.greedy(prompt, made.embeddings)
    for prefix in (made.soft, made.text, made.soft):
        answer = made.served.generate(prompt, prefix, count=COUNT)
        assert prefix is made.text or answer == expected
    assert made.served.stats().prefix_loads["host"] == 1


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", *SLOW_OTHERS])
def test_a_state_of_nan_stays_in_its_row(name: str) -> None:
    decoder = model_of(name).decoder
    count = decoder.state_blocks
    sides = [tuple(range(10 + i * count, 10 + (i + 1) * count)) for i in range(3)]

    def logits(spoiled: float) -> torch.Tensor:
        decoder.zero(range(1, NUM_BLOCKS))
        rows = [Chunk(i, [5 + i] * 4, 0, (1 + i,), side_blocks=sides[i]) for i in range(3)]
        decoder.forward(lay_out(rows, outputs=[0]))
        for tensor in decoder.cache.tensors:
            if spoiled:
                tensor[:, sides[1]] = 255 if tensor.dtype == torch.uint8 else spoiled
        rows = [replace(row, tokens=[9], start=4) for row in rows]
        return decoder.forward(lay_out(rows, outputs=[0, 1, 2])).values

    clean, spoiled = logits(0.0), logits(float("nan"))
    assert not spoiled[1].isfinite().any()
    assert torch.equal(clean[[0, 2]], spoiled[[0, 2]])


def test_a_recurrent_state_is_kept_in_float32_by_a_model_in_bfloat16() -> None:
    model = model_of("qwen3_next", "bfloat16")
    mixer = model.base.layers.states[0]
    assert {piece.kind: piece.dtype for piece in mixer.pieces} == {
        "conv": None,
        "recurrent": torch.float32,
    }
    layout = model.decoder.cache.state_layout
    assert layout is not None
    cell = BLOCK * 2 * 16 * 2  # positions, KV heads, their size, bytes of bfloat16
    cells = -(-(128 * 4 * 2 + 4 * 16 * 16 * 4) // cell)  # of each of the two mixers
    assert layout.num_blocks == -(-2 * cells // 2) == model.decoder.state_blocks


def test_blocks_are_copied_and_saved_bit_for_bit() -> None:
    """Any bytes: a state is not a number of the pool's dtype."""
    cache = model_of("qwen3_next", "bfloat16").decoder.cache
    generator = torch.Generator().manual_seed(0)
    (tensor,) = cache.tensors
    content = torch.randint(-(2**15), 2**15, tensor[:, 3].shape, generator=generator)
    tensor.view(torch.int16)[:, 3] = content.to(torch.int16)
    cache.copy([BlockCopy(3, 4)])
    cache.write_blocks([5], cache.read_blocks([4]))
    assert torch.equal(tensor.view(torch.int16)[:, 5], content.to(torch.int16))
