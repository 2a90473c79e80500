"""Prefixes in host memory: an artifact in the serving dtype, ready to compile to KV."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefixd.server.engine.prefix_source import PrefixUnavailable
from prefixd.server.engine.request import Composition, PrefixKey, Ranges
from prefixd.server.model.encoder_decoder.layout import decoder_kv, packed
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.per_layer import soft_prompt_refused
from prefixd.server.model.threads import limit_thread
from prefixd.store.artifact.artifact import Artifact
from prefixd.store.artifact.composition import encoded_runs
from prefixd.store.artifact.kinds import Kind, TextRole
from prefixd.store.artifact.weights import Floats


@dataclass(frozen=True)
class SoftPrompt:
    """``embeddings`` [num_tokens, embedding_width] take the place of word embeddings."""

    embeddings: torch.Tensor
    gated_from = None

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return self.embeddings.shape[0]


@dataclass(frozen=True)
class HardPrompt:
    """Token ids, run like any other tokens."""

    token_ids: tuple[int, ...]
    gated_from = None

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class KVPrefix:
    """``kv`` [2 * num_layers, num_tokens, num_kv_heads * head_dim]: keys of layer i at 2i and
    values at 2i + 1, as the pool stores them (keys after the rotary embedding).

    Of a model whose layers differ, as ``KVCache`` has it. ``side`` is the content of its side
    blocks, where the prefix was compiled before. With ``gated_from`` it is a gated prefix that
    returns from the host tier."""

    kv: torch.Tensor
    side: Sequence[torch.Tensor] = ()
    gated_from: int | None = None

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return self.kv.shape[1]


@dataclass(frozen=True)
class AdaptionPrompt:
    """``prompts`` [layers, num_tokens, width] and ``gates`` [layers] float32 of the layers from
    ``gated_from`` to the last: see ``gated``."""

    prompts: torch.Tensor
    gates: torch.Tensor
    gated_from: int

    @property
    def num_tokens(self) -> int:
        """Rows of each layer."""
        return self.prompts.shape[1]


@dataclass(frozen=True)
class Stack:
    """Virtual tokens of several prefixes, one after another. Only the first part may be a KV
    prefix."""

    parts: tuple[SoftPrompt | HardPrompt | KVPrefix, ...]
    gated_from = None

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return sum(part.num_tokens for part in self.parts)

    def within(
        self, start: int, stop: int
    ) -> Iterator[tuple[int, SoftPrompt | HardPrompt | KVPrefix, int, int]]:
        """The parts of the virtual tokens ``start .. stop``: the first of these tokens, counted
        from ``start`` on, and the rows of the part."""
        before = 0
        for part in self.parts:
            first = max(start, before) - before
            last = min(stop, before + part.num_tokens) - before
            if first < last:
                yield before + first - start, part, first, last
            before += part.num_tokens


Prefix = SoftPrompt | HardPrompt | KVPrefix | AdaptionPrompt | Stack


@dataclass(frozen=True, eq=False)
class InputEmbeddings:
    """``embeddings`` [num_rows, embedding_width], in the serving dtype, in place of prompt tokens;
    ``name`` identifies the rows among those of a tenant."""

    embeddings: torch.Tensor
    name: bytes

    @property
    def num_rows(self) -> int:
        """Positions they take."""
        return self.embeddings.shape[0]


@dataclass(frozen=True, eq=False)
class InputTokens:
    """Tokens of a text prefix that stand in a prompt; ``name`` as of InputEmbeddings."""

    token_ids: tuple[int, ...]
    name: bytes

    @property
    def num_rows(self) -> int:
        """Positions they take."""
        return len(self.token_ids)


def prefix_of(artifact: Artifact, base: LoadedBase, tokenizer: Any) -> Prefix:
    """Cast an artifact's values to the serving dtype, in the layout of the KV pool.

    The KV layout of an artifact is PEFT's: ``w.view(P, 2L, H_kv, hd).permute(1, 2, 0, 3)``. A soft
    prompt of an encoder-decoder stays embeddings, and takes no positions of its sequences.
    """
    if artifact.kind is Kind.HARD_PROMPT:
        assert artifact.text is not None
        is_system = artifact.role is TextRole.SYSTEM
        encode = tokenizer.encode_system if is_system else tokenizer.encode_prefix
        return HardPrompt(tuple(encode(artifact.text)))
    assert artifact.values is not None
    values, shape = torch.from_numpy(artifact.values).to(base.dtype), base.shape
    kv_width = shape.num_kv_heads * shape.head_dim
    if artifact.kind is Kind.SOFT_PROMPT:
        if base.pair is None:
            return SoftPrompt(values)
        kv = packed(values, num_layers=shape.num_layers, kv_width=kv_width)
        return KVPrefix(kv, gated_from=0)
    if artifact.kind is Kind.ADAPTION_PROMPT:
        assert artifact.gates is not None
        prompts = values.view(len(artifact.gates), artifact.num_virtual_tokens, -1)
        gates = torch.from_numpy(artifact.gates)
        return AdaptionPrompt(prompts, gates, base.shape.num_layers - len(gates))
    per_layer = values.view(artifact.num_virtual_tokens, -1, kv_width).transpose(0, 1)
    if base.pair is not None:
        per_layer = decoder_kv(per_layer, num_layers=shape.num_layers)
    return KVPrefix(per_layer.contiguous())


def stack_of(artifacts: Sequence[Artifact], base: LoadedBase, tokenizer: Any) -> Stack:
    """The virtual tokens of several artifacts, one after another; texts next to each other are one
    text."""
    places = enumerate(artifact.text for artifact in artifacts)
    runs = encoded_runs([place if text is None else text for place, text in places], tokenizer)
    parts: list[SoftPrompt | HardPrompt | KVPrefix] = []
    for run in runs:
        part = (
            prefix_of(artifacts[run], base, tokenizer) if isinstance(run, int) else HardPrompt(run)
        )
        assert isinstance(part, SoftPrompt | HardPrompt | KVPrefix), "others are refused before"
        parts.append(part)
    return Stack(tuple(parts))


def blend_of(
    artifacts: Sequence[Artifact], weights: Sequence[float], base: LoadedBase
) -> SoftPrompt:
    """The weighted mean of soft prompts of one length, summed in float32 in this order and rounded
    to the serving dtype once."""
    total: torch.Tensor | None = None
    for artifact, weight in zip(artifacts, weights, strict=True):
        assert artifact.values is not None
        term = torch.from_numpy(artifact.values).to(torch.float32) * weight
        total = term if total is None else total + term
    assert total is not None
    return SoftPrompt(total.to(base.dtype))


def rows_of(prefix: Prefix, rows: Ranges) -> Prefix:
    """These rows of a soft prompt or a text, one range after another; without any, the whole
    prefix."""
    if not rows:
        return prefix
    if isinstance(prefix, HardPrompt):
        return HardPrompt(tuple(t for start, stop in rows for t in prefix.token_ids[start:stop]))
    assert isinstance(prefix, SoftPrompt), "only virtual tokens of these stand apart"
    return SoftPrompt(torch.cat([prefix.embeddings[start:stop] for start, stop in rows]))


_NAMES = {
    Kind.SOFT_PROMPT: "a soft prompt",
    Kind.KV_PREFIX: "a KV prefix",
    Kind.HARD_PROMPT: "a text",
}
_NO_TEXTS = (
    "expected a soft prompt or a KV prefix, since the encoder of an encoder-decoder reads all of a "
    "prompt together; put the text in front of the prompt"
)
_NO_ADAPTION_PROMPTS = (
    "expected a soft prompt or a KV prefix, since PEFT trains no adaption prompts for "
    "encoder-decoders"
)


def refused_kinds(base: LoadedBase) -> dict[Kind, str]:
    """Kinds of prefixes that a base cannot take, with the reason."""
    if base.pair is not None:
        return {
            Kind.HARD_PROMPT: _NO_TEXTS,
            Kind.ADAPTION_PROMPT: _NO_ADAPTION_PROMPTS,
        }
    reasons = {
        Kind.SOFT_PROMPT: soft_prompt_refused(base.module),
        Kind.KV_PREFIX: base.layers.kv_prefix_refused(base.shape.num_layers),
    }
    refused = {kind: reason for kind, reason in reasons.items() if reason is not None}
    expected = offered(refused)
    return {kind: f"expected {expected}, since {reason}" for kind, reason in refused.items()}


def offered(refused: Collection[Kind]) -> str:
    """The kinds that a decoder takes, for people."""
    *others, last = [name for kind, name in _NAMES.items() if kind not in refused]
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class StorePrefixSource:
    """A PrefixSource over the prefix store. ``fetch`` runs on the engine's fetch threads.

    ``open_artifact`` reads and validates a stored artifact; it raises PrefixUnavailable with a
    message for the tenant when it cannot.
    """

    open_artifact: Callable[[PrefixKey], Artifact]
    base: LoadedBase
    tokenizer: Any

    def fetch(self, key: PrefixKey) -> Prefix:
        """Load one prefix, or rows of one, into host memory, in the serving dtype."""
        limit_thread()
        if key.composition is None:
            whole = prefix_of(self.open_artifact(key), self.base, self.tokenizer)
        else:
            whole = self._composed(key.tenant, key.composition)
        return rows_of(whole, key.rows)

    def _composed(self, tenant: str, composition: Composition) -> Prefix:
        """Load the members, and make one prefix of them. Raises PrefixUnavailable, with the digest
        of the member that failed."""
        artifacts = [self._member(tenant, digest) for digest in composition.digests]
        if composition.kind == Kind.BLEND:
            return blend_of(artifacts, composition.weights, self.base)
        return stack_of(artifacts, self.base, self.tokenizer)

    def _member(self, tenant: str, digest: str) -> Artifact:
        try:
            return self.open_artifact(PrefixKey(tenant, digest))
        except PrefixUnavailable as error:
            raise PrefixUnavailable(f"the member {digest}: {error}", code=error.code) from error

    def embeddings(self, key: PrefixKey) -> InputEmbeddings | InputTokens:
        """Load rows of a soft prompt, or the last tokens of a text, for a prompt. Raises as
        ``fetch``."""
        prefix = self.fetch(key._replace(rows=()))
        name = key.content.encode()
        if isinstance(prefix, HardPrompt) and key.rows[-1][1] != prefix.num_tokens:
            # The manifest counted other tokens; it was corrected as the text was read.
            raise PrefixUnavailable(
                f"the text has {prefix.num_tokens} tokens, and had {key.rows[-1][1]} for an "
                "earlier version of the server; please try again"
            )
        rows = rows_of(prefix, key.rows)
        if isinstance(rows, HardPrompt):
            return InputTokens(rows.token_ids, name)
        assert isinstance(rows, SoftPrompt)
        return InputEmbeddings(rows.embeddings, name)

    def given(self, rows: Floats, name: bytes) -> InputEmbeddings:
        """Embeddings [n, embedding_width] of a request as input, under ``name``."""
        limit_thread()
        return InputEmbeddings(torch.from_numpy(rows).to(self.base.dtype), name)
