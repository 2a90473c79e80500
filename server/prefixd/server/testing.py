"""Shipped fakes of what the engine needs, without torch, for tests here and in other projects.

``FakeRunner``'s next token is a hash of (prefix digest, tokens so far), so a test of the API proves
that the right prefix reached the right request.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefixd.server.engine.constraint import is_allowed
from prefixd.server.engine.detokenizer import TokenText
from prefixd.server.engine.inputs import PLACEHOLDER, InputPart
from prefixd.server.engine.prefix_source import PrefixUnavailable, StagedPrefix
from prefixd.server.engine.request import PrefixKey, PromptScore, TokenLogprob
from prefixd.server.engine.runner import BlockingRunner
from prefixd.server.engine.step import Chunk, Sampled, Save, Source, Step, StepOutput, Targets

EOS = 256
EOS_TEXT = "<end>"
VOCAB_SIZE = 257


def fake_next_token(digest: str | None, tokens: Sequence[int]) -> int:
    """The byte (a letter a to z) that FakeRunner samples after ``tokens`` under a prefix."""
    text = f"{digest}|{','.join(map(str, tokens))}"
    return ord("a") + hashlib.sha256(text.encode()).digest()[0] % 26


@dataclass(frozen=True)
class FakeEmbeddings:
    """Input embeddings that have only a name and a number of rows."""

    name: bytes
    num_rows: int

    def rows(self) -> list[int]:
        """What FakeRunner takes each row for: numbers that are no token ids."""
        return [fake_row(self.name, row) for row in range(self.num_rows)]


def fake_row(name: bytes, row: int) -> int:
    """What FakeRunner takes one row of given embeddings for, in ``fake_next_token``."""
    digest = hashlib.sha256(b"%d:" % row + name).digest()
    return 1 << 32 | int.from_bytes(digest[:4], "big")


def fake_score(digest: str | None, tokens: Sequence[int], target: int) -> float:
    """The log-probability FakeRunner gives ``target`` after ``tokens`` under a prefix: -0.5 for the
    token that it would sample, less for others."""
    if target == fake_next_token(digest, tokens):
        return -0.5
    text = f"{digest}|{','.join(map(str, tokens))}|{target}"
    return -1.0 - hashlib.sha256(text.encode()).digest()[0] / 64


def fake_generate(
    digest: str | None,
    prompt: Sequence[int],
    count: int,
    *,
    banned: Callable[[Sequence[int]], Collection[int]] = lambda _output: (),
    mask: Callable[[Sequence[int]], bytes | None] = lambda _output: None,
) -> list[int]:
    """The ``count`` tokens FakeRunner gives for a prompt under a prefix; ``banned(output)`` are
    those that must not follow an output, ``mask(output)`` has those that may (None: all)."""
    tokens = list(prompt)
    for _ in range(count):
        token, output = fake_next_token(digest, tokens), tokens[len(prompt) :]
        tokens.append(_allowed(token, banned(output), mask(output)))
    return tokens[len(prompt) :]


def fake_combined(tokens: Sequence[int]) -> int:
    """The letter FakeRunner samples for an ensemble whose rows alone would have ``tokens``."""
    return ord("a") + sum(token - ord("a") for token in tokens) % 26


def fake_ensemble(
    rows: Sequence[tuple[str | None, Sequence[int]]],
    count: int,
    *,
    banned: Callable[[Sequence[int]], Collection[int]] = lambda _output: (),
    mask: Callable[[Sequence[int]], bytes | None] = lambda _output: None,
) -> list[int]:
    """The ``count`` tokens FakeRunner gives for an ensemble of these digests and prompts; the
    others are as for ``fake_generate``."""
    output: list[int] = []
    for _ in range(count):
        own = [fake_next_token(digest, [*prompt, *output]) for digest, prompt in rows]
        output.append(_allowed(fake_combined(own), banned(output), mask(output)))
    return output


def _allowed(token: int, banned: Collection[int], mask: bytes | None) -> int:
    """``token``, or the first letter behind it, that may follow; without one, the first id."""
    letters = [ord("a") + (token + step - ord("a")) % 26 for step in range(26)]
    for allowed in itertools.chain([token], letters, range(VOCAB_SIZE)):
        if allowed not in banned and (mask is None or is_allowed(mask, allowed)):
            return allowed
    raise AssertionError(f"no token may follow {token}")


@dataclass
class FakeRunner(BlockingRunner):
    """A ModelRunner that records the tokens of every block and checks what it reads.

    The tokens so far are read back through the block table from a fake KV pool, so a wrong block
    table gives a wrong output. ``steps`` keeps every step it ran. With ``depth`` 1 the engine plans
    and submits the next step before this one runs.

    The first ``state_blocks`` side blocks hold a state: the values of all positions so far, which
    must be those of the block table before the state advances. What is in the other side blocks of
    a sequence is written by its first chunk, and must be there in the later ones.
    """

    depth: int = 0
    block_size: int = 16
    state_blocks: int = 0
    vocab_size: int = VOCAB_SIZE
    steps: list[Step] = field(default_factory=list)
    slots: dict[tuple[int, int], object] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)

    def run(self, step: Step) -> StepOutput:
        """Run one step over plain data. Raises IndexError for a token id beyond the vocabulary, as
        an embedding table and a row of logits do."""
        self.steps.append(step)
        for chunk in step.chunks:
            self._check_tokens(chunk)
        saved: dict[PrefixKey, StagedPrefix] = {s.key: self._read_back(s) for s in step.saves}
        fresh = set(step.fresh)
        self.slots = {place: v for place, v in self.slots.items() if place[0] not in fresh}
        for copy in step.copies:
            for offset in range(self.block_size):
                if (copy.source, offset) in self.slots:
                    self.slots[copy.target, offset] = self.slots[copy.source, offset]
        for part in step.compiles:
            self._check_state(part.block_table, part.side_blocks, part.start)
            for position in range(part.start, part.stop):
                self._write(part.block_table, position, (part.key.content, position))
            self._advance_state(part.block_table, part.side_blocks, part.stop)
        step.join_masks()
        sampled: dict[int, Sequence[Sampled]] = {}
        for chunk in step.chunks:
            drafts = () if chunk.draft is None else chunk.draft.tokens
            assert not (drafts and self.state_blocks), "a state cannot be taken back"
            self._use_side_blocks(chunk)
            self._check_state(chunk.block_table, chunk.side_blocks, chunk.start)
            for offset, token in enumerate((*self._tokens(chunk), *drafts)):
                self._write(chunk.block_table, chunk.start + offset, token)
            self._advance_state(
                chunk.block_table, chunk.side_blocks, chunk.start + len(chunk.tokens)
            )
            if chunk.sampling is not None and chunk.ensemble is None:
                positions = [self._sample(chunk, number) for number in range(len(drafts) + 1)]
                sampled[chunk.seq_id] = chunk.verified(positions)
        sampled |= self._sample_ensembles(step)
        self.last = {seq_id: new[-1].token_id for seq_id, new in sampled.items()}
        for chunk in step.chunks:
            if chunk.ensemble in sampled:
                self.last[chunk.seq_id] = self.last[chunk.ensemble]
        scored = {
            chunk.seq_id: self._score(chunk, chunk.targets)
            for chunk in step.chunks
            if chunk.targets is not None
        }
        return StepOutput(sampled, saved, scored=scored)

    def _check_tokens(self, chunk: Chunk) -> None:
        biased = chunk.sampling.logit_bias if chunk.sampling is not None else ()
        drafts = () if chunk.draft is None else chunk.draft.tokens
        given = {place for part in chunk.inputs for place in _places(part)}
        for place, token in enumerate((*self._tokens(chunk), *drafts, *chunk.banned, *biased)):
            if place not in given and not 0 <= token < self.vocab_size:
                raise IndexError(f"token id {token} of {self.vocab_size}")

    def _score(self, chunk: Chunk, targets: Targets) -> list[PromptScore]:
        scores = []
        for index, target in enumerate(targets.tokens):
            digest, tokens = self._context(
                self._seen(chunk, chunk.start + targets.offset + index + 1)
            )
            token, logprob = fake_next_token(digest, tokens), fake_score(digest, tokens, target)
            top = tuple(TokenLogprob(token + i, -0.5 - i) for i in range(targets.top))
            scores.append(PromptScore(logprob, int(target != token), top))
        return scores

    def _tokens(self, chunk: Chunk) -> Sequence[int]:
        """The tokens of a chunk; a pending one is what the step before sampled, and a placeholder
        the row that is given for it."""
        if chunk.is_pending:
            return (*chunk.tokens[:-1], self.last[chunk.seq_id])
        if not chunk.inputs:
            return chunk.tokens
        tokens = list(chunk.tokens)
        for part in chunk.inputs:
            for row, place in enumerate(_places(part), start=part.start):
                assert tokens[place] == PLACEHOLDER, f"{part} replaces a token"
                tokens[place] = fake_row(part.payload.name, row)
        return tokens

    def _sample_ensembles(self, step: Step) -> dict[int, Sequence[Sampled]]:
        ensembles: dict[int, list[Chunk]] = {}
        for chunk in step.chunks:
            if chunk.ensemble is not None and chunk.sampling is not None:
                ensembles.setdefault(chunk.ensemble, []).append(chunk)
        assert all(rows[0].seq_id == leader for leader, rows in ensembles.items())
        return {leader: [self._sample_ensemble(rows)] for leader, rows in ensembles.items()}

    def _sample_ensemble(self, rows: Sequence[Chunk]) -> Sampled:
        own = [self._token_of(row, row.start + len(row.tokens)) for row in rows]
        leader = rows[0]
        token = _allowed(fake_combined(own), leader.banned, leader.mask)
        return replace(_sampled(leader, token), agreed=tuple(each == token for each in own))

    def _token_of(self, chunk: Chunk, length: int) -> int:
        if chunk.gated is None and chunk.source is None:
            return self._next(chunk.block_table, length)
        return self._after(self._seen(chunk, length))

    def _sample(self, chunk: Chunk, num_drafts: int) -> Sampled:
        """The token after the first ``num_drafts`` proposed ones."""
        token = self._token_of(chunk, chunk.start + len(chunk.tokens) + num_drafts)
        if chunk.draft is None or num_drafts <= chunk.draft.num_banned:
            token = _allowed(token, chunk.banned, chunk.mask)
        return _sampled(chunk, token)

    def _read_back(self, save: Save) -> "FakeStaged":
        held = [self._read(save.block_table, position) for position in range(save.num_tokens)]
        expected = [(save.key.content, position) for position in range(save.num_tokens)]
        assert held == expected, f"a prefix was saved from blocks that do not hold it: {held}"
        self._check_state(save.block_table, save.side_blocks, save.num_tokens)
        return FakeStaged(save.num_tokens, save.gated_from)

    def _check_state(self, table: Sequence[int], side: Sequence[int], length: int) -> None:
        """The state must be that after the first ``length`` positions of the block table."""
        if self.state_blocks:
            expected = tuple(self._read(table, position) for position in range(length)) or None
            assert len(side) >= self.state_blocks, "there are too few blocks for the state"
            for index, block in enumerate(side[: self.state_blocks]):
                state = self.slots.get((block, 0))
                assert state == (expected and (index, expected)), (
                    f"the state is not that after {length} positions: {state}"
                )

    def _advance_state(self, table: Sequence[int], side: Sequence[int], length: int) -> None:
        seen = tuple(self._read(table, position) for position in range(length))
        for index, block in enumerate(side[: self.state_blocks]):
            self.slots[block, 0] = (index, seen)

    def _use_side_blocks(self, chunk: Chunk) -> None:
        is_first = chunk.start == chunk.num_prefix_tokens
        for index, block in enumerate(chunk.side_blocks[self.state_blocks :]):
            own = ("side", chunk.seq_id, index)
            held = self.slots.setdefault((block, 0), own) if is_first else self.slots[block, 0]
            assert held == own, f"a side block of sequence {chunk.seq_id} holds {held}"
        if chunk.source is not None:
            assert is_first == bool(chunk.source.token_ids), "the encoder runs with the first chunk"
            self._encode(chunk, chunk.source)

    def _encode(self, chunk: Chunk, source: Source) -> None:
        """Write the input to the side blocks, behind the soft prompt that stands in front of it."""
        for place, token in zip(self._source_places(chunk), source.token_ids, strict=False):
            self.slots[place] = token

    def _source_places(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Where the input is: behind the places of a block that show whose it is."""
        if chunk.source is None:
            return []
        num_soft = 0 if chunk.gated is None else chunk.gated.num_tokens
        size, blocks = self.block_size, chunk.side_blocks
        positions = range(num_soft, chunk.source.num_tokens)
        return [(blocks[place // size], size + place % size) for place in positions]

    def _read(self, table: Sequence[int], position: int) -> object:
        place = (table[position // self.block_size], position % self.block_size)
        return self.slots.get(place, "hole")

    def _write(self, table: Sequence[int], position: int, value: object) -> None:
        self.slots[table[position // self.block_size], position % self.block_size] = value

    def _next(self, table: Sequence[int], length: int) -> int:
        return self._after([self._read(table, position) for position in range(length)])

    def _seen(self, chunk: Chunk, length: int) -> list[object]:
        """What the first ``length`` positions hold: as if the rows of a gated prefix came first,
        and the input of an encoder between prefix and tokens."""
        own = [self._read(chunk.block_table, position) for position in range(length)]
        source: list[object] = [
            self.slots.get(place, "hole") for place in self._source_places(chunk)
        ]
        rows: list[object] = []
        if chunk.gated is not None:
            table = chunk.gated.block_table
            rows = [self._read(table, row) for row in range(chunk.gated.num_tokens)]
            assert all(isinstance(row, tuple) for row in rows), f"a hole in a gated prefix: {rows}"
        return rows + own[: chunk.num_prefix_tokens] + source + own[chunk.num_prefix_tokens :]

    def _after(self, seen: list[object]) -> int:
        return fake_next_token(*self._context(seen))

    def _context(self, seen: list[object]) -> tuple[str | None, list[int]]:
        """Prefix digest and tokens."""
        virtual = [value for value in seen if isinstance(value, tuple)]
        digests = {value[0] for value in virtual}
        assert len(digests) <= 1, f"one sequence read the KV of several prefixes: {digests}"
        assert [value[1] for value in virtual] == list(range(len(virtual))), "prefix out of order"
        tokens = [value for value in seen[len(virtual) :] if isinstance(value, int)]
        assert len(tokens) == len(seen) - len(virtual), f"a hole in the KV of a sequence: {seen}"
        return next(iter(digests), None), tokens


def _sampled(chunk: Chunk, token: int) -> Sampled:
    wanted = chunk.sampling.top_logprobs if chunk.sampling is not None else None
    top = tuple(TokenLogprob(token + i, -0.5 - i) for i in range(wanted or 0))
    return Sampled(token, logprob=None if wanted is None else -0.5, top_logprobs=top)


def _places(part: InputPart) -> range:
    return range(part.offset, part.offset + part.stop - part.start)


@dataclass(frozen=True)
class FakeStaged:
    """A staged prefix that has only a length, and the first layer of a gated one."""

    num_tokens: int
    gated_from: int | None = None


@dataclass
class FakeSource:
    """A PrefixSource over a table of lengths; a missing key raises PrefixUnavailable. Those in
    ``gated`` are gated."""

    lengths: dict[PrefixKey, int] = field(default_factory=dict)
    gated: set[PrefixKey] = field(default_factory=set)
    fetched: list[PrefixKey] = field(default_factory=list)

    def fetch(self, key: PrefixKey) -> FakeStaged:
        """Return a prefix, or raise PrefixUnavailable."""
        self.fetched.append(key)
        if key not in self.lengths:
            raise PrefixUnavailable("the prefix is gone from the store")
        return FakeStaged(self.lengths[key], 0 if key in self.gated else None)


class ByteTokenizer:
    """Token ids are bytes; 256 ends a sequence."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """UTF-8 bytes; there are no special tokens to add."""
        del add_special_tokens
        return list(text.encode())

    @property
    def closing(self) -> list[int]:
        """The end of a sequence."""
        return [EOS]

    @property
    def special_tokens(self) -> dict[str, str]:
        """There are none."""
        return {}

    def encode_prefix(self, text: str) -> list[int]:
        """UTF-8 bytes."""
        return list(text.encode())

    def encode_system(self, text: str) -> list[int]:
        """The system turn, without the line break that may go on with it."""
        return self.encode(f"system: {text}")

    def without_opening(self, token_ids: list[int]) -> list[int]:
        """All of them: there are no opening tokens."""
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the bytes, without the end of sequence."""
        return bytes(t for t in token_ids if t < EOS).decode(errors="replace")

    def written(self, token_ids: Sequence[int]) -> str:
        """Text of the bytes, and of the end of sequence."""
        parts = (EOS_TEXT.encode() if t >= EOS else bytes([t]) for t in token_ids)
        return b"".join(parts).decode(errors="replace")

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """Each byte as a character."""
        return [EOS_TEXT if t >= EOS else chr(t) for t in token_ids]

    def detokenizer(self, prompt: Sequence[int]) -> "ByteDetokenizer":
        """A new incremental detokenizer."""
        return ByteDetokenizer(prompt)

    def token_bytes(self, token_id: int, previous: int | None) -> bytes | None:
        """The byte, after any token."""
        del previous
        return bytes([token_id]) if token_id < EOS else EOS_TEXT.encode()

    def spellings(self, text: str) -> Sequence[str]:
        """The text alone: it decodes to itself."""
        return (text,)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as lines of ``role: content``; tools and variables are not shown."""
        del tools, template_kwargs
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        if continue_final_message:
            return text.removesuffix("\n")
        return text + ("assistant: " if add_generation_prompt else "")


def byte_tokenizer_json() -> str:
    """The ``tokenizer.json`` of ByteTokenizer."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    letters |= {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": EOS, "content": EOS_TEXT, "special": True, **dict.fromkeys(flags, False)}
            ],
            "pre_tokenizer": {**byte_level, "use_regex": False},
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {**letters, EOS_TEXT: EOS}, "merges": []},
        }
    )


class ByteDetokenizer:
    """Decodes bytes incrementally; returns a character only when it is complete."""

    previous = None

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        del prompt  # a byte depends on no other
        self._held = b""

    def special(self, token_id: int) -> str:
        """Text of the end of sequence."""
        return EOS_TEXT if token_id == EOS else ""

    def push(self, token_id: int) -> Sequence[TokenText]:
        """The byte, with the character that it completes."""
        if token_id >= EOS:
            return (TokenText("", EOS_TEXT),)
        self._held += bytes([token_id])
        try:
            text = self._held.decode()
        except UnicodeDecodeError:
            return (TokenText(""),)
        self._held = b""
        return (TokenText(text),)

    def tentative(self, limit: int) -> Sequence[TokenText]:
        """None: a complete character does not change."""
        del limit
        return ()

    def flush(self) -> Sequence[TokenText]:
        """An incomplete last character as a replacement character."""
        text, self._held = self._held.decode(errors="replace"), b""
        return (TokenText(text, lead=len(text)),)
