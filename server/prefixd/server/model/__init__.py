"""All code that imports torch: loading, forward passes, sampling, detokenizing."""

import logging


def _is_noise(record: logging.LogRecord) -> bool:
    """Whether a line is one of those that torchao causes wherever transformers is imported: about
    the CUDA extensions that torch's builds for CPUs cannot load, and about its use of torch."""
    text = record.getMessage()
    if record.name == "torchao":
        import torch  # noqa: PLC0415  # torchao has imported it

        return torch.version.cuda is None and text.startswith("Failed to load") and "_C" in text
    return "register_constant() on Enum" in text


for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(lambda record: not _is_noise(record))
