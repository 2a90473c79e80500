"""What a model's layers cache and how they attend, as the probe found it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixd.server.model.states import MixerState


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What layer ``layer`` caches for a position: keys of ``num_heads`` heads of ``key_width``, and
    as many values of ``value_width``. In a process of several, those that it holds."""

    layer: int
    num_heads: int
    key_width: int
    value_width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, width of keys, width of values."""
        return self.num_heads, self.key_width, self.value_width


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How layer ``layer`` attends: over what layer ``cache`` caches, ``direct`` or after the model
    computed keys and values from it. ``heads`` is the number of query heads and ``calls`` how often
    it attends in a pass.

    A ``window`` of W lets a position see itself and the W - 1 before it; a ``chunk`` of C lets it
    see those from the last multiple of C on. None: all. ``softcap`` bounds scores to its absolute
    value (None: no bound). With ``sinks`` a learned score for each head joins the softmax, with
    ``alibi`` scores grow with the position: by a slope for each head, or as a table says.
    """

    layer: int
    cache: int
    direct: bool
    heads: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    calls: int = 1

    def tokens_in_sight(self, num_virtual_tokens: int) -> int | None:
        """How many tokens after a prefix see any of its virtual tokens; None: all.

        ::

            virtual tokens 0 1 2, window of 4    | v v v t t t t          3 tokens see one
                                                   0 1 2 3 4 5 6
            virtual tokens 0 1 2, chunks of 5    | v v v t t | t t t ...  2 tokens see all
        """
        ends = []
        if self.window is not None:
            ends.append(self.window - 1)
        if self.chunk is not None:
            ends.append(-num_virtual_tokens % self.chunk)
        return min(ends, default=None)

    def never_in_sight(self, num_virtual_tokens: int) -> int:
        """How many of a prefix's virtual tokens, from its first on, no token after it sees."""
        starts = [0]
        if self.window is not None:
            starts.append(num_virtual_tokens - self.window + 1)
        if self.chunk is not None:
            starts.append(num_virtual_tokens // self.chunk * self.chunk)
        return max(starts)

    def options(self) -> list[str]:
        """What plain attention does not have, for people."""
        named = {
            f"a sliding window of {self.window} tokens": self.window is not None,
            f"chunks of {self.chunk} tokens": self.chunk is not None,
            f"a soft cap of {self.softcap}": self.softcap is not None,
            "sinks": self.sinks,
            "alibi": self.alibi,
            "keys and values that are computed from what is cached": not self.direct,
        }
        return [name for name, is_used in named.items() if is_used]


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a model that cache keys and values, and those that attend, by index; and the
    states of its mixers. A module of attention that names one of ``shared`` as its layer attends
    for the layer that cached last."""

    caches: Mapping[int, LayerCache]
    attention: Mapping[int, LayerAttention]
    states: Sequence[MixerState] = ()
    shared: frozenset[int | None] = frozenset()

    @property
    def one_shape(self) -> LayerCache | None:
        """The first layer's, where all cache the same and keys as wide as values, else None."""
        if not self.caches:
            return None
        first, *others = self.caches.values()
        equal = all(other.shape == first.shape for other in others)
        return first if equal and first.key_width == first.value_width else None

    def kv_prefix_refused(self, num_layers: int) -> str | None:
        """Why KV prefixes, which are of one shape in all layers, do not fit; None: they do."""
        if self.states:
            return (
                f"its layers of type {self.states[0].kind} keep a state, which keys and values "
                "do not have"
            )
        if len(self.caches) < num_layers:
            return f"{len(self.caches)} of its {num_layers} layers cache keys and values"
        if self.one_shape is not None:
            return None
        first = next(iter(self.caches.values()))
        if first.key_width != first.value_width:
            return (
                f"it caches two states of {first.key_width} and {first.value_width} numbers for a "
                "position, from which it computes keys and values"
            )
        return "its layers differ in the size of their keys and values"

    def sight_warnings(self, num_in_front: int | None) -> list[str]:
        """Which layers lose sight of virtual tokens, for people: of so many in front of the prompt;
        None: of those inside, which may be anywhere."""
        if num_in_front is None:
            return self._narrow_layers()
        lost: dict[tuple[int, int], list[str]] = {}
        for layer in self.attention.values():
            tokens = layer.tokens_in_sight(num_in_front)
            if tokens is not None:
                never = layer.never_in_sight(num_in_front)
                lost.setdefault((tokens, never), []).append(layer.options()[0])
        return [
            f"{len(options)} of {len(self.attention)} layers see no virtual token after the first "
            f"{tokens} tokens of prompt and output"
            f"{f', and never the first {never} of the prefix' if never else ''} "
            f"({', '.join(dict.fromkeys(options))})"
            for (tokens, never), options in sorted(lost.items())
        ]

    def _narrow_layers(self) -> list[str]:
        counts = Counter(
            layer.options()[0]
            for layer in self.attention.values()
            if layer.window is not None or layer.chunk is not None
        )
        return [
            f"{count} of {len(self.attention)} layers see virtual tokens only within {option}"
            for option, count in sorted(counts.items())
        ]

    def unseen_part(self, context: int) -> float:
        """Which part of the KV of a sequence of ``context`` positions no layer reads any more."""
        sizes = {i: c.num_heads * (c.key_width + c.value_width) for i, c in self.caches.items()}
        seen = dict.fromkeys(self.caches, 0)
        for layer in self.attention.values():
            spans = (span for span in (layer.window, layer.chunk) if span is not None)
            seen[layer.cache] = max(seen[layer.cache], min(spans, default=context))
        held = context * sum(sizes.values())
        return sum(sizes[i] * (context - seen[i]) for i in sizes) / held if held else 0.0

    @property
    def calls(self) -> int:
        """How often a pass attends."""
        return sum(layer.calls for layer in self.attention.values())

    def beyond_plain(self) -> str | None:
        """What the first layer that is not plain has or caches, for people; None: all are plain."""
        if self.states:
            return f"the states of {self.states[0].kind}"
        for layer in self.attention.values():
            if options := layer.options():
                return f"{' and '.join(options)} in layer {layer.layer}"
            if layer.cache != layer.layer:
                return f"the keys and values of layer {layer.cache} in layer {layer.layer}"
        if self.one_shape is None:
            return "keys and values whose sizes differ"
        return None
