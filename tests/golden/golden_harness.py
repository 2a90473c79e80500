"""The reference (PEFT's own ``generate``) and the engine under test.

Imports only the engine, the model room and the store's artifacts, so that it also runs on a GPU
machine without FastAPI, pydantic or SQLAlchemy.
"""

import copy
import itertools
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.detokenizer import TokenText
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from prefixd.server.engine.stats import EngineStats
from prefixd.server.engine.step import Step
from prefixd.server.model.buffers import NO_STEP, StepSizes
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.decoder_check import Evidence, check_decoder
from prefixd.server.model.decoders import PAGED, make_decoder
from prefixd.server.model.device_runner import DeviceRunner
from prefixd.server.model.gated_places import attention_name
from prefixd.server.model.graphs import cuda_graphs
from prefixd.server.model.int8_decoder import make_int8_decoder
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.paged import PagedDecoder
from prefixd.server.model.paged_module import PagedModuleDecoder
from prefixd.server.model.prefix import HardPrompt, Prefix, prefix_of, refused_kinds, rows_of
from prefixd.server.model.runner import Runner
from prefixd.server.model.selfcheck import self_check
from prefixd.server.testing import ByteDetokenizer
from prefixd.store.artifact.artifact import Artifact, pack_peft, read_artifact
from prefixd.store.artifact.base_spec import BaseSpec
from tests.model import broken_models
from tests.model.cpu.native_library import COMPILED

DEVICE = os.environ.get("PREFIXD_TEST_DEVICE", "cpu")
"""The device of the reference and the engine; ``make gpu-check`` sets it to cuda."""

VOCAB = 211
TASK = 2
_SIZES = StepSizes(rows=80, tokens=1024, decoding=8)
"""On a GPU: steps of more rows that decode run without a graph."""

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def tiny_configs() -> dict[str, Any]:
    """Configs of tiny random models, one for each tested architecture."""
    common = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": 512}
    gated = {**common, "intermediate_size": 96, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "llama": transformers.LlamaConfig(**gated, **ids),
        "gpt2": transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=512, **ids
        ),
        "qwen3": transformers.Qwen3Config(**gated, **ids, head_dim=32),
        "mistral": transformers.MistralConfig(**gated, **ids, sliding_window=None),
        "gpt_neox": transformers.GPTNeoXConfig(**common, **ids, intermediate_size=96),
    }


def narrow_config() -> Any:
    """The config of a model whose embeddings are narrower than its hidden size, as OPT-350m's."""
    return transformers.OPTConfig(
        **SIZES,
        vocab_size=VOCAB,
        word_embed_proj_dim=32,
        ffn_dim=96,
        max_position_embeddings=512,
        do_layer_norm_before=False,
    )


def tiny_model(name: str, seed: int = 0) -> Any:
    """``random_model`` of a tested architecture."""
    return random_model(tiny_configs()[name], seed)


def random_model(config: Any, seed: int = 0) -> Any:
    """A random model whose logits differ enough that rounding does not change the greedy token."""
    return broken_models.random_model(config, seed=seed).to(DEVICE)


def peft_configs(num_virtual_tokens: int) -> dict[str, Any]:
    """PEFT configs of every accepted type."""
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens}
    count = num_virtual_tokens
    return {
        "PROMPT_TUNING": peft.PromptTuningConfig(**common),
        "P_TUNING": peft.PromptEncoderConfig(**common, encoder_hidden_size=24),
        "CPT": peft.CPTConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=count,
            cpt_token_ids=[(5 * i + 3) % VOCAB for i in range(count)],
            cpt_mask=[1] * count,
            cpt_tokens_type_mask=[1 + i % 4 for i in range(count)],
        ),
        "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(
            **common, num_tasks=3, num_ranks=2
        ),
        "PREFIX_TUNING": peft.PrefixTuningConfig(**common),
        "CARTRIDGE": peft.CartridgeConfig(**common, num_frozen_tokens=1),
    }


@dataclass
class Adapter:
    """A PEFT model with a random adapter, and the same adapter saved to disk."""

    model: Any
    folder: Path
    task_id: int | None

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """PEFT's greedy tokens for a single unpadded request: the reference."""
        ids = torch.tensor([prompt], device=self.model.device)
        more = {}
        if self.task_id is not None:
            more["task_ids"] = torch.tensor([self.task_id], device=self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **more,
            )
        return _new_tokens(out[0].tolist(), prompt, count)


def plain_generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy tokens for the bare base."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return _new_tokens(out[0].tolist(), prompt, count)


