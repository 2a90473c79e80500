"""Decode steps that are replayed from graphs give the tokens of steps that are not."""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk, Step
from prefixd.server.model import graphs
from prefixd.server.model.batch import FlatBatch, lay_out
from prefixd.server.model.buffers import StepSizes
from prefixd.server.model.decoders import make_decoder
from prefixd.server.model.graphs import length_bounds, row_buckets
from prefixd.server.model.paged import PagedDecoder
from prefixd.server.model.runner import Runner
from tests.model.fake_graph import DEVICE, FakeGraph, graphs_of_the_device
from tests.model.test_decoders import POOL, base_of, check_nan_stays

GREEDY = SamplingParams(temperature=0)
PADDING_TOKEN = 7
"""Not in any prompt."""


SIZES = StepSizes(16, 128, 8)


def make(
    folder: Path,
    *,
    captured: int | None,
    sizes: StepSizes = SIZES,
    family: str = "llama",
    dtype: str = "float32",
) -> PagedDecoder:
    base = base_of(family, dtype, device=DEVICE)
    decoder = make_decoder(base, "paged", **POOL, data_folder=folder, sizes=sizes)
    assert isinstance(decoder, PagedDecoder)
    if captured is not None:
        decoder.capture(captured, new_graph=graphs_of_the_device())
    return decoder


def prompt(number: int) -> list[int]:
    return [11 + (17 * number + 5 * position) % 90 for position in range(3 + 9 * number)]


