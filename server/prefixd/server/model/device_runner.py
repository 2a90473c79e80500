"""Runs steps on a GPU one ahead of the host: submitted without waiting, collected by an event.

::

    host      buffers, settings ──>                                      ──> event, unpack
    device        forward ── logits ── sample ── packed ── copy to pinned memory
                     └─ reads tokens of the step before ──┘ writes its own
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch

from prefixd.server.engine.prefix_source import StagedPrefix
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.runner import Masks
from prefixd.server.engine.step import Chunk, Sampled, Step, StepOutput
from prefixd.server.model.batch import lay_out
from prefixd.server.model.decoder import Logits
from prefixd.server.model.device_sampler import DeviceSampler, Prepared
from prefixd.server.model.ensembles import combine
from prefixd.server.model.paged import PagedDecoder
from prefixd.server.model.paged_module import PagedModuleDecoder
from prefixd.server.model.runner import out_of_memory, write_pool
from prefixd.server.model.scorer import score, scored_chunks, unpack


class _Part(NamedTuple):
    chunks: Sequence[Chunk]
    prepared: Prepared
    packed: torch.Tensor
    agreed: torch.Tensor | None = None


@dataclass(slots=True)
class _InFlight:
    """A step on the device. ``first_rows`` is where the rows of each chunk begin among those that
    is sampled, for all rows of an ensemble its first one, and ``groups`` has the rows of ensembles;
    ``parts`` are the chunks sampled together, with their results in host memory and whether each
    row of their ensembles agrees, and ``scored`` those with targets, with theirs in ``scores``."""

    saved: dict[PrefixKey, StagedPrefix]
    chunks: list[Chunk] = field(default_factory=list)
    masked: list[Chunk] = field(default_factory=list)
    first_rows: dict[int, int] = field(default_factory=dict)
    groups: dict[int, list[int]] = field(default_factory=dict)
    logits: Logits | None = None
    parts: list[_Part] = field(default_factory=list)
    scored: Sequence[Chunk] = ()
    scores: torch.Tensor | None = None
    ended: torch.cuda.Event | None = None
    error: Exception | None = None


class DeviceRunner:
    """A ModelRunner whose steps are queued on the device. Not thread-safe."""

    depth = 1

    def __init__(self, decoder: PagedDecoder | PagedModuleDecoder, *, max_rows: int) -> None:
        """``max_rows`` is the most sequences of a step."""
        self.decoder = decoder
        self._sampler = DeviceSampler(
            decoder.device, num_ids=decoder.base.num_logits, max_rows=max_rows
        )
        self._in_flight: deque[_InFlight] = deque()
        self._first_rows: dict[int, int] = {}  # of the step submitted last

    def submit(self, step: Step) -> None:
        """Queue a forward pass, and the sampling of all rows that need no mask. Raises
        OutOfMemory."""
        with out_of_memory(self.decoder.device), torch.inference_mode():
            flight = self._begin(step)
            self._mark(flight)
        self._in_flight.append(flight)

    def complete(self, masks: Callable[[], Masks]) -> None:
        """Queue the sampling of the masked rows of the step submitted last. What fails is raised
        when the step is collected."""
        flight = self._in_flight[-1]
        joined = masks()
        chunks = [
            replace(chunk, mask=joined[chunk.seq_id])
            for chunk in flight.masked
            if chunk.seq_id in joined
        ]
        try:
            if chunks:
                with out_of_memory(self.decoder.device), torch.inference_mode():
                    self._sample(flight, chunks)
                    self._mark(flight)
        except Exception as error:  # noqa: BLE001 - raised by collect
            flight.error = error

    def collect(self) -> StepOutput:
        """Wait for the oldest step. Raises OutOfMemory."""
        flight = self._in_flight.popleft()
        if flight.error is not None:
            raise flight.error
        with out_of_memory(self.decoder.device):
            if flight.ended is not None:
                flight.ended.synchronize()
        sampled: dict[int, Sequence[Sampled]] = {}
        for part in flight.parts:
            tokens = iter(self._sampler.unpack(part.packed, part.prepared))
            agreed = iter(() if part.agreed is None else part.agreed.tolist())
            for chunk in part.chunks:
                new = list(islice(tokens, 1 + chunk.num_drafts))
                if chunk.ensemble is not None:
                    new[0].agreed = tuple(islice(agreed, len(flight.groups[chunk.ensemble])))
                sampled[chunk.seq_id] = chunk.verified(new)
        if flight.scores is None:
            return StepOutput(sampled, flight.saved)
        return StepOutput(sampled, flight.saved, scored=unpack(flight.scores, flight.scored))

    def _begin(self, step: Step) -> _InFlight:
        saved, forwarded = write_pool(self.decoder, step)
        flight = _InFlight(saved, [chunk for chunk in step.chunks if chunk.sampling is not None])
        before, self._first_rows = self._first_rows, flight.first_rows
        if not step.chunks and not forwarded:
            return flight
        batch = lay_out(step.chunks, forwarded)
        batch.pending = [
            (row.offset + row.length - 1, before[chunk.seq_id])
            for chunk, row in zip(step.chunks, batch.rows, strict=False)  # compiles follow
            if chunk.is_pending
        ]
        flight.logits = self.decoder.forward(batch)
        first = 0
        for chunk in flight.chunks:
            leader = chunk.seq_id if chunk.ensemble is None else chunk.ensemble
            flight.first_rows[chunk.seq_id] = flight.first_rows.get(leader, first)
            if chunk.ensemble is not None:
                flight.groups.setdefault(leader, []).append(first)
            first += 1 + chunk.num_drafts
        if to_score := scored_chunks(step.chunks):
            flight.scored = to_score
            packed = score(flight.logits.values[first:], to_score)
            flight.scores = self._sampler.to_host(packed)
            flight.logits = flight.logits.first(first)
        masked = set(step.masked)
        flight.masked = [chunk for chunk in flight.chunks if chunk.seq_id in masked]
        self._sampler.keep(flight.masked)
        self._sample(flight, [chunk for chunk in flight.chunks if chunk.seq_id not in masked])
        return flight

    def _sample(self, flight: _InFlight, chunks: Sequence[Chunk]) -> None:
        """Queue sampling and the copy of its results; the tokens stay on the device for the next
        step too."""
        alone = [chunk for chunk in chunks if chunk.ensemble is None]
        if alone:
            self._sample_alone(flight, alone)
        leaders = [chunk for chunk in chunks if chunk.ensemble == chunk.seq_id]
        if leaders:
            self._sample_ensembles(flight, leaders)

    def _sample_ensembles(self, flight: _InFlight, leaders: Sequence[Chunk]) -> None:
        assert flight.logits is not None
        groups, values = [flight.groups[leader.seq_id] for leader in leaders], flight.logits.values
        prepared = self._sampler.prepare(leaders)
        packed = self._sampler.run(Logits(combine(values, groups)), prepared)
        tokens = packed[: len(leaders)]
        index = torch.tensor([row for group in groups for row in group], device=values.device)
        sizes = torch.tensor([len(group) for group in groups], device=values.device)
        own = values.index_select(0, index).max(dim=-1).indices
        agreed = own == tokens.repeat_interleave(sizes, output_size=len(own))
        self.decoder.buffers.keep_samples(tokens, index[sizes.cumsum(0) - sizes])
        to_host = self._sampler.to_host
        flight.parts.append(_Part(leaders, prepared, to_host(packed), to_host(agreed)))

    def _sample_alone(self, flight: _InFlight, chunks: Sequence[Chunk]) -> None:
        assert flight.logits is not None
        rows = [
            row
            for chunk in chunks
            for row in range(
                flight.first_rows[chunk.seq_id],
                flight.first_rows[chunk.seq_id] + 1 + chunk.num_drafts,
            )
        ]
        is_all = len(chunks) == len(flight.chunks)
        prepared = self._sampler.prepare(chunks, rows=None if is_all else rows)
        packed = self._sampler.run(flight.logits, prepared)
        kept = None if is_all else prepared.inputs["rows"]
        self.decoder.buffers.keep_samples(packed[: len(rows)], kept)
        flight.parts.append(_Part(chunks, prepared, self._sampler.to_host(packed)))

    def _mark(self, flight: _InFlight) -> None:
        """Have ``collect`` wait for all that is queued now, also where nothing was sampled: what a
        pass takes is measured, and what fails is a failure of its own step."""
        flight.ended = new_event(self.decoder.device)
        if flight.ended is not None:
            flight.ended.record()


def new_event(device: torch.device) -> torch.cuda.Event | None:
    """An event of the device; None on a CPU, where a call has ended when it returns."""
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
