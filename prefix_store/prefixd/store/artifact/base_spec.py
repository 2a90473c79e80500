"""The base model that an artifact is checked against."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from prefixd.store.artifact.kinds import Kind
from prefixd.store.errors import ArtifactRefused

SEQ_2_SEQ = "SEQ_2_SEQ_LM"


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The served base: shapes an artifact must match and bounds its values must satisfy.

    ``embedding_width`` is that of the input embeddings, which may be narrower than the hidden size.
    ``dtype`` is the serving dtype (``float32``, ``float16`` or ``bfloat16``): values are checked
    after the cast to it. ``max_abs_embedding`` and ``max_abs_kv`` bound |x| of a soft prompt and
    of a KV prefix; the server derives them from the values the base itself produces.
    ``encoder_layers`` is None for a decoder. ``num_layers`` are those of the decoder.
    ``refused_kinds`` are those that the base cannot take, each with the reason: "expected …".
    ``attention_module`` is the name of a layer's attention, with ``{}`` for the layer, where the
    base takes adaption prompts.
    """

    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    embedding_width: int
    max_virtual_tokens: int
    dtype: str
    max_abs_embedding: float
    max_abs_kv: float
    encoder_layers: int | None = None
    refused_kinds: Mapping[Kind, str] = field(default_factory=dict)
    attention_module: str | None = None

    @property
    def kv_width(self) -> int:
        """Columns of a KV prefix: layers × (K and V) × KV heads × head_dim."""
        return self.prefix_layers * 2 * self.num_kv_heads * self.head_dim

    @property
    def prefix_layers(self) -> int:
        """Layers of a KV prefix. PEFT counts those of the encoder, where there is one, which are
        too few for a longer decoder: its config must then name the decoder's."""
        return max(self.num_layers, self.encoder_layers or 0)

    @property
    def task_type(self) -> str:
        """PEFT's name for what the base does."""
        return "CAUSAL_LM" if self.encoder_layers is None else SEQ_2_SEQ

    def require_kind(self, kind: Kind) -> None:
        """Raise ArtifactRefused for a kind that the base cannot take."""
        reason = self.refused_kinds.get(kind)
        if kind.is_composed and self.encoder_layers is not None:
            reason = "expected one prefix, since the base is an encoder-decoder"
        if reason is None and kind is Kind.ADAPTION_PROMPT and self.attention_module is None:
            reason = "expected another kind, since this server has no place for one"
        if reason is not None:
            raise ArtifactRefused(
                "unsupported_kind", f"{kind} on the base {self.name}: {reason}", param="kind"
            )