class Sequences:
    """Sequences that decode greedily on a decoder, as the engine would plan them."""

    def __init__(self, decoder: PagedDecoder) -> None:
        self._runner, self._blocks = Runner(decoder), itertools.count(1)
        self.tokens: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}

    def chunk(self, number: int) -> Chunk:
        """The tokens of a sequence that have no KV yet."""
        if number not in self.tokens:
            self.tokens[number], self.outputs[number] = prompt(number), []
            self._tables[number] = []
            start = 0
        else:
            start = len(self.tokens[number]) - 1
        table, end = self._tables[number], len(self.tokens[number])
        table += [next(self._blocks) for _ in range(-(-end // 16) - len(table))]
        return Chunk(number, self.tokens[number][start:], start, tuple(table), sampling=GREEDY)

    def step(self, *numbers: int) -> None:
        """One pass over some sequences."""
        sampled = self._runner.run(Step(chunks=[self.chunk(n) for n in numbers])).sampled
        for number, (token,) in sampled.items():
            self.tokens[number].append(token.token_id)
            self.outputs[number].append(token.token_id)


SCHEDULE: Sequence[tuple[int, ...]] = (
    *((0,), (0,), (1, 0), (0, 1), (2, 0, 1), (0, 1, 2), (0, 1, 2), (3, 4, 0, 1, 2)),
    *((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (0, 2, 3, 4), (4, 0, 2), (0, 2), (2,), (2, 0)),
)
"""Sequences of each step: they begin in mixed steps, end, and change places."""


def outputs_of(decoder: PagedDecoder) -> dict[int, list[int]]:
    sequences = Sequences(decoder)
    for numbers in SCHEDULE:
        sequences.step(*numbers)
    return sequences.outputs


def test_replayed_steps_give_the_tokens_of_eager_ones(tmp_path: Path) -> None:
    expected = outputs_of(make(tmp_path, captured=None))
    FakeGraph.replays = 0
    decoder = make(tmp_path, captured=8)
    memory = decoder.buffers.memory
    assert outputs_of(decoder) == expected
    assert FakeGraph.replays == 11  # all steps but those with a prompt
    assert decoder.buffers.memory is memory


def test_tokens_are_equal_in_every_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs_of(make(tmp_path, captured=None))
    monkeypatch.setattr(graphs, "row_buckets", lambda max_rows: [max_rows])
    for bucket in (5, 8, 16):
        assert outputs_of(make(tmp_path, captured=bucket)) == expected


def test_larger_steps_run_without_a_graph(tmp_path: Path) -> None:
    FakeGraph.replays = 0
    expected = outputs_of(make(tmp_path, captured=None))
    assert outputs_of(make(tmp_path, captured=2)) == expected
    assert FakeGraph.replays == 5


def test_graphs_are_captured_again_when_the_buffers_move(tmp_path: Path) -> None:
    expected = outputs_of(make(tmp_path, captured=None))
    decoder = make(tmp_path, captured=8, sizes=StepSizes(8, 8, 8))
    memory = decoder.buffers.memory
    assert outputs_of(decoder) == expected
    assert decoder.buffers.memory is not memory


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("qwen3_moe", "bfloat16")],
)
def test_a_graph_gives_the_bits_of_an_eager_step_of_as_many_rows(
    family: str, dtype: str, tmp_path: Path
) -> None:
    decoder = make(tmp_path, captured=8, family=family, dtype=dtype)
    sequences = Sequences(decoder)
    sequences.step(0, 1, 2)
    batch = lay_out([sequences.chunk(n) for n in (0, 2, 1)])
    assert decoder._graphs is not None
    decoder._graphs._rows = [8]
    FakeGraph.replays = 0
    with torch.inference_mode():
        replayed = decoder._graphs.run(batch)
        assert replayed is not None
        replayed = replayed.clone()
        decoder.buffers.fill(batch, num_rows=8)
        decoder.buffers.send()
        eager = decoder._decode(decoder.buffers.tensors(max_length=decoder.base.context))
    assert FakeGraph.replays == 1
    assert replayed[:3].isfinite().all()
    assert torch.equal(replayed[:3], eager[:3])


def test_nan_stays_in_its_own_sequence(tmp_path: Path) -> None:
    FakeGraph.replays = 0
    check_nan_stays(make(tmp_path, captured=4))
    decoder = make(tmp_path, captured=4)
    sequences = Sequences(decoder)
    sequences.step(0, 1, 2)
    chunks = [sequences.chunk(number) for number in (0, 1, 2)]
    with torch.inference_mode():
        clean = decoder.forward(lay_out(chunks)).values.clone()
        block = chunks[1].block_table[0]
        decoder.cache.pool[:, :, block, 2] = torch.nan
        spoiled = decoder.forward(lay_out(chunks)).values
    assert FakeGraph.replays == 2
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


def test_graphs_are_captured_again_when_the_buffers_come_to_the_place_of_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an allocator may give it to them, in two steps that both did not fit."""
    expected = outputs_of(make(tmp_path, captured=None))
    decoder = make(tmp_path, captured=None, sizes=StepSizes(8, 8, 8))
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: 128)
    decoder.capture(8, new_graph=graphs_of_the_device())
    assert outputs_of(decoder) == expected


def zeros(decoder: PagedDecoder, batch: FlatBatch) -> None:
    pass


def nan(decoder: PagedDecoder, batch: FlatBatch) -> None:
    """Padding embeds to NaN, and the scratch block holds it."""
    decoder.weights.embedding[PADDING_TOKEN] = torch.nan
    decoder.cache.pool[:, :, -1] = torch.nan
    decoder.buffers.tokens[len(batch.rows) :] = PADDING_TOKEN


def another_sequence(decoder: PagedDecoder, batch: FlatBatch) -> None:
    """Padding has the token, position and blocks of a row that left the step."""
    buffers, rows = decoder.buffers, len(batch.rows)
    buffers.tokens[rows:] = 31
    buffers.positions[rows:] = 12
    buffers.block_table[rows:, :2] = [3, 4]
    decoder.cache.pool[:, :, -1] = decoder.cache.pool[:, :, 3]


@pytest.mark.parametrize("spoil", [nan, another_sequence])
def test_padding_changes_no_bit_of_a_real_row(
    spoil: Callable[[PagedDecoder, FlatBatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At one number of rows of the graph."""
    logits = {}
    for spoiled in (zeros, spoil):
        decoder = make(tmp_path, captured=8)
        sequences = Sequences(decoder)
        sequences.step(0, 1, 2)
        batch = lay_out([sequences.chunk(n) for n in (0, 2, 1, 0, 2)])
        fill = decoder.buffers.fill

        def fill_and_spoil(
            batch: FlatBatch,
            *,
            num_rows: int | None = None,
            fill=fill,
            spoiled=spoiled,
            decoder=decoder,
        ) -> None:
            fill(batch, num_rows=num_rows)
            spoiled(decoder, batch)

        monkeypatch.setattr(decoder.buffers, "fill", fill_and_spoil)
        with torch.inference_mode():
            logits[spoiled] = decoder.forward(batch).values.clone()
    assert logits[zeros].isfinite().all()
    assert torch.equal(logits[zeros], logits[spoil])


def test_buckets_of_rows_and_bounds_of_lengths() -> None:
    assert row_buckets(1) == [1]
    assert row_buckets(3) == [1, 2, 3]
    assert row_buckets(8) == [1, 2, 4, 8]
    assert row_buckets(36) == [1, 2, 4, 8, 16, 24, 32, 36]
    assert length_bounds(512) == [512]
    assert length_bounds(1024) == [1024]
    assert length_bounds(9000) == [1024, 4096, 9000]


def test_the_log_names_how_many_graphs_and_their_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=graphs.__name__):
        make(tmp_path, captured=8)
    [message] = [record.message for record in caplog.records]
    assert message.startswith("captured 4 decode graphs of up to 8 rows in ")
    assert message.endswith(" MiB")
    if DEVICE == "cpu":
        assert message.endswith("they hold 0 MiB")
