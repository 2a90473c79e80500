"""Encoder-decoders: tokens equal PEFT's ``generate`` and, for the bare base, transformers'."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.decoders import DecoderUnavailable, make_pair_decoder
from prefixd.server.model.encoder_decoder.facts import refuse_unsupported_pair
from prefixd.server.model.load import prepare_base
from prefixd.server.model.pair_check import check_pair
from prefixd.server.model.pair_decoder import PairDecoder
from prefixd.server.model.prefix import KVPrefix, Prefix
from prefixd.server.model.runner import Runner
from tests.golden.encoder_decoders import (
    COUNT,
    FAST,
    MODELS,
    VIRTUAL,
    adapters_of,
    generate,
    model_of,
    sources,
    task_of,
)
from tests.golden.golden_harness import (
    DEVICE,
    Adapter,
    RequestFailed,
    Served,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BLOCK = 8


class RecordingRunner(Runner):
    """Keeps the steps that it ran."""

    def __init__(self, decoder: PairDecoder) -> None:
        super().__init__(decoder)
        self.steps: list[Step] = []

    def run(self, step: Step) -> StepOutput:
        self.steps.append(step)
        return super().run(step)


class PairServed(Served):
    """An engine over an encoder-decoder."""

    @property
    def steps(self) -> list[Step]:
        assert isinstance(self.runner, RecordingRunner)
        return self.runner.steps

    def ask(
        self, source: list[int], prefix: PrefixHandle | None = None, **more: Any
    ) -> Callable[[], list[int]]:
        """Submit an input for the encoder."""
        assert self.base.pair is not None
        num_source = len(source) + (prefix.num_tokens if prefix and prefix.gated else 0)
        more |= {"num_side_blocks": -(-num_source // BLOCK), "source": tuple(source)}
        return self.start(list(self.base.pair.start), prefix, count=COUNT, **more)

    def put(self, prefix: Prefix, *, tenant: str = "t") -> PrefixHandle:
        handle = super().put(prefix, tenant=tenant)
        return replace(handle, gated=prefix.gated_from is not None)


@pytest.fixture
def serving() -> Iterator[Callable[..., PairServed]]:
    started: list[PairServed] = []

    def start(model: Any, *, num_blocks: int = 200, **config: Any) -> PairServed:
        base = prepare_base(copy.deepcopy(model), None, name="pair", dtype="float32", device=DEVICE)
        check_pair(base, block_size=BLOCK)
        decoder = make_pair_decoder(base, "auto", num_blocks=num_blocks, block_size=BLOCK)
        pool = {"num_blocks": num_blocks, "block_size": BLOCK}
        served = PairServed(base, RecordingRunner(decoder), pool=pool)
        served.restart(**config)
        started.append(served)
        return served

    yield start
    for served in started:
        served.close()


@dataclass(frozen=True)
class Reference:
    """A model, adapters of every type that PEFT has for it and the bare base, and what PEFT and
    transformers generate for 12 inputs."""

    model: Any
    rows: list[tuple[list[int], Adapter | None]]
    expected: list[list[int]]

    def start(self, served: PairServed) -> list[Callable[[], list[int]]]:
        """Submit all rows."""
        adapters = {id(adapter): adapter for _, adapter in self.rows if adapter is not None}
        handles = {key: served.add(adapter) for key, adapter in adapters.items()}
        return [served.ask(source, handles.get(id(adapter))) for source, adapter in self.rows]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    @functools.cache
    def make(name: str) -> Reference:
        model = model_of(name)
        adapters = [*adapters_of(model, tmp_path_factory.mktemp(name)), None]
        rows = list(zip(sources(12), itertools.cycle(adapters), strict=False))
        expected = [
            generate(model, source)
            if adapter is None
            else generate(adapter.model, source, **task_of(adapter))
            for source, adapter in rows
        ]
        assert len({tuple(tokens) for tokens in expected}) > 6, "the inputs hardly matter"
        return Reference(model, rows, expected)

    return make


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MODELS],
)
def test_a_mixed_batch_gives_the_tokens_of_peft(
    name: str, serving: Callable[..., PairServed], reference: Callable[[str], Reference]
) -> None:
    known = reference(name)
    served = serving(known.model)
    with served.held():
        waiting = known.start(served)
    assert [wait() for wait in waiting] == known.expected
    assert max(len(step.chunks) for step in served.steps) == len(known.rows)


@pytest.mark.parametrize("name", FAST)
def test_preempted_sequences_are_encoded_again(
    name: str, serving: Callable[..., PairServed], reference: Callable[[str], Reference]
) -> None:
    known = reference(name)
    served = serving(known.model, num_blocks=24, max_prefill_chunk=3, host_tokens=100)
    with served.held():
        waiting = known.start(served)
    assert [wait() for wait in waiting] == known.expected
    assert served.stats().preemptions > 0


@pytest.mark.parametrize("name", FAST)
def test_a_prefix_of_nan_leaves_its_neighbours_as_they_were(
    name: str, serving: Callable[..., PairServed], reference: Callable[[str], Reference]
) -> None:
    known = reference(name)
    served = serving(known.model, num_blocks=150)
    kv = torch.full((2 * served.base.shape.num_layers, VIRTUAL, kv_width(served)), torch.nan)
    bad = [served.put(KVPrefix(kv)), served.put(KVPrefix(kv, gated_from=0))]
    with served.held():
        failing = [served.ask([5, 6, 7], handle) for handle in bad]
        waiting = known.start(served)
    assert [wait() for wait in waiting] == known.expected
    for wait in failing:
        with pytest.raises(RequestFailed):
            wait()
    again = known.start(served)  # in blocks that held NaN
    assert [wait() for wait in again] == known.expected


def test_other_decoders_than_the_module_are_refused_by_name() -> None:
    base = prepare_base(model_of("t5"), None, name="pair", dtype="float32", device=DEVICE)
    with pytest.raises(DecoderUnavailable, match="cpu_kernels is avx2, but pair is an encoder-"):
        make_pair_decoder(base, "avx2", num_blocks=8, block_size=BLOCK)
    with pytest.raises(UnsupportedModel, match=r"t5 .* cannot be served with tensor_parallel"):
        refuse_unsupported_pair(base.module.config, ranks=2)


def test_the_check_passes_in_bfloat16_and_finds_other_logits() -> None:
    base = prepare_base(model_of("bart"), None, name="pair", dtype="bfloat16", device=DEVICE)
    check_pair(base, block_size=BLOCK)
    assert base.pair is not None
    cross = base.pair.hooks.cross
    cross[0], cross[1] = cross[1], cross[0]
    cross[:2] = [replace(cross[0], layer=0), replace(cross[1], layer=1)]
    with pytest.raises(UnsupportedModel, match="other logits over KV blocks than by itself"):
        check_pair(base, block_size=BLOCK)


def kv_width(served: PairServed) -> int:
    return served.base.shape.num_kv_heads * served.base.shape.head_dim
