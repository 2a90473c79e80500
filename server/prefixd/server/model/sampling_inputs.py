"""What the rows of a step ask of the sampler, as tensors: filled in host memory, copied once.

Rows are grouped by what they need (draw, filter, penalties, log-probabilities); each group has its
own sections of the one buffer. Everything that decides which operations run is known on the host,
and is the ``Plan``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prefixd.server.engine.request import SamplingParams
from prefixd.server.model.draws import GREEDY_BELOW, HEAD, head_width
from prefixd.server.model.sampling_plan import Plan, num_bytes, views

_NUM_BUFFERS = 4
"""Copies in flight: two steps, each of which may be sampled in two parts."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What each of n rows asks for: ``params`` and ``banned`` [n]; ``listed`` which of the logits
    they are (None: the first n). ``num_rows`` is n or more: the rest is padding, for a graph.
    ``slots`` maps each row with penalties to its row of the count table, ``drafted`` to the
    proposed tokens before it, where there are any. The ``masked`` have a bit mask each."""

    params: Sequence[SamplingParams]
    banned: Sequence[Sequence[int]]
    num_rows: int
    listed: Sequence[int] | None = None
    slots: Mapping[int, int] = field(default_factory=dict)
    drafted: Mapping[int, Sequence[int]] = field(default_factory=dict)
    masked: Sequence[int] = ()

    def select(self, test: Callable[[SamplingParams], bool]) -> list[int]:
        """The rows whose settings pass; with the padding if all do."""
        members = [row for row, params in enumerate(self.params) if test(params)]
        if len(members) == len(self.params):
            members += range(len(members), self.num_rows)
        return members


class SamplingInputs:
    """Sends the settings of rows to the device, without waiting for earlier ones to arrive.

    Host memory is pinned where the device is CUDA; on a CPU the host's is the device's. What is the
    same as in an earlier call is not written again. The address on the device is the same for all
    calls, until one is larger than any before.
    """

    def __init__(self, device: torch.device, *, num_ids: int) -> None:
        """``num_ids`` is the width of the logits, with padding."""
        self._device, self._num_ids = device, num_ids
        self._buffers = [_HostBuffer(device, num_ids) for _ in range(_NUM_BUFFERS)]
        self._on_device = torch.empty(0, dtype=torch.uint8, device=device)

    def send(
        self, rows: Rows, uniforms: Sequence[float], masks: Sequence[bytes] = ()
    ) -> tuple[Plan, Mapping[str, torch.Tensor]]:
        """Copy settings, draws, and the masks of the masked rows to the device; returns the
        sections there."""
        self._buffers.append(self._buffers.pop(0))
        buffer = self._buffers[-1]
        buffer.fill(rows, uniforms, masks)
        if self._device.type == "cpu":
            return buffer.plan, buffer.tensors
        if len(self._on_device) < len(buffer.memory):
            self._on_device = torch.empty_like(buffer.memory, device=self._device)
        return buffer.plan, buffer.copy_to(self._on_device)


class _HostBuffer:
    """Inputs of one call in host memory."""

    def __init__(self, device: torch.device, num_ids: int) -> None:
        self._is_cuda, self._num_ids = device.type == "cuda", num_ids
        self._rows: Rows | None = None
        self._copied: torch.cuda.Event | None = None
        self._target: torch.Tensor | None = None
        self._on_device: Mapping[str, torch.Tensor] = {}
        self._draws: list[tuple[np.ndarray[Any, Any], list[int]]] = []
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.plan = Plan(rows=0)
        self.tensors: dict[str, torch.Tensor] = {}

    def fill(self, rows: Rows, uniforms: Sequence[float], masks: Sequence[bytes]) -> None:
        """Write what differs from the last call, after its copy has ended."""
        if self._copied is not None:
            self._copied.synchronize()
        if rows != self._rows:
            self._write(rows)
            self._rows = rows
        if len(uniforms) < rows.num_rows:
            uniforms = [*uniforms, *[0.0] * (rows.num_rows - len(uniforms))]
        for section, members in self._draws:
            section[:] = (
                uniforms if len(members) == len(uniforms) else [uniforms[row] for row in members]
            )
        if masks:
            words = self.tensors["mask_words"].numpy().reshape(len(masks), -1)
            for row, mask in zip(words, masks, strict=True):
                held = np.frombuffer(mask, dtype=np.int32)[: len(row)]
                row[: len(held)], row[len(held) :] = held, 0

    def copy_to(self, on_device: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Copy all sections in one go; returns them on the device."""
        size = num_bytes(self.plan)
        on_device[:size].copy_(self.memory[:size], non_blocking=True)
        if self._is_cuda:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        if self._target is not on_device:
            self._target, self._on_device = on_device, views(on_device, self.plan)
        return self._on_device

    def _write(self, rows: Rows) -> None:
        values = _values(rows, self._num_ids)
        self.plan = _plan(rows, values, self._num_ids)
        size = num_bytes(self.plan)
        if size > len(self.memory):
            size = 1 << (size - 1).bit_length()
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        self.tensors, self._target = views(self.memory, self.plan), None
        self._draws = []
        for name, section in self.tensors.items():
            group, _, kind = name.partition("_")
            if name == "mask_words":
                continue  # other ones in each call
            if kind == "uniform":
                self._draws.append((section.numpy(), values[group]))
            else:
                section.numpy()[:] = values[name]


