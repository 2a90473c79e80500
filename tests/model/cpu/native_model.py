"""Small random models of transformers, and native decoders with the same weights, for tests."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from prefixd.server.model.cpu import interface
from tests.model.cpu.native_library import native_library

POSITIONS, BLOCK = 128, 16
_SIZES = {
    # odd, so that no matrix fills whole panels, pairs or vectors
    "hidden_size": 45,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": POSITIONS,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "initializer_range": 0.3,
}
_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 21}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "biased": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **_SIZES, **_MOE, shared_expert_intermediate_size=29, norm_topk_prob=False
    ),
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, **_MOE, norm_topk_prob=True),
}
WIDE = LlamaConfig(
    **{**_SIZES, "hidden_size": 4095, "num_hidden_layers": 1, "initializer_range": 0.02}
)
"""Its products have many inputs."""


@cache
def model_of(name: str) -> PreTrainedModel:
    """In float32, with random norms and biases too."""
    torch.manual_seed(3)
    model = Auto.from_config(CONFIGS.get(name, WIDE), dtype=torch.float32).eval()
    for key, weight in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


@torch.inference_mode()
def reference(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Logits of every token of a text, [n, vocab] in float32."""
    return model(torch.tensor([ids])).logits[0].float()


def int8_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes, ties to even, and the scales of each row of a matrix [..., inner]."""
    scales = matrix.float().abs().amax(-1, keepdim=True) / 127
    codes = (matrix.float() / scales).nan_to_num().round()
    return codes.to(torch.int8).contiguous(), scales.squeeze(-1).contiguous()


@contextmanager
def int8_layers(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A copy of a model whose layers multiply as in int8, router and gate of a shared expert apart:
    each row of weights and of inputs is rounded."""
    model, rounded = deepcopy(model), set[int]()
    linear = functional.linear
    for name, weight in model.model.layers.named_parameters():
        exempt = ("norm", "bias", "mlp.gate.weight", "shared_expert_gate")
        if not any(part in name for part in exempt):
            codes, scales = int8_rows(weight.data)
            weight.data = codes * scales[..., None]
            rounded.add(weight.untyped_storage().data_ptr())

    def rounding(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight.untyped_storage().data_ptr() in rounded:
            codes, scales = int8_rows(inputs)
            inputs = codes * scales[..., None]
        return linear(inputs, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", rounding)
        yield model


class Native:
    """A decoder in the native library with the weights of a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        kernels: str,
        *,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        blocks: int = 64,
        int8: bool = False,
    ) -> None:
        library = native_library()
        if kernels not in library.kernels:
            pytest.skip(f"{kernels}: {library.states()[kernels]}")
        self.library, self.dtype, self.config, self.int8 = library, dtype, model.config, int8
        self.call = library.functions
        c = model.config
        self.shape = interface.Shape(
            interface.BF16 if dtype == torch.bfloat16 else interface.F32,
            c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
            c.hidden_size, c.vocab_size, c.vocab_size, c.head_dim, POSITIONS, BLOCK,
            c.rms_norm_eps, c.head_dim**-0.5,
        )  # fmt: skip
        isa = interface.KERNELS.index(kernels)
        self.decoder = self.call.pfx_new(ctypes.byref(self.shape), isa)
        assert self.decoder, library.error()
        self.ok(self.call.pfx_set_threads(self.decoder, threads, 100))
        self._set_weights(model)
        self.ok(self.call.pfx_set_pool(self.decoder, blocks))

    def __del__(self) -> None:
        if getattr(self, "decoder", None):
            self.call.pfx_free(self.decoder)

    def ok(self, result: int) -> None:
        assert result == 0, self.library.error()

    def _set_weights(self, model: PreTrainedModel) -> None:
        kept: list[torch.Tensor] = []

        def address(weight: torch.Tensor | None) -> int | None:
            if weight is None:
                return None
            kept.append(weight.detach().to(self.dtype).contiguous())
            return kept[-1].data_ptr()

        def weight(matrix: torch.Tensor) -> tuple[int | None, int | None]:
            """A weight and its scales; of all layers in int8, or as it is."""
            if not self.int8:
                return address(matrix), None
            codes, scales = int8_rows(matrix.detach())
            kept.extend((codes, scales))
            return codes.data_ptr(), scales.data_ptr()

        def linear(module: torch.nn.Linear | None) -> interface.Linear:
            if module is None:
                return interface.Linear()
            of_weight, scales = weight(module.weight)
            return interface.Linear(of_weight, address(module.bias), scales)

        base = model.model
        cosine, sine = base.rotary_emb(torch.zeros(1), torch.arange(POSITIONS)[None])
        half = self.config.head_dim // 2
        tables = [t[0, :, :half].float().contiguous() for t in (cosine, sine)]
        self.ok(self.call.pfx_set_rotary(self.decoder, *(t.data_ptr() for t in tables)))
        for i, layer in enumerate(base.layers):
            attention, mlp = layer.self_attn, layer.mlp
            given = interface.Layer(
                input_norm=address(layer.input_layernorm.weight),
                post_norm=address(layer.post_attention_layernorm.weight),
                q_norm=address(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
                k_norm=address(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
                q=linear(attention.q_proj), k=linear(attention.k_proj),
                v=linear(attention.v_proj), o=linear(attention.o_proj),
            )  # fmt: skip
            dense = mlp
            if experts := getattr(mlp, "experts", None):
                dense = getattr(mlp, "shared_expert", None)
                given.experts = experts.num_experts
                given.experts_per_token = self.config.num_experts_per_tok
                given.expert_inner = experts.down_proj.shape[2]
                given.normalize_weights = getattr(self.config, "norm_topk_prob", True)
                given.router = address(mlp.gate.weight)
                given.expert_gate_up, given.expert_gate_up_scales = weight(experts.gate_up_proj)
                given.expert_down, given.expert_down_scales = weight(experts.down_proj)
                if dense is not None:
                    given.shared_gate = address(mlp.shared_expert_gate.weight)
            if dense is not None:
                given.gate, given.up = linear(dense.gate_proj), linear(dense.up_proj)
                given.down = linear(dense.down_proj)
                given.inner = dense.down_proj.in_features
            self.ok(self.call.pfx_set_layer(self.decoder, i, ctypes.byref(given)))
        tied = self.config.tie_word_embeddings
        embedding = None if tied else address(base.embed_tokens.weight)
        head = interface.Linear(address(model.lm_head.weight))
        norm = address(base.norm.weight)
        self.ok(self.call.pfx_set_ends(self.decoder, norm, ctypes.byref(head), embedding))

    def step(
        self,
        rows: Sequence[tuple[Sequence[int], int, Sequence[int]]],
        outputs: Sequence[int] | None = None,
        inputs: torch.Tensor | None = None,
        width: int = 8,
        gated: Sequence[tuple[int, int, Sequence[int]] | None] = (),
    ) -> interface.Step:
        """A step of rows (token ids, start, block table); its arrays live as long as it does.
        ``gated``: of each row the rows, first layer and blocks of a gated prefix."""
        ids = [i for row in rows for i in row[0]]
        outputs = range(len(ids)) if outputs is None else outputs
        lengths = [len(row[0]) for row in rows]
        offsets = [sum(lengths[:i]) for i in range(len(lengths))]
        tables = [[*row[2], *[-7] * (width - len(row[2]))] for row in rows]

        def array(values: object) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        tensors = {
            "token_ids": array(ids), "offsets": array(offsets), "lengths": array(lengths),
            "starts": array([row[1] for row in rows]), "tables": array(tables),
            "outputs": array(list(outputs)),
            "logits": torch.full((len(outputs), self.config.vocab_size), -1.0),
            "best": array([-1] * len(outputs)), "best_value": torch.zeros(len(outputs)),
        }  # fmt: skip
        if inputs is not None:
            tensors["inputs"] = inputs.to(self.dtype).contiguous()
        step = interface.Step(
            num_tokens=len(ids), num_rows=len(rows), table_width=width, num_outputs=len(outputs),
            candidates=self.config.vocab_size,
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )  # fmt: skip
        if any(gated):
            prefixes = [prefix or (0, 0, []) for prefix in gated]
            step.gated_width = max(len(blocks) for *_, blocks in prefixes)
            own = {
                "gated_counts": array([count for count, *_ in prefixes]),
                "gated_layers": array([layer for _, layer, _ in prefixes]),
                "gated_tables": array(
                    [[*b, *[-7] * (step.gated_width - len(b))] for *_, b in prefixes]
                ),
            }
            for name, tensor in own.items():
                setattr(step, name, tensor.data_ptr())
            tensors |= own
        step.tensors = tensors
        return step

    def run(self, *arguments: object, **options: object) -> torch.Tensor:
        """The logits of a step's outputs, [n, vocab]."""
        step = self.step(*arguments, **options)  # type: ignore[arg-type]
        self.ok(self.call.pfx_run(self.decoder, ctypes.byref(step)))
        return step.tensors["logits"]

    def error_of(self, step: interface.Step) -> str:
        """The error text of a step that must fail."""
        assert self.call.pfx_run(self.decoder, ctypes.byref(step)) != 0
        return self.library.error()
