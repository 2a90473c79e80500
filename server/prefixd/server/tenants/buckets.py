"""Token buckets as values: what a tenant has left, and the headers that tell it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket now: it holds at most ``limit`` and gets ``limit`` more in a minute."""

    name: str
    limit: int
    level: float

    def seconds_until(self, level: float) -> float:
        """Seconds until the bucket holds ``level``, if no request takes from it."""
        return max(0.0, level - self.level) * 60.0 / self.limit

    def later(self, seconds: float, *, added: float) -> Self:
        """The bucket after ``seconds``, with ``added`` besides."""
        level = self.level + added + seconds * self.limit / 60.0
        return replace(self, level=min(float(self.limit), level))


def headers_of(buckets: Iterable[Bucket]) -> dict[str, str]:
    """``x-ratelimit-limit-``, ``-remaining-`` and ``-reset-requests`` and ``-tokens``; a reset is
    the time until the bucket is full."""
    headers = {}
    for bucket in buckets:
        headers[f"x-ratelimit-limit-{bucket.name}"] = str(bucket.limit)
        headers[f"x-ratelimit-remaining-{bucket.name}"] = str(max(0, math.floor(bucket.level)))
        headers[f"x-ratelimit-reset-{bucket.name}"] = duration(bucket.seconds_until(bucket.limit))
    return headers


def duration(seconds: float) -> str:
    """``seconds`` as OpenAI writes them, rounded up: 120ms, 7.5s, 6m0s, 1h2m0s."""
    thousandths = math.ceil(seconds * 1000)
    if thousandths < 1000:
        return f"{thousandths}ms"
    whole, rest = divmod(thousandths, 1000)
    hours, minutes, whole = whole // 3600, whole // 60 % 60, whole % 60
    shown = f"{hours}h" if hours else ""
    shown += f"{minutes}m" if hours or minutes else ""
    fraction = f".{rest:03d}".rstrip("0") if rest else ""
    return f"{shown}{whole}{fraction}s"