def _values(rows: Rows, num_ids: int) -> dict[str, list[Any]]:
    """The content of each section; the members of a group under its name alone."""
    params = [*rows.params, *[SamplingParams()] * (rows.num_rows - len(rows.params))]
    groups = {
        "plain": rows.select(lambda p: _is_drawn(p) and not p.is_filtered),
        "head": rows.select(lambda p: _is_drawn(p) and p.is_filtered and _in_head(p, num_ids)),
        "sort": rows.select(lambda p: _is_drawn(p) and p.is_filtered and not _in_head(p, num_ids)),
    }
    values: dict[str, list[Any]] = {"rows": list(rows.listed or ())}
    values["rows"] += values["rows"][:1] * (rows.num_rows - len(values["rows"]))
    for name, members in groups.items():
        values |= {
            name: members,
            f"{name}_rows": members,
            f"{name}_temperature": [params[row].temperature for row in members],
            f"{name}_top_k": [min(params[row].top_k or num_ids, num_ids) for row in members],
            f"{name}_top_p": [params[row].top_p for row in members],
            f"{name}_min_p": [params[row].min_p for row in members],
        }
    penalised = list(rows.slots)
    values |= {
        "penalised_rows": penalised,
        "penalised_slots": list(rows.slots.values()),
        "penalised_counts": [row not in rows.drafted for row in penalised],
        "repetition": [params[row].repetition_penalty for row in penalised],
        "frequency": [params[row].frequency_penalty for row in penalised],
        "presence": [params[row].presence_penalty for row in penalised],
        "masked_rows": list(rows.masked),
        "logprob_rows": [row for row, p in enumerate(rows.params) if p.top_logprobs is not None],
    }
    return values | _entries(rows, penalised, num_ids)


def _entries(rows: Rows, penalised: list[int], num_ids: int) -> dict[str, list[Any]]:
    """Lists of single logits, by their index in the flat logits of the rows, or of the group with
    penalties. They are padded to a power of two with entries that change nothing."""
    drafted = [
        place * num_ids + token
        for place, row in enumerate(penalised)
        for token in rows.drafted.get(row, ())
    ]
    biases = {
        row * num_ids + token: bias
        for row, params in enumerate(rows.params)
        if params.logit_bias
        for token, bias in params.logit_bias.items()
        if 0 <= token < num_ids
    }
    bans = [
        row * num_ids + token
        for row, banned in enumerate(rows.banned)
        for token in banned
        if 0 <= token < num_ids
    ]
    return {
        "drafted_index": _padded(drafted, drafted[:1]),
        "drafted_value": _padded([1] * len(drafted), [0]),
        "bias_index": _padded(list(biases), list(biases)[:1]),
        "bias_value": _padded(list(biases.values()), [0.0]),
        "ban_index": _padded(bans, bans[:1]),
    }


def _padded(values: list[Any], padding: list[Any]) -> list[Any]:
    if not values:
        return values
    return values + padding * ((1 << (len(values) - 1).bit_length()) - len(values))


def _is_drawn(params: SamplingParams) -> bool:
    return params.temperature >= GREEDY_BELOW


def _in_head(params: SamplingParams, num_ids: int) -> bool:
    return 0 < params.top_k <= HEAD or num_ids <= HEAD


def _plan(rows: Rows, values: Mapping[str, list[Any]], num_ids: int) -> Plan:
    heads, logprobs = values["head_top_k"], values["logprob_rows"]
    top = max((rows.params[row].top_logprobs or 0 for row in logprobs), default=0)
    return Plan(
        rows=rows.num_rows,
        listed=rows.listed is not None,
        plain=len(values["plain"]),
        heads=len(heads),
        width=head_width(max(heads)) if heads else 0,
        sorts=len(values["sort"]),
        penalised=len(rows.slots),
        drafted=len(values["drafted_index"]),
        biases=len(values["bias_index"]),
        bans=len(values["ban_index"]),
        masked=len(rows.masked),
        mask_words=len(rows.masked) * -(-num_ids // 32),
        logprobs=len(logprobs),
        top=1 << (top - 1).bit_length() if top else 0,
    )
