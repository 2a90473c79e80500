"""Prompt lookup: the next tokens of a sequence, proposed from its own earlier text.

Answers repeat their prompt, and themselves: names, quotations, the keys of JSON, code. Where the
last tokens of a sequence have occurred before, those that followed then are proposed::

    tokens    A B C D E F G  x y  B C D       the last three occurred before: at 1
              0 1 2 3 4 5 6  7 8  9 ...       proposed: E F G x ...

The model verifies them in one pass (``step.Draft``), and the draw of each position does not depend
on what was proposed: so the output is the same as without. "Prompt Lookup Decoding" (Saxena, 2023),
with as many tokens as are worth their rows, by how many were accepted lately.
"""

from collections.abc import Sequence
from math import log

MAX_DRAFTS = 8
"""Most tokens proposed at a time."""

PROBE_EVERY = 64
"""A sequence whose drafts do not pay verifies one token after so many, to learn when they would."""

_LENGTHS = (2, 3, 4)
_EXPECTED = {2: 0.4, 3: 0.6, 4: 0.7}
"""How likely a token is accepted after a match of this length, before it is known."""

_EXPECTED_WEIGHT = 2.0
_KEPT = 0.9
"""What an observed token still counts after the next one: about the last ten count."""

_MOST_LIKELY = 0.99
_MAX_INDEXED = 2048
"""Tokens added to the index at a time: a long prompt takes several steps."""


class NgramIndex:
    """Where runs of 2 to 4 tokens of one growing sequence occurred last."""

    __slots__ = ("_followers", "_num_indexed")

    def __init__(self) -> None:
        # The index of the token that follows the last occurrence.
        self._followers: dict[tuple[int, ...], int] = {}
        self._num_indexed = 1

    def find(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The length of the longest end of ``tokens`` that occurred before, and the index of the
        token that followed it then. ``tokens`` are those of the last call, and more."""
        last, followers = len(tokens) - 1, self._followers
        stop = min(last, self._num_indexed + _MAX_INDEXED)
        for end in range(self._num_indexed, stop + 1):
            for length in _LENGTHS:
                if length <= end:
                    followers[tuple(tokens[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, stop + 1)
        if stop < last:
            return None
        match = None
        for length in _LENGTHS:  # a run has occurred only if its end has
            follower = followers.get(tuple(tokens[-length:]))
            if follower is None or length > last:
                break
            match = length, follower
        return match


def continuation(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on; at the end of ``tokens`` the run from ``start`` repeats,
    so that a short cycle goes on."""
    run = list(tokens[start : start + count])
    period = len(tokens) - start
    while len(run) < count:
        run.append(run[-period])
    return run


class Acceptance:
    """How many proposed tokens of a sequence were accepted lately, by the length of the match."""

    __slots__ = ("_accepted", "_tried")

    def __init__(self) -> None:
        self._accepted = {n: _EXPECTED[n] * _EXPECTED_WEIGHT for n in _LENGTHS}
        self._tried = dict.fromkeys(_LENGTHS, _EXPECTED_WEIGHT)

    def probability(self, length: int) -> float:
        """How likely a token is accepted, if those before it are, after a match of ``length``."""
        return min(_MOST_LIKELY, self._accepted[length] / self._tried[length])

    def observe(self, length: int, *, proposed: int, accepted: int) -> None:
        """Count a verified draft; what follows its first wrong token says nothing."""
        tried = min(proposed, accepted + 1)
        kept = _KEPT**tried
        self._accepted[length] = kept * self._accepted[length] + accepted
        self._tried[length] = kept * self._tried[length] + tried

    def num_worth(self, length: int, least: float) -> int:
        """How many tokens are accepted with a probability of at least ``least``, each with those
        before it."""
        probability = self.probability(length)
        if probability < least:
            return 0
        return min(MAX_DRAFTS, int(log(min(least, 1.0)) / log(probability)))


class Lookup:
    """Proposals for one sequence."""

    __slots__ = ("_acceptance", "_index", "_length", "_next_probe")

    def __init__(self) -> None:
        self._index = NgramIndex()
        self._acceptance = Acceptance()
        self._length = _LENGTHS[0]
        self._next_probe = 0

    def propose(self, tokens: Sequence[int], *, least: float, limit: int) -> list[int]:
        """At most ``limit`` tokens that may follow ``tokens``, each with a probability of at least
        ``least``; none where nothing matches. Each is followed by ``observe`` before the next."""
        match = self._index.find(tokens)
        if match is None or limit < 1:
            return []
        length, follower = match
        count = min(limit, self._acceptance.num_worth(length, least))
        if count == 0:
            if len(tokens) < self._next_probe:
                return []
            count = 1
        self._length, self._next_probe = length, len(tokens) + PROBE_EVERY
        return continuation(tokens, follower, count)

    def observe(self, *, proposed: int, accepted: int) -> None:
        """Count how many tokens of the last proposal were accepted."""
        self._acceptance.observe(self._length, proposed=proposed, accepted=accepted)
