"""The model that is measured, and how many bytes its steps have to read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from prefixd.server.model.buffers import StepSizes
from prefixd.server.model.decoders import make_decoder
from prefixd.server.model.load import prepare_base
from prefixd.server.model.paged import PagedDecoder

BLOCK = 16


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A dense Llama."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    ids: int
    context: int

    @property
    def weight_bytes(self) -> int:
        """Bytes in 16 bits of all weights that a step reads: not the embeddings, of which it reads
        a row for each token."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return 2 * (self.layers * layer + self.width + self.ids * self.width)

    @property
    def position_bytes(self) -> int:
        """Bytes in 16 bits of the keys and values of one position, in all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def floor(self, rows: int, positions: float, copy_rate: float) -> float:
        """Seconds of a step that reads the weights and ``positions`` of each row once, at
        ``copy_rate`` bytes a second."""
        return (self.weight_bytes + rows * positions * self.position_bytes) / copy_rate

    def config(self) -> Any:
        """The config of transformers."""
        return transformers.LlamaConfig(
            vocab_size=self.ids,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )


def random_model(size: ModelSize, device: torch.device) -> Any:
    """A random model in bfloat16, made on the device."""
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            size.config(), dtype=torch.bfloat16
        ).eval()


def make_paged(
    size: ModelSize, device: torch.device, *, num_blocks: int, max_rows: int
) -> PagedDecoder:
    """The decoder of a random model, with random keys and values in its pool: zeros would cost
    less power."""
    model = random_model(size, device)
    base = prepare_base(model, None, name="random", dtype="bfloat16", device=str(device))
    del model
    decoder = make_decoder(
        base,
        "paged",
        num_blocks=num_blocks,
        block_size=BLOCK,
        data_folder=Path(),
        sizes=StepSizes(rows=max_rows + 16, tokens=4096, decoding=max_rows),
    )
    assert isinstance(decoder, PagedDecoder)
    with torch.inference_mode():
        decoder.cache.pool.normal_()
    return decoder
