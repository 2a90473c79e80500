"""What an answer cost, as its ``usage`` says."""

from typing import Any

from prefixd.server.api.generate.admission import Admitted
from prefixd.server.engine.request import FinishEvent


class UsageCounter:
    """Counts while the sequences of one request end."""

    def __init__(self, admitted: Admitted) -> None:
        self._requests = admitted.requests
        self.prompt_tokens = admitted.prompt_tokens
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}

    def ended(self, choice: int, event: FinishEvent) -> None:
        """One sequence is done."""
        self.completion_tokens += event.completion_tokens
        # A prompt is counted once however many answers it gets, so it was cached as far as none of
        # them had to compute it: of n siblings the later ones share what the first computed.
        prompt = choice // self._requests[0].n
        cached = event.cached_tokens
        self._cached[prompt] = min(self._cached.get(prompt, cached), cached)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was there already."""
        return sum(self._cached.values())

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object; virtual tokens of a prefix are not among its numbers."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
