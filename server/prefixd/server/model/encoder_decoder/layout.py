"""Prefixes of encoder-decoders in the layout of the KV pool: [2 * layers, tokens, KV width]."""

import torch


def packed(embeddings: torch.Tensor, *, num_layers: int, kv_width: int) -> torch.Tensor:
    """Embeddings [n, width] as if they were KV [2 * num_layers, n, kv_width], zeros behind them."""
    rows = embeddings.new_zeros(len(embeddings), 2 * num_layers * kv_width)
    rows[:, : embeddings.shape[1]] = embeddings
    return rows.view(len(embeddings), 2 * num_layers, kv_width).transpose(0, 1).contiguous()


def unpacked(kv: torch.Tensor, *, width: int) -> torch.Tensor:
    """The embeddings [n, width] that ``packed`` stored."""
    return kv.transpose(0, 1).flatten(1)[:, :width]


def decoder_kv(stored: torch.Tensor, *, num_layers: int) -> torch.Tensor:
    """The KV [2 * num_layers, n, kv_width] that PEFT gives a decoder of ``stored``, which is
    [2N, n, kv_width].

    PEFT repeats the 2N rows and gives each layer four of the result, of which two would be for
    cross-attention; these it drops again, since the input is encoded (``PeftModel.get_prompt``).
    """
    parts = len(stored)
    order = [(4 * layer + half) % parts for layer in range(num_layers) for half in (0, 1)]
    return stored[order]
