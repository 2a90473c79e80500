"""Prompt lookup: the next tokens of a sequence, proposed from its own earlier text.

Answers repeat their prompt, and themselves: names, quotations, the keys of JSON, code. Where the
last tokens of a sequence have occurred before, those that followed then are proposed::

    tokens    A B C D E F G  x y  B C D       the last three occurred before: at 1
              0 1 2 3 4 5 6  7 8  9 ...       proposed: E F G x ...

The model verifies them in one pass (``step.Draft``), and the draw of each position does not depend
on what was proposed: so the output is the same as without. "Prompt Lookup Decoding" (Saxena, 2023),
with as many tokens as are worth their rows (``draft_plan``), by how many were accepted lately.
"""

from collections.abc import Sequence

from prefixd.server.engine.inputs import PLACEHOLDER

MAX_DRAFTS = 8
"""Most tokens proposed at a time."""

FORGOTTEN_AFTER = 64
"""What was observed of matches of a length is forgotten when none has been tried for so many
tokens: the text may have changed."""

_RUNS = (2, 3, 4)
"""Lengths of the runs that are looked up."""

LONGEST = 16
"""A match of more tokens counts as one of so many."""

_EXPECTED = {2: 0.4, 3: 0.55, 4: 0.65, 5: 0.7, 8: 0.85, LONGEST: 0.95}
"""How likely a token is accepted after a match of this length or more, before it is known: as in
answers of a small model in ``benchmarks.prompt_lookup``."""

_CLASSES = {n: max(c for c in _EXPECTED if c <= n) for n in range(_RUNS[0], LONGEST + 1)}
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
        """The length of an end of ``tokens`` that occurred before, at most ``LONGEST``, and the
        index of the token that followed it then; the last occurrence of its last 4 tokens, or of
        as many as have occurred. ``tokens`` are those of the last call, and more."""
        last, followers = len(tokens) - 1, self._followers
        stop = min(last, self._num_indexed + _MAX_INDEXED)
        for end in range(self._num_indexed, stop + 1):
            if tokens[end] == PLACEHOLDER:
                continue
            for length in _RUNS:
                if length <= end:
                    followers[tuple(tokens[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, stop + 1)
        if stop < last:
            return None
        match = None
        for length in _RUNS:  # a run has occurred only if its end has
            follower = followers.get(tuple(tokens[-length:]))
            if follower is None or length > last:
                return match
            match = length, follower
        return None if match is None else (_match_length(tokens, match[1]), match[1])


def _match_length(tokens: Sequence[int], follower: int) -> int:
    """How many tokens before ``follower`` are those at the end, if the last ``_RUNS[-1]`` are."""
    length, last = _RUNS[-1], len(tokens) - 1
    longest = min(LONGEST, follower)
    while length < longest and tokens[follower - 1 - length] == tokens[last - length]:
        length += 1
    return length


def continuation(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on; at the end of ``tokens`` the run from ``start`` repeats,
    so that a short cycle goes on. Fewer before a placeholder, which can not be proposed."""
    run = list(tokens[start : start + count])
    if PLACEHOLDER in run:
        return run[: run.index(PLACEHOLDER)]
    period = len(tokens) - start
    while len(run) < count:
        run.append(run[-period])
    return run


class Acceptance:
    """How many proposed tokens of a sequence were accepted lately, by the length of the match."""

    __slots__ = ("_accepted", "_tried", "_tried_at")

    def __init__(self) -> None:
        self._accepted = {n: expected * _EXPECTED_WEIGHT for n, expected in _EXPECTED.items()}
        self._tried = dict.fromkeys(_EXPECTED, _EXPECTED_WEIGHT)
        self._tried_at = dict.fromkeys(_EXPECTED, 0)

    def probability(self, length: int, *, at: int) -> float:
        """How likely a token is accepted, if those before it are, after a match of ``length`` at
        the end of ``at`` tokens."""
        kind = _CLASSES[length]
        if at - self._tried_at[kind] > FORGOTTEN_AFTER:
            self._accepted[kind] = _EXPECTED[kind] * _EXPECTED_WEIGHT
            self._tried[kind] = _EXPECTED_WEIGHT
        return min(_MOST_LIKELY, self._accepted[kind] / self._tried[kind])

    def observe(self, length: int, *, at: int, proposed: int, accepted: int) -> None:
        """Count a verified draft; what follows its first wrong token says nothing."""
        kind = _CLASSES[length]
        tried = min(proposed, accepted + 1)
        kept = _KEPT**tried
        self._accepted[kind] = kept * self._accepted[kind] + accepted
        self._tried[kind] = kept * self._tried[kind] + tried
        self._tried_at[kind] = at


class Lookup:
    """Proposals for one sequence: ``find``, ``propose`` and ``observe`` follow each other, with the
    same tokens."""

    __slots__ = ("_acceptance", "_at", "_follower", "_index", "_length")

    def __init__(self) -> None:
        self._index = NgramIndex()
        self._acceptance = Acceptance()
        self._length = self._follower = self._at = 0

    def find(self, tokens: Sequence[int]) -> float:
        """Look up what may follow ``tokens``. Returns how likely each token of it is accepted, if
        those before it are; 0 where nothing matches."""
        match = self._index.find(tokens)
        if match is None:
            return 0.0
        self._length, self._follower = match
        self._at = len(tokens)
        return self._acceptance.probability(self._length, at=self._at)

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """The first ``count`` tokens of what was found."""
        return continuation(tokens, self._follower, count)

    def observe(self, *, proposed: int, accepted: int) -> None:
        """Count how many tokens of the proposal were accepted."""
        self._acceptance.observe(self._length, at=self._at, proposed=proposed, accepted=accepted)