def _new_tokens(tokens: list[int], prompt: list[int], count: int) -> list[int]:
    assert tokens[: len(prompt)] == prompt
    assert len(tokens) == len(prompt) + count
    return tokens[len(prompt) :]


def make_adapter(
    model: Any,
    peft_type: str,
    num_virtual_tokens: int,
    folder: Path,
    *,
    seed: int = 0,
    token_dim: int | None = None,
    num_attention_heads: int | None = None,
) -> Adapter:
    """Wrap a copy of ``model`` with a random adapter strong enough to change the output.

    ``token_dim`` is the width of its rows where PEFT takes it wrongly from the model's config, and
    ``num_attention_heads`` the number of KV heads where it does not find that there.
    """
    torch.manual_seed(seed)
    config = peft_configs(num_virtual_tokens)[peft_type]
    if token_dim is not None:
        config.token_dim = token_dim
    if num_attention_heads is not None:
        config.num_attention_heads = num_attention_heads
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad and weight.dim() > 1:
            weight.data = torch.randn(weight.shape).to(DEVICE) * (
                0.1 if "prompt_encoder" in name else 0.3
            )
    wrapped = wrapped.to(DEVICE)
    wrapped.save_pretrained(folder)
    return Adapter(wrapped, folder, TASK if peft_type.startswith("MULTITASK") else None)


def make_adaption_prompt(
    model: Any,
    length: int,
    folder: Path,
    *,
    layers: int = 2,
    gate: float = 3.0,
    seed: int = 0,
) -> Adapter:
    """As ``make_adapter``: a random adaption prompt in the last ``layers`` layers."""
    torch.manual_seed(seed)
    config = peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=length, adapter_layers=layers
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape) if weight.dim() > 1 else torch.full((1,), gate)
    wrapped = wrapped.to(DEVICE)
    wrapped.save_pretrained(folder)
    return Adapter(wrapped, folder, None)


def spec_of(base: LoadedBase, *, max_virtual_tokens: int = 256) -> BaseSpec:
    """The store's view of a base, with bounds wide enough for random adapters."""
    shape = base.shape
    return BaseSpec(
        name=base.name,
        fingerprint=base.fingerprint,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        embedding_width=shape.embedding_width,
        max_virtual_tokens=max_virtual_tokens,
        dtype=str(base.dtype).removeprefix("torch."),
        max_abs_embedding=1e4,
        max_abs_kv=1e4,
        encoder_layers=None if base.pair is None else base.pair.encoder_layers,
        refused_kinds=refused_kinds(base),
        attention_module=attention_name(base.module),
    )


def parse(adapter: Adapter, base: LoadedBase) -> Artifact:
    """Parse an adapter folder with the store's strict parser."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "artifact"
        config = (adapter.folder / "adapter_config.json").read_bytes()
        weights = adapter.folder / "adapter_model.safetensors"
        pack_peft(config, weights, target, task_id=adapter.task_id)
        return read_artifact(target, base=spec_of(base), count_tokens=len)


@dataclass
class Served:
    """An engine over a real runner; prefixes are passed to it directly, without a store."""

    base: LoadedBase
    runner: Any
    engine: Engine = field(init=False)
    evidence: Evidence | None = None
    pool: dict[str, int] = field(default_factory=dict)
    prefixes: dict[PrefixKey, Prefix] = field(default_factory=dict)
    numbers: Any = field(default_factory=itertools.count)

    def restart(self, **config: Any) -> None:
        """Serve with a scheduler of ``config`` over the same decoder, whose blocks keep what they
        hold. ``num_blocks`` may be fewer than the decoder has."""
        if hasattr(self, "engine"):
            self.close()
        self.engine = Engine(
            config=SchedulerConfig(**{**self.pool, **config}),
            runner=self.runner,
            source=self,
            detokenizer=EmptyDetokenizer,
        )
        self.engine.start()

    def close(self) -> None:
        """Stop the engine; all blocks must be accounted for."""
        self.engine.stop()
        self.engine.core.scheduler.check_integrity()

    def add(self, adapter: Adapter, *, tenant: str = "t") -> PrefixHandle:
        """Make an adapter available."""
        return self.put(prefix_of(parse(adapter, self.base), self.base, None), tenant=tenant)

    def add_tokens(self, tokens: list[int], *, tenant: str = "t") -> PrefixHandle:
        """Make a hard prompt available."""
        return self.put(HardPrompt(tuple(tokens)), tenant=tenant)

    def put(self, prefix: Prefix, *, tenant: str = "t") -> PrefixHandle:
        """Make a prefix available."""
        key = PrefixKey(tenant, f"digest-{next(self.numbers)}")
        self.prefixes[key] = prefix
        return PrefixHandle(key, prefix.num_tokens, gated=prefix.gated_from is not None)

    def fetch(self, key: PrefixKey) -> Prefix:
        """Implements PrefixSource over ``prefixes``."""
        return rows_of(self.prefixes[PrefixKey(key.tenant, key.digest)], key.rows)

    def start(
        self,
        prompt: list[int],
        prefix: PrefixHandle | None = None,
        *,
        count: int = 16,
        sampling: SamplingParams | None = None,
        kv_reuse: bool = True,
        **more: Any,
    ) -> Callable[[], list[int]]:
        """Submit a request; the returned call waits for its tokens."""
        events: queue.Queue[Event] = queue.Queue()
        request = AdmittedRequest(
            request_id=str(next(self.numbers)),
            prompt=tuple(prompt),
            prefix=prefix,
            sampling=sampling or SamplingParams(temperature=0),
            stop=StopParams(max_tokens=count),
            kv_reuse=kv_reuse,
            **{"tenant": prefix.key.tenant if prefix else "t", **more},
        )
        self.engine.submit(request, events.put)
        return lambda: collect(events)

    def generate(
        self, prompt: list[int], prefix: PrefixHandle | None = None, *, count: int = 16
    ) -> list[int]:
        """Run one request and return its tokens."""
        return self.start(prompt, prefix, count=count)()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold steps back until the block ends, so that all requests started in it run together."""
        released, submit = threading.Event(), self.runner.submit

        def submit_later(step: Step) -> None:
            released.wait()
            submit(step)

        self.runner.submit = submit_later
        try:
            yield
        finally:
            self.runner.submit = submit
            released.set()

    def stats(self) -> EngineStats:
        """The engine's stats once it is idle; a request ends before its last step is counted."""
        for _ in range(6000):
            if self.engine.idle:
                return self.engine.stats()
            threading.Event().wait(0.01)
        raise AssertionError(f"the engine did not become idle: {self.engine.core.scheduler!r}")


