"""Ordinary texts for int8: some set the smoothing, others measure what the rounding costs."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from prefixd.server.engine.step import Chunk
from prefixd.server.model.batch import lay_out
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.tokenizer import Tokenizer

CALIBRATION = (
    (
        "The river rises in the hills behind the town, where a spring keeps the ground wet even "
        "in August. For the first mile it is narrow enough to step across. Below the old mill "
        "two smaller streams join it, and from there on boats were once pulled up as far as the "
        "stone bridge. The mill itself has not worked since 1931; its wheel was sold, and the "
        "building now holds three flats and a workshop for bicycles."
    ),
    (
        "User: My laptop does not charge any more. What can I check before I take it to a shop?\n"
        "Assistant: Try these steps in order:\n1. Plug the charger into another socket.\n2. Look "
        "for a bent pin or dust in the port, and remove the dust with a wooden toothpick.\n3. "
        "Hold the power button for 30 seconds with the charger removed, then connect it again.\n"
        "If the light stays off, the charger is probably broken."
    ),
    (
        "def moving_average(values, size):\n    if size < 1:\n        raise "
        "ValueError(f'expected a size of at least 1, got {size}')\n    total = 0.0\n    for "
        "index, value in enumerate(values):\n        total += value\n        if index >= "
        "size:\n            total -= values[index - size]\n        if index >= size - "
        "1:\n            yield total / size\n"
    ),
    (
        '{"order": 48213, "customer": {"name": "R. Okafor", "city": "Leeds"}, "items": [{"sku": '
        '"TX-90", "count": 2, "price": 14.5}, {"sku": "B7", "count": 1, "price": 129.99}], '
        '"paid": true, "notes": null}'
    ),
    (
        "Die Bibliothek öffnet werktags um neun Uhr. Bücher können vier Wochen lang ausgeliehen "
        "werden. La réunion est reportée à jeudi prochain, car deux collègues sont malades. El "
        "tren de las ocho llegó con veinte minutos de retraso."
    ),
    (
        "Energy cannot be created or destroyed, only changed from one form to another. When a "
        "ball of 0.5 kg falls from 10 m, it gains about 0.5 * 9.81 * 10 = 49 joules of kinetic "
        "energy. Friction with the air turns a small part of it into heat, so that the real "
        "speed at the ground is a little below 14 m/s."
    ),
)
"""Texts of several kinds: what the inputs of a layer look like depends on the kind."""

EVALUATION = (
    (
        "When the harbour froze in January, the ferries stopped for eleven days. Food was "
        "brought to the islands by sledge, first along the coast and then straight across the "
        "ice, which the pilots tested with long iron poles. No one was hurt, but one horse broke "
        "through near the lighthouse and had to be pulled out with ropes. In the evenings people "
        "sat together in the school, because it was the only house with enough coal. A teacher "
        "read aloud from the newspapers of the week before, and the children learned to play "
        "cards."
    ),
    (
        "User: Explain in simple words why the sky is blue.\nAssistant: Sunlight looks white, "
        "but it is made of many colours. When it passes through the air, it meets tiny molecules "
        "that send light in all directions. They do this much more with blue light than with red "
        "light. So when you look up, blue light comes to your eyes from every part of the sky. "
        "In the evening the light has a longer way through the air, most of the blue is gone, "
        "and the sky looks red."
    ),
    (
        "To make bread you need 500 g of flour, 350 ml of water, 10 g of salt and a little "
        "yeast. Mix everything in a bowl and let the dough rest for an hour. Fold it twice, "
        "shape it, and put it in a warm place until it has doubled in size. Bake it at 230 "
        "degrees for about 35 minutes. The bread is done when it sounds hollow. Let it cool on a "
        "rack before you cut it."
    ),
    (
        "import json\nfrom pathlib import Path\n\n\ndef load_config(path):\n    with open(path) "
        "as file:\n        config = json.load(file)\n    for key in ('name', "
        "'version'):\n        if key not in config:\n            raise KeyError(key)\n    return "
        "config\n"
    ),
)
"""Other texts than those of CALIBRATION."""

MAX_TOKENS = 128
"""Tokens of a text that are run."""

_CHUNK = 24
"""Tokens of a text in one pass; no multiple of a block."""

_FEW = 16
"""A text of fewer tokens says little; random ones take its place."""


def tokens_of(base: LoadedBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, at most MAX_TOKENS of each, for any tokenizer: ids without a logit are
    left out, and a text of which too few remain is replaced by random ids."""
    tokenizer = None if base.tokenizer is None else Tokenizer(base.tokenizer)
    length = min(MAX_TOKENS, base.context)
    generator = torch.Generator().manual_seed(len(texts))
    tokens = []
    for text in texts:
        ids = [] if tokenizer is None else tokenizer.encode(text)
        ids = [token_id for token_id in ids if token_id < base.num_logits][:length]
        if len(ids) < min(_FEW, length):
            ids = torch.randint(base.num_logits, (length,), generator=generator).tolist()
        tokens.append(ids)
    return tokens


def count_blocks(texts: Sequence[Sequence[int]], block_size: int) -> int:
    """KV blocks that texts need together."""
    return sum(-(-len(text) // block_size) for text in texts)


def run_texts(
    decoder: Decoder, texts: Sequence[Sequence[int]]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Run texts together over an unused pool, in passes that cut all of them within blocks. Yields
    the number of a text, a position, and the logits [n, ids] of it and the following ones."""
    free = itertools.count(1)
    size = decoder.block_size
    tables = [list(itertools.islice(free, count_blocks([text], size))) for text in texts]
    decoder.zero([block for table in tables for block in table])
    for start in range(0, max(map(len, texts)), _CHUNK):
        chunks = [
            (index, Chunk(0, tuple(text[start : start + _CHUNK]), start, table))
            for index, (text, table) in enumerate(zip(texts, tables, strict=True))
            if start < len(text)
        ]
        lengths = [len(chunk.tokens) for _, chunk in chunks]
        batch = lay_out([chunk for _, chunk in chunks], outputs=list(range(sum(lengths))))
        logits = decoder.forward(batch).values
        for (index, _), part in zip(chunks, torch.split(logits, lengths), strict=True):
            yield index, start, part
