"""How a call ended on one rank, and what that is for all of them together."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import StepOutput


class RankFailed(RuntimeError):
    """A pass failed on some rank, or ranks differ in what they sampled; all may go on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended. ``tokens`` is a checksum of the token ids that were sampled."""

    kind: Literal["ok", "memory", "error"] = "ok"
    message: str = ""
    tokens: int = 0

    @classmethod
    def of(cls, result: object) -> "Outcome":
        """That of a call that returned ``result``, or raised it."""
        if isinstance(result, Exception):
            kind: Literal["memory", "error"]
            kind = "memory" if isinstance(result, OutOfMemory) else "error"
            return cls(kind, f"{type(result).__name__}: {result}")
        if not isinstance(result, StepOutput):
            return cls()
        sampled = {
            seq_id: [(each.token_id, each.finite) for each in tokens]
            for seq_id, tokens in result.sampled.items()
        }
        return cls(tokens=zlib.crc32(repr(sampled).encode()))


def raise_failures(outcomes: Mapping[int, Outcome]) -> None:
    """Raise OutOfMemory when a rank had no memory, RankFailed when one failed otherwise."""
    for kind, error in (("memory", OutOfMemory), ("error", RankFailed)):
        for rank, outcome in outcomes.items():
            if outcome.kind == kind:
                raise error(f"rank {rank}: {outcome.message}")
    if len({outcome.tokens for outcome in outcomes.values()}) > 1:
        # A token that differs would be fed into this rank's next pass, and another into theirs.
        raise RankFailed("the ranks sampled different tokens from what should be equal logits")
