"""The vocabulary of a loaded model."""

from copy import copy

from prefixd.server.model.grammar.source import Vocabulary
from prefixd.server.model.load import LoadedBase


def vocabulary_of(base: LoadedBase) -> Vocabulary:
    """What grammars need to know of the tokens of ``base``."""
    backend = copy(base.tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    ids = backend.get_vocab(with_added_tokens=True).values()
    eos = sorted(i for i in base.eos_token_ids if 0 <= i < base.num_logits)
    return Vocabulary(backend.to_str(), 1 + max(ids), base.num_logits, eos)
