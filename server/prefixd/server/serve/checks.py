"""What ``prefixd doctor`` checks of the settings without loading the model."""

import torch

from prefixd.server.model.decoders import DecoderUnavailable
from prefixd.server.model.int8_decoder import describe_int8
from prefixd.server.model.load import check_folder, is_folder
from prefixd.server.model.original import check_original
from prefixd.server.model.parallel.plan import ParallelRefused
from prefixd.server.serve.engine_config import scheduler_config
from prefixd.server.serve.loading import check_ranks, device_of, pool_tokens
from prefixd.server.serve.settings import Settings


def model_origin(settings: Settings) -> str:
    """Where the model is loaded from. Raises FileNotFoundError for a folder that does not exist and
    UnsupportedModel for one whose config or tokenizer cannot be served, or whose original is not
    the one that the settings name."""
    text = f"{settings.model} would be looked up on Hugging Face"
    if is_folder(settings.model):
        scheme = check_folder(
            settings.model,
            pool_tokens=pool_tokens(scheduler_config(settings)),
            device=device_of(settings),
            ranks=settings.tensor_parallel,
            rounded=settings.quantize == "int8",
        )
        text = f"local folder {settings.model}: config and tokenizer can be served"
        if scheme is not None:
            text += f", quantized with {scheme}"
    elif settings.fingerprint_of is not None and settings.model != "demo":
        return f"{text}, and compared with {settings.fingerprint_of} at start"
    if settings.fingerprint_of is not None:
        check_original(settings.fingerprint_of, settings.model, cache_dir=settings.root / "models")
        text += f", for prefixes of {settings.fingerprint_of}"
    return text


def check_int8(settings: Settings, *, device: str) -> str:
    """Whether int8 can be computed here and by what. Raises DecoderUnavailable or ParallelRefused
    where the settings ask for it and it cannot, as a start does."""
    asked = settings.quantize == "int8"
    try:
        check_ranks(settings.model_copy(update={"quantize": "int8"}), device=device)
        text = describe_int8(
            settings.cpu_kernels,
            getattr(torch, settings.dtype),
            torch.device(device),
            settings.root,
        )
    except (DecoderUnavailable, ParallelRefused) as reason:
        if asked:
            raise
        return f"off; with it, a start would fail: {reason}"
    return text if asked else f"off; with it: {text}"
