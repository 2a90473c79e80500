"""Modules with a state instead of KV, as transformers has them, over the rows of a flat batch.

A mixer (linear attention, a state-space layer, a short convolution) takes a batch of equal lengths
and a cache with the states before it. Here its forward runs the rows of a pass in such batches::

    flat tokens    | a | b | c | d d d d | e e e e |       a, b, c decode; d, e are prompts
    calls          [a; b; c] with their states, [d; e] without one: they are the first tokens

No module is changed but for its ``forward``: outside of a pass it is what it was.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from prefixd.server.model.architecture import FAILURES
from prefixd.server.model.attention import current_pass
from prefixd.server.model.states import MixerState, StatePiece

Mixer = Callable[[torch.Tensor, "MixerCache"], Any]
"""A mixer's forward of an input [R, length, width] and a cache."""

_MAX_STATES = 8
"""States of a kind that a mixer may have."""

_LARGE_STATE = 10.0
_CLOSE = 0.05
"""Outputs after a large state that differ by less, relative to the largest, are the same."""


class MixerCache(Cache):  # type: ignore[misc]  # of transformers, which has no types
    """What a mixer is given as the cache: the states of one batch, and nothing of other layers.

    The cache of transformers keeps them, so that what a mixer reads and leaves is what it does with
    the model's own. ``linear`` is the state of MiniMax, which has methods of its own for it.
    """

    def __init__(self, num_states: int = _MAX_STATES) -> None:
        self.layer = LinearAttentionLayer(number_of_states=num_states)
        super().__init__(layers=_Everywhere(self.layer))
        self.linear: torch.Tensor | None = None

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """The state, None at the first token."""
        del layer_idx
        return self.linear

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        """Keep the state."""
        del layer_idx
        self.linear = linear_cache

    def load(self, pieces: Sequence[StatePiece], tensors: Sequence[torch.Tensor]) -> None:
        """Begin after the states ``tensors`` [R, *shape], which mixers may change."""
        layer = self.layer
        for piece, tensor in zip(pieces, tensors, strict=True):
            if piece.kind == "linear":
                self.linear = tensor
            elif piece.kind == "conv":
                layer.conv_states[piece.index] = tensor
                layer.conv_kernel_size[piece.index] = tensor.shape[-1]
                layer.is_conv_states_initialized[piece.index] = True
            else:
                layer.recurrent_states[piece.index] = tensor
                layer.is_recurrent_states_initialized[piece.index] = True
        layer.has_previous_state = dict.fromkeys(range(layer.number_of_states), True)

    def states(self) -> dict[tuple[str, int], torch.Tensor]:
        """What the mixer has left, by kind and index."""
        kept = {("conv", i): t for i, t in self.layer.conv_states.items() if t is not None}
        kept |= {
            ("recurrent", i): t for i, t in self.layer.recurrent_states.items() if t is not None
        }
        return kept if self.linear is None else kept | {("linear", 0): self.linear}


class _Everywhere(list[Any]):
    """The layers of a cache that has the same one at every index."""

    def __init__(self, layer: LinearAttentionLayer) -> None:
        super().__init__([layer])

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)


@dataclass(slots=True)
class _Call:
    """How a mixer was called: the width of its input, and all arguments but that and the cache."""

    cache: MixerCache
    width: int
    arguments: dict[str, Any]


class MixerRecord(list[Any]):
    """The modules that used a state of a cache in one pass of a model, and how they were called.

    It takes the place of the layers of that cache: empty, and at any index what the module that
    runs now keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, _Call] = {}
        self._running: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, index: Any) -> Any:
        return self.cache().layer

    @contextmanager
    def watch(self, module: Any) -> Iterator[None]:
        """Know which part of the model runs, until the block ends."""
        with ExitStack() as hooks:
            for part in module.modules():
                before = part.register_forward_pre_hook(self._begin, with_kwargs=True)
                after = part.register_forward_hook(self._end, always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def _begin(self, part: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._running.append((part, arguments, named))

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def cache(self) -> MixerCache:
        """That of the innermost module that runs now: it is a mixer."""
        part, positional, named = self._running[-1]
        if part not in self.calls:
            names = _names(part)
            arguments = dict(zip(names, positional, strict=False)) | named
            hidden = arguments.pop(names[0])
            self.calls[part] = _Call(MixerCache(), hidden.shape[-1], arguments)
        return self.calls[part].cache


def wrap_mixers(record: MixerRecord, *, dtype: torch.dtype) -> tuple[MixerState, ...]:
    """Let the recorded modules run the rows of passes. Returns their states, in the order in which
    ``current_pass().states.run`` numbers them; the model runs in ``dtype``."""
    continues: dict[type, bool] = {}
    states = []
    for number, (mixer, call) in enumerate(record.calls.items()):
        pieces = tuple(
            StatePiece(
                kind,
                index,
                tuple(tensor.shape[1:]),
                None if tensor.dtype == dtype else tensor.dtype,
            )
            for (kind, index), tensor in call.cache.states().items()
        )
        if type(mixer) not in continues:
            continues[type(mixer)] = _continues(mixer, call, dtype)
        states.append(MixerState(type(mixer).__name__, pieces, continues[type(mixer)]))
        _wrap(mixer, number)
    return tuple(states)


@torch.no_grad()
def _continues(mixer: Any, call: _Call, dtype: torch.dtype) -> bool:
    """Whether several tokens after a state give what they give one by one. Jamba's scan, for one,
    begins at zero whenever it gets more than a token."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    before = {
        name: (_LARGE_STATE * random(*state.shape)).to(state)
        for name, state in call.cache.states().items()
    }
    pieces = [StatePiece(kind, index, (), None) for kind, index in before]
    device = next(iter(before.values())).device
    hidden = random(1, 3, call.width).to(device, dtype)

    def run(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        cache = MixerCache()
        cache.load(pieces, [state.clone() for state in before.values()])
        forward = _with_cache(mixer.forward, _names(mixer), call.arguments)
        return torch.cat([output_of(forward(part, cache)) for part in parts], dim=1).float()

    alone = run(one_by_one(hidden))
    try:
        together = run([hidden])
    except FAILURES:
        return False
    return bool((together - alone).abs().max() <= _CLOSE * alone.abs().max())


def _wrap(mixer: Any, number: int) -> None:
    names = _names(mixer)

    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        own = type(self).forward.__get__(self)
        try:
            states = current_pass().states
        except LookupError:  # the model runs by itself
            return own(*positional, **named)
        arguments = dict(zip(names, positional, strict=False)) | named
        hidden = arguments.pop(names[0])
        return states.run(number, _with_cache(own, names, arguments), hidden)

    mixer.forward = MethodType(forward, mixer)  # a copy of the model has its own


def _names(mixer: Any) -> list[str]:
    """The names of the arguments of a module's forward; the first is its input."""
    return list(inspect.signature(type(mixer).forward).parameters)[1:]


def _with_cache(own: Callable[..., Any], names: list[str], arguments: dict[str, Any]) -> Mixer:
    """A mixer's forward of an input and a cache, which takes the place of the one it was given."""
    (cached,) = [name for name, value in arguments.items() if isinstance(value, Cache)]

    def call(hidden: torch.Tensor, cache: MixerCache) -> Any:
        return own(**{**arguments, names[0]: hidden, cached: cache})

    return call


def one_by_one(hidden: torch.Tensor) -> list[torch.Tensor]:
    """Inputs [R, length, width] as one of a token for each place."""
    return [hidden[:, place : place + 1] for place in range(hidden.shape[1])]


def output_of(output: Any) -> torch.Tensor:
    """The hidden states in what a mixer returns."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
