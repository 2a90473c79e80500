"""The host tier: compiled prefixes in host memory, which return to the pool by a copy."""

from collections import OrderedDict

from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.step import StagedPrefix


class HostTier:
    """Least recently used prefixes leave first when ``max_tokens`` virtual tokens are passed."""

    def __init__(self, *, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: OrderedDict[PrefixKey, StagedPrefix] = OrderedDict()
        self.num_tokens = 0
        self.num_changes = 0

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def keys(self) -> list[PrefixKey]:
        """What is kept, least recently used first."""
        return list(self._kept)

    def takes(self, num_tokens: int) -> bool:
        """Whether a prefix of this size could be kept at all."""
        return num_tokens <= self._max_tokens

    def get(self, key: PrefixKey) -> StagedPrefix | None:
        """What is kept of ``key``; it counts as used."""
        payload = self._kept.get(key)
        if payload is not None:
            self._kept.move_to_end(key)
        return payload

    def put(self, key: PrefixKey, payload: StagedPrefix) -> None:
        """Keep a compiled prefix, at the cost of the least recently used ones."""
        self.drop(key)
        if not self.takes(payload.num_tokens):
            return
        self._kept[key] = payload
        self.num_changes += 1
        self.num_tokens += payload.num_tokens
        while self.num_tokens > self._max_tokens:
            self.drop(next(iter(self._kept)))

    def drop(self, key: PrefixKey) -> None:
        """Forget ``key``, if it is kept."""
        payload = self._kept.pop(key, None)
        if payload is not None:
            self.num_changes += 1
            self.num_tokens -= payload.num_tokens

    def __repr__(self) -> str:
        return f"HostTier({len(self)} prefixes, {self.num_tokens}/{self._max_tokens} tokens)"
