"""KV reuse: blocks of equal tokens under the same prefix of the same tenant are shared.

A block is named by a hash chain: the digest of its tokens (of given embeddings the name of their
rows) and of everything before them. The chain
begins with tenant, prefix digest and the namespace of the pool (model fingerprint and dtype), so
no request can reach, or time, KV that another tenant, prefix or model computed.

::

    prefix of 6 virtual tokens, block size 4, tokens a b c d e f g

    | v v v v | v v a b | c d e f | g . . . |
                 name 0    name 1    not full: no name
    name 0 = H(seed, a b)    name 1 = H(name 0, c d e f)
"""

import hashlib
from array import array
from collections.abc import Sequence as Items

from prefixd.server.engine.block_pool import BlockPool
from prefixd.server.engine.inputs import parts_within
from prefixd.server.engine.sequence import Sequence

_NAME_BYTES = 16


class KVReuse:
    """Finds and registers the full blocks of sequences; owns no block itself."""

    def __init__(
        self, *, pool: BlockPool, block_size: int, namespace: str, enabled: bool = True
    ) -> None:
        """Without ``enabled`` nothing is registered, so nothing is found."""
        self._enabled = enabled
        self._pool = pool
        self._block_size = block_size
        self._namespace = namespace
        self.num_queried_tokens = 0
        self.num_reused_tokens = 0

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the first tokens of ``sequence``, in order. At least one token
        always remains to be run: its logits give the next token, or the next score."""
        if not self._takes_part(sequence):
            return []
        blocks = []
        next_token = sequence.next_target or len(sequence.tokens)
        for name in self._names(sequence, upto=next_token - 1):
            block = self._pool.find(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def covered(self, sequence: Sequence, num_blocks: int) -> int:
        """Tokens of ``sequence`` that its first ``num_blocks`` own blocks hold."""
        if num_blocks == 0:
            return 0
        return num_blocks * self._block_size - sequence.num_prefix_tokens % self._block_size

    def count(self, sequence: Sequence, reused_tokens: int) -> None:
        """Count the lookup at a sequence's first start."""
        if self._takes_part(sequence):
            self.num_queried_tokens += len(sequence.tokens)
            self.num_reused_tokens += reused_tokens

    def remember(self, sequence: Sequence, *, upto: int) -> None:
        """Register the blocks that the first ``upto`` tokens of ``sequence`` fill. To be called
        when its logits after them were finite: only then is all the KV they depend on known to be
        finite.

        Where all layers have windows, that is not all blocks: logits depend on none that is further
        back than the windows of all layers together, and a block there may hold NaN. A sequence
        that shares it has the same tokens under the same prefix of the same tenant, would compute
        the same, and fails where it depends on it, which removes the names (``forget``)."""
        if not self._takes_part(sequence):
            return
        own = sequence.block_table[sequence.num_prefix_tokens // self._block_size :]
        names = self._names(sequence, upto=upto)
        for index in range(sequence.num_remembered, len(names)):
            self._pool.remember(own[index], names[index])
        sequence.num_remembered = len(names)

    def forget(self, sequence: Sequence, block_table: Items[int]) -> None:
        """Remove the blocks of a sequence whose logits were not finite from the lookup;
        ``block_table`` is what the step read. It may hold no block any more."""
        self._pool.forget(block_table[sequence.num_prefix_tokens // self._block_size :])

    def _takes_part(self, sequence: Sequence) -> bool:
        """Blocks are named by tokens alone: KV that depends on more is not shared."""
        request = sequence.request
        return self._enabled and request.kv_reuse and not request.num_side_blocks

    def _names(self, sequence: Sequence, *, upto: int) -> list[bytes]:
        """Names of the blocks that the first ``upto`` tokens fill."""
        names = sequence.block_names
        full = (sequence.num_prefix_tokens % self._block_size + upto) // self._block_size
        while len(names) < full:
            start, stop = (self.covered(sequence, len(names) + more) for more in (0, 1))
            tokens = array("q", sequence.tokens[start:stop]).tobytes()
            before = names[-1] if names else self._seed(sequence)
            inputs = parts_within(sequence.request.inputs, start, stop)
            names.append(_digest(before, tokens, *(part.name for part in inputs)))
        return names[:full]

    def _seed(self, sequence: Sequence) -> bytes:
        prefix = "" if sequence.prefix is None else sequence.prefix.key.content
        return _digest(*(part.encode() for part in (self._namespace, sequence.tenant, prefix)))


def _digest(*parts: bytes) -> bytes:
    hashed = hashlib.blake2b(digest_size=_NAME_BYTES)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()