class RequestFailed(Exception):
    """The engine ended a request with an error."""


def collect(events: "queue.Queue[Event]") -> list[int]:
    """All tokens of a request."""
    tokens: list[int] = []
    while True:
        event = events.get(timeout=120)
        if isinstance(event, TokenEvent):
            tokens += event.token_ids
        elif isinstance(event, FinishEvent):
            if event.reason is FinishReason.ERROR:
                raise RequestFailed(event.error)
            assert event.reason is FinishReason.LENGTH
            return tokens


class EmptyDetokenizer(ByteDetokenizer):
    """Returns no text: token ids of a random model have no meaning."""

    def push(self, token_id: int) -> Sequence[TokenText]:
        return (TokenText(""),)


def serve(
    model: Any,
    *,
    num_blocks: int = 128,
    block_size: int = 16,
    dtype: str = "float32",
    device: str = DEVICE,
    kernels: str = os.environ.get("PREFIXD_TEST_KERNELS", "auto"),
    quantize: str = "none",
    **config: Any,
) -> Served:
    """Start an engine over a copy of ``model``; call ``served.engine.stop()`` at the end."""
    base = prepare_base(
        copy.deepcopy(model), None, name=model.config.model_type, dtype=dtype, device=device
    )
    checked = self_check(base, block_size=block_size)
    COMPILED.mkdir(exist_ok=True)
    pool: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size}
    decoder: Decoder
    if quantize == "int8":
        decoder, _ = make_int8_decoder(base, kernels, **pool, data_folder=COMPILED)
    else:
        sizes = NO_STEP if base.device.type == "cpu" else _SIZES
        decoder = make_decoder(base, kernels, **pool, data_folder=COMPILED, sizes=sizes)
        if decoder.name != "module":
            check_decoder(decoder, checked.evidence, num_blocks=num_blocks)
    if base.device.type == "cuda" and kernels == "auto":
        assert decoder.name in PAGED  # the module alone would give right tokens too
    runner: Runner | DeviceRunner = Runner(decoder)
    if isinstance(decoder, PagedDecoder | PagedModuleDecoder):  # as on a GPU: one step ahead
        if isinstance(decoder, PagedDecoder) and decoder.device.type == "cuda":
            decoder.capture(_SIZES.decoding, new_graph=cuda_graphs())
        runner = DeviceRunner(decoder, max_rows=config.get("max_running", 64))
    pool["state_blocks"] = decoder.state_blocks
    served = Served(base, runner, evidence=checked.evidence, pool=pool)
    served.restart(**config)
    return served


def prompts(count: int, *, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Random prompts of 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 41, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
