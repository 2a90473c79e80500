"""Which tokens a sequence has so far, counted on the device, for the penalties.

One row of the table belongs to one sequence: an int32 for each id, with how often the output has
it, and OF_PROMPT added where the prompt has it. The tokens that a step samples are counted by that
step itself, on the device; the host sends what it alone knows: the prompt, and tokens of drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefixd.server.engine.step import Chunk
from prefixd.server.model.transfer import on_device

OF_PROMPT = 1 << 30
_UNKNOWN = 1 << 62  # tokens counted: more than any sequence has, so that it is counted again


@dataclass(slots=True)
class _Slot:
    index: int
    num_counted: int


class TokenCounts:
    """Rows for at most ``max_rows`` sequences, in ``4 * max_rows * num_ids`` bytes on the device,
    which are allocated when the first is needed.

    A step never has more sequences than rows. The row of the sequence that was sampled least
    recently is reused, and a sequence that has lost its row is counted again. Ids of sequences must
    not be reused.
    """

    def __init__(self, device: torch.device, *, max_rows: int, num_ids: int) -> None:
        self.table: torch.Tensor | None = None
        self._device, self._max_rows, self._num_ids = device, max_rows, num_ids
        self._slots: dict[int, _Slot] = {}  # least recently sampled first
        self._cleared: list[int] = []
        self._prompt: list[int] = []
        self._output: list[int] = []

    def prepare(self, chunks: Sequence[Chunk]) -> list[int]:
        """Bring the rows of these sequences up to the tokens of their history, and assume that the
        step counts one more for each without a draft. Returns the row of each chunk.

        A history without the pending token is complete: the step that samples it counts it.
        """
        self.keep(chunks)
        try:
            rows = [self._row(chunk) for chunk in chunks]
            self._send()
        except Exception:
            for chunk in chunks:
                if chunk.seq_id in self._slots:
                    self._slots[chunk.seq_id].num_counted = _UNKNOWN
            raise
        finally:
            self._cleared, self._prompt, self._output = [], [], []
        return rows

    def keep(self, chunks: Sequence[Chunk]) -> None:
        """None of these sequences, of one step, loses its row to another of that step."""
        for chunk in chunks:
            if chunk.seq_id in self._slots:
                self._slots[chunk.seq_id] = self._slots.pop(chunk.seq_id)

    def _row(self, chunk: Chunk) -> int:
        slot = self._slots.get(chunk.seq_id)
        is_pending = chunk.is_pending
        num_tokens = len(chunk.history) + is_pending
        if slot is None or slot.num_counted > num_tokens:
            assert not is_pending, "the step in flight counts for this sequence"
            slot = self._assign(chunk, slot)
        start = slot.index * self._num_ids
        self._output += [start + token for token in chunk.history[slot.num_counted :]]
        slot.num_counted = num_tokens + (chunk.draft is None)
        return slot.index

    def _assign(self, chunk: Chunk, slot: _Slot | None) -> _Slot:
        """Clear a row for a sequence, and count its prompt."""
        if slot is None:
            index = len(self._slots)
            if index == self._max_rows:
                index = self._slots.pop(next(iter(self._slots))).index
            slot = self._slots[chunk.seq_id] = _Slot(index, 0)
        self._cleared.append(slot.index)
        start = slot.index * self._num_ids
        # A prompt may have ids with an embedding and without a logit.
        prompt = set(chunk.history[: chunk.num_prompt_tokens])
        self._prompt += [start + token for token in prompt if 0 <= token < self._num_ids]
        slot.num_counted = chunk.num_prompt_tokens
        return slot

    def _send(self) -> None:
        if self.table is None:
            size = (self._max_rows, self._num_ids)
            self.table = torch.zeros(size, dtype=torch.int32, device=self._device)
        flat = self.table.view(-1)
        if self._cleared:
            self.table.index_fill_(0, on_device(self._cleared, self._device), 0)
        if self._prompt:
            flat.index_fill_(0, on_device(self._prompt, self._device), OF_PROMPT)
        if self._output:
            ones = torch.ones(len(self._output), dtype=torch.int32, device=self._device)
            flat.index_add_(0, on_device(self._output, self._device), ones)
