"""The kinds of prefixes that a row serves, each with prompts and the tokens they must give."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefixd.server.engine.inputs import InputRun
from prefixd.server.engine.request import PrefixHandle
from prefixd.server.model.prefix import SoftPrompt
from prefixd.store.artifact.kinds import Kind as ArtifactKind
from prefixd.store.errors import ArtifactRefused
from tests.golden.golden_harness import (
    VOCAB,
    Adapter,
    Served,
    make_adapter,
    make_adaption_prompt,
    spec_of,
)
from tests.golden.placed import place, soft_prompt
from tests.sweep.sweep_references import (
    COUNT,
    Greedy,
    Reference,
    of_base,
    of_peft,
    of_placed,
    of_prefix,
    placed_pieces,
)

SHORT, LONG = 5, 40
"""Lengths of the prompts of each kind: inside of a window and past it."""

TEXT_LENGTH = 29
PEFT_KINDS = {  # column of the page: PEFT's type, virtual tokens; all past a window
    "soft prompt": ("PROMPT_TUNING", 29),
    "P-tuning": ("P_TUNING", 33),
    "CPT": ("CPT", 32),
    "KV prefix": ("PREFIX_TUNING", 29),
}
PLACED_LENGTH = 29
ADAPTER_LENGTH = 21
KINDS = ("base", "text", *PEFT_KINDS, "LLaMA-Adapter", "placed")

_LEAST_MARGIN, _ENOUGH_DISTINCT = 1e-3, 5
"""Of an output: no near ties, and not one token again and again in any context."""

_TRIES = 8
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""What PEFT and transformers raise for models that they cannot run."""


@dataclass(frozen=True)
class Case:
    """One request, and the tokens that it must give. ``text`` is its prompt without what
    ``inputs`` puts there."""

    kind: str
    handle: PrefixHandle | None
    text: list[int]
    expected: list[int]
    prompt: list[int]
    inputs: tuple[InputRun, ...] = ()

    def start(self, served: Served) -> Callable[[], list[int]]:
        """Submit it; the returned call waits for its tokens."""
        return served.start(self.prompt, self.handle, count=COUNT, inputs=self.inputs)


@dataclass(frozen=True)
class Kind:
    """One kind of a row. ``note`` says why it is refused (no ``cases``), or why its reference is
    not PEFT."""

    name: str
    cases: Sequence[Case]
    note: str = ""


def random_tokens(count: int, seed: int) -> list[int]:
    """Random token ids, none special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def make_kinds(model: Any, served: Served, folder: Path) -> list[Kind]:
    """All kinds of one row."""
    text = random_tokens(TEXT_LENGTH, seed=5)
    kinds = [
        Kind("base", _cases("base", None, _chosen(of_base(model, [])))),
        Kind("text", _cases("text", served.add_tokens(text), _chosen(of_base(model, text)))),
    ]
    kinds += [_peft_kind(name, model, served, folder / name) for name in PEFT_KINDS]
    return [*kinds, _llama_adapter(model, served, folder / "adaption"), _placed(model, served)]


def _llama_adapter(model: Any, served: Served, folder: Path) -> Kind:
    """A gated prefix in both layers, of the families for which PEFT has it."""
    name = "LLaMA-Adapter"
    if reason := spec_of(served.base).refused_kinds.get(ArtifactKind.ADAPTION_PROMPT):
        return Kind(name, (), f"refused: {reason}")
    try:
        adapter = make_adaption_prompt(model, ADAPTER_LENGTH, folder)
        handle = served.add(adapter)
        chosen = _chosen(of_peft(adapter.model))
    except ValueError as error:
        if "Unsupported model type" not in str(error):
            raise
        return Kind(name, (), "none: PEFT has none for this type of model")
    return Kind(name, _cases(name, handle, chosen))


def _placed(model: Any, served: Served) -> Kind:
    """Virtual tokens in front of the prompt and inside of it, which PEFT does not know."""
    if reason := spec_of(served.base).refused_kinds.get(ArtifactKind.SOFT_PROMPT):
        return Kind("placed", (), f"refused: {reason}")
    embeddings = soft_prompt(served, PLACED_LENGTH, seed=4)
    key = served.put(SoftPrompt(embeddings)).key
    cases = []
    for text, greedy in _chosen(of_placed(model, embeddings)):
        placed = place(served, key, placed_pieces(PLACED_LENGTH, text))
        cases.append(
            Case("placed", placed.prefix, text, greedy.tokens, placed.prompt, placed.inputs)
        )
    return Kind("placed", cases)


def _peft_kind(name: str, model: Any, served: Served, folder: Path) -> Kind:
    reason = spec_of(served.base).refused_kinds.get(
        ArtifactKind.KV_PREFIX if name == "KV prefix" else ArtifactKind.SOFT_PROMPT
    )
    if reason:
        return Kind(name, (), f"refused: {reason}")
    failure = ""
    for sizes, note in ((_found_sizes, ""), (_given_sizes, _GIVEN)):
        try:
            adapter = make_adapter(
                model, *PEFT_KINDS[name], folder / sizes.__name__, **sizes(name, served)
            )
            handle = served.add(adapter)
        except (ArtifactRefused, *_FAILURES) as error:
            failure = failure or f"PEFT cannot make one: {_line(error)}"
            continue
        direct = of_prefix(model, served.prefixes[handle.key], served.base)
        try:
            chosen, other = _preferring_peft(adapter, direct)
        except _FAILURES as error:
            failure = failure or f"neither PEFT nor transformers runs it: {_line(error)}"
            continue
        return Kind(name, _cases(name, handle, chosen), other or note)
    return _without_peft(name, model, served, PEFT_KINDS[name][1], failure)


_GIVEN = "PEFT needs num_attention_heads and token_dim in its own config"


def _found_sizes(name: str, served: Served) -> dict[str, Any]:
    """PEFT reads sizes from the model's config, where it takes the hidden size for the width of
    embeddings."""
    return {} if name == "KV prefix" else {"token_dim": served.base.shape.embedding_width}


def _given_sizes(name: str, served: Served) -> dict[str, Any]:
    """All sizes, where PEFT does not find them, or others."""
    shape = served.base.shape
    width = shape.num_kv_heads * shape.head_dim if name == "KV prefix" else shape.embedding_width
    return {"num_attention_heads": shape.num_kv_heads, "token_dim": width}


def _without_peft(name: str, model: Any, served: Served, length: int, note: str) -> Kind:
    """The same kind where PEFT does not know the model: only embeddings can be made up."""
    if name == "KV prefix":
        return Kind(name, (), f"none: {note}")
    prefix = SoftPrompt(soft_prompt(served, length, seed=3))
    chosen = _chosen(of_prefix(model, prefix, served.base))
    return Kind(name, _cases(name, served.put(prefix), chosen), note)


_PEFT_DIFFERS = {
    "mamba2": "it inserts the virtual tokens again before every new token, since it does not find "
    "the cache, which this model calls cache_params",
}
"""What PEFT does wrong, by type of model."""

Chosen = list[tuple[list[int], Greedy]]


def _preferring_peft(adapter: Adapter, direct: Reference) -> tuple[Chosen, str]:
    """Prompts with PEFT's tokens where PEFT runs and gives those of transformers under the same
    prefix; else with those, and why."""
    try:
        chosen = _chosen(of_peft(adapter.model))
    except _FAILURES as error:
        return _chosen(direct), f"PEFT cannot run it: {_line(error)}"
    if all(direct(prompt).tokens == greedy.tokens for prompt, greedy in chosen):
        return chosen, ""
    reason = _PEFT_DIFFERS.get(adapter.model.config.model_type, "the reason is not known")
    return _chosen(direct), f"PEFT gives other tokens than transformers: {reason}"


def _chosen(reference: Reference) -> Chosen:
    """A short and a long prompt whose outputs rounding cannot change."""
    return [_decided(reference, SHORT), _decided(reference, LONG)]


def _decided(reference: Reference, length: int) -> tuple[list[int], Greedy]:
    """The first prompt of enough different tokens in its output, else that of the most."""
    best: tuple[list[int], Greedy] | None = None
    for seed in range(_TRIES):
        prompt = random_tokens(length, seed)
        greedy = reference(prompt)
        if greedy.margin < _LEAST_MARGIN:
            continue
        if best is None or len(set(greedy.tokens)) > len(set(best[1].tokens)):
            best = prompt, greedy
        if len(set(best[1].tokens)) >= _ENOUGH_DISTINCT:
            return best
    assert best is not None, f"each of {_TRIES} prompts of {length} tokens leads to a near tie"
    return best


def _cases(kind: str, handle: PrefixHandle | None, chosen: Chosen) -> list[Case]:
    return [Case(kind, handle, prompt, greedy.tokens, prompt) for prompt, greedy in chosen]


def _line(error: Exception) -> str:
    """The beginning of a message, for the page."""
    text = textwrap.shorten(str(error), 160, placeholder=" ...")
    return text or type(error).__name__
