"""What the store must know of the base model to judge an artifact."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The served base: shapes an artifact must match and bounds its values must keep.

    ``dtype`` is the serving dtype (``float32``, ``float16`` or ``bfloat16``): values are judged
    after the cast to it. ``max_abs_embedding`` and ``max_abs_kv`` bound |x| of a soft prompt and
    of a KV prefix; the server derives them from what the base itself produces (FACTS section 4:
    finite is not enough, 3e38 in a key poisons attention through a masked slot).
    """

    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_virtual_tokens: int
    dtype: str
    max_abs_embedding: float
    max_abs_kv: float

    @property
    def kv_width(self) -> int:
        """Columns of a KV prefix: layers × (K and V) × KV heads × head_dim."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim
